"""What is wrong with text that is being read: which row of which file cannot be read, and which file has changed since
reading began.
"""

import logging
import time

import datasets

from text.cache import full_cache
from text.files import Stamp
from text.sources import Opened, TextSource
from text.splits import split_names
from text.tolerant_reader import CHANGED, first_bad_row, is_readable_here

logger = logging.getLogger("train")

LOOK_EVERY_S = 60.0  # at the files of a stream, of which there may be thousands


class Faults:
    """Explains errors of reading some data, and notices local files that have changed since it was made. Called with an
    error, it returns the one to raise.
    """

    def __init__(self, opened: Opened, source: TextSource):
        self.opened, self.source = opened, source
        self.before = {file: stamp for file in _all_files(opened) if (stamp := Stamp.of(file))}
        self.looked, self.is_logged = time.monotonic(), False

    def __call__(self, error: Exception) -> ValueError:
        return ValueError(self.changed()) if self.changed() else explain_fault(error, self.opened, self.source)

    def changed(self) -> str:
        """Returns which file has changed, or ""."""
        for file, before in self.before.items():
            if (now := Stamp.of(file)) != before:
                how = "is gone" if now is None else f"has {now.size:,} bytes and had {before.size:,}"
                if now is not None and now.size == before.size:
                    how = "has as many bytes and was written again"
                what = f"{self.source.flags.name} {self.source.name!r}: {file} {CHANGED}"
                return f"{what} (it {how}); start again when nothing writes to it"
        return ""

    def look(self, is_end: bool = False) -> None:
        """Warns, once, if a file has changed: what a stream has read of it is trained on already."""
        now = time.monotonic()
        if not self.is_logged and (is_end or now - self.looked > LOOK_EVERY_S):
            self.looked = now
            if changed := self.changed():
                self.is_logged = True
                logger.warning("%s", changed)


def _all_files(opened: Opened) -> list[str]:
    if isinstance(opened, datasets.Dataset):
        return [file["filename"] for file in opened.cache_files]
    return [str(file) for files in (opened.config.data_files or {}).values() for file in files]


def local_files(opened: Opened, source: TextSource) -> list[str]:
    """Returns the files of the source's splits if our own reader can read all of them, else none."""
    if isinstance(opened, datasets.Dataset):
        return []
    by_split = {str(name): files for name, files in (opened.config.data_files or {}).items()}
    files = [str(file) for name in split_names(source, by_split) for file in by_split.get(name, ())]
    return files if all(is_readable_here(file) for file in files) else []


def explain_fault(error: Exception, opened: Opened, source: TextSource) -> ValueError:
    """Returns what to raise for an error of reading: it names the file and the row where they can be found."""
    if (full := full_cache(error, source)) is not None:
        return full
    what, skip = f"{source.flags.name} {source.name!r} cannot be read", source.flags.skip_bad_rows
    reason = f"{error.__cause__ or error}"
    # A table is made of all splits at once, so the fault may lie in another split than the one asked for.
    files = local_files(opened, source) + [file for file in _all_files(opened) if is_readable_here(file)]
    if not files:
        return ValueError(f"{what}: {reason}")
    logger.info("looking for the row that cannot be read in %d files", len(set(files)))
    try:
        bad = first_bad_row(list(dict.fromkeys(files)))
    except OSError as unreadable:  # the disk, not what is on it
        return ValueError(f"{what}: {unreadable}")
    if bad is not None:
        remedy = f", or leave such rows out with {skip}" if skip else ""
        return ValueError(f"{what}: {bad}; correct it{remedy} ({reason})")
    return ValueError(f"{what}: {reason}" + (f"; {skip} reads the rows that can be read" if skip else ""))
