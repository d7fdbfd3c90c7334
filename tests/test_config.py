"""The schema and its errors: every shipped YAML, every rule, every kind of wrong value."""

import json
import os
import re
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT

from babyllama.config import (
    ConfigError,
    check_config,
    check_model_section,
    generated_files,
    read_yaml_file,
    training_command,
    unusual_values,
    usual_intermediate_size,
)
from babyllama.runs.finished_run import training_text_of
from train import load_config

GOOD = {
    "data": {"tokenizer_path": "t.json", "train_path": "train", "eval_path": "dev"},
    "model": {"type": "Llama", "name": "tiny", "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "training": {"lr": 1e-3, "batch_size": 8, "num_epochs": 1},
    "logging": {},
}


def raw(**changes) -> dict:
    """GOOD with dotted keys changed: raw(training__lr=1); a value of ... removes the key."""
    config = json.loads(json.dumps(GOOD))
    for dotted, value in changes.items():
        section, key = dotted.split("__")
        if value is ...:
            del config[section][key]
        else:
            config[section][key] = value
    return config


def problems(config) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_config(config)
    return caught.value.problems


@pytest.fixture
def config_file(tmp_path):
    def write(text: str | None = None, **changes):
        path = tmp_path / "c.yaml"
        path.write_text(yaml.safe_dump(raw(**changes)) if text is None else text, encoding="utf-8")
        return path

    return write


def test_defaults_are_filled_in():
    config = check_config(GOOD)
    assert config["data"]["seq_length"] == 128
    assert config["data"]["eval_samples"] == 256
    assert config["training"]["gradient_accumulation_steps"] == 1
    assert config["logging"] == {
        "wandb": False,
        "project": None,
        "tensorboard": False,
        "report_to": [],
        "output_dir": "./models/",
    }


def test_usual_intermediate_size():
    assert usual_intermediate_size("Llama", 192) == 512  # 8/3 x 192 exactly
    assert usual_intermediate_size("Llama", 256) == 688  # 682.67, up to a multiple of 8
    assert usual_intermediate_size("GPT2", 192) == 768
    for value in (None, ...):
        assert check_config(raw(model__intermediate_size=value) if value is None else GOOD)[
            "model"
        ]["intermediate_size"] == usual_intermediate_size("Llama", 64)


@pytest.mark.parametrize("text", ["3e-4", "3.0e-4", "0.0003", "3E-4", "+3e-4", ".3e-3"])
def test_scientific_notation_is_a_number(config_file, text):
    path = config_file(yaml.safe_dump(raw()).replace("lr: 0.001", f"lr: {text}"))
    assert load_config(path)["training"]["lr"] == pytest.approx(3e-4)


@pytest.mark.parametrize("text", ["None", "null", "~", ""])
def test_none_and_empty_values_are_null(config_file, text):
    path = config_file(
        yaml.safe_dump(raw()).replace("model:\n", f"model:\n  intermediate_size: {text}\n")
    )
    assert load_config(path)["model"]["intermediate_size"] == 176


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model__hidden_size": 200, "model__n_head": 6}, "hidden_size must be divisible by n_head (6); use 192 or 204, or n_head 5 or 10"),
        ({"data__seq_length": 31}, "data.seq_length: 31 is not allowed; a whole number from 32 to 2048"),
        ({"data__seq_length": 2049}, "data.seq_length: 2049 is not allowed"),
        ({"training__lr": 2e-2}, "training.lr: 0.02 is not allowed; a number from 1e-06 to 0.01"),
        ({"training__lr": 9e-7}, "training.lr: 9e-07 is not allowed"),
        ({"training__lr": "fast"}, "training.lr: 'fast' is not allowed; a number"),
        ({"training__lr": True}, "training.lr: True is not allowed; a number"),
        ({"training__batch_size": 0}, "training.batch_size: 0 is not allowed; a whole number above 0"),
        ({"training__batch_size": 1.5}, "training.batch_size: 1.5 is not allowed; a whole number"),
        ({"training__fp16": "yes"}, "training.fp16: 'yes' is not allowed; true or false"),
        ({"training__lr": ...}, "training.lr: missing; a number from 1e-06 to 0.01"),
        ({"model__type": "Lama"}, "model.type: 'Lama' is not allowed; Llama, GPT2, GPTJ or Qwen3"),
        ({"model__name": "../up"}, "model.name: '../up' is not allowed"),
        ({"model__resid_pdrop": 0.1}, "model.resid_pdrop: 0.1: Llama has no dropout"),
        ({"model__n_head": 64}, "model.n_head: 64: hidden_size / n_head is 1; rotary positions need an even number; use n_head 32"),
        ({"logging__wandb": True}, "logging.project: missing; required with wandb: true"),
        ({"logging__report_to": ["wandb"]}, "logging.report_to: wandb has its own key; use logging.wandb: true"),
        ({"logging__report_to": "trackio"}, "logging.report_to: 'trackio' is not allowed; a list of texts"),
        ({"training__fp16": True, "training__bf16": True}, "training.fp16, training.bf16: both are true"),
        ({"training__bf16": True, "training__precision": "fp32"}, "training.bf16: true, but training.precision is"),
        ({"training__epochs": 3}, "training.epochs: unknown key; did you mean training.num_epochs?"),
        ({"training__seq_length": 64}, "training.seq_length: unknown key; it belongs in data.seq_length"),
        ({"model__zzz": 1}, "model.zzz: unknown key; known: model.type, model.name, model.hidden_size"),
    ],
)  # fmt: skip
def test_each_problem_is_one_line_with_what_is_allowed(changes, expected):
    lines = problems(raw(**changes))
    assert len(lines) == 1
    assert expected in lines[0]


def test_all_problems_are_reported_at_once():
    config = raw(
        model__hidden_size=200,
        model__n_head=6,
        data__seq_length=1,
        training__lr="x",
        training__oops=1,
    )
    config["extra"] = {}
    del config["data"]["eval_path"]
    assert {line.split(":")[0] for line in problems(config)} == {
        "model.hidden_size", "data.seq_length", "training.lr", "training.oops", "extra", "data.eval_path"
    }  # fmt: skip


def test_missing_sections_and_sections_that_are_no_sections():
    config = raw()
    del config["training"]
    config["data"] = 3
    assert sorted(line.split(":")[0] for line in problems(config)) == ["data", "training"]
    assert "sections data, model" in problems([1])[0]
    del (config := raw())["logging"]
    assert check_config(config)["logging"]["wandb"] is False


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: 1\ndata: 2\n", "line 2, column 1: not valid YAML: duplicate key 'data'"),
        ("a: &x {b: 1}\nc: *x\n", "line 2, column 4: not valid YAML: aliases"),
        ("data: [1\n", "not valid YAML"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("", "not a configuration; it needs the sections data, model, training"),
    ],
)
def test_yaml_errors_name_line_and_column(config_file, text, expected):
    path = config_file(text)
    with pytest.raises(ConfigError, match="c.yaml") as caught:
        load_config(path)
    assert expected in str(caught.value)


def test_a_missing_file_suggests_the_nearest_config():
    with pytest.raises(FileNotFoundError, match=r"did you mean config/llama-10M\.yaml\?"):
        load_config("config/llama10M.yaml")


def test_a_missing_file_is_looked_for_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = os.path.relpath(ROOT / "config" / "llama-10M.yaml")
    message = f"config/llama-10M.yaml: no such file in {tmp_path}; did you mean {shipped}?"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        load_config("config/llama-10M.yaml")


def test_the_command_to_train_sets_only_what_differs():
    defaults = {"tokenizer_path": "models/tokenizer.json", "train_path": Path("./data/train")}
    command = training_command("llama-10M.yaml", **defaults, eval_path="my data/dev")
    expected = "python train.py --config config/llama-10M.yaml --set 'data.eval_path=my data/dev'"
    assert command == expected


def test_initials_are_understood():
    with pytest.raises(ConfigError, match=r"unknown key; did you mean training\.lr\?"):
        check_config(raw(training__learning_rate=1e-3))


def test_the_command_line_beats_the_file(config_file):
    path = config_file(training__fp16=True)
    args = Namespace(lr=5e-4, batch_size=16, model_name="other", seed=0, bf16=True, wandb=False,
                     set=["training.num_epochs=3", "data.seq_length=64", "training.lr_scheduler=linear"])  # fmt: skip
    config = load_config(path, args)
    assert config["training"]["lr"] == 5e-4
    assert config["training"]["batch_size"] == 16
    assert config["training"]["seed"] == 0  # zero is a value, not an absence
    assert config["training"]["num_epochs"] == 3
    assert config["training"]["lr_scheduler"] == "linear"
    assert (config["training"]["bf16"], config["training"]["fp16"]) == (True, False)
    assert config["model"]["name"] == "other"
    assert config["data"]["seq_length"] == 64


@pytest.mark.parametrize(
    "args", [None, Namespace(), SimpleNamespace(lr=None), SimpleNamespace(unrelated=object())]
)
def test_load_config_accepts_any_namespace(config_file, args):
    assert load_config(config_file(), args) == check_config(GOOD)


@pytest.mark.parametrize("assignment", ["training.lr", "lr=3", "training.lr.x=3", "=3", ".=1"])
def test_a_malformed_set_flag_is_an_error(config_file, assignment):
    with pytest.raises(ConfigError, match="section.key=value"):
        load_config(config_file(), Namespace(set=[assignment]))


def test_set_of_an_unknown_key_is_an_error(config_file):
    with pytest.raises(ConfigError, match="did you mean training.warmup_steps"):
        load_config(config_file(), Namespace(set=["training.warmup_step=3"]))


def test_each_unusual_value_gets_one_warning(config_file, caplog):
    load_config(config_file(training__lr=5e-3, data__seq_length=1024, model__intermediate_size=256))
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 3
    assert any(
        "training.lr: 0.005 is outside the typical range 1e-05 to 0.002" in line for line in lines
    )
    assert any(
        "model.intermediate_size: 256 is 4.00 x hidden_size; 2.67 x is usual for Llama" in line
        for line in lines
    )
    caplog.clear()
    load_config(config_file(training__lr=8e-3, training__optimizer="muon"))
    assert not caplog.records
    load_config(config_file(training__lr=9e-3, training__optimizer="muon"))
    assert "training.lr: 0.009 is outside the typical range 1e-05 to 0.008" in caplog.text
    assert not unusual_values({"model": check_model_section(GOOD["model"])})  # of a notebook


def test_a_resolved_config_is_a_config(tmp_path, config_file):
    config = load_config(config_file(training__lr=1e-5))
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(config, sort_keys=False))
    assert load_config(again) == config


def test_unknown_model_type_names_the_known_ones():
    with pytest.raises(
        ConfigError, match="Unknown model type: 'BERT'; known: Llama, GPT2, GPTJ, Qwen3"
    ):
        check_model_section({"type": "BERT"})


def test_generated_files_are_up_to_date():
    for path, text in generated_files().items():
        assert path.read_text(encoding="utf-8") == text, (
            f"{path.relative_to(ROOT)} is out of date: run python -m babyllama.config"
        )


def test_the_text_that_a_run_was_trained_on(tmp_path, monkeypatch):
    run = tmp_path / "run"
    (run / "checkpoint-7").mkdir(parents=True)
    assert training_text_of(run, "eval_path") is None
    (run / "training_config.yaml").write_text("data: {train_path: text, eval_path: tests}\n")
    monkeypatch.chdir(tmp_path)
    for model in (run, run / "checkpoint-7", Path("run/checkpoint-7")):
        assert training_text_of(model, "eval_path") == ROOT / "tests"  # seen from the project
        assert training_text_of(model, "train_path") == Path("text")  # nowhere: as it is written
    (tmp_path / "tests").mkdir()
    assert training_text_of(run, "eval_path") == Path("tests")  # from here first
    with pytest.raises(ValueError, match=r"training_config.yaml has no data.other"):
        training_text_of(run, "other")


def test_the_schema_accepts_every_shipped_config_key():
    schema = json.loads((ROOT / "config" / "schema.json").read_text())
    references = {
        name: ref if "$ref" in ref else ref["anyOf"][0]
        for name, ref in schema["properties"].items()
    }
    sections = {
        name: schema["$defs"][ref["$ref"].split("/")[-1]] for name, ref in references.items()
    }
    for path in {*(ROOT / "config").glob("*.yaml")} - {*(ROOT / "config").glob("benchmark*.yaml")}:
        config = read_yaml_file(path)
        for name, keys in config.items():
            assert set(keys) <= set(sections[name]["properties"]), path
            assert not set(sections[name].get("required", [])) - set(keys), path


def test_a_tilde_is_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = raw(data__train_path="~/text", logging__output_dir="~/models")
    config["distillation"] = {"teachers": ["~/one", "two"]}
    checked = check_config(config)
    assert checked["distillation"]["teachers"] == [str(tmp_path / "one"), "two"]
    assert (checked["data"]["train_path"], checked["logging"]["output_dir"]) == tuple(
        str(tmp_path / name) for name in ("text", "models")
    )


def test_a_logging_section_without_keys_has_its_defaults():
    bare = dict(raw(), logging=None)
    assert check_config(bare)["logging"] == check_config(raw())["logging"]
