"""What the folder is that `--resume` names or that a run left: a checkpoint, a link to one, a copy of one, or none.
The messages advise only what is there.
"""

from pathlib import Path

from checkpointing.files import STATE_FILE, SUMS_FILE, find_checkpoints, quick_check, read_state, step_of
from checkpointing.housekeeping import LINK

FRESH = "; to take only its weights, start anew with --student_model {0} and another --output_dir"


def followed(path: Path) -> Path:
    """Returns the checkpoint that a path leads to. `latest` is a link; where it is a folder, because the run's folder
    was copied by what follows links, this is the checkpoint beside it that it is a copy of, or else the copy itself.
    """
    path = path.resolve()
    if path.name != LINK or not (path / SUMS_FILE).is_file():
        return path
    sums = (path / SUMS_FILE).read_bytes()
    beside = (found for found in find_checkpoints(path.parent) if (found / SUMS_FILE).is_file())
    same = (found for found in beside if (found / SUMS_FILE).read_bytes() == sums and quick_check(found) is None)
    return next(same, path)


def lone_copy(output_dir: Path, found: list[Path]) -> str | None:
    """Returns what is wrong where `latest` is a folder that holds a newer checkpoint than those found, or None: a run
    that resumes from the newest must not pass it over.
    """
    latest = output_dir / LINK
    if latest.is_symlink() or not (latest / STATE_FILE).is_file():
        return None
    try:
        micro_step = read_state(latest).get("micro_step")
    except (OSError, ValueError):
        return None
    if not isinstance(micro_step, int) or any(step_of(checkpoint) >= micro_step for checkpoint in found):
        return None
    return (
        f"{latest} is no link but a checkpoint of micro step {micro_step}, newer than all others in {output_dir}; "
        f"rename it to checkpoint-{micro_step} to resume from it, or move it away"
    )


def what_is_there(path: Path) -> str:
    """Returns what a path is that is no checkpoint, and what could be given instead."""
    if not path.exists():
        return f"{path} does not exist" + _instead(path.parent)
    if not path.is_dir():
        return f"{path} is a file, expected the folder of a checkpoint"
    if find_checkpoints(path):
        return f"{path} is no checkpoint" + _instead(path)
    if (path / "config.json").is_file():
        return f"{path} has no {STATE_FILE}" + FRESH.format(path)
    return f"{path} has no {STATE_FILE}, expected a whole checkpoint-<micro step> of a run" + _instead(path.parent)


def _instead(folder: Path) -> str:
    """Returns which checkpoints a folder has, as the end of a message; empty where there is none."""
    whole = [checkpoint for checkpoint in find_checkpoints(folder) if (checkpoint / STATE_FILE).is_file()]
    return f"; {folder} has {', '.join(checkpoint.name for checkpoint in whole[:3])}" if whole else ""
