"""evaluation/word_surprisal.py against an enumeration of the vocabulary, and against properties."""

from __future__ import annotations

import csv
import math
import shutil

import pytest
import torch
import yaml
from conftest import build_tiny_model, errors_of, sentences, write_file

import evaluate
from babyllama.evaluation.word_surprisal import COLUMNS, log2_frequencies, word_surprisal
from evaluate import ModelEvaluator

BOS, EOS = 1, 2
TEXTS = [
    "The cat sees the dog in the garden.",
    "  Two  spaces,\na newline\tand a tab \n",
    "Ünïcode 🙂\u00a0no-break\u3000wide x\u2003y",
    "",
    "x",
]


@pytest.fixture(scope="module", params=["Llama", "GPT2"])
def model(request):
    return build_tiny_model(request.param)


def naive_rows(model, tokenizer, text: str) -> list[tuple[str, float, float, int]]:
    """Return (word, surprisal, sum over tokens, tokens) of each word, one token at a time.

    A token belongs to the word that its text, decoded together with the tokens before it, reaches.
    Half a character decodes to U+FFFD, which is not white space.
    """
    ids = tokenizer.encode(text.strip(), add_special_tokens=False)
    boundary = []  # tokens after which the last word has ended
    for token_id in range(len(tokenizer)):
        token = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        if token_id < 3 or token[:1].isspace():
            boundary.append(token_id)

    def probs(n: int) -> torch.Tensor:
        """Return the prediction after n tokens, in float64."""
        with torch.no_grad():
            return model(torch.tensor([[BOS, *ids[:n]]])).logits[0, -1].double().softmax(-1)

    # after which numbers of tokens does a word end?
    prefixes = [tokenizer.decode(ids[:n]) for n in range(len(ids) + 1)]
    words = text.split()
    ends = []
    for k in range(1, len(words) + 1):
        ends.append(next(n for n, prefix in enumerate(prefixes) if prefix.split()[:k] == words[:k]))

    rows = []
    first = 0
    start_probability = 1.0  # of the white space before the word
    for word, end in zip(words, ends, strict=True):
        token_probability = 1.0
        for n in range(first, end):
            token_probability *= probs(n)[ids[n]].item()
        end_probability = 1.0
        if end == len(ids) or ids[end] in boundary:
            end_probability = sum(probs(end)[token_id].item() for token_id in boundary)
        probability = token_probability * end_probability / start_probability
        rows.append((word, -math.log2(probability), -math.log2(token_probability), end - first))
        start_probability = end_probability
        first = end
    return rows


@pytest.mark.parametrize("fixture", ["tokenizer", "spaced_tokenizer"])
def test_surprisal_equals_an_enumeration_of_the_vocabulary(model, fixture, request):
    tokenizer = request.getfixturevalue(fixture)
    rows = word_surprisal(model, tokenizer, TEXTS)
    for number, text in enumerate(TEXTS, 1):
        expected = naive_rows(model, tokenizer, text)
        of_text = [row for row in rows if row["sentence"] == number]
        assert [row["word"] for row in of_text] == text.split()
        for row, (word, bits, uncorrected, tokens) in zip(of_text, expected, strict=True):
            assert text[row["start"] : row["end"]] == word
            assert row["surprisal_bits"] == pytest.approx(bits, abs=1e-4), (text, word)
            assert row["uncorrected_bits"] == pytest.approx(uncorrected, abs=1e-4)
            assert row["tokens"] == tokens
        assert [row["position"] for row in of_text] == list(range(1, len(of_text) + 1))


def test_the_words_of_a_sentence_add_up_to_the_sentence(model_dirs):
    evaluator = ModelEvaluator(model_dirs["Llama"], "cpu")
    for text in sentences(20, seed=4):
        rows = evaluator.word_surprisal([text])
        result = evaluator.calculate_perplexity([text])
        bits = result["nats_per_token"] * result["total_tokens"] / math.log(2)
        assert sum(row["uncorrected_bits"] for row in rows) == pytest.approx(bits, rel=1e-6)
        assert sum(row["tokens"] for row in rows) == result["total_tokens"]

        # the correction moves bits between words and adds only that the last word ends
        ids = [BOS, *evaluator.tokenizer.encode(text, add_special_tokens=False)]
        with torch.no_grad():
            probs = evaluator.model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
        tokens = evaluator.tokenizer.convert_ids_to_tokens(range(len(probs)))
        # tab, newline, vertical tab, form feed, return, space, U+001C to U+001F in GPT-2's alphabet
        blanks = "ĉĊċČčĠ" + "".join(chr(0x100 + byte) for byte in range(0x1C, 0x20))
        ends = [i for i, token in enumerate(tokens) if i < 3 or (token and token[0] in blanks)]
        end_bits = -math.log2(probs[sorted(set(ends))].sum().item())
        assert sum(row["surprisal_bits"] for row in rows) == pytest.approx(
            bits + end_bits, rel=1e-5
        )


def test_entropy_is_that_of_the_prediction_of_the_first_token(model, tokenizer):
    row = word_surprisal(model, tokenizer, ["The cat"])[0]
    with torch.no_grad():
        probs = model(torch.tensor([[BOS]])).logits[0, -1].double().softmax(-1)
    assert row["entropy_bits"] == pytest.approx(-(probs * probs.log2()).sum().item(), rel=1e-5)


def test_a_sentence_longer_than_the_context_has_a_row_for_each_word(model, tokenizer):
    text = " ".join(sentences(12, seed=5))
    assert len(tokenizer.encode(text)) > 64
    rows = word_surprisal(model, tokenizer, [text])
    assert [row["word"] for row in rows] == text.split()
    assert all(math.isfinite(row["surprisal_bits"]) for row in rows)
    # within the first window the rest of the text changes nothing
    start = word_surprisal(model, tokenizer, [" ".join(text.split()[:10])])
    for row, expected in zip(rows[:9], start[:9], strict=True):
        assert row["surprisal_bits"] == pytest.approx(expected["surprisal_bits"], abs=1e-4)


def test_surprisal_does_not_depend_on_the_batch(model, tokenizer):
    texts = sentences(10, seed=6)
    together = word_surprisal(model, tokenizer, texts)
    alone = []
    for text in texts:
        alone += word_surprisal(model, tokenizer, [text], batch_tokens=1)
    for row, expected in zip(together, alone, strict=True):
        assert row["surprisal_bits"] == pytest.approx(expected["surprisal_bits"], abs=1e-4)


def test_a_token_of_two_words_gives_neither_a_surprisal(tokenizer):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<s>", "a", "b", "c", "Ġ", "aĠ", "aĠb", "Ġc"]
    vocab = {token: i for i, token in enumerate(letters)}
    backend = Tokenizer(models.BPE(vocab, [("a", "Ġ"), ("aĠ", "b"), ("Ġ", "c")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    joined = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    rows = word_surprisal(build_tiny_model("GPT2", vocab_size=8), joined, ["a b c c"])
    assert [row["tokens"] for row in rows] == [1, 0, 1, 1]
    defined = [math.isfinite(row["surprisal_bits"]) for row in rows]
    assert defined == [False, False, True, True]


def test_a_special_token_in_a_text_that_hides_a_word_is_an_error(model, tokenizer):
    with pytest.raises(ValueError, match="sentence 2: the tokenizer makes 2 of its 3 words"):
        word_surprisal(model, tokenizer, ["fine", "a </s> b"])


def test_a_tokenizer_without_bos_and_eos_is_refused(bare_model_dir):
    with pytest.raises(ValueError, match="neither BOS nor EOS"):
        ModelEvaluator(bare_model_dir, "cpu").word_surprisal(["cat"])


def test_frequencies_count_exact_words(tmp_path):
    write_file(tmp_path, "a.train", "The cat. the cat\n\n\nthe end")
    found = log2_frequencies(["the", "cat", "dog"], tmp_path)
    assert found == {"the": math.log2(3 / 7), "cat": math.log2(2 / 7), "dog": math.log2(1 / 7)}


# ---- evaluate.py --surprisal --------------------------------------------------------------------


def read_table(path) -> list[dict]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def run_dir(tmp_path, model_dirs):
    """Return a model directory that records its training text."""
    folder = tmp_path / "run"
    shutil.copytree(model_dirs["Llama"], folder)
    (tmp_path / "text").mkdir()
    write_file(tmp_path / "text", "toy.train", "\n".join(sentences(20)))
    record = {"data": {"train_path": str(tmp_path / "text"), "eval_path": "dev"}}
    (folder / "training_config.yaml").write_text(yaml.safe_dump(record))
    return folder


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "The cat sees.\n\nThe dog, too\n"),
        ("a.csv", 'id,Text\n1,The cat sees.\n2,\n3,"The dog, too"\n'),
        ("a.tsv", "\ufeffsentence\tid\r\nThe cat sees.\t1\r\n\t2\r\nThe dog, too\t3\r\n"),
    ],
)
def test_a_file_of_sentences_becomes_a_table_of_words(tmp_path, run_dir, capsys, name, content):
    file = write_file(tmp_path, name, content)
    assert evaluate.main([str(run_dir), "--surprisal", str(file), "--device", "cpu"]) == 0
    table = read_table(run_dir / "word_surprisal.csv")
    assert tuple(table[0]) == COLUMNS
    assert [row["word"] for row in table] == ["The", "cat", "sees.", "The", "dog,", "too"]
    assert [row["sentence"] for row in table] == ["1"] * 3 + ["3"] * 3

    texts = ["The cat sees.", "", "The dog, too"]
    rows = ModelEvaluator(run_dir, "cpu").word_surprisal(texts)
    for cells, row in zip(table, rows, strict=True):
        for key in ("surprisal_bits", "uncorrected_bits", "entropy_bits", "log2_frequency"):
            assert float(cells[key]) == pytest.approx(row[key], abs=1e-5)
    mean = sum(row["surprisal_bits"] for row in rows) / len(rows)
    assert f"2 sentences, 6 words, mean surprisal {mean:.3f} bits" in capsys.readouterr().out


def test_without_the_training_text_the_frequency_is_empty(tmp_path, model_dirs, run_dir, capsys):
    assert (
        ModelEvaluator(model_dirs["GPT2"], "cpu").word_surprisal(["a"])[0]["log2_frequency"] is None
    )
    shutil.rmtree(tmp_path / "text")
    file = write_file(tmp_path, "a.txt", "The cat")
    output = tmp_path / "out.csv"
    arguments = [str(run_dir), "--surprisal", str(file), "--output-path", str(output)]
    assert evaluate.main([*arguments, "--device", "cpu"]) == 0
    assert [row["log2_frequency"] for row in read_table(output)] == ["", ""]
    assert "note: no frequencies" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "id,words\n1,The cat\n", "no column text or sentence; its columns are id, words"),
        ("a.txt", " \n\n", "contains no sentence"),
        ("a.tsv", "text\n\n", "contains no sentence"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8 (byte 0)"),
    ],
)
def test_a_wrong_file_of_sentences_is_one_line(tmp_path, run_dir, capsys, name, content, expected):
    file = write_file(tmp_path, name, content)
    assert evaluate.main([str(run_dir), "--surprisal", str(file)]) == 2
    (error,) = errors_of(capsys)
    assert expected in error
    assert not (run_dir / "word_surprisal.csv").exists()


def test_only_an_earlier_table_is_replaced(tmp_path, run_dir, capsys):
    file = write_file(tmp_path, "a.txt", "The cat")
    mine = write_file(tmp_path, "mine.csv", "word,sentence\n")
    arguments = [str(run_dir), "--surprisal", str(file), "--device", "cpu", "--output-path"]
    assert evaluate.main([*arguments, str(mine)]) == 2
    assert "mine.csv exists and was not written by this script" in errors_of(capsys)[0]
    assert mine.read_text() == "word,sentence\n"
    for _ in range(2):
        assert evaluate.main([*arguments, str(tmp_path / "table.csv")]) == 0


@pytest.mark.parametrize("flag", ["--eval-data", "--num-samples", "--temperature", "--seed"])
def test_flags_of_the_report_do_not_go_with_surprisal(run_dir, capsys, flag):
    assert evaluate.main([str(run_dir), "--surprisal", "a.txt", flag, "1"]) == 2
    (error,) = errors_of(capsys)
    assert f"{flag} does not go with --surprisal" in error
