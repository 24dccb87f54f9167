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
from typing import Any
from urllib.parse import quote

from evaluation.report import output_files
from utils import TakenError, lock_dir, write_whole

logger = logging.getLogger("train")

SETTINGS = "settings.json"
REQUIRED = ("--dtype", "--max_length", "teacher")  # in SETTINGS, whatever is measured
LONGEST_NAME = 150  # characters of a file's name, without its ending


class Claim:
    """Holds the lock of the folder for an evaluation's partial results; the main rank alone has one. Raises ValueError
    if the folder cannot be written, TakenError if another evaluation has it.
    """

    def __init__(self, output: Path) -> None:
        self.output, self.folder = output, partial_folder(output)
        self.lock = lock_dir("--output", self.folder)
        self.reports = _stamps(output)  # as they were when it began

    def is_held(self) -> bool:
        """Returns whether the lock is still that of the folder: it is lost if somebody removes the folder."""
        try:
            mine, there = os.fstat(self.lock.fileno()), (self.folder / ".lock").stat()
        except FileNotFoundError:
            return False
        return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)

    def renew(self) -> None:
        """Makes and locks the folder again if it was removed. Raises TakenError if another evaluation has it by now."""
        if not self.is_held():
            lock = lock_dir("--output", self.folder)
            self.lock.close()
            self.lock = lock

    def check_reports(self) -> None:
        """Raises TakenError if another evaluation has written its report since this one began."""
        if _stamps(self.output) != self.reports:
            raise TakenError(
                f"--output {self.output}: another evaluation has written it meanwhile; move it away, and --resume"
            )


def _stamps(output: Path) -> list[tuple[int, int] | None]:
    stats = [path.stat() if path.exists() else None for path in output_files(output)]
    return [None if stat is None else (stat.st_ino, stat.st_mtime_ns) for stat in stats]


class PartialResults:
    """Holds results by model and piece, and saves each in `folder`; None keeps them in memory alone. A process reads
    the files that exist when it begins; it does not see what other processes save after that.

    claim: the main rank's. If somebody removes the folder meanwhile, each rank makes it again, with what it has.
    """

    def __init__(self, folder: Path | None, claim: Claim | None = None) -> None:
        self.folder, self.claim = folder, claim
        self.settings = None if folder is None else _content(folder / SETTINGS)  # None: nobody looks at them
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
        """Adds and saves a result, which has to be JSON. Raises ValueError if the disk refuses, TakenError if another
        evaluation has taken the folder.
        """
        if self.folder is not None:
            with _explaining(self.folder / model / file_name(piece)):
                self._restore(self.folder)
                self._write(self.folder, model, piece, result)
        self.found[model, piece] = result

    def check_own(self) -> None:
        """Raises TakenError if another evaluation has taken the folder, or has written its report, since this one
        began: then this one must not write its own. The main rank calls it before it does.
        """
        if self.folder is not None and self.claim is not None:
            with _explaining(self.folder):
                self._restore(self.folder)
            self.claim.check_reports()

    def _restore(self, folder: Path) -> None:
        """Writes again what was removed with the folder. Another rank may have made the folder again already."""
        if self.claim is not None:
            self.claim.renew()
        settings = _content(folder / SETTINGS)
        if settings is not None and settings != self.settings:
            raise TakenError(
                f"--output: {folder} is now of another evaluation; start this one again, with another name"
            )
        if self.settings is not None and settings is None:
            logger.warning("%s was removed: it is made again, with the results so far", folder)
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / SETTINGS, self.settings)
        if any(not (folder / model / file_name(piece)).is_file() for model, piece in list(self.found)[:1]):
            for (model, piece), result in self.found.items():
                self._write(folder, model, piece, result)

    def _write(self, folder: Path, model: str, piece: str, result: Any) -> None:
        path, text = folder / model / file_name(piece), json.dumps(result)
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps({"piece": piece, "sha256": _sha256(text), "result": text}).encode())


@contextmanager
def _explaining(path: Path) -> Iterator[None]:
    """Turns an OSError of writing into a ValueError of one line."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"--output: {path} cannot be written ({error.strerror}); make room, and --resume") from error


def _content(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None


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
        measured = [path.name for path in folder.iterdir() if path.is_dir()]
        if missing := [name for name in (*REQUIRED, *measured) if name not in settings]:
            raise ValueError(f"does not say {', '.join(missing)}")
    except (OSError, ValueError, RecursionError) as error:
        what = f"--resume: {folder / SETTINGS} is damaged ({error})"
        raise ValueError(f"{what}; throw the folder away with --overwrite, or give another --output") from error
    return settings


def _change(name: str, before: Any, now: Any) -> str:
    if isinstance(now, dict):  # a model: where it is, and its files
        return f"the {name} is another model, or was written anew"
    return f"{name} was {before} and is {now}"


@contextmanager
def resumable(
    output: Path | None, settings: dict[str, Any], *, resume: bool, overwrite: bool
) -> Iterator[Claim | None]:
    """Prepares and locks the folder for partial results, and removes it when the block ends without an error. Raises
    ValueError if another evaluation has the lock, or has finished since the options were checked.
    """
    if output is None:
        yield None
        return
    claim = Claim(output)
    try:
        before = _prepare(claim, resume, overwrite)
        try:
            write_whole(claim.folder / SETTINGS, _as_json({**before, **settings}))
        except OSError as error:
            what = f"--output {output}: {claim.folder} cannot be written"
            raise ValueError(f"{what} ({error.strerror}); make room") from error
        try:
            yield claim
        except TakenError:
            raise
        except BaseException:
            logger.warning("the results so far are in %s; resume with --resume", claim.folder)
            raise
        if claim.is_held():  # else it is gone, or another evaluation's
            _remove(claim.folder)
    finally:
        claim.lock.close()


def _prepare(claim: Claim, resume: bool, overwrite: bool) -> dict[str, Any]:
    """Returns the settings to resume with; without any, the folder is empty afterwards."""
    output, folder = claim.output, claim.folder
    if not claim.is_held():  # another evaluation has just ended, and has removed the folder with the lock
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
