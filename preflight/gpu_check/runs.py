"""The tiny runs of `make gpu-check`: their command, as a user would type it, and how one ended."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from preflight.gpu_check.children import NO_GPU, Child, last_lines
from preflight.gpu_check.results import Session

STEPS = 24
LIMIT = 180.0  # seconds of one run, so that one that hangs leaves time for the others
# Saves and evaluations are under way in every run.
COMMON = f"--preset tiny --max_steps {STEPS} --batch_size 2 --log_interval 1 --eval_windows 8 --layer_map_interval 8"
COMMON += " --max_lr 1e-4"  # with that of the preset, rounding alone changes the losses of later steps by a quarter
SOMETIMES = "--save_interval 8 --eval_interval 8"


class Reference(NamedTuple):
    """Names what a run's losses depend on. Its run on the CPU is what the others are compared with."""

    stage: str
    dtype: str
    n_ranks: int

    @property
    def name(self) -> str:
        return f"cpu-{self.stage}-{self.dtype}-{self.n_ranks}"

    @property
    def options(self) -> str:
        return f"--stage {self.stage} --dtype {self.dtype}"


@dataclasses.dataclass
class Run:
    """Holds a run and how it ended. problem: why it failed. is_left_out: it was not started, for lack of time.
    contexts: local rank and GPU of each CUDA context that its processes had, where that was watched.
    """

    folder: Path
    command: list[str]
    environment: dict[str, str]
    problem: str | None = None
    is_left_out: bool = False
    contexts: set[tuple[int, str]] | None = None

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    @property
    def rows(self) -> list[dict]:
        """Returns the whole lines of metrics.jsonl."""
        file = self.folder / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    @property
    def warnings(self) -> list[str]:
        """Returns what the run warned of, but that it was asked to stop."""
        file = self.folder / "warnings.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        texts = [json.loads(line)["text"] for line in lines]
        return [text for text in dict.fromkeys(texts) if not text.startswith("stopped by SIGTERM")]

    @property
    def status(self) -> dict:
        """Returns status.json, or what stands for one that is not there."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.folder / "status.json").read_text())
        return {"status": "unknown", "text": "status.json cannot be read"}

    @property
    def evidence(self) -> list[str]:
        """Returns the command, the place of the log, and its end."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return [" ".join([*variables, shlex.join(self.command)]), f"# {self.log}", *last_lines(self.log)]

    def start(self) -> Child:
        return Child(self.command, self.log, {"OMP_NUM_THREADS": "1", **self.environment})

    def finish(self, session: Session) -> Run:
        """Runs to the end, if there is time for it."""
        if session.is_late:
            self.is_left_out = True
        else:
            self.problem = self.start().wait(min(session.seconds_left, LIMIT))
        return self


def new_run(session: Session, name: str, options: str, n_ranks: int = 1, on_cpu: bool = False) -> Run:
    """Prepares a run of its own folder and cache. options: of train_gpus.py, in which cuda:0 is the first device."""
    folder = session.work / name.replace(",", "").replace("'", "").replace(" ", "-")
    if on_cpu or not session.n_gpus:
        options = options.replace("cuda:0", "cpu")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_ranks}"]
    command += ["train_gpus.py", *COMMON.split(), *options.split()]
    command += ["--output_dir", str(folder), "--dataset_cache_dir", str(folder / "cache")]
    return Run(folder, command, NO_GPU if on_cpu else {})
