"""The documents are under test: what they name exists, their commands parse, their examples run."""

import argparse
import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from babyllama.config import unusual_values
from babyllama.schema import SECTIONS
from train import create_model, load_config

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), NOTEBOOK])
TEXTS = {path: path.read_text(encoding="utf-8") for path in DOCS}
TEXTS[NOTEBOOK] = "\n\n".join(
    "".join(cell["source"])
    for cell in json.loads(TEXTS[NOTEBOOK])["cells"]
    if cell["cell_type"] == "markdown"
)
ALL = "\n".join(TEXTS.values())
README = TEXTS[ROOT / "README.md"]
SCRIPTS = sorted(
    p.stem for p in ROOT.glob("*.py") if "def make_parser" in p.read_text(encoding="utf-8")
)
EXPERIMENTS = sorted(
    p.stem
    for p in (ROOT / "experiments").glob("*.py")
    if "def make_parser" in p.read_text(encoding="utf-8")
)
OTHER_COMMANDS = {"python3", "source", "pip", ".venv/bin/python"}
LM_EVAL_FLAGS = {"--model", "--model_args", "--include_path", "--tasks"}
OTHER_FLAGS = {"--help", "--check", "--index-url", "--logdir", *LM_EVAL_FLAGS}
ids = [str(path.relative_to(ROOT)) for path in DOCS]


@pytest.fixture(scope="module", autouse=True)
def experiments_on_path():
    sys.path.append(str(ROOT / "experiments"))
    yield
    sys.path.remove(str(ROOT / "experiments"))


def parser_of(script: str) -> argparse.ArgumentParser:
    return importlib.import_module(script).make_parser()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands(text: str) -> list[str]:
    """Return the shell commands of a document: lines of bash blocks, `python ...` in sentences."""
    lines = "".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    inline = [
        " ".join(command.split())
        for command in re.findall(r"`(python [a-z_/]+\.py[^`]*|make [a-z]+)`", text)
    ]
    return [line for line in [*lines, *inline] if line.strip()]


def launchers() -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of the programs that start ours."""
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    return {"torchrun": get_args_parser(), "accelerate": launch_command_parser()}


def parse_ours(path: str, arguments: list[str]) -> None:
    """Parse a command line of a script or an experiment; exits, so fails, on an unknown flag."""
    assert (ROOT / path).is_file(), path
    name = Path(path).stem
    if name in (*SCRIPTS, *EXPERIMENTS) and "..." not in arguments:
        parser_of(name).parse_args(arguments)


@pytest.mark.parametrize("path", DOCS, ids=ids)
def test_commands_parse(path):
    for command in commands(TEXTS[path]):
        program, *words = shlex.split(re.sub(r"^OMP_NUM_THREADS=\d+ ", "", command), comments=True)
        if program == "make":
            assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.M), command
        elif program == "python":
            parse_ours(words[0], words[1:])
        elif program in ("torchrun", "accelerate"):
            args = launchers()[program].parse_args(words[program == "accelerate" :])
            parse_ours(args.training_script, args.training_script_args)
        elif program == "sbatch":
            assert (ROOT / words[0]).is_file(), command
            parse_ours("train.py", words[1:])
        else:
            assert program in OTHER_COMMANDS, f"{path.name}: unknown program in {command!r}"


@pytest.mark.parametrize("script", [*SCRIPTS, *EXPERIMENTS])
def test_commands_in_the_docstring_of_a_script_parse(script):
    """Parse the indented `python ...` lines, one command each: a reflowed block would not parse."""
    folder = ROOT if script in SCRIPTS else ROOT / "experiments"
    docstring = ast.get_docstring(ast.parse((folder / f"{script}.py").read_text(encoding="utf-8")))
    lines = re.findall(r"^    (?:\w+=\S+ )?(python .*)$", docstring.replace("\\\n", " "), re.M)
    if script in SCRIPTS:
        assert lines, "the docstring shows no command"
    for line in lines:
        assert len(re.findall(r"(?<![\w/-])python ", line)) == 1, line
        _, path, *arguments = shlex.split(line, comments=True)
        parse_ours(path, arguments)


def test_readme_fits_on_a_page():
    lines = README.splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 100


def test_readme_installs_the_pinned_torch():
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    (command,) = re.findall(r"pip install (torch\S+)", README)
    assert command in requirements


def test_guide_installs_the_packages_and_the_notebook():
    guide = TEXTS[ROOT / "TRAINING_GUIDE.md"].replace("\n", " ")
    assert "`pip install -r requirements.txt`" in guide
    assert "`jupyter notebook docs/quickstart.ipynb`" in guide


def test_readme_lists_every_script():
    rows = re.findall(r"^\| `([a-z_]+\.py)` \| \w+", README, re.M)
    assert sorted(rows) == sorted(path.name for path in ROOT.glob("*.py"))


def test_readme_lists_the_folders_of_the_package():
    rows = set(re.findall(r"^\| `(babyllama/[a-z/]*)` \|", README, re.M))
    folders = {path.parent for path in (ROOT / "babyllama").rglob("*.py")}
    assert rows == {f"{folder.relative_to(ROOT)}/" for folder in folders}


def test_the_list_of_documents_is_complete():
    listed = re.findall(r"\| \[[^]]+\]\(([^)]+)\) \|", TEXTS[ROOT / "docs" / "README.md"])
    listed = {(ROOT / "docs" / name).resolve() for name in listed}
    assert listed == set(DOCS) - {ROOT / "docs" / "README.md"}


@pytest.mark.parametrize("path", DOCS, ids=ids)
def test_pictures_exist_and_are_small(path):
    for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", TEXTS[path]):
        picture = path.parent / name
        assert picture.read_bytes().startswith(b"\x89PNG"), name
        assert picture.stat().st_size < 60_000, name


def test_architecture_names_every_module_of_the_package():
    tables = TEXTS[ROOT / "docs" / "architecture.md"].split("## Modules", 1)[1]
    rows = re.findall(r"^\| `(babyllama/[\w/]+\.py)` \|", tables, re.M)
    modules = [path.relative_to(ROOT).as_posix() for path in (ROOT / "babyllama").rglob("*.py")]
    assert sorted(rows) == sorted(name for name in modules if not name.endswith("__init__.py"))


def test_the_places_to_add_something_exist():
    """Check each `name` (`file.py`) of the section: the file contains the name."""
    section = TEXTS[ROOT / "docs" / "architecture.md"].split("## Adding something", 1)[1]
    places = re.findall(r"`(\w+)`\s\(`([\w/]+\.py)`\)", section)
    assert len(places) > 5
    for name, file in places:
        assert re.search(rf"\b{name}\b", (ROOT / file).read_text(encoding="utf-8")), (name, file)


def test_messages_of_the_troubleshooting_table_are_in_the_code():
    """Compare word for word; numbers and `...` stand for what the code fills in."""
    sources = [*ROOT.glob("*.py"), *ROOT.glob("babyllama/**/*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    code = re.sub(r'"\n\s*f?"', "", code)  # strings that continue on the next line
    guide = TEXTS[ROOT / "TRAINING_GUIDE.md"]
    table = guide.split("## Troubleshooting", 1)[1].split("\n## ", 1)[0]
    first_cells = "".join(re.findall(r"^\| (`.+?) \|", table, re.M))
    messages = re.findall(r"`([^`]+)`", first_cells)
    assert len(messages) > 5
    for message in messages:
        for part in re.split(r"\.\.\.|[\d,]*\d|[()]", message):
            assert part.strip() in code, message


@pytest.mark.parametrize("path", DOCS, ids=ids)
def test_configurations_in_the_documents_are_valid(path):
    """Lay each YAML block of `section: {key: value}` over config/llama-10M.yaml."""
    for block in blocks(TEXTS[path], "yaml"):
        sections = yaml.safe_load(block)
        if not sections.keys() <= SECTIONS.keys():
            continue
        assignments = []
        for name, section in sections.items():
            assignments += [f"{name}.{key}={json.dumps(value)}" for key, value in section.items()]
        load_config(ROOT / "config" / "llama-10M.yaml", argparse.Namespace(set=assignments))


def test_the_sweep_of_the_guide(tmp_path):
    from babyllama.runs.sweep import combinations, read_grid

    (text,) = (
        b for b in blocks(TEXTS[ROOT / "TRAINING_GUIDE.md"], "yaml") if b.startswith("training.lr:")
    )
    (tmp_path / "sweep.yaml").write_text(text)
    points = combinations(read_grid(str(tmp_path / "sweep.yaml")))
    assert len(points) == 6
    for point in points:
        args = argparse.Namespace(set=[f"{key}={value}" for key, value in point.items()])
        load_config(ROOT / "config" / "llama-10M.yaml", args)


def test_the_batch_script_for_slurm():
    """Check the syntax, and the torchrun line with the variables that SLURM sets."""
    path = ROOT / "docs" / "train.sbatch"
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    line = path.read_text(encoding="utf-8").replace("\\\n", " ").split("torchrun ")[-1]
    for variable, value in {
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_JOB_ID": "7",
        "head": "node1",
    }.items():
        line = line.replace(f"${variable}", value)
    args = launchers()["torchrun"].parse_args(
        shlex.split(line.replace('"$@"', "--config config/llama-10M.yaml"))
    )
    assert (args.nnodes, args.nproc_per_node, args.rdzv_endpoint, args.rdzv_backend) == (
        "2",
        "4",
        "node1:29500",
        "c10d",
    )
    parse_ours(args.training_script, args.training_script_args)


def flags_of(script: str) -> set[str]:
    options = {option for action in parser_of(script)._actions for option in action.option_strings}
    return {option for option in options if option.startswith("--")} - {"--help"}


def test_every_flag_in_the_documents_exists():
    flags = OTHER_FLAGS.union(*(flags_of(name) for name in (*SCRIPTS, *EXPERIMENTS)))
    for parser in launchers().values():
        flags |= {option for action in parser._actions for option in action.option_strings}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*\w", ALL)) <= flags


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_in_the_reference(script):
    text = TEXTS[ROOT / "API_REFERENCE.md"]
    section = text.split(f"### {script}.py\n", 1)[1].split("\n### ")[0].split("\n## ")[0]
    missing = {
        flag for flag in flags_of(script) if not flag.startswith("--no-") and flag not in section
    }
    assert not missing


def test_keys_in_the_documents_exist():
    keys = {f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields}
    named = set(
        re.findall(
            r"(?<![\w./-])((?:data|model|training|logging|distillation|babylm)\.(?!(?:py|md)\b)[a-z_0-9]+)(?![\w./(])",
            ALL,
        )
    )
    assert named - keys <= {"model.safetensors"}
    assert keys <= named, "the key table is incomplete"


@pytest.mark.parametrize("path", DOCS, ids=ids)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[path]):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            assert anchor in {
                re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings
            }, target


def test_files_named_in_the_documents_exist():
    named = set(
        re.findall(
            r"`((?:babyllama|config|tests|docs|experiments)/[\w./-]+\.\w+|[a-z_]+\.py)`", ALL
        )
    )
    missing = {name for name in named if not (ROOT / name).exists()}
    assert not missing


# of a published shape
DISTILLED = [
    "model.intermediate_size: 1024 is 2.00 x hidden_size; 2.67 x is usual for Llama (1368)"
]


def test_the_models_of_the_readme_have_these_parameters():
    import torch

    class Tokenizer:
        bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

        def __init__(self, size):
            self.size = size

        def __len__(self):
            return self.size

    rows = [
        (name, kind, millions)
        for files, kind, millions in re.findall(
            r"^\| (`config/.*`) \| ([\w-]+) \| ([\d.]+)M \|", README, re.M
        )
        for name in re.findall(r"`config/([\w.-]+\.yaml)`", files)
    ]
    shipped = {
        p.name for p in (ROOT / "config").glob("*.yaml") if not p.stem.startswith("benchmark")
    }
    assert {name for name, _, _ in rows} == shipped
    for name, kind, millions in rows:
        config = load_config(ROOT / "config" / name)
        assert f"{config['model']['name']}.yaml" == name
        assert unusual_values(config) == (DISTILLED if name == "distill-58M.yaml" else []), name
        with torch.device("meta"):
            usual_size = 700 if name == "quickstart.yaml" else 16_000
            size = config["model"]["vocab_size"] or usual_size
            model = create_model(config, Tokenizer(size))
        assert f"{model.num_parameters() / 1e6:.1f}" == millions, name
        assert kind.replace("-", "") == config["model"]["type"], name


def test_python_examples_run(workshop):
    """Run the Python blocks of the API reference in one process, as a notebook at the root would."""
    code = "\n".join(blocks(TEXTS[ROOT / "API_REFERENCE.md"], "python"))
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "BABYLLAMA_CACHE": str(workshop / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=workshop,
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "26,450,304" in done.stdout
    )  # by hand: 2 x 16000 x 384 + 8 x (4 x 384^2 + 3 x 384 x 1024 + 2 x 384) + 384


def test_the_guide_splits_a_file(tmp_path):
    (code,) = blocks(TEXTS[ROOT / "TRAINING_GUIDE.md"], "python")
    text = "".join(f"Line {i} of a caf\u00e9.\n" for i in range(40))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    parts = [
        (tmp_path / "own" / name).read_text(encoding="utf-8")
        for name in ("train/book.train", "dev/book.dev")
    ]
    assert "".join(parts) == text and [part.count("\n") for part in parts] == [38, 2]


def test_names_of_the_reference_exist():
    """Check `module.name` and `module.Class.name` of our modules in all documents."""
    modules = {
        path.stem: ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in [*ROOT.glob("*.py"), *ROOT.glob("babyllama/**/*.py")]
    }
    ours = modules.keys()
    no_names = {"py", "yaml", "json", "jsonl", "txt", "png"}
    no_names |= {key for name in ours & SECTIONS.keys() for key in SECTIONS[name].model_fields}
    named = [name.split(".") for name in re.findall(r"`([a-z_]+(?:\.[A-Za-z_]+)+)(?=[(`])", ALL)]
    named = [parts for parts in named if parts[0] in ours and parts[1] not in no_names]
    assert named
    for module, *names in named:
        place = importlib.import_module(modules[module])
        for name in names:
            assert hasattr(place, name), f"{module}.{name}"
            place = getattr(place, name)


def test_figures_name_the_commit_that_gave_them():
    text = TEXTS[ROOT / "docs" / "results.md"]
    sections = [
        part
        for part in re.split(r"^## ", text, flags=re.M)[1:]
        if re.search(r"tokens per second|MB/s", part)
    ]
    assert len(sections) >= 3
    assert all(re.search(r"`[0-9a-f]{7,40}`", part) for part in sections)


def test_no_tracked_file_names_a_path_of_one_machine():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in tracked:
        path = ROOT / name
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".txt", ""} and path.is_file():
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"(?<![\w:/.])/(?:home|root|mnt|Users|work)/\w", text), name


def section_of_reference(name: str) -> str:
    return TEXTS[ROOT / "API_REFERENCE.md"].split(f"\n### {name}\n", 1)[1].split("\n### ")[0]


def named_in(section: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", section))


def test_every_key_of_evaluate_is_in_the_reference(model_dirs):
    from evaluate import ModelEvaluator

    evaluator = ModelEvaluator(model_dirs["GPT2"], "cpu")
    perplexity = evaluator.calculate_perplexity(["The cat.", "A dog."])
    probabilities = evaluator.evaluate_token_probabilities(["The cat."])
    quality = evaluator.evaluate_generation_quality(["The"], max_length=5)
    bin_of_reliability = probabilities["reliability"][0]
    keys = {*perplexity, *probabilities, *quality, *bin_of_reliability}
    assert keys - named_in(section_of_reference("evaluate")) == set()


def test_every_key_of_benchmark_is_in_the_reference(model_dirs):
    from babyllama.evaluation.benchmark_config import load_tasks
    from benchmark import BenchmarkSuite

    items = [{"prompt": "The cat", "answer": "sees", "wrong": ["the"]}]
    groups = [{"prompts": ["The cat", "A cat"], "control": "The"}] * 2
    declared = {
        "completion": {"items": items},
        "consistency": {"groups": groups, "max_new_tokens": 4},
        "repetition": {"prompts": ["The", "A"], "max_new_tokens": 4},
        "speed": {"batch_sizes": [1], "max_new_tokens": 3, "repeats": 1},
    }
    suite = BenchmarkSuite(model_dirs["GPT2"], "cpu", load_tasks({"tasks": declared}))
    results = suite.run_all_benchmarks()
    keys = set(results) - set(declared)
    for name in declared:
        keys |= set(results[name])
    keys |= set(results["speed"]["batches"][0])
    keys |= set(results["completion"]["baselines"]["shorter"])
    assert keys - named_in(section_of_reference("benchmark")) == set()
