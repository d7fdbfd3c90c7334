"""Configuration: a YAML file -> a checked plain dict. The keys themselves are declared in schema.py.

Every problem of a file is reported at once, each with its path, the value, what is allowed and the nearest known key.
This file does not look at the disk beyond the YAML file itself (whether the tokenizer or the data exist is the business
of train.py) and does not import torch, so that a wrong config is answered at once.

    python -m babyllama.config            write config/schema.json and the key table of TRAINING_GUIDE.md anew from the models
    python -m babyllama.config --check    exit with 1 if either is stale
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from babyllama.files import ROOT
from babyllama.schema import MAX_EPOCHS, MUON_LR, OPTIONAL, SECTIONS, Config, ModelSection, Section

MAX_CONFIG_BYTES = 1_000_000  # a text that was named by mistake would take PyYAML long
PATHS = {
    "data": ("tokenizer_path", "train_path", "eval_path"),
    "logging": ("output_dir",),
}  # in which ~ is home
FFN_RATIO = {"Llama": 8 / 3, "GPT2": 4.0, "GPTJ": 4.0}  # usual intermediate_size / hidden_size


class ConfigError(ValueError):
    """One or more problems of a configuration; `problems` holds one line for each."""

    def __init__(self, problems: list[str], source: str = ""):
        self.problems = problems
        super().__init__("\n".join(f"{source}: {line}" if source else line for line in problems))


def suggest(word: str, known: Iterable[str], before: str = "") -> str:
    """What was meant by a wrong word: the known one that is nearest, `before` in front, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    return (
        f"did you mean {before}{near[0]}?"
        if near
        else f"known: {', '.join(before + name for name in known)}"
    )


# ---- reading YAML -------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: `3e-4` is a number, `None` is null; duplicate keys and aliases are refused."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.constructor.ConstructorError(
                None, None, "aliases (*name) are not allowed", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                problem = f"the key {key!r} is not a word"
            elif key in seen:
                problem = f"the key {key!r} stands twice"
            else:
                seen.add(key)
                continue
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^None$"), ["N"])


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text; ConfigError names the line of a syntax error."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError([f"{where}not valid YAML: {what}"], source) from None


def read_yaml_file(path: str | Path) -> Any:
    """The content of a YAML file; FileNotFoundError and ConfigError say what would be right."""
    path = Path(path)
    if not path.is_file():
        shipped = sorted(p.name for p in (ROOT / "config").glob("*.yaml"))
        what = "is a directory" if path.is_dir() else "no such configuration file"
        raise FileNotFoundError(f"{path}: {what}; {suggest(path.name, shipped, 'config/')}")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ConfigError(
            [f"larger than {MAX_CONFIG_BYTES:,} bytes: not a configuration"], str(path)
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError([f"not UTF-8 (byte {error.start})"], str(path)) from None
    return parse_yaml(text, str(path))


# ---- checking -----------------------------------------------------------------------------------


def allowed_values(section: type[Section], name: str) -> str:
    """What a key may hold, in words: its type and range or choices."""
    schema = section.model_json_schema()["properties"][name]
    options = schema.get("anyOf", [schema])
    parts = []
    for option in options:
        if "enum" in option:
            parts.append(" or ".join(str(choice) for choice in option["enum"]))
            continue
        if "const" in option or option.get("type") == "array":
            parts.append(
                option.get("const") or f"a list of {option.get('minItems', 0)} or more texts"
            )
            continue
        kind = {
            "integer": "a whole number",
            "number": "a number",
            "string": "text",
            "boolean": "true or false",
        }
        words = kind.get(option.get("type"), "null")
        low, high = option.get("minimum"), option.get("maximum")
        above, below = option.get("exclusiveMinimum"), option.get("exclusiveMaximum")
        if low is not None and high is not None:
            words += f" from {low:g} to {high:g}"
        elif low is not None:
            words += f", {low:g} or more"
        elif above is not None:
            words += f" above {above:g}"
        if below is not None:
            words += f", below {below:g}"
        if "pattern" in option:
            words += " of letters, digits, '.', '_' and '-' that starts with a letter or digit"
        parts.append(words)
    return " or ".join(parts)


def _unknown(path: tuple[str, ...]) -> str:
    """The line for a key that is not in the schema, with the nearest one that is."""
    dotted, last = ".".join(path), path[-1]
    if len(path) == 1:
        return f"{dotted}: unknown section; {suggest(last, SECTIONS)}"
    home = [name for name, section in SECTIONS.items() if last in section.model_fields]
    if home:
        return f"{dotted}: unknown key; it belongs in {home[0]}.{last}"
    return f"{dotted}: unknown key; {suggest(last, SECTIONS[path[0]].model_fields, f'{path[0]}.')}"


def _line(error: dict, root: tuple[str, ...] = ()) -> str:
    """One pydantic error as one line for people."""
    path = root + tuple(str(part) for part in error["loc"][: 2 - len(root)])
    dotted = ".".join(path)
    if error["type"] == "extra_forbidden":
        return _unknown(path)
    if len(path) == 1:
        what = "missing" if error["type"] == "missing" else f"{error['input']!r} is not a section"
        return f"{dotted}: {what}; it holds the keys {', '.join(SECTIONS[path[0]].model_fields)}"
    section = SECTIONS[path[0]]
    if error["type"] == "missing":
        return f"{dotted}: missing; {allowed_values(section, path[1])} ({section.model_fields[path[1]].description})"
    return f"{dotted}: {error['input']!r} is not allowed; {allowed_values(section, path[1])}"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _section(raw: Any, name: str) -> dict:
    section = raw.get(name) if isinstance(raw, dict) else None
    return section if isinstance(section, dict) else {}


def _broken_rules(raw: Any) -> list[str]:
    """Rules between keys, checked on whatever of the raw values is there."""
    model, training, logging = (_section(raw, name) for name in ("model", "training", "logging"))
    width, heads = model.get("hidden_size"), model.get("n_head")
    problems = []
    if _number(width) and _number(heads) and heads > 0 and width > 0 and width % heads:
        step = heads * (
            2 if model.get("type") in ("Llama", "GPTJ") else 1
        )  # rotary positions need an even quotient
        below = width // step * step
        right = f"{below} or {below + step}" if below else f"{step}"
        problems.append(
            f"model.hidden_size: {width}: hidden_size must be divisible by n_head ({heads}); use {right}"
        )
    elif (
        model.get("type") in ("Llama", "GPTJ")
        and _number(width)
        and _number(heads)
        and heads
        and width // heads % 2
    ):
        problems.append(
            f"model.n_head: {heads}: hidden_size / n_head is {width // heads}; rotary positions need an even number"
        )
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if model.get("type") == "Llama" and model.get(key):
            problems.append(
                f"model.{key}: {model[key]!r}: Llama has no dropout; leave it out or use GPT2 or GPTJ"
            )
    chosen = [key for key in ("fp16", "bf16") if training.get(key) is True]
    if len(chosen) == 2:
        problems.append("training.fp16, training.bf16: both are true; choose one")
    elif chosen and training.get("precision") not in (None, "auto", chosen[0]):
        problems.append(
            f"training.{chosen[0]}: true, but training.precision is {training['precision']!r}; choose one"
        )
    if training.get("warmup_steps") and training.get("warmup_ratio"):
        problems.append("training.warmup_steps, training.warmup_ratio: both are given; choose one")
    untried = {
        "ema": training.get("ema") is not None,
        "optimizer": training.get("optimizer") == "muon",
    }
    untried |= {key: training.get(key) is True for key in ("compile", "torch_compile")}
    for key in (key for key, given in untried.items() if given and training.get("fsdp") is True):
        problems.append(
            f"training.fsdp: true does not go with training.{key}: {training[key]}; leave one out"
        )
    peak, low = training.get("lr"), training.get("min_lr")
    if _number(peak) and _number(low) and low > peak:
        problems.append(f"training.min_lr: {low:g} is above training.lr ({peak:g})")
    if (
        _section(raw, "data").get("random_offset") is True
        and _section(raw, "distillation").get("cache") == "top_k"
    ):
        problems.append(
            "distillation.cache: top_k keeps the teachers' answers for fixed chunks, but data.random_offset: true cuts "
            "others in each epoch; choose one"
        )
    epochs = training.get("num_epochs")
    if _section(raw, "babylm") and _number(epochs) and epochs > MAX_EPOCHS:
        problems.append(
            f"training.num_epochs: {epochs}: BabyLM allows {MAX_EPOCHS} epochs over the training text, and that is "
            f"{epochs - MAX_EPOCHS:g} too many; use {MAX_EPOCHS} or fewer, or take the babylm section out"
        )
    if logging.get("wandb") is True and not logging.get("project"):
        problems.append(
            "logging.project: missing; required with wandb: true (the Weights & Biases project)"
        )
    return problems


def unusual_values(config: dict) -> list[str]:
    """One line for each value that is allowed but outside what is typical."""
    lines = []
    for name, section in SECTIONS.items():
        given = config.get(name) or {}
        for key, field in section.model_fields.items():
            value = given.get(key)
            low, high = (field.json_schema_extra or {}).get("typical", (None, None))
            if key == "lr" and given.get("optimizer") == "muon":
                high = MUON_LR
            if low is not None and value is not None and not low <= value <= high:
                lines.append(
                    f"{name}.{key}: {value:g} is outside the typical range {low:g} to {high:g}"
                )
    model = config["model"]
    usual, width = FFN_RATIO[model["type"]], model["hidden_size"]
    ratio = model["intermediate_size"] / width
    if (
        model["intermediate_size"] != usual_intermediate_size(model["type"], width)
        and abs(ratio / usual - 1) > 0.1
    ):
        lines.append(
            f"model.intermediate_size: {model['intermediate_size']} is {ratio:.2f} x hidden_size; "
            f"{usual:.2f} x is usual for {model['type']} ({usual_intermediate_size(model['type'], width)})"
        )
    return lines


def usual_intermediate_size(model_type: str, hidden_size: int) -> int:
    """4 x hidden_size for GPT2 and GPTJ; for Llama 8/3 x, rounded up to a multiple of 8."""
    size = hidden_size * FFN_RATIO[model_type]
    return -(-round(size) // 8) * 8 if model_type == "Llama" else round(size)


def _validated(
    schema: type[BaseModel],
    raw: dict,
    rules: list[str],
    root: tuple[str, ...] = (),
    source: str = "",
) -> dict:
    """The raw dict checked against a pydantic model, with `rules` (problems found elsewhere) in the same error."""
    problems = []
    try:
        checked = schema.model_validate(raw).model_dump()
    except ValidationError as error:
        problems += list(dict.fromkeys(_line(e, root) for e in error.errors(include_url=False)))
    if problems or rules:
        raise ConfigError(problems + rules, source)
    checked = {
        key: value for key, value in checked.items() if value is not None or key not in OPTIONAL
    }
    model = checked if root else checked["model"]
    if model["intermediate_size"] is None:
        model["intermediate_size"] = usual_intermediate_size(model["type"], model["hidden_size"])
    return checked


def check_config(raw: Any, source: str = "") -> dict:
    """Check a raw config and return it as a plain dict with every default filled in; ConfigError lists all problems."""
    if (
        isinstance(raw, dict) and "logging" in raw and raw["logging"] is None
    ):  # all its keys have defaults
        raw = {**raw, "logging": {}}
    if not isinstance(raw, dict):
        raise ConfigError(
            [f"not a configuration; it needs the sections {', '.join(SECTIONS)}"], source
        )
    config = _validated(Config, raw, _broken_rules(raw), source=source)
    for section, keys in PATHS.items():  # a shell does it for a flag, nobody for a file
        config[section] |= {key: os.path.expanduser(config[section][key]) for key in keys}
    if "distillation" in config:
        config["distillation"]["teachers"] = [
            os.path.expanduser(path) for path in config["distillation"]["teachers"]
        ]
    return config


def check_model_section(section: Any) -> dict:
    """Check a model section alone, as a notebook writes it: `name` may be missing. ConfigError lists all problems."""
    if not isinstance(section, dict):
        raise ConfigError(
            [
                f"model: {section!r} is not a section; it holds {', '.join(ModelSection.model_fields)}"
            ]
        )
    if section.get("type") not in list(FFN_RATIO):
        raise ConfigError(
            [f"Unknown model type: {section.get('type')!r}; known: {', '.join(FFN_RATIO)}"]
        )
    raw = {"name": "model", **section}
    return _validated(ModelSection, raw, _broken_rules({"model": raw}), ("model",))


def with_defaults(name: str, section: Any) -> dict:
    """A section as a notebook writes it, its missing keys filled in; ConfigError for a key that is not of it."""
    fields = SECTIONS[name].model_fields
    if unknown := [key for key in section or {} if key not in fields]:
        raise ConfigError([_unknown((name, unknown[0]))])
    return {
        **{key: field.default for key, field in fields.items() if not field.is_required()},
        **(section or {}),
    }


def set_key(raw: Any, assignment: str) -> None:
    """Apply one `section.key=value` to a raw config in place; the value is read as YAML."""
    dotted, equals, text = assignment.partition("=")
    path = dotted.strip().replace("-", "_").split(".")
    if not equals or len(path) != 2 or not all(path):
        raise ConfigError(
            [f"{assignment!r} is not of the form section.key=value, e.g. training.num_epochs=3"],
            "--set",
        )
    set_value(raw, path[0], path[1], parse_yaml(text, f"--set {assignment}"))


def set_value(raw: Any, section: str, key: str, value: Any) -> None:
    """raw[section][key] = value, making the section where it is missing; anything else is left for `check`."""
    if isinstance(raw, dict):
        if raw.get(section) is None:
            raw[section] = {}
        if isinstance(raw[section], dict):
            raw[section][key] = value


# ---- what is generated from the models ----------------------------------------------------------


def json_schema() -> str:
    """config/schema.json, for editors that complete and check YAML."""
    return json.dumps(Config.model_json_schema(), indent=2, sort_keys=True) + "\n"


def key_table() -> str:
    """The Markdown table of all keys for TRAINING_GUIDE.md."""
    rows = ["| key | holds | default | typical | what it does |", "|---|---|---|---|---|"]
    for name, section in SECTIONS.items():
        for key, field in section.model_fields.items():
            needed = f"required{f' in {name}' if name in OPTIONAL else ''}"
            default = needed if field.is_required() else f"`{json.dumps(field.default)}`"
            low, high = (field.json_schema_extra or {}).get("typical", (None, None))
            typical = "" if low is None else f"{low:g} to {high:g}"
            rows.append(
                f"| `{name}.{key}` | {allowed_values(section, key)} | {default} | {typical} | {field.description} |"
            )
    return "\n".join(rows) + "\n"


BEGIN, END = "<!-- keys: begin (written by babyllama/config.py) -->\n", "<!-- keys: end -->"


def generated_files() -> dict[Path, str]:
    """What the generated files should contain, by path."""
    guide = ROOT / "TRAINING_GUIDE.md"
    head, _, rest = guide.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    return {
        ROOT / "config" / "schema.json": json_schema(),
        guide: head + BEGIN + key_table() + END + tail,
    }


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv not in ([], ["--check"]):
        print(__doc__)
        return 0 if argv in (["-h"], ["--help"]) else 2
    stale = [
        p
        for p, text in generated_files().items()
        if not p.is_file() or p.read_text(encoding="utf-8") != text
    ]
    for path in stale:
        print(
            f"{path.relative_to(ROOT)}: {'stale; run python -m babyllama.config' if argv else 'written'}"
        )
        if not argv:
            path.write_text(generated_files()[path], encoding="utf-8")
    return 1 if stale and argv else 0


if __name__ == "__main__":
    sys.exit(main())
