"""Load a trained causal language model, and turn text into the token ids that it reads.

    model, tokenizer = load_model("models/quickstart")
    encode(tokenizer, ["Once upon a time"])    # [[1, ...]]: BOS in front

Opens local directories only: no remote code, no pickles.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from babyllama.config import read_yaml_file
from babyllama.device import keep_freed_memory, pick_device
from babyllama.files import ROOT

log = logging.getLogger(__name__)


def training_text_of(model_path: str | Path, key: str) -> Path | None:
    """data.`key` of the run that made a model or checkpoint; None where its directory holds no training_config.yaml.

    The path is seen from the working directory, else from the project's.
    """
    folders = [Path(model_path), Path(model_path).parent]
    config = next(
        (file for file in (p / "training_config.yaml" for p in folders) if file.is_file()), None
    )
    if config is None:
        return None
    try:
        named = Path(read_yaml_file(config)["data"][key])
    except (KeyError, TypeError):
        raise ValueError(f"{config} has no data.{key}") from None
    return next((p for p in (named, ROOT / named) if p.exists()), named)


def load_model(path: str | Path, device: str | None = "auto", dtype: str = "float32"):
    """(model in eval mode, tokenizer) from a local Hugging Face model directory, ours or not.

    Raises FileNotFoundError where there is no model, or its weights are pickles only, and ValueError where it cannot be
    read, lacks weights that the architecture needs, or lets tokens look at later ones.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    path = Path(path)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f'dtype "{dtype}" is unknown: use float32, bfloat16 or float16')
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"no model at {path}: expected a directory with config.json, weights, tokenizer.json"
        )
    if not any(path.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{path} has no .safetensors weights (pickled .bin files are not opened)"
        )
    if not any((path / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise FileNotFoundError(
            f"{path} has no tokenizer.json: the tokenizer belongs beside the weights"
        )
    if (target := pick_device(device)).type == "cpu":
        keep_freed_memory()
    loudness, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()  # else a table of all weights before the line that says what is wrong with them
    hf_logging.disable_progress_bar()
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        options = {
            "dtype": getattr(torch, dtype),
            "use_safetensors": True,
            "output_loading_info": True,
        }
        model, info = AutoModelForCausalLM.from_pretrained(
            path, ignore_mismatched_sizes=True, **options, **local
        )
        tokenizer = AutoTokenizer.from_pretrained(path, **local)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a damaged tokenizer.json panics in Rust, which is no Exception
        raise ValueError(f"{path} cannot be read: {str(error).strip().splitlines()[0]}") from error
    finally:
        hf_logging.set_verbosity(loudness)
        (hf_logging.enable_progress_bar if bars else hf_logging.disable_progress_bar)()
    for name, found, wanted in sorted(info["mismatched_keys"])[:1]:
        raise ValueError(
            f"{path}: the weights {name} are {list(found)}, by config.json {list(wanted)}"
        )
    if info["missing_keys"]:
        raise ValueError(f"{path} lacks the weights {', '.join(sorted(info['missing_keys'])[:3])}")
    if more := sorted(info["unexpected_keys"]):
        log.warning(
            "%s: %d weights without a place by config.json are left out: %s",
            path,
            len(more),
            more[:3],
        )
    model = model.to(target).eval()
    with torch.no_grad():  # the first token's logits in two texts that differ in the second
        a, b, *_ = (
            i for i in range(3) if i != getattr(model.config, "pad_token_id", None)
        )  # padding is warned of
        ids = torch.tensor([[a, a], [a, b]], device=target)
        first, other = model(input_ids=ids, use_cache=False).logits[:, 0].float()
    if (first - other).abs().max() > (1e-5 if dtype == "float32" else 1e-2) * first.abs().max():
        raise ValueError(
            f"{path}: {type(model).__name__} looks at later tokens: not a causal language model"
        )
    return model, tokenizer


def context_length(model) -> int:
    """Tokens that the model can look at together, from its config; 2048 where the config states no limit."""
    limits = (
        getattr(model.config, name, None)
        for name in ("max_position_embeddings", "n_positions", "max_seq_len")
    )
    return next((limit for limit in limits if limit), 2048)


def encode(
    tokenizer, texts: Sequence[str | Sequence[int]], bos: bool | None = True
) -> list[list[int]]:
    """Token ids of each text (a list of ids passes through), with BOS in front exactly once where `bos`.

    Nothing is appended. A tokenizer without BOS uses its EOS; with neither, True is an error and None adds nothing.
    """
    strings = [
        text for text in texts if isinstance(text, str)
    ]  # in bulk: the tokenizer works in parallel
    try:
        "".join(strings).encode()
    except UnicodeEncodeError as error:
        where = repr(error.object[: error.end][-20:])
        raise ValueError(
            f"a text holds half of a surrogate pair, which is no character: ...{where}"
        ) from None
    if rust := getattr(tokenizer, "backend_tokenizer", None):  # alone: more than twice as fast
        rust.no_truncation(), rust.no_padding()
        encoded = (
            encoding.ids for encoding in rust.encode_batch_fast(strings, add_special_tokens=False)
        )
    else:
        encoded = iter(
            tokenizer(strings, add_special_tokens=False, verbose=False)["input_ids"]
            if strings
            else ()
        )
    sequences = [next(encoded) if isinstance(text, str) else list(text) for text in texts]
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if bos is False or (bos is None and start is None):
        return sequences
    if start is None:
        raise ValueError("the tokenizer has neither a BOS nor an EOS token: use bos=False")
    return [ids if ids[:1] == [start] else [start, *ids] for ids in sequences]


def check_ids(model, sequences: Sequence[Sequence[int]]) -> None:
    """ValueError for a token id that the model has no embedding of (a GPU would only say that it failed)."""
    rows = model.get_input_embeddings().weight.shape[0]
    for index, ids in enumerate(sequences):
        if len(ids) and not 0 <= min(ids) <= max(ids) < rows:
            raise ValueError(
                f"text {index}: token ids {min(ids)}..{max(ids)}, the model knows 0..{rows - 1}"
            )
