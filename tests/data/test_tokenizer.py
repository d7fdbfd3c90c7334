"""Load tokenizers from good and broken files, and count the bytes of their tokens."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch
from conftest import build_tiny_model, write_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from babyllama.data.tokenizer import byte_lengths, load_tokenizer

OLD_PYTHON = os.environ.get("BABYLLAMA_OLD_TRANSFORMERS")


def test_load_tokenizer_sets_the_special_tokens_of_the_file(tokenizer_file, tmp_path):
    for path in (tokenizer_file, tokenizer_file.parent):
        tokenizer = load_tokenizer(path)
        assert tokenizer.pad_token_id == 0
        assert tokenizer.bos_token_id == 1
        assert tokenizer.eos_token_id == 2
        assert tokenizer.padding_side == "right"

    # without a <pad> in the file there is no padding token
    content = json.loads(tokenizer_file.read_text())
    content["post_processor"] = None
    special_tokens = content["added_tokens"]
    content["added_tokens"] = [token for token in special_tokens if token["content"] != "<pad>"]
    vocabulary = content["model"]["vocab"]
    vocabulary["<unused>"] = vocabulary.pop("<pad>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token is None
    assert tokenizer.bos_token == "<s>"


def test_a_missing_tokenizer_is_an_error_with_the_command_that_trains_it(tmp_path):
    message = r"none\.json.*python train_tokenizer\.py --data-dir .*--output"
    with pytest.raises(FileNotFoundError, match=message):
        load_tokenizer(tmp_path / "none.json")


def test_a_broken_tokenizer_is_an_error_with_its_path(tokenizer_file, tmp_path):
    content = json.loads(tokenizer_file.read_text())
    # the Rust code panics at such a merge, or refuses it
    content["model"]["merges"] = [["a", "zzz"], *content["model"]["merges"]]
    for text in ("{", "[]", '{"model": 3}', json.dumps(content)):
        path = write_file(tmp_path, "broken.json", text)
        with pytest.raises(ValueError, match=r"broken\.json"):
            load_tokenizer(path)


@given(text=st.text())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_byte_lengths_sum_to_the_bytes_of_a_text(tokenizer, text):
    lengths = byte_lengths(tokenizer)
    assert lengths.shape == (len(tokenizer),)
    assert lengths.dtype == "int64"
    assert not lengths[:3].any()  # the special tokens
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    if not any(token in text for token in ("<s>", "</s>", "<pad>")):
        assert lengths[ids].sum() == len(text.encode())


@given(text=st.text())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_byte_lengths_count_no_space_that_the_tokenizer_adds(spaced_tokenizer, text):
    lengths = byte_lengths(spaced_tokenizer)
    ids = spaced_tokenizer.backend_tokenizer.encode(text).ids
    if text and not any(token in text for token in ("<s>", "</s>", "<pad>")):
        assert lengths[ids].sum() == len(text.removeprefix(" ").encode())


def test_byte_lengths_refuses_a_tokenizer_that_is_not_byte_level():
    word_level = Tokenizer(models.WordLevel({"naïve cat": 0, "x": 1}, unk_token="x"))
    with pytest.raises(ValueError, match="byte-level"):
        byte_lengths(PreTrainedTokenizerFast(tokenizer_object=word_level))


def test_every_directory_of_a_run_names_a_class_that_transformers_4_knows(finished):
    _, run_dir = finished
    configs = list(run_dir.rglob("tokenizer_config.json"))
    assert len(configs) == 3, "the model and two checkpoints"
    for path in configs:
        assert json.loads(path.read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.skipif(not OLD_PYTHON, reason="BABYLLAMA_OLD_TRANSFORMERS is not set")
@pytest.mark.parametrize(
    ("kind", "fixture"),
    [
        ("Llama", "tokenizer"),
        ("GPT2", "tokenizer"),
        ("GPTJ", "tokenizer"),
        ("Qwen3", "tokenizer"),
        ("Llama", "spaced_tokenizer"),
    ],
)
def test_models_compute_the_same_in_the_release_of_babylm_s_pipeline(
    kind, fixture, request, tmp_path
):
    """BABYLLAMA_OLD_TRANSFORMERS names a Python that has transformers 4.51.3."""
    text = "The cat, naïve as ever,\n sat  on it. <s> 42"
    tokenizer = request.getfixturevalue(fixture)
    model = build_tiny_model(kind)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    code = (
        "import json, sys\n"
        "from transformers import AutoModelForCausalLM, AutoProcessor\n"
        "tokenizer = AutoProcessor.from_pretrained(sys.argv[1])\n"
        "ids = tokenizer(sys.argv[2], return_tensors='pt')['input_ids']\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(json.dumps([ids[0].tolist(), model(ids).logits[0, -1].tolist()]))"
    )
    done = subprocess.run(
        [OLD_PYTHON, "-c", code, str(tmp_path), text], capture_output=True, text=True, check=True
    )
    ids, logits = json.loads(done.stdout.splitlines()[-1])
    assert ids == tokenizer(text)["input_ids"]
    expected = model(torch.tensor([ids])).logits[0, -1]
    assert torch.allclose(torch.tensor(logits), expected, atol=1e-5)
