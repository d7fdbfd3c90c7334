"""Train in two processes on a CPU: test_distributed.py runs `torchrun ... two_processes.py`.

Both processes check every assertion; the test then reads what train.py wrote.
"""

import contextlib
import io
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_tiny_model

import train
from babyllama import distributed
from babyllama.planning import checks
from babyllama.runs.checkpoints import checkpoints
from babyllama.runs.run_dir import RESULTS
from babyllama.training import trainer
from babyllama.training.held_out import TokenDomains, evaluate_chunks


def on_main(act):
    """Call `act` in rank 0, which changes files, while the other waits."""
    if distributed.is_main():
        act()
    distributed.barrier()


def rewind(run_dir: Path, step: int) -> None:
    """Copy a finished run to <name>-before, and reset it to its checkpoint of this step."""
    shutil.copytree(run_dir, run_dir.with_name(run_dir.name + "-before"))
    for folder in checkpoints(run_dir):
        if folder.name != f"checkpoint-{step}":
            shutil.rmtree(folder)
    for name in RESULTS:
        (run_dir / name).unlink(missing_ok=True)


def train_and_resume(config: str, name: str, *flags: str) -> None:
    arguments = ["--config", config, "--model-name", name, *flags]
    assert train.main(arguments) == 0
    on_main(lambda: rewind(Path(os.environ["MODELS"]) / name, 14))
    assert train.main([*arguments, "--resume-from-checkpoint", "latest"]) == 0


def check_main_first(path: Path) -> None:
    with distributed.main_first():
        if distributed.is_main():
            path.write_text("prepared")
        assert path.read_text() == "prepared"
    for failing_rank, message in ((0, "no text"), (1, "rank 1: no text")):
        raises = pytest.raises(distributed.OtherRankError, match=f"^{message}$")
        with raises, distributed.main_first():
            if distributed.rank() == failing_rank:
                raise FileNotFoundError("no text")
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        distributed.print_error(distributed.OtherRankError("in all ranks"))
        distributed.print_error(ValueError("in one rank"))
    expected = ["error: in all ranks\nerror: in one rank\n", "error: rank 1: in one rank\n"]
    assert error.getvalue() == expected[distributed.rank()]


def check_evaluation() -> None:
    model, lengths = build_tiny_model("Llama"), torch.arange(400)
    rows = [
        {"input_ids": row}
        for row in np.random.default_rng(0).integers(3, 400, (11, 32)).astype(np.uint16)
    ]
    sources = [{"domain": "a", "tokens": 20}, {"domain": "b", "tokens": 11 * 32 - 20}]
    for n in (11, 8, 1):
        domains = TokenDomains(sources, np.arange(n), 32)
        alone = evaluate_chunks(model, rows[:n], lengths, 2, domains=domains)
        together = evaluate_chunks(model, rows[:n], lengths, 2, across_ranks=True, domains=domains)
        alone_by_domain = alone.pop("by_domain")
        together_by_domain = together.pop("by_domain")
        assert list(together_by_domain) == list(alone_by_domain) == ["a", "b"]
        for name, scores in alone_by_domain.items():
            assert together_by_domain[name] == pytest.approx(scores, rel=1e-6), (n, name)
        assert together == pytest.approx(alone, rel=1e-6), n
        assert (together["tokens"], together["bytes"]) == (alone["tokens"], alone["bytes"])


def check_nan_in_one_process(config: str, name: str) -> None:
    """A loss that is NaN in rank 1 only ends both ranks at the same step, with code 2."""

    class Bad(trainer.LMTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if distributed.rank() == 1 and self.state.global_step == 2:
                return loss * float("nan")
            return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "LMTrainer", Bad)  # where train.py takes it from
        assert train.main(["--config", config, "--model-name", name]) == 2


def check_fsdp(config: str, name: str) -> None:
    """Train with FSDP, which accelerate offers for GPUs only: let it take the CPU for one."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.tensor import DTensor

    def backend(self, *args):
        self.device = torch.device("cpu")
        return "gloo", DistributedType.MULTI_GPU

    sizes = []  # (elements of a weight, elements in this process)
    loss_dtypes = []

    class Spy(trainer.LMTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            loss_dtypes.append(loss.dtype)
            return loss

        def best_model(self):
            shards = [p for p in self.model.parameters() if isinstance(p, DTensor)]
            sizes.extend((p.numel(), p.to_local().numel()) for p in shards)
            return super().best_model()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartialState, "_prepare_backend", backend)
        patch.setattr(checks, "require_gpus", lambda: None)
        patch.setattr(trainer, "LMTrainer", Spy)
        train_and_resume(config, name, "--set", "training.fsdp=true")
        half = ["--bf16", "--set", "training.fsdp=true", "--set", "training.max_steps=2"]
        assert train.main(["--config", config, "--model-name", f"{name}-half", *half]) == 0
    assert set(loss_dtypes) == {torch.float32}
    total, local = (sum(column) for column in zip(*sizes, strict=True))
    assert 0.4 < local / total < 0.6, "each process should hold half of the weights"


def main(config: str, folder: str) -> None:
    os.environ["MODELS"] = f"{folder}/models"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "stop", lambda: None)  # several runs in one pair of processes
        distributed.start()
        check_main_first(Path(folder) / "prepared")
        distributed.connect()
        check_evaluation()
        train_and_resume(config, "llama")
        # every checkpoint has a row in the log, for which all processes gather the loss
        rare_rows = ["--model-name", "rare-rows", "--set", "training.logging_steps=1000"]
        rare_rows += ["--set", f"training.benchmark={folder}/tasks.yaml"]
        assert train.main(["--config", config, *rare_rows]) == 0
        dropout = ["--set", "model.type=GPT2", "--set", "model.resid_pdrop=0.1"]
        train_and_resume(config, "gpt2", *dropout)
        fsdp_on_cpus = ["--model-name", "no-gpus", "--set", "training.fsdp=true"]
        assert train.main(["--config", config, *fsdp_on_cpus]) == 2
        check_nan_in_one_process(config, "nan")
        check_fsdp(config, "fsdp")
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
