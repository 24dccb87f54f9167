"""text/sources.py: each program's options make a source that knows its own flags."""

import dataclasses

import pytest

from arguments import parse_eval_args, parse_train_args
from text.sources import SourceFlags, TextSource

TRAIN = ["--preset", "tiny", "--dataset_name", "a", "--dataset_subset", "b", "--dataset_split", "c"]
TRAIN += ["--dataset_revision", "d", "--dataset_text_field", "e", "--local_files_only", "--skip_bad_rows"]


def test_the_source_of_training():
    args = parse_train_args([*TRAIN, "--dataset_cache_dir", "f", "--no_dataset_streaming"])
    expected = TextSource("a", "b", "c", "d", "e", streaming=False, cache_dir="f")
    assert TextSource.for_training(args) == dataclasses.replace(expected, local_files_only=True, skip_bad_rows=True)
    assert TextSource.for_training(parse_train_args([*TRAIN, "--dataset_streaming"])).streaming


@pytest.mark.parametrize(
    "options,expected,flags",
    [
        (["name", "x"], TextSource("x", None, "train"), ["name", "subset", "split"]),
        (["name", "x", "subset", "y", "split", "z[:9]"], TextSource("x", "y", "z[:9]", streaming=False), None),
        (["split", "z"], TextSource("a", "b", "z", "d"), ["split"]),
        (["name", "a", "subset", "y"], TextSource("a", "y", "c", "d"), ["name", "subset"]),
    ],
)
def test_the_source_of_evaluation_during_training(options, expected, flags):
    """What is not given for it is training's, and so is its flag."""
    given = [f"--eval_dataset_{word}" if i % 2 == 0 else word for i, word in enumerate(options)]
    source = TextSource.for_evaluation_in_training(parse_train_args([*TRAIN, "--eval_interval", "5", *given]))
    names = SourceFlags(**{key: f"--eval_dataset_{key}" for key in flags or ["name", "subset", "split"]})
    more = {"text_field": "e", "local_files_only": True, "skip_bad_rows": True, "flags": names}
    assert source == dataclasses.replace(expected, **more)


@pytest.mark.parametrize("split,streaming", [("y", True), ("y[:9]", False)])
def test_the_source_of_held_out(split, streaming):
    more = ["--held_out_subset", "x", "--held_out_split", split, "--held_out_text_field", "z", "--local_files_only"]
    source = TextSource.for_eval_script(parse_eval_args(["--preset", "tiny", "--held_out", "text.txt", *more]))
    assert dataclasses.replace(source, flags=SourceFlags()) == TextSource(
        "text.txt", "x", split, text_field="z", streaming=streaming, local_files_only=True
    )
    flags = dataclasses.asdict(source.flags)
    assert flags.pop("skip_bad_rows") is None and flags.pop("revision") == "--dataset_revision"
    assert all(flag.startswith("--held_out") for flag in flags.values())
