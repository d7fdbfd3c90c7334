"""Draw figures with matplotlib, which no other module imports.

A panel is a function that draws on one axis. A PNG file has the panels side by side. A page has a
picture of each, so that they fit on a phone; their text follows the browser's light or dark mode.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from babyllama.cli import printable
from babyllama.files import atomic_write

# colours that can be told from white and from black
BLUE = "#3b78e7"
ORANGE = "#e8710a"
GREEN = "#1e9447"
GREY = "#80868b"
PURPLE = "#a050e0"
RED = "#d93a30"
TEAL = "#0a9199"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, TEAL)
INK = "#1b1f24"  # text and axes; on a page the colour of INK_STYLE
INK_STYLE = """<style>
svg { color: #1b1f24; font-family: system-ui, sans-serif }
@media (prefers-color-scheme: dark) { svg { color: #dde3ea } }
</style>"""
DPI = 120
MAX_DOMAINS = 20  # in one panel: those with most text
Panel = Callable[[Any], None]  # draws on an axis


def new_figure(rows: int, columns: int, width: float, height: float):
    """Return (figure, axes) that need no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        _style(axis)
    return figure, axes


def _style(axis) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(True, color=GREY, alpha=0.25)
    axis.set_axisbelow(True)


def save_figure(figure, path: Path) -> None:
    """Write a figure to a PNG file atomically."""
    with atomic_write(path) as draft, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # that the font lacks
        figure.savefig(draft, dpi=DPI)


def save_panels(panels: list[Panel], path: Path, title: str) -> None:
    """Draw panels in two columns into a PNG file; the first of an odd number spans both."""
    cells = [0] * (len(panels) % 2) + list(range(len(panels)))
    grid = [cells[i : i + 2] for i in range(0, len(cells), 2)]
    figure = Figure(figsize=(9, 4 * len(grid)), layout="constrained")
    axes = figure.subplot_mosaic(grid)
    for number, draw in enumerate(panels):
        _style(axes[number])
        draw(axes[number])
    figure.suptitle(label(title))
    save_figure(figure, path)


def panel_for_page(draw: Panel, height: float = 3.4) -> tuple[str, str]:
    """Return the title of a panel and the source of its image: a data URI of an SVG picture."""
    colours = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    # text stays text, and equal figures give equal pages
    options = {"svg.fonttype": "none", "svg.hashsalt": "page"} | dict.fromkeys(colours, INK)
    with rc_context(options), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the browser has other fonts
        figure, ((axis,),) = new_figure(1, 1, 5, height)
        figure.patch.set_visible(False)
        axis.patch.set_visible(False)
        draw(axis)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue().replace(INK, "currentColor").replace("<defs>", f"{INK_STYLE}<defs>", 1)
    source = f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
    return axis.get_title().replace(r"\$", "$"), source


def label(text: Any) -> str:
    """Return text that matplotlib shows unchanged: a `$` would start a formula."""
    return printable(str(text)).replace("$", r"\$")


def read_picture(path: Path) -> np.ndarray:
    """Return the pixels of a PNG file, (height, width, channels), from 0 to 1."""
    return imread(path)


# ---- training -----------------------------------------------------------------------------------


def training_panels(rows: list[dict], floor_nats: float | None = None) -> list[Panel]:
    """Return panels of loss, learning rate and speed against tokens, from rows of metrics.jsonl.

    `floor_nats` is the lowest loss in nats per token that any model can reach; the distance from it
    is a panel if it is known. Scores of a benchmark (`benchmark/<task>`) are another, if there are
    any.
    """
    panels = [partial(draw_loss, rows=rows, floor_nats=floor_nats)]
    if floor_nats is not None:
        panels.append(partial(draw_gap, rows=rows, floor_nats=floor_nats))
    panels += [partial(_draw_learning_rate, rows=rows), partial(_draw_speed, rows=rows)]
    if any(key.startswith("benchmark/") for row in rows for key in row):
        panels.append(partial(_draw_scores, rows=rows))
    return panels


def _plot_against_tokens(axis, rows: list[dict], key: str, *style: str, **options) -> None:
    """Draw a line through the rows that have the key."""
    points = [(row["tokens"], row[key]) for row in rows if key in row]
    axis.plot(*zip(*points, strict=True), *style, **options)
    axis.set_xlabel("tokens")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 1.5M


def _losses(rows: list[dict]) -> list[dict]:
    """Return the rows with `loss`; in distillation that is the loss on the text alone."""
    return [{**row, "loss": row.get("ce_loss", row["loss"])} for row in rows if "loss" in row]


def draw_loss(axis, rows: list[dict], floor_nats: float | None = None) -> None:
    """Draw the training and held-out loss, and the entropy of the grammar if it is known."""
    _plot_against_tokens(axis, _losses(rows), "loss", color=BLUE, lw=1.2, label="training")
    evaluated = [row for row in rows if "eval_loss" in row]
    if evaluated:  # none if the run ended at a checkpoint between two evaluations
        style = {"color": ORANGE, "ms": 4, "label": f"held-out, {evaluated[-1]['eval_loss']:.3f}"}
        _plot_against_tokens(axis, evaluated, "eval_loss", "o-", **style)
    if floor_nats is not None:
        floor_label = f"entropy of the grammar, {floor_nats:.3f}"
        axis.axhline(floor_nats, color=GREEN, ls="--", lw=1.2, label=floor_label)
    axis.set(ylabel="nats per token", title="loss")
    axis.legend(frameon=False)


def draw_gap(axis, rows: list[dict], floor_nats: float) -> None:
    """Draw how far the losses are above the entropy of the grammar, on a log axis.

    On little text a loss can be below the entropy, which is an average; such points are not drawn.
    """
    for losses, key, name, colour, line in (
        (_losses(rows), "loss", "training", BLUE, "-"),
        (rows, "eval_loss", "held-out", ORANGE, "o-"),
    ):
        above = [row for row in losses if row.get(key, 0) > floor_nats]
        gaps = [{"tokens": row["tokens"], "gap": row[key] - floor_nats} for row in above]
        last = f", {gaps[-1]['gap']:.3f}" if gaps else ""
        options = {"color": colour, "ms": 4, "lw": 1.2, "label": f"{name}{last}"}
        _plot_against_tokens(axis, gaps, "gap", line, **options)
    axis.set(ylabel="nats per token", title="loss above the entropy", yscale="log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.legend(frameon=False)


def _draw_learning_rate(axis, rows: list[dict]) -> None:
    _plot_against_tokens(axis, rows, "learning_rate", color=BLUE)
    axis.set_title("learning rate")
    axis.ticklabel_format(axis="y", style="plain")


def _draw_speed(axis, rows: list[dict]) -> None:
    timed_rows = _rows_with_reliable_speed([row for row in rows if "loss" in row])
    _plot_against_tokens(axis, timed_rows, "tokens_per_second", color=BLUE)
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.set(ylabel="tokens per second", title="training speed", ylim=(0, None))


def _draw_scores(axis, rows: list[dict]) -> None:
    """Draw the scores of training.benchmark."""
    for key in sorted({key for row in rows for key in row if key.startswith("benchmark/")}):
        name = label(key.removeprefix("benchmark/"))
        _plot_against_tokens(axis, rows, key, "o-", ms=4, label=name)
    axis.set(ylabel="score", title="benchmark")
    axis.legend(frameon=False)


def plot_race(curves: dict[str, list[dict]], path: Path) -> None:
    """Draw held-out bits per byte against wall minutes, a curve for each contestant.

    `curves` holds points with `minutes` and `bits_per_byte`. The background is transparent and all
    colours are of medium brightness, so that the picture suits light and dark pages.
    """
    figure, ((axis,),) = new_figure(1, 1, 7, 3.5)
    for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
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


def evaluation_panels(metrics: dict[str, Any]) -> list[Panel]:
    """Return panels of surprisal, its distribution, a reliability diagram and domains.

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

    panels = [draw for key, draw in EVALUATION_PANELS.items() if merged.get(key)]
    if not panels and merged.get("nats_per_token") is not None:
        panels = [_draw_perplexity]
    if not panels:
        keys = ", ".join(EVALUATION_PANELS)
        raise ValueError(f"nothing to draw: the metrics contain none of {keys}")
    return [partial(draw, metrics=merged) for draw in panels]


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
    axis.set(xlabel="with 95% interval", ylim=(-0.6, len(keys) - 0.4), xlim=(0, None))
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
            axis.plot(interval, [height, height], color=INK, lw=1.2)

    title = "held-out text by domain"
    if metrics.get("bits_per_byte") is not None:
        axis.axvline(metrics["bits_per_byte"], color=ORANGE, lw=1.5)
        title += f"; all: {metrics['bits_per_byte']:.3f}"
    axis.set(xlabel="bits per byte with 95% interval", title=title)
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
    axis.vlines(confidences, lows, highs, color=BLUE, lw=1.2, label="95% interval")
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


EVALUATION_PANELS = {
    "surprisal_sample": _draw_surprisal,
    "surprisal_histogram_bits": _draw_distribution,
    "reliability": _draw_reliability,
    "by_domain": _draw_domains,
}


# ---- comparison, sweep and learning curves ------------------------------------------------------


def plot_comparison(rows: list[dict], path: Path) -> None:
    """Draw bars with 95% intervals: a group per task, a colour per model, marks at chance.

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
            color=COLOURS[i % len(COLOURS)],
            hatch="/" * (i // len(COLOURS)),
            alpha=0.85,
            error_kw={"lw": 1.2, "ecolor": INK},
        )
        for position, row in zip(positions, model_rows, strict=True):
            value = f"{row['value']:.2f}"  # a bar at 0 would look like a missing one
            axis.text(position, row["high"] + 0.01, value, ha="center", va="bottom", fontsize=8)
            if row["chance"] is not None:
                left = position - bar_width / 2
                right = position + bar_width / 2
                axis.hlines(row["chance"], left, right, colors=INK, linestyles="dotted", lw=1.4)

    # the names of the tasks
    lower_is_better = {row["task"] for row in rows if row["metric"] == "avg_repetition_score"}
    names = []
    for task in tasks:
        name = label(task).replace(" (", "\n(")
        names.append(name + "\n(lower is better)" if task in lower_is_better else name)
    many_tasks = len(tasks) > 6
    tilt = {"rotation": 20, "ha": "right", "rotation_mode": "anchor"} if many_tasks else {}
    axis.set_xticks(range(len(tasks)), names, **tilt)

    # a score such as a correlation can be below 0
    lowest = min(row["low"] for row in rows)
    axis.set_ylim(lowest - 0.02 if lowest < 0 else 0, 1.08)
    axis.set_ylabel("score with 95% interval; dotted: chance")
    axis.grid(visible=False, axis="x")
    if len(models) > 1:
        axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    else:
        axis.set_title(label(models[0]))
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
    figure.suptitle(label(path.parent.name))
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
    """Draw a learning curve into a PNG file; see draw_learning_curve."""
    figure, ((axis,),) = new_figure(1, 1, 8, 6)
    draw_learning_curve(axis, curve)
    figure.suptitle(label(curve["run"]))
    save_figure(figure, path)


def draw_learning_curve(axis, curve: dict[str, Any]) -> None:
    """Draw the accuracy of each phenomenon of a task over a run, and the mean with its interval.

    `curve` has `at` (million words seen, on a log axis; steps if `words` is false), `lines`
    {phenomenon: accuracies}, `mean`, `ci95`, `chance`, `run` and `task`. `lines` may be empty.
    """
    at = curve["at"]

    # the mean with its interval
    lows, highs = zip(*curve["ci95"], strict=True)
    mean_label = f"{curve['task']}, {curve['mean'][-1]:.3f}"
    axis.fill_between(at, lows, highs, color=BLUE, alpha=0.2, lw=0)
    axis.plot(at, curve["mean"], "o-", color=BLUE, lw=2.2, ms=4, label=label(mean_label))

    # the phenomena, sorted by final accuracy, so that the legend has the order of the line ends
    colours = colormaps["tab20"]
    by_final_accuracy = sorted(curve["lines"].items(), key=lambda line: -line[1][-1])
    for i, (phenomenon, accuracies) in enumerate(by_final_accuracy):
        name = label(f"{phenomenon.replace('_', ' ')}, {accuracies[-1]:.3f}")
        axis.plot(at, accuracies, ".-", color=colours(i % 20), lw=1.2, label=name)
    if curve["chance"] is not None:
        chance_label = f"chance, {curve['chance']:.3f}"
        axis.axhline(curve["chance"], color=GREY, ls=":", lw=1.2, label=chance_label)

    # the axis of words: ticks at the ends and at counts that start with 1, 2 or 5
    if curve["words"] and at[0] > 0:  # 0 has no logarithm
        axis.set_xscale("log")
        ticks = [n for n in at if str(n)[0] in "125" or n in (at[0], at[-1])]
        axis.set_xticks(ticks, [f"{n:g}M" for n in ticks])
        axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("words seen" if curve["words"] else "training steps")
    axis.set(ylabel="score", title=label(curve["task"]))
    style = {"frameon": False, "fontsize": 8, "title": "last score"}
    axis.figure.legend(loc="outside lower center", ncols=2, **style)
