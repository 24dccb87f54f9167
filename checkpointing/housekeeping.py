"""Keeps --output_dir in order: the link `latest`, old checkpoints deleted, bad ones moved aside, and what unfinished
saves have left removed. What a link points to is never deleted, nor what somebody else put in a place that is needed.
"""

import logging
import shutil
from pathlib import Path

from checkpointing.files import find_checkpoints
from checkpointing.write_errors import only_logged

logger = logging.getLogger("train")

LINK = "latest"  # to the newest checkpoint


def point_latest_to(checkpoint: Path) -> None:
    """Points the link `latest` beside it to the checkpoint, atomically. A file or folder of that name is moved aside:
    where an output directory is copied by what follows links, `latest` becomes a folder.
    """
    pointer, link = checkpoint.with_name(f".{LINK}"), checkpoint.with_name(LINK)
    for path in (pointer, link):
        if path.exists() and not path.is_symlink():
            aside = _move_aside(path, f"{LINK}-copy")
            logger.warning("%s was no link: moved to %s, which nothing reads; delete it, or keep it", path, aside.name)
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(checkpoint.name)
    pointer.replace(link)


def keep_newest(output_dir: Path, limit: int) -> None:
    """Deletes all but the newest `limit` checkpoints, each whatever becomes of the others, and what earlier calls could
    not delete.
    """
    reason = f"--save_total_limit {limit}"
    for path in find_checkpoints(output_dir)[limit:]:
        with only_logged(f"{path} cannot be deleted, {reason}"):
            path.rename(path.with_name(f".deleted-{path.name}"))  # first: half of a checkpoint must not look like one
    for deleted in output_dir.glob(".deleted-checkpoint-*"):
        with only_logged(f"{deleted} cannot be deleted, {reason}"):
            _remove(deleted)
            logger.info("deleted %s: %s", output_dir / deleted.name.removeprefix(".deleted-"), reason)


def remove_partial(output_dir: Path) -> None:
    """Removes what unfinished saves have left, and checkpoints whose deletion was interrupted."""
    for path in (*output_dir.glob(".partial-checkpoint-*"), *output_dir.glob(".deleted-checkpoint-*")):
        _remove(path)


def set_bad_aside(checkpoint: Path, problem: str) -> None:
    """Renames a bad checkpoint to `bad-...`, out of the way of the one that will take its place."""
    aside = _move_aside(checkpoint, f"bad-{checkpoint.name}")
    logger.warning("%s is bad (%s): moved to %s", checkpoint, problem, aside.name)


def _move_aside(path: Path, name: str) -> Path:
    """Renames to this name, or to the first of name-2, name-3, ... that is free, and returns it."""
    aside, n = path.with_name(name), 1
    while aside.exists() or aside.is_symlink():
        n += 1
        aside = path.with_name(f"{name}-{n}")
    return path.rename(aside)


def _remove(path: Path) -> None:
    """Deletes a folder with all that is in it; a file or a link only as such."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
