"""What every script does with errors, Ctrl-C and a lack of memory."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import train
from babyllama import cli
from babyllama.cli import Parser, check_at_least, duration, run_script, significant, time_left


def raising(error):
    """Return a body that raises an error."""

    def body() -> int:
        raise error

    return body


def test_the_exit_code_is_that_of_the_body():
    assert run_script(lambda: 0) == 0
    assert run_script(lambda: 1) == 1


@pytest.mark.parametrize(
    ("error", "code", "output"),
    [
        (ValueError("one\ntwo"), 2, "error: one\nerror: two\n"),
        (FileNotFoundError("no such file"), 2, "error: no such file\n"),
        (OSError(), 2, "error: OSError\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (KeyboardInterrupt("stopped at step 3"), 130, "stopped at step 3\n"),
        (MemoryError(), 2, "error: out of memory: buy more\n"),
        (torch.OutOfMemoryError("CUDA out of memory."), 2, "error: CUDA out of memory: buy more\n"),
        (RuntimeError("can't allocate memory"), 2, "error: out of memory: buy more\n"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(error, code, output, capsys):
    advice = "buy more"
    for memory_advice in (advice, lambda: advice):
        result = run_script(raising(error), interrupted="stopped", memory_advice=memory_advice)
        assert result == code
        assert capsys.readouterr().err == output


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("streams", "expected"), [((1,), b"error: [Errno 28] No space left on device\n"), ((1, 2), b"")]
)
@pytest.mark.parametrize("body", ["print('result') or 0", "open('nowhere')"])
def test_output_on_a_full_disk_exits_with_2(streams, expected, body):
    code = f"import sys; from babyllama.cli import run_script; sys.exit(run_script(lambda: {body}))"
    with open("/dev/full", "wb") as full:
        outputs = {"stdout": full, "stderr": full if 2 in streams else subprocess.PIPE}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, **outputs)
    assert done.returncode == 2
    if body.startswith("print"):
        assert (done.stderr or b"") == expected


def test_a_reader_that_has_enough_ends_the_script_without_a_word():
    code = (
        "import sys; from babyllama.cli import run_script\n"
        "sys.exit(run_script(lambda: [print('x' * 999) for _ in range(999)] and 0))"
    )
    command = f'{sys.executable} -c "$CODE" | head -c 5; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env={**os.environ, "CODE": code}, capture_output=True
    )
    assert (done.stdout, done.stderr) == (b"xxxxx141\n", b"")


def test_a_developer_can_see_where_a_mistake_was_raised(monkeypatch, capsys):
    def body():
        raise ValueError("wrong")

    monkeypatch.setenv(cli.TRACEBACK, "1")
    assert cli.run_script(body) == 2
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("Traceback")
    assert last == "error: wrong"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a bug"):
        run_script(raising(RuntimeError("a bug")))


def test_flags_have_two_spellings_and_a_minimum():
    parser = Parser()
    parser.add_argument("--batch-size", type=float)
    for flag in ("--batch-size", "--batch_size"):
        check_at_least(parser.parse_args([flag, "2"]), {"batch_size": 2})
        for value, requirement in [
            ("1.5", "2 or more"),
            ("nan", "a finite number, 2 or more"),
            ("inf", "a finite number, 2 or more"),
        ]:
            with pytest.raises(ValueError, match=f"--batch-size {value} must be {requirement}"):
                check_at_least(parser.parse_args([flag, value]), {"batch_size": 2})


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.stem)
def test_scripts_accept_flags_with_underscores(path):
    module = importlib.import_module(path.stem)
    if hasattr(module, "make_parser"):  # data_utils.py is not a script
        assert isinstance(module.make_parser(), Parser)


def test_only_flags_are_respelled():
    parser = Parser()
    parser.add_argument("--prompt")
    parser.add_argument("models", nargs="*")
    args = parser.parse_args(["--prompt", "-- snake_case name", "--", "--my_dir", "a_b"])
    assert args.prompt == "-- snake_case name"
    assert args.models == ["--my_dir", "a_b"]
    assert parser.parse_args(["--prompt=a_b"]).prompt == "a_b"


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--learning-rate", "1"], "unrecognized arguments: --learning-rate 1; did you mean --lr?"),
        (["--epochs=3"], "unrecognized arguments: --epochs=3; did you mean --num-epochs?"),
        (
            ["--max_steps", "5"],
            "unrecognized arguments: --max-steps 5; did you mean --set training.max_steps=VALUE?",
        ),
        (
            ["--set", "training.lr", "1"],
            "unrecognized arguments: 1; --set takes SECTION.KEY=VALUE, in quotes if VALUE has spaces",
        ),
        (
            ["--batch-size", "x"],
            "argument --batch-size: invalid int value: 'x'; train.py --help lists the flags",
        ),
    ],
)
def test_a_wrong_flag_is_one_line_with_the_flag_that_was_meant(flags, problem, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.make_parser().parse_args(["--config", "c.yaml", *flags])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {problem}\n"


def test_durations_have_a_suitable_unit():
    assert [duration(s) for s in (42, 420, 12600)] == ["42 s", "7 min", "3.5 h"]
    assert [time_left(60, done) for done in (0, 0.125, 1)] == ["", ", about 7 min left", ""]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.82668, "0.8267"), (9.99996, "10.00"), (16749.6239, "16,750"), (1027.8243, "1,028"),
        (103818600764750.0, "1.038e+14"), (0.00052, "0.0005"), (-2.21951, "-2.220"),
        (0.0, "0.0000"), (float("inf"), "inf"),
    ],
)  # fmt: skip
def test_figures_have_four_significant_digits(value, text):
    assert significant(value) == text
