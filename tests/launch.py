"""Starts the ranks of an entry: as forks of a process that has imported everything, a second where torchrun takes ten,
or by the real torchrun, where torchrun itself is tested. Forked ranks can be killed and signalled like any process.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO

import train_gpus
from processes.exits import run_entry

ROOT = Path(__file__).parents[1]

Main = Callable[[], int | None]
Arm = Callable[[int], None]


class Launch:
    """Starts the ranks of one run as forks of this process."""

    def __init__(
        self,
        argv: list[str],
        n_ranks: int,
        log: Path,
        arm: Arm | None = None,
        main: Main = train_gpus.main,
        ranks_per_node: int | None = None,
    ) -> None:
        """arm: called in each rank, with its number, before `main`; it can set a trap there. ranks_per_node: all ranks
        are on one node by default; the nodes are all this machine.
        """
        self.log, self.codes = log, dict[int, int]()
        self.pids: list[int] = []
        self.reserved = reserve_port()
        for rank in range(n_ranks):
            pid = os.fork()
            if pid == 0:
                environment = rank_environment(rank, n_ranks, ranks_per_node or n_ranks, self.reserved.getsockname()[1])
                _be_rank(argv, environment, log, self.pids[0] if self.pids else 0, arm, main)
            self.pids.append(pid)
            os.setpgid(pid, self.pids[0])

    def kill(self) -> None:
        """Kills all ranks at once with `kill -9`."""
        if not self.ended():
            os.killpg(self.pids[0], signal.SIGKILL)

    def text(self) -> str:
        """Returns what the ranks have written so far."""
        return self.log.read_text() if self.log.exists() else ""

    def wait(self, timeout: float = 240.0) -> list[int]:
        """Returns the exit codes by rank; minus the signal's number for a rank that a signal killed. Ends the other
        ranks when one has failed, as torchrun does. Kills them and raises TimeoutError after `timeout` seconds.
        """
        deadline, has_signalled = time.monotonic() + timeout, False
        while not self.ended():
            if any(self.codes.values()) and not has_signalled:
                has_signalled = True
                for pid in set(self.pids) - set(self.codes):
                    os.kill(pid, signal.SIGTERM)
            if time.monotonic() > deadline:
                os.killpg(self.pids[0], signal.SIGKILL)
                raise TimeoutError(f"ranks were still there after {timeout} s:\n{self.text()[-4000:]}")
            time.sleep(0.01)
        return [self.codes[pid] for pid in self.pids]

    def ended(self) -> bool:
        """Returns whether all ranks have ended."""
        for pid in set(self.pids) - set(self.codes):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        if len(self.codes) == len(self.pids):
            self.reserved.close()
        return len(self.codes) == len(self.pids)


def reserve_port() -> socket.socket:
    """Returns a socket bound to a free port of this machine. As long as it is open, no other program is given the port,
    and the store of rank 0 can listen on it all the same: both set SO_REUSEADDR, and this socket does not listen.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


def rank_environment(rank: int, n_ranks: int, ranks_per_node: int, port: int) -> dict[str, str]:
    """Returns the variables that torchrun sets for a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % ranks_per_node),
        "WORLD_SIZE": str(n_ranks),
        "LOCAL_WORLD_SIZE": str(ranks_per_node),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _be_rank(argv: list[str], environment: dict[str, str], log: Path, group: int, arm: Arm | None, main: Main) -> None:
    """Runs `main` as a forked rank in the process group `group` (0: a new one); does not return."""
    code = 1
    try:
        os.setpgid(0, group)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ |= environment
        sys.argv = [main.__module__, *argv]
        if arm is not None:
            arm(int(environment["RANK"]))
        code = run_entry(main)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start_torchrun(script: str, argv: list[str], *torchrun_options: str, output: IO[bytes]) -> subprocess.Popen:
    """Starts the real torchrun in a session of its own; what it and its ranks write goes to `output`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *torchrun_options, script, *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True)
