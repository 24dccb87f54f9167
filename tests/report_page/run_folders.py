"""Builds run directories by hand: rows, options, scores and warnings as a run and its evaluations leave them."""

import json
from pathlib import Path

import yaml

from report_page.run_data import read_runs
from report_page.series import charts_of

NASTY = "<script>document.title='hit'</script>"


def row_of(step: int, **more) -> dict:
    """Returns a row: 2 s, of which a device waits 0.5 s for the teacher and 0.1 s for data; CE falls by 0.5 a step."""
    ce = 10 - 0.5 * step
    row = {"step": step, "micro_step": 2 * step, "loss": ce + 0.25, "ce": ce, "kl": 2.5, "lr": 1e-3, "grad_norm": 1.0}
    row |= {"tokens": 1000 * step, "tokens_per_s": 500.0, "step_time_s": 2.0, "teacher_wait_s": 0.5}
    return row | {"data_wait_s": 0.1, "skipped_updates": 0, "ignored_labels": 0.0} | more


def aligned_row(step: int, errors: dict[int, float | None], **more) -> dict:
    """Returns a row of the stage `align`, with the errors of its layers: no text and no teacher is in its loss."""
    row = {name: value for name, value in row_of(step).items() if name not in ("ce", "kl", "ignored_labels")}
    row |= {"teacher_wait_s": 0.0, "loss": sum((error or 0) ** 2 for error in errors.values()) / len(errors)}
    return row | {"alignment": {"layers": list(errors), "errors": list(errors.values())}} | more


def build(folder: Path, rows: list[dict], after: str = "", **files) -> Path:
    """Makes a run directory. after: what follows the last whole line. files: contents of JSON files, by their stem."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + after)
    for name, content in {"status": {"status": "complete", "text": "complete: all"}, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def options(folder: Path, **values) -> None:
    (folder / "args.yaml").write_text(yaml.safe_dump({"preset": "tiny", "output_dir": str(folder), **values}))


def result(which: str, acc: float, ckpt: str | None = None) -> dict:
    return {"acc": acc, "stderr": 0.01, "n": 400, "config": {"which": which, "ckpt": ckpt}}


def full_run(folder: Path, name: str = "full") -> Path:
    """Builds a run that has everything."""
    rows = [row_of(step, mfu=0.4, memory_gb=10.0 + step) for step in range(1, 11)]
    rows[3] |= {"loss": None, "ce": None, "kl": None, "grad_norm": None}
    for row in rows[3:]:
        row["skipped_updates"] = 1
    for row, scale in ((rows[4], 1.0), (rows[9], 0.5)):
        row["update_health"] = {"mixers": 0.9, NASTY: 0.8}
        row["eval"] = {"loss": 1.0, "ce": 3 * scale, "kl": scale, "perplexity": 20.0, "agreement": 0.5, "mmlu": 0.3}
        row["layer_map"] = {"own": [0.2 * scale, 0.0, 0.01], "stream": [0.2 * scale, None, 0.3]}
    scores = {"student": 0.25, "hybrid_ft": 0.5, "n": 400}
    models = {
        "student": result("student", 0.25),
        "hybrid_ft": result("hybrid_ft", 0.5, f"/elsewhere/{name}/checkpoint-20"),
    }
    run = build(folder / name, rows, eval={**scores, "models": models, "differences": []})
    options(run, layers=[1], max_steps=10, seed=7, dataset_name=NASTY)
    (run / "metrics.abandoned.jsonl").write_text('{"step": 9}\n{"ste')
    warned = [{"time": 60.0 * i, "rank": i % 2, "text": f"step {i}: {NASTY}"} for i in range(3)]
    warned += [{"time": 600.0, "rank": 0, "text": "the disk is full"}]
    (run / "warnings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in warned) + '{"time": 1')
    return run


def keys(*runs: Path) -> list[str]:
    return [chart.key for chart in charts_of(read_runs(list(runs)))]
