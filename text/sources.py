"""Where text comes from, and which flags named it: one `TextSource` for training, one for evaluation during training,
and one for `--held_out` of eval_mmlu_hybrid.py. `opening.py` opens it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import datasets

from arguments import EvalArguments, TrainArguments


@dataclass(frozen=True)
class SourceFlags:
    """Holds the flags that a source was given with: errors name what the user wrote."""

    name: str = "--dataset_name"
    subset: str = "--dataset_subset"
    split: str = "--dataset_split"
    revision: str = "--dataset_revision"
    text_field: str = "--dataset_text_field"
    skip_bad_rows: str | None = "--skip_bad_rows"  # None: this program has no such option


@dataclass(frozen=True)
class TextSource:
    """Names a dataset of the hub, a directory, a file or a `save_to_disk` folder, and how it is read."""

    name: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    text_field: str = "text"
    streaming: bool = True  # else all of it becomes a table first, in the cache of `datasets`
    cache_dir: str | None = None
    local_files_only: bool = False
    skip_bad_rows: bool = False
    flags: SourceFlags = SourceFlags()

    @classmethod
    def for_training(cls, args: TrainArguments) -> "TextSource":
        """Returns the text of `--dataset_name`."""
        return cls(
            args.dataset_name,
            args.dataset_subset,
            args.dataset_split,
            args.dataset_revision,
            args.dataset_text_field,
            streaming=args.dataset_streaming,
            cache_dir=args.dataset_cache_dir,
            local_files_only=args.local_files_only,
            skip_bad_rows=args.skip_bad_rows,
        )

    @classmethod
    def for_evaluation_in_training(cls, args: TrainArguments) -> "TextSource":
        """Returns the text that training is evaluated on every `--eval_interval` steps. Options that are not given for
        it are those of training's dataset, and so are their flags.
        """
        name, subset, split = args.held_out_text()
        is_other = name != args.dataset_name
        keys = [
            key for key in ("name", "subset", "split") if is_other or getattr(args, f"eval_dataset_{key}") is not None
        ]
        return cls(
            name,
            subset,
            split,
            None if is_other else args.dataset_revision,
            args.dataset_text_field,
            streaming=not is_part(split),
            cache_dir=args.dataset_cache_dir,
            local_files_only=args.local_files_only,
            skip_bad_rows=args.skip_bad_rows,
            flags=SourceFlags(**{key: f"--eval_dataset_{key}" for key in keys}),
        )

    @classmethod
    def for_eval_script(cls, args: EvalArguments) -> "TextSource":
        """Returns the text of eval_mmlu_hybrid.py's `--held_out`."""
        assert args.held_out is not None
        return cls(
            args.held_out,
            args.held_out_subset,
            args.held_out_split,
            text_field=args.held_out_text_field,
            streaming=not is_part(args.held_out_split),
            local_files_only=args.local_files_only,
            flags=SourceFlags(
                name="--held_out",
                subset="--held_out_subset",
                split="--held_out_split",
                text_field="--held_out_text_field",
                skip_bad_rows=None,
            ),
        )

    @property
    def cache_root(self) -> Path:
        """Returns the folder that all of the text is cached in (cache.py)."""
        return Path(self.cache_dir or datasets.config.HF_DATASETS_CACHE)


def is_part(split: str) -> bool:
    """Returns whether `split` is only a part of one, such as "train[99%:]": that needs a table of all its rows."""
    return "[" in split


Opened: TypeAlias = datasets.Dataset | datasets.DatasetBuilder  # what opening.py makes of a source


@contextmanager
def network_forbidden(forbidden: bool) -> Iterator[None]:
    """Keeps `datasets` from the network: it reads HF_HUB_OFFLINE when it is imported; this works afterwards."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or forbidden
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
