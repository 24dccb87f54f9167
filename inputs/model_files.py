"""What a model's directory holds, looked at before a weight of it is read. It may come from anyone: no code of it runs,
and a file that is damaged or lies is one ValueError that names it, not a crash or a machine out of memory.
"""

import contextlib
import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from llamba.configuration import MOST_LAYERS

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def check_weight_files(flag: str, name: str, folder: Path) -> None:
    """Whether the weights that transformers would read from `folder` are there and whole."""
    for file in WEIGHT_FILES:
        index = folder / f"{file}.index.json"
        if (folder / file).is_file():
            return _check_weight_file(flag, name, folder / file)
        if index.is_file():
            shards = _shards(flag, name, index)
            if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
                raise ValueError(f"{flag} {name}: shards are missing: {', '.join(missing)}; copy them again")
            for shard in sorted(shards):
                _check_weight_file(flag, name, folder / shard)
            return
    raise ValueError(f"{flag} {name}: no weights in it; expected {' or '.join(WEIGHT_FILES)}, or their shards")


def read_config(flag: str, name: str, path: str) -> PretrainedConfig:
    """The config of the model that is at `path` and was given as `name`, after a trial that it can be built."""
    with one_line(f"{flag} {name}: cannot read its config.json"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if not 1 <= config.num_hidden_layers <= MOST_LAYERS:
            raise ValueError(f"{config.num_hidden_layers} layers; expected 1 to {MOST_LAYERS}")
    with one_line(f"{flag} {name}: its config.json describes no model that can be built"):
        n_parameters = _count_parameters(config)
    n_bytes = sum(file.stat().st_size for kind in ("*.safetensors", "*.bin") for file in Path(path).glob(kind))
    # What lacks or does not fit is allocated before it is listed, so there must not be much of it.
    if n_bytes and n_parameters > 4 * n_bytes:
        raise ValueError(
            f"{flag} {name}: its config.json asks for {n_parameters:,} parameters and its weight files have "
            f"{n_bytes:,} bytes; they do not belong together, copy both again"
        )
    return config


def _count_parameters(config: PretrainedConfig) -> int:
    """Of a model of all shapes and no memory. Attention is named, as a config can ask for a kernel of the hub."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            deepcopy(config), dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
        )
    for name, parameter in model.named_parameters():
        if not parameter.numel():
            raise ValueError(f"{name} would be empty: {tuple(parameter.shape)}")
    return sum(parameter.numel() for parameter in model.parameters())


def _shards(flag: str, name: str, index: Path) -> set[str]:
    with one_line(f"{flag} {name}: cannot read {index.name}"):
        content = json.loads(index.read_text(encoding="utf-8"))
        shards = set(content["weight_map"].values())
        if not shards or type(content["metadata"]) is not dict:
            raise ValueError("its weight_map or metadata is empty")
    # Only names: a path would lead out of the directory.
    if outside := sorted(str(shard) for shard in shards if Path(str(shard)).name != shard):
        raise ValueError(
            f"{flag} {name}: {index.name} names {', '.join(outside)}; expected names of files beside it, "
            "so do not trust this model, or copy it again"
        )
    return shards


def _check_weight_file(flag: str, name: str, file: Path) -> None:
    with one_line(f"{flag} {name}: {file.name} is damaged or holds more than weights"):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                pass  # opening it checks the header against the file
        else:
            torch.load(file, map_location="meta", weights_only=True)


@contextlib.contextmanager
def one_line(what: str, remedy: str = "copy it again, from where you trust it") -> Iterator[None]:
    """The libraries that read these files raise nearly anything at nonsense: any of it is one line about the file."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        if not isinstance(error, ValueError | OSError):
            reason = f"{type(error).__name__} {reason}"  # a KeyError's text is a key and no more
        raise ValueError(f"{what}: {reason[:400]}; {remedy}") from error
