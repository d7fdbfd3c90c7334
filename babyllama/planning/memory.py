"""Estimate the memory that training on a CPU needs.

The estimate adds up the sizes of the tensors that training keeps. Not all of them exist at the same
time, but the C library seldom fits one into the gaps that another has left. memory_advice says how
a run needs less.
"""

from __future__ import annotations

from typing import Any

import torch

from babyllama import distributed
from babyllama.device import resident_bytes
from babyllama.planning.execution import pick_precision
from babyllama.training import optimizers
from babyllama.training.attention import attention_mask
from babyllama.training.held_out import chunks_per_pass
from babyllama.training.loss import NextTokenLoss, slice_rows


def estimate_memory(config: dict, model, loss: NextTokenLoss) -> dict[str, int] | None:
    """Return the bytes of each part of the resident memory of a process while it trains.

    `program` is what Python, the libraries and the data take now. The logits are those of a
    training step or of an evaluation, whichever has more. On a GPU the result is None.
    """
    if torch.cuda.is_available():
        return None
    training = config["training"]
    seq_length = config["data"]["seq_length"]
    weights = 4 * model.num_parameters()
    copies = 2 if distributed.world_size() > 1 else 1  # DDP has a second one in its buckets
    average = weights if training["ema"] else 0
    n_chunks = training["batch_size"]
    vocab_size = model.config.vocab_size
    evaluated = chunks_per_pass(n_chunks, seq_length, vocab_size)
    step_logits = _logit_bytes(loss, n_chunks, seq_length, model)
    evaluation_logits = evaluated * seq_length * vocab_size * _bytes_per_logit(loss.dtype)
    return {
        "program": max(0, resident_bytes() - weights),
        "weights": weights,
        "gradients": copies * weights,
        "optimizer": 4 * optimizers.state_elements(model, training) + average,
        "activations": activation_bytes(config, model, loss),
        "logits": max(step_logits, evaluation_logits),
    }


def activation_bytes(config: dict, model, loss: NextTokenLoss) -> int:
    """Return the bytes that the layers keep from the forward to the backward pass of a batch.

    One and two chunks are passed through the model: what the second one adds, each chunk adds.
    Half-precision copies of the weights are in the first. This is exact without compilation; torch
    compiles the layers so that they keep less.
    """
    length = config["data"]["seq_length"]
    one, two = (_saved_bytes(model, n, length, loss) for n in (1, 2))
    n_chunks = config["training"]["batch_size"]
    if not config["training"]["gradient_checkpointing"]:
        return one + (n_chunks - 1) * (two - one)
    # the inputs of all layers, and what one layer keeps when the backward pass has come to it
    n_layers = config["model"]["n_layer"]
    layer_input = 4 * length * config["model"]["hidden_size"]
    return n_chunks * (n_layers * layer_input + (two - one) // n_layers)


def _saved_bytes(model, n_chunks: int, length: int, loss: NextTokenLoss) -> int:
    """Return the bytes of the tensors, but for the weights, that autograd saves in the layers."""
    storages = {p.untyped_storage().data_ptr(): None for p in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages.setdefault(storage.data_ptr(), storage)  # kept, or another could get its address
        return tensor

    input_ids = torch.zeros((n_chunks, length), dtype=torch.long)
    mask = attention_mask(model, input_ids, loss.document_bos_id, loss.dtype)
    is_half = loss.dtype != torch.float32
    with (
        torch.random.fork_rng(devices=[]),  # dropout must not change what training draws
        torch.autocast("cpu", torch.bfloat16, enabled=is_half),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        model.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False)
    return sum(storage.nbytes() for storage in storages.values() if storage is not None)


def _logit_bytes(loss: NextTokenLoss, n_chunks: int, length: int, model) -> int:
    """Return the bytes of the logits of a training step, and of what is computed from them."""
    vocab_size, width = model.get_output_embeddings().weight.shape
    if loss.slice_loss is None:
        return n_chunks * length * vocab_size * _bytes_per_logit(loss.dtype)
    # of each logit HeadLoss has the exponential in float32 and the gradient; it also sums up the
    # gradient of the weights, which autograd then scales into another tensor
    rows = min(n_chunks * length, slice_rows(vocab_size, length))
    return rows * vocab_size * (2 * loss.dtype.itemsize + 4) + 4 * vocab_size * width


def _bytes_per_logit(dtype: torch.dtype) -> int:
    """Return the bytes per logit of next_token_nll: the logit, in float32 too, and log-softmax."""
    return 8 if dtype == torch.float32 else dtype.itemsize + 8


def memory_advice(training: dict[str, Any], saved: str | None = None) -> str:
    """Return flags with which a step of this training section needs less memory.

    `saved` names a checkpoint of the run, which the advice must not cost.
    """
    batch_size = training["batch_size"]
    accumulation = training["gradient_accumulation_steps"]
    half = " --fp16 (or --bf16)" if pick_precision(training)[0] == "fp32" else ""
    keys = "--set training.gradient_checkpointing=true and --set training.chunked_loss=true"
    if torch.cuda.is_available():
        keys = f"--set training.cuda_graphs=false, {keys}"
    smaller_batch = (
        f"--batch-size {batch_size // 2} --gradient-accumulation-steps {accumulation * 2}"
    )

    # resume: the keys of the run must stay, except for those that --allow-change names
    if saved:
        unchanged = (
            f"{saved} is intact, and the same command resumes with --resume-from-checkpoint auto, "
            "if it was another program that used the memory"
        )
        if batch_size == 1:
            return f"{unchanged}; other settings need a run with another --model-name"
        return (
            f"{unchanged}; with less memory it resumes if you also add {smaller_batch} "
            "--allow-change training.batch_size --allow-change training.gradient_accumulation_steps"
        )

    # start again: all keys may change
    if batch_size == 1:
        shorter = "a smaller model and a shorter data.seq_length"
        return f"{keys} save memory; so do{half and half + ','} {shorter}"
    return f"the same step fits in less with {smaller_batch}{half}; {keys} save more"
