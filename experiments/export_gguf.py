"""Write a Llama or GPT-2 as a GGUF file, which llama.cpp and ollama read.

    pip install gguf==0.19.0
    python experiments/export_gguf.py models/quickstart quickstart.gguf
    llama-cli -m quickstart.gguf -no-cnv -p "The cat"

The file holds float32 weights; llama-quantize makes it smaller. llama.cpp does not know GPT-J, and
its own converter takes none of our models: it looks tokenizers up by a hash, and expects a key that
transformers no longer writes for GPT-2. llama.cpp puts no space before a prompt, so type one if the
tokenizer was trained with --prefix-space.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import common  # noqa: F401  puts the repository on sys.path

from babyllama import cli
from babyllama.files import check_replaceable

ARCHITECTURES = {"llama": "llama", "gpt2": "gpt2"}  # model_type of config.json: name in GGUF
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2 stores them as (in, out)


def permute_heads(weight, n_heads: int):
    """Reorder the rows of Llama's query or key projection (D, D) for llama.cpp.

    The rotary embedding turns pairs of rows: transformers pairs row i of a head with row i + half
    the head, llama.cpp with the next one.
    """
    rows, columns = weight.shape
    halves = weight.reshape(n_heads, 2, rows // n_heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def add_shape(writer, config) -> None:
    """Write the sizes of the model; `config` is that of transformers."""
    n_heads = config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(n_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // n_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def add_tokenizer(writer, tokenizer, vocab_size: int) -> None:
    """Write the vocabulary and the merges of a byte-level BPE tokenizer."""
    import gguf

    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_ids)
    types = [
        gguf.TokenType.CONTROL if token_id in special else gguf.TokenType.NORMAL
        for token_id in range(len(tokens))
    ]
    padding = vocab_size - len(tokens)  # rows of the embedding that no token uses
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens + [f"<unused-{number}>" for number in range(padding)])
    writer.add_token_types(types + [gguf.TokenType.UNUSED] * padding)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def add_weights(writer, model) -> None:
    """Write the weights under their names in GGUF; a tied head is left out, as llama.cpp expects.

    Raise ValueError for a weight that llama.cpp has no place for.
    """
    import gguf

    config = model.config
    arch = gguf.MODEL_ARCH.LLAMA if config.model_type == "llama" else gguf.MODEL_ARCH.GPT2
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    is_tied = config.tie_word_embeddings
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and is_tied:
            continue
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise ValueError(f"llama.cpp has no place for {name}")
        values = weight.float().numpy()
        if name.endswith("q_proj.weight"):
            values = permute_heads(values, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            values = permute_heads(values, config.num_key_value_heads)
        elif config.model_type == "gpt2" and name.endswith(CONV1D):
            values = values.T.copy()
        writer.add_tensor(gguf_name, values)


def export(model_dir: Path, output: Path) -> None:
    """Write a model directory as a GGUF file; raise ValueError for other architectures."""
    import gguf

    from babyllama.evaluation.loading import load_model

    model, tokenizer = load_model(model_dir, "cpu")
    model_type = model.config.model_type
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"{model_dir}: no export for {type(model).__name__}; "
            "only Llama and GPT-2 models can be written"
        )
    draft = output.with_name(output.name + ".part")
    writer = gguf.GGUFWriter(draft, ARCHITECTURES[model_type])
    writer.add_name(Path(model_dir).resolve().name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    add_shape(writer, model.config)
    add_tokenizer(writer, tokenizer, model.config.vocab_size)
    add_weights(writer, model)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    draft.replace(output)


def is_gguf(file: Path) -> bool:
    """Return True if a file starts like a GGUF file."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(description="Write a Llama or GPT-2 as a GGUF file.")
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model directory")
    parser.add_argument("output", type=Path, metavar="FILE", help="the .gguf file")
    args = parser.parse_args(argv)

    def body() -> None:
        check_replaceable(args.output, is_gguf(args.output), "name another file")
        try:
            import gguf  # noqa: F401
        except ImportError:
            raise ValueError("the gguf package is not installed: pip install gguf") from None
        export(args.model, args.output)
        size = args.output.stat().st_size / 1e6
        print(f"{args.output}: {size:.1f} MB; try it: llama-cli -m {args.output} -no-cnv")

    return cli.run_script(body)


if __name__ == "__main__":
    sys.exit(main())
