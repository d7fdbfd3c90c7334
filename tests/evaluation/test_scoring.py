"""evaluation/scoring.py against naive loops in float64, worked examples and exact properties, on tiny models of each kind."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import math
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, sentences
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers.utils import ModelOutput

from babyllama.device import pick_device
from babyllama.evaluation.generation import _sample, generate, generate_steps
from babyllama.evaluation.loading import context_length, encode, load_model
from babyllama.evaluation.scoring import _windows, ids_logprobs, token_logprobs

KINDS = ["Llama", "GPT2", "GPTJ"]
BOS, EOS = 1, 2


def peaked(model, scale: float = 5.0):
    """The same model with larger weights: its predictions are far from uniform, so that errors show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


@pytest.fixture(scope="module")
def models(tiny_model):
    return {kind: peaked(tiny_model(kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def texts():
    """130 texts from nothing to the whole context of 64 tokens."""
    base = sentences(120, seed=3)
    return [*base, "", "a", "Ünï©ode 🙂", *(" ".join(base[i : i + 2]) for i in range(7))]


def naive_logprobs(model, ids: list[int]) -> list[float]:
    """One text in one float64 forward pass: log p of ids[1:], the yardstick."""
    if len(ids) < 2:
        return []
    with torch.no_grad():
        logprobs = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    return [logprobs[i, ids[i + 1]].item() for i in range(len(ids) - 1)]


# ---- scoring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_a_float64_loop_for_any_batch_and_order(models, tokenizer, texts, kind):
    double = copy.deepcopy(models[kind]).double()
    want = {
        text: naive_logprobs(double, [BOS, *tokenizer.encode(text, add_special_tokens=False)])
        for text in texts
    }
    longest = max(map(len, want.values()))
    for rows in (1, 2, 7, 64):
        shuffled = random.Random(rows).sample(texts, len(texts))
        got = token_logprobs(models[kind], tokenizer, shuffled, batch_tokens=rows * longest)
        for text, scores in zip(shuffled, got, strict=True):
            assert scores.logprobs == pytest.approx(want[text], rel=1e-5)
            assert scores.logprobs.sum() == pytest.approx(sum(want[text]), rel=1e-5)
            assert tokenizer.decode(scores.ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_a_uniform_model_scores_minus_t_log_v(tiny_model, tokenizer, texts, kind):
    model = tiny_model(kind)
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    vocab_size = model.config.vocab_size
    for scores in token_logprobs(model, tokenizer, texts, stats=True):
        n = len(scores.ids)
        assert scores.logprobs.sum() == pytest.approx(-n * math.log(vocab_size), rel=1e-6)
        assert scores.top_probs == pytest.approx([1 / vocab_size] * n, rel=1e-5)
        assert scores.entropies == pytest.approx([math.log(vocab_size)] * n, rel=1e-6)
        assert (
            scores.ranks.tolist() == [(vocab_size + 1) / 2] * n
        )  # equal logits: the middle rank, not the first
        assert scores.hits == pytest.approx([1 / vocab_size] * n)


def test_statistics_equal_a_loop_over_the_vocabulary(models, tokenizer):
    text = "The cat sees the old dog under the tree."
    scores = token_logprobs(models["GPT2"], tokenizer, [text], stats=True)[0]
    ids = [BOS, *tokenizer.encode(text, add_special_tokens=False)]
    with torch.no_grad():
        probs = (
            copy.deepcopy(models["GPT2"])
            .double()(torch.tensor([ids]))
            .logits[0]
            .softmax(-1)
            .tolist()
        )
    for i, token in enumerate(ids[1:]):
        row = probs[i]
        assert scores.ids[i] == token
        assert scores.top_probs[i] == pytest.approx(max(row), rel=1e-5)
        assert scores.entropies[i] == pytest.approx(-sum(p * math.log(p) for p in row), rel=1e-5)
        assert scores.ranks[i] == sorted(row, reverse=True).index(row[token]) + 1
        assert scores.hits[i] == (row[token] == max(row))
    plain = token_logprobs(models["GPT2"], tokenizer, [text])[0]
    assert plain.logprobs == pytest.approx(scores.logprobs, rel=1e-6)
    assert plain.top_probs is None


def test_bos_stands_in_front_exactly_once(models, tokenizer):
    text = "The cat sleeps."
    bare = copy.deepcopy(tokenizer)
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.encode(text) == [BOS, *ids] and bare.encode(text) == ids
    with_bos = token_logprobs(models["Llama"], tokenizer, [text, ids, [BOS, *ids]])
    assert (
        token_logprobs(models["Llama"], bare, [text])[0].logprobs.tolist()
        == with_bos[0].logprobs.tolist()
    )
    assert all(scores.ids.tolist() == ids for scores in with_bos)
    assert all(scores.logprobs.tolist() == with_bos[0].logprobs.tolist() for scores in with_bos)
    without = token_logprobs(models["Llama"], tokenizer, [text], bos=False)[0]
    assert without.ids.tolist() == ids[1:]
    assert without.logprobs == pytest.approx(naive_logprobs(models["Llama"], ids), rel=1e-5)


def test_half_a_surrogate_pair_is_refused(models, tokenizer):
    with pytest.raises(ValueError, match="half of a surrogate pair.*a good .ud800"):
        token_logprobs(models["Llama"], tokenizer, ["a cat", "a good \ud800 cat"])


def test_loading_says_nothing(tmp_path, model_dirs):
    """GPT-2's check for padding without a mask would warn, at the first forward pass of a process."""
    code = f"from babyllama.evaluation.loading import load_model; load_model({str(model_dirs['GPT2'])!r}, 'cpu')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_tokenizer_without_bos_uses_eos_or_says_so(models, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.bos_token = None
    assert encode(other, ["a"])[0][0] == EOS
    other.eos_token = None
    with pytest.raises(ValueError, match="bos=False"):
        encode(other, ["a"])
    assert len(encode(other, ["a"], bos=False)[0]) == 1


@settings(deadline=None)
@given(n=st.integers(0, 80), start=st.integers(1, 85), context=st.integers(1, 20), data=st.data())
def test_windows_score_each_token_once_with_enough_context(n, start, context, data):
    stride = data.draw(st.integers(1, context))
    scored = []
    for window in _windows(np.arange(n), start, context, stride, at=7):
        assert window.begin >= 0 and window.end - 1 - window.begin <= context
        assert window.at == 7 + window.first - start
        for token in range(window.first, window.end):
            assert token - window.begin >= min(token, context - stride + 1)
            scored.append(token)
    assert scored == list(range(start, n))


@pytest.mark.parametrize(("context", "stride"), [(64, None), (64, 64), (64, 1), (10, 3), (1, 1)])
def test_long_text_equals_one_forward_pass_per_token(models, context, stride):
    ids = [BOS, *np.random.default_rng(0).integers(3, 400, 149).tolist()]
    got = ids_logprobs(
        models["GPT2"], [ids, ids[:30]], context=context, stride=stride, batch_tokens=200
    )
    stride = context // 2 if stride is None else stride
    double, want = copy.deepcopy(models["GPT2"]).double(), []
    for i in range(1, len(ids)):
        window = math.ceil(max(0, i - context) / stride)  # the first one that reaches token i
        end = min(context + window * stride, len(ids) - 1)
        want.append(naive_logprobs(double, ids[max(0, end - context) : i + 1])[-1])
    assert got[0].logprobs == pytest.approx(want, rel=1e-5)
    assert len(got[1].ids) == 29


def test_starts_leave_out_the_tokens_before(models):
    rng = np.random.default_rng(1)
    sequences = [rng.integers(3, 400, n).tolist() for n in (0, 1, 5, 40, 150)]
    whole = ids_logprobs(models["Llama"], sequences)
    for start in (1, 4, 39, 200):
        part = ids_logprobs(models["Llama"], sequences, starts=[start] * 5)
        for a, b in zip(whole, part, strict=True):
            assert b.ids.tolist() == a.ids[start - 1 :].tolist()
            assert b.logprobs == pytest.approx(a.logprobs[start - 1 :], rel=1e-5)


def test_a_head_of_another_kind_is_left_to_the_model():
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=120, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, final_logit_softcapping=2.0,
        attn_implementation="eager",
    )  # fmt: skip
    model = peaked(transformers.Gemma2ForCausalLM(config).eval(), 20.0)
    ids = np.random.default_rng(0).integers(0, 120, 30).tolist()
    assert model(torch.tensor([ids])).logits.abs().max() > 1.5  # the cap bites
    want = naive_logprobs(copy.deepcopy(model).double(), ids)
    assert ids_logprobs(model, [ids])[0].logprobs == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_weights_still_give_float32_logits(models, kind):
    model = copy.deepcopy(models[kind]).bfloat16()
    ids = np.random.default_rng(0).integers(3, 400, 40)
    got = ids_logprobs(model, [ids])[0].logprobs
    with torch.no_grad():
        hidden = model.base_model(torch.tensor(ids[None, :-1])).last_hidden_state[0].double()
        head = model.get_output_embeddings()
        logits = hidden @ head.weight.double().T + (0 if head.bias is None else head.bias.double())
    want = logits.log_softmax(-1)[torch.arange(39), torch.tensor(ids[1:])]
    assert got == pytest.approx(want.numpy(), rel=1e-5)


def test_scoring_leaves_the_model_as_it_found_it(tiny_model, tokenizer):
    model = tiny_model("GPT2")
    model.config.resid_pdrop = 0.5
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    want = token_logprobs(model, tokenizer, ["The cat"])[0].logprobs
    model.train()
    torch.set_float32_matmul_precision("high")
    try:
        got = token_logprobs(model, tokenizer, ["The cat"])[0].logprobs
        assert model.training and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert got.tolist() == want.tolist()  # dropout was off


def test_broken_numbers_show(tiny_model, tokenizer):
    model = tiny_model("Llama")
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    scores = token_logprobs(model, tokenizer, ["The cat"], stats=True)[0]
    for values in (scores.logprobs, scores.top_probs, scores.entropies, scores.ranks, scores.hits):
        assert np.isnan(values).all()
    with pytest.raises(ValueError, match="NaN"):
        generate(model, tokenizer, ["The cat"], max_new_tokens=2)


def test_a_model_that_looks_ahead_is_refused(tokenizer, tmp_path):
    from transformers import RobertaConfig, RobertaForCausalLM

    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    for is_decoder in (False, True):
        RobertaForCausalLM(
            RobertaConfig(vocab_size=400, is_decoder=is_decoder, **sizes)
        ).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        if is_decoder:
            assert load_model(tmp_path, "cpu")
        else:
            with pytest.raises(
                ValueError, match="looks at later tokens: not a causal language model"
            ):
                load_model(tmp_path, "cpu")


def test_scoring_says_what_it_cannot_do(models):
    model = models["Llama"]
    with pytest.raises(ValueError, match=r"text 0: token ids 3\.\.400, the model knows 0\.\.399"):
        next(generate_steps(model, [[3, 400]], max_new_tokens=2))
    assert ids_logprobs(model, []) == []
    with pytest.raises(ValueError, match=r"text 1: token ids 3\.\.400, the model knows 0\.\.399"):
        ids_logprobs(model, [[1, 2], [3, 400]])
    with pytest.raises(ValueError, match=r"starts\[0\] is 0"):
        ids_logprobs(model, [[1, 2]], starts=[0])
    with pytest.raises(ValueError, match=r"context 65 is outside 1\.\.64"):
        ids_logprobs(model, [[1, 2]], context=65)
    with pytest.raises(ValueError, match=r"stride 65 is outside 1\.\.64"):
        ids_logprobs(model, [[1, 2]], stride=65)


# ---- generation -----------------------------------------------------------------------------------------------------

PROMPTS = ["The cat", "The girl sees the old dog in the garden near", "", "a"]


def greedy_by_hand(model, tokenizer, prompt: str, steps: int) -> str:
    """The whole text through the model for every token: no cache, no padding, no mask."""
    ids, new = [BOS, *tokenizer.encode(prompt, add_special_tokens=False)], []
    for _ in range(steps):
        with torch.no_grad():
            token = model(torch.tensor([ids + new])).logits[0, -1].argmax().item()
        if token == EOS:
            break
        new.append(token)
    return tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_the_uncached_loop_in_any_company(models, tokenizer, kind):
    want = [[greedy_by_hand(models[kind], tokenizer, prompt, 20)] for prompt in PROMPTS]
    for batch_size in (1, 3, 4):
        got = generate(
            models[kind],
            tokenizer,
            PROMPTS,
            max_new_tokens=20,
            temperature=0,
            batch_size=batch_size,
        )
        assert got == want
    assert (
        generate(models[kind], tokenizer, PROMPTS[::-1], max_new_tokens=20, temperature=0)
        == want[::-1]
    )


def test_samples_depend_on_the_seed_and_not_on_the_batch(models, tokenizer):
    state = torch.get_rng_state()
    options = {"max_new_tokens": 15, "num_return_sequences": 3}
    got = generate(models["GPT2"], tokenizer, PROMPTS, seed=1, **options)
    assert [len(texts) for texts in got] == [3] * 4
    assert len({text for texts in got for text in texts}) == 12
    assert got == generate(models["GPT2"], tokenizer, PROMPTS, seed=1, batch_size=5, **options)
    assert got[:2] == generate(models["GPT2"], tokenizer, PROMPTS[:2], seed=1, **options)
    assert got != generate(models["GPT2"], tokenizer, PROMPTS, seed=2, **options)
    assert torch.equal(state, torch.get_rng_state())


def test_a_longer_run_continues_the_shorter_one(models):
    def run(steps):
        batch = generate_steps(
            models["Llama"], [[BOS, 60, 70], [BOS]], max_new_tokens=steps, seed=4
        )
        return [list(ids) for ids in zip(*batch, strict=True)]

    assert [ids[:5] for ids in run(12)] == run(5)


def test_sampling_follows_the_distribution():
    probs = torch.tensor([[0.05, 0.5, 0.3, 0.15]])
    draws = (torch.arange(1000) + 0.5) / 1000  # an even grid: the counts are exact

    def counts(temperature, top_p):
        rows = probs.log().expand(1000, 4)
        return torch.bincount(_sample(rows, temperature, top_p, draws), minlength=4).tolist()

    assert counts(1.0, 1.0) == [50, 500, 300, 150]
    assert counts(1.0, 0.7) == [0, 625, 375, 0]  # 0.5 + 0.3 reach 0.7
    assert counts(1.0, 0.81) == pytest.approx([0, 526, 316, 158], abs=1)
    assert counts(1.0, 1e-6) == counts(0, 1.0) == [0, 1000, 0, 0]
    squared = np.array([0.05, 0.5, 0.3, 0.15]) ** 2
    assert counts(0.5, 1.0) == pytest.approx(1000 * squared / squared.sum(), abs=1)


def test_a_flat_distribution_falls_back_to_the_whole_vocabulary():
    draws = (torch.arange(3000) + 0.5) / 3000
    taken = _sample(torch.zeros(3000, 1000), 1.0, 0.5, draws)
    assert len(set(taken.tolist())) in (
        500,
        501,
    )  # half of 1000 equal tokens, more than the candidates tried first


def test_eos_ends_a_text_and_is_not_given(models, tokenizer):
    model = copy.deepcopy(models["GPTJ"])
    free = [step[0] for step in generate_steps(model, [[BOS, 60]], max_new_tokens=8, temperature=0)]
    stopped = list(
        generate_steps(model, [[BOS, 60]], max_new_tokens=8, temperature=0, stop={free[3]})
    )
    assert len(free) == 8
    assert [step[0] for step in stopped] == [*free[: free.index(free[3])], None]
    with torch.no_grad():
        model.lm_head.bias[EOS] = 1e4
    assert generate(model, tokenizer, ["The cat", "a"], max_new_tokens=8) == [[""], [""]]


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_new_tokens_stay_within_the_context(models, tokenizer, caplog, kind):
    long = " ".join(sentences(40))
    ids = encode(tokenizer, [long])[0]
    with caplog.at_level(logging.WARNING):
        got = generate(models[kind], tokenizer, [long, "The cat"], max_new_tokens=10, temperature=0)
    assert sum("cut to its last 54 tokens" in message for message in caplog.messages) == 1
    want = list(
        generate_steps(models[kind], [ids[-54:]], max_new_tokens=10, temperature=0, stop={EOS})
    )
    assert got[0][0] == tokenizer.decode(
        [step[0] for step in want if step[0] is not None], skip_special_tokens=True
    )
    # more new tokens than fit: half the context is left to the prompt, the short prompt may go on to the end
    steps = list(generate_steps(models[kind], [ids, [BOS]], max_new_tokens=500, temperature=0))
    assert [sum(token is not None for token in row) for row in zip(*steps, strict=True)] == [32, 63]
    alone = list(generate_steps(models[kind], [[BOS]], max_new_tokens=500, temperature=0))
    assert [step[0] for step in alone] == [step[1] for step in steps]


@dataclass
class Answer(ModelOutput):
    logits: torch.Tensor | None = None
    cache: object = None


def test_the_cache_under_either_name(models, tokenizer, monkeypatch):
    """transformers 5.24 calls it `cache`, releases before past_key_values: in the call and in what comes back."""
    model = copy.deepcopy(models["Llama"])
    expected, own = (
        generate(model, tokenizer, ["The cat", "The dog sees"], max_new_tokens=8, seed=1),
        model.forward,
    )
    theirs = next(
        name for name in ("cache", "past_key_values") if name in inspect.signature(own).parameters
    )

    def forward(
        input_ids, attention_mask, position_ids, cache=None, use_cache=None, logits_to_keep=0
    ):
        options = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "use_cache": use_cache,
        }
        out = own(input_ids=input_ids, logits_to_keep=logits_to_keep, **{theirs: cache}, **options)
        return Answer(out.logits, out[theirs])

    monkeypatch.setattr(model, "forward", forward)
    assert (
        generate(model, tokenizer, ["The cat", "The dog sees"], max_new_tokens=8, seed=1)
        == expected
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"temperature": -1}, "temperature -1"),
        ({"top_p": 0}, "top_p 0"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"num_return_sequences": 0}, "num_return_sequences 0"),
        ({"batch_size": 0}, "batch_size 0"),
    ],
)
def test_generation_refuses_senseless_options(models, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        generate(models["Llama"], tokenizer, ["a"], **options)
    assert generate(models["Llama"], tokenizer, []) == []


# ---- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_load_model_gives_what_was_saved(model_dirs, tiny_model, tokenizer, kind):
    model, loaded = load_model(model_dirs[kind], device="cpu")
    assert not model.training and context_length(model) == 64
    assert loaded("The cat")["input_ids"] == tokenizer("The cat")["input_ids"]
    for name, weight in tiny_model(kind).state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
    assert load_model(model_dirs[kind], "cpu", dtype="bfloat16")[0].dtype == torch.bfloat16


def test_load_model_says_what_is_missing(model_dirs, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no model at .*gpt2: expected a directory with config\.json"
    ):
        load_model("gpt2")
    with pytest.raises(ValueError, match='dtype "int8" is unknown'):
        load_model(model_dirs["Llama"], dtype="int8")
    shutil.copytree(model_dirs["Llama"], tmp_path / "pickled")
    weights = tmp_path / "pickled" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors weights"):
        load_model(tmp_path / "pickled")


def test_load_model_refuses_damaged_files(model_dirs, tmp_path, capfd, caplog):
    def damaged(name, change):
        folder = tmp_path / name
        shutil.copytree(model_dirs["Llama"], folder)
        change(folder)
        with pytest.raises(ValueError) as caught:
            load_model(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    def truncate(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    def change_config(folder, **keys):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | keys))

    def break_tokenizer(folder):
        (folder / "tokenizer.json").write_text(
            '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}'
        )

    damaged("truncated", truncate)
    damaged("tokenizer", break_tokenizer)
    assert "lacks the weights model.layers.2" in damaged(
        "layers", lambda at: change_config(at, num_hidden_layers=3)
    )
    wider = damaged("wider", lambda at: change_config(at, vocab_size=500))
    shutil.copytree(model_dirs["Llama"], tmp_path / "shorter")
    change_config(tmp_path / "shorter", num_hidden_layers=1)
    load_model(tmp_path / "shorter")
    assert (
        "shorter: 9 weights without a place by config.json are left out: ['model.layers.1."
        in caplog.text
    )
    assert wider.endswith("the weights lm_head.weight are [400, 32], by config.json [500, 32]")
    assert "MISMATCH" not in (said := capfd.readouterr().err) and "MISSING" not in said


def test_load_model_never_runs_code_from_the_directory(model_dirs, tmp_path):
    folder, canary = tmp_path / "remote", tmp_path / "canary"
    shutil.copytree(model_dirs["Llama"], folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "unheard_of",
        "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(canary)!r}, 'w')")
    with pytest.raises(ValueError):
        load_model(folder)
    assert not canary.exists()


def test_pick_device(caplog, monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    for wrong in ("gpu", "cuda:", "cuda:x", "CPU", ""):
        with pytest.raises(ValueError, match="is unknown: use auto"):
            pick_device(wrong)
    if torch.cuda.is_available():
        assert pick_device(None) == pick_device("auto") == torch.device("cuda")
        with pytest.raises(ValueError, match="does not exist"):
            pick_device("cuda:99")
        return
    pick_device.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert (
            pick_device("cuda") == pick_device("cuda") == pick_device(None) == torch.device("cpu")
        )
    assert caplog.messages == ["CUDA is not available; using the CPU"]
    with pytest.raises(ValueError, match="mps"):
        pick_device("mps")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_gives_the_numbers_of_the_cpu(models, tokenizer, texts, kind):
    on_gpu = copy.deepcopy(models[kind]).to("cuda")
    here = token_logprobs(models[kind], tokenizer, texts)
    there = token_logprobs(on_gpu, tokenizer, texts)
    for a, b in zip(here, there, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, rel=2e-5)
    prompts = {"max_new_tokens": 20, "temperature": 0}
    assert generate(models[kind], tokenizer, PROMPTS, **prompts) == generate(
        on_gpu, tokenizer, PROMPTS, **prompts
    )
