"""Saves the results of an evaluation while it runs, one small file for each piece of work, in a folder beside its
output. A file is written whole or not at all; an evaluation resumed with the same settings measures what is missing.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils import lock_dir, write_whole

logger = logging.getLogger("train")

SETTINGS = "settings.json"


class PartialResults:
    """Holds results by model and piece, and saves each in `folder`; None keeps them in memory alone. A process reads
    the files that exist when it begins; it does not see what other processes save after that.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.found: dict[tuple[str, str], Any] = {}
        for file in [] if folder is None else sorted(folder.glob("*/*.json")):
            try:
                self.found[file.parent.name, file.stem] = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                logger.warning("%s is damaged (%s): its piece is measured again", file, error)

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self.found

    def put(self, model: str, piece: str, result: Any) -> None:
        """Adds and saves a result, which has to be JSON. Raises ValueError if the disk refuses."""
        self.found[model, piece] = result
        if self.folder is None:
            return
        path = self.folder / model / f"{piece}.json"
        try:
            path.parent.mkdir(exist_ok=True)
            write_whole(path, json.dumps(result).encode())
        except OSError as error:
            raise ValueError(
                f"--output: {path} cannot be written ({error.strerror}); make room, and --resume"
            ) from error


def partial_folder(output: Path) -> Path:
    """Returns the folder for the partial results of the evaluation that writes `output`."""
    return output.with_name(f"{output.name}.partial")


def is_interrupted(output: Path) -> bool:
    """Returns whether an evaluation has left partial results, or is writing them now."""
    return (partial_folder(output) / SETTINGS).is_file()


def check_partial(output: Path, settings: dict[str, Any], models: list[str], resume: bool, overwrite: bool) -> None:
    """Raises ValueError if partial results exist that this evaluation may neither resume from nor throw away."""
    folder = partial_folder(output)
    if not is_interrupted(output):
        if resume:
            logger.info("--resume: nothing was interrupted at %s; starting from the beginning", output)
        return
    if not (resume or overwrite):
        raise ValueError(
            f"--output {output}: an evaluation that was interrupted, or is still running, has its results in {folder}; "
            "resume it with --resume, or throw them away with --overwrite"
        )
    if overwrite:
        return
    before = _read_settings(folder)
    changed = [
        _change(name, before[name], value) for name, value in settings.items() if before.get(name, value) != value
    ]
    if changed:
        raise ValueError(
            f"--resume: {folder} was made with other settings: {'; '.join(changed)}. Give the same ones, or another "
            "--output, or throw it away with --overwrite"
        )
    if left_out := sorted({path.name for path in folder.iterdir() if path.is_dir()} - set(models)):
        raise ValueError(
            f"--resume: {folder} also has results of {', '.join(left_out)}, which --which does not name; name all of "
            "them, or give another --output"
        )


def _read_settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("holds no object")
    except ValueError as error:
        what = f"--resume: {folder / SETTINGS} is damaged ({error})"
        raise ValueError(f"{what}; throw the folder away with --overwrite, or give another --output") from error
    return settings


def _change(name: str, before: Any, now: Any) -> str:
    if isinstance(now, dict):  # a model: where it is, and its files
        return f"the {name} is another model, or was written anew"
    return f"{name} was {before} and is {now}"


@contextmanager
def resumable(output: Path | None, settings: dict[str, Any], resume: bool) -> Iterator[None]:
    """Prepares and locks the folder for partial results, and removes it when the block ends without an error. Raises
    ValueError if another evaluation has the lock.
    """
    if output is None:
        yield
        return
    folder = partial_folder(output)
    with lock_dir("--output", folder):
        before = _read_settings(folder) if resume and is_interrupted(output) else {}
        for entry in folder.iterdir():
            if entry.is_dir() and not before:
                shutil.rmtree(entry)
        write_whole(folder / SETTINGS, json.dumps({**before, **settings}, indent=1).encode())
        try:
            yield
        except BaseException:
            logger.warning("the results so far are in %s; resume with --resume", folder)
            raise
        shutil.rmtree(folder)
