"""The declared tasks of a benchmark file: the built-in items, defaults and mistakes."""

from __future__ import annotations

import json
import re

import pytest

from babyllama.config import ConfigError, read_yaml_file
from babyllama.evaluation import tasks
from babyllama.evaluation.benchmark_config import BUILT_IN, TYPES, load_tasks


def test_there_are_enough_built_in_items():
    built_in = load_tasks()
    assert len(built_in["completion"].items) >= 100
    assert built_in["consistency"].n >= 20
    assert built_in["repetition"].n >= 20
    assert built_in["speed"].options["batch_sizes"] == [1, 4, 8, 16]


def test_built_in_completions_have_four_different_answers_that_the_prompt_does_not_contain():
    rows = read_yaml_file(BUILT_IN)["tasks"]["completion"]["items"]
    assert len({row["prompt"].lower() for row in rows}) == len(rows)
    assert len({row["category"] for row in rows}) >= 8
    for row in rows:
        answers = {row["answer"].lower(), *map(str.lower, row["wrong"])}
        assert len(row["wrong"]) == 3, row
        assert len(answers) == 4, row
        assert row["prompt"] == row["prompt"].strip()
        assert row["answer"] == row["answer"].strip()
        assert not re.search(rf"\b{re.escape(row['answer'])}\b", row["prompt"]), row


def test_built_in_prompts_are_different_and_those_of_a_group_end_alike():
    declared = read_yaml_file(BUILT_IN)["tasks"]
    prompts = list(declared["repetition"]["prompts"])
    for group in declared["consistency"]["groups"]:
        group_prompts = [*group["prompts"], group["control"]]
        prompts += group_prompts
        last_words = {tuple(prompt.lower().split()[-2:]) for prompt in group_prompts}
        assert len(last_words) == 1, group
    assert len({prompt.lower() for prompt in prompts}) == len(prompts)


def test_a_task_without_items_has_the_built_in_ones(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"sentence_good": "a b", "sentence_bad": "b a"}\n')
    file = tmp_path / "mine.yaml"
    file.write_text(
        "tasks:\n"
        "  completion:\n"
        "  quick: {type: speed, repeats: 1}\n"
        f"  pairs: {{type: minimal_pairs, path: {tmp_path}}}\n"
    )
    declared = load_tasks(file)
    assert declared["completion"].n == load_tasks()["completion"].n
    options = {"batch_sizes": [1, 4, 8, 16], "max_new_tokens": 64, "repeats": 1}
    assert declared["quick"].options == options
    assert declared["pairs"].describe() == {"type": "minimal_pairs", "path": str(tmp_path)}


def test_all_mistakes_of_a_file_are_listed_at_once(tmp_path):
    missing = tmp_path / "none"
    declared = {
        "blimpp": {},
        "blimp": {"path": str(missing)},
        "ewok": None,
        "x/y": {},
        "n": 3,
        "list": {"type": ["blimp"]},
        "speed": {"batch_sizes": [0], "repeat": 3},
        "two": {"type": "wug_adj", "path": "a", "items": []},
        "mine": {"type": "completion", "items": [{"prompt": "a", "answer": "b"}]},
        "consistency": {"groups": [{"prompts": ["a"], "control": ""}]},
        "babylm_2026": {"type": "speed"},
    }
    with pytest.raises(ConfigError) as error:
        load_tasks({"tasks": declared})
    for message in (
        "tasks.blimpp.type: 'blimpp' is unknown; did you mean blimp?",
        f"tasks.blimp: {missing} does not exist",
        "tasks.list.type: ['blimp'] is unknown",
        "tasks.ewok: ewok needs either `path` or `items`",
        "tasks.n: 3 is not a task",
        "tasks.speed.batch_sizes.0: 0 is not allowed",
        "tasks.speed.repeat: unknown key; did you mean tasks.speed.repeats?",
        "tasks.mine: items: item 1: missing fields: wrong",
        "tasks.two: wug_adj needs either",
        "tasks.x/y: not a name",
        "tasks.babylm_2026: this name is reserved",
        "tasks.consistency.groups.0.prompts:",
    ):
        assert message in str(error.value)


def test_a_file_without_tasks_is_refused():
    with pytest.raises(ConfigError, match="one section, `tasks`"):
        load_tasks({"task": {}})


def test_a_benchmark_file_may_name_every_type_of_task():
    assert set(TYPES) == {*tasks.TASKS, "consistency", "repetition", "speed"}


def test_phenomena_are_read_from_the_rows_of_blimp(tmp_path):
    pair = {"sentence_good": "a", "sentence_bad": "b"}
    rows = [
        {**pair, "UID": "x", "linguistics_term": "binding"},
        {**pair, "UID": "y", "linguistics_term": "agreement"},
        pair,
    ]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (task,) = load_tasks({"tasks": {"blimp": {"path": str(tmp_path)}}}).values()
    assert task.describe()["phenomena"] == {"x": "binding", "y": "agreement"}


ROWS_OF_2026 = {
    "blimp": {"sentence_good": "a", "sentence_bad": "b"},
    "supplement": {"sentence_good": "a", "sentence_bad": "b"},
    "ewok": {"Context1": "a", "Context2": "b", "Target1": "c", "Domain": "d"},
    "entity_tracking": {"input_prefix": "a", "options": [" b", " c"], "numops": 0},
    "comps": {"prefix_acceptable": "a", "prefix_unacceptable": "b", "property_phrase": "c"},
    "global_piqa_parallel": {
        "example_id": "x", "prompt": "a", "label": 3,
        "solution0": "b", "solution1": "c", "solution2": "d", "solution3": "e",
    },
    "global_piqa_nonparallel": {
        "example_id": "x", "prompt": "a", "label": 1, "solution0": "b", "solution1": "c",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ["benchmark-babylm.yaml", "benchmark-babylm-fast.yaml"])
def test_the_files_of_babylm_read_its_data_and_name_the_command_for_what_is_missing(
    name, tmp_path, monkeypatch
):
    file = BUILT_IN.with_name(name)
    paths = {task: row["path"] for task, row in read_yaml_file(file)["tasks"].items()}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        load_tasks(file)
    problems = error.value.problems
    assert [problem.split(":")[0] for problem in problems] == [f"tasks.{task}" for task in paths]
    assert all("in babylm-eval/strict downloads them" in problem for problem in problems)

    for task, path in paths.items():
        folder = tmp_path / path
        if folder.suffix == ".csv":
            folder.parent.mkdir(parents=True, exist_ok=True)
            fields = tasks.TASKS[task].fields
            folder.write_text(",".join(fields) + "\n" + ",".join(["1"] * len(fields)) + "\n")
        else:
            folder.mkdir(parents=True)
            (folder / "eng_latn.jsonl").write_text(json.dumps(ROWS_OF_2026[task]))
    declared = load_tasks(file)
    assert all(task.n == 1 for task in declared.values())
    columns = {tasks.TASKS[task].column for task in declared} - {""}
    assert columns == {task.column for task in tasks.TASKS.values()} - {""} - (
        {"comps"} if "fast" in name else set()
    )
