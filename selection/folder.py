"""The folder of a choice: its rows while it is made, its result, and in settings.json what it was made with. A choice
that is resumed or used must be of the same models, and one that is resumed of the same texts.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from inputs.model_files import downloaded, one_line, weight_files
from selection import measurements
from selection.report import format_report
from utils import TakenError, finite, lock_dir, write_whole

logger = logging.getLogger("train")

SETTINGS, MODELS = "settings.json", ("teacher_model", "student_model")
RESULT, REPORT, PICTURE = "choice.json", "choice.md", "choice.svg"
NEEDED = {"layers", "request", "made_with", "ablation", "left_out"}  # what a run reads of a result
WAIT_S = 10.0  # before another look at a folder that another run has
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
    earlier = read_settings(folder)
    if earlier is None and any((folder / name).exists() for name in (RESULT, measurements.FILE)):
        raise ValueError(f"--output {folder}: has files of a choice, but no {SETTINGS}; {MAKE_ANOTHER}")
    if earlier is not None and (different := differences(earlier, settings)):
        raise ValueError(f"--output {folder}: the choice there is with {', '.join(different)}; {MAKE_ANOTHER}")


def set_rows_aside(folder: Path, settings: dict[str, Any]) -> None:
    """Gives the rows of a choice that was stopped another name, if they are of the same models and of other texts: then
    a new choice can be made here, and they are not lost.
    """
    earlier = read_settings(folder)
    if earlier is None or (folder / RESULT).exists() or not differences(earlier, settings):
        return
    if differences(earlier, {name: settings[name] for name in MODELS}):
        return  # which `check_folder` says
    for name in (measurements.FILE, SETTINGS):
        if (folder / name).exists():
            free = next(n for n in itertools.count(1) if not (folder / f"{n}-{name}").exists())
            (folder / name).rename(folder / f"{free}-{name}")
            logger.warning("%s is of a stopped choice on other texts; it is now %d-%s", folder / name, free, name)


@contextlib.contextmanager
def taken(folder: Path, waits: bool = False) -> Iterator[None]:
    """Keeps the folder for this process. waits: until another process that has it gives it back. Raises ValueError if
    it cannot be written, TakenError if another has it.
    """
    while True:
        try:
            lock = lock_dir("--output", folder)
            break
        except TakenError:
            if not waits:
                raise
        logger.info("another run is making a choice in %s; this one waits for it", folder)
        time.sleep(WAIT_S)
    with lock:
        yield


def prepare(folder: Path, settings: dict[str, Any], is_of_run: bool) -> None:
    """Makes the folder, which this process has taken, that of a choice. is_of_run: the rows of a choice that was
    stopped make room. Raises ValueError if it holds another choice, or cannot be written.
    """
    if is_of_run:
        set_rows_aside(folder, settings)
    check_folder(folder, settings)
    with _writing(folder):
        write_whole(folder / SETTINGS, _as_json(settings))


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
    """Writes the report and the picture, then what says that the choice is finished. Raises ValueError if it cannot."""
    from selection.picture import picture  # loads matplotlib, which a run that uses a choice does not need

    report, drawn = format_report(choice).encode(), picture(choice)
    with _writing(folder):
        write_whole(folder / REPORT, report)
        write_whole(folder / PICTURE, drawn)
        write_whole(folder / RESULT, _as_json(finite(choice)))


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"--output {folder}: cannot be written ({error}); correct that, and start again: what was measured is kept"
        ) from error


def _as_json(content: Any) -> bytes:
    return json.dumps(content, indent=1).encode() + b"\n"


def identity(flag: str, name: str) -> dict[str, Any]:
    """Returns what tells a model from another: where it is, by its real path, and name, size and time of its files."""
    folder = Path(name) if os.path.isdir(name) else downloaded(flag, name)
    files = [folder / "config.json", *sorted(set(weight_files(flag, name, folder)))]
    stats = [(file.name, file.stat()) for file in files]
    return {
        "path": os.path.realpath(folder),
        "files": [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats],
    }


def digest(*tensors: Tensor) -> str:
    """Returns a short name of token ids."""
    parts = [str(tuple(ids.shape)).encode() + ids.numpy().tobytes() for ids in tensors]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Returns the settings of the choice in a folder, None if it has none. Raises ValueError."""
    file = folder / SETTINGS
    if not file.exists():
        return None
    with one_line(f"{file}: cannot be read", "move that folder away, or give another --output"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("expected names and values")
        return content


def differences(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns words for each of the settings `now` that was another in an earlier choice. A model whose folder was
    moved, with the same files, is the same.
    """
    found = []
    for name, value in now.items():
        before = earlier.get(name)
        if name == "texts" and before != value:
            found.append("other texts")
        elif name in MODELS and _part(before, "files") != value["files"]:
            was, place = _part(before, "path"), value["path"]
            found.append(f"--{name} {was} (now {place})" if was != place else f"other files of --{name} {place}")
        elif name not in ("texts", *MODELS) and before != value:
            found.append(f"--{name} {before} (now {value})")
    return found


def _part(model: Any, name: str) -> Any:
    return model.get(name) if isinstance(model, dict) else None
