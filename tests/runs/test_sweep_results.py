"""The results of a sweep: the table, the notes and the spread over seeds."""

import json
import re

from babyllama.runs.sweep import combinations, seed_grid
from babyllama.runs.sweep_results import (
    COLUMNS,
    PLOT,
    RESULTS,
    TABLE,
    edge_notes,
    format_table,
    seed_summary,
    write_sweep,
)


def test_a_best_value_at_the_edge_gets_a_note():
    grid = {
        "training.lr": [1e-3, 3e-3, 1e-2],
        "model.n_layer": [1, 2, 3],
        "training.optimizer": ["a", "b", "c"],
    }
    points = combinations(grid)
    failed = {"name": "x", "values": points[0], "error": "no memory"}
    for lr, n_layer, expected in (
        (1e-2, 2, ["training.lr: the largest value, 0.01,"]),
        (3e-3, 2, []),
        (1e-3, 3, ["training.lr: the smallest", "model.n_layer: the largest value, 3,"]),
    ):
        rows = [
            {"name": str(i), "values": values, "eval_bits_per_byte": 1.0}
            for i, values in enumerate(points)
        ]
        best = {"training.lr": lr, "model.n_layer": n_layer, "training.optimizer": "a"}
        rows[points.index(best)]["eval_bits_per_byte"] = 0.5
        lines = edge_notes(grid, [*rows, failed])
        assert len(lines) == len(expected)
        for line, start in zip(lines, expected, strict=True):
            assert line.startswith(start)
    assert edge_notes(grid, [failed]) == []


def test_the_table_has_a_column_for_each_task_of_a_benchmark():
    rows = []
    for seed, accuracy in ((1, 0.5), (2, 0.7)):
        results = dict.fromkeys(COLUMNS, 1.0) | {"benchmark/blimp": accuracy}
        rows.append({"name": f"s{seed}", "values": {"training.seed": seed}, **results})
    rows.append({"name": "s3", "values": {"training.seed": 3}, "error": "no memory"})
    table = format_table(seed_grid([1, 2, 3]), rows)
    heading, *lines = (re.split(r"\s{2,}", line.strip()) for line in table.splitlines())
    assert heading[-1] == "blimp"
    assert [line[4] for line in lines] == ["0.5000", "0.7000", "-", "0.6000", "0.1414"]


def test_a_sweep_without_a_finished_run_has_no_plot(tmp_path):
    rows = [{"name": "x", "values": {"training.lr": 0.1}, "error": "no memory\nat all"}]
    write_sweep(tmp_path, {"training.lr": [0.1]}, rows)
    document = json.loads((tmp_path / RESULTS).read_text())
    assert document["best"] is None
    assert (tmp_path / TABLE).read_text().endswith("failed: no memory\n")
    assert not (tmp_path / PLOT).exists()


def test_one_finished_seed_has_no_spread():
    finished = {"name": "a", "values": {"training.seed": 1}, **dict.fromkeys(COLUMNS, 1.0)}
    failed = {"name": "b", "values": {"training.seed": 2}, "error": "no memory"}
    assert seed_summary([finished, failed]) is None
    assert seed_summary([failed, finished, finished])["eval_loss"]["n"] == 2
