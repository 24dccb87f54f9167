"""Text files of every kind, whole and with a fault, and what is read of them."""

import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from text.faults import Faults
from text.opening import open_source, open_stream, open_table
from text.rows import only_texts, rows_of
from text.sources import TextSource
from text.stream import TextStream

GOOD = [f"document {i:03d} " + "naïve 日本 " * (i % 7) for i in range(400)]


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


def write_json_list(folder: Path) -> Path:
    (folder / "a.json").write_text(json.dumps([{"n": 1, "text": text} for text in GOOD], indent=1))
    return folder / "a.json"


def write_json_texts(folder: Path) -> Path:
    (folder / "a.json").write_text(json.dumps(GOOD))
    return folder / "a.json"


def write_ragged_jsonl(folder: Path) -> Path:
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


def source_of(name: Path, **changes) -> TextSource:
    return TextSource(str(name), **changes)


def texts_of(source: TextSource, streaming: bool, rank: int = 0, world_size: int = 1) -> list[str]:
    """Returns what is handed to the tokenizer, from a table or from a stream."""
    opened = open_source(source)
    explain = Faults(opened, source)
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
