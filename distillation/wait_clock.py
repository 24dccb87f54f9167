"""How long a device's work waits for the teacher."""

import contextlib
import time
from collections.abc import Iterator

import torch


class WaitClock:
    """Counts the seconds that a device's work waits for the teacher. On a GPU they are measured by events on its
    stream, from the end of earlier work to the moment when it can continue; the host does not wait for the measurement.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self.spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        if self.device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(torch.cuda.current_stream(self.device))
            yield
            end.record(torch.cuda.current_stream(self.device))
            self.spans.append((begin, end))
        else:
            start = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - start

    def take(self) -> float:
        """Returns the seconds since the last call. On a GPU, call it after the end of a step has been waited for."""
        for begin, end in self.spans:
            end.synchronize()
            self.seconds += begin.elapsed_time(end) / 1000
        taken, self.seconds = self.seconds, 0.0
        self.spans.clear()
        return taken
