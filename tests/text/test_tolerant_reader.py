"""text/tolerant_reader.py: our own reader gives what `datasets` gives, and a BadRow for what cannot be read."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.text.files import (
    source_of,
    texts_of,
    whole_parquet,
    write_gz,
    write_json_list,
    write_json_texts,
    write_parquet_with_dictionary,
    write_ragged_jsonl,
    write_txt,
)
from text.faults import explain_fault
from text.opening import open_source
from text.tolerant_reader import BadRow, first_bad_row, rows_of_file


@pytest.mark.parametrize(
    "write",
    [
        write_json_list,
        write_json_texts,
        write_ragged_jsonl,
        write_gz,
        write_txt,
        whole_parquet,
        write_parquet_with_dictionary,
    ],
)
def test_good_files_are_read_alike_with_and_without_the_option(tmp_path: Path, write: Callable, caplog):
    file = write(tmp_path)
    expected = texts_of(source_of(file), True)
    assert len(expected) >= 300
    for streaming in (False, True):
        assert texts_of(source_of(file, skip_bad_rows=True), streaming) == expected
    assert "--skip_bad_rows" not in caplog.text
    assert first_bad_row([str(file)]) is None


def test_a_broken_json_list_is_one_bad_file(tmp_path: Path):
    file = write_json_list(tmp_path)
    file.write_bytes(file.read_bytes()[:-20])
    (row,) = rows_of_file(str(file), "text")
    assert isinstance(row, BadRow) and row.place == "the whole file" and "JSON parse error" in row.reason


def test_json_too_deep_to_be_read_is_a_bad_row(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": ' + "[" * 200_000 + "\n" + '{"text": "good"}')
    bad, good = rows_of_file(str(tmp_path / "a.jsonl"), "text")
    assert isinstance(bad, BadRow) and bad.place == "line 1" and good == "good"


def test_a_parquet_file_without_the_column_is_one_bad_file(tmp_path: Path, caplog):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"body": ["b"]}), tmp_path / "2.parquet")
    assert texts_of(source_of(tmp_path, skip_bad_rows=True), True) == ["a"]
    assert "2.parquet, the whole file: no column 'text'" in caplog.text


def test_a_parquet_file_with_two_columns_of_the_name_is_one_bad_file(tmp_path: Path):
    file = str(tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), file)
    (row,) = rows_of_file(file, "text")
    assert str(row) == f"{file}, the whole file: 2 columns 'text'"


def test_a_failing_disk_is_no_fault_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = str(whole_parquet(tmp_path))

    def fails(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(pq, "ParquetFile", fails)
    with pytest.raises(OSError, match="Input/output error"):
        list(rows_of_file(file, "text"))
    source = source_of(Path(file))
    explained = explain_fault(OSError("cannot be read"), open_source(source), source)
    assert "Input/output error" in str(explained) and "--skip_bad_rows" not in str(explained)
