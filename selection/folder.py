"""The folder of a choice: what it was made with, its rows while it is made, and its result."""

import contextlib
import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inputs.model_files import one_line
from selection import made_with, measurements
from selection.report import format_report
from utils import finite, lock_dir, write_whole

logger = logging.getLogger("train")

RESULT, REPORT, PICTURE = "choice.json", "choice.md", "choice.svg"
NEEDED = {"layers", "request", "made_with", "ablation", "left_out"}  # what a run reads of a result
MAKE_ANOTHER = "run choose_layers.py with another --output, or move that folder away"


def read_choice(folder: Path) -> dict[str, Any] | None:
    """Returns the finished choice in a folder, None if there is none. Raises ValueError if it is damaged."""
    file = folder / RESULT
    if not file.exists():
        return None
    with one_line(f"{file}: is no choice of choose_layers.py, or damaged", "move it away, and start again"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if missing := sorted(NEEDED - content.keys()):
            raise ValueError(f"it has no {', '.join(missing)}")
        if any(not isinstance(layer, int) for layer in content["layers"]) or not isinstance(content["request"], dict):
            raise ValueError("its layers are no numbers")
        return content


def check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError if the folder holds another choice, finished or not."""
    earlier = made_with.read_settings(folder)
    if earlier is None and any((folder / name).exists() for name in (RESULT, measurements.FILE)):
        raise ValueError(f"--output {folder}: has files of a choice, but no {made_with.FILE}; {MAKE_ANOTHER}")
    if earlier is not None and (different := made_with.differences(earlier, settings)):
        raise ValueError(f"--output {folder}: the choice there is with {', '.join(different)}; {MAKE_ANOTHER}")


def set_rows_aside(folder: Path, settings: dict[str, Any]) -> None:
    """Gives the rows of a choice that was stopped another name, if they are of the same models and of other texts: then
    a new choice can be made here, and they are not lost.
    """
    earlier = made_with.read_settings(folder)
    if earlier is None or (folder / RESULT).exists() or earlier == settings:
        return
    if any(earlier.get(name) != settings[name] for name in made_with.MODELS):
        return  # which `check_folder` says
    for name in (measurements.FILE, made_with.FILE):
        if (folder / name).exists():
            free = next(n for n in itertools.count(1) if not (folder / f"{n}-{name}").exists())
            (folder / name).rename(folder / f"{free}-{name}")
            logger.warning("%s is of a stopped choice on other texts; it is now %d-%s", folder / name, free, name)


@contextlib.contextmanager
def taken(folder: Path, settings: dict[str, Any], is_of_run: bool = False) -> Iterator[None]:
    """Keeps the folder for this process. Raises ValueError if another has it, or if it holds another choice.
    is_of_run: the rows of a choice that was stopped make room.
    """
    with lock_dir("--output", folder):
        if is_of_run:
            set_rows_aside(folder, settings)
        check_folder(folder, settings)
        write_whole(folder / made_with.FILE, _as_json(settings))
        yield


def finished(folder: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the choice in a folder, of the same models and texts, if the same was asked for. One of another budget is
    made again of its rows.
    """
    choice = read_choice(folder)
    if choice is None or choice["request"] == request:
        return choice
    before = ", ".join(f"{name} {choice['request'].get(name)}" for name in request)
    logger.info("%s had been made with %s; it is made again, of the rows in %s", RESULT, before, measurements.FILE)
    return None


def write_choice(folder: Path, choice: dict[str, Any]) -> None:
    """Writes the report and the picture, then what says that the choice is finished."""
    write_whole(folder / REPORT, format_report(choice).encode())
    from selection.picture import picture  # loads matplotlib, which a run that uses a choice does not need

    write_whole(folder / PICTURE, picture(choice))
    write_whole(folder / RESULT, _as_json(finite(choice)))


def _as_json(content: Any) -> bytes:
    return json.dumps(content, indent=1).encode() + b"\n"
