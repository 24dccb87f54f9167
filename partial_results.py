"""What an evaluation has found so far, one small file for each piece of work, in a folder beside its output. A piece is
whole or not there; an evaluation that is started again with the same settings does the rest.
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
    """folder: None keeps the results in memory alone. Each process writes its own pieces, and sees those that were
    there when it began.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.found: dict[tuple[str, str], Any] = {}  # by model and piece
        for file in [] if folder is None else folder.glob("*/*.json"):
            self.found[file.parent.name, file.stem] = json.loads(file.read_text(encoding="utf-8"))

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self.found

    def put(self, model: str, piece: str, result: Any) -> None:
        self.found[model, piece] = result
        if self.folder is not None:
            path = self.folder / model / f"{piece}.json"
            path.parent.mkdir(exist_ok=True)
            write_whole(path, json.dumps(result))


def partial_folder(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


def check_partial(output: Path, settings: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Whether what an interrupted evaluation left may be gone on with, or be thrown away. Raises ValueError."""
    folder = partial_folder(output)
    if not (folder / SETTINGS).is_file():
        if resume:
            logger.info("--resume: nothing was interrupted at %s; starting from the beginning", output)
        return
    if not (resume or overwrite):
        raise ValueError(
            f"--output {output}: an interrupted evaluation left its results in {folder}; go on with --resume, "
            "or throw them away with --overwrite"
        )
    if overwrite:
        return
    before = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    changed = [
        f"{name} was {before[name]} and is {value}"
        for name, value in settings.items()
        if before.get(name, value) != value
    ]
    if changed:
        raise ValueError(
            f"--resume: {folder} was made with other settings: {'; '.join(changed)}. Give the same ones, or another "
            "--output, or throw it away with --overwrite"
        )


@contextmanager
def kept_in(output: Path | None, settings: dict[str, Any], resume: bool) -> Iterator[Path | None]:
    """The folder for `output`'s partial results, for one process at a time; gone when the block has ended well."""
    if output is None:
        yield None
        return
    folder = partial_folder(output)
    with lock_dir("--output", folder):
        if not resume:
            for entry in folder.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
        known = folder / SETTINGS
        before = json.loads(known.read_text(encoding="utf-8")) if resume and known.is_file() else {}
        write_whole(known, json.dumps({**before, **settings}, indent=1))
        try:
            yield folder
        except BaseException:
            logger.warning("what has been found so far is in %s; go on with --resume", folder)
            raise
        shutil.rmtree(folder)
