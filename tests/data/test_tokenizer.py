"""Load tokenizers from good and broken files, and count the bytes of their tokens."""

from __future__ import annotations

import json

import pytest
from conftest import write_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from babyllama.data.tokenizer import byte_lengths, load_tokenizer


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
    del content["model"]["vocab"]["<pad>"]
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


def test_byte_lengths_refuses_a_tokenizer_that_is_not_byte_level():
    word_level = Tokenizer(models.WordLevel({"naïve cat": 0, "x": 1}, unk_token="x"))
    with pytest.raises(ValueError, match="byte-level"):
        byte_lengths(PreTrainedTokenizerFast(tokenizer_object=word_level))
