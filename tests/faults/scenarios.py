"""Runs that meet one trouble each. A scenario leaves the run's output directory and `<folder>/<scenario>.json` with the
exit codes and the log of each launch; tests/test_faults.py checks both.

    python -m tests.faults.scenarios FOLDER [SCENARIO ...]
"""

import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

import training_utils
from checkpointing import files, resume, saver
from distillation import objective, owners, teacher
from monitoring.health import SpikeWatch
from tests.faults.traps import trap
from tests.launch import Launch
from tests.small_runs import make_models, options
from tests.waiting import wait_until
from text import encoding

FORWARD = (objective.DistillationModel, "forward")
SETTLING = 2  # forward passes before the first micro step
STEPS = 12  # of a run, unless a scenario says otherwise
OWNERS = dict(gradient_exchange="owners")  # where an exchange may matter; the others have the default
WORLDS = dict(max_steps=1000, save_interval=0, **OWNERS)
ACCUMULATED = dict(grad_accumulation_steps=2, save_interval=10, max_steps=9, **OWNERS)


class Scene:
    """Holds the launches of one scenario and their results."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name, self.output = folder, name, folder / name
        self.models = folder
        self.facts: list[dict] = []

    def launch(self, n_ranks: int = 2, arm: Callable[[int], None] | None = None, output=None, **changes) -> Launch:
        argv = options(self.models, output or self.output, **{"max_steps": STEPS, **changes})
        return Launch(argv, n_ranks, self.folder / f"{self.name}-{len(self.facts)}.log", arm)

    def run(self, n_ranks: int = 2, arm: Callable[[int], None] | None = None, output=None, **changes) -> None:
        self.wait(self.launch(n_ranks, arm, output, **changes))

    def wait(self, launch: Launch) -> None:
        self.facts.append({"codes": launch.wait(), "log": launch.text()})

    def keep(self) -> None:
        (self.folder / f"{self.name}.json").write_text(json.dumps(self.facts))


def on_rank(rank: int, act: Callable[[], None]) -> Callable[[int], None]:
    return lambda own: act() if own == rank else None


def at_micro_step(n: int, act: Callable[[], None]) -> None:
    trap(*FORWARD, SETTLING + n, act)


def signal_self(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def straight(scene: Scene) -> None:
    scene.run()


def straight_accumulated(scene: Scene) -> None:
    scene.run(**ACCUMULATED)


def signals(scene: Scene) -> None:
    """Sends each signal to another rank within an accumulation; then a time limit ends the run; then nothing does."""
    for rank, (n, number) in enumerate([(5, signal.SIGTERM), (3, signal.SIGINT), (4, signal.SIGUSR1)]):
        act = signal_self(number)
        scene.run(arm=on_rank(rank % 2, lambda n=n, act=act: at_micro_step(n, act)), resume="auto", **ACCUMULATED)
    scene.run(resume="auto", time_limit=1e-6, **ACCUMULATED)
    scene.run(resume="auto", **ACCUMULATED)
    scene.run(resume="auto", **ACCUMULATED)  # complete already


def signal_before_training(scene: Scene) -> None:
    scene.run(arm=lambda rank: trap(objective, "wrap_ddp", 1, signal_self(signal.SIGTERM)))


def signal_while_tokenising(scene: Scene) -> None:
    cache = scene.folder / "stopped-cache"
    scene.run(arm=on_rank(0, lambda: trap(encoding.Encoder, "__call__", 1, wait_for_a_signal)), dataset_cache_dir=cache)
    scene.run(dataset_cache_dir=cache, max_steps=1)


def wait_for_a_signal() -> None:
    """Signals this process from a thread of the pool and returns when the main thread has handled it."""
    request = signal.getsignal(signal.SIGTERM).__self__
    os.kill(os.getpid(), signal.SIGTERM)
    while not request.signalled:
        time.sleep(0.01)


def nodes_without_a_shared_folder(scene: Scene) -> None:
    """Gives rank 1, as on another node, a folder of the same name with the lock of an earlier run."""

    def arm(rank: int) -> None:
        if rank == 1:
            elsewhere = scene.folder / "another-node"
            elsewhere.mkdir()
            (elsewhere / ".lock").write_text("123")
            sys.argv[sys.argv.index("--output_dir") + 1] = str(elsewhere)

    scene.run(arm=arm)


def plain(scene: Scene) -> dict:
    """Returns options without dropout, whose masks depend on the number of ranks, and with fewer windows."""
    return dict(student_model=scene.models / "plain", dataset_name=scene.models / "short.jsonl")


def other_world_sizes(scene: Scene) -> None:
    """Runs on 2 ranks, then 3, then 1, with the same windows in each step; every rank writes down its windows. For
    comparison, one rank runs alone.
    """
    scene.run(1, output=scene.folder / "one_world", batch_size=6, **WORLDS, **plain(scene))
    stages = [(2, 3, 5), (3, 2, 7), (1, 6, None)]
    for stage, (n_ranks, batch_size, ends_at) in enumerate(stages):

        def arm(rank: int, stage=stage, ends_at=ends_at) -> None:
            _write_windows_down(scene.folder / f"windows-{stage}-{rank}.jsonl")
            if ends_at and rank == 0:
                at_micro_step(ends_at, signal_self(signal.SIGTERM))

        scene.run(n_ranks, arm, resume="auto", batch_size=batch_size, **WORLDS, **plain(scene))


def _write_windows_down(file: Path) -> None:
    real = training_utils.Meter.add

    def add(meter, figures, window_ids):
        with file.open("a") as lines:
            lines.write(json.dumps(list(window_ids)) + "\n")
        real(meter, figures, window_ids)

    training_utils.Meter.add = add


def stream_of_other_world_size(scene: Scene) -> None:
    changes = dict(no_dataset_streaming=False, shuffle_buffer=10, max_steps=3)
    scene.run(**changes)
    scene.run(3, resume="auto", **changes)


def spoil_loss(first: int, last: int, value: float) -> None:
    real, calls = objective.DistillationModel.forward, 0

    def forward(model, batch, signal):
        nonlocal calls
        calls += 1
        loss, figures = real(model, batch, signal)
        spoilt = first <= calls - SETTLING <= last
        return (loss * value, figures * value) if spoilt else (loss, figures)

    objective.DistillationModel.forward = forward


def two_bad_steps(scene: Scene) -> None:
    scene.run(arm=on_rank(1, lambda: spoil_loss(4, 5, float("nan"))), **OWNERS)


def diverged(scene: Scene) -> None:
    scene.run(arm=on_rank(1, lambda: spoil_loss(7, 10**9, float("inf"))), max_bad_steps=3)
    scene.run(resume="auto", max_bad_steps=3)


def loss_spike(scene: Scene) -> None:
    """Triples a loss of rank 0, once the few losses that the watch needs here have been seen."""

    def arm(rank: int) -> None:
        SpikeWatch.LEAST = 8
        if rank == 0:
            spoil_loss(10, 10, 3.0)

    scene.run(arm=arm)


def fail(error: Exception) -> Callable[[], None]:
    def raise_error() -> None:
        raise error

    return raise_error


def a_rank_raises(scene: Scene) -> None:
    scene.run(3, on_rank(2, lambda: at_micro_step(4, fail(RuntimeError("a fault of this test")))))


def a_rank_is_killed(scene: Scene) -> None:
    """Kills rank 1 within an exchange: of its two buckets of gradients in a step it has sent one."""
    scene.run(3, on_rank(1, lambda: trap(owners.Owners, "_send", 4, signal_self(signal.SIGKILL))), **OWNERS)


def rank_0_is_killed(scene: Scene) -> None:
    scene.run(3, on_rank(0, lambda: at_micro_step(4, signal_self(signal.SIGKILL))))


def a_rank_is_halted_for_a_while(scene: Scene) -> None:
    """Halts rank 1, as a debugger or a frozen container does, until the process is seen to stand still."""
    launch = scene.launch(2, on_rank(1, lambda: at_micro_step(4, signal_self(signal.SIGSTOP))))
    stat = Path(f"/proc/{launch.pids[1]}/stat")
    wait_until(lambda: launch.ended() or stat.read_text().rpartition(")")[2].split()[0] == "T", seconds=200)
    os.kill(launch.pids[1], signal.SIGCONT)
    scene.wait(launch)


def a_rank_dies_while_others_wait_in_native_code(scene: Scene) -> None:
    """Hangs the main thread of rank 0, as NCCL does: only its lifeline can end it."""

    def arm(rank: int) -> None:
        if rank == 1:
            at_micro_step(4, signal_self(signal.SIGKILL))
        else:
            at_micro_step(4, signal.pause)

    scene.run(2, arm)


def the_teacher_runs_out_of_memory(scene: Scene) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory: a fault of this test")
    scene.run(2, on_rank(0, lambda: trap(teacher.Teacher, "__call__", 7, fail(error))))


def full_disk(scene: Scene) -> None:
    """Limits files to 64 KiB between micro steps 4 and 9. Saves in the foreground, so nothing else is written then."""

    def limit(size: int) -> Callable[[], None]:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    def arm(rank: int) -> None:
        if rank == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            at_micro_step(4, limit(2**16))
            at_micro_step(9, limit(resource.RLIM_INFINITY))

    scene.run(arm=arm, no_background_save=True)


def full_disk_at_the_end(scene: Scene) -> None:
    """Fails the last save twice; then there is room."""
    scene.run(arm=on_rank(1, lambda: _fail_parts(2)), max_steps=2, save_interval=0)


def _fail_parts(n: int) -> None:
    real, calls = saver.write_part, 0

    def write_part(*args):
        nonlocal calls
        calls += 1
        if 2 <= calls <= n + 1:  # the first is that of checkpoint-0
            raise OSError(28, "No space left on device")
        real(*args)

    saver.write_part = write_part


def no_checkpoint_can_be_written(scene: Scene) -> None:
    """Refuses rank 1's part of checkpoint-0, as a file system does that has a limit for files."""
    error = OSError(27, "File too large")
    scene.run(arm=on_rank(1, lambda: trap(saver, "write_part", 1, fail(error))))


def a_copied_folder(scene: Scene) -> None:
    """Resumes in copies of the folder of `straight` as it was after micro step 6, in which `latest` is no link but a
    folder. `straight` has to be played before.
    """
    for how in ("auto", "latest"):
        copy = scene.folder / f"copied-{how}"
        later = shutil.ignore_patterns("checkpoint-9", "checkpoint-12", "latest")
        shutil.copytree(scene.folder / "straight", copy, ignore=later)
        shutil.copytree(copy / "checkpoint-6", copy / "latest")
        scene.run(output=copy, resume="auto" if how == "auto" else copy / "latest", save_total_limit=2)


def no_memory_for_the_copy(scene: Scene) -> None:
    """Fails the copy for checkpoint-3 on rank 1."""
    error = MemoryError("a fault of this test")
    scene.run(arm=on_rank(1, lambda: trap(saver, "copy_to_host", 3, fail(error))), max_steps=8)


def slow_disk(scene: Scene) -> None:
    """Has rank 1 finish its part of checkpoint-4 only when micro step 8 has begun."""

    def arm() -> None:
        begun = threading.Event()
        at_micro_step(8, begun.set)
        trap(saver, "write_part", 2, lambda: begun.wait(60))

    scene.run(arm=on_rank(1, arm), max_steps=8, save_interval=4)


def a_bad_row(scene: Scene) -> None:
    """Trains on a file whose line 3 is no JSON, cached and streamed, with and without --skip_bad_rows."""
    lines = (scene.models / "short.jsonl").read_text().splitlines(keepends=True)
    bad = scene.folder / "bad.jsonl"
    bad.write_text("".join([*lines[:2], '{"text": "cut', "\n", *lines[2:]]))
    for streaming in (False, True):
        for skip in (False, True):
            changes = dict(no_dataset_streaming=not streaming, skip_bad_rows=skip, shuffle_buffer=0, save_interval=0)
            scene.run(1, output=scene.folder / f"row-{streaming}-{skip}", dataset_name=bad, max_steps=2, **changes)


def a_mistake_that_one_rank_finds(scene: Scene) -> None:
    scene.run(arm=on_rank(1, lambda: at_micro_step(3, fail(ValueError("--flag 7: a mistake of this test")))))


def bad_checkpoints(scene: Scene) -> None:
    """Cuts the newest short and flips a bit of the one before, which only hashing finds; then makes all bad."""
    scene.run()
    shard = scene.output / "checkpoint-12" / "optimizer-00001-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 100)
    model = scene.output / "checkpoint-9" / "model-00002-of-00002.safetensors"
    content = bytearray(model.read_bytes())
    content[-50] ^= 4
    model.write_bytes(content)

    def all_are_large(rank: int) -> None:
        files.SMALL = resume.SMALL = 0

    scene.run(arm=all_are_large, resume="auto")
    for file in scene.output.glob("checkpoint-*/training_state.json"):
        file.write_text("{")
    scene.run(resume="auto")


def another_run(scene: Scene) -> None:
    scene.run(max_steps=3)
    scene.run(resume="auto", max_steps=3, seed=1, layers="1 2", dtype="bfloat16")
    scene.run(resume=scene.models / "student", output=scene.folder / "elsewhere")


def two_at_once(scene: Scene) -> None:
    """Starts a second run in the directory of a run that waits in its second micro step meanwhile."""
    is_training, may_continue = scene.folder / "is-training", scene.folder / "may-continue"

    def wait_for_the_second() -> None:
        is_training.touch()
        wait_until(may_continue.exists, seconds=200)

    first = scene.launch(1, lambda rank: at_micro_step(2, wait_for_the_second), max_steps=3)
    wait_until(lambda: is_training.exists() or first.ended(), seconds=200)
    Launch(options(scene.models, scene.output), 1, scene.folder / "second.log").wait()
    may_continue.touch()
    scene.wait(first)


def few_are_kept(scene: Scene) -> None:
    scene.run(save_total_limit=2)


def in_the_foreground(scene: Scene) -> None:
    scene.run(no_background_save=True)


def health(scene: Scene) -> None:
    """Trains in bfloat16 at a small learning rate, without master weights and with."""
    changes = dict(dtype="bfloat16", max_lr=1e-5, max_steps=12, health_interval=6, save_interval=0)
    scene.run(no_master_weights=True, **changes)
    scene.run(output=scene.folder / "health-masters", **changes)


def scenarios() -> dict[str, Callable[[Scene], None]]:
    """Returns the scenarios of this file by name."""
    here = vars(sys.modules[__name__])
    takes_scene = lambda f: callable(f) and getattr(f, "__annotations__", {}).get("scene") is Scene  # noqa: E731
    return {name: f for name, f in here.items() if takes_scene(f)}


def play(folder: Path, *names: str) -> None:
    """Plays these scenarios, or all, with the models of `make_models` in `folder`."""
    for name in names or scenarios():
        scene = Scene(folder, name)
        scenarios()[name](scene)
        scene.keep()
        print(name, [fact["codes"] for fact in scene.facts], flush=True)


if __name__ == "__main__":
    play(make_models(Path(sys.argv[1])), *sys.argv[2:])
