"""Turn a YAML configuration into a checked dictionary.

People usually make more than one mistake, so all problems are reported at once. train.py checks
later that the tokenizer and the text exist; this module opens nothing but the YAML file. It does
not import torch, so a wrong configuration is reported within a second.

    python -m babyllama.config            write config/schema.json and API_REFERENCE.md's key table
    python -m babyllama.config --check    exit with 1 if either is out of date
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from babyllama.architectures import ARCHITECTURES, NAMES, WITH_DROPOUT
from babyllama.cli import suggest
from babyllama.files import ROOT
from babyllama.problems import (
    ConfigError,
    allowed_values,
    seen_from,
    unknown_key,
    validation_problems,
)
from babyllama.schema import MAX_EPOCHS, MUON_LR, OPTIONAL, SECTIONS, Config, ModelSection

MAX_CONFIG_BYTES = 1_000_000  # PyYAML takes minutes for a large text file named by mistake


# ---- reading YAML -------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Load YAML as people mean it: `3e-4` is a number and `None` is null.

    Standard YAML reads both as text. Duplicate keys are errors, because YAML would silently keep
    the last one, and so are aliases, which a configuration does not need.
    """

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            problem = "aliases (*name) are not allowed"
            raise yaml.constructor.ConstructorError(None, None, problem, mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                problem = f"the key {key!r} is not text"
            elif key in keys:
                problem = f"duplicate key {key!r}"
            else:
                keys.add(key)
                continue
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        return super().construct_mapping(node, deep)


# adding a resolver changes these lists in place, so work on a copy of SafeLoader's
_Loader.yaml_implicit_resolvers = {
    character: list(resolvers)
    for character, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^None$"), ["N"])


class _Dumper(yaml.SafeDumper):
    """Write YAML that _Loader reads back: the text `1e5` gets quotes."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def format_yaml(value: Any) -> str:
    """Return a value as YAML that parse_yaml turns into the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def parse_yaml(text: str, source: str) -> Any:
    """Return the value of a YAML text; raise ConfigError with the line of a syntax error."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        position = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError([f"{position}not valid YAML: {problem}"], source) from None


def read_yaml_file(path: str | Path, holds_tasks: bool = False) -> Any:
    """Return the content of a YAML file.

    If it does not exist, raise FileNotFoundError that suggests one of the shipped files: a
    benchmark if `holds_tasks`, else a configuration.
    """
    path = Path(path)
    if not path.is_file():
        problem = "is a directory" if path.is_dir() else f"no such file{seen_from(path)}"
        files = sorted((ROOT / "config").glob("*.yaml"))
        shipped = [p.name for p in files if p.name.startswith("benchmark") == holds_tasks]
        folder = os.path.relpath(ROOT / "config")
        raise FileNotFoundError(f"{path}: {problem}; {suggest(path.name, shipped, f'{folder}/')}")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        problem = f"larger than {MAX_CONFIG_BYTES:,} bytes: not a configuration"
        raise ConfigError([problem], str(path))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError([f"not UTF-8 (byte {error.start})"], str(path)) from None
    return parse_yaml(text, str(path))


def training_command(name: str, **data: str | Path) -> str:
    """Return the command that trains a shipped configuration on other text.

    `data` holds keys of the data section; the command sets those that the configuration has not.
    """
    shipped = read_yaml_file(ROOT / "config" / name)["data"]
    command = ["python", "train.py", "--config", f"config/{name}"]
    for key, value in data.items():
        if Path(shipped[key]) != Path(value):
            command += ["--set", f"data.{key}={value}"]
    return shlex.join(command)


def flatten(values: dict[str, Any], separator: str = ".") -> dict[str, Any]:
    """Return a dict without dicts in it: {"a": {"b": 1}} becomes {"a.b": 1}."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            inner = flatten(value, separator)
            flat |= {f"{key}{separator}{name}": inner[name] for name in inner}
        else:
            flat[key] = value
    return flat


# ---- checking -----------------------------------------------------------------------------------


def check_config(raw: Any, source: str = "") -> dict:
    """Return a checked configuration with all its defaults; raise ConfigError with all problems."""
    if not isinstance(raw, dict):
        required = [name for name, field in Config.model_fields.items() if field.is_required()]
        problem = f"not a configuration; it needs the sections {', '.join(required)}"
        raise ConfigError([problem], source)
    if "logging" in raw and raw["logging"] is None:  # a bare `logging:` means all its defaults
        raw = {**raw, "logging": {}}
    config = _validate(Config, raw, source=source)
    config = {name: keys for name, keys in config.items() if keys is not None}
    _fill_intermediate_size(config["model"])

    # expand ~ in paths; the shell does that for a flag, but not for a file
    for name, key in (
        ("data", "tokenizer_path"),
        ("data", "train_path"),
        ("data", "eval_path"),
        ("logging", "output_dir"),
    ):
        config[name][key] = os.path.expanduser(config[name][key])
    if "distillation" in config:
        teachers = config["distillation"]["teachers"]
        config["distillation"]["teachers"] = [os.path.expanduser(path) for path in teachers]
    return config


def check_model_section(section: Any) -> dict:
    """Return a checked model section with its defaults; in a notebook it needs no `name`."""
    if not isinstance(section, dict):
        keys = ", ".join(ModelSection.model_fields)
        raise ConfigError([f"model: {section!r} is not a section; it holds {keys}"])
    if section.get("type") not in NAMES:
        known = ", ".join(NAMES)
        raise ConfigError([f"Unknown model type: {section.get('type')!r}; known: {known}"])
    model = _validate(ModelSection, {"name": "model", **section}, section="model")
    _fill_intermediate_size(model)
    return model


def with_defaults(name: str, section: Any) -> dict:
    """Return a section with its defaults; raise ConfigError for an unknown key.

    The values are not checked: this is for notebooks, which pass only what they need.
    """
    fields = SECTIONS[name].model_fields
    section = section or {}
    for key in section:
        if key not in fields:
            raise ConfigError([unknown_key(name, key, fields)])
    defaults = {key: field.default for key, field in fields.items() if not field.is_required()}
    return {**defaults, **section}


def usual_intermediate_size(model_type: str, hidden_size: int) -> int:
    """Return the width of the feed-forward layers that is usual for this architecture."""
    architecture = ARCHITECTURES[model_type]
    size = round(hidden_size * architecture.ffn_ratio)
    multiple = architecture.ffn_multiple
    return -(-size // multiple) * multiple


def _fill_intermediate_size(model: dict) -> None:
    if model["intermediate_size"] is None:
        model["intermediate_size"] = usual_intermediate_size(model["type"], model["hidden_size"])


def _validate(schema: type[BaseModel], raw: dict, section: str = "", source: str = "") -> dict:
    """Return `raw` validated by `schema`, the model of the configuration or of one `section`."""
    # check each value on its own
    checked = {}
    problems = []
    wrong = set()
    try:
        checked = schema.model_validate(raw).model_dump()
    except ValidationError as error:
        problems = validation_problems(error, schema, section)
        locations = [problem["loc"] for problem in error.errors(include_url=False)]
        wrong = {((section, *loc) if section else loc)[:2] for loc in locations}

    # check the rules between keys, with None or the default for a value that is wrong already
    problems += _broken_rules(_valid_values({section: raw} if section else raw, wrong))
    if problems:
        raise ConfigError(problems, source)
    return checked


def _valid_values(raw: dict, wrong: set[tuple]) -> dict[str, dict]:
    """Return all keys of all sections: the given value if it is valid, else the default or None."""
    values = {}
    for name, section in SECTIONS.items():
        given = raw.get(name)
        given = given if isinstance(given, dict) else {}
        values[name] = {}
        for key, field in section.model_fields.items():
            default = None if field.is_required() else field.default
            values[name][key] = default if (name, key) in wrong else given.get(key, default)
    return values


def _fitting_heads(before: str, width: int, heads: int, rotary: bool) -> str:
    """Return e.g. ", or n_head 6 or 8": the nearest numbers of heads that fit the width, if any."""
    multiple = 2 if rotary else 1
    fitting = [n for n in range(1, min(width, 1024) + 1) if width % (n * multiple) == 0]
    nearest = [n for n in fitting if n < heads][-1:] + [n for n in fitting if n > heads][:1]
    return f"{before} n_head {' or '.join(map(str, nearest))}" if nearest else ""


def _broken_rules(config: dict[str, dict]) -> Iterator[str]:
    """Yield one line for each broken rule between several keys.

    A required key is None here if it is missing or wrong, which has been reported already.
    """
    yield from _broken_model_rules(config["model"])

    # keys of the training section that contradict each other
    training = config["training"]
    for key in ("fp16", "bf16"):
        if training[key] and training["precision"] not in ("auto", key):
            precision = training["precision"]
            yield f"training.{key}: true, but training.precision is {precision!r}; choose one"
    if training["fp16"] and training["bf16"]:
        yield "training.fp16, training.bf16: both are true; choose one"
    if training["warmup_steps"] and training["warmup_ratio"]:
        yield "training.warmup_steps, training.warmup_ratio: both are given; choose one"
    if training["lr"] and training["min_lr"] > training["lr"]:
        yield f"training.min_lr: {training['min_lr']:g} is above training.lr ({training['lr']:g})"

    # features that do not work together
    if training["max_minutes"] and config["distillation"]["teachers"]:
        yield (
            f"training.max_minutes: {training['max_minutes']:g} does not go with teachers, whose "
            "part of a step is not timed; use training.max_steps"
        )
    untested_with_fsdp = {
        "ema": training["ema"] is not None,
        "optimizer": training["optimizer"] == "muon",
        "compile": training["compile"] is True,
        "torch_compile": training["torch_compile"] is True,
        "benchmark": training["benchmark"] is not None,
    }
    for key, is_used in untested_with_fsdp.items():
        if training["fsdp"] and is_used:
            value = training[key]
            yield f"training.fsdp: true does not go with training.{key}: {value}; remove one"
    if config["data"]["random_offset"] and config["distillation"]["cache"] == "top_k":
        yield (
            "distillation.cache: top_k caches the teachers' predictions for fixed chunks, but "
            "data.random_offset: true cuts other chunks in each epoch; choose one"
        )

    # BabyLM's rules, and the trackers
    epochs = training["num_epochs"]
    if config["babylm"]["track"] and epochs and epochs > MAX_EPOCHS:
        yield (
            f"training.num_epochs: {epochs}: BabyLM allows {MAX_EPOCHS} epochs; "
            f"use {MAX_EPOCHS} or fewer, or remove the babylm section"
        )
    if config["logging"]["wandb"] and not config["logging"]["project"]:
        yield "logging.project: missing; required with wandb: true (the Weights & Biases project)"
    for tracker in ("wandb", "tensorboard"):
        if tracker in config["logging"]["report_to"]:
            yield f"logging.report_to: {tracker} has its own key; use logging.{tracker}: true"


def _broken_model_rules(model: dict) -> Iterator[str]:
    """Yield one line for each broken rule between keys of the model section."""
    width = model["hidden_size"]
    heads = model["n_head"]
    architecture = ARCHITECTURES.get(model["type"])  # None: reported as an unknown type
    rotary = architecture is not None and architecture.rotary
    if width and heads and width % heads:
        multiple = 2 * heads if rotary else heads
        below = width // multiple * multiple
        remedy = f"{below} or {below + multiple}" if below else f"{multiple}"
        yield (
            f"model.hidden_size: {width}: hidden_size must be divisible by n_head ({heads}); "
            f"use {remedy}{_fitting_heads(', or', width, heads, rotary)}"
        )
    elif width and heads and rotary and width // heads % 2:
        yield (
            f"model.n_head: {heads}: hidden_size / n_head is {width // heads}; "
            f"rotary positions need an even number{_fitting_heads('; use', width, heads, rotary)}"
        )
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if architecture and not architecture.has_dropout and model[key]:
            yield (
                f"model.{key}: {model[key]}: {architecture.name} has no dropout; "
                f"remove it or use {' or '.join(WITH_DROPOUT)}"
            )


def unusual_values(config: dict) -> list[str]:
    """Return one line for each value that is allowed but outside its typical range."""
    # the ranges that the schema declares
    lines = []
    for name, section in SECTIONS.items():
        values = config.get(name) or {}
        for key, field in section.model_fields.items():
            value = values.get(key)
            typical = (field.json_schema_extra or {}).get("typical")
            if value is None or typical is None:
                continue
            low, high = typical
            if key == "lr" and values.get("optimizer") == "muon":
                high = MUON_LR
            if not low <= value <= high:
                typical = f"the typical range {low:g} to {high:g}"
                lines.append(f"{name}.{key}: {value:g} is outside {typical}")

    # the width of the feed-forward layers, whose usual value depends on other keys
    model = config["model"]
    size = model["intermediate_size"]
    ratio = size / model["hidden_size"]
    usual_ratio = ARCHITECTURES[model["type"]].ffn_ratio
    usual_size = usual_intermediate_size(model["type"], model["hidden_size"])
    if size != usual_size and abs(ratio / usual_ratio - 1) > 0.1:
        lines.append(
            f"model.intermediate_size: {size} is {ratio:.2f} x hidden_size; "
            f"{usual_ratio:.2f} x is usual for {model['type']} ({usual_size})"
        )
    return lines


# ---- changing single keys -----------------------------------------------------------------------


def set_key(raw: Any, assignment: str) -> None:
    """Apply one `section.key=value` to a raw configuration, in place; the value is YAML."""
    dotted, equals, text = assignment.partition("=")
    path = dotted.strip().replace("-", "_").split(".")
    if not equals or len(path) != 2 or not all(path):
        example = "section.key=value, e.g. training.num_epochs=3"
        raise ConfigError([f"{assignment!r} is not of the form {example}"], "--set")
    set_value(raw, path[0], path[1], parse_yaml(text, f"--set {assignment}"))


def set_value(raw: Any, section: str, key: str, value: Any) -> None:
    """Set raw[section][key], and add the section if it is missing.

    If the configuration has another shape, leave it alone: check_config will report that.
    """
    if isinstance(raw, dict):
        if raw.get(section) is None:
            raw[section] = {}
        if isinstance(raw[section], dict):
            raw[section][key] = value


# ---- files generated from the schema ------------------------------------------------------------

BEGIN = "<!-- keys: begin (written by babyllama/config.py) -->\n"
END = "<!-- keys: end -->"


def json_schema() -> str:
    """Return config/schema.json, which editors use to complete and check YAML."""
    return json.dumps(Config.model_json_schema(), indent=2, sort_keys=True) + "\n"


def key_table() -> str:
    """Return the Markdown table of all keys for API_REFERENCE.md."""
    rows = ["| key | holds | default | typical | what it does |", "|---|---|---|---|---|"]
    for name, section in SECTIONS.items():
        properties = section.model_json_schema()["properties"]
        for key, field in section.model_fields.items():
            if not field.is_required():
                default = f"`{json.dumps(field.default)}`"
            elif name in OPTIONAL:
                default = f"required in {name}"
            else:
                default = "required"
            low, high = properties[key].get("typical", (None, None))
            typical = "" if low is None else f"{low:g} to {high:g}"
            allowed = allowed_values(properties[key])
            rows.append(
                f"| `{name}.{key}` | {allowed} | {default} | {typical} | {field.description} |"
            )
    return "\n".join(rows) + "\n"


def generated_files() -> dict[Path, str]:
    """Return the path and the up-to-date content of each generated file."""
    reference = ROOT / "API_REFERENCE.md"
    head, _, rest = reference.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    return {
        ROOT / "config" / "schema.json": json_schema(),
        reference: head + BEGIN + key_table() + END + tail,
    }


def main(argv: list[str] | None = None) -> int:
    """Write the generated files, or with --check only compare them."""
    argv = sys.argv[1:] if argv is None else argv
    if argv not in ([], ["--check"]):
        print(__doc__)
        return 0 if argv in (["-h"], ["--help"]) else 2
    check = argv == ["--check"]
    outdated = False
    for path, text in generated_files().items():
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        outdated = True
        if check:
            print(f"{path.relative_to(ROOT)}: out of date; run python -m babyllama.config")
        else:
            path.write_text(text, encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: written")
    return 1 if check and outdated else 0


if __name__ == "__main__":
    sys.exit(main())
