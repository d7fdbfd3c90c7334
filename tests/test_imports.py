"""Check the shape of the project: imports point down, and scripts start fast."""

import ast
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = [
    "benchmark", "create_synthetic_data", "data_utils", "evaluate", "generate", "prepare_data", "submit",
    "train", "train_tokenizer",
]  # fmt: skip
COMMANDS = [name for name in SCRIPTS if name != "data_utils"]
# From the bottom up: a layer may import itself and the layers below it.
LAYERS = [
    "foundation", "config", "runs", "evaluation", "training", "planning", "distillation", "submission",
    "script",
]  # fmt: skip
FOUNDATION = {
    "architectures", "schema", "files", "model_dir", "device", "distributed", "plots", "problems",
    "data", "cli",
}  # fmt: skip
SOURCES = [*sorted((ROOT / "babyllama").rglob("*.py")), *sorted(ROOT.glob("*.py"))]


def layer_of(module: str) -> str:
    """Return the layer of `babyllama.x.y` or of a script."""
    if module == "babyllama":
        return "foundation"
    if not module.startswith("babyllama."):
        return "script"
    part = module.split(".")[1]
    return "foundation" if part in FOUNDATION else part


def module_name(path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def run_python(code: str, *flags: str, cwd=ROOT, **env) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *flags, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, **env},
    )


def imported(path) -> set[str]:
    """Return every module that a file imports, inside functions and under TYPE_CHECKING too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def test_the_root_holds_the_scripts_and_nothing_else():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == SCRIPTS


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_down(path):
    layer = layer_of(module_name(path))
    ours = {name for name in imported(path) if name.split(".")[0] in {"babyllama", *SCRIPTS}}
    upwards = {name for name in ours if LAYERS.index(layer_of(name)) > LAYERS.index(layer)}
    assert not upwards, f"{module_name(path)} ({layer}) imports {upwards}"


def test_runs_does_not_import_torch():
    for path in (ROOT / "babyllama" / "runs").glob("*.py"):
        assert not {name for name in imported(path) if name.split(".")[0] == "torch"}, path


def test_only_plots_imports_matplotlib():
    users = {
        module_name(path)
        for path in SOURCES
        if any(name.split(".")[0] == "matplotlib" for name in imported(path))
    }
    assert users == {"babyllama.plots"}


WRONG = {  # a mistake that each script finds before it imports torch
    "benchmark": ["models/a", "--config", "nowhere.yaml"],
    "create_synthetic_data": ["--num-tokens", "-5"],
    "evaluate": ["nowhere"],
    "generate": ["models/a", "--temperature", "warm"],
    "prepare_data": ["--babylm-10m", "nowhere"],
    "submit": ["nowhere"],
    "train": ["--config", "nowhere.yaml"],
    "train_tokenizer": ["--data-dir", "nowhere"],
}


@pytest.mark.parametrize("script", COMMANDS)
def test_help_and_mistakes_need_no_heavy_import(script):
    code = (
        f"import sys, {script}\n"
        f"try: {script}.main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        f"try: code = {script}.main({WRONG[script]})\n"
        "except SystemExit as end: code = end.code\n"
        "assert code == 2, code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_python_without_our_packages_gets_one_line(script):
    """-S hides the installed packages, as a shell does in which .venv is not active."""
    done = subprocess.run(
        [sys.executable, "-S", f"{script}.py", "config"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {sys.executable} has no package ")


def test_the_line_about_a_missing_package_says_how_to_install_it(tmp_path):
    project = tmp_path / "project"
    (project / "babyllama").mkdir(parents=True)
    shutil.copy(ROOT / "babyllama" / "__init__.py", project / "babyllama")
    (project / "script.py").write_text("import babyllama, not_installed")
    command = [sys.executable, "project/script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {sys.executable} has no package not_installed; activate the project's environment,"
        f" or install the packages: {sys.executable} -m pip install -r project/requirements.txt\n"
    )
    # an import of ours that fails is a bug, so it keeps its traceback
    (project / "script.py").write_text("import babyllama.nowhere")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_missing_package_does_not_end_pythons_prompt():
    pty = pytest.importorskip("pty")  # not on Windows
    controller, terminal = pty.openpty()
    os.write(controller, b"import babyllama\nimport not_installed\nprint(6 * 7)\n\x04")
    done = subprocess.run(
        [sys.executable, "-q"],
        cwd=ROOT,
        env={**os.environ, "PYTHON_BASIC_REPL": "1"},
        stdin=terminal,
        capture_output=True,
        text=True,
        timeout=60,
    )
    os.close(controller)
    os.close(terminal)
    assert "ModuleNotFoundError" in done.stderr
    assert "42" in done.stdout


@pytest.mark.parametrize(
    ("line", "module"),
    [
        (
            "from data_utils import DataProcessor, DomainCleaners, create_cleaner_registry",
            "data_utils",
        ),
        ("from train import create_model, load_config, prepare_datasets_modern", "train"),
        ("from evaluate import ModelEvaluator", "evaluate"),
        ("from benchmark import BenchmarkSuite", "benchmark"),
    ],
)
def test_notebook_imports(line, module):
    done = run_python(line)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_importing_the_package_does_not_import_the_evaluate_library():
    done = run_python(
        "import sys, transformers, datasets, accelerate, train, data_utils\n"
        "import babyllama.training.trainer, babyllama.evaluation.generation\n"
        "from transformers import Trainer\n"
        "assert 'evaluate' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr


def test_our_evaluate_is_imported_from_the_root(tmp_path):
    other = tmp_path / "evaluate"
    other.mkdir()
    (other / "__init__.py").write_text("def load(name): return name\n")
    done = run_python("import evaluate; print(evaluate.__file__)", PYTHONPATH=str(tmp_path))
    assert done.stdout.strip() == str(ROOT / "evaluate.py"), done.stderr


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_gomp_spincount_is_set_before_torch_is_imported(
    variables, expected, config_file, monkeypatch
):
    """OpenMP reads the variable once, when torch loads it; a user's value is kept."""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    arguments = ["--config", str(config_file()), "--dry-run"]
    code = (
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            print('torch:', os.environ.get('GOMP_SPINCOUNT'), flush=True)\n"
        "            os._exit(0)\n"
        "sys.meta_path.insert(0, Watch())\n"
        "import train\n"
        f"train.main({arguments!r})"
    )
    done = run_python(code, **variables)
    assert {line for line in done.stdout.splitlines() if line.startswith("torch:")} == {
        f"torch: {expected}"
    }
