"""grading.py: grades against naive loops, averages worked by hand, intervals, ties, comparisons."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from babyllama.evaluation import grading, metrics
from babyllama.evaluation.grading import compare, grade, official_predictions, score_items
from babyllama.evaluation.tasks import EYE_TRACKING, READING_FIELDS, Item


def make_item(subset="s", n=2, gold=0):
    return Item(subset, ("",) * n, tuple(f"c{i}" for i in range(n)), gold)


# ---- grades -------------------------------------------------------------------------------------

SCORES_AND_GOLD = st.tuples(
    st.lists(st.integers(-3, 0), min_size=2, max_size=5), st.integers(0, 99)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(SCORES_AND_GOLD, min_size=1, max_size=12))
def test_grades_equal_a_naive_loop(drawn):
    items = [make_item(n=len(scores), gold=gold % len(scores)) for scores, gold in drawn]
    all_scores = [float(score) for scores, _ in drawn for score in scores]
    grades = grade(items, np.array(all_scores))
    for i, (scores, _) in enumerate(drawn):
        winners = [j for j, score in enumerate(scores) if score == max(scores)]
        gold = items[i].gold
        assert grades.credit[i] == pytest.approx((gold in winners) / len(winners))
        assert grades.tied[i] == (len(winners) > 1)
        assert grades.choice[i] in winners


def test_sums_that_float32_cannot_tell_apart_are_ties():
    assert grade([make_item()], np.array([-40.0, -40.0 + 3e-6])).credit == [0.5]
    assert grade([make_item()], np.array([-40.0, -40.0 + 3e-4])).credit == [0.0]


# ---- results of a task --------------------------------------------------------------------------


def test_macro_average_counts_every_subset_the_same():
    items = [make_item(subset) for subset in "aaaab"]
    scores = [-1, -2] * 3 + [-2, -1] + [-2, -1]  # a: 3 of 4 right, b: 0 of 1
    result = score_items("blimp", items, scores)
    assert result["accuracy"] == pytest.approx((0.75 + 0) / 2)
    assert result["subsets"]["a"] == {
        "accuracy": 0.75,
        "chance": 0.5,
        "n": 4,
        "ties": 0,
        "accuracy_ci95": metrics.wilson(0.75, 4),
    }


def test_micro_average_counts_every_item_the_same():
    items = [make_item(subset) for subset in "aaaab"]
    scores = [-1, -2] * 3 + [-2, -1] + [-2, -1]
    assert score_items("completion", items, scores)["accuracy"] == pytest.approx(3 / 5)


def test_entity_tracking_averages_splits_of_cells():
    cells = ["regular_0_ops", "regular_1_ops", "ambiref_0_ops"]
    result = score_items("entity_tracking", list(map(make_item, cells)), [-1, -2, -2, -1, -1, -2])
    assert result["accuracy"] == pytest.approx(((1 + 0) / 2 + 1) / 2)


def test_a_perfect_accuracy_is_exactly_one():
    items = [make_item(str(i)) for i in range(10)]  # ten weights of 0.1 add up to 0.99...9
    result = score_items("blimp", items, [-1, -2] * 10)
    assert result["accuracy"] == result["accuracy_ci95"][1] == 1.0


def test_interval_is_wilson_at_the_effective_number_of_items():
    even = score_items("blimp", [make_item(u) for u in "aabb"], [-1, -2] * 3 + [-2, -1])
    assert even["accuracy_ci95"] == pytest.approx(metrics.wilson(0.75, 4))
    uneven = score_items("blimp", [make_item(u) for u in "aaab"], [-1, -2] * 4)
    effective_n = 1 / (0.25 / 3 + 0.25 / 1)
    assert uneven["accuracy_ci95"] == pytest.approx(metrics.wilson(1.0, effective_n))


def test_scores_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="scores are NaN"):
        score_items("blimp", [make_item()], [math.nan, -1])
    with pytest.raises(ValueError, match="do not match the candidates"):
        score_items("blimp", [make_item()], [-1])


def wug_items(ratios):
    return [Item("wug_past", ("", ""), ("a", "b"), human_data={"ratio": ratio}) for ratio in ratios]


def test_wug_correlates_the_preference_for_the_first_form_with_that_of_people():
    items = wug_items((0.1, 0.5, 0.9))
    scores = [-3, -1, -2, -2, -1, -3]
    assert score_items("wug_past", items, scores)["spearman"] == pytest.approx(1.0)
    opposite = [-score for score in scores]
    assert score_items("wug_past", items, opposite)["spearman"] == pytest.approx(-1.0)
    with pytest.raises(ValueError, match="two or more items"):
        score_items("wug_past", items[:1], [-1, -2])


def reading_items(n=60):
    """Return (items with random reading times, the scores of their candidates)."""
    rng = np.random.default_rng(5)
    items = []
    scores = []
    for i in range(n):
        human_data = dict(zip(READING_FIELDS, rng.normal(3, 1, 9).tolist(), strict=True))
        if i == 7:
            human_data["RTgopast"] = math.nan
        count = 1 if i % 10 == 0 else 2  # the first word of a text has no word before it
        items.append(Item("reading", ("",) * count, ("w",) * count, human_data=human_data))
        scores += (-rng.gamma(4, 1, count)).tolist()
    return items, np.array(scores)


def explained_percent_by_normal_equations(table, measure, names):
    rows = np.array([table[measure], *(table[name] for name in names), table["surprisal"]]).T
    rows = rows[~np.isnan(rows).any(axis=1)]
    y = rows[:, 0]
    predictors = list(rows[:, 1:-1].T)
    products = [a * b for i, a in enumerate(predictors) for b in predictors[i + 1 :]]
    columns = [np.ones(len(rows)), *predictors, *products]

    def r_squared(columns):
        x = np.array(columns).T
        fit = x @ np.linalg.solve(x.T @ x, x.T @ y)
        return 1 - ((y - fit) ** 2).sum() / ((y - y.mean()) ** 2).sum()

    base = r_squared(columns)
    return 100 * (r_squared([*columns, rows[:, -1]]) - base) / (1 - base)


def test_reading_equals_normal_equations():
    items, scores = reading_items()
    result = score_items("reading", items, scores)

    table = {name: [item.human_data[name] for item in items] for name in READING_FIELDS}
    starts = np.cumsum([0] + [len(item.completions) for item in items])[:-1]
    table["surprisal"] = -scores[starts]
    table["before"] = [
        -scores[start + 1] if len(item.completions) > 1 else math.nan
        for start, item in zip(starts, items, strict=True)
    ]
    word = ["Subtlex_log10", "length", "context_length"]
    eyes = [explained_percent_by_normal_equations(table, name, word) for name in EYE_TRACKING]
    pace = explained_percent_by_normal_equations(
        table, "self_paced_reading_time", [*word, "prev_length", "before"]
    )
    assert result["eye_tracking_percent"] == pytest.approx(np.mean(eyes), rel=1e-6)
    assert result["self_paced_reading_percent"] == pytest.approx(pace, rel=1e-5)
    low, high = result["eye_tracking_percent_ci95"]
    assert 0 <= low <= result["eye_tracking_percent"] <= high


def test_too_few_reading_times_are_refused():
    items, scores = reading_items(9)
    with pytest.raises(ValueError, match="too few"):
        score_items("reading", items, scores)


# ---- comparisons --------------------------------------------------------------------------------


def test_paired_bootstrap_equals_a_direct_one():
    rng = np.random.default_rng(1)
    items = [make_item(subset) for subset in ["a"] * 40 + ["b"] * 25]
    a = rng.normal(size=130).round(1)
    b = rng.normal(size=130).round(1)
    result = compare("blimp", items, a, b)
    gains = grade(items, a).credit - grade(items, b).credit
    assert result["difference"] == pytest.approx((gains[:40].mean() + gains[40:].mean()) / 2)
    samples = [
        (rng.choice(gains[:40], 40).mean() + rng.choice(gains[40:], 25).mean()) / 2
        for _ in range(20000)
    ]
    expected = np.percentile(samples, [2.5, 97.5]).tolist()
    assert result["difference_ci95"] == pytest.approx(expected, abs=0.02)


def test_a_clear_difference_is_not_noise():
    items = [make_item(subset) for subset in ["a"] * 40 + ["b"] * 25]
    scores = np.tile([-1.0, -2.0], 65)
    assert compare("blimp", items, scores, -scores)["noise"] is False
    same = compare("blimp", items, scores, scores)
    assert same["noise"] is True
    assert same["difference"] == 0


@pytest.mark.parametrize(("subsets", "size"), [(40, 1), (40, 2), (20, 3)])
def test_models_that_guess_rarely_differ_in_small_subsets(subsets, size):
    """At most about one pair of guessing models in twenty may differ by more than noise."""
    rng = np.random.default_rng(0)
    items = [make_item(f"u{i}") for i in range(subsets) for _ in range(size)]
    clear = 0
    for seed in range(150):
        a, b = rng.normal(size=(2, 2 * len(items)))
        clear += not compare("blimp", items, a, b, seed)["noise"]
    assert clear <= 16


def test_micro_averages_resample_all_items():
    rng = np.random.default_rng(0)
    items = [make_item(f"u{i}") for i in range(60)]  # one item per subset
    a, b = rng.normal(size=(2, 120))
    result = compare("multiple_choice", items, a, b)
    gains = grade(items, a).credit - grade(items, b).credit
    assert result == grading.compare_means(gains)
    low, high = result["difference_ci95"]
    assert low < result["difference"] < high


@pytest.mark.parametrize(("n", "is_noise"), [(1, True), (5, True), (6, False)])
def test_five_items_of_one_sign_are_noise(n, is_noise):
    """They have p = 2 x 0.5^5 = 0.06 in a sign test, but every bootstrap sample is the same."""
    scores = np.tile([-1.0, -2.0], n)
    items = [make_item() for _ in range(n)]
    assert compare("blimp", items, scores, -scores)["noise"] is is_noise


def test_equal_groups_are_noise():
    assert grading.compare_means(np.r_[np.full(5, 0.5), np.zeros(2)])["noise"] is True
    assert grading.compare_means(np.zeros(50)) == {
        "difference": 0.0,
        "difference_ci95": [0.0, 0.0],
        "noise": True,
    }


def test_correlations_are_compared_on_the_same_samples():
    rng = np.random.default_rng(2)
    items = wug_items(rng.random(30).tolist())
    good = []
    for item in items:
        good += [item.human_data["ratio"], -item.human_data["ratio"]]
    result = compare("wug_past", items, np.array(good), rng.normal(size=60))
    low, high = result["difference_ci95"]
    assert result["noise"] is False
    assert 0 < low < result["difference"] < high


# ---- predictions, several tasks -----------------------------------------------------------------


def test_predictions_in_the_official_layout():
    items = [Item(subset, ("", ""), ("good", "bad")) for subset in ("x", "x", "y")]
    assert official_predictions("blimp", items, [-1, -2, -2, -1, -3, -1]) == {
        "x": {"predictions": [{"id": "x_0", "pred": "good"}, {"id": "x_1", "pred": "bad"}]},
        "y": {"predictions": [{"id": "y_0", "pred": "bad"}]},
    }


def test_predictions_of_wug_have_the_probability_of_the_first_form():
    predictions = official_predictions("wug_past", wug_items([0.5]), np.log([0.3, 0.1]))
    (row,) = predictions["wug_past"]["predictions"]
    assert row["id"] == "wug_past_0"
    assert row["prob"] == pytest.approx(0.75)


def test_predictions_of_reading_are_surprisals():
    items = [
        Item("reading", ("The old man", "The old"), (" sat", " man")),
        Item("reading", ("None",), (" sat",)),
    ]
    assert official_predictions("reading", items, [-2.0, -3.0, -4.0]) == {
        "reading": {
            "predictions": [
                {"id": 0, "pred": 2.0, "prev_pred": 3.0},
                {"id": 1, "pred": 4.0, "prev_pred": None},
            ]
        }
    }


def test_predictions_of_global_piqa_are_keyed_by_example():
    items = [Item("eng_latn", ("Q", "Q"), (" a", " b"), key=key) for key in ("x-1", "x-2")]
    assert official_predictions("global_piqa_nonparallel", items, [-1, -2, -2, -1]) == {
        "x-1": {"predictions": [{"id": "x-1_0", "pred": " a"}]},
        "x-2": {"predictions": [{"id": "x-2_0", "pred": " b"}]},
    }


def test_a_tie_is_drawn_at_random_and_counts_the_expectation_of_the_draw():
    items = [make_item(n=3, gold=i % 3) for i in range(3000)]
    scores = np.tile([-5.0, -5.0, -5.0], 3000)
    grades = grade(items, scores)
    gold = [item.gold for item in items]
    assert np.mean(grades.choice == gold) == pytest.approx(grades.credit.mean(), abs=0.03)
    assert np.bincount(grades.choice) / 3000 == pytest.approx([1 / 3] * 3, abs=0.03)

    # the draw depends on the seed alone
    assert (grade(items, scores).choice == grades.choice).all()
    assert (grade(items, scores, seed=1).choice != grades.choice).any()


def test_leaderboard_columns_by_hand():
    reading = {"eye_tracking_percent": 4.0, "self_paced_reading_percent": 1.0}
    results = {
        "b": {"metric": "accuracy", "accuracy": 0.75},
        "b fast": {"metric": "accuracy", "accuracy": 0.1},
        "w": {"metric": "spearman", "spearman": -0.2},
        "r": {"metric": "eye_tracking_percent", **reading},
        "r2": {"metric": "eye_tracking_percent", **reading},
        "p": {"metric": "accuracy", "accuracy": 0.25},
        "n": {"metric": "accuracy", "accuracy": 0.6},
        "mine": {"metric": "accuracy", "accuracy": 0.9},
        "speed": {"metric": "tokens_per_second", "tokens_per_second": 9.0},
    }
    types = {
        "b": "blimp", "b fast": "blimp", "w": "wug_adj", "r": "reading", "r2": "reading_with_space",
        "p": "global_piqa_parallel", "n": "global_piqa_nonparallel", "mine": "minimal_pairs",
        "speed": "speed",
    }  # fmt: skip
    columns = grading.leaderboard_columns(types, results)
    assert columns == {"blimp": 75, "reading": 2.5, "global_piqa": pytest.approx(42.5)}


def test_the_overall_score_of_2026_counts_missing_columns_as_zero():
    # the first row of the leaderboard of strict-small in August 2026
    columns = {
        "blimp": 68.27, "supplement": 63.28, "ewok": 49.82, "entity_tracking": 29.4, "comps": 52.16,
        "glue": 69.05, "global_piqa": 40.05, "reading": 8.2, "aoa": 0.0,
    }  # fmt: skip
    overall = grading.overall_2026(columns)
    assert overall["overall_2026"] == pytest.approx(42.25, abs=0.01)
    assert overall["columns"] == columns
    assert overall["missing"] == []

    partial = grading.overall_2026({"aoa": None, "blimp": 90.0, "ewok": -9.0})
    assert partial["overall_2026"] == pytest.approx(9.0)
    assert partial["columns"]["aoa"] is None
    assert partial["missing"] == [name for name in columns if name not in ("blimp", "ewok")]
    with pytest.raises(ValueError, match="unknown column 'bimp'; the columns are blimp, "):
        grading.overall_2026({"bimp": 1.0})


def test_overall_score_by_hand():
    results = {
        "completion": {"metric": "completion_accuracy", "completion_accuracy": 0.7, "chance": 0.25},
        "wug": {"metric": "spearman", "spearman": -0.3, "chance": 0.0},
        "consistency": {
            "metric": "avg_consistency_score",
            "avg_consistency_score": 0.98,
            "chance": 0.94,
        },
        "repetition": {"metric": "avg_repetition_score", "avg_repetition_score": 0.2},
        "speed": {"metric": "tokens_per_second", "tokens_per_second": 1e6},
        "reading": {"metric": "eye_tracking_percent", "eye_tracking_percent": 3.0},
    }
    for result in results.values():
        result[f"{result['metric']}_ci95"] = [result[result["metric"]]] * 2
    gap = {"difference": 0.04, "difference_ci95": [0.04, 0.04], "noise": False}
    results["consistency"]["baselines"] = {"same ending": gap}

    overall = grading.overall_score(results)
    parts = {"completion": pytest.approx(0.6), "wug": -0.3, "consistency": pytest.approx(0.04)}
    assert overall["overall_parts"] == {**parts, "one_minus_repetition": 0.8}
    assert overall["overall_score"] == pytest.approx((0.6 - 0.3 + 0.04) / 3 * 0.8)
    assert overall["overall_score_ci95"] == pytest.approx([overall["overall_score"]] * 2)


def test_there_is_no_overall_score_without_a_task_of_quality():
    speed = {"metric": "tokens_per_second", "tokens_per_second": 1e6}
    assert grading.overall_score({"speed": speed}) == {
        "overall_score": None,
        "overall_score_ci95": None,
        "overall_parts": {},
    }


def test_interval_of_the_overall_score_is_that_of_a_mean_of_normals():
    task = {"metric": "accuracy", "accuracy": 0.8, "chance": 0.5, "accuracy_ci95": [0.78, 0.82]}
    overall = grading.overall_score({"a": task, "b": {**task, "accuracy_ci95": [0.76, 0.84]}})
    half = math.hypot(0.02, 0.04) / 2 / 0.5  # of the mean of two, in units of 1 - chance
    assert overall["overall_score_ci95"] == pytest.approx([0.6 - half, 0.6 + half], abs=0.006)
    assert overall["overall_parts"] == {"a": pytest.approx(0.6), "b": pytest.approx(0.6)}


def test_guessing_models_rarely_have_an_overall_score_above_zero():
    """About one in forty models that guess on eight tasks may have an interval above 0."""
    rng = np.random.default_rng(0)
    above_zero = 0
    for seed in range(100):
        results = {}
        for name in "abcdefgh":
            share = rng.binomial(200, 0.5) / 200
            results[name] = {
                "metric": "accuracy",
                "accuracy": share,
                "chance": 0.5,
                "accuracy_ci95": metrics.wilson(share, 200),
            }
        overall = grading.overall_score(results, seed)
        low, high = overall["overall_score_ci95"]
        assert low <= overall["overall_score"] <= high
        above_zero += low > 0
    assert above_zero <= 8
