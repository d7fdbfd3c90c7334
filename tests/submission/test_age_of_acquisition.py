import json
import math

import numpy as np
import pytest
import torch
from conftest import NOUNS, sentences, write_file

from babyllama.data.tokenizer import token_bytes
from babyllama.evaluation.loading import load_model
from babyllama.submission.age_of_acquisition import (
    acquisition_score,
    measure_surprisals,
    read_contexts,
    read_human_ages,
    surprisal_file,
)

AGES = np.arange(16, 31)
CONTEXTS = {
    "garden": ["The cat sees the dog in the", "  The bird  "],
    "café": ["She went to the “naïve” —", ""],
    "old tree": ["under the"],
    "dogs,": ["He says: the"],
}
MILLIONS = [*range(1, 10), *range(10, 101, 10)]


def naive_surprisal(model, tokenizer, context, word):
    """Score the whole text in one pass, and add up the tokens that reach into the word's bytes."""
    prefix = (context.strip() + " ").encode()
    ids = tokenizer(context.strip() + " " + word)["input_ids"]
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    surprisal = 0.0
    end = 0
    for place, token in enumerate(ids):
        end += len(token_bytes(tokenizer)[token])
        if end > len(prefix):
            surprisal -= logprobs[place - 1, token].item()
    return surprisal


def surprisals(model_dir, contexts=CONTEXTS):
    return [row["surprisal"] for row in measure_surprisals(model_dir, contexts, "chck_1M", "cpu")]


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_surprisals_equal_a_naive_pass_over_the_whole_text(model_dirs, kind):
    model, tokenizer = load_model(model_dirs[kind], "cpu")
    expected = [
        naive_surprisal(model, tokenizer, context, word)
        for word, texts in CONTEXTS.items()
        for context in texts
    ]
    assert surprisals(model_dirs[kind]) == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == len(expected)


def test_a_context_longer_than_the_models_is_cut_on_the_left(model_dirs):
    model, tokenizer = load_model(model_dirs["GPT2"], "cpu")
    context = " ".join(sentences(20))
    word = tokenizer.decode(tokenizer(context)["input_ids"][5]).strip()
    ids = tokenizer(f"{context} {word}")["input_ids"]
    assert len(ids) > 2 * 64
    assert tokenizer.decode(ids[-1]) == " " + word
    with torch.no_grad():
        logits = model(torch.tensor([ids[-65:-1]])).logits[0, -1]
    expected = -logits.log_softmax(-1)[ids[-1]].item()
    assert surprisals(model_dirs["GPT2"], {word: [context]}) == pytest.approx([expected], abs=1e-5)


def test_without_bos_the_first_token_has_no_surprisal(bare_model_dir):
    first, second = NOUNS[:2]
    alone, after = surprisals(bare_model_dir, {first: ["", second]})
    assert alone == 0
    assert after > 0


def test_the_file_has_the_form_of_the_official_pipeline(model_dirs):
    rows_of = {
        name: measure_surprisals(model_dirs["Llama"], CONTEXTS, name, "cpu")
        for name in ("chck_1M", "chck_20M")
    }
    hashes = {"chck_1M": "a", "chck_20M": "b"}
    content = surprisal_file(rows_of, hashes, "me/tiny")
    assert content["metadata"] == {
        "model_name": "me/tiny",
        "use_bos_only": False,
        "total_steps": 2,
        "completed_steps": 2,
        "weights_sha256": hashes,  # ours
    }
    assert len(content["results"]) == 12
    second = content["results"][7]
    assert second.pop("surprisal") > 0
    assert second == {
        "step": "chck_20M",
        "word_count": 20_000_000,
        "target_word": "garden",
        "context_id": 1,
        "context": "  The bird  ",
    }


def test_a_surprisal_that_is_not_a_number_is_an_error(model_dirs, tmp_path):
    model, tokenizer = load_model(model_dirs["Llama"], "cpu")
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model: the surprisal of 'garden' after 'The cat .* nan"):
        surprisals(tmp_path / "model")


def test_words_of_one_letter_are_not_read(tmp_path):
    content = {word: [{"context": "give me", "count": 1}] for word in ("a", "cup")}
    path = write_file(tmp_path, "cdi_childes.json", json.dumps(content))
    assert read_contexts(path) == {"cup": ["give me"]}


@pytest.mark.parametrize(
    "text",
    ['{"cup": ["give me"]}', '{"cup": [{"context": 3}]}', "[1]", "{", '{"cup": [{"text": "a"}]}'],
)
def test_a_file_of_contexts_in_another_format_is_an_error(tmp_path, text):
    path = write_file(tmp_path, "cdi_childes.json", text)
    with pytest.raises(ValueError, match="expected JSON of the form"):
        read_contexts(path)


# ---- ages ---------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def human_ages_file(folder, shares_of, header=("word", "category", *AGES)):
    lines = [",".join(map(str, header))]
    lines += [",".join([word, "food", *map(str, shares)]) for word, shares in shares_of]
    return write_file(folder, "cdi_human.csv", "\n".join(lines) + "\n")


def test_the_age_of_a_word_is_where_half_of_the_children_know_it(tmp_path):
    shares = sigmoid(0.6 * (AGES - 21.5))
    with_gaps = [*shares[:4], "", "NA", *shares[6:]]
    asymptote = 0.8 * sigmoid(0.6 * (AGES - 20))  # 0.8 s = 0.5 at 20 - log(0.8/0.5 - 1)/0.6
    path = human_ages_file(
        tmp_path,
        [
            ("cup", shares),
            ("milk", with_gaps),
            ("juice", asymptote),
            ("idea", [0.1] * 15),
            ("two", [0.2, 0.9, *[""] * 13]),
            ("cup", [0.1] * 15),
        ],
    )
    ages = read_human_ages(path)
    assert ages["cup"] == pytest.approx(21.5, abs=1e-3)
    assert ages["milk"] == pytest.approx(21.5, abs=1e-3)
    assert ages["juice"] == pytest.approx(20 - math.log(0.6) / 0.6, abs=1e-3)
    assert ages["idea"] is None
    assert ages["two"] is None


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (("noun", "category", *AGES), "expected the columns word and 16 to 30"),
        (("word", "category", *(AGES + 40)), "expected the columns word and 16 to 30"),
        (("word", 16, *AGES[1:], "x"), r"cdi_human.csv, line 2: .*food"),
    ],
)
def test_human_ages_in_another_format_are_an_error(tmp_path, header, message):
    path = human_ages_file(tmp_path, [("cup", [0.5] * 15)], header)
    with pytest.raises(ValueError, match=message):
        read_human_ages(path)


def surprisal_rows(surprisals_of):
    """Return surprisal.json with two contexts per word, whose mean is as given."""
    results = []
    for millions, *surprisals in zip(MILLIONS, *surprisals_of.values(), strict=True):
        for word, surprisal in zip(surprisals_of, surprisals, strict=True):
            for index, delta in enumerate((-0.5, 0.5)):
                results.append(
                    {
                        "step": f"chck_{millions}M",
                        "word_count": millions * 1_000_000,
                        "target_word": word,
                        "context_id": index,
                        "context": "x",
                        "surprisal": surprisal + delta,
                    }
                )
    return {"results": results}


def acquisition_data(tokenizer, folder, noise):
    """Return surprisals and human ages of NOUNS that are learned one after the other, and where."""
    x = np.log10(np.array(MILLIONS) * 1e6 + 1)
    surprisals_of = {}
    shares_of = []
    crossings = []
    for number, word in enumerate(NOUNS):
        n_tokens = len(tokenizer("The " + word)["input_ids"]) - len(tokenizer("The")["input_ids"])
        middle = 6.4 + 0.15 * number
        gains = 5 * sigmoid(3 * (x - middle))
        surprisals_of[word] = n_tokens * math.log(tokenizer.vocab_size) - gains
        crossings.append(middle - math.log(5 / (gains.max() / 2) - 1) / 3)
        shares_of.append((word, sigmoid(0.5 * (AGES - (19 + number + noise[number])))))
    return surprisal_rows(surprisals_of), human_ages_file(folder, shares_of), crossings


def test_a_word_is_learned_halfway_between_chance_and_its_lowest_surprisal(tokenizer, tmp_path):
    noise = [0, 1, -1, 1, 0, -1, 1, 0]
    surprisals, human_ages, crossings = acquisition_data(tokenizer, tmp_path, noise)
    result = acquisition_score(surprisals, human_ages, tokenizer, tmp_path / "aoa_score.json")
    assert [row["word"] for row in result["words"]] == NOUNS
    assert [row["log10_words_seen"] for row in result["words"]] == pytest.approx(
        crossings, abs=1e-4
    )
    months = [19 + number + delta for number, delta in enumerate(noise)]
    assert [row["child_months"] for row in result["words"]] == pytest.approx(months, abs=1e-2)
    assert result["score"] == pytest.approx(np.corrcoef(crossings, months)[0, 1], abs=1e-3)
    assert json.loads((tmp_path / "aoa_score.json").read_text()) == {"aoa": result["score"]}


def test_a_correlation_that_is_not_significant_counts_as_zero(tokenizer, tmp_path):
    surprisals, human_ages, _ = acquisition_data(tokenizer, tmp_path, [5, 0, -1, 2, -2, 1, -3, -5])
    result = acquisition_score(surprisals, human_ages, tokenizer)
    assert result["p"] > 0.1
    assert 0 < abs(result["r"]) < 1
    assert result["score"] == 0


def test_fewer_than_three_words_score_zero_and_the_others_are_counted(tokenizer, tmp_path):
    surprisals, human_ages, _ = acquisition_data(tokenizer, tmp_path, [0] * 8)
    lines = human_ages.read_text().splitlines()
    never = NOUNS[2] + ",food" + ",0.1" * 15
    human_ages.write_text("\n".join([*lines[:3], never, lines[4]]) + "\n")
    for row in surprisals["results"]:
        if row["target_word"] == NOUNS[3]:
            row["surprisal"] = 20.0  # never learned
    result = acquisition_score(surprisals, human_ages, tokenizer)
    assert (result["score"], result["r"], result["p"], result["n_words"]) == (0, None, None, 2)
    assert result["n_left_out"] == {"no_human_data": 4, "no_child_age": 1, "no_model_age": 1}


def test_a_checkpoint_with_a_missing_surprisal_is_ignored(tokenizer, tmp_path):
    """Other programs write NaN for a context that the model cannot read."""
    surprisals, human_ages, crossings = acquisition_data(tokenizer, tmp_path, [0] * 8)
    for row in surprisals["results"]:
        if row["step"] == "chck_4M" and row["context_id"] == 1:
            row["surprisal"] = math.nan
    result = acquisition_score(surprisals, human_ages, tokenizer)
    assert [row["log10_words_seen"] for row in result["words"]] == pytest.approx(
        crossings, abs=1e-4
    )


def test_the_score_is_that_of_the_official_evaluator(tokenizer, tmp_path):
    """The expected values are those of AoAEvaluator in babylm-eval, commit c9e7b70 of July 2026, on these data."""
    rng = np.random.default_rng(0)
    x = np.log10(np.array(MILLIONS) * 1e6)
    words = [f"{noun} {noun[:length]}" for noun in NOUNS for length in (1, 2, 3)]
    surprisals_of = {}
    shares_of = []
    for word in words:
        middle = rng.uniform(6, 8)
        surprisals_of[word] = 14 - rng.uniform(8, 10) * sigmoid(rng.uniform(2, 4) * (x - middle))
        surprisals_of[word] += rng.normal(0, 0.1, len(x))
        shares = sigmoid(0.4 * (AGES - 2 - 3 * middle)) + rng.normal(0, 0.03, len(AGES))
        shares_of.append((word, shares.clip(0, 1)))
    human_ages = human_ages_file(tmp_path, shares_of)
    result = acquisition_score(surprisal_rows(surprisals_of), human_ages, tokenizer)
    assert result["n_words"] == 21
    assert result["score"] == pytest.approx(0.6720758200455944, abs=1e-6)
    assert result["p"] == pytest.approx(0.0008467801858111705, rel=1e-4)
