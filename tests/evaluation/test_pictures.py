"""The learning curves of a run, from the results of its checkpoints."""

import pytest
from test_report import make_document, make_result

from babyllama import plots
from babyllama.evaluation.pictures import learning_curves, pictures
from babyllama.evaluation.report import write_files


def test_a_learning_curve_has_the_scores_of_each_task():
    curves = learning_curves(make_document())
    assert [(curve["run"], curve["task"]) for curve in curves] == [
        ("run", "blimp"),
        ("run", "repetition"),
    ]
    assert (curves[0]["words"], curves[0]["at"]) == (False, [100, 400])
    assert curves[0]["mean"] == pytest.approx([0.6, 0.7])
    assert curves[0]["ci95"] == [pytest.approx([0.55, 0.65]), pytest.approx([0.65, 0.75])]


def test_a_learning_curve_needs_two_checkpoints_of_a_run():
    assert learning_curves(make_document(("a", "b", "c"))) == []
    curve, _ = learning_curves(make_document(("run/chck_1M", "run/chck_10M", "run/other")))
    assert curve["words"]


def make_milestones(*millions: int) -> dict:
    """Return results of checkpoints of one run on four paradigms of two phenomena.

    The accuracy on paradigm a is a hundredth of the millions of words, on b half of that.
    """
    document = make_document(tuple(f"run/chck_{n}M" for n in millions))
    document["configs"]["blimp"]["phenomena"] = {
        "a": "agreement",
        "b": "agreement",
        "c": "binding",
        "d": "binding",
    }
    for n, results in zip(millions, document["results"].values(), strict=True):
        accuracies = {"a": n / 100, "b": n / 200, "c": 0.5, "d": 1.0}
        subsets = {name: make_result(accuracy) for name, accuracy in accuracies.items()}
        results["blimp"]["subsets"] = subsets
    return document


def test_curves_of_phenomena_are_the_means_of_their_paradigms(tmp_path):
    document = make_milestones(10, 1, 20)
    curve, _ = learning_curves(document)
    assert (curve["run"], curve["task"]) == ("run", "blimp")
    assert curve["words"] is True
    assert curve["at"] == [1, 10, 20]
    assert curve["lines"]["agreement"] == pytest.approx([0.0075, 0.075, 0.15])
    assert curve["lines"]["binding"] == [0.75] * 3
    assert curve["mean"] == pytest.approx([0.7, 0.6, 0.8])

    written = write_files(document, tmp_path / "learning.json")
    names = [path.name for path in written]
    assert names[:3] == ["learning.json", "learning.html", "learning.png"]
    assert names[3:] == ["learning-run-blimp.png"]
    assert written[-1].read_bytes().startswith(b"\x89PNG")
    assert not learning_curves(make_document())[0]["lines"]


def test_a_run_with_checkpoints_by_words_and_by_steps_has_two_pictures(tmp_path):
    document = make_milestones(1, 2, 3, 4)
    names = ("chck_1M", "chck_2M", "checkpoint-5", "checkpoint-9")
    for facts, name in zip(document["models"].values(), names, strict=True):
        facts["path"] = f"models/run/{name}"
    written = write_files(document, tmp_path / "both.json")[3:]
    assert [path.name for path in written] == ["both-run-blimp.png", "both-run-blimp-steps.png"]


def test_words_are_on_a_log_axis():
    _, ((axis,),) = plots.new_figure(1, 1, 5, 4)
    plots.draw_learning_curve(axis, learning_curves(make_milestones(1, 3, 10, 100))[0])
    assert axis.get_xscale() == "log"
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["1M", "10M", "100M"]


@pytest.mark.parametrize("first", ["chck_0M", "chck_01M"])
def test_a_curve_may_start_at_zero_words_or_have_equal_counts(first):
    # 0 has no logarithm, and two checkpoints of 1M have the same position
    document = make_document((f"run/{first}", "run/chck_1M", "other"))
    assert len(pictures(document)["Learning curves of run"]) == 2
