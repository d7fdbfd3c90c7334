"""Which tasks a benchmark has: a YAML file (or a dict) -> checked tasks with their items.

Every problem of a file is reported at once, with its path, the value and what is allowed, before any model is opened.
It knows no model. The built-in tasks are those of config/benchmark.yaml; a task that is declared without items of its
own has theirs.

    from benchmark_config import load_tasks
    load_tasks("custom_benchmarks.yaml")["blimp"].items
    load_tasks({"tasks": {"completion": {}, "speed": {"batch_sizes": [1, 2]}}})
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from babyllama.config import ConfigError, read_yaml_file, suggest
from babyllama.evaluation.tasks import TASKS, Item, decode_rows, read_items
from babyllama.files import ROOT

BUILT_IN = ROOT / "config" / "benchmark.yaml"
RESERVED = {
    "overall_score",
    "overall_score_ci95",
    "overall_parts",
    "babylm_macro_average",
}  # names no task may have
Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(pattern=r"\S")]


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Rows(_Options):
    """Items in the file itself or at a path, not both."""

    path: Text | None = None
    items: list[Any] | None = None


class _Group(_Options):
    prompts: Annotated[list[Text], Field(min_length=2)]
    control: Text


class _Consistency(_Options):
    groups: Annotated[list[_Group], Field(min_length=2)]
    max_new_tokens: Count


class _Repetition(_Options):
    prompts: Annotated[list[Text], Field(min_length=2)]
    max_new_tokens: Count
    temperature: Annotated[float, Field(ge=0)]
    top_p: Annotated[float, Field(gt=0, le=1)]


class _Speed(_Options):
    batch_sizes: Annotated[list[Count], Field(min_length=1)]
    max_new_tokens: Annotated[int, Field(ge=2)]
    repeats: Count


TYPES: dict[str, type[_Options]] = {
    "completion": _Rows, "consistency": _Consistency, "repetition": _Repetition, "speed": _Speed,
    **{name: _Rows for name in TASKS if name != "completion"},
}  # fmt: skip


@dataclass(frozen=True)
class BenchmarkTask:
    """A declared task: its name, its type (a key of TYPES), its checked options, and items where the type has them."""

    name: str
    type: str
    options: dict[str, Any]
    items: list[Item] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        """What a file of results says about it; `phenomena` tells which of them a subset is of."""
        listed = ("items", "groups", "prompts")
        phenomena = {item.subset: item.term for item in self.items if item.term}
        facts = {"type": self.type} | {
            key: value for key, value in self.options.items() if key not in listed
        }
        return facts | ({"phenomena": phenomena} if phenomena else {})

    @property
    def n(self) -> int:
        """How many items, groups or prompts it has (speed: batch sizes)."""
        lists = (self.options.get(key) for key in ("groups", "prompts", "batch_sizes"))
        return len(self.items or next(filter(None, lists)))


def load_tasks(config: str | Path | dict | None = None) -> dict[str, BenchmarkTask]:
    """The declared tasks by name; ConfigError lists all problems. None stands for config/benchmark.yaml.

    Paths in a file are seen from the working directory.
    """
    if isinstance(config, dict):
        raw, source = config, "tasks"
    else:
        raw, source = read_yaml_file(config or BUILT_IN), str(config or BUILT_IN)
    declared = raw.get("tasks") if isinstance(raw, dict) and set(raw) == {"tasks"} else None
    if not isinstance(declared, dict) or not declared:
        raise ConfigError(
            ["not a benchmark; it needs the one section `tasks` with a name for each task"], source
        )
    problems: list[str] = []
    tasks = {name: _task(str(name), options, problems) for name, options in declared.items()}
    if problems:
        raise ConfigError(problems, source)
    return tasks


@functools.cache
def _built_in() -> dict[str, Any]:
    return read_yaml_file(BUILT_IN)["tasks"]


def _task(name: str, raw: Any, problems: list[str]) -> BenchmarkTask | None:
    """One checked task, or None with lines added to `problems`."""
    where = f"tasks.{name}"
    if not isinstance(raw, dict | None):
        problems.append(
            f"{where}: {raw!r} is not a task; it holds keys, as in {name}: {{type: minimal_pairs, path: DIR}}"
        )
        return None
    given = dict(raw or {})
    kind = given.pop("type", name)
    if not re.fullmatch(r"\w[\w.-]*", name) or name in RESERVED:
        problems.append(f"{where}: not a name; use letters, digits, '.', '_' and '-'")
        return None
    if not isinstance(kind, str) or kind not in TYPES:
        problems.append(f"{where}.type: {kind!r} is unknown; {suggest(str(kind), TYPES)}")
        return None
    default = _built_in().get(kind, {})
    if "path" in given or "items" in given:
        default = {}
    try:
        options = TYPES[kind].model_validate({**default, **given}).model_dump(exclude_none=True)
    except ValidationError as error:
        problems += [_line(where, TYPES[kind], e) for e in error.errors(include_url=False)]
        return None
    if TYPES[kind] is not _Rows:
        return BenchmarkTask(name, kind, options)
    try:
        return BenchmarkTask(name, kind, options, _items(name, kind, options))
    except (ValueError, OSError) as error:
        problems.append(f"{where}: {error}")
        return None


def _items(name: str, kind: str, options: dict[str, Any]) -> list[Item]:
    if ("path" in options) == ("items" in options):
        raise ValueError(
            f"give a path to the items or the items themselves, one of the two ({kind})"
        )
    if "path" in options:
        return read_items(kind, options["path"])
    if not options["items"]:
        raise ValueError("no items")
    return decode_rows(kind, options["items"], "items", name, strict=True)


def _line(where: str, schema: type[_Options], error: dict) -> str:
    """One pydantic error as one line for people."""
    path = ".".join([where, *map(str, error["loc"])])
    if error["type"] == "missing":
        return f"{path}: missing"
    if error["type"] == "too_short":
        return f"{path}: {error['ctx']['actual_length']} of at least {error['ctx']['min_length']} entries"
    if error["type"] != "extra_forbidden":
        return f"{path}: {error['input']!r} is not allowed; {error['msg'][0].lower()}{error['msg'][1:]}"
    return f"{path}: unknown key; {suggest(str(error['loc'][-1]), ['type', *schema.model_fields])}"
