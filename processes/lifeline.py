"""Ends all ranks within seconds when one fails or dies, and lets all of them log the first cause.

Each rank has a thread that waits for a message from rank 0, and rank 0 has one for each other rank, over a gloo group
of their own. A process that ends in any way closes its connections, and the thread on the other side notices at once,
while NCCL would notice at its timeout. Rank 0 forwards what it receives.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from processes.exits import EXIT_STOPPED, Interrupted

logger = logging.getLogger("train")

SIZE = 4096  # bytes of a message
GOODBYE = "goodbye"  # the only message that does not end the receiver
# Prefixes of messages that report no failure of this program, with the exit code for each: a mistake of the user, which
# rank 0 prints; a signal outside training, which every rank receives itself.
MISTAKE, STOPPED = "mistake: ", "stopped: "
CODES = {MISTAKE: 2, STOPPED: EXIT_STOPPED}
GRACE_S = 5.0  # for the main thread to end by itself: a collective that lost a peer raises, or hangs
LONGEST_END_S = 20.0  # for a rank that failed; torchrun itself waits for 30


class Lifeline:
    """Connects the ranks of a run from `process_groups` to its end."""

    def __init__(self, group: dist.ProcessGroup, on_mistake: Callable[[str], None] | None = None) -> None:
        """group: a CPU group of all ranks that nothing else uses, with a timeout longer than any run. on_mistake: is
        called on rank 0, in a thread, with the text of a mistake that another rank has found.
        """
        self.on_mistake = on_mistake
        self.group, self.rank, world_size = group, dist.get_rank(), dist.get_world_size()
        self.peers = [0] if self.rank else list(range(1, world_size))
        self.ending = False  # another rank's failure is known here, or this rank's own has been reported
        self.code = 1  # to end with when another rank failed
        self.known = threading.Event()  # set when all is done that another rank's failure asks for
        self.lock = threading.Lock()
        self.threads = [threading.Thread(target=self._listen, args=(peer,), daemon=True) for peer in self.peers]
        for thread in self.threads:
            thread.start()

    def close(self) -> None:
        """Says goodbye, and waits until all ranks have."""
        self._send(GOODBYE)
        for thread in self.threads:
            thread.join()

    def report(self, error: BaseException) -> int | None:
        """Reports to the others why this rank ends, and returns None; or, if another rank is the first cause, returns
        the exit code to end with. Waits a little first: the damage of a failed peer often arrives before its message.
        """
        if not self.peers:
            return None
        time.sleep(0.5)
        if not self._is_first():
            self.known.wait(GRACE_S)
            return self.code
        _exit_after(LONGEST_END_S, 1)
        if isinstance(error, ValueError):
            text = f"{MISTAKE}{error} (on rank {self.rank})"
        elif isinstance(error, Interrupted):
            text = f"{STOPPED}{error}"
        else:
            text = f"rank {self.rank} failed: {type(error).__name__}: {error}"
        sending = threading.Thread(target=self._send, args=(text,), daemon=True)
        sending.start()
        sending.join(timeout=2.0)  # a peer that hangs must not keep this rank
        return None

    def _is_first(self) -> bool:
        with self.lock:
            first, self.ending = not self.ending, True
        return first

    def _send(self, text: str) -> None:
        content = bytearray(text.encode()[:SIZE].ljust(SIZE, b"\0"))
        for peer in self.peers:
            try:
                dist.send(torch.frombuffer(content, dtype=torch.uint8), dst=peer, group=self.group)
            except RuntimeError:
                logger.debug("rank %d has already ended", peer)

    def _listen(self, peer: int) -> None:
        message = torch.zeros(SIZE, dtype=torch.uint8)
        try:
            dist.recv(message, src=peer, group=self.group)
            text = bytes(message.tolist()).rstrip(b"\0").decode(errors="replace")
        except RuntimeError:
            text = f"rank {peer} ended without a message (killed, or out of host memory?)"
        if text == GOODBYE or not self._is_first():
            return
        kind = next((kind for kind in CODES if text.startswith(kind)), "")
        self.code = CODES.get(kind, 1)
        _exit_after(GRACE_S, self.code)
        if kind == MISTAKE and self.rank == 0:
            mistake = text.removeprefix(MISTAKE)
            print(f"error: {mistake}", file=sys.stderr, flush=True)
            if self.on_mistake is not None:  # here, because the main thread may hang until the process is ended
                self.on_mistake(mistake)
        elif kind == "":
            logger.error("this run ends because %s", text)
        self.known.set()
        if self.rank == 0:
            self._send(text)


def _exit_after(seconds: float, code: int) -> None:
    timer = threading.Timer(seconds, os._exit, [code])
    timer.daemon = True
    timer.start()
