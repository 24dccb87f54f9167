"""Reports the results of an evaluation: tables on the screen and, with --output, all results as JSON, a report in
Markdown and a bar chart. Scores stand beside the options they were measured with. Every two models are compared: the
difference of their accuracies, with its 95% interval and p-value.
"""

import html
import io
import json
import re
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from evaluation.mmlu import Prediction
from evaluation.statistics import compare
from utils import finite, printable, write_whole

CHANCE = 0.25
IN_MARKDOWN = re.compile(r"[\\`*|~$]|\](?=[(\[])|(?<![^\W_])_|_(?![^\W_])")  # what means something there
MOST_BARS, LONGEST_LABEL = 60, 30  # of a chart
Table = list[list[str]]  # rows of cells, the first one its head


def report_results(results: dict[str, dict], output: Path | None) -> None:
    """Writes the files and prints the tables. results: by model, as `pieces.assemble` returns them.

    The files come first: printing fails where a terminal has gone.
    """
    differences = compare_all(results)
    if output is not None:
        write_files(results, differences, output)
    for section in sections(results, differences, ("groups",)):
        texts = map(printable, filter(None, (section.title, section.note)))
        print("\n".join(["", *texts, aligned(section.table)]), flush=True)


def write_files(results: dict[str, dict], differences: list[dict[str, Any]], output: Path) -> None:
    """Writes report, chart and JSON, all made before the first is written. The JSON comes last: it marks the end."""
    of_json, of_report, of_chart = output_files(output)
    contents = {of_report: markdown(sections(results, differences, ("groups", "subjects"))).encode() + b"\n"}
    if "acc" in next(iter(results.values())):
        contents[of_chart] = draw_chart(results)
    text = json.dumps(finite(arrange(results, differences)), indent=1, allow_nan=False)
    contents[of_json] = text.encode() + b"\n"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for path, content in contents.items():
            write_whole(path, content)
    except OSError as error:
        raise ValueError(f"--output {output}: cannot be written ({error.strerror}); make room, and --resume") from error


def output_files(output: Path) -> tuple[Path, Path, Path]:
    """Returns the paths of JSON, report and chart."""
    stem = output.with_suffix("") if output.suffix == ".json" else output
    return output, stem.with_name(f"{stem.name}.md"), stem.with_name(f"{stem.name}.png")


def compare_all(results: dict[str, dict]) -> list[dict[str, Any]]:
    """Compares every two models with answers to MMLU: their names `of` and `to`, with `statistics.compare`'s result."""
    answers = {
        name: [Prediction(**prediction) for prediction in result["predictions"]]
        for name, result in results.items()
        if "predictions" in result
    }
    return [{"of": b, "to": a, **compare(answers[a], answers[b])} for a, b in combinations(answers, 2)]


def arrange(results: dict[str, dict], differences: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the content of the JSON file: one model's result as it is; for several models, each accuracy, `n`, all
    results under `models`, and the differences.
    """
    first = next(iter(results.values()))
    if len(results) == 1:
        return first
    scores = {name: result["acc"] for name, result in results.items()} | {"n": first["n"]} if "acc" in first else {}
    return {**scores, "models": results, "differences": differences}


# Sections


class Section(NamedTuple):
    """Holds a table, its title, and a note on how its figures were measured."""

    title: str
    note: str
    table: Table


def sections(results: dict[str, dict], differences: list[dict[str, Any]], parts: Sequence[str]) -> list[Section]:
    """Returns the sections of screen and report. parts: "groups", "subjects": the rows of the differences."""
    first = next(iter(results.values()))
    config = first["config"]
    found = [Section("Models", "", model_table(results))]
    if "acc" in first:
        limit = f", the first {config['limit']} questions of each" if config["limit"] else ""
        title = f"MMLU, {config['num_fewshot']}-shot, {len(first['subjects'])} subjects{limit}"
        note = (
            f"Prompt: {config['prompt']}. Data: {config['mmlu_dir']}, SHA-256 of the questions "
            f"{config['questions_sha256'][:16]}. The standard error is that within subjects, as lm-eval pools it."
        )
        if "cut" in first:
            note += f" {first['cut']} prompts are longer than {config['max_length']} tokens and lose their start."
        found.append(Section(title, note, accuracy_table(results)))
    if differences:
        note = (
            "Of the same questions, gained counts those that the first model has right and the second wrong, lost the "
            "reverse. Intervals by Agresti and Min, p by McNemar's exact test; neither is corrected for multiple "
            "comparisons."
        )
        found.append(Section("Differences", note, difference_table(differences, parts)))
    if "held_out" in first:
        note = options_text(config, "held_out", "document_separator")
        found.append(Section("Held-out text", note, held_out_table(results)))
    if "retrieval" in first:
        found.append(Section("Retrieval", options_text(config, "retrieval", "seed"), retrieval_table(results)))
    if "copying" in first:
        found.append(Section("Copying", options_text(config, "seed"), copying_table(results)))
    if "tasks" in first:
        found.append(Section("Tasks", options_text(config, "tasks", "limit"), task_table(results)))
    return found


def options_text(config: dict[str, Any], *beginnings: str) -> str:
    """Returns the options in a model's config whose names begin with one of `beginnings`, as text."""
    return ", ".join(f"{name} {value}" for name, value in config.items() if name.startswith(beginnings))


# Tables


def model_table(results: dict[str, dict]) -> Table:
    """Returns where each model comes from and what it ran with."""
    table = [["model", "from", "teacher's layers and heads", "dtype", "max_length", "versions"]]
    for name, result in results.items():
        config = result["config"]
        source = config["ckpt"] or config["student_model"] or config["teacher_model"]
        parts = [*map(str, config["layers"] or []), *config.get("heads", [])]  # earlier versions had no heads
        layers = "all" if config["layers"] is None else " ".join(parts) or "none"
        versions = ", ".join(f"{package} {release}" for package, release in config["versions"].items())
        table.append([name, source, layers, config["dtype"], str(config["max_length"]), versions])
    return table


def accuracy_table(results: dict[str, dict]) -> Table:
    """Returns accuracies by subject, by group and over all, one column per model."""
    first = next(iter(results.values()))
    table = [["subject", "n", *results]]
    for part in ("subjects", "groups"):
        for name, counts in first[part].items():
            cells = (format_value(result[part][name]["acc"]) for result in results.values())
            table.append([name, str(counts["n"]), *cells])
    table.append(["all", str(first["n"]), *(format_value(result["acc"]) for result in results.values())])
    return [*table, ["stderr", "", *(format_value(result["stderr"]) for result in results.values())]]


def difference_table(differences: list[dict[str, Any]], parts: Iterable[str]) -> Table:
    """Returns a row for each pair of models, over all and by each part ("groups", "subjects"): difference, interval, p,
    and the numbers of questions behind them.
    """
    table = [["difference", "of", "n", "diff", "95% interval", "p", "gained", "lost"]]
    for difference in differences:
        pair = f"{difference['of']} - {difference['to']}"
        named = [("all", difference), *(entry for part in parts for entry in difference[part].items())]
        for name, found in named:
            interval = f"{found['low']:+.4f} to {found['high']:+.4f}"
            row = [pair, name, str(found["n"]), f"{found['diff']:+.4f}", interval, f"{found['p']:.3g}"]
            table.append([*row, str(found["gained"]), str(found["lost"])])
    return table


def held_out_table(results: dict[str, dict]) -> Table:
    """Returns the figures on held-out text, one row per model."""
    rows = [[name, *(format_value(value) for value in result["held_out"].values())] for name, result in results.items()]
    return [["held-out text", *next(iter(results.values()))["held_out"]], *rows]


def retrieval_table(results: dict[str, dict]) -> Table:
    """Returns accuracies by length of the context and number of pairs, one column per model."""
    table = [["retrieval: tokens", "pairs", "n", "chance", *results]]
    for i, cell in enumerate(next(iter(results.values()))["retrieval"]):
        scores = (format_value(result["retrieval"][i]["acc"]) for result in results.values())
        table.append([str(cell["length"]), str(cell["pairs"]), str(cell["n"]), format_value(cell["chance"]), *scores])
    return table


def copying_table(results: dict[str, dict]) -> Table:
    """Returns the accuracies of words said twice, one column per model."""
    first = next(iter(results.values()))["copying"]
    scores = (format_value(result["copying"]["acc"]) for result in results.values())
    return [["copying: words", "n", *results], [str(first["words"]), str(first["n"]), *scores]]


def task_table(results: dict[str, dict]) -> Table:
    """Returns every metric of every task, one column per model."""
    table = [["task", "shots", "n", "metric", *results]]
    for asked, outcome in next(iter(results.values()))["tasks"].items():
        for task, figures in outcome["results"].items():
            shots, n = outcome["n_shot"].get(task, ""), outcome["n_samples"].get(task, {}).get("effective", "")
            for metric in figures:
                scores = (format_value(result["tasks"][asked]["results"][task][metric]) for result in results.values())
                table.append([task, str(shots), str(n), metric, *scores])
    return table


def format_value(value: float | None) -> str:
    """Returns a count as it is, any other value with four digits, and a missing one as a dash."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def aligned(table: Table) -> str:
    """Returns a table as text for the screen: the first column aligned left, the others right."""
    table = [list(map(printable, row)) for row in table]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    lines = (
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in table
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)


# Files


def markdown(found: list[Section]) -> str:
    """Returns the whole report, in which names and texts from outside show as they are."""
    parts = [
        part
        for section in found
        for part in (f"## {escaped(section.title)}", escaped(section.note), as_markdown(section.table))
    ]
    return "\n\n".join(["# Evaluation", *filter(None, parts)])


def escaped(text: str) -> str:
    """Returns Markdown that shows `text`: no HTML, no picture, no new cell or line, and no link but an address itself,
    which GitHub makes one. An underscore within a word needs no escape, nor does a bracket that begins no link.
    """
    return IN_MARKDOWN.sub(r"\\\g<0>", html.escape(printable(text), quote=False))


def as_markdown(table: Table) -> str:
    """Returns a table in Markdown."""
    lines = ["| " + " | ".join(map(escaped, row)) + " |" for row in table]
    return "\n".join([lines[0], "|" + " --- |" * len(table[0]), *lines[1:]])


def draw_chart(results: dict[str, dict]) -> bytes:
    """Returns a PNG of accuracies with 95% intervals: over all, and by group, or by subject if none is in a group and
    there are few of them.
    """
    first = next(iter(results.values()))
    part = "groups" if first["groups"] else "subjects"
    labels = ["all", *(first[part] if len(first[part]) < MOST_BARS else ())]
    width = 0.8 / len(results)
    figure = Figure(figsize=(max(6.0, 1.4 * len(labels) * len(results) ** 0.5), 4.0), layout="constrained")
    axes = figure.subplots()
    for i, (name, result) in enumerate(results.items()):
        scores = [result, *(result[part][label] for label in labels[1:])]
        places = [x + (i - (len(results) - 1) / 2) * width for x in range(len(labels))]
        errors = [1.96 * (score["stderr"] or 0.0) for score in scores]
        bars = axes.bar(places, [score["acc"] for score in scores], width, yerr=errors, capsize=2, label=name)
        axes.bar_label(
            bars, [f"{100 * score['acc']:.1f}" for score in scores], padding=2, fontsize=6 if len(results) > 2 else 8
        )
    axes.axhline(CHANCE, color="grey", linestyle="--", linewidth=1, label="chance")
    sizes = [first["n"], *(first[part][label]["n"] for label in labels[1:])]
    ticks = [f"{_short(label)}\nn = {n}" for label, n in zip(labels, sizes, strict=True)]
    axes.set_xticks(range(len(labels)), ticks, parse_math=False)
    axes.set_ylim(0, 1.15)  # room for the legend
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_ylabel("accuracy")
    axes.set_title(f"MMLU, {first['config']['num_fewshot']}-shot")
    axes.legend(fontsize=8, ncols=len(results) + 1, loc="upper center", frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    return picture.getvalue()


def _short(label: str) -> str:
    shown = printable(label)
    return shown if len(shown) <= LONGEST_LABEL else f"{shown[: LONGEST_LABEL - 1]}…"
