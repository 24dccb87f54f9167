"""Changes files of models: values of a JSON file, a weight, a command in a pickle, a copy in the cache of the hub."""

import json
import os
import shutil

from safetensors.torch import load_file, save_file


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


def change_weight(folder, name, change):
    """Replaces a weight in a folder's model.safetensors by `change(weight)`."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights[name] = change(weights[name])
    save_file(weights, file, metadata={"format": "pt"})


def cache_of_the_hub(folder, name, model):
    """Puts a copy of the model's directory where the hub's cache `folder` has the repository `name`."""
    repository = folder / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    return shutil.copytree(model, repository / "snapshots" / "abc")
