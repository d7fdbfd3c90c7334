"""List the model architectures that train.py can build.

    ARCHITECTURES["Llama"].ffn_ratio      # 8 / 3

To add an architecture, add it here; the configuration, train.py, the loss and generation read this
table. They rely on three things that hold for all of its rows: attention is causal without a
sliding window, nothing but keys and values is kept between the steps of generation, and
transformers has a class for it. Nothing here imports torch, because the configuration is checked
before torch is imported.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """One architecture: its names, its usual shape, and what it supports."""

    name: str  # model.type in a configuration
    model_type: str  # model_type in a model's config.json
    config_keys: dict[str, str]  # our name of a setting -> transformers' name
    ffn_ratio: float  # usual intermediate_size / hidden_size
    ffn_multiple: int = 1  # the usual intermediate_size is rounded up to a multiple of this
    rotary: bool = False  # rotary positions rotate pairs of numbers, so the head size must be even
    max_rotary_dim: int | None = None  # rotates only so many dimensions of each head; None: all
    graph_needs_compile: bool = False  # training records it as a CUDA graph only if compiled

    @property
    def has_dropout(self) -> bool:
        return "attn_pdrop" in self.config_keys


_GPT_KEYS = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "seq_length": "n_positions",
    "resid_pdrop": "resid_pdrop",
    "embd_pdrop": "embd_pdrop",
    "attn_pdrop": "attn_pdrop",
}

_LLAMA_KEYS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "seq_length": "max_position_embeddings",
}

_ALL = [
    Architecture(
        name="Llama",
        model_type="llama",
        config_keys=_LLAMA_KEYS,
        ffn_ratio=8 / 3,
        ffn_multiple=8,
        rotary=True,
    ),
    Architecture(name="GPT2", model_type="gpt2", config_keys=_GPT_KEYS, ffn_ratio=4.0),
    Architecture(
        name="GPTJ",
        model_type="gptj",
        config_keys=_GPT_KEYS,
        ffn_ratio=4.0,
        rotary=True,
        max_rotary_dim=64,
        graph_needs_compile=True,
    ),
    Architecture(  # Llama with normalized queries and keys
        name="Qwen3",
        model_type="qwen3",
        # transformers' defaults for these two fit only the published sizes
        config_keys={**_LLAMA_KEYS, "n_kv_head": "num_key_value_heads", "head_size": "head_dim"},
        ffn_ratio=8 / 3,
        ffn_multiple=8,
        rotary=True,
    ),
]
ARCHITECTURES = {architecture.name: architecture for architecture in _ALL}
NAMES = tuple(ARCHITECTURES)
MODEL_TYPES = frozenset(architecture.model_type for architecture in _ALL)
WITH_DROPOUT = tuple(name for name in NAMES if ARCHITECTURES[name].has_dropout)
