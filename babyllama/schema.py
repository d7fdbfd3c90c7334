"""The keys of a configuration file: type, default, range, meaning. These pydantic models are the only schema.

What is between keys (one must divide another, two exclude each other) and everything about YAML is in config.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MUON_LR = 8e-3  # typical with Muon is up to here: what does well lies above what does with AdamW (docs/results.md)


def _key(description: str, default: Any = ..., *, typical: tuple | None = None, **limits) -> Any:
    """A field of the schema; `typical` is a range outside which a value is allowed but pointed out."""
    extra = {"typical": list(typical)} if typical else None
    return Field(default, description=description, json_schema_extra=extra, **limits)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class DataSection(Section):
    tokenizer_path: str = _key(
        "Tokenizer: a tokenizer.json or a directory that holds one", min_length=1
    )
    train_path: str = _key(
        "Training text: a directory of .train, .txt or .jsonl files, or one file", min_length=1
    )
    eval_path: str = _key(
        "Held-out text: a directory of .dev, .txt or .jsonl files, or one file", min_length=1
    )
    seq_length: int = _key(
        "Tokens in a chunk; also the model's context", 128, ge=32, le=2048, typical=(128, 512)
    )
    eval_samples: int = _key("Held-out chunks to evaluate on, the same for every model", 256, ge=1)
    random_offset: bool = _key(
        "Chunks begin at another offset in each epoch, drawn from the seed", False
    )
    document_mask: bool = _key(
        "A token sees its own document only, not what stands before it in the chunk", False
    )


class ModelSection(Section):
    type: Literal["Llama", "GPT2", "GPTJ"] = _key("Architecture")
    name: str = _key(
        "The run's directory under logging.output_dir", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
    )
    hidden_size: int = _key("Width; divisible by n_head", ge=1, typical=(64, 2048))
    intermediate_size: int | None = _key(
        "Width of the feed-forward layer; null or missing: 8/3 x hidden_size (Llama), 4 x (GPT2, GPTJ)",
        None,
        ge=1,
    )
    n_layer: int = _key("Number of layers", ge=1, typical=(2, 48))
    n_head: int = _key("Number of attention heads", ge=1)
    vocab_size: int | None = _key("Rows of the embedding; null: the tokenizer's size", None, ge=1)
    tie_word_embeddings: bool = _key("One matrix for the input and the output embedding", False)
    resid_pdrop: float = _key(
        "Dropout on residual branches (GPT2, GPTJ)", 0.0, ge=0, lt=1, typical=(0.0, 0.3)
    )
    embd_pdrop: float = _key(
        "Dropout on embeddings (GPT2, GPTJ)", 0.0, ge=0, lt=1, typical=(0.0, 0.3)
    )
    attn_pdrop: float = _key(
        "Dropout on attention weights (GPT2, GPTJ)", 0.0, ge=0, lt=1, typical=(0.0, 0.3)
    )


class TrainingSection(Section):
    lr: float = _key(
        f"Peak learning rate; with muon up to {MUON_LR:g} is typical",
        ge=1e-6,
        le=1e-2,
        typical=(1e-5, 1e-3),
    )
    batch_size: int = _key(
        "Chunks in a batch of each process (each device)", gt=0, typical=(1, 128)
    )
    num_epochs: int = _key("Passes over the training text", ge=1, typical=(1, 10))
    max_steps: int | None = _key(
        "Optimiser steps after which the run ends, where its epochs have not ended before; null: none",
        None,
        ge=1,
    )
    gradient_accumulation_steps: int = _key(
        "Batches in one optimiser step", 1, ge=1, typical=(1, 32)
    )
    warmup_steps: int = _key(
        "Steps over which the learning rate rises to lr", 0, ge=0, typical=(0, 1000)
    )
    warmup_ratio: float | None = _key(
        "The same as a share of all steps; instead of warmup_steps", None, ge=0, lt=1
    )
    lr_scheduler: Literal["cosine", "wsd", "linear", "constant"] = _key(
        "What the learning rate does after warm-up; wsd: constant, then linear decay over the last fifth",
        "cosine",
    )
    min_lr: float = _key("Learning rate at the end of cosine, wsd and linear", 0.0, ge=0, le=1e-2)
    optimizer: Literal["adamw", "muon"] = _key(
        "muon: Muon on the matrices of the layers, AdamW on embeddings, head and vectors", "adamw"
    )
    adam_beta1: float = _key("AdamW's decay of the first moment", 0.9, ge=0, lt=1)
    adam_beta2: float = _key("AdamW's decay of the second moment", 0.999, ge=0, lt=1)
    adam_epsilon: float = _key("AdamW's epsilon", 1e-8, gt=0)
    weight_decay: float = _key("Decoupled weight decay of the matrices", 0.1, ge=0)
    max_grad_norm: float = _key("Gradients are clipped to this norm", 1.0, gt=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = _key(
        "Number format of matrix products; auto: the fastest that this machine has units for",
        "auto",
    )
    fp16: bool = _key("The same as precision: fp16; needs CUDA", False)
    bf16: bool = _key("The same as precision: bf16", False)
    compile: bool | Literal["auto"] = _key(
        "Compile the model with torch.compile: slow first step, faster steps after; auto: where it pays",
        "auto",
    )
    torch_compile: bool | None = _key("The same as compile, and rules over it when given", None)
    chunked_loss: bool | Literal["auto"] = _key(
        "Take the output layer and its loss a slice of the batch at a time: less memory; auto: on a CPU, where it is "
        "also faster",
        "auto",
    )
    cuda_graphs: bool = _key(
        "Record a batch's passes once and start them by one call (CUDA graphs): on one GPU, not with fp16, teachers or "
        "gradient_checkpointing",
        True,
    )
    gradient_checkpointing: bool = _key(
        "Recompute activations in the backward pass: less memory, slower", False
    )
    fsdp: bool = _key(
        "Over several processes: share out weights, gradients and optimiser states (FSDP) instead of copying them",
        False,
    )
    ema: float | None = _key(
        "Decay of an exponential moving average of the weights, which is evaluated and saved; null: none",
        None,
        gt=0,
        lt=1,
        typical=(0.9, 0.9999),
    )
    early_stopping_patience: int | None = _key(
        "Evaluations in a row without a better held-out loss that end the run; the best weights are kept, so "
        "checkpoints are saved with the evaluations, not by save_steps",
        None,
        ge=1,
    )
    dataloader_num_workers: int = _key(
        "Processes that load batches; 0: the training process itself", 0, ge=0
    )
    logging_steps: int = _key("Steps between two rows of the log", 20, ge=1)
    eval_steps: int | None = _key(
        "Steps between evaluations; null: at the end of each epoch", None, ge=1
    )
    save_steps: int | None = _key(
        "Steps between checkpoints; null: at the end of each epoch", None, ge=1
    )
    seed: int = _key(
        "Seed of the initial weights, the order of the data and dropout", 42, ge=0, lt=2**31
    )


class LoggingSection(Section):
    wandb: bool = _key(
        "Send the log to Weights & Biases (needs the wandb package; offline without a key)", False
    )
    project: str | None = _key("Weights & Biases project; required with wandb: true", None)
    output_dir: str = _key("Where run directories are made", "./models/", min_length=1)


class DistillationSection(Section):
    teachers: list[str] = _key(
        "Model directories of the teachers, with the student's vocabulary", min_length=1
    )
    temperature: float = _key(
        "Divides the logits of student and teachers", 2.0, gt=0, typical=(1.0, 10.0)
    )
    alpha: float = _key(
        "Weight of the text's own next tokens; the teachers weigh 1 - alpha", 0.5, ge=0, le=1
    )
    average: Literal["probabilities", "logits"] = _key(
        "What is averaged over several teachers", "probabilities"
    )
    reduction: Literal["mean", "batchmean"] = _key(
        "mean: KL per token; batchmean: KL summed over a chunk, the published scale, where the teachers weigh "
        "seq_length times more",
        "mean",
    )
    cache: Literal["none", "top_k"] = _key(
        "top_k: ask the teachers once for each place of the text and keep their best tokens on disk",
        "none",
    )
    top_k: int = _key("Tokens kept for each place, with cache: top_k", 64, ge=1)


TRACKS = {
    "strict-small": 10_000_000,
    "strict": 100_000_000,
}  # BabyLM's tracks: words of training text allowed
MAX_EPOCHS = 10  # in both


class BabyLMSection(Section):
    track: Literal["strict-small", "strict"] = _key(
        "Words allowed: 10M (strict-small) or 100M (strict), 10 epochs"
    )


class Config(BaseModel):
    """The four sections of a configuration file, and two for those who want them."""

    model_config = ConfigDict(extra="forbid", strict=True, title="BabyLlama configuration")
    data: DataSection
    model: ModelSection
    training: TrainingSection
    logging: Annotated[LoggingSection, Field(default_factory=LoggingSection)]
    distillation: DistillationSection | None = Field(
        None, description="Learn from teachers as well as from the text"
    )
    babylm: BabyLMSection | None = Field(
        None, description="Keep to BabyLM's rules, count words, save its checkpoints"
    )


SECTIONS: dict[str, type[Section]] = {
    "data": DataSection, "model": ModelSection, "training": TrainingSection, "logging": LoggingSection,
    "distillation": DistillationSection, "babylm": BabyLMSection,
}  # fmt: skip
OPTIONAL = ("distillation", "babylm")
