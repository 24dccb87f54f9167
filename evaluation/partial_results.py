"""Saves the results of an evaluation while it runs, one small file for each piece of work, in a folder beside its
output. A file is written whole or not at all; an evaluation resumed with the same settings measures what is missing.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from evaluation.report import output_files
from utils import lock_dir, write_whole

logger = logging.getLogger("train")

SETTINGS = "settings.json"
LONGEST_NAME = 150  # characters of a file's name, without its ending


class PartialResults:
    """Holds results by model and piece, and saves each in `folder`; None keeps them in memory alone. A process reads
    the files that exist when it begins; it does not see what other processes save after that.

    settings: the content of SETTINGS, which is written again if somebody removes the folder meanwhile.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any] | None = None) -> None:
        self.folder, self.settings = folder, settings
        self.found: dict[tuple[str, str], Any] = {}
        for file in [] if folder is None else sorted(folder.glob("*/*.json")):
            try:
                piece, result = _read_piece(file)
                self.found[file.parent.name, piece] = result
            except (OSError, ValueError, RecursionError) as error:
                logger.warning("%s is damaged (%s): its piece is measured again", file, error)

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self.found

    def put(self, model: str, piece: str, result: Any) -> None:
        """Adds and saves a result, which has to be JSON. Raises ValueError if the disk refuses."""
        self.found[model, piece] = result
        if self.folder is None:
            return
        try:
            if self.settings is not None and not (self.folder / SETTINGS).is_file():
                self._write_again(self.folder, self.settings)
            self._write(self.folder, model, piece)
        except OSError as error:
            path = self.folder / model / file_name(piece)
            raise ValueError(
                f"--output: {path} cannot be written ({error.strerror}); make room, and --resume"
            ) from error

    def _write_again(self, folder: Path, settings: dict[str, Any]) -> None:
        logger.warning("%s was removed: it is made again, with the results so far", folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / SETTINGS, _as_json(settings))
        for key in self.found:
            self._write(folder, *key)

    def _write(self, folder: Path, model: str, piece: str) -> None:
        path, text = folder / model / file_name(piece), json.dumps(self.found[model, piece])
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps({"piece": piece, "sha256": _sha256(text), "result": text}).encode())


def _read_piece(file: Path) -> tuple[str, Any]:
    """Returns a piece's name and result. Raises ValueError unless the file is as `PartialResults` wrote it."""
    match json.loads(file.read_bytes()):
        case {"piece": str(piece), "sha256": str(digest), "result": str(text)} if digest == _sha256(text):
            return piece, json.loads(text)
    raise ValueError("it is of another version, or was changed")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def file_name(piece: str) -> str:
    """Returns the name of a piece's file. A piece has the name of a subject or a task, which comes from outside: any
    text, also with a slash or longer than the name of a file.
    """
    quoted = quote(piece, safe=" ", errors="surrogatepass")
    return f"{quoted if len(quoted) <= LONGEST_NAME else f'{quoted[:LONGEST_NAME]}-{_sha256(quoted)[:16]}'}.json"


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
        raise ValueError(_left_by_another(output))
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


def _left_by_another(output: Path) -> str:
    return (
        f"--output {output}: an evaluation that was interrupted, or is still running, has its results in "
        f"{partial_folder(output)}; resume it with --resume, or throw them away with --overwrite"
    )


def _as_json(settings: dict[str, Any]) -> bytes:
    return json.dumps(settings, indent=1).encode()


def _read_settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / SETTINGS).read_bytes())
        if not isinstance(settings, dict):
            raise ValueError("holds no object")
    except (OSError, ValueError, RecursionError) as error:
        what = f"--resume: {folder / SETTINGS} is damaged ({error})"
        raise ValueError(f"{what}; throw the folder away with --overwrite, or give another --output") from error
    return settings


def _change(name: str, before: Any, now: Any) -> str:
    if isinstance(now, dict):  # a model: where it is, and its files
        return f"the {name} is another model, or was written anew"
    return f"{name} was {before} and is {now}"


@contextmanager
def resumable(output: Path | None, settings: dict[str, Any], resume: bool, overwrite: bool) -> Iterator[None]:
    """Prepares and locks the folder for partial results, and removes it when the block ends without an error. Raises
    ValueError if another evaluation has the lock, or has finished since the options were checked.
    """
    if output is None:
        yield
        return
    folder = partial_folder(output)
    with lock_dir("--output", folder) as lock:
        before = _prepare(output, folder, lock, resume, overwrite)
        try:
            write_whole(folder / SETTINGS, _as_json({**before, **settings}))
        except OSError as error:
            raise ValueError(f"--output {output}: {folder} cannot be written ({error.strerror}); make room") from error
        try:
            yield
        except BaseException:
            logger.warning("the results so far are in %s; resume with --resume", folder)
            raise
        _remove(folder)


def _prepare(output: Path, folder: Path, lock: IO[str], resume: bool, overwrite: bool) -> dict[str, Any]:
    """Returns the settings to resume with; without any, the folder is empty afterwards."""
    try:
        is_there = os.fstat(lock.fileno()).st_ino == (folder / ".lock").stat().st_ino
    except FileNotFoundError:
        is_there = False
    if not is_there:  # another evaluation has just ended, and has removed the folder with the lock that we waited for
        raise ValueError(f"--output {output}: another evaluation has just ended there; look at it, then start again")
    if resume and is_interrupted(output):
        return _read_settings(folder)
    if is_interrupted(output) and not overwrite:
        raise ValueError(_left_by_another(output))
    if not overwrite and (taken := [path for path in output_files(output) if path.exists()]):
        _remove(folder)
        raise ValueError(f"--output {output}: {taken[0]} exists already; give another name, or --overwrite")
    (folder / SETTINGS).unlink(missing_ok=True)  # first: what is left of the rest belongs to nothing then
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
    return {}


def _remove(folder: Path) -> None:
    """Removes a folder that nobody needs. Its settings go first: without them a rest is no interrupted evaluation."""
    (folder / SETTINGS).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
