"""Open a trained model.

    model, tokenizer = load_model("models/quickstart")
    encode(tokenizer, ["Once upon a time"])    # [[1, ...]]: BOS first

A model directory may come from anybody, so no code in it is run and nothing is unpickled. Only
local directories are opened; nothing is downloaded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from babyllama.data.tokenizer import tokenizer_class
from babyllama.device import keep_freed_memory, pick_device
from babyllama.files import check_utf8
from babyllama.model_dir import check_model_exists, check_weights

log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_CONTEXT = 2048  # for a model whose config states no limit
MAX_CONSTANTS = 1 << 28  # numbers that a model computes from its config.json: 1 GB in float32


def load_model(path: str | Path, device: str | None = "auto", dtype: str = "float32"):
    """Load (model in eval mode, tokenizer) from a local Hugging Face model directory.

    Raise FileNotFoundError if the directory, its .safetensors weights or its tokenizer are
    missing. Raise ValueError if they cannot be read, if the weights do not fit config.json or have
    changed since train.py saved them, or if the model is not causal.
    """
    # check what can be seen without loading anything
    path = Path(path)
    _check_model_dir(path, dtype)
    check_utf8(path)
    check_weights(path)

    target = pick_device(device)
    if target.type == "cpu":
        keep_freed_memory()

    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        with _quiet_transformers():
            _check_sizes(path, AutoConfig.from_pretrained(path, **local))
            model, info = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                output_loading_info=True,
                **local,
            )
            tokenizer = AutoTokenizer.from_pretrained(path, **local)
            if type(tokenizer) is PreTrainedTokenizerFast:
                tokenizer = tokenizer_class().from_pretrained(path, **local)
    except (KeyboardInterrupt, SystemExit, MemoryError, SizeError):
        raise
    except BaseException as error:  # a Rust panic (corrupted tokenizer.json) is not an Exception
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be loaded: {reason}") from error

    # check what came out
    _check_loaded_weights(path, info)
    model = model.to(target).eval()
    _check_causal(path, model, tolerance=1e-5 if dtype == "float32" else 1e-2)
    return model, tokenizer


def _check_model_dir(path: Path, dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f'dtype "{dtype}" is unknown: use {", ".join(DTYPES)}')
    check_model_exists(path)
    if not any(path.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{path} has no .safetensors weights (pickled .bin files are not opened)"
        )
    if not any((path / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise FileNotFoundError(f"{path} has no tokenizer.json; copy it next to the weights")


class SizeError(ValueError):
    """The weights of a model do not have the sizes in its config.json."""


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide progress bars, and the table of all weights that would precede our one-line error."""
    verbosity = hf_logging.get_verbosity()
    shows_bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if shows_bars:
            hf_logging.enable_progress_bar()


def _check_sizes(path: Path, config) -> None:
    """Raise SizeError if config.json does not fit the weights, before any memory is allocated.

    Only the headers of the weights are read, and the model is built without memory (device meta).
    """
    # the shapes of the weights
    shapes = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            shapes |= {name: weights.get_slice(name).get_shape() for name in weights.offset_keys()}
    layers = getattr(config, "num_hidden_layers", 0)
    if layers > len(shapes):
        raise SizeError(
            f"{path}: config.json has {layers:,} layers, the weights only {len(shapes)} tensors"
        )

    # the shapes that config.json describes
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for name, weight in sorted(model.state_dict().items()):
        expected = list(weight.shape)
        if shapes.get(name, expected) != expected:
            raise SizeError(
                f"{path}: weights {name} have shape {shapes[name]}, config.json expects {expected}"
            )
    n_constants = sum(buffer.numel() for buffer in model.buffers())  # such as GPT-J's positions
    if n_constants > MAX_CONSTANTS:
        raise SizeError(f"{path}: config.json needs {n_constants:,} constants; it is damaged")


def _check_loaded_weights(path: Path, info: dict) -> None:
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(f"{path} lacks weights that config.json expects: {names}")
    unexpected = sorted(info["unexpected_keys"])
    if unexpected:
        log.warning(
            "%s: ignoring %d weights that config.json does not expect: %s",
            path,
            len(unexpected),
            unexpected[:3],
        )


def _check_causal(path: Path, model, tolerance: float) -> None:
    """Raise ValueError if the logits of the first token depend on the second one.

    Such a model could see the tokens it is asked to predict, and all its scores would be wrong.
    """
    # avoid the padding token, because transformers warns if the input has one
    a, b = [token for token in range(3) if token != getattr(model.config, "pad_token_id", None)][:2]
    ids = torch.tensor([[a, a], [a, b]], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, 0].float()  # (2, V)
    if (logits[0] - logits[1]).abs().max() > tolerance * logits[0].abs().max():
        raise ValueError(
            f"{path}: {type(model).__name__} looks at later tokens: not a causal language model"
        )


def context_length(model) -> int:
    """Return how many tokens the model can attend to, from its config."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        limit = getattr(model.config, name, None)
        if limit:
            return limit
    return DEFAULT_CONTEXT


def has_start_token(tokenizer) -> bool:
    """Return True if a token can precede a text: BOS or, for GPT-2's tokenizer, EOS.

    Without one, the first token of a text follows nothing and has no score.
    """
    return tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None


def encode(
    tokenizer, texts: Sequence[str | Sequence[int]], bos: bool | None = True
) -> list[list[int]]:
    """Return the token ids of each text, starting with BOS if `bos`; nothing is appended.

    A text may already be a list of ids. BOS is not added a second time if the ids start with it. A
    tokenizer without BOS uses its EOS instead; if it has neither, bos=True raises ValueError and
    bos=None adds nothing.
    """
    # encode all strings in one call, because the tokenizer works in parallel
    strings = [text for text in texts if isinstance(text, str)]
    _check_encodable(strings)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend:  # calling it directly is more than twice as fast as through transformers
        backend.no_truncation()
        backend.no_padding()
        encodings = backend.encode_batch_fast(strings, add_special_tokens=False)
        encoded = iter([encoding.ids for encoding in encodings])
    elif strings:
        encoded = iter(tokenizer(strings, add_special_tokens=False, verbose=False)["input_ids"])
    sequences = [next(encoded) if isinstance(text, str) else list(text) for text in texts]

    if bos is False or (bos is None and not has_start_token(tokenizer)):
        return sequences
    if not has_start_token(tokenizer):
        raise ValueError("the tokenizer has neither a BOS nor an EOS token: use bos=False")
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [ids if ids[:1] == [start] else [start, *ids] for ids in sequences]


def _check_encodable(strings: Sequence[str]) -> None:
    try:
        "".join(strings).encode()
    except UnicodeEncodeError as error:
        excerpt = repr(error.object[: error.end][-20:])
        raise ValueError(
            f"a text contains half of a surrogate pair, which is not a character: ...{excerpt}"
        ) from None


def check_ids(model, sequences: Sequence[Sequence[int]]) -> None:
    """Raise ValueError for a token id outside the vocabulary.

    On a GPU such an id would crash the process with an error that does not mention it.
    """
    vocab_size = model.get_input_embeddings().weight.shape[0]
    for index, ids in enumerate(sequences):
        if len(ids) and not 0 <= min(ids) <= max(ids) < vocab_size:
            raise ValueError(
                f"text {index}: token ids {min(ids)}..{max(ids)} are outside the model's"
                f" vocabulary, 0..{vocab_size - 1}"
            )
