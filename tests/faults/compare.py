"""Compares the results of two runs bit by bit."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.small_runs import read_metrics

FIGURES = ("step", "micro_step", "loss", "kl", "ce", "alignment", "lr", "grad_norm", "tokens", "skipped_updates")


def rows(output_dir: Path) -> list[dict]:
    """Returns the rows of metrics.jsonl without what depends on the clock; evaluations are named `eval/<name>`."""
    return [_figures(row) for row in read_metrics(output_dir)]


def _figures(row: dict) -> dict:
    evaluated = {f"eval/{name}": value for name, value in row.get("eval", {}).items() if name != "seconds"}
    layer_map = {"layer_map": row["layer_map"]} if "layer_map" in row else {}
    return {name: row.get(name) for name in FIGURES} | evaluated | layer_map


def tensors(checkpoint: Path) -> dict[str, str]:
    """Returns the hash of every weight, master, moment and random state, whichever file has it."""
    found = {}
    for file in checkpoint.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            found[name] = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy()).hexdigest()
    return found


def differences(one: Path, other: Path, step: int) -> list[str]:
    """Returns the names of what differs between two runs after `step` micro steps."""
    a, b = tensors(one / f"checkpoint-{step}"), tensors(other / f"checkpoint-{step}")
    found = [f"tensor {name}" for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    if rows(one) != rows(other):
        found.append("the rows of metrics.jsonl")
    return found
