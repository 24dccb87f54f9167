"""What a checkpoint is on disk: a folder `checkpoint-<micro step>` that every rank writes a part of and that appears
whole or not at all; how to write, check and read one.

A part is a rank's share of the weights and its shard of the optimizer. The hashes of all files, SHA256SUMS, come last
(`sha256sum -c SHA256SUMS` reads them). Everything is safetensors or JSON: reading a checkpoint runs no code.
"""

import json
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from checkpointing.host_copy import copy_to_host
from checkpointing.write_errors import only_logged
from llamba import LlambaForCausalLM
from utils import flush_to_disk, sha256

STATE_FILE = "training_state.json"
SUMS_FILE = "SHA256SUMS"
SMALL = 2**20  # bytes; smaller files are hashed even by the quick check
PART_OF_RANK = re.compile(r"SHA256SUMS|\..*|(model|optimizer|data)-\d+-of-\d+\.(safetensors|json)|model\.safetensors")


def checkpoint_dir(output_dir: Path, micro_step: int) -> Path:
    return output_dir / f"checkpoint-{micro_step}"


def partial_dir(output_dir: Path, micro_step: int, attempt: int = 0) -> Path:
    """Returns the folder that a checkpoint is in while it is written."""
    return output_dir / f".partial-checkpoint-{micro_step}-{attempt}"


def model_file(rank: int, world_size: int) -> str:
    return "model.safetensors" if world_size == 1 else f"model-{rank + 1:05d}-of-{world_size:05d}.safetensors"


def optimizer_file(rank: int, world_size: int) -> str:
    return f"optimizer-{rank + 1:05d}-of-{world_size:05d}.safetensors"


def data_file(rank: int, world_size: int) -> str:
    return f"data-{rank + 1:05d}-of-{world_size:05d}.json"


# --- writing -------------------------------------------------------------------------------------------------


def deal_weights(weights: dict[str, Tensor], world_size: int) -> list[list[str]]:
    """Returns the names of the weights that each rank writes. The largest are dealt first, each to the rank with the
    least to write. Of names that share memory only the first is written: safetensors refuses the others.
    """
    first_name = {(tensor.data_ptr(), tensor.shape): name for name, tensor in reversed(weights.items())}
    shares: list[list[str]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for name in sorted(first_name.values(), key=lambda name: (-weights[name].nbytes, name)):
        rank = loads.index(min(loads))
        shares[rank].append(name)
        loads[rank] += weights[name].nbytes
    return shares


def write_part(
    folder: Path, rank: int, world_size: int, weights: dict[str, Tensor], optimizer: dict[str, Tensor], position: Any
) -> None:
    """Writes a rank's files and their hashes, and flushes them to the disk. position: in its data, as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name(rank, world_size) for name in (model_file, optimizer_file, data_file)]
    _write_tensors(files[0], weights, {"format": "pt"})
    _write_tensors(files[1], optimizer)
    files[2].write_text(json.dumps(position) + "\n")
    _write_sums(folder / f".sums-{rank}", files)


def _write_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file with the permissions of any other new file. safetensors renames a temporary one, which
    its owner alone can read, whatever the umask and the folder say.
    """
    file.touch()
    mode = file.stat().st_mode
    on_gpu = {name: tensor for name, tensor in tensors.items() if tensor.device.type != "cpu"}
    save_file({**tensors, **copy_to_host(on_gpu)}, file, metadata=metadata)
    if file.stat().st_mode != mode:
        file.chmod(stat.S_IMODE(mode))


def write_common(
    folder: Path,
    student: LlambaForCausalLM,
    shares: list[list[str]],
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Any],
) -> None:
    """Writes what one rank writes for all: configuration, tokenizer, the state of the run (JSON), and the index of
    which file has which weights. shares: from `deal_weights`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    student.config.save_pretrained(folder)
    student.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if len(shares) > 1:
        files = [model_file(rank, len(shares)) for rank in range(len(shares))]
        weight_map = {name: file for names, file in zip(shares, files, strict=True) for name in names}
        total = sum(tensor.nbytes for name, tensor in student.state_dict().items() if name in weight_map)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (folder / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")
    common = [file for file in folder.iterdir() if not PART_OF_RANK.fullmatch(file.name)]
    _write_sums(folder / ".sums-common", common)


def publish(partial: Path, output_dir: Path, micro_step: int) -> Path:
    """Turns the parts, when all of them are on the disk, into a checkpoint, and returns it."""
    final = checkpoint_dir(output_dir, micro_step)
    if final.exists():
        raise FileExistsError(f"{final} exists already")
    sums = sorted(partial.glob(".sums-*"))
    lines = [line for file in sums for line in file.read_text().splitlines(keepends=True)]
    lines.sort(key=lambda line: line.endswith(f"  {STATE_FILE}\n"))  # last, so that a truncated list lacks it
    (partial / SUMS_FILE).write_text("".join(lines))
    for file in sums:
        file.unlink()
    for path in (partial / SUMS_FILE, partial):
        flush_to_disk(path)
    partial.rename(final)
    with only_logged(f"{final} may not survive a loss of power"):
        flush_to_disk(output_dir)
    return final


def try_writing(folder: Path) -> None:
    """Writes a checkpoint of one number into the folder, reads and renames it, and deletes it again. Raises OSError or
    SafetensorError where a save would fail too, except for want of room.
    """
    trial = Path(tempfile.mkdtemp(prefix=".partial-checkpoint-trial-", dir=folder))
    try:
        write_part(trial / "part", 0, 1, {"number": torch.zeros(1)}, {}, None)
        with safe_open(trial / "part" / model_file(0, 1), "pt"):
            pass
        flush_to_disk(trial / "part")
        (trial / "part").rename(trial / "checkpoint")
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def _write_sums(sums: Path, files: Iterable[Path]) -> None:
    for file in files:
        flush_to_disk(file)
    sums.write_text("".join(f"{sha256(file)}  {file.name}\n" for file in sorted(files)))
    flush_to_disk(sums)


# --- reading -------------------------------------------------------------------------------------------------


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Returns all folders that are named like a checkpoint, the newest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def quick_check(checkpoint: Path) -> str | None:
    """Returns what is wrong with a checkpoint, or None, without reading its large files."""
    try:
        sums = read_sums(checkpoint)
        if STATE_FILE not in sums:
            return f"{SUMS_FILE} does not list {STATE_FILE}"
        small = [name for name in sums if (checkpoint / name).stat().st_size < SMALL]
        if bad := hash_check(checkpoint, small):
            return bad
        world_size = read_state(checkpoint)["world_size"]
        needed = [name(r, world_size) for r in range(world_size) for name in (model_file, optimizer_file, data_file)]
        if missing := [name for name in needed if name not in sums]:
            return f"{SUMS_FILE} does not list {', '.join(missing)}"
        for name in sums:
            if name.endswith(".safetensors"):
                try:
                    with safe_open(checkpoint / name, "pt"):  # a file that was cut short does not open
                        pass
                except SafetensorError as error:
                    return f"{name} cannot be opened: {error}"
    except FileNotFoundError as error:
        return f"{Path(error.filename or '?').name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"it cannot be read: {error}"
    return None


def hash_check(checkpoint: Path, names: Iterable[str]) -> str | None:
    """Returns which of these files is not what was written, or None. Raises KeyError for a file without a sum."""
    sums = read_sums(checkpoint)
    for name in names:
        try:
            found = sha256(checkpoint / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != sums[name]:
            return f"{name} is not what was written: its SHA-256 differs"
    return None


def read_sums(checkpoint: Path) -> dict[str, str]:
    """Returns the SHA-256 of each file by its name. Raises ValueError if the list is damaged."""
    lines = (checkpoint / SUMS_FILE).read_text(errors="replace").splitlines()
    matches = [re.fullmatch(r"([0-9a-f]{64})  ([\w.-]+)", line) for line in lines]
    if not all(matches):
        raise ValueError(f"{SUMS_FILE} is no list of SHA-256 sums")
    return {match[2]: match[1] for match in matches if match}


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Returns the content of training_state.json. Raises ValueError if it is no JSON object."""
    state = json.loads((checkpoint / STATE_FILE).read_text())
    if not isinstance(state, dict):
        raise ValueError(f"{STATE_FILE} holds a {type(state).__name__}, expected an object")
    return state


def read_position(checkpoint: Path, rank: int, world_size: int) -> Any:
    return json.loads((checkpoint / data_file(rank, world_size)).read_text())


def open_optimizer(checkpoint: Path, world_size: int) -> dict[str, Any]:
    """Returns for each tensor's name the opened shard that has it, of a checkpoint by `world_size` ranks. Nothing is
    read yet: a rank reads what it owns now from whichever shards have it.
    """
    files = [safe_open(checkpoint / optimizer_file(rank, world_size), "pt") for rank in range(world_size)]
    return {name: file for file in files for name in list(file.keys())}


# --- size ----------------------------------------------------------------------------------------------------


def checkpoint_bytes(student: torch.nn.Module) -> int:
    """Returns the bytes of a whole checkpoint, from the shapes: all weights, masters and moments of what is trained."""
    return sum(map(sum, _bytes_by_kind(student)))


def largest_file(student: torch.nn.Module, world_size: int) -> int:
    """Returns the bytes that the largest file of a checkpoint has at least: ranks have even shares of whole tensors."""
    return max(max(*sizes, sum(sizes) // world_size) for sizes in _bytes_by_kind(student))


def _bytes_by_kind(student: torch.nn.Module) -> tuple[list[int], list[int]]:
    """Returns the bytes of each weight, and of the masters and moments of each that is trained."""
    parameters = list(student.parameters())
    kinds = [(2 if p.dtype == torch.float32 else 3) for p in parameters]
    return (
        [p.nbytes for p in parameters],
        [p.numel() * 4 * n if p.requires_grad else 0 for p, n in zip(parameters, kinds, strict=True)],
    )
