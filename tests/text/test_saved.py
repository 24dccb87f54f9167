"""text/saved.py: of a damaged `save_to_disk` folder the file is named."""

import json
import re
import shutil
from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from tests.text.files import source_of, texts_of
from text.opening import open_source

ROWS = [f"row {i}" for i in range(600)]


def saved(folder: Path) -> Path:
    """Leaves two splits, the second of two files, each with two batches."""
    tables = {name: datasets.Dataset.from_dict({"text": ROWS}) for name in ("test", "train")}
    datasets.DatasetDict(tables).save_to_disk(folder / "saved", num_shards={"test": 1, "train": 2})
    return folder / "saved"


def cut(size: float):
    def damage(file: Path) -> None:
        data = file.read_bytes()
        file.write_bytes(data[: int(len(data) * size)])

    return damage


def cut_between_batches(file: Path) -> None:
    """Leaves whole batches and no end: arrow reads them without a word."""
    with pa.memory_map(str(file)) as opened:
        table = pa.ipc.open_stream(opened).read_all()
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.slice(0, 100))
        size = sink.tell()
    file.write_bytes(file.read_bytes()[:size])
    with pa.memory_map(str(file)) as opened:
        assert len(pa.ipc.open_stream(opened).read_all()) == 100


def zeros(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size - 8) + file.read_bytes()[-8:])


def without(key: str):
    def damage(file: Path) -> None:
        file.write_text(
            json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name != key})
        )

    return damage


ARROW = "train/data-00001-of-00002.arrow"


@pytest.mark.parametrize(
    ("file", "damage", "problem"),
    [
        (ARROW, Path.unlink, "no such file"),
        (ARROW, cut(0.5), "cut off: the mark of its end is missing"),
        (ARROW, cut(0), "cut off, or cannot be read"),
        (ARROW, cut_between_batches, "cut off: the mark of its end is missing"),
        (ARROW, zeros, "no arrow file, or a damaged one"),
        ("train/state.json", Path.unlink, "no such file"),
        ("train/state.json", cut(0.5), "cannot be read as JSON"),
        ("train/state.json", cut(0), "cannot be read as JSON"),
        ("train/state.json", lambda file: file.write_text("[]"), "holds a list, expected an object"),
        ("train/state.json", lambda file: file.write_bytes(b'{"\xff": 1}'), "cannot be read as JSON"),
        ("train/state.json", lambda file: file.write_text("[" * 100_000), "cannot be read as JSON"),
        ("train/state.json", without("_data_files"), "has no list '_data_files'"),
        ("train/dataset_info.json", Path.unlink, "no such file"),
        ("train/dataset_info.json", cut(0.5), "cannot be read as JSON"),
        ("dataset_dict.json", cut(0.5), "cannot be read as JSON"),
        ("dataset_dict.json", lambda file: file.write_text("{}"), "has no list 'splits'"),
    ],
)
def test_the_damaged_file_is_named(tmp_path: Path, file: str, damage, problem: str):
    folder = saved(tmp_path)
    assert texts_of(source_of(folder), False) == ROWS
    damage(folder / file)
    with pytest.raises(ValueError) as error:
        open_source(source_of(folder))
    message = str(error.value)
    assert message.startswith(f"--dataset_name '{folder}': damaged, {folder / file}: {problem}"), message
    assert message.endswith("; copy the folder again, or write it again with save_to_disk") and "\n" not in message
    if file != "dataset_dict.json":
        assert texts_of(source_of(folder, split="test"), True) == ROWS, "a split that is whole can be read"


def test_a_split_whose_folder_is_missing(tmp_path: Path):
    folder = saved(tmp_path)
    shutil.rmtree(folder / "train")
    with pytest.raises(ValueError, match=re.escape(f"damaged, {folder}/train/state.json: no such file")):
        open_source(source_of(folder))


@pytest.mark.parametrize("key", ["_fingerprint", "_split", "_format_type"])
def test_a_state_that_lacks_something(tmp_path: Path, key: str):
    folder = saved(tmp_path)
    without(key)(folder / "train" / "state.json")
    with pytest.raises(ValueError, match=re.escape(f"damaged, {folder}/train: KeyError: '{key}'; copy")):
        open_source(source_of(folder))
