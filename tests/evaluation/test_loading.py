"""Loading: the saved weights and tokenizer come back, and a broken directory gets one line."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT
from tokenizers import processors

from babyllama.evaluation.loading import context_length, encode, load_model

KINDS = ["Llama", "GPT2", "GPTJ", "Qwen3"]
BOS = 1
EOS = 2


@pytest.mark.parametrize("kind", KINDS)
def test_load_model_returns_the_saved_weights(model_dirs, tiny_model, tokenizer, kind):
    model, loaded = load_model(model_dirs[kind], device="cpu")
    assert not model.training
    assert context_length(model) == 64
    assert loaded("The cat")["input_ids"] == tokenizer("The cat")["input_ids"]
    for name, weight in tiny_model(kind).state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
    assert load_model(model_dirs[kind], "cpu", dtype="bfloat16")[0].dtype == torch.bfloat16


def test_a_tokenizer_that_was_loaded_and_saved_names_a_class_that_transformers_4_knows(
    model_dirs, tmp_path
):
    _, tokenizer = load_model(model_dirs["Llama"], "cpu")
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again("The cat")["input_ids"] == tokenizer("The cat")["input_ids"]


def test_loading_prints_nothing(model_dirs):
    """GPT-2 warns about padding without a mask at the first forward pass of a process."""
    code = (
        "from babyllama.evaluation.loading import load_model\n"
        f"load_model({str(model_dirs['GPT2'])!r}, 'cpu')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_missing_model_suggests_the_nearest_one(model_dirs, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json .*; did you mean .*/Llama\?"):
        load_model(model_dirs["Llama"].with_name("LLama"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_dirs["Llama"], "models/mine")
    with pytest.raises(FileNotFoundError, match=r"did you mean models/mine\?"):
        load_model("mine")
    with pytest.raises(FileNotFoundError, match=r"nothing matches the \*"):
        load_model(model_dirs["Llama"] / "chck_*")


def test_load_model_names_the_missing_file(model_dirs, tmp_path):
    message = r"no model at gpt2: expected a directory with config\.json.*nothing is downloaded"
    with pytest.raises(FileNotFoundError, match=message):
        load_model("gpt2")
    with pytest.raises(ValueError, match='dtype "int8" is unknown'):
        load_model(model_dirs["Llama"], dtype="int8")
    shutil.copytree(model_dirs["Llama"], tmp_path / "pickled")
    weights = tmp_path / "pickled" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors weights"):
        load_model(tmp_path / "pickled")


def change_config(folder, **keys) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


def test_a_broken_model_directory_gets_one_line(model_dirs, tmp_path, capfd):
    def error_after(change) -> str:
        folder = tmp_path / change.__name__
        shutil.copytree(model_dirs["Llama"], folder)
        change(folder)
        with pytest.raises(ValueError) as caught:
            load_model(folder)
        message = str(caught.value)
        assert message.startswith(str(folder))
        assert "\n" not in message
        return message

    def truncate_weights(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    def corrupt_tokenizer(folder):
        (folder / "tokenizer.json").write_text(
            '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}'
        )

    def add_layer(folder):
        change_config(folder, num_hidden_layers=3)

    def enlarge_vocabulary(folder):
        change_config(folder, vocab_size=500)

    error_after(truncate_weights)
    error_after(corrupt_tokenizer)
    assert "lacks weights that config.json expects: model.layers.2" in error_after(add_layer)
    assert error_after(enlarge_vocabulary).endswith(
        "weights lm_head.weight have shape [400, 32], config.json expects [500, 32]"
    )
    printed = capfd.readouterr().err
    assert "MISMATCH" not in printed and "MISSING" not in printed


def test_extra_weights_are_ignored_with_a_warning(model_dirs, tmp_path, caplog):
    shutil.copytree(model_dirs["Llama"], tmp_path / "shorter")
    change_config(tmp_path / "shorter", num_hidden_layers=1)
    load_model(tmp_path / "shorter")
    assert "ignoring 9 weights that config.json does not expect: ['model.layers.1." in caplog.text


def test_a_model_that_looks_ahead_is_refused(tokenizer, tmp_path):
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    tokenizer.save_pretrained(tmp_path)
    for is_causal in (False, True):
        config = transformers.RobertaConfig(vocab_size=400, is_decoder=is_causal, **sizes)
        transformers.RobertaForCausalLM(config).save_pretrained(tmp_path)
        if is_causal:
            load_model(tmp_path, "cpu")
        else:
            with pytest.raises(ValueError, match="looks at later tokens: not a causal language"):
                load_model(tmp_path, "cpu")


# ---- encoding -----------------------------------------------------------------------------------


def test_encode_returns_the_ids_of_the_tokenizer(tokenizer):
    texts = ["The cat sees the dog.", "", " a  b\n", "héllo 123"]
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert encode(tokenizer, texts, bos=False) == expected


def test_bos_is_added_exactly_once(tokenizer):
    text = "The cat sleeps."
    without_bos = copy.deepcopy(tokenizer)
    without_bos.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.encode(text) == [BOS, *ids]
    assert without_bos.encode(text) == ids
    for other in (tokenizer, without_bos):
        assert encode(other, [text, ids, [BOS, *ids]]) == [[BOS, *ids]] * 3


def test_a_tokenizer_without_bos_uses_eos(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.bos_token = None
    assert encode(other, ["a"])[0][0] == EOS
    other.eos_token = None
    with pytest.raises(ValueError, match="neither a BOS nor an EOS token: use bos=False"):
        encode(other, ["a"])
    assert len(encode(other, ["a"], bos=False)[0]) == 1
    assert encode(other, ["a"], bos=None) == encode(other, ["a"], bos=False)


def test_half_of_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(ValueError, match="half of a surrogate pair.*a good .ud800"):
        encode(tokenizer, ["a cat", "a good \ud800 cat"])
