"""sources.py, bad_rows.py, rows.py: what is wrong in a data set is named by file and row, or skipped and counted."""

import dataclasses
import functools
import gzip
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import PackedTextDataset
from tests.text.test_token_file import EOS, plain_ids, small_tokenizer
from text.encoding import Encoder
from text.opening import explain_fault, open_source, open_stream, open_table
from text.rows import only_texts, rows_of
from text.sources import TextSource
from text.stream import TextStream
from text.token_file import token_file_inputs, write_token_file
from text.tolerant_reader import BadRow, first_bad_row, rows_of_file

GOOD = [f"document {i:03d} " + "naïve 日本 " * (i % 7) for i in range(400)]
BOTH_LANES = pytest.mark.parametrize("streaming", [False, True])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def source_of(name: Path, **changes) -> TextSource:
    return TextSource(str(name), **changes)


def texts_of(source: TextSource, streaming: bool, rank: int = 0, world_size: int = 1) -> list[str]:
    """Returns what is handed to the tokenizer, from a table or from a stream."""
    opened = open_source(source)
    explain = functools.partial(explain_fault, opened=opened, source=source)
    if not streaming:
        return list(only_texts(rows_of(open_table(opened, source), source.text_field, explain), source))
    stream = TextStream(
        open_stream(opened, source),
        source,
        shuffle_buffer=0,
        seed=0,
        rank=rank,
        world_size=world_size,
        explain=explain,
        sleep=pytest.fail,
    )
    return sum((texts for _, texts in stream.batches(0)), [])


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# ---- rows that `datasets` reads, whatever they hold


@BOTH_LANES
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_huge_odd_and_empty_texts_reach_the_model_as_they_are(tmp_path: Path, streaming: bool, ending: str):
    huge = "all work and no play " * 500_000  # 10 MB
    odd = [f"{EOS}{EOS} a {EOS}", "\0\0", "\ufeffbom", "🙂" * 50, " ", "\r\n\u2028"]
    rows = [odd[0], None, huge, "", *odd[1:]]
    file = tmp_path / f"a.{ending}"
    if ending == "jsonl":
        file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    else:
        pq.write_table(pa.table({"text": rows}), file)
    for skip_bad_rows in (False, True):
        texts = texts_of(source_of(file, skip_bad_rows=skip_bad_rows), streaming)
        assert [text[:99] for text in texts] == [odd[0], huge[:99], *odd[1:]]
        unchanged = texts[1] == huge  # pytest would take forever to show how they differ
        assert unchanged
    encoder = Encoder(small_tokenizer())
    texts[1] = huge[:100_000]  # the small tokenizer is slow
    write_token_file(tmp_path / "packed", texts, encoder, {})
    ids = [int(window[0]) for window in PackedTextDataset(tmp_path / "packed", 0)]
    assert ids.count(encoder.eos_id) == len(texts)
    assert ids == plain_ids(texts)


@BOTH_LANES
def test_rows_of_another_type_are_an_error_or_skipped(tmp_path: Path, streaming: bool, caplog):
    rows = ["first", 5, None, ["list"], "last"]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    with pytest.raises(ValueError, match="--dataset_text_field 'text': row 1 as read here holds int .*--skip_bad_rows"):
        texts_of(source_of(file), streaming)
    assert texts_of(source_of(file, skip_bad_rows=True), streaming) == ["first", "last"]
    assert warnings(caplog) == [
        "skipped 1 of 5 rows: no text in column 'text'",
        "--skip_bad_rows: skipped 2 of 5 rows: row 1 as read here: int (5); row 3 as read here: list (['list'])",
    ]


@BOTH_LANES
def test_rows_of_another_type_in_a_saved_table_cannot_be_skipped_but_empty_ones_are(tmp_path: Path, streaming, caplog):
    datasets.Dataset.from_dict({"text": ["a", None, "", "b"]}).save_to_disk(tmp_path / "saved")
    assert texts_of(source_of(tmp_path / "saved", skip_bad_rows=True), streaming) == ["a", "b"]
    assert "is read by `datasets`, which stops at a row that it cannot read" in caplog.text
    assert warnings(caplog)[-1] == "skipped 2 of 4 rows: no text in column 'text'"


# ---- files with a fault: which row is named, and what is left when it is skipped


def lines_with(bad: bytes, at: int) -> bytes:
    lines = [json.dumps({"text": text}).encode() for text in GOOD]
    lines[at] = bad
    return b"\n".join(lines) + b"\n"


def jsonl_with(bad: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "a.jsonl").write_bytes(lines_with(bad, 300))
        return folder / "a.jsonl"

    return write


def gz_cut_off(folder: Path) -> Path:
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in GOOD)
    compressor = gzip.compress(lines, compresslevel=0)  # so that half of the file is half of the lines
    (folder / "a.jsonl.gz").write_bytes(compressor[: len(compressor) // 2])
    return folder / "a.jsonl.gz"


def gz_with_wrong_bytes(folder: Path) -> Path:
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in GOOD)
    data = bytearray(gzip.compress(lines))
    data[len(data) // 2 : len(data) // 2 + 40] = b"\xff" * 40
    (folder / "a.jsonl.gz").write_bytes(data)
    return folder / "a.jsonl.gz"


def txt_with_wrong_bytes(folder: Path) -> Path:
    (folder / "a.txt").write_bytes(b"one\n\n\nof two\nlines \xff\n\nthree\n\n\n\nfour")
    return folder / "a.txt"


def whole_parquet(folder: Path) -> Path:
    # incompressible, so that a page is as large as its text, and not shared through a dictionary
    pq.write_table(pa.table({"text": GOOD}), folder / "a.parquet", row_group_size=100, use_dictionary=False)
    return folder / "a.parquet"


def parquet_with_wrong_page(folder: Path) -> Path:
    file = whole_parquet(folder)
    chunk = pq.ParquetFile(file).metadata.row_group(1).column(0)
    data = bytearray(file.read_bytes())
    data[chunk.data_page_offset : chunk.data_page_offset + 30] = b"\xff" * 30
    file.write_bytes(data)
    return file


def parquet_cut_off(folder: Path) -> Path:
    file = whole_parquet(folder)
    file.write_bytes(file.read_bytes()[:2000])
    return file


def parquet_with_wrong_text(folder: Path) -> Path:
    column = pa.array([b"broken \xff" if i == 123 else text.encode() for i, text in enumerate(GOOD)], pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(column), column.buffers())
    pq.write_table(pa.table({"text": text}), folder / "a.parquet", row_group_size=100)
    return folder / "a.parquet"


def without(*rows: int) -> list[str]:
    return [text for i, text in enumerate(GOOD) if i not in rows]


FAULTS = {
    "broken JSON": (jsonl_with(b'{"text": "abc'), r"a.jsonl, line 301: JSON parse error: .* column 10", without(300)),
    "no value": (jsonl_with(b'{"text": '), r"a.jsonl, line 301: JSON parse error: Expecting value", without(300)),
    "wrong bytes": (
        jsonl_with(b'{"text": "ab\xff"}'),
        r"a.jsonl, line 301: not valid UTF-8 .byte 0xff, 12 ",
        without(300),
    ),
    "half a pair": (jsonl_with(b'{"text": "\\ud800"}'), r"a.jsonl, line 301: half a surrogate pair", without(300)),
    "a list": (jsonl_with(b'["text"]'), r"a.jsonl, line 301: a JSON list .*expected an object", without(300)),
    "a string": (jsonl_with(b'"text"'), r"a.jsonl, line 301: a JSON str .*expected an object", without(300)),
    "cut off gz": (gz_cut_off, r"a.jsonl.gz, line \d+: the compressed file is damaged", None),
    "damaged gz": (gz_with_wrong_bytes, r"a.jsonl.gz, line \d+: ", None),
    "wrong bytes in txt": (
        txt_with_wrong_bytes,
        r"a.txt, line 5: not valid UTF-8 .byte 0xff",
        ["one", "three", "four"],
    ),
    "wrong page": (
        parquet_with_wrong_page,
        r"a.parquet, row group 1 .from 0., row 101 .from 1. to 200: damaged parquet: ",
        GOOD[:100] + GOOD[200:],
    ),
    "wrong bytes in parquet": (
        parquet_with_wrong_text,
        r"a.parquet, row group 1 .from 0., row 124 .from 1.: not valid UTF-8",
        without(123),
    ),
    "cut off parquet": (parquet_cut_off, r"a.parquet, the whole file: damaged parquet: .*footer", []),
}
EACH_FAULT = pytest.mark.parametrize("fault", FAULTS)


@BOTH_LANES
@EACH_FAULT
def test_a_fault_is_named_by_file_and_row(tmp_path: Path, streaming: bool, fault: str):
    write, place, _ = FAULTS[fault]
    file = write(tmp_path)
    with pytest.raises(ValueError, match=rf"--dataset_name '.*' cannot be read: {tmp_path}/{place}") as caught:
        texts_of(source_of(file), streaming)
    assert "correct it, or leave such rows out with --skip_bad_rows" in str(caught.value)


@BOTH_LANES
@EACH_FAULT
def test_a_fault_is_skipped_counted_and_logged(tmp_path: Path, streaming: bool, fault: str, caplog):
    write, place, left = FAULTS[fault]
    file = write(tmp_path)
    (tmp_path / "data").mkdir()
    file.rename(tmp_path / "data" / file.name)
    whole = {"text": "the rows of another file"}
    if file.suffix == ".parquet":
        pq.write_table(pa.table({"text": [whole["text"]]}), tmp_path / "data" / "b.parquet")
    else:
        ending = "txt" if file.suffix == ".txt" else "jsonl"
        (tmp_path / "data" / f"b.{ending}").write_text(whole["text"] if ending == "txt" else json.dumps(whole))
    texts = texts_of(source_of(tmp_path / "data", skip_bad_rows=True), streaming)
    assert texts[-1] == whole["text"]
    if left is None:
        assert 50 < len(texts) < 399 and set(texts[:50]) <= set(GOOD)
    else:
        assert texts[:-1] == left
    (warning,) = warnings(caplog)
    assert re.search(rf"--skip_bad_rows: skipped \d+ of \d+ rows: .*{place}", warning)
    if fault == "wrong page":
        assert "skipped 100 of 401 rows" in warning


def test_each_rank_counts_its_own_bad_rows_and_goes_on_counting(tmp_path: Path, caplog):
    file = jsonl_with(b"{")(tmp_path)
    shares = [texts_of(source_of(file, skip_bad_rows=True), True, rank, 2) for rank in (0, 1)]
    assert sorted(sum(shares, [])) == sorted(without(300))
    assert len(warnings(caplog)) == 1 and "skipped 1 of 200 rows" in caplog.text  # row 300 is of rank 0

    source = source_of(file, skip_bad_rows=True)
    data = open_stream(open_source(source), source)
    stream = TextStream(data, source, shuffle_buffer=50, seed=0, rank=0, world_size=1)
    *_, (last, _) = stream.batches(0)
    caplog.clear()
    list(stream.batches(0, json.loads(json.dumps(last.to_json()))))
    assert "skipped 1 of 400 rows" in caplog.text and f"{file}, line 301" in caplog.text


def test_only_the_first_few_places_are_named(tmp_path: Path, caplog):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "good"}\n' + b"{\n" * 20)
    assert texts_of(source_of(file, skip_bad_rows=True), False) == ["good"]
    assert "skipped 20 of 21 rows" in caplog.text and "line 6:" in caplog.text and "line 7:" not in caplog.text
    assert caplog.text.rstrip().endswith("; ...")


# ---- our own reader gives what `datasets` gives


def write_json_list(folder: Path) -> Path:
    (folder / "a.json").write_text(json.dumps([{"n": 1, "text": text} for text in GOOD], indent=1))
    return folder / "a.json"


def write_json_texts(folder: Path) -> Path:
    (folder / "a.json").write_text(json.dumps(GOOD))
    return folder / "a.json"


def write_jsonl(folder: Path) -> Path:
    rows = [{"n": i, "text": text} if i % 9 else {"n": i} for i, text in enumerate(GOOD)]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows))
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode() + b"\n\n")
    return folder / "a.jsonl"


def write_gz(folder: Path) -> Path:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines_with(b'{"text": null}', 3)))
    return folder / "a.jsonl.gz"


def write_txt(folder: Path) -> Path:
    text = "\n\n".join(f"{text}\r\nand\rmore" for text in GOOD) + "\n\n\n\n\nfour\n\n\n\n\n"
    (folder / "a.txt").write_bytes(text.encode())
    return folder / "a.txt"


def write_parquet_with_dictionary(folder: Path) -> Path:
    table = pa.table({"n": [1] * 400, "text": pa.array(GOOD).dictionary_encode()})
    pq.write_table(table, folder / "a.parquet", row_group_size=90)
    return folder / "a.parquet"


@pytest.mark.parametrize(
    "write",
    [write_json_list, write_json_texts, write_jsonl, write_gz, write_txt, whole_parquet, write_parquet_with_dictionary],
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


# ---- what the option does not do


@BOTH_LANES
def test_a_wrong_column_is_named_with_the_option_too(tmp_path: Path, streaming: bool):
    for write in (write_jsonl, whole_parquet, write_txt):
        file = write(tmp_path)
        source = source_of(file, skip_bad_rows=True, text_field="body")
        with pytest.raises(ValueError, match="--dataset_text_field 'body': no such column; available: .*text"):
            texts_of(source, streaming)
        file.unlink()


@BOTH_LANES
def test_splits_with_the_option(tmp_path: Path, streaming: bool):
    for split, text in (("train", "a"), ("test", "b")):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": text}))
    source = source_of(tmp_path, skip_bad_rows=True)
    assert texts_of(source, streaming) == ["a"]
    assert texts_of(dataclasses.replace(source, split="test"), streaming) == ["b"]
    assert sorted(texts_of(dataclasses.replace(source, split="train+test"), streaming)) == ["a", "b"]
    with pytest.raises(ValueError, match=r"--dataset_split 'train\[:1%\]': with --skip_bad_rows .*leave out the part"):
        texts_of(dataclasses.replace(source, split="train[:1%]"), streaming)


def test_a_fault_in_a_split_that_is_prepared_with_the_one_asked_for_is_named(tmp_path: Path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a"}\n')
    (folder / "test.jsonl").write_text('{"text": "b"}\n{"text"\n')
    with pytest.raises(ValueError, match=r"test.jsonl, line 2: JSON parse error"):
        texts_of(source_of(folder), False)
    assert texts_of(source_of(folder), True) == ["a"]


@BOTH_LANES
def test_nothing_to_read_is_an_error_with_the_option_too(tmp_path: Path, streaming: bool):
    (tmp_path / "a.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match="--dataset_name .*split 'train' has no rows"):
        texts_of(source_of(tmp_path / "a.jsonl", skip_bad_rows=True), streaming)


def test_what_datasets_alone_objects_to_is_passed_on(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "text": "b"}')
    with pytest.raises(
        ValueError, match="cannot be read: .*specified twice.*; --skip_bad_rows reads the rows that can"
    ):
        texts_of(source_of(tmp_path / "a.jsonl"), True)


def test_a_wrong_split_of_a_stream_is_not_taken_for_bad_data(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    with pytest.raises(ValueError, match=r"^--dataset_split 'train\[:1%\]': "):
        texts_of(source_of(tmp_path / "a.jsonl", split="train[:1%]"), True)


def test_a_packed_file_is_not_shared_with_one_that_skipped_rows(tmp_path: Path):
    source, encoder = source_of(write_jsonl(tmp_path)), Encoder(small_tokenizer())
    plain, skipping = (
        token_file_inputs(open_source(each), each, encoder)
        for each in (source, dataclasses.replace(source, skip_bad_rows=True))
    )
    assert skipping == {**plain, "skip_bad_rows": True}
