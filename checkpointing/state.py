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

from arguments import TrainArguments
from checkpointing.files import open_optimizer
from checkpointing.parts import BadParts, parts_by_name, read_parts
from distillation.exchange import Exchange, Owned
from llamba import LlambaForCausalLM
from text.batch import Position
from training_utils import Update

FORMAT = 1  # of training_state.json; raise it when this version can no longer resume from older ones
COUNTERS = ("micro_step", "step", "tokens", "skipped_updates", "bad_in_a_row", "loss_scale", "loss_chunk_tokens")


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


def shard_tensors(student: LlambaForCausalLM, exchange: Exchange) -> dict[str, Tensor]:
    """Returns this rank's masters and moments, not copied, and step counts: by `<kind>/<parameter>` those of a whole
    parameter, by `<kind>/<parameter>@<start>` those of a part of its flattened weights.
    """
    names = {parameter: name for name, parameter in student.named_parameters()}
    shard = {}
    for owned, kept in exchange.owned():
        is_whole = owned.size == owned.parameter.numel()
        name = names[owned.parameter] + ("" if is_whole else f"@{owned.start}")
        for kind, value in kept.items():
            if kind == "step":  # several parameters may share one, and safetensors refuses shared memory
                shard[f"{kind}/{name}"] = value.clone()
            else:
                shard[f"{kind}/{name}"] = value.view_as(owned.parameter) if is_whole else value
    return shard


def restore_optimizer(checkpoint: Path, n_shards: int, student: LlambaForCausalLM, exchange: Exchange) -> None:
    """Reads masters and moments of what this rank owns from whichever of the checkpoint's `n_shards` shards has them,
    one tensor at a time. Raises ValueError if one is missing or misshapen.
    """
    parts = parts_by_name(open_optimizer(checkpoint, n_shards))
    if not any(name.startswith("exp_avg/") for name in parts):  # no update had been made yet
        return
    names = {parameter: name for name, parameter in student.named_parameters()}

    def read(owned: Owned, kind: str) -> Tensor:
        name = f"{kind}/{names[owned.parameter]}"
        if name not in parts:
            raise ValueError(f"--resume {checkpoint}: its optimizer has no {name}; expected a checkpoint of this run")
        try:
            return read_parts(parts[name], owned) if kind != "step" else parts[name][0].read(0, 1).squeeze()
        except BadParts as error:
            raise ValueError(f"--resume {checkpoint}: {name} {error}") from error

    exchange.restore(read)


def restore_random_state(checkpoint: Path, n_shards: int, rank: int, device: torch.device) -> None:
    """Sets the random state to that of the rank of this number, if the run had one."""
    files, prefix = open_optimizer(checkpoint, n_shards), f"rng/{rank}/"
    state = {kind: files[prefix + kind].get_tensor(prefix + kind) for kind in ("cpu", "cuda") if prefix + kind in files}
    if state:
        set_random_state(state, device)
