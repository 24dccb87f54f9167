"""Where a run stands after an optimizer step, as checkpoints hold it and as a run takes it up again: counters, the
place in the data, random state, and each rank's shard of the optimizer.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer

from arguments import TrainArguments
from checkpointing.files import open_optimizer, read_position, read_state
from llamba import LlambaForCausalLM
from processes.ranks import Ranks
from text.batch import Position
from training_utils import owned_parameters

FORMAT = 1  # of training_state.json; raise it when older ones cannot be gone on with
TENSORS = ("master", "exp_avg", "exp_avg_sq", "step")  # of a parameter's optimizer state


@dataclass(frozen=True)
class Progress:
    """After an optimizer step. Micro steps of a step that is not finished are no part of it."""

    micro_step: int = 0
    step: int = 0
    tokens: int = 0
    skipped_updates: int = 0  # whose loss or gradient was not finite, float16's overflows included
    bad_in_a_row: int = 0  # of these, overflows excluded, since the last good one
    loss_scale: dict[str, Any] | None = None
    loss_chunk_tokens: int | None = None  # as chosen at the start by the memory that was free; it decides the rounding
    position: Position | None = None  # None: at the start of the data
    rng: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def after(self, micro_step: int, tokens: int, outcome: str, **more: Any) -> "Progress":
        """One update later, whose outcome is that of `optimizer.update`; `tokens` are new, `more` other fields."""
        return dataclasses.replace(
            self,
            micro_step=micro_step,
            step=self.step + 1,
            tokens=self.tokens + tokens,
            skipped_updates=self.skipped_updates + (outcome != "stepped"),
            bad_in_a_row=self.bad_in_a_row + 1 if outcome == "bad" else 0,
            **more,
        )

    def to_json(self, args: TrainArguments, world_size: int) -> dict[str, Any]:
        """The same on all ranks; positions and random states are each rank's own."""
        counters = {name: getattr(self, name) for name in COUNTERS}
        return {"format": FORMAT, **counters, "world_size": world_size, "arguments": dataclasses.asdict(args)}


COUNTERS = ("micro_step", "step", "tokens", "skipped_updates", "bad_in_a_row", "loss_scale", "loss_chunk_tokens")


def read_progress(checkpoint: Path) -> Progress:
    """All but position and random state."""
    state = read_state(checkpoint)
    return Progress(**{name: state[name] for name in COUNTERS})


def position_to_go_on(checkpoint: Path, args: TrainArguments, rank: int) -> dict[str, Any] | None:
    """This rank's place in the data, as JSON. In the cached lane it is the same for all ranks, however many."""
    world_size = read_state(checkpoint)["world_size"]
    return read_position(checkpoint, rank if args.dataset_streaming else 0, world_size)


# --- random state --------------------------------------------------------------------------------------------


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Of what a student draws from, for dropout: torch's generators of the CPU and of its device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


# --- the optimizer's shard -----------------------------------------------------------------------------------


def shard_tensors(student: LlambaForCausalLM, optimizer: ZeroRedundancyOptimizer) -> dict[str, Tensor]:
    """This rank's masters, moments and step counts by `<kind>/<parameter name>`: the tensors themselves."""
    return {
        f"{kind}/{name}": value
        for name, parameter in owned_parameters(student, optimizer)
        for kind, value in optimizer.optim.state.get(parameter, {}).items()
    }


def restore(
    checkpoint: Path, student: LlambaForCausalLM, optimizer: ZeroRedundancyOptimizer, rank: int, device: torch.device
) -> None:
    """Masters and moments of what this rank owns, from whichever ranks wrote them, one tensor at a time; and the
    random state of the rank of this number, if there was one.
    """
    world_size = read_state(checkpoint)["world_size"]
    files = open_optimizer(checkpoint, world_size)
    if any(name.startswith("exp_avg/") for name in files):  # else no update had been made yet
        for name, parameter in owned_parameters(student, optimizer):
            has_master = parameter.dtype != torch.float32 and optimizer.optim.master_weights
            kinds = [kind for kind in TENSORS if kind != "master" or has_master]
            state = {kind: _read_one(checkpoint, files, kind, name, parameter) for kind in kinds}
            optimizer.optim.state[parameter] = state
    kinds = [kind for kind in ("cpu", "cuda") if f"rng/{rank}/{kind}" in files]
    if kinds:
        set_random_state({kind: files[f"rng/{rank}/{kind}"].get_tensor(f"rng/{rank}/{kind}") for kind in kinds}, device)


def _read_one(checkpoint: Path, files: dict[str, Any], kind: str, name: str, parameter: Tensor) -> Tensor:
    key = f"{kind}/{name}"
    shape = torch.Size() if kind == "step" else parameter.shape
    if key not in files:
        raise ValueError(f"--resume {checkpoint}: its optimizer has no {key}; expected a checkpoint of this run")
    value = files[key].get_tensor(key)
    if value.shape != shape:
        raise ValueError(f"--resume {checkpoint}: {key} has shape {tuple(value.shape)}, expected {tuple(shape)}")
    return value if kind == "step" else value.to(parameter.device)


def starting_point(args: TrainArguments, checkpoint: Path | None, ranks: Ranks) -> Progress:
    if checkpoint is not None:
        progress = read_progress(checkpoint)
        if progress.bad_in_a_row >= args.max_bad_steps:  # where the run stopped for it: it has that many again
            progress = dataclasses.replace(progress, bad_in_a_row=0)
        return progress
    tokens = args.resume_step * ranks.world_size * args.batch_size * args.seq_length
    return Progress(args.resume_step, args.resume_step // args.grad_accumulation_steps, tokens)
