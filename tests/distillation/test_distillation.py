"""Check distillation: the loss, the trainer, the cache of teachers, and runs from a YAML file."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import back_to_checkpoint, build_tiny_model, errors_of, rows_of, timeless, tiny_config
from test_train import chunks

import train
from babyllama.config import check_config
from babyllama.device import compiler_missing, pick_device
from babyllama.distillation.student import DistillationTrainer, distillation_loss, make_slice_loss
from babyllama.distillation.teacher_cache import CachedChunks, cache_folder, write_cache
from babyllama.distillation.teachers import Ensemble, SoftTargets, average_teachers, divergence
from babyllama.planning.checks import check_teacher_exists
from babyllama.training.arguments import training_arguments
from babyllama.training.held_out import evaluate_chunks
from babyllama.training.loss import NextTokenLoss
from babyllama.training.run_log import RunLog

LN2 = math.log(2)
LN3 = math.log(3)


def soft_targets(logits: torch.Tensor, temperature: float = 1.0) -> SoftTargets:
    """Return the probabilities of the complete vocabulary."""
    return SoftTargets((logits / temperature).softmax(-1))


def top_k(targets: SoftTargets, k: int) -> SoftTargets:
    return SoftTargets(*targets.probs.topk(k))


# ---- the loss -----------------------------------------------------------------------------------


def test_the_loss_of_a_worked_example():
    """One chunk of two tokens, a vocabulary of two, T = 2, alpha = 1/4.

    The student's logits are (0, 2 ln 3): p = (1/10, 9/10) at T = 1 and (1/4, 3/4) at T = 2.
    The teacher's probabilities are (1/2, 1/2). The next token is 1: cross-entropy = ln(10/9).
    KL = 1/2 ln(2) + 1/2 ln(2/3) = ln 2 - 1/2 ln 3 = 0.143841.
    loss = 1/4 ln(10/9) + 3/4 x 4 x KL = 0.026340 + 0.431523 = 0.457863.
    """
    student = torch.tensor([[[0.0, 2 * LN3], [5.0, -5.0]]])
    teacher = SoftTargets(torch.tensor([[[0.5, 0.5], [0.9, 0.1]]]))
    assert divergence(student, teacher, 2.0)[0, 0].item() == pytest.approx(LN2 - LN3 / 2, abs=1e-7)
    loss = distillation_loss(student, teacher, torch.tensor([[0, 1]]), temperature=2.0, alpha=0.25)
    assert loss.item() == pytest.approx(0.457863, abs=1e-6)


def test_averages_of_teachers_in_a_worked_example():
    """Average the teachers (0.9, 0.1) and (0.5, 0.5).

    The mean of the probabilities is (0.7, 0.3). The mean of the logits is (3/4, 1/4): odds of 9
    and 1 have the geometric mean 3.
    """
    logits = [torch.tensor([math.log(9), 0.0]), torch.tensor([0.0, 0.0])]
    assert average_teachers(logits, 1.0, "probabilities").tolist() == pytest.approx([0.7, 0.3])
    assert average_teachers(iter(logits), 1.0, "logits").tolist() == pytest.approx([0.75, 0.25])
    # at T = 2 the first teacher's odds are 3: ((3/4 + 1/2) / 2, ...), and sqrt(3) to 1
    assert average_teachers(logits, 2.0, "probabilities").tolist() == pytest.approx([0.625, 0.375])
    first = average_teachers(logits, 2.0, "logits")[0].item()
    assert first == pytest.approx(math.sqrt(3) / (1 + math.sqrt(3)))


def naive_loss_sums(
    student: torch.Tensor,  # logits (B, T, V)
    teacher: torch.Tensor,  # probabilities (B, T, V)
    ids: torch.Tensor,  # (B, T)
    temperature: float,
    includes_last: bool = False,
) -> tuple[float, float]:
    """Return the sums of cross-entropy and of KL, in float64, one position at a time.

    The last position of a chunk has no next token; it can have a KL all the same.
    """
    ce = 0.0
    kl = 0.0
    for b in range(len(ids)):
        for t in range(ids.shape[1] - (not includes_last)):
            q = torch.softmax(student[b, t].double() / temperature, -1)
            pairs = zip(teacher[b, t].tolist(), q.tolist(), strict=True)
            kl += sum(p * (math.log(p) - math.log(x)) for p, x in pairs)
            if t + 1 < ids.shape[1]:
                ce -= math.log(torch.softmax(student[b, t].double(), -1)[ids[b, t + 1]].item())
    return ce, kl


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.0), (2.0, 0.5), (3.5, 1.0)])
def test_the_loss_equals_a_naive_loop(temperature, alpha, reduction):
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(3, 6, 11, generator=generator)
    teacher_logits = 3 * torch.randn(3, 6, 11, generator=generator)
    ids = torch.randint(11, (3, 6), generator=generator)
    targets = soft_targets(teacher_logits, temperature)
    loss = distillation_loss(
        student, targets, ids, temperature=temperature, alpha=alpha, reduction=reduction
    )
    is_batchmean = reduction == "batchmean"
    ce, kl = naive_loss_sums(student, targets.probs, ids, temperature, includes_last=is_batchmean)
    kl_mean = kl / 3 if is_batchmean else kl / (3 * 5)
    expected = alpha * ce / (3 * 5) + (1 - alpha) * temperature**2 * kl_mean
    assert loss.item() == pytest.approx(expected, rel=2e-6)


def test_batchmean_is_the_published_loss():
    """Compute it like timinar/BabyLlama: KLDivLoss(batchmean) on all positions, mean of logits."""
    generator = torch.Generator().manual_seed(1)
    student = 2 * torch.randn(4, 8, 13, generator=generator)
    teachers = [2 * torch.randn(4, 8, 13, generator=generator) for _ in range(2)]
    ids = torch.randint(13, (4, 8), generator=generator)
    ce = torch.nn.CrossEntropyLoss()(student[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    probs = torch.softmax(torch.stack(teachers).mean(0) / 2.0, -1)
    log_probs = torch.log_softmax(student / 2.0, -1)
    kl = torch.nn.KLDivLoss(reduction="batchmean")(log_probs, probs)
    published = 0.5 * ce + 0.5 * kl * 2.0**2
    targets = SoftTargets(average_teachers(teachers, 2.0, "logits"))
    loss = distillation_loss(
        student, targets, ids, temperature=2.0, alpha=0.5, reduction="batchmean"
    )
    assert loss.item() == pytest.approx(published.item(), rel=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
def test_a_student_equal_to_its_teacher_has_no_loss(reduction):
    logits = 5 * torch.randn(2, 7, 50, generator=torch.Generator().manual_seed(2))
    ids = torch.zeros(2, 7, dtype=torch.long)
    targets = soft_targets(logits, 2.0)
    logits.requires_grad_()
    loss = distillation_loss(logits, targets, ids, temperature=2.0, alpha=0.0, reduction=reduction)
    assert abs(loss.item()) < 1e-5
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.abs().max() < 1e-6


def test_tokens_outside_the_top_k_count_as_a_single_outcome():
    """V = 4, K = 2. Teacher (1/2, 1/4, 1/8, 1/8): 1/2, 1/4, rest 1/4. Student: 1/4, 1/4, rest 1/2.

    KL = 1/2 ln 2 + 1/4 ln 1 + 1/4 ln(1/2) = 1/4 ln 2. The KL of all tokens is 1/2 ln 2 - 1/4 ln 2,
    which is the same, because student and teacher divide the rest alike. If the teacher divides it
    into (3/16, 1/16), the KL of all tokens is larger.
    """
    student = torch.zeros(1, 1, 4)
    even = SoftTargets(torch.tensor([[[1 / 2, 1 / 4, 1 / 8, 1 / 8]]]))
    assert divergence(student, top_k(even, 2), 1.0).item() == pytest.approx(LN2 / 4)
    assert divergence(student, even, 1.0).item() == pytest.approx(LN2 / 4)
    uneven = SoftTargets(torch.tensor([[[1 / 2, 1 / 4, 3 / 16, 1 / 16]]]))
    gap = divergence(student, uneven, 1.0) - divergence(student, top_k(uneven, 2), 1.0)
    # the probability of the rest x the KL within the rest
    expected = 3 / 16 * math.log(3 / 2) + 1 / 16 * math.log(1 / 2)
    assert gap.item() == pytest.approx(expected)


def test_top_k_of_the_complete_vocabulary_changes_nothing():
    generator = torch.Generator().manual_seed(3)
    student = 4 * torch.randn(2, 9, 300, generator=generator)
    teacher = 4 * torch.randn(2, 9, 300, generator=generator)
    ids = torch.randint(300, (2, 9), generator=generator)
    losses = []
    gradients = []
    for targets in (soft_targets(teacher, 2.0), top_k(soft_targets(teacher, 2.0), 300)):
        logits = student.clone().requires_grad_()
        loss = distillation_loss(logits, targets, ids, temperature=2.0, alpha=0.5)
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, logits)[0])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert torch.allclose(*gradients, atol=1e-8)


def test_a_confident_student_keeps_finite_gradients():
    """The rest's probability is 1e-30: 1 - sum of the others would be 0 in float32."""
    student = torch.tensor([[[70.0, 0.0, 0.0], [0.0, 0.0, 0.0]]], requires_grad=True)
    targets = SoftTargets(torch.tensor([[[0.9], [1.0]]]), torch.tensor([[[0], [0]]]))
    loss = distillation_loss(student, targets, torch.zeros(1, 2).long(), temperature=1.0, alpha=0.0)
    loss.backward()
    expected = 0.9 * math.log(0.9) + 0.1 * (math.log(0.1) + 70 - LN2)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    # q - p, if p divides the rest like q does
    assert student.grad[0, 0].tolist() == pytest.approx([0.1, -0.05, -0.05])


@pytest.mark.parametrize("k", [None, 5, 40])
@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
def test_slice_loss_equals_the_definition_with_its_gradient(k, reduction):
    """Compute two slices of one step; the logits stay unchanged."""
    generator = torch.Generator().manual_seed(4)
    student = 4 * torch.randn(3, 7, 40, generator=generator)
    teacher = 4 * torch.randn(3, 7, 40, generator=generator)
    ids = torch.randint(40, (3, 7), generator=generator)
    targets = soft_targets(teacher, 2.0)
    if k is not None:
        targets = top_k(targets, k)
    leaf = student.clone().requires_grad_()
    expected = distillation_loss(
        leaf, targets, ids, temperature=2.0, alpha=0.3, reduction=reduction
    )
    (expected_gradient,) = torch.autograd.grad(expected, leaf)

    section = {"temperature": 2.0, "alpha": 0.3, "reduction": reduction, "average": "logits"}
    student_loss = make_slice_loss(section, 7, cached=k is not None)
    next_ids = torch.cat([ids[:, 1:], ids.new_full((3, 1), -1)], 1)
    labels = [teacher] if k is None else [targets.probs, targets.ids]
    before = student.clone()
    total = 0.0
    for rows in (slice(0, 2), slice(2, 3)):
        parts = [part[rows].flatten(0, 1) for part in (student, next_ids, *labels)]
        sums, gradient, scale = student_loss(*parts)
        total += sums[0].item() / (3 * 6)
        gradient = (gradient * scale).view(-1, 7, 40) / (3 * 6)
        assert torch.allclose(gradient, expected_gradient[rows], atol=2e-7)
    assert total == pytest.approx(expected.item(), rel=1e-6)
    assert torch.equal(student, before)


# ---- the trainer --------------------------------------------------------------------------------


def two_teachers(average: str = "probabilities") -> Ensemble:
    models = [build_tiny_model("GPT2", seed=1), build_tiny_model("Llama", seed=2)]
    return Ensemble(models, 2.0, average)


def make_trainer(
    folder: Path, rows, ensemble: Ensemble | None, distillation=None, loss=None, **training
) -> DistillationTrainer:
    """Return a trainer of a tiny student; without an ensemble, `rows` have cached targets."""
    config = check_config(tiny_config(folder, folder, folder))
    config["training"] |= {"num_epochs": 1, "lr_scheduler": "constant", **training}
    section = {"temperature": 2.0, "alpha": 0.5, "reduction": "mean", "average": "probabilities"}
    if ensemble:
        section["average"] = ensemble.average
        for teacher in ensemble.models:
            teacher.to(pick_device())
    return DistillationTrainer(
        model=build_tiny_model("Llama").train(),
        args=training_arguments(config, folder, "fp32"),
        train_dataset=rows,
        eval_dataset=chunks(2),
        byte_lengths=np.ones(400, dtype=np.int64),
        callbacks=[RunLog(folder / "metrics.jsonl", 1.0, 1.0, 1.0)],
        training=config["training"],
        loss=loss or NextTokenLoss(),
        ensemble=ensemble,
        distillation=section | (distillation or {}),
    )


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
def test_uneven_accumulation_equals_one_large_batch(tmp_path, reduction):
    """7 chunks as 3 + 3 + 1 have the loss of a naive loop over all 7; the log has its parts."""
    rows = chunks(7)
    for batch_size, accumulation in ((3, 3), (7, 1)):
        trainer = make_trainer(
            tmp_path / str(batch_size),
            rows,
            two_teachers(),
            distillation={"reduction": reduction},
            batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()

    ids = torch.tensor(np.stack([row["input_ids"] for row in rows]).astype(np.int64))
    with torch.no_grad():
        student = build_tiny_model("Llama")(input_ids=ids).logits
        teacher_logits = [model(input_ids=ids).logits for model in two_teachers().models]
    teacher = sum((logits.double() / 2).softmax(-1) for logits in teacher_logits) / 2
    is_batchmean = reduction == "batchmean"
    ce, kl = naive_loss_sums(student, teacher, ids, 2.0, includes_last=is_batchmean)
    kl_mean = kl / 7 if is_batchmean else kl / (7 * 31)
    for name in ("3", "7"):
        row = rows_of(tmp_path / name)[0]
        assert row["ce_loss"] == pytest.approx(ce / (7 * 31), rel=1e-5)
        assert row["kd_loss"] == pytest.approx(kl / (7 * 31), rel=1e-4)
        assert row["loss"] == pytest.approx(0.5 * ce / (7 * 31) + 0.5 * 4 * kl_mean, rel=1e-4)


def test_evaluation_ignores_the_teachers(tmp_path):
    trainer = make_trainer(tmp_path, chunks(4), two_teachers())
    expected = evaluate_chunks(build_tiny_model("Llama"), chunks(2), trainer.byte_lengths, 8)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected["loss"], rel=1e-7)


def test_the_student_approaches_its_teacher(tmp_path):
    teacher = build_tiny_model("GPT2", seed=1)
    with torch.no_grad():
        teacher.lm_head.weight *= 20  # far from uniform
    trainer = make_trainer(
        tmp_path,
        chunks(32),
        Ensemble([teacher], 1.0, "logits"),
        distillation={"alpha": 0.0, "temperature": 1.0},
        num_epochs=15,
        gradient_accumulation_steps=1,
    )
    weights = [p.detach().cpu().clone() for p in teacher.parameters()]
    trainer.train()
    losses = [row["kd_loss"] for row in rows_of(tmp_path) if "kd_loss" in row]
    assert losses[-1] < 0.7 * losses[0]
    for before, after in zip(weights, teacher.parameters(), strict=True):
        assert torch.equal(before, after.cpu())
        assert after.grad is None


# ---- the cache ----------------------------------------------------------------------------------


def make_key(k: int, **changes) -> dict:
    """Return a key, as cache_key does."""
    return {
        "data": "some text",
        "teachers": [{"path": "a", "sha256": "1"}, {"path": "b", "sha256": "2"}],
        "temperature": 2.0,
        "average": "probabilities",
        "top_k": k,
        "dtype": "float32",
        **changes,
    }


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_training_from_a_cache_of_the_complete_vocabulary_changes_nothing(tmp_path, average):
    rows = chunks(9)
    cache = tmp_path / "cache"
    ensemble = two_teachers(average)
    key = make_key(400, average=average)
    write_cache(cache, key, rows, ensemble, build_tiny_model("Llama"), 4)
    make_trainer(tmp_path / "complete", rows, ensemble).train()
    make_trainer(tmp_path / "cached", CachedChunks(rows, cache), None).train()
    complete = rows_of(tmp_path / "complete")[0]
    cached = rows_of(tmp_path / "cached")[0]
    assert complete["loss"] == pytest.approx(cached["loss"], abs=1e-6)
    assert complete["kd_loss"] == pytest.approx(cached["kd_loss"], abs=1e-6)
    about = json.loads((cache / "about.json").read_text())
    assert about["dropped_mass"] < 1e-6
    assert about["sample_kl"] == pytest.approx(about["sample_kl_cached"], abs=1e-6)


@pytest.mark.skipif(compiler_missing() is not None, reason="needs a compiler")
@pytest.mark.parametrize("is_cached", [False, True])
def test_compiled_training_has_the_same_losses(tmp_path, is_cached):
    """Two full batches, which are compiled, and a last one of a single chunk, which is not."""
    rows = chunks(7)
    ensemble = two_teachers()
    if is_cached:
        cache = tmp_path / "cache"
        write_cache(cache, make_key(40), rows, ensemble, build_tiny_model("Llama"), 4)
        rows = CachedChunks(rows, cache)
        ensemble = None

    def first_row(name: str, compiled: bool) -> dict:
        trainer = make_trainer(
            tmp_path / name,
            rows,
            ensemble,
            loss=NextTokenLoss(batch_size=3, compile=compiled),
            batch_size=3,
            gradient_accumulation_steps=3,
        )
        trainer.train()
        return rows_of(tmp_path / name)[0]

    plain = first_row("plain", compiled=False)
    compiled = first_row("compiled", compiled=True)
    for key in ("loss", "ce_loss", "kd_loss", "grad_norm"):
        assert compiled[key] == pytest.approx(plain[key], rel=1e-4)


@pytest.mark.parametrize("document_bos_id", [None, 1])
def test_the_measured_error_respects_the_document_mask(tmp_path, document_bos_id):
    """A student that is the teacher has no error, with and without a mask."""
    rows = chunks(3)
    for row in rows:
        row["input_ids"][[0, 9, 20]] = 1
    model = build_tiny_model("Llama")
    ensemble = Ensemble([model], 2.0, "probabilities", document_bos_id)
    write_cache(tmp_path / "cache", make_key(400), rows, ensemble, model, 2)
    about = json.loads((tmp_path / "cache" / "about.json").read_text())
    assert about["sample_kl"] == pytest.approx(0, abs=1e-6)


def test_the_cache_holds_the_likeliest_tokens_and_its_measured_error(tmp_path):
    rows = chunks(5)
    cache = tmp_path / "cache"
    student = build_tiny_model("Llama")
    write_cache(cache, make_key(20), rows, two_teachers(), student, 2)
    cached = CachedChunks(rows, cache)
    dropped_masses = []
    gaps = []  # between the KL of all tokens and of the cached ones
    for i, row in enumerate(rows):
        ids = torch.tensor(row["input_ids"].astype(np.int64))[None]
        probs = two_teachers().targets(two_teachers().logits(ids)).probs[0].double()  # (T, V)
        top_ids = probs.argsort(-1, descending=True)[:, :20]  # (T, K)
        assert set(map(tuple, cached[i]["top_ids"])) == set(map(tuple, top_ids.tolist()))
        assert np.allclose(cached[i]["top_probs"], probs.gather(-1, top_ids), atol=1e-7)
        with torch.no_grad():
            student_probs = (student(input_ids=ids).logits[0].double() / 2).softmax(-1)  # (T, V)
        positions = zip(probs.tolist(), student_probs.tolist(), top_ids.tolist(), strict=True)
        for p, q, kept in positions:
            dropped_masses.append(1 - sum(p[j] for j in kept))
            rest = [j for j in range(400) if j not in kept]
            p_rest = sum(p[j] for j in rest)
            q_rest = sum(q[j] for j in rest)
            gaps.append(sum(p[j] * math.log(p[j] / p_rest / q[j] * q_rest) for j in rest))
    about = json.loads((cache / "about.json").read_text())
    assert about["dropped_mass"] == pytest.approx(np.mean(dropped_masses), rel=1e-5)
    assert about["sample_chunks"] == 5
    gap = about["sample_kl"] - about["sample_kl_cached"]
    assert gap == pytest.approx(np.mean(gaps), rel=1e-3, abs=2e-6)
    assert about["bytes"] == 5 * 32 * 20 * 6 == cached.ids.nbytes + cached.probs.nbytes


class InterruptedChunks(list):
    """Chunks of which the fifth raises Ctrl-C."""

    def __getitem__(self, index):
        if index == 4:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def test_an_interrupted_cache_leaves_no_files(tmp_path):
    rows = InterruptedChunks(chunks(6))
    student = build_tiny_model("Llama")
    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path / "cache", make_key(8), rows, two_teachers(), student, 3)
    assert not list(tmp_path.iterdir())


def test_too_little_disk_space_is_an_error_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 999, 1))
    student = build_tiny_model("Llama")
    message = r"8 best tokens for 6 chunks take 0.0 GB.*a smaller distillation.top_k"
    with pytest.raises(ValueError, match=message):
        write_cache(tmp_path / "cache", make_key(8), chunks(6), two_teachers(), student, 3)


def test_a_truncated_cache_is_an_error(tmp_path):
    cache = tmp_path / "cache"
    write_cache(cache, make_key(8), chunks(6), two_teachers(), build_tiny_model("Llama"), 3)
    probs = cache / "top_probs.npy"
    probs.write_bytes(probs.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cache is corrupted .*delete it"):
        CachedChunks(chunks(6), cache)


def test_the_cache_is_keyed_by_content():
    """Paths and the order of the teachers do not matter; everything else does."""
    key = cache_folder(make_key(8))
    moved = [{"path": "elsewhere", "sha256": "2"}, {"path": "a", "sha256": "1"}]
    assert cache_folder(make_key(8, teachers=moved)) == key
    retrained = [{"path": "a", "sha256": "9"}, {"path": "b", "sha256": "2"}]
    changed_keys = [
        make_key(9),
        make_key(8, teachers=retrained),
        make_key(8, data="other"),
        make_key(8, temperature=1.0),
        make_key(8, average="logits"),
        make_key(8, dtype="bfloat16"),
    ]
    keys = {key, *map(cache_folder, changed_keys)}
    assert len(keys) == 7


# ---- from a YAML file ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, tokenizer) -> list[str]:
    """Return the paths of two saved teachers of different architecture."""
    root = tmp_path_factory.mktemp("teachers")
    for kind, seed in (("GPT2", 5), ("Llama", 6)):
        build_tiny_model(kind, seed=seed).save_pretrained(root / kind)
        tokenizer.save_pretrained(root / kind)
    return [str(root / "GPT2"), str(root / "Llama")]


@pytest.fixture
def local_teachers(tmp_path, teachers) -> list[str]:
    """Return copies of the teachers that a test may change."""
    shutil.copytree(Path(teachers[0]).parent, tmp_path / "teachers")
    return [str(tmp_path / "teachers" / Path(path).name) for path in teachers]


@pytest.fixture
def config_file(tmp_path, tokenizer_file, corpus_dir, teachers, monkeypatch):
    """Return a function that writes a config with a distillation section and returns its path."""
    monkeypatch.setenv("BABYLLAMA_CACHE", str(tmp_path / "cache"))

    def write(distillation: dict | None = None, **changes) -> Path:
        config = tiny_config(tmp_path, tokenizer_file, corpus_dir, **changes)
        # the tokenizer has fewer tokens, the teachers score 400
        config["model"]["vocab_size"] = 400
        config["distillation"] = {"teachers": teachers, **(distillation or {})}
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
        return tmp_path / "tiny.yaml"

    return write


def caches(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").glob("teachers-*"))


@pytest.mark.parametrize("cache", ["none", "top_k"])
def test_resume_is_exact(cache, config_file, tmp_path, capsys):
    path = config_file({"cache": cache}, model__type="GPT2", model__resid_pdrop=0.1)
    run_dir = tmp_path / "models" / "tiny"
    assert train.main(["--config", str(path)]) == 0
    out = capsys.readouterr().out
    assert "average of the teachers' probabilities (reduction mean" in out
    assert ("dropped mass 0." in out) == (cache == "top_k")
    weights = (run_dir / "model.safetensors").read_bytes()
    rows = rows_of(run_dir)
    back_to_checkpoint(run_dir)
    assert train.main(["--config", str(path), "--resume-from-checkpoint", "latest"]) == 0
    assert (run_dir / "model.safetensors").read_bytes() == weights
    assert timeless(rows_of(run_dir)) == timeless(rows)

    card = (run_dir / "README.md").read_text()
    assert "learned from the distributions of 2 teachers" in card
    assert ": 0.5 x cross-entropy + 0.5 x 2^2 x KL" in card
    assert len(json.loads((run_dir / "data_report.json").read_text())["teachers"]) == 2


def test_alpha_one_equals_training_without_teachers(config_file, tmp_path):
    path = config_file({"alpha": 1.0}, training__num_epochs=1)
    assert train.main(["--config", str(path), "--model-name", "with"]) == 0
    config = yaml.safe_load(path.read_text())
    del config["distillation"]
    path.write_text(yaml.safe_dump(config))
    assert train.main(["--config", str(path), "--model-name", "without"]) == 0

    def losses_of(name: str) -> list[float]:
        losses = []
        for row in rows_of(tmp_path / "models" / name):
            losses += [row[key] for key in ("loss", "eval_loss") if key in row]
        return losses

    # Adam amplifies a gradient that is nothing but rounding
    assert losses_of("with") == pytest.approx(losses_of("without"), abs=1e-4)


def test_a_second_run_uses_the_cache_of_the_same_teachers(
    config_file, tmp_path, local_teachers, capsys
):
    section = {"teachers": local_teachers, "cache": "top_k", "top_k": 50}
    path = config_file(section, training__num_epochs=1)
    assert train.main(["--config", str(path)]) == 0
    weights = (tmp_path / "models" / "tiny" / "model.safetensors").read_bytes()
    (cache,) = caches(tmp_path)
    write_time = (cache / "top_probs.npy").stat().st_mtime_ns
    assert train.main(["--config", str(path), "--model-name", "second"]) == 0
    assert (tmp_path / "models" / "second" / "model.safetensors").read_bytes() == weights
    assert caches(tmp_path) == [cache]
    assert (cache / "top_probs.npy").stat().st_mtime_ns == write_time

    # a retrained teacher gets a new cache, and resuming with it is an error
    build_tiny_model("GPT2", seed=77).save_pretrained(local_teachers[0])
    assert train.main(["--config", str(path), "--overwrite"]) == 0
    assert len(caches(tmp_path)) == 2
    build_tiny_model("GPT2", seed=78).save_pretrained(local_teachers[0])
    assert train.main(["--config", str(path), "--resume-from-checkpoint", "latest"]) == 2
    assert "data: the text, the tokenizer or a teacher has changed" in errors_of(capsys)[0]


def test_resume_refuses_another_distillation_section(config_file, teachers, capsys):
    path = config_file(training__num_epochs=1)
    assert train.main(["--config", str(path)]) == 0
    assert train.main(["--config", str(path)]) == 0
    assert "already trained" in capsys.readouterr().out
    for key, value in (("teachers", teachers[:1]), ("alpha", 0.25), ("cache", "top_k")):
        path = config_file({key: value})
        assert train.main(["--config", str(path), "--resume-from-checkpoint", "latest"]) == 2
        assert f"distillation.{key}: was" in errors_of(capsys)[0]


def test_dry_run_names_the_teachers_and_writes_nothing(config_file, tmp_path, teachers, capsys):
    path = config_file({"cache": "top_k", "alpha": 0.2})
    assert train.main(["--config", str(path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert all(teacher in out for teacher in teachers)
    assert "0.2 x cross-entropy + 0.8 x 2^2 x KL at temperature 2" in out
    assert not (tmp_path / "models").exists()
    assert not caches(tmp_path)


# ---- errors -------------------------------------------------------------------------------------


def test_a_run_does_not_overwrite_its_teacher(config_file, tmp_path, capsys):
    """A teacher in the run's directory is an error, and the directory stays unchanged."""
    assert train.main(["--config", str(config_file({"cache": "none"}))]) == 0
    run_dir = next((tmp_path / "models").iterdir())

    def read_files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}

    before = read_files()
    for teacher in (run_dir, next(run_dir.glob("checkpoint-*"))):
        path = config_file({"cache": "none", "teachers": [str(teacher)]})
        assert train.main(["--config", str(path), "--overwrite"]) == 2
        message = (
            f"{teacher}: this teacher (distillation.teachers) is in the run's output directory"
        )
        assert message in errors_of(capsys)[0]
    assert read_files() == before


def test_a_missing_teacher_is_an_error_with_the_command_that_trains_it(
    config_file, tmp_path, capsys
):
    for cache in ("none", "top_k"):
        path = config_file({"teachers": ["models/gpt2-705M"], "cache": cache})
        for flags in ([], ["--dry-run"]):
            assert train.main(["--config", str(path), *flags]) == 2
            (line,) = errors_of(capsys)
            assert "models/gpt2-705M: no trained model here (distillation.teachers)" in line
            assert line.endswith("train it first: python train.py --config config/gpt2-705M.yaml")
    assert train.main(["--config", str(config_file({"teachers": ["nowhere/at-all"]}))]) == 2
    assert "needs config.json and .safetensors" in errors_of(capsys)[0]
    assert not (tmp_path / "models").exists()


@pytest.fixture
def local_teacher(local_teachers) -> Path:
    """Return a copy of the Llama teacher that a test may change."""
    return Path(local_teachers[1])


def test_another_vocabulary_of_the_same_size_is_an_error(config_file, local_teacher, capsys):
    """Swap the ids of two tokens."""
    path = local_teacher / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    a, b = sorted(vocabulary, key=vocabulary.get)[300:302]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(content))
    config_path = config_file({"teachers": [str(local_teacher)]})
    assert train.main(["--config", str(config_path)]) == 2
    (line,) = errors_of(capsys)
    reason = "does not fit the student: another vocabulary: 2 tokens differ"
    assert f"teacher {local_teacher}: {reason}" in line
    assert f"the first is {a!r} (id 301 instead of 300)" in line
    assert not (config_path.parent / "cache").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("max_position_embeddings", 16, "its context is 16 tokens, less than data.seq_length (32)"),
        ("eos_token_id", 7, "its eos token is 7, the student's is 2"),
        ("vocab_size", 448, "it scores 448 tokens, the student 400: set model.vocab_size"),
        ("model_type", "nonesuch", "its config.json cannot be read"),
    ],
)
def test_a_teacher_that_does_not_fit_is_an_error(
    config_file, local_teacher, capsys, key, value, message
):
    content = json.loads((local_teacher / "config.json").read_text())
    (local_teacher / "config.json").write_text(json.dumps({**content, key: value}))
    assert train.main(["--config", str(config_file({"teachers": [str(local_teacher)]}))]) == 2
    (line,) = errors_of(capsys)
    assert f"teacher {local_teacher}: " in line
    assert message in line


def test_other_special_tokens_of_a_teacher_are_an_error(config_file, local_teacher, capsys):
    content = json.loads((local_teacher / "tokenizer.json").read_text())
    content["added_tokens"][2]["special"] = False
    (local_teacher / "tokenizer.json").write_text(json.dumps(content))
    assert train.main(["--config", str(config_file({"teachers": [str(local_teacher)]}))]) == 2
    assert "its special tokens are" in errors_of(capsys)[0]


def test_a_cache_for_chunks_with_random_offsets_is_an_error(config_file, capsys):
    path = config_file({"cache": "top_k"}, data__random_offset=True)
    assert train.main(["--config", str(path)]) == 2
    (line,) = errors_of(capsys)
    assert "distillation.cache: top_k caches the teachers' predictions for fixed chunks" in line
    assert "fixed chunks, but data.random_offset" in line


def test_a_top_k_above_the_vocabulary_is_an_error(config_file, capsys):
    assert train.main(["--config", str(config_file({"cache": "top_k", "top_k": 401}))]) == 2
    assert "top_k: 401 is more than the vocabulary's 400 tokens" in errors_of(capsys)[0]


def test_an_empty_list_of_teachers_is_an_error(config_file, capsys):
    assert train.main(["--config", str(config_file({"teachers": []}))]) == 2
    message = "distillation.teachers: [] is not allowed; a list of 1 or more texts"
    assert message in errors_of(capsys)[0]


def test_the_shipped_recipe_is_the_published_one():
    config = train.load_config(Path(train.__file__).parent / "config" / "distill-58M.yaml")
    section = config["distillation"]
    assert section["temperature"] == 2.0
    assert section["alpha"] == 0.5
    assert section["average"] == "logits"
    assert section["reduction"] == "batchmean"
    for teacher in section["teachers"]:
        with pytest.raises(FileNotFoundError, match=f"config/{Path(teacher).name}.yaml"):
            check_teacher_exists(teacher)
