"""What two processes do together, on a CPU with gloo: run by tests/training/test_distributed.py as `torchrun ... two_processes.py`.

Every assertion holds in both processes; the test reads what train.py left on disk.
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
from babyllama.training import distillation, distributed, trainer
from babyllama.training.run_dir import RESULTS, checkpoints


def on_main(act):
    """Let rank 0 alone change files, and the other wait."""
    if distributed.is_main():
        act()
    distributed.barrier()


def back_to(run_dir: Path, step: int) -> None:
    """A run directory as it was after its checkpoint of this step; what it was in the end goes to <name>-before."""
    shutil.copytree(run_dir, run_dir.with_name(run_dir.name + "-before"))
    for folder in checkpoints(run_dir):
        if folder.name != f"checkpoint-{step}":
            shutil.rmtree(folder)
    for name in RESULTS:
        (run_dir / name).unlink(missing_ok=True)


def train_and_resume(config: str, name: str, *flags: str) -> None:
    arguments = ["--config", config, "--model-name", name, *flags]
    assert train.main(arguments) == 0
    on_main(lambda: back_to(Path(os.environ["MODELS"]) / name, 14))
    assert train.main([*arguments, "--resume_from_checkpoint", "latest"]) == 0


def in_turn(path: Path) -> None:
    with distributed.main_first():
        if distributed.is_main():
            path.write_text("prepared")
        assert path.read_text() == "prepared"
    for guilty, said in ((0, "no text"), (1, "rank 1: no text")):
        with pytest.raises(distributed.OtherRankError, match=f"^{said}$"), distributed.main_first():
            if distributed.rank() == guilty:
                raise FileNotFoundError("no text")
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        distributed.print_error(distributed.OtherRankError("of all"))
        distributed.print_error(ValueError("of one"))
    assert (
        error.getvalue()
        == ["error: of all\nerror: of one\n", "error: rank 1: of one\n"][distributed.rank()]
    )


def evaluation() -> None:
    model, lengths = build_tiny_model("Llama"), torch.arange(400)
    rows = [
        {"input_ids": row}
        for row in np.random.default_rng(0).integers(3, 400, (11, 32)).astype(np.uint16)
    ]
    for n in (11, 8, 1):
        alone = trainer.evaluate_chunks(model, rows[:n], lengths, 2)
        together = trainer.evaluate_chunks(model, rows[:n], lengths, 2, together=True)
        assert together == pytest.approx(alone, rel=1e-6), n
        assert (together["tokens"], together["bytes"]) == (alone["tokens"], alone["bytes"])


def nan_of_one(config: str, name: str) -> None:
    """A loss that is NaN in process 1 alone ends both, at the same step, with code 2."""

    class Bad(trainer.LMTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return loss * (
                float("nan") if distributed.rank() == 1 and self.state.global_step == 2 else 1.0
            )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "LMTrainer", Bad)  # where train.py takes it from
        assert train.main(["--config", config, "--model-name", name]) == 2


def sharded(config: str, name: str) -> None:
    """FSDP. accelerate has it for GPUs only, but the GPUs are not what it needs: let it take this CPU for one."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.tensor import DTensor

    def backend(self, *args):
        self.device = torch.device("cpu")
        return "gloo", DistributedType.MULTI_GPU

    held, losses = [], []

    class Spy(trainer.LMTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.dtype)
            return loss

        def best_model(self):
            held.extend(
                (p.numel(), p.to_local().numel())
                for p in self.model.parameters()
                if isinstance(p, DTensor)
            )
            return super().best_model()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartialState, "_prepare_backend", backend)
        patch.setattr(distributed, "require_gpus", lambda: None)
        patch.setattr(distillation, "LMTrainer", Spy)
        train_and_resume(config, name, "--set", "training.fsdp=true")
        half = ["--bf16", "--set", "training.fsdp=true", "--set", "training.max_steps=2"]
        assert train.main(["--config", config, "--model-name", f"{name}-half", *half]) == 0
    assert set(losses) == {torch.float32}
    whole, here = (sum(column) for column in zip(*held, strict=True))
    assert 0.4 < here / whole < 0.6, "each process should hold one half of the weights"


def main(config: str, folder: str) -> None:
    os.environ["MODELS"] = f"{folder}/models"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "stop", lambda: None)  # several runs in one pair of processes
        distributed.start()
        in_turn(Path(folder) / "prepared")
        evaluation()
        train_and_resume(config, "llama")
        seldom = [
            "--set",
            "training.logging_steps=1000",
        ]  # each checkpoint has a row, which all processes gather
        assert train.main(["--config", config, "--model-name", "seldom", *seldom]) == 0
        train_and_resume(
            config, "gpt2", "--set", "model.type=GPT2", "--set", "model.resid_pdrop=0.1"
        )
        assert (
            train.main(["--config", config, "--model-name", "no", "--set", "training.fsdp=true"])
            == 2
        )
        nan_of_one(config, "nan")
        sharded(config, "fsdp")
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
