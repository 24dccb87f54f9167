"""The small files of a run's folder: whether their places are free, and what has to be there again when the folder is
removed during the run.
"""

import contextlib
import logging
import os
from pathlib import Path
from typing import IO

from utils import TakenError, lock_dir, write_whole

logger = logging.getLogger("train")

WRITTEN = ("metrics.jsonl", "metrics.abandoned.jsonl", "warnings.jsonl", "status.json", "args.yaml", "wandb_id")
RESTORED = ("status.json", "args.yaml", "wandb_id")  # metrics.jsonl and warnings.jsonl restore themselves


def check_places(folder: Path) -> None:
    """Raises ValueError if something is in the place of a file that the run writes, and it cannot be written."""
    for path in (folder / name for name in WRITTEN):
        if not path.exists():
            continue
        if not path.is_file():
            found = "a directory" if path.is_dir() else "no regular file"
            raise ValueError(f"--output_dir {folder}: {path.name} is {found} there, expected a file; move it away")
        if not os.access(path, os.R_OK | os.W_OK):
            raise ValueError(
                f"--output_dir {folder}: {path.name} cannot be read and written by this user; change its permissions, "
                "or move it away"
            )


class FolderWatch:
    """Notices that the lock of --output_dir was removed during the run, with the folder or alone, and takes the folder
    again: otherwise a second run could take it.
    """

    def __init__(self, folder: Path) -> None:
        """folder: locked by this process. Without a lock in it nothing is watched."""
        self.folder = folder
        self.lock_file = identity(folder / ".lock")
        self.contents = {name: (folder / name).read_bytes() for name in RESTORED if (folder / name).is_file()}
        self.lock: IO[str] | None = None  # the one that was taken again
        self.owed: list[str] = []  # names of what has to be restored

    def renew(self) -> None:
        """Takes the folder again if that is needed. Raises TakenError if another run has taken it."""
        if self.lock_file is None:
            return
        with contextlib.suppress(OSError):  # then it is not known, and asked again after the next step
            if identity(self.folder / ".lock") != self.lock_file:
                self._take_again()
            while self.owed:
                write_whole(self.folder / self.owed[-1], self.contents[self.owed[-1]])
                self.owed.pop()

    def _take_again(self) -> None:
        try:
            self.lock = lock_dir("--output_dir", self.folder)
        except TakenError as error:
            raise TakenError(
                f"--output_dir {self.folder}: its lock was removed during the run, and another run has taken it; this "
                "run ends, start it again in another directory"
            ) from error
        except ValueError:  # not writable now; what the run writes there reports it
            return
        self.lock_file = identity(self.folder / ".lock")
        self.owed = missing = [name for name in self.contents if not (self.folder / name).exists()]
        logger.warning(
            "--output_dir %s: its lock was removed during the run, taken again%s",
            self.folder,
            f"; restored {', '.join(missing)}. Checkpoints that were removed are lost" if missing else "",
        )


def identity(path: Path) -> tuple[int, int] | None:
    """Returns what identifies the file at this path, or None if there is none. Raises OSError if that cannot
    be found out.
    """
    try:
        stat = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return stat.st_dev, stat.st_ino
