"""docs/quickstart.ipynb: its cells run in order, and what they show is true."""

import json
import math
import sys
from types import SimpleNamespace

import matplotlib
import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
SMALLER = {
    "num_tokens=100_000": "num_tokens=8_000",
    "vocab_size=700": "vocab_size=400",
    "hidden_size: 128": "hidden_size: 32",
    "n_layer: 3": "n_layer: 2",
}


def code_cells() -> list[dict]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.fixture
def docs(tmp_path, monkeypatch):
    """Return an empty docs/, where the notebook runs beside no project but finds ours."""
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path / "docs")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("BABYLLAMA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "docs"


def test_the_notebook_is_stored_without_outputs():
    for cell in code_cells():
        assert cell["outputs"] == [] and cell["execution_count"] is None


def test_a_smaller_notebook_runs_without_jupyter(docs, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pictures = []

    def show():
        axis = pyplot.gca()
        pictures.append([*(list(line.get_ydata()) for line in axis.lines), *axis.patches])
        pyplot.close()

    monkeypatch.setattr(pyplot, "show", show)
    code = ["".join(cell["source"]) for cell in code_cells()]
    for old, new in SMALLER.items():
        assert sum(old in source for source in code) == 1, old
        code = [source.replace(old, new) for source in code]
    names = {"__name__": "__main__"}
    for source in code:
        exec(source, names)

    cells = SimpleNamespace(**names)
    metrics = json.loads((docs.parent / "models/notebook/training_metrics.json").read_text())
    results = metrics["results"]
    assert cells.untrained_loss == pytest.approx(math.log(400), abs=0.1)
    assert cells.floor == results["floor_bits_per_byte"]
    assert cells.best_loss / results["eval_loss"] == pytest.approx(
        cells.floor / results["eval_bits_per_byte"]
    )
    assert cells.scores["bits_per_byte"] < cells.shuffled_scores["bits_per_byte"]
    assert cells.result["n"] == 2000
    curves, surprisals, accuracies = pictures
    assert len(curves) == 3 and all(curves)  # training, held-out, best possible
    good, bad = surprisals
    assert len(good) == len(bad) == 7
    assert good[:6] == pytest.approx(bad[:6], abs=1e-3) and abs(good[6] - bad[6]) > 0.01
    assert len(accuracies) == 11  # chance, and a bar for each kind


@pytest.mark.slow
def test_the_notebook_runs_in_jupyter(docs):
    pytest.importorskip("ipykernel")
    nbclient = pytest.importorskip("nbclient")
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(docs)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    text = "".join(output.get("text", "") for output in outputs)
    shown = dict(line.split(maxsplit=1) for line in text.splitlines() if " (0." in line)
    assert float(shown["held-out"].split()[0]) < 0.85
    assert float(shown["this"].split()[1]) > 0.95
