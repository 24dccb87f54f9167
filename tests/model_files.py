"""Damages files of models: changes values of a JSON file, and runs a command from a pickle."""

import json
import os


def change_json(file, **changes):
    """Changes values of a JSON file; "outer.inner" goes one level down."""
    content = json.loads(file.read_text())
    for name, value in changes.items():
        *outer, last = name.split(".")
        target = content[outer[0]] if outer else content
        target[last] = value
    file.write_text(json.dumps(content))


class Command:
    """Creates the file `marker` by a shell command when a loader unpickles it."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)
