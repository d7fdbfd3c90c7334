"""Train as train.py does, in one plain loop. If you are new here, read this file first.

    python experiments/plain_loop.py --config config/quickstart.yaml --set training.max_steps=20

Run `make quickstart` first: it writes the text and the tokenizer. This is the path from a text file
to the updates of the weights, and nothing else: one device, float32 (but Muon orthogonalizes in
bf16 if the hardware is faster in it), and no Trainer, evaluation, checkpoint, cache or compilation.
It ignores the keys of features it lacks, such as random_offset, document_mask, ema, max_minutes and
distillation. The losses of LMTrainer on a CPU are the same to the last bit with
training.precision=fp32, chunked_loss=false and compile=false; a test compares them.
"""

from __future__ import annotations

import argparse
import math
import sys

import common  # noqa: F401  (puts the repository on sys.path)
import torch
import torch.nn.functional as F

from babyllama.cli import Parser, run_script
from babyllama.data.documents import read_documents
from babyllama.data.text_files import find_files
from babyllama.data.tokenizer import load_tokenizer
from babyllama.device import pick_device
from babyllama.training.optimizers import make_optimizer, schedule
from train import create_model, load_config


def read_chunks(folder: str, tokenizer, seq_length: int) -> torch.Tensor:
    """Return the text of a folder as token ids (chunks, T): <s> text </s> <s> text </s> ..."""
    token_ids: list[int] = []
    for path in find_files(folder, "train"):
        for document in read_documents(path):
            text_ids = tokenizer.encode("".join(document), add_special_tokens=False)
            token_ids += [tokenizer.bos_token_id, *text_ids, tokenizer.eos_token_id]
    n_chunks = len(token_ids) // seq_length  # the rest does not fill a chunk
    return torch.tensor(token_ids[: n_chunks * seq_length]).view(n_chunks, seq_length)


def train(config: dict) -> list[float]:
    """Train a model, print the loss of each step in nats per token, and return these losses."""
    training = config["training"]
    device = pick_device()
    tokenizer = load_tokenizer(config["data"]["tokenizer_path"])
    chunks = read_chunks(config["data"]["train_path"], tokenizer, config["data"]["seq_length"])

    torch.manual_seed(training["seed"])
    model = create_model(config, tokenizer).to(device).train()
    chunks_per_step = training["batch_size"] * training["gradient_accumulation_steps"]
    steps_per_epoch = math.ceil(len(chunks) / chunks_per_step)
    n_steps = training["num_epochs"] * steps_per_epoch
    n_steps = min(n_steps, training["max_steps"] or n_steps)
    optimizer = make_optimizer(model, training)
    lr_factor = schedule(training, n_steps)  # warm-up, then decay

    losses = []
    for step in range(n_steps):
        # the chunks of the step: every epoch takes every chunk once, in another order
        epoch, step_of_epoch = divmod(step, steps_per_epoch)
        generator = torch.Generator().manual_seed(1000 * training["seed"] + epoch)
        order = torch.randperm(len(chunks), generator=generator)
        rows = order.split(chunks_per_step)[step_of_epoch]

        n_predicted = chunks[rows, 1:].numel()  # nothing predicts the first token of a chunk
        loss = torch.zeros((), device=device)
        for batch in chunks[rows].tensor_split(math.ceil(len(rows) / training["batch_size"])):
            input_ids = batch.to(device)  # (B, T)
            logits = model(input_ids).logits  # (B, T, V)
            targets = F.pad(input_ids[:, 1:], (0, 1), value=-100)  # -100: no target
            nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            batch_loss = nll / n_predicted
            batch_loss.backward()
            loss += batch_loss.detach()

        torch.nn.utils.clip_grad_norm_(model.parameters(), training["max_grad_norm"])
        for group in optimizer.param_groups:
            group["lr"] = training["lr"] * lr_factor(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step + 1:6}  loss {loss:.4f}  lr {training['lr'] * lr_factor(step):.2e}")
    return losses


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file, e.g. config/quickstart.yaml")
    parser.add_argument(
        "--set", action="append", metavar="SECTION.KEY=VALUE", help="as for train.py"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Train, and return the exit code."""
    args = make_parser().parse_args(argv)

    def body() -> None:
        train(load_config(args.config, args))

    return run_script(body)


if __name__ == "__main__":
    sys.exit(main())
