"""Declare every key of a configuration file: type, default, range and meaning.

This is the only place that declares a key. config.py reads the YAML, and it checks the rules that
involve several keys, such as one that must divide another or two that exclude each other.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from babyllama import architectures

MUON_LR = 8e-3  # the highest learning rate that is usual with Muon
TRACKS = {"strict-small": 10_000_000, "strict": 100_000_000}  # BabyLM: words of training text
MAX_EPOCHS = 10  # in both tracks of BabyLM
FFN_RATIOS = ", ".join(
    f"{Fraction(architecture.ffn_ratio).limit_denominator(9)} ({name})"
    for name, architecture in architectures.ARCHITECTURES.items()
)
DROPOUT_MODELS = ", ".join(architectures.WITH_DROPOUT)


def _key(
    description: str,
    default: Any = ...,
    *,
    typical: tuple[float, float] | None = None,
    allowed: str | None = None,
    **limits,
) -> Any:
    """Return a field of the schema.

    Values outside the `typical` range are allowed, but the user is warned about them. Error
    messages describe the `limits` in words; `allowed` replaces that description where the limits
    alone do not explain it, as with a regular expression.
    """
    extra: dict[str, Any] = {}
    if typical:
        extra["typical"] = list(typical)
    if allowed:
        extra["allowed"] = allowed
    return Field(default, description=description, json_schema_extra=extra or None, **limits)


class Section(BaseModel):
    """Reject unknown keys, values of the wrong type, NaN and infinity in every section."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class DataSection(Section):
    tokenizer_path: str = _key("A tokenizer.json file, or a directory that holds one", min_length=1)
    train_path: str = _key(
        "Training text: a directory of .train, .txt, .jsonl or .parquet files, or one file",
        min_length=1,
    )
    eval_path: str = _key(
        "Held-out text: a directory of .dev, .txt, .jsonl or .parquet files, or one file",
        min_length=1,
    )
    seq_length: int = _key(
        "Tokens per chunk; also the context length of the model",
        128,
        ge=32,
        le=2048,
        typical=(128, 512),
    )
    eval_samples: int = _key("Held-out chunks to evaluate on, the same for every model", 256, ge=1)
    random_offset: bool = _key(
        "Start the chunks at another offset in each epoch, drawn from the seed", False
    )
    document_mask: bool = _key(
        "Let tokens attend within their document only, not to earlier documents in the chunk", False
    )


class ModelSection(Section):
    type: Literal[architectures.NAMES] = _key("Architecture")
    name: str = _key(
        "Name of the run; its directory is logging.output_dir/name",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        allowed="text of letters, digits, '.', '_' and '-' that starts with a letter or digit",
    )
    hidden_size: int = _key(
        "Width of the model; must be divisible by n_head", ge=1, typical=(64, 2048)
    )
    intermediate_size: int | None = _key(
        f"Width of the feed-forward layers; null: hidden_size x {FFN_RATIOS}", None, ge=1
    )
    n_layer: int = _key("Number of layers", ge=1, typical=(2, 48))
    n_head: int = _key("Number of attention heads", ge=1)
    vocab_size: int | None = _key(
        "Rows of the embedding matrix; null: the size of the tokenizer", None, ge=1
    )
    tie_word_embeddings: bool = _key("Share one matrix between embedding and output layer", False)
    resid_pdrop: float = _key(
        f"Dropout on the residual branches ({DROPOUT_MODELS})", 0.0, ge=0, lt=1, typical=(0.0, 0.3)
    )
    embd_pdrop: float = _key(
        f"Dropout on the embeddings ({DROPOUT_MODELS})", 0.0, ge=0, lt=1, typical=(0.0, 0.3)
    )
    attn_pdrop: float = _key(
        f"Dropout on the attention weights ({DROPOUT_MODELS})", 0.0, ge=0, lt=1, typical=(0.0, 0.3)
    )


class TrainingSection(Section):
    lr: float = _key(
        f"Peak learning rate; up to {MUON_LR:g} is typical for muon",
        ge=1e-6,
        le=1e-2,
        typical=(1e-5, 2e-3),
    )
    batch_size: int = _key("Chunks per batch on each device", gt=0, typical=(1, 128))
    num_epochs: int = _key("Passes over the training text", ge=1, typical=(1, 10))
    max_steps: int | None = _key(
        "Stop after this many optimizer steps, even within an epoch; null: train all epochs",
        None,
        ge=1,
    )
    max_minutes: float | None = _key(
        "Minutes for the whole command: a few steps are timed, and max_steps becomes the number "
        "that fits; for one process only; ignored if max_steps is set; null: no limit",
        None,
        gt=0,
    )
    gradient_accumulation_steps: int = _key("Batches per optimizer step", 1, ge=1, typical=(1, 32))
    warmup_steps: int = _key(
        "Steps over which the learning rate rises to lr", 0, ge=0, typical=(0, 1000)
    )
    warmup_ratio: float | None = _key(
        "Warm-up as a fraction of all steps, instead of warmup_steps", None, ge=0, lt=1
    )
    lr_scheduler: Literal["cosine", "wsd", "linear", "constant"] = _key(
        "Learning rate after warm-up; wsd: constant, then linear decay over the last fifth",
        "cosine",
    )
    min_lr: float = _key(
        "Final learning rate of cosine, wsd and linear schedules", 0.0, ge=0, le=1e-2
    )
    optimizer: Literal["adamw", "muon"] = _key(
        "muon: Muon for the matrices of the layers, AdamW for embeddings, output layer and vectors",
        "adamw",
    )
    adam_beta1: float = _key("Decay of AdamW's first moment", 0.9, ge=0, lt=1)
    adam_beta2: float = _key("Decay of AdamW's second moment", 0.999, ge=0, lt=1)
    adam_epsilon: float = _key("Epsilon of AdamW", 1e-8, gt=0)
    weight_decay: float = _key("Decoupled weight decay, on matrices only", 0.1, ge=0)
    max_grad_norm: float = _key("Clip gradients to this norm", 1.0, gt=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = _key(
        "Number format of matrix products; auto: the fastest one that the hardware supports", "auto"
    )
    fp16: bool = _key("Same as precision: fp16; needs CUDA", False)
    bf16: bool = _key("Same as precision: bf16", False)
    compile: bool | Literal["auto"] = _key(
        "Use torch.compile: the first step is slow, later ones are faster; auto: if it pays off",
        "auto",
    )
    torch_compile: bool | None = _key("Same as compile; overrides it if given", None)
    chunked_loss: bool | Literal["auto"] = _key(
        "Compute output layer and loss for a slice of the batch at a time, which saves memory; "
        "auto: on a CPU, where it is also faster; with teachers always",
        "auto",
    )
    cuda_graphs: bool = _key(
        "Record the forward and backward pass once and replay it (CUDA graphs); on one GPU, not "
        "with fp16, teachers, gradient_checkpointing, or GPT-J without compilation",
        True,
    )
    gradient_checkpointing: bool = _key(
        "Recompute activations in the backward pass: saves memory, costs time", False
    )
    fsdp: bool = _key(
        "With several processes: shard weights, gradients and optimizer states (FSDP) instead of "
        "replicating them",
        False,
    )
    process_timeout_minutes: float = _key(
        "With several processes: end the run if one of them does not answer for this long",
        10.0,
        gt=0,
        typical=(1, 120),
    )
    ema: float | None = _key(
        "Decay of an exponential moving average of the weights, which is then evaluated and "
        "saved; null: no average",
        None,
        gt=0,
        lt=1,
        typical=(0.9, 0.9999),
    )
    early_stopping_patience: int | None = _key(
        "Stop after this many evaluations in a row without a better held-out loss and keep the "
        "best weights; checkpoints are then saved at evaluations, not by save_steps",
        None,
        ge=1,
    )
    dataloader_num_workers: int = _key(
        "Processes that load batches; 0: load them in the training process", 0, ge=0
    )
    logging_steps: int = _key("Steps between rows of the log", 20, ge=1)
    eval_steps: int | None = _key(
        "Steps between evaluations; null: evaluate after each epoch", None, ge=1
    )
    save_steps: int | None = _key(
        "Steps between checkpoints; null: save after each epoch", None, ge=1
    )
    benchmark: str | None = _key(
        "A file of tasks as for benchmark.py, scored at each evaluation and at each of BabyLM's "
        "checkpoints; only tasks that compare candidates; null: none",
        None,
        min_length=1,
    )
    seed: int = _key("Seed of the initial weights, the data order and dropout", 42, ge=0, lt=2**31)


class LoggingSection(Section):
    wandb: bool = _key(
        "Log to Weights & Biases; if you are not logged in, to files that `wandb sync` uploads",
        False,
    )
    project: str | None = _key("Weights & Biases project; required with wandb: true", None)
    tensorboard: bool = _key("Write event files for TensorBoard into the run directory", False)
    report_to: list[str] = _key(
        "Other trackers by the name that Hugging Face's Trainer has for them, such as trackio or "
        "mlflow; install their packages yourself",
        [],
    )
    output_dir: str = _key("Directory that holds the run directories", "./models/", min_length=1)


class DistillationSection(Section):
    teachers: list[str] = _key(
        "Model directories of the teachers, which must share the student's vocabulary", min_length=1
    )
    temperature: float = _key(
        "Temperature that divides the logits of student and teachers",
        2.0,
        gt=0,
        typical=(1.0, 10.0),
    )
    alpha: float = _key(
        "Weight of the cross-entropy on the text; the teachers have weight 1 - alpha",
        0.5,
        ge=0,
        le=1,
    )
    average: Literal["probabilities", "logits"] = _key(
        "What to average over several teachers", "probabilities"
    )
    reduction: Literal["mean", "batchmean"] = _key(
        "mean: KL per token; batchmean: KL summed over a chunk as published, so the teachers weigh "
        "seq_length times more",
        "mean",
    )
    cache: Literal["none", "top_k"] = _key(
        "top_k: run the teachers once over the text and cache their best tokens on disk", "none"
    )
    top_k: int = _key("Tokens to cache per position, with cache: top_k", 64, ge=1)


class BabyLMSection(Section):
    track: Literal["strict-small", "strict"] = _key(
        "strict-small: up to 10M words of text; strict: up to 100M words; 10 epochs in both"
    )


class Config(BaseModel):
    """The sections of a configuration file; distillation and babylm are optional."""

    model_config = ConfigDict(extra="forbid", strict=True, title="BabyLlama configuration")
    data: DataSection
    model: ModelSection
    training: TrainingSection
    logging: Annotated[LoggingSection, Field(default_factory=LoggingSection)]
    distillation: DistillationSection | None = Field(
        None, description="Learn from teacher models as well as from the text"
    )
    babylm: BabyLMSection | None = Field(
        None, description="Follow BabyLM's rules: check the budget, save its checkpoints"
    )


SECTIONS: dict[str, type[Section]] = {
    "data": DataSection,
    "model": ModelSection,
    "training": TrainingSection,
    "logging": LoggingSection,
    "distillation": DistillationSection,
    "babylm": BabyLMSection,
}
OPTIONAL = ("distillation", "babylm")
