"""Present the results of a benchmark as a table for a terminal, a bar chart and a page.

It measures nothing: its input is the document that the JSON file holds. The page is one static file
that loads nothing and shows names and generated text as text.

    from babyllama.evaluation.report import write_files
    write_files(json.loads(Path("benchmark.json").read_text()), Path("benchmark.json"))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from babyllama import plots
from babyllama.cli import printable
from babyllama.evaluation.model_names import checkpoints_by_run
from babyllama.evaluation.pictures import ON_UNIT_SCALE, learning_curves, pictures
from babyllama.evaluation.tasks import TASKS
from babyllama.files import write_json, write_text

SECOND_FIGURES = {  # metric: {another metric of its results: what to call it}
    "completion_accuracy": {"generation_accuracy": "generated"},
    "eye_tracking_percent": {"self_paced_reading_percent": "self-paced"},
}
LABELS = {
    "completion_accuracy": "accuracy",
    "generation_accuracy": "accuracy",
    "spearman": "rank correlation",
    "avg_consistency_score": "overlap",
    "avg_repetition_score": "repetition",
    "tokens_per_second": "tokens/s",
    "eye_tracking_percent": "% explained",
    "self_paced_reading_percent": "% explained",
}
# type of a task: what it asks; and, if chance is not reported separately, how to read it
ASKS = {
    "blimp": "Which of two sentences that differ in a word or two is grammatical?",
    "supplement": "Which of two questions, answers or short dialogues is well formed?",
    "ewok": "In which of two situations does a sentence make sense?",
    "entity_tracking": "What is in a box after things were moved from box to box?",
    "comps": "Which of two things has a property?",
    "global_piqa_parallel": "Which of four ways to do an everyday thing works?",
    "global_piqa_nonparallel": "Which of two ways to do an everyday thing works?",
    "reading": "How much of the time that people take to read a word does surprisal explain? "
    "Chance is 0%.",
    "reading_with_space": "How much of the time that people take to read a word does the surprisal "
    "of the word and its space explain? Chance is 0%.",
    "ewok_2025": "Which of two sentences makes sense in a situation?",
    "entity_tracking_2025": "What is in a box after things were moved from box to box?",
    "wug_adj": "Does the model form nouns from made-up adjectives as people do? Chance is 0.",
    "wug_past": "Does the model form the past of made-up verbs as people do? Chance is 0.",
    "minimal_pairs": "Which of two sentences that differ in a word or two is right?",
    "multiple_choice": "Which continuation of a prompt is right?",
    "completion": "Which continuation of a prompt is right?",
    "consistency": "Do prompts that mean the same get the same continuation?",
    "repetition": "How much of a long text repeats an earlier part of it? Less is better.",
    "speed": "How fast does the model write?",
}
MAX_NAMES = 4  # of domains or models in a sentence
SEED_NOTE = (
    "mean \N{PLUS-MINUS SIGN} standard deviation; ~ marks a difference below twice the spread, "
    "the pooled standard deviation of both groups"
)
TEMPLATE = Path(__file__).with_suffix(".html.j2")


# ---- figures as text ----------------------------------------------------------------------------


def number(value: float | None) -> str:
    """Format with three decimals, or fewer for large values; None is a dash."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def difference_text(gap: dict | None) -> str:
    """Format a difference and its interval; `~` marks possible noise."""
    if gap is None:
        return ""
    figures = [gap["difference"], *gap["difference_ci95"]]
    value, low, high = (round(figure, 3) + 0.0 for figure in figures)  # + 0.0: no -0.000
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]{' ~' if gap['noise'] else ''}"


def baseline_text(name: str, baseline: dict) -> str:
    """Format a trivial baseline; `~` marks one that may equal the model, `>` a better one."""
    mark = ""
    if baseline["noise"]:
        mark = " ~"
    elif baseline["difference"] < 0:
        mark = " >"
    return f"{name} {number(baseline['score'])}{mark}"


def overall_text(results: dict) -> str:
    """Format an overall score with its interval and its parts."""
    if results["overall_score"] is None:
        return "none: no task measures quality"
    low, high = results["overall_score_ci95"]
    score = f"{number(results['overall_score'])} [{number(low)}, {number(high)}]"
    parts = dict(results["overall_parts"])
    factor = parts.pop("one_minus_repetition", None)
    mean = ", ".join(f"{task} {number(value)}" for task, value in parts.items())
    product = "" if factor is None else f"; times {number(factor)} (1 - repetition)"
    return f"{score} = mean of {mean}{product}"


def overall_2026_text(overall: dict) -> str:
    """Format the overall score of BabyLM 2026 with its columns."""
    measured = {name: value for name, value in overall["columns"].items() if value is not None}
    columns = ", ".join(f"{name} {number(value)}" for name, value in measured.items())
    text = f"overall {number(overall['overall_2026'])} = mean of nine columns: {columns}"
    missing = ", ".join(overall["missing"])
    return f"{text}; missing and counted as 0: {missing}" if missing else text


def is_of_2025(task_type: str) -> bool:
    """Return True for a task that BabyLM asked in 2025 and no longer in 2026."""
    return task_type in TASKS and bool(TASKS[task_type].official) and not TASKS[task_type].column


def printable_start(text: Any, max_length: int = 2000) -> str:
    """Return the start of a text, with escapes for control characters, as on the terminal."""
    return printable(str(text)[:max_length])


# ---- sentences ----------------------------------------------------------------------------------


def title(document: dict) -> str:
    """Name the models of a document, or the run whose checkpoints they are."""
    names = list(document["models"])
    runs = checkpoints_by_run([record["path"] for record in document["models"].values()])
    if len(names) > 1 and len(runs) == 1 and len(runs[0].counts) == len(names):
        return f"{Path(runs[0].run).resolve().name}, {len(names)} checkpoints"
    return enumeration(names)


def enumeration(names: list[str]) -> str:
    """Join names with commas; only count those after the first few."""
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def run_text(run: dict) -> str:
    """Describe in two sentences what was trained and on what; `run` is from describe_run."""
    words = f"{run['words']:,} words"
    if run["epochs"] < 1:
        amount = f"{run['epochs']:.0%} of {words}"
    elif run["epochs"] == 1:
        amount = f"{words} once"
    else:
        amount = f"{words} {run['epochs']:.3g} times"
    total = sum(run["domains"].values()) or 1
    shares = [f"{name} ({count / total:.0%})" for name, count in run["domains"].items()]
    if len(shares) == 1:
        shares = list(run["domains"])
    text = f"It read {amount}: {enumeration(shares)}."
    if run["is_synthetic"]:
        text = f"It read {amount}: sentences of a grammar whose entropy is known."
    return (
        f"{run['name']} is a {run['type']} model with {run['parameters']:,} parameters, trained "
        f"from scratch in {run['steps']:,} step{'s' * (run['steps'] != 1)}. {text}"
    )


def run_texts(document: dict) -> list[str]:
    """Return run_text of each run that the models are from."""
    runs = [record["trained"] for record in document["models"].values()]
    return list(dict.fromkeys(run_text(run) for run in runs if run))


def questions(document: dict) -> dict[str, str]:
    """Return {task: what it asks and what chance is}."""
    texts = {}
    for task, config in document["configs"].items():
        chance = next(iter(document["results"].values()))[task].get("chance")
        text = ASKS[config["type"]]
        if chance is not None and config["type"] == "consistency":
            text += f" Chance is {number(chance)}: an unrelated prompt with the same ending."
        elif chance is not None:
            text += f" Chance is {number(chance)}."
        texts[task] = text
    return texts


# ---- the table ----------------------------------------------------------------------------------


def table_rows(document: dict) -> list[dict[str, Any]]:
    """Return a row for each figure of each task and model, with what to compare it to."""
    rows = []
    differences = document["comparison"].get("differences", {})
    for task, config in document["configs"].items():
        results = {model: tasks[task] for model, tasks in document["results"].items()}
        label = f"{task} (BabyLM 2025)" if is_of_2025(config["type"]) else task
        for model, result in results.items():
            row = _row(label, model, result["metric"], result)
            row["chance"] = result.get("chance")
            row["ties"] = result.get("ties")
            row["baselines"] = result.get("baselines", {})
            row["difference"] = differences.get(model, {}).get(task)
            rows.append(row)

        metric = next(iter(results.values()))["metric"]
        for second_metric, meaning in SECOND_FIGURES.get(metric, {}).items():
            for model, result in results.items():
                rows.append(_row(f"{task} ({meaning})", model, second_metric, result))
    return rows


def _row(task: str, model: str, metric: str, result: dict) -> dict[str, Any]:
    low, high = result.get(f"{metric}_ci95", (None, None))
    return {
        "task": task,
        "model": model,
        "metric": metric,
        "label": LABELS.get(metric, metric),
        "value": result[metric],
        "low": low,
        "high": high,
        "n": result["n"],
        "chance": None,
        "ties": None,
        "baselines": {},
        "difference": None,
        "on_unit_scale": metric in ON_UNIT_SCALE,
    }


def text_report(document: dict) -> str:
    """Return the table and the overall scores for a terminal."""
    reference = document["comparison"].get("reference")
    head = ["task", "model", "figure", "score", "95% interval", "n", "chance", "ties", "baselines"]
    if reference:
        head.append(f"minus {reference}")

    # the cells of each row
    table = [head]
    for row in table_rows(document):
        interval = "" if row["low"] is None else f"{row['low']:.3f} .. {row['high']:.3f}"
        baselines = ", ".join(baseline_text(*pair) for pair in row["baselines"].items())
        cells = [row["task"], row["model"], row["label"], number(row["value"]), interval]
        cells += [number(row["n"]), number(row["chance"]), number(row["ties"]), baselines]
        if reference:
            cells.append(difference_text(row["difference"]))
        table.append(cells)

    # the rows as lines, with columns of equal width
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for cells in table:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        lines.append("  ".join(padded).rstrip())
    lines.append("~: the difference may be noise; >: this baseline is better than the model")

    # what summarizes all tasks
    for model, results in document["results"].items():
        lines.append(f"overall score of {model}: {overall_text(results)}")
        if "babylm_2026" in results:
            lines.append(f"BabyLM 2026, {model}: {overall_2026_text(results['babylm_2026'])}")
    lines += seed_lines(document)
    lines += [f"note: {note}" for note in document["notes"]]
    return "\n".join(lines)


def seed_lines(document: dict) -> list[str]:
    """Return a line for each figure of each group of runs that differ only in the seed."""
    groups = document["seed_groups"]
    lines = []
    for group in groups:
        for figure, score in group["scores"].items():
            line = f"{group['name']}, {figure}: {seed_text(score)}"
            gap = seed_difference_text(score)
            lines.append(f"{line}; minus {groups[0]['name']}: {gap}" if gap else line)
    return ["", f"over seeds ({SEED_NOTE}):", *lines] if lines else []


def seed_text(score: dict) -> str:
    """Format a mean over seeds with its standard deviation."""
    if score["standard_deviation"] is None:
        return f"{score['mean']:.4f} (1 run)"
    deviation = f"{score['standard_deviation']:.4f}"
    return f"{score['mean']:.4f} \N{PLUS-MINUS SIGN} {deviation} (n = {score['n']})"


def seed_difference_text(score: dict) -> str:
    """Format the difference from the first group; `~` marks possible noise."""
    if "difference" not in score:
        return ""
    mark = " ~" if score["noise"] else ""
    return f"{score['difference']:+.4f} (spread {score['spread']:.4f}){mark}"


# ---- held-out text ------------------------------------------------------------------------------


def domain_bits(document: dict) -> dict[str, dict[str, float | None]]:
    """Return the held-out bits per byte {domain: {model: value}} of the runs with several domains.

    A model that was not measured on a domain has None.
    """
    scores = {}  # model -> domain -> scores
    for model, record in document["models"].items():
        training = record["training"]
        if training and training["eval_by_domain"]:
            scores[model] = training["eval_by_domain"]
    return {
        domain: {model: scores[model].get(domain, {}).get("bits_per_byte") for model in scores}
        for domain in sorted(set().union(*scores.values()))
    }


# ---- files --------------------------------------------------------------------------------------


def page(document: dict) -> str:
    """Return the report as one HTML page."""
    return render(
        TEMPLATE,
        document=document,
        rows=table_rows(document),
        domain_bits=domain_bits(document),
        title=title(document),
        run_texts=run_texts(document),
        questions=questions(document),
        pictures=pictures(document),
        baseline_text=baseline_text,
        seed_text=seed_text,
        seed_difference_text=seed_difference_text,
        seed_note=SEED_NOTE,
    )


def render(template: Path, **values: Any) -> str:
    """Fill in a template; it may include those of this folder (pictures, style)."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, TEMPLATE.parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "difference": difference_text,
        "overall": overall_text,
        "overall_2026": overall_2026_text,
        "printable": printable_start,
    }
    return environment.get_template(template.name).render(**values)


def write_files(document: dict, output: Path) -> list[Path]:
    """Write the JSON file and beside it the page and the pictures; return their paths."""
    page_file = output.with_suffix(".html")
    write_json(output, document)
    write_text(page_file, page(document))
    written = [output, page_file]

    # a chart of all figures up to 1
    bars = [row for row in table_rows(document) if row["on_unit_scale"]]
    if bars:
        chart_file = output.with_suffix(".png")
        plots.plot_comparison(bars, chart_file)
        written.append(chart_file)

    # a picture for each learning curve with phenomena
    for curve in learning_curves(document):
        if not curve["lines"]:
            continue
        run = curve["run"].replace("/", "_")
        file = output.with_name(f"{output.stem}-{run}-{curve['task']}.png")
        if file in written:  # the run has checkpoints by words and by steps
            file = file.with_stem(f"{file.stem}-{'words' if curve['words'] else 'steps'}")
        plots.plot_learning_curve(curve, file)
        written.append(file)
    return written
