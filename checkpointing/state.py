"""The state of a run after an optimizer step, as checkpoints hold it and as a resumed run begins with it: counters, the
position in the data, random state, and each rank's shard of the optimizer.
"""

import dataclasses
import functools
import importlib.metadata
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer

from arguments import TrainArguments
from checkpointing.files import open_optimizer
from llamba import LlambaForCausalLM
from text.batch import Position
from training_utils import Update, owned_parameters

FORMAT = 1  # of training_state.json; raise it when this version can no longer resume from older ones
COUNTERS = ("micro_step", "step", "tokens", "skipped_updates", "bad_in_a_row", "loss_scale", "loss_chunk_tokens")
TENSORS = ("master", "exp_avg", "exp_avg_sq", "step")  # of a parameter's optimizer state


@dataclass(frozen=True)
class RunState:
    """Holds what a run has done up to an optimizer step. Micro steps of an unfinished step are not part of it."""

    micro_step: int = 0
    step: int = 0
    tokens: int = 0
    skipped_updates: int = 0  # whose loss or gradient was not finite, float16's overflows included
    bad_in_a_row: int = 0  # of these, overflows excluded, since the last good one
    loss_scale: dict[str, Any] | None = None
    loss_chunk_tokens: int | None = None  # chosen at the start by the memory that was free; it decides the rounding
    position: Position | None = None  # None: at the start of the data
    rng: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def after(self, update: Update, position: Position | None, rng: dict[str, Tensor]) -> "RunState":
        """Returns the state after one more update: `position` is that behind its last batch, `rng` that of now."""
        return dataclasses.replace(
            self,
            micro_step=self.micro_step + update.micro_steps,
            step=self.step + 1,
            tokens=self.tokens + update.tokens,
            skipped_updates=self.skipped_updates + (update.outcome != "stepped"),
            bad_in_a_row=self.bad_in_a_row + 1 if update.outcome == "bad" else 0,
            loss_scale=update.loss_scale,
            position=position,
            rng=rng,
        )

    def to_json(self, args: TrainArguments, world_size: int) -> dict[str, Any]:
        """Returns training_state.json: what is the same on all ranks. Position and random state are each rank's own."""
        counters = {name: getattr(self, name) for name in COUNTERS}
        about = {"world_size": world_size, "versions": versions(), "arguments": dataclasses.asdict(args)}
        return {"format": FORMAT, **counters, **about}


@functools.cache
def versions() -> dict[str, str]:
    """Returns the versions of what decides a run's numbers and its place in the data."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers", "datasets")}
    return {"python": platform.python_version(), **packages}


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Returns the state of what a student draws dropout from: torch's generators of the CPU and of its device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Sets the generators to what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def shard_tensors(student: LlambaForCausalLM, optimizer: ZeroRedundancyOptimizer) -> dict[str, Tensor]:
    """Returns this rank's masters, moments and step counts by `<kind>/<parameter name>`, not copied."""
    return {
        f"{kind}/{name}": value
        for name, parameter in owned_parameters(student, optimizer)
        for kind, value in optimizer.optim.state.get(parameter, {}).items()
    }


def restore_optimizer(
    checkpoint: Path, n_shards: int, student: LlambaForCausalLM, optimizer: ZeroRedundancyOptimizer
) -> None:
    """Reads masters and moments of what this rank owns from whichever of the checkpoint's `n_shards` shards has them,
    one tensor at a time. Raises ValueError if one is missing or misshapen.
    """
    files = open_optimizer(checkpoint, n_shards)
    if not any(name.startswith("exp_avg/") for name in files):  # no update had been made yet
        return
    for name, parameter in owned_parameters(student, optimizer):
        has_master = parameter.dtype != torch.float32 and optimizer.optim.master_weights
        kinds = [kind for kind in TENSORS if kind != "master" or has_master]
        state = {kind: _read_tensor(checkpoint, files, kind, name, parameter) for kind in kinds}
        optimizer.optim.state[parameter] = state


def restore_random_state(checkpoint: Path, n_shards: int, rank: int, device: torch.device) -> None:
    """Sets the random state to that of the rank of this number, if the run had one."""
    files, prefix = open_optimizer(checkpoint, n_shards), f"rng/{rank}/"
    state = {kind: files[prefix + kind].get_tensor(prefix + kind) for kind in ("cpu", "cuda") if prefix + kind in files}
    if state:
        set_random_state(state, device)


def _read_tensor(checkpoint: Path, files: dict[str, Any], kind: str, name: str, parameter: Tensor) -> Tensor:
    key = f"{kind}/{name}"
    shape = torch.Size() if kind == "step" else parameter.shape
    if key not in files:
        raise ValueError(f"--resume {checkpoint}: its optimizer has no {key}; expected a checkpoint of this run")
    value = files[key].get_tensor(key)
    if value.shape != shape:
        raise ValueError(f"--resume {checkpoint}: {key} has shape {tuple(value.shape)}, expected {tuple(shape)}")
    return value if kind == "step" else value.to(parameter.device)
