"""Read the tasks of a benchmark from a YAML file or a dict.

    from babyllama.evaluation.benchmark_config import load_tasks
    load_tasks("custom_benchmarks.yaml")["blimp"].items
    load_tasks({"tasks": {"completion": {}, "speed": {"batch_sizes": [1, 2]}}})

A benchmark of many models can run for hours, so everything is read and checked before the first
model is opened, and all problems of a file are reported at once. A task that declares no items gets
those of config/benchmark.yaml.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from babyllama.cli import suggest
from babyllama.config import read_yaml_file
from babyllama.evaluation.tasks import TASKS, Item, decode_rows, read_items
from babyllama.files import ROOT
from babyllama.problems import ConfigError, validation_problems

BUILT_IN = ROOT / "config" / "benchmark.yaml"
# a file of results has these keys next to the tasks, so no task can have such a name
RESERVED = {"overall_score", "overall_score_ci95", "overall_parts", "babylm_2026"}


# ---- the keys of each type of task --------------------------------------------------------------

Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(pattern=r"\S", json_schema_extra={"allowed": "text that is not blank"})]
TopP = Annotated[
    float, Field(gt=0, le=1, json_schema_extra={"allowed": "a number above 0 and up to 1"})
]
Prompts = Annotated[list[Text], Field(min_length=2)]


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _ItemOptions(_Options):
    path: Text | None = None
    items: list[Any] | None = None


class _Group(_Options):
    prompts: Prompts
    control: Text


class _ConsistencyOptions(_Options):
    groups: Annotated[list[_Group], Field(min_length=2)]
    max_new_tokens: Count


class _RepetitionOptions(_Options):
    prompts: Prompts
    max_new_tokens: Count
    temperature: Annotated[float, Field(ge=0)]
    top_p: TopP


class _SpeedOptions(_Options):
    batch_sizes: Annotated[list[Count], Field(min_length=1)]
    max_new_tokens: Annotated[int, Field(ge=2)]
    repeats: Count


TYPES: dict[str, type[_Options]] = {
    "consistency": _ConsistencyOptions,
    "repetition": _RepetitionOptions,
    "speed": _SpeedOptions,
    **dict.fromkeys(TASKS, _ItemOptions),
}


@dataclass(frozen=True)
class BenchmarkTask:
    """A declared task with its checked options and, if its type has any, its items."""

    name: str
    type: str  # a key of TYPES
    options: dict[str, Any]
    items: list[Item] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        """Return the task's entry under `configs` in a file of results."""
        entry = {"type": self.type}
        for key, value in self.options.items():
            if key not in ("items", "groups", "prompts"):
                entry[key] = value
        phenomena = {item.subset: item.phenomenon for item in self.items if item.phenomenon}
        if phenomena:
            entry["phenomena"] = phenomena  # by subset
        return entry

    @property
    def n(self) -> int:
        """Count the items, groups or prompts (for speed, the batch sizes)."""
        for key in ("groups", "prompts", "batch_sizes"):
            if key in self.options:
                return len(self.options[key])
        return len(self.items)


# ---- reading ------------------------------------------------------------------------------------


def load_tasks(config: str | Path | dict | None = None) -> dict[str, BenchmarkTask]:
    """Return the declared tasks by name; ConfigError lists all problems.

    The default is config/benchmark.yaml. Paths in a file are relative to the working directory.
    """
    # find the section `tasks`
    if isinstance(config, dict):
        source = "tasks"
        raw = config
    else:
        source = str(config or BUILT_IN)
        raw = read_yaml_file(source, holds_tasks=True)
    declared = raw.get("tasks") if isinstance(raw, dict) and set(raw) == {"tasks"} else None
    if not isinstance(declared, dict) or not declared:
        raise ConfigError(
            ["not a benchmark; it needs one section, `tasks`, with an entry for each task"], source
        )

    # read all tasks before raising, so that all problems are reported at once
    problems = []
    tasks = {}
    for name, options in declared.items():
        try:
            tasks[name] = _read_task(str(name), options)
        except ConfigError as error:
            problems += error.problems
        except (ValueError, OSError) as error:
            problems.append(f"tasks.{name}: {error}")
    if problems:
        raise ConfigError(problems, source)
    return tasks


def _read_task(name: str, raw: Any) -> BenchmarkTask:
    path = f"tasks.{name}"
    if not isinstance(raw, dict | None):
        raise ValueError(
            f"{raw!r} is not a task; write keys, such as {name}: {{type: minimal_pairs, path: DIR}}"
        )
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError("not a name; use letters, digits, '.', '_' and '-'")
    if name in RESERVED:
        raise ValueError("this name is reserved; use another")

    # the type is the name unless the task says otherwise
    given = dict(raw or {})
    task_type = given.pop("type", name)
    if not isinstance(task_type, str) or task_type not in TYPES:
        raise ConfigError(
            [f"{path}.type: {task_type!r} is unknown; {suggest(str(task_type), TYPES)}"]
        )

    # what the task does not declare comes from the built-in task of its type, unless it has items
    has_items = "path" in given or "items" in given
    default = {} if has_items else _built_in_tasks().get(task_type, {})
    schema = TYPES[task_type]
    try:
        options = schema.model_validate({**default, **given}).model_dump(exclude_none=True)
    except ValidationError as error:
        raise ConfigError(validation_problems(error, schema, path)) from None
    items = _read_items(name, task_type, options) if schema is _ItemOptions else []
    return BenchmarkTask(name, task_type, options, items)


@functools.cache
def _built_in_tasks() -> dict[str, Any]:
    return read_yaml_file(BUILT_IN)["tasks"]


def _read_items(name: str, task_type: str, options: dict[str, Any]) -> list[Item]:
    if ("path" in options) == ("items" in options):
        raise ValueError(f"{task_type} needs either `path` or `items`")
    if "path" in options:
        return read_items(task_type, options["path"])
    if not options["items"]:
        raise ValueError("items is empty")
    return decode_rows(task_type, options["items"], "items", name, strict=True)
