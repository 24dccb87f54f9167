"""Runs tasks of lm-evaluation-harness on a model that is loaded already. The package is optional: it is imported only
for --tasks.
"""

import difflib
import functools
import importlib.util
import logging
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from text.sources import network_forbidden

PIN = "lm-eval==0.4.13"
BATCH_SIZE = 8  # for --batch_size auto: lm-eval's own search would start at the longest possible context


def check_tasks(names: list[str], local_files_only: bool) -> None:
    """Raises ValueError if the package, a task or the data of a task is missing. Reads the data, so downloads it."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(f"--tasks {' '.join(names)}: needs lm-evaluation-harness; `pip install {PIN}`")
    known = task_manager().all_tasks
    problems = []
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
            problems.append(f"--tasks {name}: lm-evaluation-harness has no such task; {hint}")
    if problems:
        raise ValueError("\n".join(problems))
    for name in names:
        _read_data(name, local_files_only)


def _read_data(name: str, local_files_only: bool) -> None:
    from lm_eval.tasks import get_task_dict

    try:
        with network_forbidden(local_files_only):
            get_task_dict([name], task_manager())
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"--tasks {name}: its data is not in the local cache and cannot be downloaded ({reason}); run the task "
            "once on a machine with network and copy its cache"
        ) from error


@functools.cache
def task_manager() -> Any:
    """Returns lm-eval's index of its tasks. It is made once: reading hundreds of files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def run_task(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int | None,
    max_length: int,
    num_fewshot: int | None,
    limit: int | None,
    local_files_only: bool,
) -> dict[str, Any]:
    """Returns the `results` of a task, or of a group and its tasks, as lm-eval reports them, with `n_shot`, `n_samples`
    and `versions` beside them. The model's own `generate` generates text. Raises ValueError where lm-eval refuses.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm = HFLM(
        pretrained=model,
        backend="causal",
        tokenizer=tokenizer,
        batch_size=batch_size or BATCH_SIZE,
        max_length=max_length,
    )
    with network_forbidden(local_files_only):
        try:
            report = lm_eval.simple_evaluate(
                lm,
                tasks=[name],
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=task_manager(),
                log_samples=False,
                bootstrap_iters=1000,
            )
        except AssertionError as error:  # such as a context too short for what is to be generated
            reason = str(error) or f"it does not say why; --max_length {max_length} may be too short for its prompts"
            raise ValueError(f"--tasks {name}: lm-evaluation-harness refuses: {reason}") from error
    return {
        "results": {task: _figures(result) for task, result in report["results"].items()},
        "n_shot": report["n-shot"],
        "n_samples": report["n-samples"],
        "versions": {**report["versions"], "lm_eval": lm_eval.__version__},
    }


def _figures(result: dict[str, Any]) -> dict[str, float | None]:
    """Returns lm-eval's numbers by "metric,filter"; one that it could not compute ("N/A") is None."""
    figures = {key: value for key, value in result.items() if "," in key}
    return {key: value if isinstance(value, (int, float)) else None for key, value in figures.items()}
