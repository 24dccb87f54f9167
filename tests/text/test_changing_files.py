"""A file that is written to while it is read is named: a table is not made of it, and a stream warns."""

import os
import shutil
from pathlib import Path

import datasets
import pytest

from tests.text.files import source_of, warnings
from text import faults, tolerant_reader
from text.faults import Faults
from text.opening import open_source, open_stream, open_table
from text.rows import only_texts, rows_of
from text.stream import TextStream

ROWS = [f"row {i}" for i in range(2000)]
CONTENT = {
    "jsonl": "".join(f'{{"text": "{row}"}}\n' for row in ROWS),
    "txt": "\n\n".join(ROWS) + "\n\n",
    "csv": "text\n" + "\n".join(ROWS) + "\n",
}


def grow(file: Path) -> None:
    with open(file, "a") as opened:
        opened.write("half a ro")


def cut_off(file: Path) -> None:
    os.truncate(file, 5000)


def replace(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(file.read_bytes().replace(b"row", b"new"))
    os.replace(other, file)


CHANGES = pytest.mark.parametrize("change", [grow, cut_off, replace, Path.unlink])
ENDINGS = pytest.mark.parametrize("ending", CONTENT)


def write(folder: Path, ending: str) -> Path:
    (folder / f"a.{ending}").write_text(CONTENT[ending])
    return folder / f"a.{ending}"


@ENDINGS
@CHANGES
def test_no_table_is_made_of_a_file_that_changes(tmp_path: Path, monkeypatch, ending: str, change):
    file = write(tmp_path, ending)
    source = source_of(file)
    opened = open_source(source)
    prepare = opened.download_and_prepare

    def changing(**settings: object) -> None:
        prepare(**settings)
        change(file)

    monkeypatch.setattr(opened, "download_and_prepare", changing)
    with pytest.raises(ValueError, match=f"--dataset_name '{file}': {file} changed while it was read.*; start again"):
        open_table(opened, source)


@ENDINGS
@CHANGES
@pytest.mark.parametrize("skip_bad_rows", [False, True])
def test_a_stream_warns_of_a_file_that_changes(tmp_path: Path, ending: str, change, skip_bad_rows: bool, caplog):
    """Once, at the end of the pass at the latest; or it ends with an error that names the change."""
    file = write(tmp_path, ending)
    source = source_of(file, skip_bad_rows=skip_bad_rows)
    opened = open_source(source)
    explain = Faults(opened, source)
    stream = TextStream(
        open_stream(opened, source), source, shuffle_buffer=0, seed=0, rank=0, world_size=1, explain=explain
    )
    batches = stream.batches(0)
    next(batches)
    change(file)
    try:
        for _ in batches:
            pass
        assert sum(f"{file} changed while it was read" in text for text in warnings(caplog)) == 1
    except ValueError as error:
        assert f"{file} changed while it was read" in str(error)


def test_a_long_stream_looks_at_its_files_now_and_then(tmp_path: Path, monkeypatch, caplog):
    file = write(tmp_path, "jsonl")
    source = source_of(file)
    explain = Faults(open_source(source), source)
    grow(file)
    explain.look()
    assert warnings(caplog) == []
    monkeypatch.setattr(faults.time, "monotonic", lambda: explain.looked + faults.LOOK_EVERY_S + 1)
    explain.look()
    explain.look()
    (warning,) = warnings(caplog)
    assert f"{file} changed while it was read" in warning
    assert f"(it has {file.stat().st_size:,} bytes and had {file.stat().st_size - 9:,})" in warning


def test_packed_tokens_of_a_file_that_changed_under_skip_bad_rows_say_so(tmp_path: Path, monkeypatch, caplog):
    file = write(tmp_path, "txt")
    source = source_of(file, skip_bad_rows=True)
    real = tolerant_reader.rows_of_file

    def growing(name: str, field: str | None):
        yield from real(name, field)
        grow(file)

    monkeypatch.setattr(tolerant_reader, "rows_of_file", growing)
    data = open_table(open_source(source), source)
    assert list(only_texts(rows_of(data, "text"), source)) == ROWS
    (warning,) = warnings(caplog)
    assert f"skipped 1 of 2001 rows: {file}, the whole file: changed while it was read" in warning


def test_a_file_that_stays_as_it_is_is_not_mentioned(tmp_path: Path, caplog):
    datasets.Dataset.from_dict({"text": ROWS}).save_to_disk(tmp_path / "saved")
    for name in (write(tmp_path, "jsonl"), tmp_path / "saved"):
        source = source_of(name)
        explain = Faults(open_source(source), source)
        explain.look(is_end=True)
        assert explain.changed() == "" and warnings(caplog) == []


def test_another_inode_is_no_change(tmp_path: Path):
    """Some network disks give a file another one now and then, and so does a copy with its times."""
    file = write(tmp_path, "jsonl")
    explain = Faults(open_source(source_of(file)), source_of(file))
    inode = file.stat().st_ino
    shutil.copy2(file, tmp_path / "copy")
    os.replace(tmp_path / "copy", file)
    assert file.stat().st_ino != inode and explain.changed() == ""
