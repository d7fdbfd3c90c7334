"""The shape of the project: imports point down, nothing heavy at import, the four imports of a notebook, `evaluate`."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

FLOORS = [
    {"machine", "decoding", "lock", "threads"},
    {
        "cleaners", "documents", "schema", "ranks", "words", "inference", "metrics", "plots", "runs",
        "create_synthetic_data", "loss", "optimizers", "overlap", "graphs",
    },
    {"data_utils", "settings", "trainer", "ledger", "choices", "run_log", "plan", "generate", "tasks",
     "interrupt"},
    {
        "train_tokenizer", "evaluate", "likelihood", "benchmark_config", "sweep", "benchmark_report", "distillation",
        "teachers", "results",
    },
    {"prepare_data", "train", "benchmark"},
]  # fmt: skip
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names}
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))
SCRIPTS = [name for name in MODULES if "def make_parser" in (ROOT / f"{name}.py").read_text(encoding="utf-8")]


def run_python(code: str, *flags: str, cwd=ROOT, **env) -> subprocess.CompletedProcess:
    import os

    return subprocess.run([sys.executable, *flags, "-c", code], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, **env})  # fmt: skip


def imported(path) -> set[str]:
    """Top-level names of every import in a file, those inside functions included; TYPE_CHECKING ones too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    assert module in FLOOR, f"{module}.py stands on no floor: say in this test and in the README which"
    own = imported(ROOT / f"{module}.py") & set(FLOOR)
    upwards = {name for name in own if FLOOR[name] >= FLOOR[module]}
    assert not upwards, f"{module}.py imports {upwards} of its own floor or above"


@pytest.mark.parametrize("module", MODULES)
def test_modules_keep_to_their_size(module):
    text = (ROOT / f"{module}.py").read_text(encoding="utf-8")
    limit = 450 if module == "create_synthetic_data" else 400  # a quarter of that one is the lexicon and the grammar
    assert text.count("\n") <= limit, f"{module}.py has passed {limit} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, f"{module}.{node.name} is {node.end_lineno - node.lineno} lines"


def test_only_plots_imports_matplotlib():
    assert [name for name in MODULES if "matplotlib" in imported(ROOT / f"{name}.py")] == ["plots"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_before_torch_is_imported(script):
    code = (
        f"import sys, {script}\n"
        f"try: {script}.main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), 'heavy'"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


@pytest.mark.parametrize(
    ("line", "module"),
    [
        ("from data_utils import DataProcessor, DomainCleaners, create_cleaner_registry", "data_utils"),
        ("from train import create_model, load_config, prepare_datasets_modern", "train"),
        ("from evaluate import ModelEvaluator", "evaluate"),
        ("from benchmark import BenchmarkSuite", "benchmark"),
    ],
)
def test_notebook_imports(line, module):
    done = run_python(line)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_nothing_of_ours_imports_the_other_evaluate():
    done = run_python(
        "import sys, transformers, datasets, accelerate, train, trainer, data_utils, inference\n"
        "from transformers import Trainer\n"
        "assert 'evaluate' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr


def test_ours_wins_from_the_root(tmp_path):
    other = tmp_path / "evaluate"
    other.mkdir()
    (other / "__init__.py").write_text("def load(name): return name\n")
    done = run_python("import evaluate; print(evaluate.__file__)", PYTHONPATH=str(tmp_path))
    assert done.stdout.strip() == str(ROOT / "evaluate.py"), done.stderr


@pytest.mark.parametrize("script", ["train", "evaluate", "benchmark", "generate"])
@pytest.mark.parametrize(
    ("own", "found"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)]
)
def test_how_threads_wait_is_settled_before_torch_is_imported(
    script, own, found, config_file, corpus_dir, tmp_path, monkeypatch
):
    """OpenMP reads the variable once, when it is loaded with torch; what the user set stays."""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)  # which another test's main may have set
    (tmp_path / "config.json").write_text("{}")  # no model, which is found out after the import
    arguments = {
        "train": ["--config", str(config_file()), "--dry-run"],
        "evaluate": [str(tmp_path), "--eval-data", str(corpus_dir / "dev")],
    }.get(script, [str(tmp_path)])
    code = (
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': print('torch:', os.environ.get('GOMP_SPINCOUNT'))\n"
        "sys.meta_path.insert(0, Watch())\n"
        f"import {script}\n"
        f"{script}.main({arguments!r})"
    )
    done = run_python(code, **own)
    assert {line for line in done.stdout.splitlines() if line.startswith("torch:")} == {f"torch: {found}"}
