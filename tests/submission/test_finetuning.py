import json
import logging
import math
import random

import numpy as np
import pytest
import torch
from conftest import sentences, write_file

from babyllama.evaluation import metrics
from babyllama.evaluation.loading import load_model
from babyllama.submission import finetuning
from babyllama.submission.finetuning import Classifier, encode_pairs, fine_tune, left_pad
from babyllama.submission.glue_tasks import GLUE_TASKS, read_examples

LR = 3e-3


def write_task(folder, task, n_train=80, n_valid=50, solvable=True):
    """Write a task: label 1 if the second sentence has the word garden, or a random label."""
    rng = random.Random(0)
    for split, n in (("train", n_train), ("valid", n_valid)):
        lines = []
        for first, second in zip(sentences(n, seed=n), sentences(n, seed=n + 1), strict=True):
            if rng.random() < 0.4:
                second = "The cat sees the dog in the garden."
            label = int("garden" in second) if solvable else rng.randrange(2)
            lines.append(json.dumps({"sentence1": first, "sentence2": second, "label": label}))
        write_file(folder, f"{task}.{split}.jsonl", "\n".join(lines) + "\n")
    return folder


def predictions_in(folder, task):
    rows = json.loads((folder / "predictions.json").read_text())[task]["predictions"]
    assert [row["id"] for row in rows] == [f"{task}_{i}" for i in range(len(rows))]
    return [row["pred"] for row in rows]


def classify_alone(model, head, ids):
    """Return the logits (labels,) of one text without padding, from the formula of the head."""
    hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]

    def normalize(x):
        return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()

    x = head[1].weight @ normalize(hidden) + head[1].bias
    x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    return head[5].weight @ normalize(x) + head[5].bias


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "GPTJ", "Qwen3"])
def test_a_padded_batch_gives_each_text_the_logits_it_has_alone(model_dirs, kind):
    model, tokenizer = load_model(model_dirs[kind], "cpu")
    classifier = Classifier(model.base_model, GLUE_TASKS["mnli"]).eval()
    pairs = [("The cat.", "A"), ("The girl sees the dog at home.", "The boy helps."), ("", "x")]
    examples = encode_pairs(tokenizer, [(pair, i) for i, pair in enumerate(pairs)], 64)
    assert len({len(ids) for ids, _ in examples}) == 3
    with torch.no_grad():
        batch = classifier(**left_pad(examples, 0))
        alone = torch.stack([classify_alone(model, classifier.head, ids) for ids, _ in examples])
    torch.testing.assert_close(batch["logits"], alone, atol=1e-5, rtol=1e-4)
    nll = -alone.log_softmax(-1).diagonal().mean()
    assert batch["loss"].item() == pytest.approx(nll.item(), abs=1e-5)


def test_the_head_has_the_parameters_of_the_pipelines(model_dirs):
    model, _ = load_model(model_dirs["Llama"], "cpu")
    head = Classifier(model.base_model, GLUE_TASKS["rte"]).head
    shapes = [tuple(weight.shape) for weight in head.parameters()]
    assert shapes == [(32, 32), (32,), (2, 32), (2,)]  # neither norm has weights


def test_pairs_are_joined_and_the_longer_text_is_cut_at_its_end(tokenizer):
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    question = "The cat sees"
    passage = " ".join(sentences(40))
    [(whole, _)] = encode_pairs(tokenizer, [((question, passage), 0)], 10_000)
    assert whole == [1, *ids(question), 1, *ids(passage)]
    [(cut, _)] = encode_pairs(tokenizer, [((question, passage), 0)], 64)
    assert cut == whole[:64]


def naive_fine_tuning(model_dir, task, data, seed, epochs, batch_size):
    """Fine-tune with a plain loop; return (learning rates, scores of epochs, best predictions)."""
    model, tokenizer = load_model(model_dir, "cpu")
    train = read_examples(data / f"{task}.train.jsonl", task)
    valid = read_examples(data / f"{task}.valid.jsonl", task)
    torch.manual_seed(seed)
    classifier = Classifier(model.base_model, GLUE_TASKS[task])
    weights = list(classifier.parameters())
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
    steps = len(train) // batch_size * epochs
    warmup = int(0.06 * steps)

    def encode(examples):
        return left_pad([(tokenizer(*pair)["input_ids"], label) for pair, label in examples], 0)

    rates, scores, best = [], [], None
    for _ in range(epochs):
        # a DataLoader draws one number for its workers, and then the seed of the order
        torch.empty((), dtype=torch.int64).random_()
        generator = torch.Generator()
        generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
        order = torch.randperm(len(train), generator=generator).tolist()
        classifier.train()
        for start in range(0, len(train) // batch_size * batch_size, batch_size):
            loss = classifier(**encode([train[i] for i in order[start : start + batch_size]]))
            gradients = torch.autograd.grad(loss["loss"], weights)
            done = len(rates)
            if done < warmup:
                rate = LR * done / warmup
            else:
                angle = math.pi * (done - warmup) / (steps - warmup)
                rate = LR * (0.1 + 0.9 * (1 + math.cos(angle)) / 2)
            rates.append(rate)
            with torch.no_grad():
                for weight, gradient, (first, second) in zip(
                    weights, gradients, moments, strict=True
                ):
                    first.lerp_(gradient, 0.1)
                    second.lerp_(gradient**2, 0.001)
                    weight *= 1 - rate * 0.01
                    unbiased = (second / (1 - 0.999 ** len(rates))).sqrt()
                    weight -= rate * first / (1 - 0.9 ** len(rates)) / (unbiased + 1e-8)
        classifier.eval()
        torch.empty((), dtype=torch.int64).random_()
        with torch.no_grad():
            predictions = classifier(**encode(valid))["logits"].argmax(-1).tolist()
        labels = [label for _, label in valid]
        hits = sum(p == label == 1 for p, label in zip(predictions, labels, strict=True))
        scores.append(2 * hits / max(1, sum(predictions) + sum(labels)))
        if scores[-1] > max(scores[:-1], default=-1):
            best = predictions
    return rates, scores, best


def test_training_equals_a_plain_loop(model_dirs, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "babyllama.submission")
    data = write_task(tmp_path, "mrpc", n_train=70, solvable=False)
    rates = []
    step = torch.optim.AdamW.step

    def record(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    results = fine_tune(
        model_dirs["Llama"], "mrpc", data, tmp_path / "out",
        seed=7, device="cpu", learning_rate=LR, epochs=6, batch_size=16,
    )  # fmt: skip
    expected_rates, scores, best = naive_fine_tuning(
        model_dirs["Llama"], "mrpc", data, seed=7, epochs=6, batch_size=16
    )
    assert len(rates) == 4 * 6
    np.testing.assert_allclose(rates, expected_rates, rtol=1e-9)
    reported = [float(line.split("f1 ")[1].split(",")[0]) for line in caplog.messages]
    assert reported == pytest.approx(scores, abs=1e-4)
    assert len(set(scores)) > 2
    assert predictions_in(tmp_path / "out", "mrpc") == best
    assert results["best_epoch"] == 1 + scores.index(max(scores))
    assert results["score"] == results["f1"] == pytest.approx(max(scores))


def test_a_solvable_task_is_learned_and_repeated_exactly(model_dirs, tmp_path):
    data = write_task(tmp_path, "rte", n_train=160)
    options = {"device": "cpu", "learning_rate": LR, "epochs": 5}
    first = fine_tune(model_dirs["GPT2"], "rte", data, tmp_path / "a", **options)
    second = fine_tune(model_dirs["GPT2"], "rte", data, tmp_path / "b", **options)
    predictions = predictions_in(tmp_path / "a", "rte")
    assert predictions == predictions_in(tmp_path / "b", "rte")
    assert {**first, "seconds": 0} == {**second, "seconds": 0}

    labels = [label for _, label in read_examples(data / "rte.valid.jsonl", "rte")]
    right = sum(p == label for p, label in zip(predictions, labels, strict=True))
    assert first["accuracy"] == first["score"] == right / 50 > 0.95
    assert first["score_ci95"] == metrics.wilson(right / 50, 50)
    assert (first["metric"], first["epochs"], first["n"]) == ("accuracy", 5, 50)


def test_three_labels_have_an_accuracy_only(model_dirs, tmp_path):
    for split in ("train", "valid"):
        rows = [{"premise": text, "hypothesis": "x", "label": i % 3} for i, text in enumerate("abcdef")]  # fmt: skip
        write_file(tmp_path, f"mnli.{split}.jsonl", "\n".join(map(json.dumps, rows)))
    results = fine_tune(
        model_dirs["GPTJ"], "mnli", tmp_path, tmp_path / "out",
        device="cpu", epochs=1, batch_size=4,
    )  # fmt: skip
    assert set(predictions_in(tmp_path / "out", "mnli")) <= {0, 1, 2}
    assert "f1" not in results


def test_texts_longer_than_the_context_of_gpt2_are_cut(model_dirs, tmp_path):
    for split in ("train", "valid"):
        row = json.dumps({"question": "q", "passage": " ".join(sentences(60)), "label": 0})
        write_file(tmp_path, f"boolq.{split}.jsonl", f"{row}\n{row}\n")
    results = fine_tune(
        model_dirs["GPT2"], "boolq", tmp_path, tmp_path / "out",
        device="cpu", epochs=1, batch_size=2,
    )  # fmt: skip
    assert results["n"] == 2


def test_an_interrupted_or_diverged_task_leaves_older_predictions_alone(
    model_dirs, tmp_path, monkeypatch
):
    data = write_task(tmp_path, "rte", n_train=40)
    old = write_file(tmp_path, "predictions.json", "{}")

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetuning.log, "info", interrupt)  # after the first epoch
        fine_tune(model_dirs["Llama"], "rte", data, tmp_path, device="cpu")
    with pytest.raises(ValueError, match="rte: training diverged"):
        fine_tune(
            model_dirs["Llama"], "rte", data, tmp_path,
            device="cpu", epochs=2, learning_rate=1e30,
        )  # fmt: skip
    assert old.read_text() == "{}"
    assert {path.name for path in tmp_path.iterdir()} == {
        "rte.train.jsonl",
        "rte.valid.jsonl",
        "predictions.json",
    }


def test_too_few_examples_and_missing_input_are_errors(model_dirs, tmp_path):
    data = write_task(tmp_path, "rte", n_train=20)
    with pytest.raises(ValueError, match="20 examples are fewer than a batch of 32"):
        fine_tune(model_dirs["Llama"], "rte", data, tmp_path / "out", device="cpu")
    with pytest.raises(FileNotFoundError, match=r"wsc\.train\.jsonl"):
        fine_tune(model_dirs["Llama"], "wsc", data, tmp_path / "out", device="cpu")
    with pytest.raises(FileNotFoundError, match="no model at"):
        fine_tune(tmp_path / "none", "rte", data, tmp_path / "out", device="cpu", batch_size=8)
    assert not (tmp_path / "out").exists()
