"""Draw figures into PNG files. The only module that imports matplotlib; computes no metric."""

from __future__ import annotations

import itertools
import math
import warnings
from pathlib import Path
from typing import Any

BLUE, ORANGE, GREEN, GREY, DARK = "#3367d6", "#e8710a", "#188038", "#80868b", "#3c4043"
COLOURS = (
    BLUE,
    ORANGE,
    GREEN,
    "#8430ce",
    "#b3261e",
    "#007b83",
)  # one for each model, as on the HTML page


def new_figure(rows: int, columns: int, width: float, height: float):
    """Return (figure, axes) that need no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, alpha=0.25)
        axis.set_axisbelow(True)
    return figure, axes


def label(text: Any) -> str:
    """Return text that matplotlib shows unchanged: a `$` would start a formula."""
    return str(text).replace("$", r"\$")


def plot_training(
    rows: list[dict], path: Path, title: str, floor_nats: float | None = None
) -> None:
    """Draw loss, learning rate and speed against tokens, from the rows of metrics.jsonl.

    `floor_nats` is the lowest loss in nats per token that any model can reach, if it is known.
    """
    train = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "eval_loss" in row]
    from matplotlib.ticker import EngFormatter, StrMethodFormatter

    figure, ((loss, rate, speed),) = new_figure(1, 3, 13, 4)
    for axis in (loss, rate, speed):
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 1.5M
    rate.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    speed.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    on_text = [r.get("ce_loss", r["loss"]) for r in train]  # without the teachers' part
    loss.plot([r["tokens"] for r in train], on_text, color=BLUE, lw=1.2, label="training")
    loss.plot(
        [r["tokens"] for r in held_out],
        [r["eval_loss"] for r in held_out],
        "o-",
        color=ORANGE,
        ms=4,
        label="held-out",
    )
    if floor_nats is not None:
        loss.axhline(
            floor_nats,
            color=GREEN,
            ls="--",
            lw=1.2,
            label=f"entropy of its grammar, {floor_nats:.3f}",
        )
    loss.set(xlabel="tokens", ylabel="loss (nats per token)", title=f"loss of {label(title)}")
    loss.legend(frameon=False)
    rate.plot([r["tokens"] for r in train], [r["learning_rate"] for r in train], color=BLUE)
    rate.set(xlabel="tokens", ylabel="learning rate", title="learning rate")
    steps = [
        b["step"] - a["step"] for a, b in itertools.pairwise([{"step": 0}, *train])
    ]  # a row of few is noise
    usual = sorted(steps)[len(steps) // 2] if steps else 0
    fast = [
        r for r, n in zip(train, steps, strict=True) if "tokens_per_second" in r and 2 * n >= usual
    ]
    speed.plot([r["tokens"] for r in fast], [r["tokens_per_second"] for r in fast], color=BLUE)
    speed.set(xlabel="tokens", ylabel="tokens per second", title="training speed", ylim=(0, None))
    figure.savefig(path, dpi=120)


def plot_evaluation(metrics: dict[str, Any], path: Path, title: str = "") -> None:
    """Draw surprisal, its distribution, a reliability diagram and samples.

    `metrics` is a dict of ModelEvaluator, several merged, a dict of them, or evaluate.py's report.
    Panels without figures are skipped; a perplexity alone is drawn with its intervals. ValueError
    if there is nothing to draw.
    """
    metrics = metrics.get("results", metrics)
    found = dict(metrics)
    for value in metrics.values():
        found |= value if isinstance(value, dict) else {}
    panels = [draw for key, draw in EVALUATION_PANELS.items() if found.get(key)]
    if not panels and found.get("nats_per_token") is not None:
        panels = [_draw_rates]
    if not panels:
        raise ValueError(
            f"nothing to draw: the metrics hold none of {', '.join(EVALUATION_PANELS)}"
        )
    rows = -(-len(panels) // 2)
    figure, axes = new_figure(rows, min(2, len(panels)), 7 * min(2, len(panels)), 4.5 * rows)
    for draw, axis in zip(panels, axes.flat, strict=False):
        draw(axis, found)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    figure.suptitle(label(title))
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph"
        )  # the font may lack a generated character
        figure.savefig(path, dpi=120)


def _draw_rates(axis, found: dict) -> None:
    keys = ("nats_per_token", "bits_per_byte")
    for place, key in enumerate(keys):
        value, (low, high) = found[key], found[f"{key}_ci95"]
        axis.plot([low, high], [place, place], color=BLUE, lw=2)
        axis.plot(value, place, "o", color=BLUE)
        axis.annotate(
            f"{value:.4f}", (value, place), xytext=(0, 8), textcoords="offset points", ha="center"
        )
    axis.set_yticks(range(len(keys)), [key.replace("_", " ") for key in keys])
    axis.set(xlabel="with 95 % interval", ylim=(-0.6, len(keys) - 0.4), xlim=(0, None))
    axis.set_title(
        f"perplexity {found['perplexity']:,.2f} per token, {found['word_perplexity']:,.2f} per word"
    )


def _draw_surprisal(axis, found: dict) -> None:
    sample = found["surprisal_sample"]
    bits = [value or 0.0 for value in sample["bits"]]
    axis.bar(range(len(bits)), bits, color=BLUE, width=0.8)
    names = [
        label(token.replace("\n", "\\n").replace("\t", "\\t").strip() or "_")
        for token in sample["tokens"]
    ]
    axis.set_xticks(
        range(len(bits)), names, rotation=75, ha="right", rotation_mode="anchor", fontsize=8
    )
    axis.set(
        ylabel="surprisal (bits)",
        title="surprisal along a held-out text",
        xlim=(-0.7, len(bits) - 0.3),
    )
    axis.grid(False, axis="x")


def _draw_distribution(axis, found: dict) -> None:
    histogram = found["surprisal_histogram_bits"]
    total = sum(histogram["counts"]) or 1
    edges, shares = histogram["edges"], [count / total for count in histogram["counts"]]
    axis.bar(edges[:-1], shares, width=0.95, align="edge", color=BLUE)
    last = max(
        (edge for edge, share in zip(edges[1:], shares, strict=True) if share), default=edges[-1]
    )
    axis.set(
        xlabel="surprisal of a token (bits)",
        ylabel="share of tokens",
        title="distribution of surprisal",
    )
    axis.set_xlim(0, last)
    if (loss := found.get("nats_per_token")) is not None:
        mean = loss / math.log(2)
        axis.axvline(mean, color=ORANGE, lw=1.5, label=f"mean, {mean:.2f} bits per token")
        axis.legend(frameon=False)


def _draw_reliability(axis, found: dict) -> None:
    bins = found["reliability"]
    total = sum(b["count"] for b in bins)
    axis.plot([0, 1], [0, 1], color=GREY, ls="--", lw=1, label="a calibrated model")
    places, heights = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
    lows, highs = zip(*(b["accuracy_ci95"] for b in bins), strict=True)
    axis.vlines(places, lows, highs, color=BLUE, lw=1.2, label="95 % interval")
    sizes = [20 + 400 * b["count"] / total for b in bins]
    axis.scatter(
        places,
        heights,
        s=sizes,
        color=BLUE,
        alpha=0.6,
        label="area: share of tokens",
        clip_on=False,
    )
    title = f"calibration, error {found['expected_calibration_error']:.3f} over {total:,} tokens"
    axis.set(
        xlabel="probability of the likeliest token", ylabel="how often it is right", title=title
    )
    axis.set(xlim=(0, 1), ylim=(0, 1))
    axis.legend(frameon=False, loc="lower right")


def _draw_samples(axis, found: dict) -> None:
    import textwrap

    lines = []
    for sample in found["generation_samples"][:4]:
        text = f"{sample['prompt']} | {sample['generations'][0]}"
        printable = "".join(c if c.isprintable() else " " for c in text)
        lines += [*textwrap.wrap(" ".join(printable.split()), 88)[:4], ""]
    axis.set_axis_off()
    axis.set_title("samples: prompt | continuation", loc="left")
    axis.text(
        0,
        0.98,
        label("\n".join(lines)),
        transform=axis.transAxes,
        va="top",
        fontsize=8.5,
        linespacing=1.35,
    )


EVALUATION_PANELS = {
    "surprisal_sample": _draw_surprisal,
    "surprisal_histogram_bits": _draw_distribution,
    "reliability": _draw_reliability,
    "generation_samples": _draw_samples,
}


def plot_comparison(rows: list[dict], path: Path) -> None:
    """Draw bars with 95 % intervals: a group per task, a colour per model, marks at chance.

    A row has `task`, `model`, `metric`, `value`, `low`, `high` and `chance` (or None), up to 1.
    """
    tasks, models = (list(dict.fromkeys(row[key] for row in rows)) for key in ("task", "model"))
    figure, ((axis,),) = new_figure(1, 1, max(6, 2 + len(tasks) * (1 + 0.25 * len(models))), 4.2)
    width = 0.8 / len(models)
    for i, model in enumerate(models):
        own = [row for row in rows if row["model"] == model]
        places = [tasks.index(row["task"]) + (i - (len(models) - 1) / 2) * width for row in own]
        errors = [
            [row["value"] - row["low"] for row in own],
            [row["high"] - row["value"] for row in own],
        ]
        axis.bar(
            places,
            [row["value"] for row in own],
            width * 0.92,
            yerr=errors,
            label=label(model),
            capsize=2,
            color=COLOURS[i % 6],
            hatch="/" * (i // 6),
            alpha=0.85,
            error_kw={"lw": 1.2, "ecolor": DARK},
        )
        marked = [
            (place, row["chance"])
            for place, row in zip(places, own, strict=True)
            if row["chance"] is not None
        ]
        for place, chance in marked:
            axis.hlines(
                chance,
                place - width / 2,
                place + width / 2,
                colors="black",
                linestyles="dotted",
                lw=1.4,
            )
    worse_above = {row["task"] for row in rows if row["metric"] == "avg_repetition_score"}
    names = [
        label(task).replace(" (", "\n(") + "\n(lower is better)" * (task in worse_above)
        for task in tasks
    ]
    tilted = {"rotation": 20, "ha": "right", "rotation_mode": "anchor"} if len(tasks) > 6 else {}
    axis.set_xticks(range(len(tasks)), names, **tilted)
    lowest = min(row["low"] for row in rows)
    axis.set(
        ylabel="score with 95 % interval; dotted: chance",
        ylim=(lowest - 0.02 if lowest < 0 else 0, 1.02),
    )
    axis.grid(visible=False, axis="x")
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)


def plot_sweep(keys: list[str], rows: list[dict], best: str, path: Path) -> None:
    """Draw held-out bits per byte against the values of each key, one panel per key.

    Runs that differ in this key alone are joined; a star marks the run named `best`. A row has
    `name`, `values` (by key) and `eval_bits_per_byte`. Rows with an `error` are skipped.
    """
    done = [row for row in rows if "error" not in row]
    figure, (axes,) = new_figure(1, len(keys), max(5, 4.5 * len(keys)), 4.2)
    for axis, key in zip(axes, keys, strict=True):
        _draw_sweep(axis, key, done, best)
    figure.savefig(path, dpi=120)


def _draw_sweep(axis, key: str, rows: list[dict], best: str) -> None:
    values = [row["values"][key] for row in rows]
    numbers = all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in values
    )
    names = list(dict.fromkeys(map(str, sorted(values) if numbers else values)))
    places = {name: float(name) if numbers else i for i, name in enumerate(names)}
    lines: dict[str, list[tuple]] = {}  # by what else the runs have in common
    for row in rows:
        others = ", ".join(f"{k.split('.')[1]} {v}" for k, v in row["values"].items() if k != key)
        lines.setdefault(others, []).append(
            (places[str(row["values"][key])], row["eval_bits_per_byte"])
        )
        if row["name"] == best:
            axis.plot(*lines[others][-1], "*", ms=14, color="black", zorder=3, label="best")
    for others, points in lines.items():
        axis.plot(
            *zip(*sorted(points), strict=True), "o-", ms=4, lw=1.2, label=label(others or "_alone")
        )
    if numbers and min(values) > 0 and max(values) >= 8 * min(values):
        axis.set_xscale("log")
    axis.set_xticks(list(places.values()), [label(name) for name in places])
    axis.minorticks_off()
    axis.set(xlabel=label(key), ylabel="held-out bits per byte")
    if len(lines) <= 8:
        axis.legend(
            frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3
        )


def plot_learning_curve(curve: dict[str, Any], path: Path) -> None:
    """Draw the accuracy of each phenomenon of a task over a run, and the mean with its interval.

    `curve` has `at` (million words seen, on a log axis; steps if `words` is false), `lines`
    {phenomenon: accuracies}, `mean`, `ci95`, `chance`, `run` and `task`.
    """
    figure, ((axis,),) = new_figure(1, 1, 9.5, 5)
    from matplotlib import colormaps
    from matplotlib.ticker import NullFormatter

    at, last = curve["at"], {term: values[-1] for term, values in curve["lines"].items()}
    axis.fill_between(at, *zip(*curve["ci95"], strict=True), color="black", alpha=0.12, lw=0)
    axis.plot(
        at,
        curve["mean"],
        "o-",
        color="black",
        lw=2.2,
        ms=4,
        label=f"all paradigms, {curve['mean'][-1]:.3f}",
    )
    for i, term in enumerate(
        sorted(last, key=lambda term: -last[term])
    ):  # the legend in the order of the ends
        name = label(f"{term.replace('_', ' ')}, {last[term]:.3f}")
        axis.plot(
            at, curve["lines"][term], ".-", color=colormaps["tab20"](i % 20), lw=1.2, label=name
        )
    axis.axhline(
        curve["chance"], color=GREY, ls=":", lw=1.2, label=f"chance, {curve['chance']:.3f}"
    )
    if curve["words"]:
        axis.set_xscale("log")
        shown = [n for n in at if str(n)[0] in "125" or n in (at[0], at[-1])]
        axis.set_xticks(shown, [f"{n:g}M" for n in shown])
        axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set(xlabel="words seen" if curve["words"] else "training steps", ylabel="accuracy",
             title=label(f"{curve['run']}: {curve['task']}"))  # fmt: skip
    axis.legend(
        frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), title="at the end"
    )
    figure.savefig(path, dpi=120)
