"""What a benchmark found, for people: differences between models, a table, a bar chart, one self-contained page.

It measures nothing: it gets what the JSON file will hold. The page loads nothing, runs only its own few lines of
script (a content security policy says so), and shows names and generated text as text.

    from benchmark_report import write_files
    write_files(json.loads(Path("benchmark.json").read_text()), Path("benchmark.json"))
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from babyllama.evaluation import grading, tasks

UNIT_SCALE = (
    "accuracy", "completion_accuracy", "generation_accuracy", "spearman", "avg_consistency_score",
    "avg_repetition_score",
)  # fmt: skip
SECOND = {  # a figure beside the main one, and what its rows are called
    "completion_accuracy": {"generation_accuracy": "generated"},
    "eye_tracking_percent": {"self_paced_reading_percent": "self-paced"},
}
LABELS = {
    "completion_accuracy": "accuracy", "spearman": "rank correlation", "avg_consistency_score": "overlap",
    "avg_repetition_score": "repetition", "tokens_per_second": "tokens/s", "eye_tracking_percent": "% explained",
    "self_paced_reading_percent": "% explained", "generation_accuracy": "accuracy",
}  # fmt: skip
CHECKPOINT = re.compile(r"(checkpoint-|chck_)(\d+)(M?)")
PICTURES = {"training_curves.png": "training", "evaluation_plots.png": "held-out text"}
TEMPLATE = Path(__file__).with_suffix(".html.j2")
CHART = {"width": 680, "height": 300, "left": 50, "right": 190, "top": 12, "bottom": 40}


def short_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path, with as many parts before it as it takes to tell all apart."""
    parts = [Path(path).resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise ValueError(
            f"{next(p for i, p in enumerate(paths) if parts[i] in parts[:i])}: the same model stands twice"
        )
    names = []
    for own in parts:
        depth = next(
            n for n in range(1, len(own) + 1) if sum(other[-n:] == own[-n:] for other in parts) == 1
        )
        names.append("/".join(part for part in own[-depth:] if part != "/"))
    return names


def places_of(paths: Sequence[str]) -> dict[str, Path]:
    """The folder where BabyLM's pipeline looks for each model's predictions: MODEL/main, or for a chck_ checkpoint its
    run's MODEL/chck_<N>M; MODEL is the stem of a name, or what short_names calls it where another has that stem."""
    whole = {path: Path(path).resolve() for path in paths}
    revision = {
        path: p.name if re.fullmatch(r"chck_\d+M", p.name) else "main" for path, p in whole.items()
    }
    home = {path: p if revision[path] == "main" else p.parent for path, p in whole.items()}
    homes = sorted(set(home.values()))
    stems, names = [p.stem for p in homes], short_names([str(p) for p in homes])
    models = {
        p: stem if stems.count(stem) == 1 else name.replace("/", "_")
        for p, stem, name in zip(homes, stems, names, strict=True)
    }
    return {path: Path(models[home[path]], revision[path]) for path in paths}


def differences(declared: dict, scores: dict, reference: dict, seed: int) -> dict[str, Any]:
    """For each task how much more a model has than the reference: paired bootstrap by item, or by group of prompts."""
    found = {}
    for name, own in scores.items():
        task = declared[name]
        if task.items:
            found[name] = grading.compare(task.type, task.items, own, reference[name], seed)
        else:
            found[name] = grading.compare_means(own - reference[name], seed)
    return found


def table_rows(document: dict) -> list[dict[str, Any]]:
    """One row for each task and model (and second figure): the figure, how sure it is, and what to hold it against."""
    rows = []
    for task, declared in document["configs"].items():
        of_models = {model: results[task] for model, results in document["results"].items()}
        main = next(iter(of_models.values()))["metric"]
        official = declared["type"] in tasks.TASKS and tasks.TASKS[declared["type"]].official
        second = {metric: f"{task} ({word})" for metric, word in SECOND.get(main, {}).items()}
        for metric, name in {main: task, **second}.items():
            for model, result in of_models.items():
                low, high = result.get(f"{metric}_ci95", (None, None))
                beside = result if metric == main else {}
                gaps = (
                    document["comparison"].get("differences", {}).get(model, {})
                    if metric == main
                    else {}
                )
                rows.append({
                    "task": name, "model": model, "metric": metric, "label": LABELS.get(metric, metric),
                    "value": result[metric], "low": low, "high": high, "n": result["n"], "chance": beside.get("chance"),
                    "ties": beside.get("ties"), "official": beside.get("accuracy_official") if official else None,
                    "baselines": [baseline(*pair) for pair in beside.get("baselines", {}).items()],
                    "difference": gaps.get(task), "unit_scale": metric in UNIT_SCALE,
                })  # fmt: skip
    return rows


def baseline(name: str, row: dict) -> tuple[str, bool]:
    """(a trivial baseline's name and score, marked where the model is no better; whether the model is better)."""
    mark = " ~" if row["noise"] else " >" if row["difference"] < 0 else ""
    return f"{name} {number(row['score'])}{mark}", not mark


def number(value: float | None) -> str:
    """Three decimals, or fewer for large values; a dash for none."""
    if value is None:
        return "-"
    return (
        f"{value:,}"
        if isinstance(value, int)
        else f"{value:.3f}"
        if abs(value) < 10
        else f"{value:,.1f}"
    )


def gap_text(gap: dict | None) -> str:
    """A difference with its interval; `~` marks what may be noise."""
    if gap is None:
        return ""
    value, low, high = (
        round(x, 3) + 0.0 for x in (gap["difference"], *gap["difference_ci95"])
    )  # no -0.000
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]{' ~' if gap['noise'] else ''}"


def parts_text(results: dict) -> str:
    """An overall score with its interval and its parts."""
    if results["overall_score"] is None:
        return "none: no task measures quality"
    parts, between = (
        dict(results["overall_parts"]),
        results.get("overall_score_ci95"),
    )  # not in older files
    shown = f" [{number(between[0])}, {number(between[1])}]" if between else ""
    factor = parts.pop("one_minus_repetition", None)
    mean = ", ".join(f"{task} {number(value)}" for task, value in parts.items())
    times = "" if factor is None else f"; times {number(factor)} (1 - repetition)"
    return f"{number(results['overall_score'])}{shown} = mean of {mean}{times}"


def text_report(document: dict) -> str:
    """The table for a terminal."""
    reference = document["comparison"].get("reference")
    head = ["task", "model", "figure", "score", "95 % interval", "n", "chance", "ties", "baselines"]
    head += [f"minus {reference}"] if reference else []
    lines = [head]
    for row in table_rows(document):
        between = "" if row["low"] is None else f"{row['low']:.3f} .. {row['high']:.3f}"
        cells = [
            row["task"],
            row["model"],
            row["label"],
            number(row["value"]),
            between,
            number(row["n"]),
        ]
        cells += [
            number(row["chance"]),
            number(row["ties"]),
            ", ".join(text for text, _ in row["baselines"]),
        ]
        lines.append([*cells, gap_text(row["difference"])][: len(head)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
    overall = [
        f"overall score of {model}: {parts_text(results)}"
        for model, results in document["results"].items()
    ]
    official = {kind for kind, spec in tasks.TASKS.items() if spec.official}
    columns = ", ".join(
        name for name, declared in document["configs"].items() if declared["type"] in official
    )
    overall += [
        f"BabyLM's macro average of {model} ({columns}; ties to the first): {number(results['babylm_macro_average'])}"
        for model, results in document["results"].items() if "babylm_macro_average" in results
    ]  # fmt: skip
    legend = "~: the difference may be noise; >: this baseline does better than the model"
    return "\n".join([text, legend, *overall, *(f"note: {line}" for line in document["notes"])])


def checkpoints_of(paths: Sequence[str]) -> dict[tuple[str, str], list[tuple[int, int]]]:
    """(run, checkpoint- or chck_) -> (steps or million words, place in `paths`) of its checkpoints, earliest first."""
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for place, path in enumerate(map(Path, paths)):
        if match := CHECKPOINT.fullmatch(path.name):
            found.setdefault((str(path.parent), match[1]), []).append((int(match[2]), place))
    return {run: sorted(points) for run, points in sorted(found.items())}


def in_training_order(paths: Sequence[str]) -> list[str]:
    """The paths with each run's checkpoints earliest first in their places: a shell puts chck_10M before chck_2M."""
    ordered = list(paths)
    for points in checkpoints_of(paths).values():
        places = [place for _, place in points]
        for to, place in zip(sorted(places), places, strict=True):
            ordered[to] = paths[place]
    return ordered


def phenomenon_curves(document: dict) -> list[dict[str, Any]]:
    """What plots.plot_learning_curve draws, for each run with two or more checkpoints and each task with phenomena.

    A phenomenon's accuracy is the mean over its subsets, as the task's own is over all.
    """
    names = list(document["models"])
    drawn = []
    for (run, kind), points in checkpoints_of(
        [facts["path"] for facts in document["models"].values()]
    ).items():
        for task, declared in document["configs"].items():
            phenomena = declared.get("phenomena", {})
            if len(points) < 2 or not phenomena:
                continue
            results = [document["results"][names[place]][task] for _, place in points]
            lines = {
                term: [
                    float(
                        np.mean(
                            [r["subsets"][s]["accuracy"] for s in phenomena if phenomena[s] == term]
                        )
                    )
                    for r in results
                ]
                for term in sorted(set(phenomena.values()))
            }
            drawn.append({
                "run": run, "task": task, "words": kind == "chck_", "at": [at for at, _ in points], "lines": lines,
                "mean": [r["accuracy"] for r in results], "ci95": [r["accuracy_ci95"] for r in results],
                "chance": results[0]["chance"],
            })  # fmt: skip
    return drawn


def curves(document: dict) -> list[dict[str, Any]]:
    """Learning curves, ready to draw, of each run of which two or more checkpoints were measured."""
    models = list(document["models"])
    results = document["results"].values()
    names = [
        task
        for task in document["configs"]
        if any(r[task]["metric"] in UNIT_SCALE for r in results)
    ]
    drawn = []
    for (parent, kind), places in checkpoints_of(
        [facts["path"] for facts in document["models"].values()]
    ).items():
        if len(places) < 2:
            continue
        points = [(at, models[place]) for at, place in places]
        words = kind == "chck_" and points[0][0] > 0
        scale = (
            math.log10 if words else float
        )  # words seen: each factor of ten is as wide as the next
        right, low = scale(points[-1][0]), scale(points[0][0])
        width = CHART["width"] - CHART["left"] - CHART["right"]
        height = CHART["height"] - CHART["top"] - CHART["bottom"]
        xs = [CHART["left"] + width * (scale(at) - low) / ((right - low) or 1) for at, _ in points]
        lines = []
        for task in names:
            own = [document["results"][model][task] for _, model in points]
            shares = [(r[r["metric"]], *r[f"{r['metric']}_ci95"]) for r in own]  # value, low, high
            ys = [
                [CHART["top"] + height * (1 - min(1.0, max(0.0, share))) for share in three]
                for three in shares
            ]
            lines.append({"task": task, "points": [(x, *y) for x, y in zip(xs, ys, strict=True)]})
        ticks = [(x, at) for x, (at, _) in zip(xs, points, strict=True)]
        keep = max(1, len(ticks) // 6)
        some = [tick for tick in ticks if str(tick[1])[0] in "125" or tick == ticks[-1]]
        ticks = some if kind == "chck_" else ticks[::keep]
        grid = [(CHART["top"] + height * (1 - share), share) for share in (0, 0.25, 0.5, 0.75, 1)]
        unit = "training steps" if kind == "checkpoint-" else "million words seen"
        drawn.append({"run": parent, "unit": unit, "lines": lines, "ticks": ticks, "grid": grid})
    return drawn


def page(document: dict) -> str:
    """The whole report as one HTML text."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": number,
        "gap": gap_text,
        "parts": parts_text,
        "plain": plain,
        "digest": digest,
    }
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        document=document,
        rows=table_rows(document),
        curves=curves(document),
        chart=CHART,
        pictures=pictures(document),
    )


def pictures(document: dict) -> list[tuple[str, str, str]]:
    """(model, what it shows, data URI) of the pictures that train.py and evaluate.py left beside a model's weights.

    One that is older than the weights is of another model.
    """
    found = []
    for model, facts in document["models"].items():
        weights = Path(facts["path"], "model.safetensors")
        for name, shows in PICTURES.items():
            file = weights.with_name(name)
            if (
                weights.is_file()
                and file.is_file()
                and file.stat().st_mtime >= weights.stat().st_mtime
            ):
                data = base64.b64encode(file.read_bytes()).decode()
                found.append((model, shows, f"data:image/png;base64,{data}"))
    return found


def plain(text: Any, most: int = 2000) -> str:
    """Text without control characters and lone surrogates, cut to a length that a page bears."""
    return re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", str(text)[:most]
    )


def digest(text: str) -> str:
    """A content security policy's name for an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def write_files(document: dict, output: Path) -> list[Path]:
    """The JSON file, the .html page and the .png bar chart (where figures are on a scale up to 1), and the
    learning curves: what was written."""
    from babyllama import plots
    from babyllama.files import write_json, write_text

    write_json(output, document)
    write_text(output.with_suffix(".html"), page(document))
    if bars := [row for row in table_rows(document) if row["unit_scale"]]:
        plots.plot_comparison(bars, output.with_suffix(".png"))
    written = [output, output.with_suffix(".html"), *[output.with_suffix(".png")] * bool(bars)]
    drawn = phenomenon_curves(document)
    every = sorted({curve["run"] for curve in drawn})
    names = dict(zip(every, short_names(every), strict=True))
    for curve in drawn:
        run = names[curve["run"]].replace("/", "_")
        name = f"{output.stem}-{run}-{curve['task']}"
        other = output.with_name(f"{name}.png") in written  # words seen and steps of the same run
        written.append(
            output.with_name(f"{name}{('-words' if curve['words'] else '-steps') * other}.png")
        )
        plots.plot_learning_curve(curve, written[-1])
    return written
