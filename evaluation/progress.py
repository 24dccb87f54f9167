"""Shows how far an evaluation is."""

import logging
import sys
import time

from tqdm import tqdm

from evaluation.pieces import Piece

logger = logging.getLogger("train")

LOG_INTERVAL_S = 30.0  # between log lines about the progress, where no terminal shows a bar


class Progress:
    """Shows how much of the work is done and how long the rest will take: a bar on a terminal, else log lines."""

    def __init__(self, cost: int, is_main: bool) -> None:
        self.cost, self.done, self.is_main = cost, 0, is_main
        self.bar = tqdm(
            total=cost,
            disable=not (is_main and sys.stderr.isatty()),
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed} so far, {remaining} left",
        )
        self.began = self.logged = time.monotonic()

    def advance(self, model: str, piece: Piece) -> None:
        self.done += piece.cost
        self.bar.set_description_str(f"{model} {piece.name}")
        self.bar.update(piece.cost)
        now = time.monotonic()
        if self.is_main and self.bar.disable and now - self.logged > LOG_INTERVAL_S:
            self.logged = now
            minutes = (now - self.began) * (self.cost - self.done) / self.done / 60
            logger.info("%s: %d%%, about %.0f min left", model, 100 * self.done // self.cost, minutes)

    def close(self) -> None:
        self.bar.close()
