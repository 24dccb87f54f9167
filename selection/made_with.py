"""What a choice was made with, in settings.json: a choice that is resumed or used must be of the same models, and one
that is resumed of the same texts.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from inputs.model_files import downloaded, one_line, weight_files

FILE = "settings.json"
MODELS = ("teacher_model", "student_model")


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
    file = folder / FILE
    if not file.exists():
        return None
    with one_line(f"{file}: cannot be read", "move that folder away, or give another --output"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("expected names and values")
        return content


def differences(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns words for each of the settings `now` that was another in an earlier choice."""
    found = []
    for name, value in now.items():
        before = earlier.get(name)
        if before != value:
            found.append(f"--{name} {_words(before)} (now {_words(value)})" if name != "texts" else "other texts")
    for place, name in enumerate(found):
        for model in MODELS:
            if name.startswith(f"--{model} ") and _path(earlier.get(model)) == _path(now[model]):
                found[place] = f"other files of --{model} {_path(now[model])}"
    return found


def _path(value: Any) -> Any:
    return value.get("path") if isinstance(value, dict) else value


def _words(value: Any) -> str:
    return str(_path(value))
