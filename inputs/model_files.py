"""Checks of a model's directory before its weights are read. It may come from anyone: no code in it is run, and a file
that is damaged or lies raises one ValueError that names it, rather than a crash or a machine out of memory.
"""

import contextlib
import json
import os
from collections.abc import Collection, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from llamba.configuration import MOST_LAYERS
from llamba.quantised import SUPPORTED, dtype_name, quantisation, quantised_weight

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
# Of a model on the Hub: all that is read but the weights.
SMALL_FILES = ("*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt")


def folder_of(name: str) -> Path | None:
    """Returns the directory that holds a model's files: `name` itself, or the cached files of a name on the hub. None
    if it has none on this disk.
    """
    if os.path.isdir(name):  # False where it cannot be known
        return Path(name)
    if name.startswith((".", "/")) or name.count("/") > 1:
        return None
    config = try_to_load_from_cache(name, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def downloaded(flag: str, name: str) -> Path:
    """Downloads a model on the Hub: its config, its tokenizer, and its weights in one format. Returns the directory of
    its files. What is on this disk already is not downloaded again, and processes that ask at the same time wait for
    the first. Raises ValueError.
    """
    for file in WEIGHT_FILES:
        stem, _, suffix = file.partition(".")
        patterns = [*SMALL_FILES, f"{stem}*.{suffix}"]
        with one_line(f"{flag} {name}: cannot be downloaded", "give a folder, or the name of a model"):
            folder = Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns="*/*"))
        if any(part.is_file() for part in weight_files(flag, name, folder)):
            break
    return folder


def dead_links(folder: Path) -> str:
    """Returns a remark on the links in a model's directory that lead nowhere, to add to an error; mostly empty."""
    dead: list[str] = []
    with contextlib.suppress(OSError):  # a folder whose files this user may not list
        dead = sorted(file.name for file in folder.iterdir() if file.is_symlink() and not file.exists())
    return f" (links that lead nowhere: {', '.join(dead[:5])})" if dead else ""


# --- weights -------------------------------------------------------------------------------------------------


def check_weight_files(flag: str, name: str, folder: Path) -> None:
    """Raises ValueError if weights that transformers would read from `folder` are missing or damaged, and OSError if
    this user may not read them.
    """
    files = weight_files(flag, name, folder)
    if not files:
        raise ValueError(
            f"{flag} {name}: no weights in it{dead_links(folder)}; expected {' or '.join(WEIGHT_FILES)}, or their "
            "shards"
        )
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{flag} {name}: shards are missing: {', '.join(missing)}; copy them again")
    for file in files:
        file.open("rb").close()  # safetensors says of one that this user may not read that it is missing
        stored_dtypes(flag, name, file)


def weight_files(flag: str, name: str, folder: Path) -> list[Path]:
    """Returns the files that transformers reads the weights in `folder` from, shards that are missing included. Raises
    ValueError if their index is damaged.
    """
    for file in WEIGHT_FILES:
        index = folder / f"{file}.index.json"
        if (folder / file).is_file():
            return [folder / file]
        if index.is_file():
            return [folder / shard for shard in sorted(_shards(flag, name, index))]
    return []


def stored_dtypes(flag: str, name: str, file: Path) -> dict[str, str]:
    """Returns the dtypes, by torch's names, of the tensors in a weight file, of which only the headers are read. Raises
    ValueError if it is damaged.
    """
    with one_line(f"{flag} {name}: {file.name} is damaged or holds more than weights"):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:  # which checks the header against the file
                return {key: dtype_name(opened.get_slice(key).get_dtype()) for key in list(opened.keys())}
        tensors = torch.load(file, map_location="meta", weights_only=True)
        return {key: dtype_name(str(tensor.dtype)) for key, tensor in tensors.items()}


def check_stored_dtypes(flag: str, name: str, folder: Path, parameters: Collection[str]) -> None:
    """Raises ValueError if weight files in `folder` hold quantised weights: transformers would take integers for
    weights. parameters: names of the model's.
    """
    for file in weight_files(flag, name, folder):
        if file.is_file():
            dtypes = stored_dtypes(flag, name, file)
            if weight := quantised_weight(dtypes, parameters):
                raise ValueError(f"{flag} {name}: {weight} in {file.name} is {dtypes[weight]}; {SUPPORTED}")


# --- the config ----------------------------------------------------------------------------------------------


def read_config(flag: str, name: str, path: str) -> PretrainedConfig:
    """Returns the config of the model at `path`, which `flag` gave as `name`. Raises ValueError if no model can
    be built from it, if the model is quantised, or if its weights would be much larger than the weight files beside it.
    """
    reading = f"{flag} {name}: cannot read its config.json"
    with one_line(reading):
        values, _ = PretrainedConfig.get_config_dict(path)
        _check_dtype(values)
        method = quantisation(values)
    if method is not None:
        raise ValueError(f"{flag} {name}: its weights are quantised, by {method} as config.json says; {SUPPORTED}")
    with one_line(reading):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if not 1 <= config.num_hidden_layers <= MOST_LAYERS:
            raise ValueError(f"{config.num_hidden_layers} layers; expected 1 to {MOST_LAYERS}")
    with one_line(f"{flag} {name}: its config.json describes no model that can be built"):
        sizes = parameter_sizes(config)
    if Path(path).is_dir():
        _check_size_on_disk(flag, name, Path(path), sum(sizes.values()))
        check_stored_dtypes(flag, name, Path(path), sizes)
    return config


def _check_dtype(values: dict[str, Any]) -> None:
    """Raises ValueError if the values of a config.json name a dtype that does not exist."""
    dtype = values.get("dtype", values.get("torch_dtype"))
    if isinstance(dtype, str) and isinstance(getattr(torch, dtype.removeprefix("torch."), None), torch.dtype):
        return
    if dtype is not None and dtype != "auto" and not isinstance(dtype, dict):  # a dictionary has one per part
        raise ValueError(f"dtype {dtype!r}: expected the name of one, such as 'bfloat16'")


def _check_size_on_disk(flag: str, name: str, folder: Path, n_parameters: int) -> None:
    n_bytes = sum(file.stat().st_size for kind in ("*.safetensors", "*.bin") for file in folder.glob(kind))
    # transformers allocates weights that are missing or misshapen before it reports them, so limit their size here.
    if n_bytes and n_parameters > 4 * n_bytes:
        raise ValueError(
            f"{flag} {name}: its config.json asks for {n_parameters:,} parameters and its weight files have "
            f"{n_bytes:,} bytes; they do not belong together, copy both again"
        )


def parameter_sizes(config: PretrainedConfig) -> dict[str, int]:
    """Returns how many values each parameter of a config's model has, by its name; the model is built on the meta
    device. Raises ValueError if one is empty.

    Attention is set to sdpa because a config can ask for a kernel from the Hub.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            deepcopy(config), dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
        )
    for name, parameter in model.named_parameters():
        if not parameter.numel():
            raise ValueError(f"{name} would be empty: {tuple(parameter.shape)}")
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


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
