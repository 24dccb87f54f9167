"""That a rank which fails or dies takes the others with it within seconds, and that all name the first cause.

Every rank has a thread that waits for a message of rank 0, and rank 0 one for each other rank, by a gloo group of their
own. A process that ends, however it ends, closes its connections, which the thread on the other side sees at once;
NCCL would see it when its time is up. Rank 0 passes on what it hears.
"""

import logging
import os
import sys
import threading
import time

import torch
import torch.distributed as dist

from processes.exits import EXIT_STOPPED, Interrupted

logger = logging.getLogger("train")

SIZE = 4096  # bytes of a message
GOODBYE = "goodbye"  # the only message after which the others go on
# How a message begins that tells of no fault of ours, and the code to end with: a mistake of the user, which rank 0
# passes on to the user; a signal outside training, which every rank hears itself.
MISTAKE, STOPPED = "mistake: ", "stopped: "
CODES = {MISTAKE: 2, STOPPED: EXIT_STOPPED}
GRACE_S = 5.0  # for the main thread to end by itself: a collective that lost a peer raises, or hangs
LONGEST_END_S = 20.0  # for a rank that failed; torchrun's own patience is 30


class Lifeline:
    def __init__(self, group: dist.ProcessGroup) -> None:
        """group: a CPU group of all ranks that nothing else uses, with a timeout longer than any run."""
        self.group, self.rank, world_size = group, dist.get_rank(), dist.get_world_size()
        self.peers = [0] if self.rank else list(range(1, world_size))
        self.ending = False  # another rank's failure is known here, or this rank's own has been told
        self.code = 1  # to end with because of another rank
        self.lock = threading.Lock()
        self.threads = [threading.Thread(target=self._listen, args=(peer,), daemon=True) for peer in self.peers]
        for thread in self.threads:
            thread.start()

    def close(self) -> None:
        """Says goodbye, and waits until everybody has."""
        self._send(GOODBYE)
        for thread in self.threads:
            thread.join()

    def report(self, error: BaseException) -> int | None:
        """Tells the others why this rank ends: None then. If it ends because of one of them, returns the exit code to
        end with. Waits a little for that cause: what a failed peer breaks here is often seen before what it says.
        """
        if not self.peers:
            return None
        time.sleep(0.5)
        if not self._is_first():
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
                logger.debug("rank %d is gone already", peer)

    def _listen(self, peer: int) -> None:
        message = torch.zeros(SIZE, dtype=torch.uint8)
        try:
            dist.recv(message, src=peer, group=self.group)
            text = bytes(message.tolist()).rstrip(b"\0").decode(errors="replace")
        except RuntimeError:
            text = f"rank {peer} died without a word (killed, or out of host memory?)"
        if text == GOODBYE or not self._is_first():
            return
        kind = next((kind for kind in CODES if text.startswith(kind)), "")
        self.code = CODES.get(kind, 1)
        _exit_after(GRACE_S, self.code)
        if kind == MISTAKE and self.rank == 0:
            print(f"error: {text.removeprefix(MISTAKE)}", file=sys.stderr, flush=True)
        elif kind == "":
            logger.error("this run ends because %s", text)
        if self.rank == 0:
            self._send(text)


def _exit_after(seconds: float, code: int) -> None:
    timer = threading.Timer(seconds, os._exit, [code])
    timer.daemon = True
    timer.start()
