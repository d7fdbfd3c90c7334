"""Train a small Llama as a plain script on Hugging Face's Trainer does, in a fixed time.

    python experiments/plain_trainer.py --train data/train --dev data/dev --output plain
    python experiments/plain_trainer.py --train data/train --dev data/dev --output fast --bf16

The yardstick of experiments/race.py. It uses transformers, tokenizers and datasets and none of our
code. The recipe is the predecessor's: byte-level BPE of 16,000 tokens; Llama, 192 wide, 6 layers,
feed-forward 768, 6 heads, context 128; AdamW at 3e-4 with a cosine to 0 after 100 steps of warm-up,
4,096 tokens a step, float32. --bf16 adds autocast.

The time includes everything from the first import to the saved model: tokenizer, tokens, and a few
steps that are timed and thrown away to learn how many fit. Only the held-out loss along the way is
measured with the clock stopped. curve.json holds it against minutes; the last line of the output is
a JSON object with the figures of the run.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from pathlib import Path

STARTED = time.perf_counter()
VOCABULARY = 16_000
CONTEXT = 128
BATCH = 32  # chunks: 4,096 tokens a step
WARM_UP = 100
SPECIALS = ["<pad>", "<s>", "</s>"]
TIMED_STEPS = 12  # at most, of which the first two do not count
TIMED_SHARE = 0.02  # of the time; timing ends then even if it has timed fewer steps
MEASUREMENTS = 10  # of the held-out loss
HELD_OUT = 256  # chunks
END_SECONDS = 3  # to save the model
USED_SHARE = 0.98  # of the time; the rest is for a machine that gets a little slower


# ---- text ---------------------------------------------------------------------------------------


def read_documents(folder: Path) -> list[str]:
    """Return the documents of a folder's files: texts between two or more empty lines."""
    documents = []
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        text = file.read_text(encoding="utf-8", errors="replace")
        documents += [part for part in re.split(r"\n{3,}", text) if part.strip()]
    return documents


def train_tokenizer(documents: list[str], vocabulary: int):
    """Train a byte-level BPE tokenizer that puts <s> before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIALS,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIALS.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def make_chunks(documents: list[str], tokenizer):
    """Return a dataset of the documents' tokens, joined and cut into chunks."""
    from datasets import Dataset

    ids: list[int] = []
    for start in range(0, len(documents), 1000):
        for row in tokenizer(documents[start : start + 1000], verbose=False)["input_ids"]:
            ids += [*row, tokenizer.eos_token_id]
    ends = range(CONTEXT, len(ids) + 1, CONTEXT)
    return Dataset.from_dict({"input_ids": [ids[end - CONTEXT : end] for end in ends]})


# ---- training -----------------------------------------------------------------------------------


def make_model(vocabulary: int, seed: int):
    """Return an untrained model of the predecessor's shape."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=6,
            max_position_embeddings=CONTEXT,
            pad_token_id=SPECIALS.index("<pad>"),
            bos_token_id=SPECIALS.index("<s>"),
            eos_token_id=SPECIALS.index("</s>"),
        )
    )


def make_trainer(args: argparse.Namespace, tokenizer, chunks, steps: int, callback):
    """Return the Trainer of a tutorial, for this many steps."""
    import torch
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(args.output),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=WARM_UP,
        dataloader_drop_last=True,
        bf16=args.bf16,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        logging_steps=100,
        report_to=[],
        disable_tqdm=True,
        seed=args.seed,
    )
    return Trainer(
        model=make_model(len(tokenizer), args.seed),
        args=arguments,
        train_dataset=chunks,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
        callbacks=[callback],
    )


def make_clock(seconds: float):
    """Return a callback that times the steps of a Trainer, and stops it after some seconds."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.times = []

        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())
            is_over = len(self.times) > 2 and self.times[-1] - self.times[1] > seconds
            control.should_training_stop |= is_over

    return Clock()


def make_curve(held_out: list[list[int]], held_out_bytes: int, steps: int):
    """Return a callback with the `rows` of the held-out loss and the seconds it has `stopped`."""
    import torch
    from transformers import TrainerCallback

    class Curve(TrainerCallback):
        def __init__(self):
            self.rows = []
            self.stopped = 0.0
            self.interval = max(1, steps // MEASUREMENTS)

        def on_step_end(self, args, state, control, model=None, **kwargs):
            step = state.global_step
            if step % self.interval and step < state.max_steps:
                return
            started = time.perf_counter()
            nats = held_out_nats(model, torch.tensor(held_out))
            minutes = (started - STARTED - self.stopped) / 60
            bits = nats / math.log(2) / held_out_bytes
            tokens = step * BATCH * CONTEXT
            self.rows.append({"minutes": minutes, "tokens": tokens, "bits_per_byte": bits})
            self.stopped += time.perf_counter() - started

    return Curve()


def held_out_nats(model, chunks) -> float:
    """Return the summed loss of chunks (N, T) in float32."""
    import torch

    model.eval()
    nats = 0.0
    with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        for batch in chunks.to(model.device).split(BATCH):
            mean = model(input_ids=batch, labels=batch).loss
            nats += float(mean) * batch[:, 1:].numel()
    model.train()
    return nats


def steps_that_fit(args: argparse.Namespace, tokenizer, chunks) -> int:
    """Time a few steps of a model that is thrown away; return how many fit in the time left."""
    clock = make_clock(TIMED_SHARE * 60 * args.minutes)
    make_trainer(args, tokenizer, chunks, TIMED_STEPS, clock).train()
    step_seconds = (clock.times[-1] - clock.times[1]) / (len(clock.times) - 2)
    left = USED_SHARE * 60 * args.minutes - (time.perf_counter() - STARTED) - END_SECONDS
    steps = int(left / step_seconds)
    if steps < 1:
        raise SystemExit(f"error: --minutes {args.minutes:g} is too short for a single step")
    return steps


def run(args: argparse.Namespace) -> dict:
    """Train within the time and save the model; return the figures of the run."""
    import numpy as np

    documents = read_documents(args.train)
    words = sum(len(text.split()) for text in documents)
    tokenizer = train_tokenizer(documents, args.vocabulary)
    chunks = make_chunks(documents, tokenizer)
    tokenized = time.perf_counter() - STARTED

    steps = args.steps or steps_that_fit(args, tokenizer, chunks)

    # the clock stops for the held-out text, which only serves the curve
    started = time.perf_counter()
    dev = make_chunks(read_documents(args.dev), tokenizer)["input_ids"]
    chosen = np.random.default_rng(0).permutation(len(dev))[:HELD_OUT]
    held_out = [dev[i] for i in sorted(chosen)]
    texts = tokenizer.batch_decode([row[1:] for row in held_out], skip_special_tokens=True)
    curve = make_curve(held_out, sum(len(text.encode()) for text in texts), steps)
    curve.stopped = time.perf_counter() - started

    trainer = make_trainer(args, tokenizer, chunks, steps, curve)
    trainer.train()
    trainer.save_model(str(args.output))
    seconds = time.perf_counter() - STARTED - curve.stopped
    (args.output / "curve.json").write_text(json.dumps(curve.rows, indent=1), encoding="utf-8")
    tokens = steps * BATCH * CONTEXT
    return {
        "steps": steps,
        "tokens": tokens,
        "words": round(tokens * words / (len(chunks) * CONTEXT)),
        "seconds": seconds,
        "seconds_to_tokens": tokenized,
        "lr": args.lr,
        "bf16": args.bf16,
    }


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True, help="folder of training text")
    parser.add_argument("--dev", type=Path, required=True, help="folder of held-out text")
    parser.add_argument("--output", type=Path, required=True, help="folder of the model")
    parser.add_argument("--minutes", type=float, default=30.0, help="time (default 30)")
    parser.add_argument("--steps", type=int, help="instead of as many as fit in the time")
    parser.add_argument("--lr", type=float, default=3e-4, help="peak (default 3e-4)")
    parser.add_argument("--bf16", action="store_true", help="train under bf16 autocast")
    parser.add_argument("--seed", type=int, default=42, help="of weights and order (default 42)")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="default 16,000")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit code."""
    print(json.dumps(run(make_parser().parse_args(argv))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
