"""Runs that meet one trouble each. They leave their directories, and what their ranks wrote and ended with goes to
`<folder>/<scenario>.json`, for tests/test_faults.py to look at.

    python -m tests.faults.scenarios FOLDER [SCENARIO ...]
"""

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import training_utils
from checkpointing import files, resume, saver
from distillation import teacher
from tests.faults.launch import Launch, make_models, options
from tests.faults.traps import trap
from text import encoding

FORWARD = (training_utils.DistillationModel, "forward")
SETTLING = 2  # forward passes before the first micro step
WORLDS = dict(max_steps=1000, save_interval=0)
ACCUMULATED = dict(grad_accumulation_steps=2, save_interval=10, max_steps=12)


class Scene:
    """Launches of one scenario, and what came of them."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name, self.output = folder, name, folder / name
        self.models = folder
        self.facts: list[dict] = []

    def launch(self, n_ranks: int = 2, arm: Callable[[int], None] | None = None, output=None, **changes) -> Launch:
        argv = options(self.models, output or self.output, **changes)
        return Launch(argv, n_ranks, self.folder / f"{self.name}-{len(self.facts)}.log", arm)

    def run(self, n_ranks: int = 2, arm: Callable[[int], None] | None = None, output=None, **changes) -> None:
        launch = self.launch(n_ranks, arm, output, **changes)
        codes = launch.wait()
        self.facts.append({"codes": codes, "log": launch.text()})

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


def straight_12(scene: Scene) -> None:
    scene.run(max_steps=12)


def signals(scene: Scene) -> None:
    """Each to another rank, within an accumulation; then a time limit; then nothing."""
    for rank, (n, number) in enumerate([(5, signal.SIGTERM), (3, signal.SIGINT), (4, signal.SIGUSR1)]):
        act = signal_self(number)
        scene.run(arm=on_rank(rank % 2, lambda n=n, act=act: at_micro_step(n, act)), resume="auto", **ACCUMULATED)
    scene.run(resume="auto", time_limit=1e-6, **ACCUMULATED)
    scene.run(resume="auto", **ACCUMULATED)
    scene.run(resume="auto", **ACCUMULATED)  # complete already


def signal_before_training(scene: Scene) -> None:
    scene.run(arm=lambda rank: trap(training_utils, "wrap_ddp", 1, signal_self(signal.SIGTERM)))


def signal_while_tokenising(scene: Scene) -> None:
    cache = scene.folder / "stopped-cache"
    scene.run(arm=on_rank(0, lambda: trap(encoding.Encoder, "__call__", 1, wait_for_a_signal)), dataset_cache_dir=cache)
    scene.run(dataset_cache_dir=cache, max_steps=1)


def wait_for_a_signal() -> None:
    """In a thread of the pool; the signal reaches the main thread."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)


def nodes_without_a_shared_folder(scene: Scene) -> None:
    """Rank 1 stands for another node, which has a folder of the same name, and in it the lock of an earlier run."""

    def arm(rank: int) -> None:
        if rank == 1:
            elsewhere = scene.folder / "another-node"
            elsewhere.mkdir()
            (elsewhere / ".lock").write_text("123")
            sys.argv[sys.argv.index("--output_dir") + 1] = str(elsewhere)

    scene.run(arm=arm)


def plain(scene: Scene) -> dict:
    """Without dropout, whose masks depend on the number of ranks, and with fewer windows."""
    return dict(student_model=scene.models / "plain", dataset_name=scene.models / "short.jsonl")


def other_world_sizes(scene: Scene) -> None:
    """2 ranks, then 3, then 1, each with the same windows a step; every rank writes down its windows. Beside them a run
    of one rank.
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
    real, calls = training_utils.DistillationModel.forward, 0

    def forward(model, batch, signal):
        nonlocal calls
        calls += 1
        loss, figures = real(model, batch, signal)
        spoilt = first <= calls - SETTLING <= last
        return (loss * value, figures * value) if spoilt else (loss, figures)

    training_utils.DistillationModel.forward = forward


def two_bad_steps(scene: Scene) -> None:
    scene.run(arm=on_rank(1, lambda: spoil_loss(4, 5, float("nan"))))


def diverged(scene: Scene) -> None:
    scene.run(arm=on_rank(1, lambda: spoil_loss(7, 10**9, float("inf"))), max_bad_steps=3)
    scene.run(resume="auto", max_bad_steps=3)


def loss_spike(scene: Scene) -> None:
    scene.run(arm=on_rank(0, lambda: spoil_loss(40, 40, 3.0)), max_steps=42)


def fail(error: Exception) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def a_rank_raises(scene: Scene) -> None:
    scene.run(3, on_rank(2, lambda: at_micro_step(4, fail(RuntimeError("a fault of this test")))))


def a_rank_is_killed(scene: Scene) -> None:
    scene.run(3, on_rank(1, lambda: at_micro_step(4, signal_self(signal.SIGKILL))))


def rank_0_is_killed(scene: Scene) -> None:
    scene.run(3, on_rank(0, lambda: at_micro_step(4, signal_self(signal.SIGKILL))))


def a_rank_dies_while_others_wait_in_native_code(scene: Scene) -> None:
    """As under NCCL: the main thread of rank 0 hangs, and nothing but its lifeline can end it."""

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
    """No file can grow past 64 KiB between micro steps 4 and 13. In the foreground: nothing else is written then."""

    def limit(size: int) -> Callable[[], None]:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    def arm(rank: int) -> None:
        if rank == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            at_micro_step(4, limit(2**16))
            at_micro_step(13, limit(resource.RLIM_INFINITY))

    scene.run(arm=arm, no_background_save=True)


def full_disk_at_the_end(scene: Scene) -> None:
    """The last save fails twice, then there is room."""
    scene.run(arm=on_rank(1, lambda: _fail_parts(2)), max_steps=2, save_interval=0)


def _fail_parts(n: int) -> None:
    real, calls = saver.write_part, 0

    def write_part(*args):
        nonlocal calls
        calls += 1
        if 2 <= calls <= n + 1:  # the first is checkpoint-0's
            raise OSError(28, "No space left on device")
        real(*args)

    saver.write_part = write_part


def no_memory_for_the_copy(scene: Scene) -> None:
    """On rank 1, for checkpoint-3."""
    error = MemoryError("a fault of this test")
    scene.run(arm=on_rank(1, lambda: trap(saver, "copy_to_host", 3, fail(error))), max_steps=8)


def slow_disk(scene: Scene) -> None:
    """Rank 1 takes five seconds for its part of checkpoint-3."""
    scene.run(arm=on_rank(1, lambda: trap(saver, "write_part", 2, lambda: time.sleep(5))), max_steps=8)


def a_bad_row(scene: Scene) -> None:
    """Line 3 is no JSON: named by either lane, or left out."""
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
    """The newest is cut short, the one before has a flipped bit where only hashing finds it; then all are bad."""
    scene.run(max_steps=12)
    shard = scene.output / "checkpoint-12" / "optimizer-00001-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 100)
    model = scene.output / "checkpoint-9" / "model-00002-of-00002.safetensors"
    content = bytearray(model.read_bytes())
    content[-50] ^= 4
    model.write_bytes(content)

    def all_are_large(rank: int) -> None:
        files.SMALL = resume.SMALL = 0

    scene.run(arm=all_are_large, resume="auto", max_steps=12)
    for file in scene.output.glob("checkpoint-*/training_state.json"):
        file.write_text("{")
    scene.run(resume="auto", max_steps=12)


def another_run(scene: Scene) -> None:
    scene.run(max_steps=3)
    scene.run(resume="auto", max_steps=3, seed=1, layers="1 2", dtype="bfloat16")
    scene.run(resume=scene.models / "student", output=scene.folder / "elsewhere")


def two_at_once(scene: Scene) -> None:
    def second() -> None:
        launch = Launch(options(scene.models, scene.output), 1, scene.folder / "second.log")
        launch.wait()

    scene.run(1, lambda rank: at_micro_step(2, second), max_steps=3)


def few_are_kept(scene: Scene) -> None:
    scene.run(save_total_limit=2)


def in_the_foreground(scene: Scene) -> None:
    scene.run(no_background_save=True)


def health(scene: Scene) -> None:
    """bfloat16 at a small learning rate, without masters and with."""
    changes = dict(dtype="bfloat16", max_lr=1e-5, max_steps=20, health_interval=10, save_interval=0)
    scene.run(no_master_weights=True, **changes)
    scene.run(output=scene.folder / "health-masters", **changes)


def scenarios() -> dict[str, Callable[[Scene], None]]:
    here = vars(sys.modules[__name__])
    takes_scene = lambda f: callable(f) and getattr(f, "__annotations__", {}).get("scene") is Scene  # noqa: E731
    return {name: f for name, f in here.items() if takes_scene(f)}


def play(folder: Path, *names: str) -> None:
    """These scenarios, or all."""
    make_models(folder)
    for name in names or scenarios():
        scene = Scene(folder, name)
        scenarios()[name](scene)
        scene.keep()
        print(name, [fact["codes"] for fact in scene.facts], flush=True)


if __name__ == "__main__":
    play(Path(sys.argv[1]), *sys.argv[2:])
