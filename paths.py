"""Paths as a user writes them: `~` is the home directory, `$NAME` and `${NAME}` are environment variables, and `$$` is
a dollar sign. Every option that takes a path, and every argument of the other commands, goes through `expanded`. What
cannot be read at a path is one line: `readable`.
"""

from __future__ import annotations  # doctor.py reports a Python that is too old

import argparse
import contextlib
import os
import re
from collections.abc import Iterator
from errno import ELOOP
from pathlib import Path

SHOWN = 200  # characters of a wrong path that an error repeats
MOST_BYTES = 255  # of a name in a path, on Linux
MOST_BYTES_OF_ALL = 4095  # of a path
DOLLAR = re.compile(r"\$(?:(\$)|([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})?", re.ASCII)  # matches every $


def expanded(text: str) -> str:
    """Returns a path, or a name that may be one, with the home directory and variables in place. A name of the Hugging
    Face hub and a URL stay as they are. It is an argparse type: raises ArgumentTypeError with the text and a remedy.
    """
    shown = f"{text!r:.{SHOWN}}"
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{shown}: expected a name or a path; give one, or leave the option out")
    if "://" in text:
        return text
    path = DOLLAR.sub(lambda match: _value_of(match, shown), text)
    if problem := _unusable(path):
        raise argparse.ArgumentTypeError(f"{shown}: {problem}; correct it")
    if not text.startswith("~"):
        return path
    home = os.path.expanduser(path)
    if home == path or os.environ.get("HOME") == "":
        raise argparse.ArgumentTypeError(f"{shown}: this home directory is not known; write ./~ for a file named so")
    return home


def expanded_path(text: str) -> Path:
    """Returns what `expanded` does, as a Path."""
    return Path(expanded(text))


def literal(path: str) -> str:
    """Returns the text that `expanded` makes this very path of, whatever the environment is then."""
    if "://" in path:
        return path
    return ("./" if path.startswith("~") else "") + path.replace("$", "$$")


@contextlib.contextmanager
def readable(
    what: str, path: str | Path, remedy: str = "let this user read it and the folders above it, or name another"
) -> Iterator[None]:
    """Turns an OSError within the block, such as that of a folder which this user may not enter, into a ValueError of
    one line. `path` is looked at first, because newer Pythons take for missing what they cannot look at; it may be
    missing. what: begins the line, as `flag value`.
    """
    try:
        _look_into(path)
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if isinstance(error.filename, str | os.PathLike) and Path(error.filename) != Path(path):
            reason += f": {error.filename}"
        raise ValueError(f"{what}: cannot be read ({reason:.{SHOWN}}); {remedy}") from error


def _look_into(path: str | Path) -> None:
    """Raises OSError if it cannot be known whether anything is at a path, or what is in a folder there."""
    try:
        os.stat(os.path.join(path, "."))
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        if error.errno != ELOOP:  # links that lead nowhere
            raise


def _unusable(path: str) -> str | None:
    """Returns why no file can have this path, where the system would only say so when it looks for one."""
    try:
        names = os.fsencode(path).split(b"/")
    except UnicodeEncodeError:
        return "a path holds bytes, and a character of it stands for none"
    if "\0" in path:
        return "no path holds a zero byte"
    longest = max(map(len, names))
    if longest > MOST_BYTES:
        return f"a name in it has {longest} bytes, expected {MOST_BYTES} at most"
    if (size := len(os.fsencode(path))) > MOST_BYTES_OF_ALL:
        return f"it has {size} bytes, expected {MOST_BYTES_OF_ALL} at most"
    return None


def _value_of(match: re.Match[str], shown: str) -> str:
    """Returns what stands in a path for a `$` and what follows it. shown: the path, as an error has it."""
    dollar, plain, braced = match.groups()
    if dollar:
        return dollar
    name = plain or braced
    if name is None:
        raise argparse.ArgumentTypeError(f"{shown}: expected $NAME or ${{NAME}}; write $$ for a dollar sign")
    if not (value := os.environ.get(name)):
        what = f"{shown}: the environment variable {name:.{SHOWN}} is not set, or is empty"
        raise argparse.ArgumentTypeError(f"{what}; set it, or write $$ for a dollar sign")
    return value
