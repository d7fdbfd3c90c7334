"""tasks.py: one literal row for each task with its figure worked out by hand, naive oracles, ties, intervals."""

import csv
import json
import math

import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from babyllama.evaluation import grading, metrics, tasks
from babyllama.evaluation.grading import compare, grade, predictions, score_items
from babyllama.evaluation.tasks import Item, decode_rows, read_items

ROWS = {  # task: (file stem, row, subset, candidates as (prefix, completion), texts of predictions.json)
    "blimp": (
        "x", {"sentence_good": "Cats sleep.", "sentence_bad": "Cats sleeps.", "field": "syntax", "UID": "agreement"},
        "agreement", [("", "Cats sleep."), ("", "Cats sleeps.")], ["Cats sleep.", "Cats sleeps."],
    ),
    "supplement": (
        "turn_taking", {"sentence_good": "A: Hi. B: Hi.", "sentence_bad": "A: Hi. A: Hi.", "UID": "x"},
        "turn_taking", [("", "A: Hi. B: Hi."), ("", "A: Hi. A: Hi.")], ["A: Hi. B: Hi.", "A: Hi. A: Hi."],
    ),
    "ewok": (
        "x", {"Context1": "The ball is red.", "Context2": "The ball is blue.", "Target1": "It is red.",
              "Target2": "It is blue.", "Domain": "material-properties", "ContextType": "direct"},
        "material-properties", [("The ball is red.", " It is red."), ("The ball is red.", " It is blue.")],
        [" It is red.", " It is blue."],
    ),
    "entity_tracking": (
        "regular", {"input_prefix": "Box 1 contains", "options": [" the car.", " the cup.", " nothing."], "numops": 2},
        "regular_2_ops", [("Box 1 contains", " the car."), ("Box 1 contains", " the cup."), ("Box 1 contains", " nothing.")],
        [" the car.", " the cup.", " nothing."],
    ),
    "comps": (
        "comps_wugs_dist-in-between", {"prefix_acceptable": "A robin", "prefix_unacceptable": "A penguin", "property_phrase": "can fly."},
        "wugs_dist_in_between", [("A robin", " can fly."), ("A penguin", " can fly.")],
        ["A robin can fly.", "A penguin can fly."],
    ),
    "wug_adj": ("x", {"sentences": "wuggish ones\twuggable ones", "ratio": 0.7}, "wug_adj",
                [("", "wuggish ones"), ("", "wuggable ones")], ["wuggish ones", "wuggable ones"]),
    "wug_past": ("x", {"sentences": "he wugged\the wog", "ratio": "0.25"}, "wug_past",
                 [("", "he wugged"), ("", "he wog")], ["he wugged", "he wog"]),
    "minimal_pairs": ("toys", {"sentence_good": "a b", "sentence_bad": "b a"}, "toys", [("", "a b"), ("", "b a")], ["a b", "b a"]),
    "multiple_choice": (
        "x", {"prompt": "One and one is", "choices": ["three", "two"], "answer": 1, "subset": "sums"}, "sums",
        [("One and one is", " three"), ("One and one is", " two")], [" three", " two"],
    ),
    "completion": (
        "x", {"prompt": "Snow is", "answer": "white", "wrong": ["red", "green"]}, "x",
        [("Snow is", " white"), ("Snow is", " red"), ("Snow is", " green")], [" white", " red", " green"],
    ),
}  # fmt: skip
READING = {
    "item": "The old man", "word": "sat", "prev_item": "The old", "prev_word": "man", "Subtlex_log10": "3.5",
    "length": "3", "context_length": "3", "prev_length": "3", "RTfirstfix": "200", "RTfirstpass": "220",
    "RTgopast": "NA", "RTrightbound": "240", "self_paced_reading_time": "310.5",
}  # fmt: skip


@pytest.mark.parametrize("task", ROWS)
def test_a_literal_row_of_each_task(task):
    stem, row, subset, candidates, answers = ROWS[task]
    (item,) = decode_rows(task, [row], "file", stem)
    assert (item.subset, list(item.candidates)) == (subset, candidates)
    assert [item.answer(i) for i in range(len(answers))] == answers
    assert item.gold == (1 if task == "multiple_choice" else 0)
    right = [-5.0 if i == item.gold else -9.0 for i in range(len(answers))]
    if tasks.TASKS[task].metric == "accuracy":
        assert score_items(task, [item], right)["accuracy"] == 1.0
        assert (
            score_items(task, [item], right[::-1] if len(right) == 2 else [-9, -9, -5])["accuracy"]
            == 0.0
        )
        tied = score_items(task, [item], [-5.0] * len(right))
        assert (tied["accuracy"], tied["ties"], tied["chance"]) == pytest.approx(
            (1 / len(right), 1, 1 / len(right))
        )
        assert tied["accuracy_official"] == (0.0 if item.gold else 1.0)


def test_every_task_has_a_literal_row():
    assert {*ROWS, "reading", "entity_tracking_filtered"} == set(tasks.TASKS)


def test_entity_tracking_filtered_leaves_out_items_with_nothing():
    stem, row, *_ = ROWS["entity_tracking"]
    kept = {**row, "options": row["options"][:2]}
    (item,) = decode_rows("entity_tracking_filtered", [row, kept], "file", stem)
    assert item.completions == (" the car.", " the cup.")


def test_a_literal_row_of_reading_times():
    first = {
        **READING,
        "item": "None",
        "prev_item": "",
        "prev_word": "",
    }  # "None of them ...", as pandas does not see it
    items = decode_rows("reading", [READING, first], "file", "x")
    assert list(items[0].candidates) == [("The old man", " sat"), ("The old", " man")]
    assert list(items[1].candidates) == [("None", " sat")]
    assert items[0].facts["self_paced_reading_time"] == 310.5
    assert math.isnan(items[0].facts["RTgopast"])
    assert predictions("reading", items, [-2.0, -3.0, -4.0]) == {
        "reading": {
            "predictions": [
                {"id": 0, "pred": 2.0, "prev_pred": 3.0},
                {"id": 1, "pred": 4.0, "prev_pred": None},
            ]
        }
    }


def test_predictions_in_the_official_layout():
    pair = ROWS["blimp"][1]
    items = decode_rows("blimp", [pair, pair, {**pair, "UID": "other"}], "file", "x")
    assert predictions("blimp", items, [-1, -2, -2, -1, -3, -3]) == {
        "agreement": {"predictions": [{"id": "agreement_0", "pred": "Cats sleep."}, {"id": "agreement_1", "pred": "Cats sleeps."}]},
        "other": {"predictions": [{"id": "other_0", "pred": "Cats sleep."}]},
    }  # fmt: skip
    wug = decode_rows("wug_adj", [ROWS["wug_adj"][1]], "file", "x")
    (row,) = predictions("wug_adj", wug, [math.log(0.3), math.log(0.1)])["wug_adj"]["predictions"]
    assert row["id"] == "wug_adj_0" and row["prob"] == pytest.approx(0.75)


def item(subset="s", n=2, gold=0):
    return Item(subset, ("",) * n, tuple(f"c{i}" for i in range(n)), gold)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(-3, 0), min_size=2, max_size=5), st.integers(0, 99)),
        min_size=1,
        max_size=12,
    )
)
def test_grades_equal_a_naive_loop(drawn):
    items = [item(n=len(scores), gold=gold % len(scores)) for scores, gold in drawn]
    grades = grade(items, np.array([s for scores, _ in drawn for s in scores], dtype=float))
    for i, (scores, _) in enumerate(drawn):
        winners = [j for j, s in enumerate(scores) if s == max(scores)]
        gold = items[i].gold
        assert grades.credit[i] == pytest.approx((gold in winners) / len(winners))
        assert grades.official[i] == (scores.index(max(scores)) == gold)
        assert grades.tied[i] == (len(winners) > 1)
        assert grades.choice[i] == winners[0]


def test_sums_that_float32_cannot_tell_apart_are_ties():
    assert grade([item()], np.array([-40.0, -40.0 + 3e-6])).credit == [0.5]
    assert grade([item()], np.array([-40.0, -40.0 + 3e-4])).credit == [0.0]


def test_averages_by_hand():
    uids = ["a"] * 4 + ["b"]
    scores = [-1, -2] * 3 + [-2, -1] + [-2, -1]  # a: 3 of 4, b: 0 of 1
    items = [item(uid) for uid in uids]
    macro = score_items("blimp", items, scores)
    assert macro["accuracy"] == pytest.approx((0.75 + 0) / 2)
    row = {"accuracy": 0.75, "accuracy_official": 0.75, "chance": 0.5, "n": 4, "ties": 0}
    assert macro["subsets"]["a"] == {**row, "accuracy_ci95": metrics.wilson(0.75, 4)}
    perfect = score_items("blimp", [item(str(i)) for i in range(10)], [-1, -2] * 10)
    assert (
        perfect["accuracy"] == perfect["accuracy_ci95"][1] == 1.0
    )  # ten tenths, not 0.9999999999999999
    assert score_items("completion", items, scores)["accuracy"] == pytest.approx(3 / 5)
    cells = [
        "regular_0_ops",
        "regular_1_ops",
        "ambiref_0_ops",
    ]  # mean over splits of the mean over cells
    split = score_items("entity_tracking", [item(c) for c in cells], [-1, -2, -2, -1, -1, -2])
    assert split["accuracy"] == pytest.approx(((1 + 0) / 2 + 1) / 2)


def test_interval_is_wilson_at_the_effective_number_of_items():
    assert metrics.wilson(0.8, 10) == pytest.approx(
        [0.4902, 0.9433], abs=1e-4
    )  # a published worked example
    assert metrics.wilson(1.0, 10) == pytest.approx([1 / (1 + metrics.Z95**2 / 10), 1.0])
    assert all(
        low <= p <= high
        for n in range(1, 90)
        for p in (0.0, 1.0)
        for low, high in [metrics.wilson(p, n)]
    )
    even = score_items("blimp", [item(u) for u in "aabb"], [-1, -2] * 3 + [-2, -1])
    assert even["accuracy_ci95"] == pytest.approx(metrics.wilson(0.75, 4))
    uneven = score_items("blimp", [item(u) for u in "aaab"], [-1, -2] * 4)
    assert uneven["accuracy_ci95"] == pytest.approx(metrics.wilson(1.0, 1 / (0.25 / 3 + 0.25 / 1)))


def test_spearman_against_the_definition():
    a, b = np.array([3.0, 1.0, 2.0, 5.0, 4.0]), np.array([10.0, 30.0, 20.0, 50.0, 60.0])
    ranks = [sorted(x).index(v) + 1 for x in (a, b) for v in x]
    d = np.array(ranks[:5]) - np.array(ranks[5:])
    assert metrics.spearman(a, b) == pytest.approx(1 - 6 * (d**2).sum() / (5 * 24))
    tied = metrics.spearman(
        np.array([1.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0])
    )  # ranks 1.5, 1.5, 3 and 1, 2, 3
    assert tied == pytest.approx(np.corrcoef([1.5, 1.5, 3], [1, 2, 3])[0, 1])
    assert metrics.spearman(np.ones(4), np.arange(4.0)) == 0.0


def test_wug_correlates_the_share_of_the_first_form_with_people():
    items = [Item("wug_past", ("", ""), ("a", "b"), facts={"ratio": r}) for r in (0.1, 0.5, 0.9)]
    scores = [-3, -1, -2, -2, -1, -3]
    assert score_items("wug_past", items, scores)["spearman"] == pytest.approx(1.0)
    assert score_items("wug_past", items, [-s for s in scores])["spearman"] == pytest.approx(-1.0)


def reading_items(n=60):
    rng = np.random.default_rng(5)
    items, scores = [], []
    for i in range(n):
        facts = {
            name: float(v)
            for name, v in zip(tasks.READING_FIELDS, rng.normal(3, 1, 9), strict=True)
        }
        if i == 7:
            facts["RTgopast"] = math.nan
        pairs = 1 if i % 10 == 0 else 2  # the first word of a text has no word before it
        items.append(Item("reading", ("",) * pairs, ("w",) * pairs, facts=facts))
        scores += list(-rng.gamma(4, 1, pairs))
    return items, np.array(scores)


def test_reading_equals_normal_equations():
    items, scores = reading_items()
    result = score_items("reading", items, scores)
    at = np.cumsum([0] + [len(i.completions) for i in items])
    surprisal = -scores[at[:-1]]
    before = [
        -scores[a + 1] if len(i.completions) > 1 else math.nan
        for a, i in zip(at[:-1], items, strict=True)
    ]
    table = {name: [i.facts[name] for i in items] for name in tasks.READING_FIELDS} | {
        "prev": before
    }

    def gain(y, names):
        rows = np.array([table[y], *(table[n] for n in names), surprisal]).T
        rows = rows[~np.isnan(rows).any(1)].astype(np.longdouble)
        x = [np.ones(len(rows)), *rows[:, 1:-1].T]
        x += [
            rows[:, i] * rows[:, j]
            for i in range(1, len(names) + 1)
            for j in range(i + 1, len(names) + 1)
        ]

        def r2(columns):
            m = np.array(columns).T.astype(float)
            fit = m @ np.linalg.solve(m.T @ m, m.T @ rows[:, 0].astype(float))
            return (
                1 - ((rows[:, 0] - fit) ** 2).sum() / ((rows[:, 0] - rows[:, 0].mean()) ** 2).sum()
            )

        base = r2(x)
        return 100 * (r2([*x, rows[:, -1]]) - base) / (1 - base)

    word = ["Subtlex_log10", "length", "context_length"]
    eyes = np.mean([gain(y, word) for y in tasks.EYE_TRACKING])
    assert result["eye_tracking_percent"] == pytest.approx(float(eyes), rel=1e-6)
    pace = gain("self_paced_reading_time", [*word, "prev_length", "prev"])
    assert result["self_paced_reading_percent"] == pytest.approx(float(pace), rel=1e-5)
    low, high = result["eye_tracking_percent_ci95"]
    assert low <= high
    with pytest.raises(ValueError, match="too few"):
        score_items("reading", items[:9], scores[: at[9]])


def test_paired_bootstrap_equals_a_direct_one():
    rng = np.random.default_rng(1)
    items = [item(u) for u in ["a"] * 40 + ["b"] * 25]
    a, b = (rng.normal(size=130).round(1) for _ in range(2))
    found = compare("blimp", items, a, b)
    gain = grade(items, a).credit - grade(items, b).credit
    assert found["difference"] == pytest.approx((gain[:40].mean() + gain[40:].mean()) / 2)
    draws = [
        (rng.choice(gain[:40], 40).mean() + rng.choice(gain[40:], 25).mean()) / 2 for _ in range(20000)
    ]  # fmt: skip
    assert found["difference_ci95"] == pytest.approx(
        np.percentile(draws, [2.5, 97.5]).tolist(), abs=0.02
    )
    assert (
        compare("blimp", items, a, a)["noise"] and compare("blimp", items, a, a)["difference"] == 0
    )
    sure = np.tile([-1.0, -2.0], 65)
    assert compare("blimp", items, sure, -sure)["noise"] is False


@pytest.mark.parametrize(("subsets", "size"), [(40, 1), (40, 2), (20, 3)])
def test_small_subsets_are_not_taken_for_certain(subsets, size):
    """Of two models that choose at random, about one pair in twenty may differ by more than noise."""
    rng = np.random.default_rng(0)
    items = [item(f"u{i}") for i in range(subsets) for _ in range(size)]
    told = [
        not compare("blimp", items, *rng.normal(size=(2, 2 * len(items))), seed)["noise"] for seed in range(150)
    ]  # fmt: skip
    assert sum(told) <= 16


def test_micro_averages_resample_all_items():
    rng = np.random.default_rng(0)
    items = [item(f"u{i}") for i in range(60)]  # a subset for each row
    a, b = rng.normal(size=(2, 120))
    found = compare("multiple_choice", items, a, b)
    gain = grade(items, a).credit - grade(items, b).credit
    assert found == grading.compare_means(gain)
    assert found["difference_ci95"][0] < found["difference"] < found["difference_ci95"][1]


def test_few_items_say_nothing():
    """Five items of one sign have p = 2 x 0.5^5 = 0.06 in a sign test: the bootstrap, all draws alike, must not rule."""
    for n, noise in ((1, True), (5, True), (6, False)):
        scores = np.tile([-1.0, -2.0], n)
        assert compare("blimp", [item() for _ in range(n)], scores, -scores)["noise"] is noise
        assert grading.compare_means(np.r_[np.full(n, 0.5), np.zeros(2)])["noise"] is (
            noise or n < 6
        )
    assert grading.compare_means(np.zeros(50)) == {
        "difference": 0.0,
        "difference_ci95": [0.0, 0.0],
        "noise": True,
    }


def test_compare_of_a_correlation_is_paired():
    rng = np.random.default_rng(2)
    items = [Item("wug_adj", ("", ""), ("a", "b"), facts={"ratio": r}) for r in rng.random(30)]
    good = np.array([x for i in items for x in (i.facts["ratio"], -i.facts["ratio"])])
    found = compare("wug_adj", items, good, rng.normal(size=60))
    assert (
        found["noise"] is False
        and 0 < found["difference_ci95"][0] < found["difference"] < found["difference_ci95"][1]
    )


def test_mistakes_are_named(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"sentence_good": "a", "sentence_bad": "b"}\n{"sentence_good": "a"}\n')
    with pytest.raises(ValueError, match="item 2: lacks sentence_bad; it has sentence_good"):
        read_items("blimp", tmp_path)
    file.write_text("\n{oops}\n")
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_items("blimp", file)
    file.write_text('{"sentence_good": "a", "sentence_bad": ""}\n')
    with pytest.raises(ValueError, match="a candidate is empty"):
        read_items("blimp", file)
    file.write_text("")
    with pytest.raises(ValueError, match="no blimp items"):
        read_items("blimp", tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read_items("ewok", tmp_path / "none")
    with pytest.raises(ValueError, match="put it in quotes"):
        decode_rows("completion", [{"prompt": "a", "answer": True, "wrong": ["b"]}], "f", "x")
    with pytest.raises(ValueError, match="unknown field 'anwser'"):
        decode_rows(
            "completion",
            [{"prompt": "a", "answer": "b", "wrong": ["c"], "anwser": 1}],
            "f",
            "x",
            strict=True,
        )
    with pytest.raises(ValueError, match="wrong 'bird' is not a list"):  # else its letters
        decode_rows("completion", [{"prompt": "a", "answer": "b", "wrong": "bird"}], "f", "x")
    for choices in ("cat", [], ["one"]):
        with pytest.raises(ValueError, match="is not a list of two or more texts"):
            decode_rows(
                "multiple_choice", [{"prompt": "a", "choices": choices, "answer": 0}], "f", "x"
            )
        with pytest.raises(ValueError, match="is not a list of two or more texts"):
            decode_rows(
                "entity_tracking",
                [{"input_prefix": "a", "options": choices, "numops": 1}],
                "f",
                "x",
            )
    with pytest.raises(ValueError, match="answer True is not the place of a choice"):
        decode_rows(
            "multiple_choice", [{"prompt": "a", "choices": ["b", "c"], "answer": True}], "f", "x"
        )
    with pytest.raises(ValueError, match="ratio 'nan' is not a number"):
        decode_rows("wug_adj", [{"sentences": "a\tb", "ratio": "nan"}], "f", "x")
    file.write_bytes(b'{"sentence_good": "a", "sentence_bad": "b"}\n\xff\n')
    with pytest.raises(ValueError, match=r"x\.jsonl: .*not UTF-8"):
        read_items("blimp", file)
    file.write_text("[" * 100_000 + "\n")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read_items("blimp", file)
    with pytest.raises(ValueError, match="all be different"):
        decode_rows("completion", [{"prompt": "a", "answer": "b", "wrong": ["b"]}], "f", "x")
    with pytest.raises(ValueError, match="item 1: .*surrogates not allowed"):
        decode_rows("minimal_pairs", [{"sentence_good": "a", "sentence_bad": "\ud800"}], "f", "x")
    with pytest.raises(ValueError, match="scores are NaN"):
        score_items("blimp", [item()], [math.nan, -1])
    with pytest.raises(ValueError, match="do not fit"):
        score_items("blimp", [item()], [-1])


def test_macro_average_by_hand():
    results = {
        "b": {"metric": "accuracy", "accuracy": 0.5, "accuracy_official": 0.75},
        "w": {"metric": "spearman", "spearman": -0.2},
        "r": {
            "metric": "eye_tracking_percent",
            "eye_tracking_percent": 4.0,
            "self_paced_reading_percent": 1.0,
        },
        "own": {"metric": "accuracy", "accuracy": 0.9, "accuracy_official": 0.9},
    }
    types = {"b": "blimp", "w": "wug_adj", "r": "reading", "own": "minimal_pairs"}
    assert grading.macro_average(types, results) == pytest.approx((75 - 20 + 4 + 1) / 4)
    assert grading.macro_average({"b": "blimp", "own": "minimal_pairs"}, results) is None


def test_files_are_read_in_the_order_of_their_names(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text('{"sentence_good": "x", "sentence_bad": "y"}\n\n')
    assert [i.subset for i in read_items("supplement", tmp_path)] == ["a", "b"]
    with (tmp_path / "r.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, READING)
        writer.writeheader()
        writer.writerow({**READING, "word": "sat, down"})
    assert read_items("reading", tmp_path)[0].completions[0] == " sat, down"
    for name, text in (("bad.csv", b"a,b\n1,2\n3,\xff\n"), ("bad.jsonl", b"{}\n\n\xff")):
        (tmp_path / name).write_bytes(text)
        with pytest.raises(ValueError, match=f"{name}: after line .: not UTF-8"):
            list(tasks._rows(tmp_path / name))
    (tmp_path / "bad.csv").write_bytes(b"a,b\n1,2\n3," + b"x" * 200_000 + b"\n")
    with pytest.raises(ValueError, match="bad.csv: line 3 is not CSV"):
        list(tasks._rows(tmp_path / "bad.csv"))


@pytest.mark.skipif(not (SHARED / "blimp").is_dir(), reason="BLiMP is not here")
def test_blimp_as_published():
    items = read_items("blimp", SHARED / "blimp")
    assert len(items) == 34000 and len({i.subset for i in items}) == 34
    constant = score_items("blimp", items, np.zeros(68000))
    assert (constant["accuracy"], constant["accuracy_official"], constant["ties"]) == (
        0.5,
        1.0,
        34000,
    )
    json.dumps(predictions("blimp", items[:10], np.zeros(20)), allow_nan=False)
