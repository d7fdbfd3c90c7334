"""Draw figures into PNG files. The only module that imports matplotlib; computes no metric."""

from __future__ import annotations

import itertools
import math
import textwrap
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

from babyllama.cli import printable
from babyllama.files import atomic_write

BLUE = "#3367d6"
ORANGE = "#e8710a"
GREEN = "#188038"
GREY = "#80868b"
DARK = "#3c4043"
PURPLE = "#8430ce"
RED = "#b3261e"
TEAL = "#007b83"
MODEL_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, TEAL)  # in the order of the HTML page
DPI = 120
MAX_DOMAINS = 20  # in one panel: those with most text


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


def save_figure(figure, path: Path) -> None:
    """Write a figure to a PNG file atomically."""
    with atomic_write(path) as draft:
        figure.savefig(draft, dpi=DPI)


def label(text: Any) -> str:
    """Return text that matplotlib shows unchanged: a `$` would start a formula."""
    return printable(str(text)).replace("$", r"\$")


def read_picture(path: Path) -> np.ndarray:
    """Return the pixels of a PNG file, (height, width, channels), from 0 to 1."""
    from matplotlib.image import imread

    return imread(path)


# ---- training -----------------------------------------------------------------------------------


def plot_training(
    rows: list[dict], path: Path, title: str, floor_nats: float | None = None
) -> None:
    """Draw loss, learning rate and speed against tokens, from the rows of metrics.jsonl.

    Scores of a benchmark (`benchmark/<task>`), if there are any, get a panel of their own.
    `floor_nats` is the lowest loss in nats per token that any model can reach, if it is known.
    """
    from matplotlib.ticker import EngFormatter, StrMethodFormatter

    training_rows = [row for row in rows if "loss" in row]
    held_out_rows = [row for row in rows if "eval_loss" in row]
    tokens = [row["tokens"] for row in training_rows]

    tasks = sorted({key for row in rows for key in row if key.startswith("benchmark/")})
    panels = 4 if tasks else 3
    figure, (axes,) = new_figure(1, panels, 13 * panels / 3, 4)
    loss_axis, rate_axis, speed_axis = axes[:3]
    for axis in axes:
        axis.set_xlabel("tokens")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 1.5M
    rate_axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    speed_axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))

    # loss; in distillation `ce_loss` is the loss on the text, without the teachers' part
    losses = [row.get("ce_loss", row["loss"]) for row in training_rows]
    held_out_tokens = [row["tokens"] for row in held_out_rows]
    held_out_losses = [row["eval_loss"] for row in held_out_rows]
    loss_axis.plot(tokens, losses, color=BLUE, lw=1.2, label="training")
    loss_axis.plot(held_out_tokens, held_out_losses, "o-", color=ORANGE, ms=4, label="held-out")
    if floor_nats is not None:
        floor_label = f"entropy of its grammar, {floor_nats:.3f}"
        loss_axis.axhline(floor_nats, color=GREEN, ls="--", lw=1.2, label=floor_label)
    loss_axis.set(ylabel="loss (nats per token)", title=f"loss of {label(title)}")
    loss_axis.legend(frameon=False)

    # learning rate
    learning_rates = [row["learning_rate"] for row in training_rows]
    rate_axis.plot(tokens, learning_rates, color=BLUE)
    rate_axis.set(ylabel="learning rate", title="learning rate")

    # speed
    timed_rows = _rows_with_reliable_speed(training_rows)
    speeds = [row["tokens_per_second"] for row in timed_rows]
    speed_axis.plot([row["tokens"] for row in timed_rows], speeds, color=BLUE)
    speed_axis.set(ylabel="tokens per second", title="training speed", ylim=(0, None))

    # benchmark
    for task in tasks:
        scored_rows = [row for row in rows if task in row]
        scores = [row[task] for row in scored_rows]
        task_label = label(task.removeprefix("benchmark/"))
        axes[3].plot([row["tokens"] for row in scored_rows], scores, "o-", ms=4, label=task_label)
    if tasks:
        axes[3].set(ylabel="score", title="benchmark")
        axes[3].legend(frameon=False)
    save_figure(figure, path)


def plot_race(curves: dict[str, list[dict]], path: Path) -> None:
    """Draw held-out bits per byte against wall minutes, a curve for each contestant.

    `curves` holds points with `minutes` and `bits_per_byte`. The background is transparent and all
    colours are of medium brightness, so that the picture suits light and dark pages.
    """
    figure, ((axis,),) = new_figure(1, 1, 7, 3.5)
    for (name, curve), colour in zip(curves.items(), MODEL_COLOURS, strict=False):
        minutes = [point["minutes"] for point in curve]
        bits = [point["bits_per_byte"] for point in curve]
        axis.plot(minutes, bits, "o-", color=colour, ms=4, label=f"{label(name)}, {bits[-1]:.3f}")
    axis.set(xlabel="minutes since the raw text", ylabel="held-out bits per byte", xlim=(0, None))
    axis.legend(frameon=False, labelcolor=GREY)

    figure.patch.set_alpha(0)
    axis.patch.set_alpha(0)
    axis.tick_params(colors=GREY)
    for part in (*axis.spines.values(), axis.xaxis.label, axis.yaxis.label):
        part.set_color(GREY)
    save_figure(figure, path)


def _rows_with_reliable_speed(rows: list[dict]) -> list[dict]:
    """Return the rows that time at least half the usual number of steps; fewer are noise."""
    step_counts = [
        row["step"] - previous["step"] for previous, row in itertools.pairwise([{"step": 0}, *rows])
    ]
    usual_count = sorted(step_counts)[len(rows) // 2] if rows else 0
    return [
        row
        for row, count in zip(rows, step_counts, strict=True)
        if "tokens_per_second" in row and 2 * count >= usual_count
    ]


# ---- evaluation ---------------------------------------------------------------------------------


def plot_evaluation(metrics: dict[str, Any], path: Path, title: str = "") -> None:
    """Draw surprisal, its distribution, a reliability diagram, domains and samples.

    `metrics` is a dict of ModelEvaluator, several merged, a dict of them, or evaluate.py's report.
    Panels without figures are skipped; a perplexity alone is drawn with its intervals. ValueError
    if there is nothing to draw.
    """
    # merge the metrics of all sections
    metrics = metrics.get("results", metrics)
    merged = dict(metrics)
    for section in metrics.values():
        if isinstance(section, dict):
            merged |= section

    # choose the panels
    panels = [draw for key, draw in EVALUATION_PANELS.items() if merged.get(key)]
    if not panels and merged.get("nats_per_token") is not None:
        panels = [_draw_perplexity]
    if not panels:
        keys = ", ".join(EVALUATION_PANELS)
        raise ValueError(f"nothing to draw: the metrics contain none of {keys}")

    # draw them in two columns
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = new_figure(rows, columns, 7 * columns, 4.5 * rows)
    for draw, axis in zip(panels, axes.flat, strict=False):
        draw(axis, merged)
    for empty_axis in axes.flat[len(panels) :]:
        empty_axis.set_axis_off()
    figure.suptitle(label(title))
    with warnings.catch_warnings():
        # the font may lack a generated character
        warnings.filterwarnings("ignore", message="Glyph")
        save_figure(figure, path)


def _draw_perplexity(axis, metrics: dict) -> None:
    """Draw nats per token and bits per byte as points with their intervals."""
    keys = ("nats_per_token", "bits_per_byte")
    for height, key in enumerate(keys):
        value = metrics[key]
        axis.plot(metrics[f"{key}_ci95"], [height, height], color=BLUE, lw=2)
        axis.plot(value, height, "o", color=BLUE)
        axis.annotate(
            f"{value:.4f}", (value, height), xytext=(0, 8), textcoords="offset points", ha="center"
        )
    axis.set_yticks(range(len(keys)), [key.replace("_", " ") for key in keys])
    axis.set(xlabel="with 95 % interval", ylim=(-0.6, len(keys) - 0.4), xlim=(0, None))
    per_token = f"{metrics['perplexity']:,.2f} per token"
    per_word = f"{metrics['word_perplexity']:,.2f} per word"
    axis.set_title(f"perplexity {per_token}, {per_word}")


def _draw_domains(axis, metrics: dict) -> None:
    """Draw a horizontal bar for the bits per byte of each domain, with its interval."""
    by_size = sorted(metrics["by_domain"].items(), key=lambda item: -item[1]["total_bytes"])
    rows = [
        (name, figures["bits_per_byte"], figures["bits_per_byte_ci95"])
        for name, figures in by_size[:MAX_DOMAINS]
    ]
    rows = sorted((row for row in rows if row[1] is not None), key=lambda row: -row[1])
    axis.barh([label(name) for name, _, _ in rows], [bits for _, bits, _ in rows], color=BLUE)
    for height, (_, _, interval) in enumerate(rows):
        if None not in interval:  # a domain of one document has no interval
            axis.plot(interval, [height, height], color=DARK, lw=1.2)
    if metrics.get("bits_per_byte") is not None:
        total = metrics["bits_per_byte"]
        axis.axvline(total, color=ORANGE, lw=1.5, label=f"all domains, {total:.3f}")
        axis.legend(frameon=False)
    axis.set(xlabel="bits per byte with 95 % interval", title="held-out text by domain")
    axis.grid(False, axis="y")


def _draw_surprisal(axis, metrics: dict) -> None:
    """Draw a bar for each token of one text."""
    sample = metrics["surprisal_sample"]
    bits = [value or 0.0 for value in sample["bits"]]  # results files have null for NaN
    names = []
    for token in sample["tokens"]:
        visible = token.replace("\n", "\\n").replace("\t", "\\t").strip()
        names.append(label(visible or "_"))

    axis.bar(range(len(bits)), bits, color=BLUE, width=0.8)
    axis.set_xticks(
        range(len(bits)), names, rotation=75, ha="right", rotation_mode="anchor", fontsize=8
    )
    axis.set_xlim(-0.7, len(bits) - 0.3)
    axis.set(ylabel="surprisal (bits)", title="surprisal along a held-out text")
    axis.grid(False, axis="x")


def _draw_distribution(axis, metrics: dict) -> None:
    """Draw the histogram of the surprisal of all tokens, up to its last bar that is not empty."""
    edges = metrics["surprisal_histogram_bits"]["edges"]
    counts = metrics["surprisal_histogram_bits"]["counts"]
    total = sum(counts) or 1
    shares = [count / total for count in counts]
    filled_edges = [right for right, count in zip(edges[1:], counts, strict=True) if count]

    axis.bar(edges[:-1], shares, width=0.95, align="edge", color=BLUE)
    axis.set_xlim(0, max(filled_edges, default=edges[-1]))
    axis.set(
        xlabel="surprisal of a token (bits)",
        ylabel="share of tokens",
        title="distribution of surprisal",
    )
    nats_per_token = metrics.get("nats_per_token")
    if nats_per_token is not None:
        mean = nats_per_token / math.log(2)
        axis.axvline(mean, color=ORANGE, lw=1.5, label=f"mean, {mean:.2f} bits per token")
        axis.legend(frameon=False)


def _draw_reliability(axis, metrics: dict) -> None:
    """Draw accuracy against confidence, a point per bin, beside the diagonal of calibration."""
    bins = metrics["reliability"]
    total = sum(b["count"] for b in bins)
    confidences = [b["confidence"] for b in bins]
    accuracies = [b["accuracy"] for b in bins]
    lows = [b["accuracy_ci95"][0] for b in bins]
    highs = [b["accuracy_ci95"][1] for b in bins]
    areas = [20 + 400 * b["count"] / total for b in bins]

    axis.plot([0, 1], [0, 1], color=GREY, ls="--", lw=1, label="perfect calibration")
    axis.vlines(confidences, lows, highs, color=BLUE, lw=1.2, label="95 % interval")
    axis.scatter(
        confidences,
        accuracies,
        s=areas,
        color=BLUE,
        alpha=0.6,
        label="area: share of tokens",
        clip_on=False,
    )
    error = metrics["expected_calibration_error"]
    axis.set(
        xlabel="probability of the likeliest token",
        ylabel="accuracy",
        title=f"calibration, error {error:.3f} over {total:,} tokens",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    axis.legend(frameon=False, loc="lower right")


def _draw_samples(axis, metrics: dict) -> None:
    """Write four prompts with their continuations, each truncated to four lines."""
    lines = []
    for sample in metrics["generation_samples"][:4]:
        text = f"{sample['prompt']} | {sample['generations'][0]}"
        visible = "".join(c if c.isprintable() else " " for c in text)
        wrapped = textwrap.wrap(" ".join(visible.split()), 88)
        lines += [*wrapped[:4], ""]

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
    "by_domain": _draw_domains,
    "generation_samples": _draw_samples,
}


# ---- comparison, sweep and learning curves ------------------------------------------------------


def plot_comparison(rows: list[dict], path: Path) -> None:
    """Draw bars with 95 % intervals: a group per task, a colour per model, marks at chance.

    A row has `task`, `model`, `metric`, `value`, `low`, `high` and `chance` (or None), up to 1.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    group_width = 1 + 0.25 * len(models)
    figure, ((axis,),) = new_figure(1, 1, max(6, 2 + len(tasks) * group_width), 4.2)

    # the bars of each model, beside those of the others
    bar_width = 0.8 / len(models)
    for i, model in enumerate(models):
        model_rows = [row for row in rows if row["model"] == model]
        offset = (i - (len(models) - 1) / 2) * bar_width
        positions = [tasks.index(row["task"]) + offset for row in model_rows]
        values = [row["value"] for row in model_rows]
        below = [row["value"] - row["low"] for row in model_rows]
        above = [row["high"] - row["value"] for row in model_rows]
        axis.bar(
            positions,
            values,
            bar_width * 0.92,
            yerr=[below, above],
            label=label(model),
            capsize=2,
            color=MODEL_COLOURS[i % len(MODEL_COLOURS)],
            hatch="/" * (i // len(MODEL_COLOURS)),
            alpha=0.85,
            error_kw={"lw": 1.2, "ecolor": DARK},
        )
        for position, row in zip(positions, model_rows, strict=True):
            if row["chance"] is not None:
                left = position - bar_width / 2
                right = position + bar_width / 2
                axis.hlines(row["chance"], left, right, colors="black", linestyles="dotted", lw=1.4)

    # the names of the tasks
    lower_is_better = {row["task"] for row in rows if row["metric"] == "avg_repetition_score"}
    names = []
    for task in tasks:
        name = label(task).replace(" (", "\n(")
        names.append(name + "\n(lower is better)" if task in lower_is_better else name)
    many_tasks = len(tasks) > 6
    tilt = {"rotation": 20, "ha": "right", "rotation_mode": "anchor"} if many_tasks else {}
    axis.set_xticks(range(len(tasks)), names, **tilt)

    lowest = min(row["low"] for row in rows)
    axis.set_ylim(lowest - 0.02 if lowest < 0 else 0, 1.02)
    axis.set_ylabel("score with 95 % interval; dotted: chance")
    axis.grid(visible=False, axis="x")
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, path)


def plot_sweep(keys: list[str], rows: list[dict], best: str, path: Path) -> None:
    """Draw held-out bits per byte against the values of each key, one panel per key.

    Runs that differ in this key alone are joined; a star marks the run named `best`. A row has
    `name`, `values` (by key) and `eval_bits_per_byte`. Rows with an `error` are skipped.
    """
    finished = [row for row in rows if "error" not in row]
    figure, (axes,) = new_figure(1, len(keys), max(5, 4.5 * len(keys)), 4.2)
    for axis, key in zip(axes, keys, strict=True):
        _draw_sweep(axis, key, finished, best)
    save_figure(figure, path)


def _draw_sweep(axis, key: str, rows: list[dict], best: str) -> None:
    """Draw one line per combination of the other keys' values."""
    # place numbers by value and other values side by side, in the order of the runs
    values = [row["values"][key] for row in rows]
    numeric = all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in values
    )
    ordered = sorted(values) if numeric else values
    names = list(dict.fromkeys(map(str, ordered)))
    positions = {name: float(name) if numeric else i for i, name in enumerate(names)}

    # join the runs that share the values of the other keys
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        others = {k.split(".")[1]: value for k, value in row["values"].items() if k != key}
        line = ", ".join(f"{name} {value}" for name, value in others.items())
        point = (positions[str(row["values"][key])], row["eval_bits_per_byte"])
        lines.setdefault(line, []).append(point)
        if row["name"] == best:
            axis.plot(*point, "*", ms=14, color="black", zorder=3, label="best")
    for line, points in lines.items():
        xs, ys = zip(*sorted(points), strict=True)
        line_label = label(line or "_alone")  # matplotlib hides a label that starts with _
        axis.plot(xs, ys, "o-", ms=4, lw=1.2, label=line_label)

    # a log axis if the values span a factor of 8
    if numeric and min(values) > 0 and max(values) >= 8 * min(values):
        axis.set_xscale("log")
    axis.set_xticks(list(positions.values()), [label(name) for name in positions])
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
    from matplotlib import colormaps
    from matplotlib.ticker import NullFormatter

    figure, ((axis,),) = new_figure(1, 1, 9.5, 5)
    at = curve["at"]

    # the mean with its interval
    lows, highs = zip(*curve["ci95"], strict=True)
    mean_label = f"all paradigms, {curve['mean'][-1]:.3f}"
    axis.fill_between(at, lows, highs, color="black", alpha=0.12, lw=0)
    axis.plot(at, curve["mean"], "o-", color="black", lw=2.2, ms=4, label=mean_label)

    # the phenomena, sorted by final accuracy, so that the legend has the order of the line ends
    colours = colormaps["tab20"]
    by_final_accuracy = sorted(curve["lines"].items(), key=lambda line: -line[1][-1])
    for i, (phenomenon, accuracies) in enumerate(by_final_accuracy):
        name = label(f"{phenomenon.replace('_', ' ')}, {accuracies[-1]:.3f}")
        axis.plot(at, accuracies, ".-", color=colours(i % 20), lw=1.2, label=name)
    chance_label = f"chance, {curve['chance']:.3f}"
    axis.axhline(curve["chance"], color=GREY, ls=":", lw=1.2, label=chance_label)

    # the axis of words: ticks at the ends and at counts that start with 1, 2 or 5
    if curve["words"]:
        axis.set_xscale("log")
        ticks = [n for n in at if str(n)[0] in "125" or n in (at[0], at[-1])]
        axis.set_xticks(ticks, [f"{n:g}M" for n in ticks])
        axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("words seen" if curve["words"] else "training steps")
    axis.set_ylabel("accuracy")
    axis.set_title(label(f"{curve['run']}: {curve['task']}"))
    axis.legend(
        frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), title="final accuracy"
    )
    save_figure(figure, path)
