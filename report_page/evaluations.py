"""Reads the results of evaluations in a run's directory: the files that eval_mmlu_hybrid.py wrote there."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from report_page.lenient import content_of, dict_or_empty, finite_or_nan, parse_json

HELD_OUT = {"perplexity": "perplexity", "kl": "KL", "agreement": "agreement"}


class Score(NamedTuple):
    """Holds a model's accuracy on MMLU, from a file that eval_mmlu_hybrid.py wrote."""

    file: str
    model: str
    acc: float
    stderr: float  # NaN: not known
    n: int  # questions
    step: float | None  # optimizer step, if the model is a checkpoint of this run


class Measure(NamedTuple):
    """Holds any other result of such a file: held-out text, retrieval, copying or a task."""

    file: str
    model: str
    name: str
    value: float
    step: float | None


def read_scores(folder: Path, step_at: dict[float, float]) -> list[Score]:
    """Returns the MMLU scores of all evaluations in the directory. step_at: optimizer step by micro step."""
    found = []
    for file, model, result in _results_in(folder):
        if not math.isnan(acc := finite_or_nan(result.get("acc"))):
            n, stderr = result.get("n"), finite_or_nan(result.get("stderr"))
            stderr = stderr if stderr >= 0 else math.nan
            step = _step_of_checkpoint(result.get("config"), folder, step_at)
            found.append(Score(file, model, acc, stderr, n if isinstance(n, int) else 0, step))
    return found


def read_measures(folder: Path, step_at: dict[float, float]) -> list[Measure]:
    """Returns the other results of all evaluations in the directory. step_at: optimizer step by micro step."""
    found = []
    for file, model, result in _results_in(folder):
        step = _step_of_checkpoint(result.get("config"), folder, step_at)
        for name, value in _values_beside_mmlu(result):
            if not math.isnan(value := finite_or_nan(value)):
                found.append(Measure(file, model, name, value, step))
    return found


def _values_beside_mmlu(result: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields name and value. A task has only its first metric, the one that the task's authors list first. What ends a
    document is part of held-out text's name: with another token, the figures are of another text.
    """
    separator = dict_or_empty(result.get("config")).get("document_separator")
    ending = f", documents end with {separator}" if isinstance(separator, str) else ""
    for key, name in HELD_OUT.items():
        yield f"held-out {name}{ending}", dict_or_empty(result.get("held_out")).get(key)
    cells = result.get("retrieval")
    for cell in map(dict_or_empty, cells if isinstance(cells, list) else []):
        yield f"retrieval, {cell.get('length')} tokens, {cell.get('pairs')} pairs", cell.get("acc")
    copying = dict_or_empty(result.get("copying"))
    yield f"copying, {copying.get('words')} words", copying.get("acc")
    for outcome in map(dict_or_empty, dict_or_empty(result.get("tasks")).values()):
        for task, figures in dict_or_empty(outcome.get("results")).items():
            for metric, value in list(dict_or_empty(figures).items())[:1]:
                yield f"{task}, {metric.removesuffix(',none')}", value


def _results_in(folder: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields file name, model and the model's result."""
    for file in sorted(folder.glob("*.json")):
        content = dict_or_empty(parse_json(content_of(file)))
        config = content.get("config")
        single = {str(config.get("which")): content} if isinstance(config, dict) else {}
        results = content["models"] if isinstance(content.get("models"), dict) else single
        yield from ((file.name, model, result) for model, result in results.items() if isinstance(result, dict))


def _step_of_checkpoint(config: Any, folder: Path, step_at: dict[float, float]) -> float | None:
    """Returns the optimizer step of a scored checkpoint; None if it is not of a run in a directory of this name."""
    if not isinstance(config, dict) or not isinstance(config.get("ckpt"), str):
        return None
    checkpoint = Path(config["ckpt"])
    micro_step = micro_step_of(checkpoint)
    if micro_step is None or checkpoint.parent.name != folder.name:
        return None
    return 0.0 if micro_step == 0 else step_at.get(micro_step)


def micro_step_of(checkpoint: Path) -> int | None:
    """Returns the number in the name of a checkpoint's directory, None for another name."""
    match = re.fullmatch(r"checkpoint-([0-9]{1,18})", checkpoint.name)
    return int(match[1]) if match else None
