"""Say in a sentence what is wrong with a configuration, and what would be right.

Each problem is one line with the key, its value, what is allowed and the nearest key that exists.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ValidationError

from babyllama.cli import suggest
from babyllama.schema import SECTIONS


class ConfigError(ValueError):
    """Report the problems of a configuration; `problems` holds one line for each."""

    def __init__(self, problems: list[str], source: str = ""):
        self.problems = problems
        super().__init__("\n".join(f"{source}: {line}" if source else line for line in problems))


def seen_from(path: str | Path) -> str:
    """Return " in <working directory>" for a relative path, to say where it was looked for."""
    return "" if os.path.isabs(path) else f" in {os.getcwd()}"


def did_you_mean_path(path: str | Path) -> str:
    """Return "; did you mean X?" if a path exists that differs in one similar name, else ""."""
    names = Path(path).parts
    for i in range(len(names)):
        folder = Path(*names[:i])
        if (folder / names[i]).exists():
            continue
        similar = difflib.get_close_matches(names[i], os.listdir(folder)) if folder.is_dir() else []
        for name in similar:
            found = folder.joinpath(name, *names[i + 1 :])
            if found.exists():
                return f"; did you mean {found}?"
        break
    return ""


# ---- from pydantic's errors to sentences --------------------------------------------------------

TYPE_NAMES = {
    "integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false",
    "null": "null",
}  # fmt: skip


def allowed_values(node: dict) -> str:
    """Describe in words what the JSON schema of one value allows."""
    return ", or ".join(_allowed_option(option) for option in node.get("anyOf", [node]))


def _allowed_option(node: dict) -> str:
    if "allowed" in node:  # schema.py has put it into words already
        return node["allowed"]
    if "enum" in node:
        *choices, last = map(str, node["enum"])
        return f"{', '.join(choices)} or {last}"
    if "const" in node:
        return str(node["const"])
    if "properties" in node:
        return f"a section with the keys {', '.join(node['properties'])}"
    if node.get("type") == "array":
        texts = node["items"].get("type") == "string"
        count = f"{node['minItems']} or more " if "minItems" in node else ""
        return f"a list of {count}{'texts' if texts else 'values'}"
    words = TYPE_NAMES.get(node.get("type"), "any value")
    if "minimum" in node and "maximum" in node:
        words += f" from {_number(node['minimum'])} to {_number(node['maximum'])}"
    elif "minimum" in node:
        words += f", {_number(node['minimum'])} or more"
    elif "exclusiveMinimum" in node:
        words += f" above {_number(node['exclusiveMinimum'])}"
    if "exclusiveMaximum" in node:
        words += f", below {_number(node['exclusiveMaximum'])}"
    return words


def _number(value: float) -> str:
    return f"{value:.10g}"  # 2147483648 in full, and 0.01, 1e-06


def unknown_key(path: str, key: str, known: Iterable[str]) -> str:
    """Describe the problem of a key that the section at `path` does not have."""
    if not path:
        return f"{key}: unknown section; {suggest(key, known)}"
    if path in SECTIONS:
        for name, section in SECTIONS.items():
            if key in section.model_fields:
                return f"{path}.{key}: unknown key; it belongs in {name}.{key}"
    return f"{path}.{key}: unknown key; {suggest(key, known, f'{path}.')}"


def validation_problems(
    error: ValidationError, schema: type[BaseModel], path: str = ""
) -> list[str]:
    """Return one line for each value that pydantic rejected, with what is allowed there.

    `schema` is the model that was validated, `path` its position in the file, such as "model".
    """
    root = schema.model_json_schema()
    definitions = root.get("$defs", {})

    def follow_reference(node: dict) -> dict:
        for option in node.get("anyOf", [node]):  # an optional section: itself or null
            if "$ref" in option:
                return definitions[option["$ref"].split("/")[-1]]
        return node

    lines = []
    for problem in error.errors(include_url=False):
        # walk down the schema; pydantic ends some locations with the name of a union's member
        node = root
        names = [path] if path else []
        for part in problem["loc"]:
            if part in node.get("properties", {}):
                node = follow_reference(node["properties"][part])
            elif isinstance(part, int) and "items" in node:
                node = follow_reference(node["items"])
            else:
                break
            names.append(str(part))
        dotted = ".".join(names)

        if problem["type"] == "extra_forbidden":
            lines.append(unknown_key(dotted, problem["loc"][-1], node["properties"]))
        elif problem["type"] == "missing":
            meaning = f" ({node['description']})" if "description" in node else ""
            lines.append(f"{dotted}: missing; {allowed_values(node)}{meaning}")
        else:
            lines.append(f"{dotted}: {problem['input']!r} is not allowed; {allowed_values(node)}")
    # a value that fails every member of a union has one error for each; report it once
    return list(dict.fromkeys(lines))
