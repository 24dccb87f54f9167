"""Checks of a model's directory before its weights are read. It may come from anyone: no code in it is run, and a file
that is damaged or lies raises one ValueError that names it, rather than a crash or a machine out of memory.
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
    """Raises ValueError if weights that transformers would read from `folder` are missing or damaged."""
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
    """Returns the config of the model at `path`, which `flag` gave as `name`. Raises ValueError if no model can
    be built from it, or if its weights would be much larger than the weight files beside it.
    """
    with one_line(f"{flag} {name}: cannot read its config.json"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if not 1 <= config.num_hidden_layers <= MOST_LAYERS:
            raise ValueError(f"{config.num_hidden_layers} layers; expected 1 to {MOST_LAYERS}")
    with one_line(f"{flag} {name}: its config.json describes no model that can be built"):
        n_parameters = _count_parameters(config)
    n_bytes = sum(file.stat().st_size for kind in ("*.safetensors", "*.bin") for file in Path(path).glob(kind))
    # transformers allocates weights that are missing or misshapen before it reports them, so limit their size here.
    if n_bytes and n_parameters > 4 * n_bytes:
        raise ValueError(
            f"{flag} {name}: its config.json asks for {n_parameters:,} parameters and its weight files have "
            f"{n_bytes:,} bytes; they do not belong together, copy both again"
        )
    return config


def _count_parameters(config: PretrainedConfig) -> int:
    """Returns the number of parameters of a config's model, built on the meta device. Raises ValueError if one is
    empty.

    Attention is set to sdpa because a config can ask for a kernel from the Hub.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            deepcopy(config), dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
        )
    for name, parameter in model.named_parameters():
        if not parameter.numel():
            raise ValueError(f"{name} would be empty: {tuple(parameter.shape)}")
    return sum(parameter.numel() for parameter in model.parameters())


def _shards(flag: str, name: str, index: Path) -> set[str]:
    """Returns the file names in an index of shards. Raises ValueError if one leads out of the folder."""
    with one_line(f"{flag} {name}: cannot read {index.name}"):
        content = json.loads(index.read_text(encoding="utf-8"))
        shards = set(content["weight_map"].values())
        if not shards or type(content["metadata"]) is not dict:
            raise ValueError("its weight_map or metadata is empty")
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
    """Turns any exception into a ValueError of one line: the libraries that read these files raise nearly any type."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        if not isinstance(error, ValueError | OSError):
            reason = f"{type(error).__name__} {reason}"  # the text of a KeyError is only the key
        raise ValueError(f"{what}: {reason[:400]}; {remedy}") from error
