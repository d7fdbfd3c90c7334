"""generate.py: streamed texts equal those of evaluation.generation, in complete characters."""

from __future__ import annotations

import io
import shutil

import pytest
import torch

import generate
from babyllama.evaluation.generation import generate as generate_texts
from babyllama.evaluation.loading import encode, load_model


@pytest.fixture(scope="module")
def loaded(model_dirs):
    return load_model(model_dirs["Llama"], "cpu")


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_the_stream_is_the_text_of_generate(loaded, temperature):
    options = {"max_new_tokens": 40, "temperature": temperature, "top_p": 1.0, "seed": 7}
    texts = generate_texts(*loaded, ["The cat"], num_return_sequences=3, **options)[0]
    for number, text in enumerate(texts):
        assert "".join(generate.stream(*loaded, "The cat", stream_number=number, **options)) == text
    assert (len(set(texts)) == 1) == (temperature == 0)


@pytest.mark.parametrize("fixture", ["tokenizer", "spaced_tokenizer"])
def test_streamed_pieces_hold_complete_characters(tiny_model, fixture, request):
    tokenizer = request.getfixturevalue(fixture)
    text = "naïve 🙂 世界 done"
    text_ids = encode(tokenizer, [text])[0] + [tokenizer.eos_token_id]
    model = tiny_model("Llama").train()  # overfit this one text
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(torch.tensor([text_ids]), labels=torch.tensor([text_ids])).loss.backward()
        optimizer.step()
    pieces = list(
        generate.stream(
            model.eval(), tokenizer, "", max_new_tokens=50, temperature=0, top_p=1.0, seed=0
        )
    )
    assert "".join(pieces) == text
    assert generate_texts(model, tokenizer, [""], temperature=0)[0][0] == text
    assert len(text_ids) > len(text) + 5  # characters of several bytes are several tokens here
    assert not any("\ufffd" in piece for piece in pieces)
    assert max(map(len, pieces)) < 8  # it came as it was made


def test_an_incomplete_character_at_the_end_is_printed(loaded, tokenizer):
    prompt = "The cat"
    whole = generate_texts(
        *loaded, [prompt], max_new_tokens=1, num_return_sequences=40, top_p=1.0, temperature=5.0
    )[0]
    broken = [number for number, text in enumerate(whole) if "\ufffd" in text]
    assert broken  # a single byte of a longer character
    options = {"max_new_tokens": 1, "temperature": 5.0, "top_p": 1.0, "seed": 0}
    for number in broken[:3]:
        assert (
            "".join(generate.stream(*loaded, prompt, stream_number=number, **options)) == "\ufffd"
        )


def test_the_same_seed_prints_the_same_texts(model_dirs, capsys):
    arguments = [
        str(model_dirs["GPT2"]),
        "--prompt",
        "The cat",
        "--num-samples",
        "2",
        "--max-new-tokens",
        "5",
    ]
    assert generate.main([*arguments, "--seed", "1", "--device", "cpu"]) == 0
    first = capsys.readouterr()
    assert first.out.count("The cat") == 2 and first.err == ""
    assert generate.main([*arguments, "--seed", "1", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == first.out
    assert generate.main([*arguments, "--seed", "2", "--device", "cpu"]) == 0
    assert capsys.readouterr().out != first.out


def test_bytes_that_are_not_utf8_become_replacement_characters(model_dirs, capsys, monkeypatch):
    flags = [str(model_dirs["Llama"]), "--max-new-tokens", "3", "--device", "cpu"]
    prompt = b"caf\xe9 noir".decode("utf-8", "surrogateescape")  # as Python passes them on
    assert generate.main([*flags, "--prompt", prompt]) == 0
    assert capsys.readouterr().out.startswith("caf\ufffd noir")
    typed = io.TextIOWrapper(io.BytesIO(b"\xff cat\n"), "utf-8", "surrogateescape")
    monkeypatch.setattr("sys.stdin", typed)
    assert generate.main(flags) == 0
    assert capsys.readouterr().out.startswith("\ufffd cat")


def test_a_tokenizer_without_bos_and_eos_continues_a_prompt(bare_model_dir, capsys):
    arguments = [str(bare_model_dir), "--prompt", "cat", "--max-new-tokens", "3"]
    assert generate.main([*arguments, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("cat")


def test_without_a_prompt_it_asks_until_an_empty_line(model_dirs, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("The cat\nA dog\n\nnever read\n"))
    assert (
        generate.main([str(model_dirs["Llama"]), "--max-new-tokens", "3", "--device", "cpu"]) == 0
    )
    out = capsys.readouterr()
    assert "The cat" in out.out and "A dog" in out.out and "never read" not in out.out
    assert "prompt>" not in out.err  # nobody is asked
    terminal = io.StringIO("The cat\nA dog\n\n")
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    assert (
        generate.main([str(model_dirs["Llama"]), "--max-new-tokens", "3", "--device", "cpu"]) == 0
    )
    assert capsys.readouterr().err.count("prompt> ") == 3
    monkeypatch.setattr("sys.stdin", io.StringIO("The cat"))  # ends without an empty line
    assert (
        generate.main([str(model_dirs["Llama"]), "--max-new-tokens", "3", "--device", "cpu"]) == 0
    )


def test_an_empty_prompt_starts_from_bos(model_dirs, capsys):
    assert (
        generate.main(
            [str(model_dirs["Llama"]), "--prompt", "", "--max-new-tokens", "8", "--device", "cpu"]
        )
        == 0
    )
    assert len(capsys.readouterr().out) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nowhere", "--prompt", "a"],
            "error: no model at nowhere: expected a directory with config.json",
        ),
        (
            ["MODEL", "--prompt", "a", "--num-samples", "0"],
            "error: --num-samples 0 must be 1 or more",
        ),
        (["MODEL", "--prompt", "a", "--seed", "-1"], "error: --seed -1 must be 0 or more"),
        (["BARE"], "error: BARE has no tokenizer.json; copy it next to the weights"),
        (
            ["MODEL", "--prompt", "a", "--temperature", "-1"],
            "error: temperature -1.0 must be a finite number, 0",
        ),
        (["MODEL", "--prompt", "a", "--top-p", "2"], "error: top_p 2.0 must be above 0"),
        (
            ["MODEL", "--prompt", "a", "--max-new-tokens", "0"],
            "error: max_new_tokens 0 must be 1 or more",
        ),
        (["MODEL", "--prompt", "a", "--device", "tpu"], 'error: device "tpu" is unknown'),
    ],
)
def test_a_mistake_gets_one_error_line(model_dirs, tmp_path, capsys, arguments, message):
    names = {"MODEL": str(model_dirs["Llama"]), "BARE": str(tmp_path)}
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model_dirs["Llama"] / name, tmp_path)
    assert generate.main([names.get(word, word) for word in arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(message.replace("BARE", str(tmp_path))) and err.count("\n") == 1
    assert out == ""  # no prompt without a text
