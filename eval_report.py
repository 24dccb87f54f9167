"""What an evaluation shows: tables on the screen and, with --output, everything as JSON, a report in Markdown and a bar
chart. Scores stand beside what they were measured with, and models beside one another: of every two, how much the later
one differs from the earlier, with an interval and a p.
"""

import io
import json
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mmlu import Prediction
from results import compare
from utils import finite, write_whole

CHANCE = 0.25
Table = list[list[str]]  # rows of cells, the first one its head


def write_report(results: dict[str, dict], output: Path | None) -> None:
    """results: by model, as `eval_pieces.assemble` gives them, with a `config`. Files first: a screen can go away."""
    differences = compare_all(results)
    if output is not None:
        write_files(results, differences, output)
    for table in screen_tables(results, differences):
        print(f"\n{aligned(table)}", flush=True)


def write_files(results: dict[str, dict], differences: list[dict[str, Any]], output: Path) -> None:
    """All is made before any of it is written, and the JSON comes last: it tells that all is there."""
    of_json, of_report, of_chart = output_files(output)
    contents = {of_report: markdown(results, differences).encode() + b"\n"}
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
    """JSON, report and chart."""
    stem = output.with_suffix("") if output.suffix == ".json" else output
    return output, stem.with_name(f"{stem.name}.md"), stem.with_name(f"{stem.name}.png")


def compare_all(results: dict[str, dict]) -> list[dict[str, Any]]:
    """Of every two models that answered MMLU's questions: `of`, `to`, and what `results.compare` tells."""
    answers = {
        name: [Prediction(**prediction) for prediction in result["predictions"]]
        for name, result in results.items()
        if "predictions" in result
    }
    return [{"of": b, "to": a, **compare(answers[a], answers[b])} for a, b in combinations(answers, 2)]


def arrange(results: dict[str, dict], differences: list[dict[str, Any]]) -> dict[str, Any]:
    """One model's result as it is; of several, each accuracy, `n`, all results under `models`, and the differences."""
    first = next(iter(results.values()))
    if len(results) == 1:
        return first
    scores = {name: result["acc"] for name, result in results.items()} | {"n": first["n"]} if "acc" in first else {}
    return {**scores, "models": results, "differences": differences}


# Tables


def screen_tables(results: dict[str, dict], differences: list[dict[str, Any]]) -> list[Table]:
    first = next(iter(results.values()))
    tables = []
    if "acc" in first:
        tables.append(score_table(results))
        if differences:
            tables.append(difference_table(differences, ("groups",)))
    return [*tables, *other_tables(results)]


def score_table(results: dict[str, dict]) -> Table:
    """Accuracy by subject, group and over all, one column per model."""
    first = next(iter(results.values()))
    table = [["subject", "n", *results]]
    for part in ("subjects", "groups"):
        for name, counts in first[part].items():
            cells = (number(result[part][name]["acc"]) for result in results.values())
            table.append([name, str(counts["n"]), *cells])
    table.append(["all", str(first["n"]), *(number(result["acc"]) for result in results.values())])
    return [*table, ["stderr", "", *(number(result["stderr"]) for result in results.values())]]


def difference_table(differences: list[dict[str, Any]], parts: Iterable[str]) -> Table:
    """For each pair, over all and by the names of each part ("groups", "subjects"): difference, interval, p, and what
    it rests on.
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


def other_tables(results: dict[str, dict]) -> list[Table]:
    """Held-out text, retrieval and lm-eval's tasks, those that were measured."""
    first = next(iter(results.values()))
    tables = []
    if "held_out" in first:
        rows = [[name, *(number(value) for value in result["held_out"].values())] for name, result in results.items()]
        tables.append([["held-out text", *first["held_out"]], *rows])
    if "retrieval" in first:
        table = [["retrieval: tokens", "pairs", "n", "chance", *results]]
        for i, cell in enumerate(first["retrieval"]):
            scores = (number(result["retrieval"][i]["acc"]) for result in results.values())
            table.append([str(cell["length"]), str(cell["pairs"]), str(cell["n"]), number(cell["chance"]), *scores])
        tables.append(table)
    if "tasks" in first:
        tables.append([["task", "shots", "n", "metric", *results], *_task_rows(results)])
    return tables


def _task_rows(results: dict[str, dict]) -> Table:
    rows = []
    for asked, outcome in next(iter(results.values()))["tasks"].items():
        for task, figures in outcome["results"].items():
            for metric in figures:
                scores = (number(result["tasks"][asked]["results"][task][metric]) for result in results.values())
                n = outcome["n_samples"].get(task, {}).get("effective", "")
                rows.append([task, str(outcome["n_shot"].get(task, "")), str(n), metric, *scores])
    return rows


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def aligned(table: Table) -> str:
    """For the screen: first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    lines = (
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in table
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)


# The report


def markdown(results: dict[str, dict], differences: list[dict[str, Any]]) -> str:
    first = next(iter(results.values()))
    parts = ["# Evaluation", as_markdown(model_table(results))]
    if "acc" in first:
        config, n_subjects = first["config"], len(first["subjects"])
        limit = f", the first {config['limit']} questions of each" if config["limit"] else ""
        parts += [
            f"## MMLU, {config['num_fewshot']}-shot, {n_subjects} subjects{limit}",
            f"Prompt: {config['prompt']}. Data: {config['mmlu_dir']}, SHA-256 of the questions "
            f"`{config['questions_sha256'][:16]}`. The standard error is that within subjects, as lm-eval pools it.",
            as_markdown(score_table(results)),
        ]
    if differences:
        parts += [
            "## Differences",
            "On the same questions: `gained` are those that the first model has right and the second wrong, `lost` the "
            "reverse. Intervals by Agresti and Min, p by McNemar's exact test; neither is corrected for how many "
            "comparisons there are.",
            as_markdown(difference_table(differences, ("groups", "subjects"))),
        ]
    for table in other_tables(results):
        title = table[0][0].split(":")[0].capitalize()
        parts += [f"## {title}", measured_with(title, first["config"]), as_markdown(table)]
    return "\n\n".join(parts)


def measured_with(title: str, config: dict[str, Any]) -> str:
    """The options that the figures below a title depend on, as they stand in a model's config."""
    beginnings = {"Held-out text": ("held_out",), "Retrieval": ("retrieval", "seed"), "Task": ("tasks", "limit")}
    return ", ".join(f"{name} {value}" for name, value in config.items() if name.startswith(beginnings[title]))


def model_table(results: dict[str, dict]) -> Table:
    table = [["model", "from", "teacher's layers", "dtype", "max_length", "versions"]]
    for name, result in results.items():
        config = result["config"]
        source = config["ckpt"] or config["student_model"] or config["teacher_model"]
        layers = "all" if config["layers"] is None else " ".join(map(str, config["layers"])) or "none"
        versions = ", ".join(f"{package} {release}" for package, release in config["versions"].items())
        table.append([name, source, layers, config["dtype"], str(config["max_length"]), versions])
    return table


def as_markdown(table: Table) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    return "\n".join([lines[0], "|" + " --- |" * len(table[0]), *lines[1:]])


def draw_chart(results: dict[str, dict]) -> bytes:
    """A PNG of accuracies with 95% intervals: over all, and by group, or by subject where no group of MMLU's is."""
    first = next(iter(results.values()))
    part = "groups" if first["groups"] else "subjects"
    labels = ["all", *first[part]]
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
    axes.set_xticks(
        range(len(labels)), [f"{label}\nn = {n}" for label, n in zip(labels, _sizes(first, part), strict=True)]
    )
    axes.set_ylim(0, 1.15)  # room for the legend
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_ylabel("accuracy")
    axes.set_title(f"MMLU, {first['config']['num_fewshot']}-shot")
    axes.legend(fontsize=8, ncols=len(results) + 1, loc="upper center", frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    return picture.getvalue()


def _sizes(result: dict[str, Any], part: str) -> Sequence[int]:
    return [result["n"], *(score["n"] for score in result[part].values())]
