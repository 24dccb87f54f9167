"""Makes a directory that anyone can load without this repository, from a checkpoint of a (hybrid) Llamba. Run it in the
repository's folder:

    python -m llamba.export CKPT OUT

OUT holds the weights, the tokenizer, the modelling files as transformers' "remote code", and a model card. What only
a training run needs (optimizer, random state, position in the data) is left out. Everything is checked before anything
is written, and OUT appears whole or not at all.
"""

import argparse
import hashlib
import json
import os
import pickle
import re
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_import_files

from paths import expanded

from .card import model_card
from .configuration import LlambaConfig
from .modeling import LlambaForCausalLM
from .quantised import SUPPORTED, dtype_name, quantisation, quantised_weight

CODE = Path(__file__).parent / "modeling.py"  # and the files that it imports
AUTO_MAP = {"AutoConfig": "configuration.LlambaConfig", "AutoModelForCausalLM": "modeling.LlambaForCausalLM"}
STATE_FILE = "training_state.json"  # of a run; from it the card says how the model was made
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
OTHER_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# The errors of reading a weight file that is cut short, damaged, or holds something else.
UNREADABLE = (SafetensorError, pickle.UnpicklingError, RuntimeError, AttributeError, EOFError, OSError)


class Stored(NamedTuple):
    """Holds what a file says of one of its weights."""

    shape: tuple[int, ...]
    dtype: str


class Checkpoint(NamedTuple):
    """Holds what is exported of a checkpoint, checked."""

    folder: Path
    values: dict[str, Any]  # its config.json, unchanged
    files: list[str]  # names of the files to copy
    sums: dict[str, str]  # file name -> SHA-256; empty where the checkpoint has no SHA256SUMS
    card: str


def main(command_line: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m llamba.export",
        description="Make a directory that transformers loads without this repository, by trust_remote_code=True: "
        "weights, tokenizer, modelling code and a model card. The checkpoint is left as it is. Run the command in "
        "the folder of this repository.",
        epilog="example: python -m llamba.export runs/demo/latest runs/my-hybrid",
    )
    parser.add_argument(
        "ckpt", type=expanded, metavar="CKPT", help="checkpoint of a run, or a Llamba written by save_pretrained"
    )
    parser.add_argument(
        "out", type=expanded, metavar="OUT", help="directory to make; it must not exist yet, or be empty"
    )
    args = parser.parse_args(command_line)
    try:
        export(args.ckpt, args.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: load it with trust_remote_code=True, as its README.md shows")
    return 0


def export(ckpt: str, out: str) -> None:
    """Exports a checkpoint. Raises ValueError that names CKPT or OUT where that is impossible; nothing is left then."""
    try:
        checkpoint = read_checkpoint(ckpt)
    except OSError as error:
        raise ValueError(f"CKPT {ckpt}: cannot be read: {error}; name another, or make it readable") from error
    target = Path(os.path.abspath(out))
    partial = target.with_name(f".partial-{target.name}-{os.getpid()}")
    try:
        is_empty = target.is_dir() and not target.is_symlink() and not any(target.iterdir())
        if os.path.lexists(target) and not is_empty:
            raise ValueError(f"OUT {out}: exists and is not an empty directory; name another, or move it away")
        if checkpoint.folder.resolve() in target.resolve().parents:
            raise ValueError(f"OUT {out}: is within CKPT, which must not change; name another place")
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        _write(checkpoint, partial)
        partial.rename(target)
    except OSError as error:
        raise ValueError(f"OUT {out}: cannot be written: {error}; make room, or name another place") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(checkpoint: Checkpoint, folder: Path) -> None:
    for name in checkpoint.files:
        _copy(checkpoint, name, folder)
    values = {name: value for name, value in checkpoint.values.items() if name != "_name_or_path"}  # a local path
    values |= {"architectures": [LlambaForCausalLM.__name__], "auto_map": AUTO_MAP}
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    for file in {CODE, *map(Path, get_relative_import_files(CODE))}:
        shutil.copyfile(file, folder / file.name)
    (folder / "README.md").write_text(checkpoint.card)


def _copy(checkpoint: Checkpoint, name: str, folder: Path) -> None:
    """Copies and hashes a file in one pass, so that the bytes written are those that were compared."""
    digest = hashlib.sha256()
    with (checkpoint.folder / name).open("rb") as given, (folder / name).open("wb") as copy:
        while chunk := given.read(2**22):
            digest.update(chunk)
            copy.write(chunk)
        copy.flush()
        os.fsync(copy.fileno())
    _compare(checkpoint.folder, name, digest.hexdigest(), checkpoint.sums)


def _compare(folder: Path, name: str, digest: str, sums: dict[str, str]) -> None:
    """Raises ValueError if a file's SHA-256 is not the one in SHA256SUMS."""
    if sums.get(name, digest) != digest:
        raise ValueError(
            f"CKPT {folder}: {name} is not what was written: its SHA-256 differs from that in SHA256SUMS; copy it "
            "again, or take another checkpoint"
        )


# --- reading a checkpoint ------------------------------------------------------------------------------------


def read_checkpoint(ckpt: str) -> Checkpoint:
    """Reads and checks all but the weights' values. Raises ValueError that names CKPT if it is not a whole Llamba."""
    folder = Path(ckpt)
    if not folder.is_dir():
        raise ValueError(f"CKPT {ckpt}: is not a directory; expected a checkpoint, such as runs/demo/checkpoint-100")
    values, config = _read_config(folder)
    sums = _read_sums(folder)
    used = [name for name in ("config.json", STATE_FILE) if (folder / name).is_file()]
    for name in used:
        _compare(folder, name, hashlib.sha256((folder / name).read_bytes()).hexdigest(), sums)
    weights = _weight_files(folder)
    stored = {name: kind for file in weights if not file.endswith(".json") for name, kind in _open(folder, file)}
    with torch.device("meta"):
        model = LlambaForCausalLM(config)
    _check_weights(folder, model, stored)
    others = [name for name in OTHER_FILES if (folder / name).is_file()]
    state = _read_json(folder, STATE_FILE) if STATE_FILE in used else None
    try:
        card = model_card(
            config=config,
            n_parameters=sum(parameter.numel() for parameter in model.parameters()),
            dtypes={kind.dtype for kind in stored.values()},
            has_tokenizer="tokenizer_config.json" in others,
            state=state,
            near=folder,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"CKPT {folder}: {STATE_FILE} is not that of a run ({error!r}); copy it again") from error
    return Checkpoint(folder, values, weights + others, sums, card)


def _read_config(folder: Path) -> tuple[dict[str, Any], LlambaConfig]:
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"CKPT {folder}: has no config.json; expected a checkpoint of a run, or a directory written by "
            "save_pretrained"
        )
    values = _read_json(folder, "config.json")
    if values.get("model_type") != LlambaConfig.model_type:
        raise ValueError(
            f"CKPT {folder}: its config.json says model_type {values.get('model_type')!r}; expected 'llamba'; other "
            "architectures need no export: transformers loads them as they are"
        )
    if method := quantisation(values):
        raise ValueError(f"CKPT {folder}: its weights are quantised, by {method} as config.json says; {SUPPORTED}")
    try:
        return values, LlambaConfig(**values)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"CKPT {folder}: its config.json describes no Llamba: {reason}; copy it again") from error


def _weight_files(folder: Path) -> list[str]:
    """Returns the names of the weight files, the index first if there is one. As transformers does, it prefers
    safetensors.
    """
    for name in WEIGHT_FILES:
        index = f"{name}.index.json"
        if (folder / name).is_file():
            return [name]
        if not (folder / index).is_file():
            continue
        weight_map = _read_json(folder, index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"CKPT {folder}: {index} has no weight_map; copy it again")
        shards = sorted({str(shard) for shard in weight_map.values()})
        if outside := [shard for shard in shards if Path(shard).name != shard]:
            raise ValueError(f"CKPT {folder}: {index} names {', '.join(outside)}; expected names of files beside it")
        if missing := [shard for shard in shards if not (folder / shard).is_file()]:
            raise ValueError(f"CKPT {folder}: weight shards are missing: {', '.join(missing)}; copy them again")
        return [index, *shards]
    raise ValueError(f"CKPT {folder}: has no weights; expected {' or '.join(WEIGHT_FILES)}, or their shards")


def _open(folder: Path, name: str) -> list[tuple[str, Stored]]:
    """Returns names, shapes and dtypes of the weights in a file, without reading their values."""
    try:
        if name.endswith(".bin"):
            tensors = torch.load(folder / name, map_location="meta", weights_only=True)
            return [(key, Stored(tuple(t.shape), dtype_name(str(t.dtype)))) for key, t in tensors.items()]
        with safe_open(folder / name, framework="pt") as file:
            slices = [(key, file.get_slice(key)) for key in list(file.keys())]
            return [(key, Stored(tuple(s.get_shape()), dtype_name(s.get_dtype()))) for key, s in slices]
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"CKPT {folder}: {name} cannot be read as weights: {reason}; copy it again") from error


def _check_weights(folder: Path, model: LlambaForCausalLM, stored: dict[str, Stored]) -> None:
    """Raises ValueError unless names and shapes are the model's and none is quantised. Loading would refuse them too,
    but only later.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if weight := quantised_weight({name: kind.dtype for name, kind in stored.items()}, expected):
        raise ValueError(f"CKPT {folder}: {weight} is {stored[weight].dtype}; {SUPPORTED}")
    given = {name: kind.shape for name, kind in stored.items()}
    if model.config.tie_embeddings:  # the file may leave the head out
        given.setdefault("lm_head.weight", expected["lm_head.weight"])
    found = {
        "missing": expected.keys() - given.keys(),
        "unexpected": given.keys() - expected.keys(),
        "misshapen": {name for name in expected.keys() & given.keys() if expected[name] != given[name]},
    }
    if problems := [f"{kind}: {', '.join(sorted(names))}" for kind, names in found.items() if names]:
        raise ValueError(
            f"CKPT {folder}: its weights are not those that its config.json asks for; {'; '.join(problems)}; take "
            "another checkpoint, or copy it again"
        )


def _read_sums(folder: Path) -> dict[str, str]:
    """Returns file name -> SHA-256; empty where there is no SHA256SUMS, as in a directory that no run has written."""
    if not (folder / "SHA256SUMS").is_file():
        return {}
    lines = (folder / "SHA256SUMS").read_text(errors="replace").splitlines()
    matches = [re.fullmatch(r"([0-9a-f]{64})  ([\w.-]+)", line) for line in lines]
    if not all(matches):
        raise ValueError(f"CKPT {folder}: SHA256SUMS is not a list of SHA-256 sums; copy it again")
    return {match[2]: match[1] for match in matches if match}


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"CKPT {folder}: {name} cannot be read: {error}; copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"CKPT {folder}: {name} holds a {type(content).__name__}, expected an object; copy it again")
    return content


if __name__ == "__main__":
    sys.exit(main())
