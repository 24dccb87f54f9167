"""Checkpoints for tests of the export."""

import dataclasses
from pathlib import Path

import torch
from transformers import AutoTokenizer

from arguments import parse_train_args
from checkpointing.files import deal_weights, partial_dir, publish, write_common, write_part

ROOT = Path(__file__).parents[2]
TEACHER = ROOT / "presets" / "tiny" / "teacher"
VOCAB = 1024  # the tokenizer of TEACHER has at most as many entries
WEIGHTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
RUN = ["--teacher_model", "meta-llama/Llama-3.1-8B-Instruct", "--student_model", "./somewhere/student"]
RUN += ["--layers", "1", "3", "--output_dir", "somewhere"]


def save_checkpoint(folder, student, world_size, options=RUN):
    """Saves a checkpoint as a run of `world_size` ranks does, and returns its path."""
    args = parse_train_args(options)
    state = {"format": 1, "micro_step": 24, "step": 12, "tokens": 4096, "arguments": dataclasses.asdict(args)}
    weights, partial = student.state_dict(), partial_dir(folder, 24)
    shares = deal_weights(weights, world_size)
    folder.mkdir(exist_ok=True)
    for rank, share in enumerate(shares):
        optimizer = {f"exp_avg/{rank}": torch.zeros(3)}
        write_part(partial, rank, world_size, {name: weights[name] for name in share}, optimizer, {"row": 1})
    write_common(partial, student, shares, AutoTokenizer.from_pretrained(TEACHER), state)
    return publish(partial, folder, 24)
