"""Ranks of train_gpus.py, or of another entry, as forks of a process that has imported everything: a launch costs a
second where torchrun takes ten, and the processes are as real, to be killed and signalled like any other. `arm` runs in
each rank before it starts, and can set a trap in it.
"""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer

import train_gpus
from processes.exits import run_entry
from tests.tiny import tiny_student, tiny_teacher

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "presets" / "tiny" / "text" / "heldout.jsonl"


class Launch:
    def __init__(
        self,
        argv: list[str],
        n_ranks: int,
        log: Path,
        arm: Callable[[int], None] | None = None,
        main: Callable[[], int | None] = train_gpus.main,
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.log, self.codes = log, dict[int, int]()
        self.pids: list[int] = []
        for rank in range(n_ranks):
            pid = os.fork()
            if pid == 0:
                _be_rank(rank, n_ranks, port, argv, log, self.pids[0] if self.pids else 0, arm, main)
            self.pids.append(pid)
            os.setpgid(pid, self.pids[0])

    def kill(self) -> None:
        """`kill -9` of all ranks at once."""
        if not self.ended():
            os.killpg(self.pids[0], signal.SIGKILL)

    def text(self) -> str:
        """What the ranks have written so far."""
        return self.log.read_text() if self.log.exists() else ""

    def wait(self, timeout: float = 120.0) -> list[int]:
        """Exit codes by rank, minus the signal's number for one that died of it. As torchrun does, ends the others when
        one has failed; past the timeout, kills them and raises TimeoutError.
        """
        deadline, told = time.monotonic() + timeout, False
        while not self.ended():
            if any(self.codes.values()) and not told:
                told = True
                for pid in set(self.pids) - set(self.codes):
                    os.kill(pid, signal.SIGTERM)
            if time.monotonic() > deadline:
                os.killpg(self.pids[0], signal.SIGKILL)
                raise TimeoutError(f"ranks were still there after {timeout} s:\n{self.text()[-4000:]}")
            time.sleep(0.01)
        return [self.codes[pid] for pid in self.pids]

    def ended(self) -> bool:
        for pid in set(self.pids) - set(self.codes):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)


def _be_rank(rank, n_ranks, port, argv, log, group, arm, main) -> None:
    """The life of one forked rank; does not return."""
    code = 1
    try:
        os.setpgid(0, group)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n_ranks)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(n_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        sys.argv = [main.__module__, *argv]
        if arm is not None:
            arm(rank)
        code = run_entry(main)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def make_models(folder: Path) -> Path:
    """A teacher and a student of a few thousand weights. The student has dropout: random state matters."""
    tiny_teacher(vocab_size=1030).save_pretrained(folder / "teacher")
    AutoTokenizer.from_pretrained(ROOT / "presets" / "tiny" / "teacher").save_pretrained(folder / "teacher")
    tiny_student(vocab_size=1024, resid_dropout=0.1).save_pretrained(folder / "student")
    tiny_student(vocab_size=1024).save_pretrained(folder / "plain")
    (folder / "short.jsonl").write_text("".join(TEXT.read_text().splitlines(keepends=True)[:60]))
    return folder


def options(models: Path, output_dir: Path, **changes) -> list[str]:
    values = {
        "teacher_model": models / "teacher",
        "student_model": models / "student",
        "dataset_name": TEXT,
        "dataset_cache_dir": models / "cache",
        "output_dir": output_dir,
        "layers": "1 3",
        "dtype": "float32",
        "seq_length": 32,
        "batch_size": 2,
        "max_steps": 24,
        "max_lr": 1e-3,
        "save_interval": 3,
        "log_interval": 1,
        "no_dataset_streaming": True,
        **changes,
    }
    argv = ["--local_files_only"]
    for name, value in values.items():
        if value is True:
            argv.append(f"--{name}")
        elif value is not None and value is not False:
            argv += [f"--{name}", *str(value).split()]
    return argv
