"""Saves a small hybrid as any number of ranks does, for tests of what is on disk afterwards."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from checkpointing.files import deal_weights, partial_dir, publish, write_common, write_part

STATE = {"micro_step": 7, "step": 3, "arguments": {"layers": [1, 3], "log_file": None, "max_lr": 1e-5}}


class Killed(Exception):
    """Stands for whatever ends a save on its way."""


def fail(*args, **kwargs):
    raise Killed


def make_tokenizer():
    words = {word: index for index, word in enumerate(["<unk>", "<eos>", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


def shard_of(student, names, seed):
    """Returns made-up moments of the parameters that a rank holds."""
    g = torch.Generator().manual_seed(seed)
    shapes = {name: parameter.shape for name, parameter in student.named_parameters() if name in names}
    return {f"exp_avg/{name}": torch.randn(shape, generator=g) for name, shape in shapes.items()}


def save(output_dir, student, tokenizer, micro_step=7, world_size=1, seed=0):
    """Saves a checkpoint as `world_size` ranks do, one after the other, and returns its folder."""
    partial = partial_dir(output_dir, micro_step)
    weights = student.state_dict()
    shares = deal_weights(weights, world_size)
    for rank in reversed(range(world_size)):
        own = {name: weights[name] for name in shares[rank]}
        position = {"windows": 10 * micro_step + seed, "of": rank}
        write_part(partial, rank, world_size, own, shard_of(student, shares[rank], seed + rank), position)
    state = {**STATE, "micro_step": micro_step, "world_size": world_size}
    write_common(partial, student, shares, tokenizer, state)
    return publish(partial, output_dir, micro_step)


def contents(folder):
    """Returns the bytes of every file by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def visible(folder):
    """Returns the names that users and resumed runs take for checkpoints."""
    return sorted(path.name for path in folder.glob("checkpoint-*"))
