"""Test submit.py from a finished run to the collated file."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from babylm_data import tiny_requirements, write_data
from conftest import errors_of, html_errors, sentences, svg_pictures, tiny_config

import submit
import train
from babyllama.runs.checkpoints import milestones
from babyllama.submission import collate, jobs, official


@pytest.fixture(scope="module")
def babylm_run(tmp_path_factory, tokenizer_file, corpus_dir) -> Path:
    """Return a finished tiny run whose checkpoints are at thousands of words."""
    root = tmp_path_factory.mktemp("babylm")
    config = tiny_config(
        root, tokenizer_file, corpus_dir, model__name="baby", training__num_epochs=1
    )
    config["babylm"] = {"track": "strict-small"}
    (root / "c.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BABYLLAMA_CACHE", str(root / "cache"))
        patch.setattr("babyllama.runs.checkpoints.MILLION", 1000)
        assert train.main(["--config", str(root / "c.yaml")]) == 0
    return root / "models" / "baby"


@pytest.fixture(scope="module")
def needed(babylm_run):
    names = [path.name for path in milestones(babylm_run)]
    assert names[:3] == ["chck_1M", "chck_2M", "chck_3M"]
    for extra in names[3:]:
        shutil.rmtree(babylm_run / extra)
    return tiny_requirements(names[:3])


@pytest.fixture(scope="module")
def eval_data(tmp_path_factory, needed) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "evaluation_data"
    write_data(folder, needed, sentences(400, seed=5))
    return folder


@pytest.fixture(scope="module")
def submission(tmp_path_factory, babylm_run, needed, eval_data) -> Path:
    """Return the folder that submit.py has written."""
    output = tmp_path_factory.mktemp("submission") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(official, "requirements", lambda track: needed)
        assert submit.main(arguments(babylm_run, eval_data, output)) == 0
    return output


def arguments(run, data, output, *more) -> list[str]:
    command = [str(run), "--eval-data", str(data), "--output", str(output), "--device", "cpu"]
    return [*command, *more]


def collated_of(submission: Path) -> dict:
    return json.loads(official.collated_file(submission / "results" / "baby").read_text())


def test_the_collated_file_holds_every_prediction_of_the_final_model(submission, needed, eval_data):
    collated = collated_of(submission)
    for task in needed.zero_shot.values():
        sizes = {key: len(value["predictions"]) for key, value in collated[task.key].items()}
        lower = {key.lower(): size for key, size in sizes.items()}
        assert lower == (task.sizes or {f"eng_{i}": 1 for i in range(task.n_items)})
    assert "complex_NP_island" in collated["blimp"]  # as BLiMP writes it
    row = json.loads(
        (eval_data / "full_eval/ewok_filtered/agent-properties.jsonl").open().readline()
    )
    first = collated["ewok"]["agent-properties"]["predictions"][0]
    assert first["pred"] in [f"{row[f'Context{i}']} {row['Target1']}" for i in (1, 2)]


def test_the_scores_of_checkpoints_are_shares_of_right_predictions(submission, needed, eval_data):
    collated = collated_of(submission)
    for number, checkpoint in enumerate(needed.checkpoints):
        file = submission / f"results/baby/{checkpoint}/zero_shot/causal/blimp/blimp_fast"
        predictions = json.loads((file / "predictions.json").read_text())
        for subset, score in collated["fast_eval_results"]["blimp"][number].items():
            rows = (eval_data / f"fast_eval/blimp_fast/{subset}.jsonl").read_text().splitlines()
            right = [json.loads(row)["sentence_good"] for row in rows]
            chosen = [row["pred"] for row in predictions[subset]["predictions"]]
            assert score == sum(a == b for a, b in zip(right, chosen, strict=True)) / len(right)


def test_the_scores_list_columns_with_intervals_and_what_is_missing(submission, needed):
    scores = json.loads((submission / "scores.json").read_text())
    assert len(scores["columns"]) == 9
    measured = {name: column for name, column in scores["columns"].items() if column}
    assert set(scores["missing"]) == scores["columns"].keys() - measured.keys()
    total = sum(column["percent"] for column in measured.values())
    assert scores["overall_2026"] == pytest.approx(total / 9)
    for name in measured.keys() - {"aoa"}:
        low, high = measured[name]["ci95"]
        assert low <= measured[name]["percent"] <= high
    piqa = [scores["results"][f"global_piqa_{part}"] for part in ("parallel", "nonparallel")]
    mean = 50 * sum(result["accuracy"] for result in piqa)
    assert measured["global_piqa"]["percent"] == pytest.approx(mean)


def test_the_form_is_filled_in_from_the_run(submission, babylm_run):
    form = json.loads((submission / "form.json").read_text())
    run = json.loads((babylm_run / "training_metrics.json").read_text())
    assert form["words_seen"] == run["babylm"]["words_seen"]
    tokenizer = json.loads((babylm_run / "tokenizer.json").read_text())
    vocabulary = len(tokenizer["model"]["vocab"])
    assert (form["layers"], form["vocabulary_size"]) == (2, vocabulary)
    assert form["track"] == "strict-small"
    (problem,) = form["rule_problems"]  # the fixture's tokenizer has no record of its text
    assert "tokenizer.json was trained on is not recorded" in problem
    assert form["rules_followed"] is False
    assert form["unknown"] == [
        name for name, value in form.items() if value is None and name != "unknown"
    ]


def test_the_page_has_the_columns_the_published_scores_and_the_curves(submission):
    page = (submission / "index.html").read_text()
    assert "RecGPT-10M" in page and "73.11" in page
    assert "<h2>Learning curves of baby</h2>" in page
    curves = svg_pictures(page)
    assert len(curves) >= 2 and all(">words seen<" in curve for curve in curves)
    assert "<script" not in page and "http" not in page
    assert not html_errors(page)


def test_a_second_run_remakes_nothing_but_what_has_changed(
    submission, babylm_run, eval_data, needed, monkeypatch, caplog
):
    monkeypatch.setattr(official, "requirements", lambda track: needed)
    results = submission / "results" / "baby"
    files = {path: path.stat().st_mtime_ns for path in results.rglob("predictions.json")}
    changed = official.predictions_file(results, "blimp")
    wanted = changed.read_text()
    changed.write_text(wanted[: len(wanted) // 2])  # interrupted by a full disk
    assert submit.main(arguments(babylm_run, eval_data, submission)) == 0
    assert changed.read_text() == wanted
    remade = [path for path, time in files.items() if path.stat().st_mtime_ns != time]
    assert remade == [changed]
    assert ", 1 to do" in caplog.text


def test_a_checkpoint_without_surprisals_gives_no_age_of_acquisition(
    babylm_run, eval_data, needed, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(official, "requirements", lambda track: needed)
    output = tmp_path / "out"
    command = arguments(babylm_run, eval_data, output, "--only", "aoa")
    assert submit.main(command) == 0
    folder = official.acquisition_folder(output / "results" / "baby")
    content = (folder / "surprisal.json").read_text()
    names = [f"chck_{n}M.json" for n in (1, 2, 3)]
    assert {path.name for path in folder.iterdir()} == {
        *names, "surprisal.json", "aoa_score.json", "acquisition.json"
    }  # fmt: skip
    rows = [row for name in names for row in json.loads((folder / name).read_text())]
    assert json.loads(content)["results"] == rows

    def fail(*args):
        raise ValueError("nan")

    (folder / names[1]).write_text("[]")  # of other weights
    (folder / "surprisal.json").write_text(content.replace("chck_1M", "chck_9M"))
    with monkeypatch.context() as patch:
        patch.setattr("babyllama.submission.age_of_acquisition.measure_surprisals", fail)
        assert submit.main(command) == 2
    assert errors_of(capsys) == [
        "error: aoa: chck_2M: nan",
        "error: aoa: age of acquisition: the surprisals of chck_2M are missing",
    ]
    assert not (folder / "surprisal.json").exists()
    assert submit.main(command) == 0
    assert (folder / "surprisal.json").read_text() == content


def test_missing_data_are_listed_with_their_command(
    babylm_run, eval_data, needed, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(official, "requirements", lambda track: needed)
    partial = tmp_path / "evaluation_data"
    for name in ("blimp_filtered", "comps"):
        shutil.copytree(eval_data / "full_eval" / name, partial / "full_eval" / name)
    command = arguments(babylm_run, partial, tmp_path / "out", "--only", "zero_shot")
    assert submit.main(command) == 0
    assert "ewok_filtered; in babylm-eval/strict: python -m evaluation_pipeline.ewok" in caplog.text
    caplog.clear()
    assert submit.main([*command[:-1], "glue", "zero_shot", "--dry-run"]) == 0
    lines = [line for line in caplog.messages if "mrpc" in line]
    assert len(lines) == 1 and "mrpc.train.jsonl, mrpc.valid.jsonl; in" in lines[0]
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert {name for name, column in scores["columns"].items() if column} == {"blimp", "comps"}


def test_a_dry_run_writes_nothing(babylm_run, eval_data, needed, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(official, "requirements", lambda track: needed)
    assert submit.main(arguments(babylm_run, eval_data, tmp_path / "out", "--dry-run")) == 0
    assert not (tmp_path / "out").exists()
    assert "zero_shot: main comps" in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere", "--eval-data", ".", "--output", "o"], "nowhere is not a finished run"),
        (["nowhere"], "submit.py needs RUN, --eval-data DIR and --output DIR"),
        (["--check", "nowhere.json"], "nowhere.json"),
    ],
)
def test_wrong_flags_are_one_line(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert submit.main(flags) == 2
    (line,) = errors_of(capsys)
    assert message in line


def test_a_stage_that_does_not_exist_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        submit.main(["r", "--eval-data", ".", "--output", "o", "--skip", "blimp"])
    assert stopped.value.code == 2
    (line,) = errors_of(capsys)
    assert "--skip: invalid choice: 'blimp'" in line and "zero_shot" in line


def test_a_run_without_the_rules_of_babylm_is_refused(finished, eval_data, tmp_path, capsys):
    assert submit.main(arguments(finished[1], eval_data, tmp_path / "out")) == 2
    assert "without a babylm section" in errors_of(capsys)[0]


def test_check_finds_the_wrong_sizes_of_a_tiny_file(submission, capsys):
    file = official.collated_file(submission / "results" / "baby")
    assert submit.main(["--check", str(file)]) == 2
    output = capsys.readouterr().out
    assert "blimp adjunct_island: 4 predictions, expected 928" in output
    assert "aoa_surprisals: chck_4M, chck_5M, " in output
    assert "chck_90M, chck_100M are missing" in output


@pytest.mark.parametrize("content", ["{", "[" * 100_000])
def test_check_names_a_file_that_is_not_json(content, tmp_path, capsys):
    file = tmp_path / "collated.json"
    file.write_text(content)
    assert submit.main(["--check", str(file)]) == 2
    (line,) = errors_of(capsys)
    assert f"{file} is not valid JSON" in line


@pytest.mark.parametrize("content", ["[1]", "{", "[" * 100_000])
def test_a_damaged_record_of_jobs_counts_as_empty(content, tmp_path):
    (tmp_path / jobs.MADE_FILE).write_text(content)
    assert jobs.Record(tmp_path, seed=1).made == {}


def test_check_accepts_what_submit_has_written(submission, needed):
    assert collate.check(collated_of(submission), needed) == []


def test_check_finds_what_was_damaged(submission, needed):
    collated = collated_of(submission)
    predictions = collated["comps"]["base"]["predictions"]
    predictions[1]["id"] = "base_7"
    predictions[2]["pred"] = 3
    collated["reading"]["reading"]["predictions"][0]["pred"] = float("nan")
    collated["glue"]["rte"]["predictions"][0]["pred"] = True
    collated["aoa_surprisals"]["results"][0]["surprisal"] = float("nan")
    del collated["ewok"]["agent-properties"]
    collated["fast_eval_results"]["blimp"][1] = None
    problems = collate.check(collated, needed)
    assert len(problems) == 7
    for message in (
        "comps base: id 'base_7', expected 'base_1'",
        "comps base: prediction 2 is 3, expected a text",
        "reading: prediction 0 is nan",
        "glue rte: prediction 0 is True, expected a label from 0 to 1",
        "aoa_surprisals chck_1M: 1 surprisals are not numbers",
        "ewok: agent-properties is missing",
        "fast_eval_results blimp: chck_2M is missing",
    ):
        assert any(message in problem for problem in problems), message


def test_a_cache_of_the_hub_has_every_revision_and_a_dry_push_sends_nothing(
    submission, babylm_run, eval_data, needed, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(official, "requirements", lambda track: needed)
    cache = tmp_path / "hub"
    command = arguments(babylm_run, eval_data, submission, "--hub-cache", str(cache))
    assert submit.main(command) == 0
    revisions = {path.name for path in (cache / "models--local--baby" / "refs").iterdir()}
    assert revisions == {*needed.checkpoints, "main"}
    command = arguments(babylm_run, eval_data, submission, "--push", "me/baby", "--dry-run")
    assert submit.main(command) == 0
    assert "chck_2M" in capsys.readouterr().out
