"""text/row_limit.py: a row longer than the largest is named like any row that cannot be read, and never held whole."""

import gzip
import io
import json
import logging
import random
from pathlib import Path

import pytest
import zstandard

from tests.text.documents import expected_windows, loader, options, windows_of, write_jsonl
from text import expansion, row_limit, row_sizes
from text.expansion import most_expanded
from text.opening import open_source, open_stream, open_table
from text.row_limit import bounded_lines
from text.row_sizes import first_row_too_long, may_hold_too_long_a_row
from text.sources import TextSource
from text.tolerant_reader import BadRow, rows_of_file

LARGEST = 1000
FITS, TOO_LONG = "b" * (LARGEST - 50), "c " * LARGEST
REASON = f"longer than {LARGEST} characters, the largest row that is read"


@pytest.fixture(autouse=True)
def small_rows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(row_limit, "LARGEST_ROW", LARGEST)


def as_jsonl(rows: list[str]) -> str:
    return "".join(json.dumps({"text": row}) + "\n" for row in rows)


def as_txt(rows: list[str]) -> str:
    return "\n\n".join(rows) + "\n"


def write(path: Path, content: str) -> Path:
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


def rows_read(path: Path) -> list:
    return [str(row) if isinstance(row, BadRow) else row for row in rows_of_file(str(path), "text")]


def test_lines_are_read_whole_or_passed_over():
    lines = ["a\n", "b" * (LARGEST - 1) + "\n", "\n", "c" * LARGEST + "\n", "d" * 5 * LARGEST + "\n", "e" * LARGEST]
    expected = [line if len(line) <= LARGEST else None for line in lines]
    assert list(bounded_lines(io.StringIO("".join(lines)))) == expected
    assert list(bounded_lines(io.StringIO("f" * (LARGEST + 1)))) == [None]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_line_of_json_that_is_too_long(tmp_path: Path, name: str):
    path = write(tmp_path / name, as_jsonl(["a", FITS, TOO_LONG, "d"]))
    assert rows_read(path) == ["a", FITS, f"{path}, line 3: {REASON}", "d"]


@pytest.mark.parametrize("long", [TOO_LONG, "one\n" * LARGEST + "end"])
def test_a_document_of_plain_text_that_is_too_long(tmp_path: Path, long: str):
    path = write(tmp_path / "a.txt.gz", as_txt(["a", long, FITS, long]))
    last = 7 + long.count("\n")
    assert rows_read(path) == ["a", f"{path}, line 3: {REASON}", FITS, f"{path}, line {last}: {REASON}"]


def test_the_limit_of_a_list_is_one_of_its_elements(tmp_path: Path):
    long = json.dumps([*("a" * 30 for _ in range(100)), {"text": TOO_LONG}, TOO_LONG, FITS])
    path = write(tmp_path / "long.json", long)
    at_101, at_102 = (f"{path}, element {i}: {REASON}" for i in (101, 102))
    assert rows_read(path) == [*["a" * 30] * 100, at_101, at_102, FITS]


def test_which_compressed_files_are_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def looked_into(name: str, data: bytes) -> bool:
        (tmp_path / name).write_bytes(data)
        return may_hold_too_long_a_row(str(tmp_path / name))

    bomb = gzip.compress(TOO_LONG.encode() * 20)
    assert looked_into("bomb.txt.gz", bomb)
    assert not looked_into("bomb.txt", bomb)
    assert looked_into("parts.txt.gz", bomb + gzip.compress(b"end"))
    monkeypatch.setattr(expansion, "SMALL_FILE", 10)
    assert not looked_into("large_parts.txt.gz", bomb + gzip.compress(b"end"))
    assert not looked_into("small.txt.gz", gzip.compress(b"a" * LARGEST))
    assert not looked_into("text.txt.gz", gzip.compress(bytes(range(256)) * 8, compresslevel=1))
    assert not looked_into("empty.txt.gz", b"")


@pytest.mark.parametrize("opener", [open_stream, open_table])
@pytest.mark.parametrize(("ending", "content"), [("jsonl", as_jsonl), ("txt", as_txt)])
def test_a_compressed_file_that_expands_much_is_refused_before_datasets_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opener, ending: str, content
):
    path = write(tmp_path / f"a.{ending}.gz", content(["a", TOO_LONG * 50, "b"]))
    source = TextSource(str(path))
    opened = open_source(source)
    monkeypatch.setattr(type(opened), "_generate_tables", None)  # `datasets` reads by it
    with pytest.raises(ValueError) as error:
        opener(opened, source)
    line = 2 if ending == "jsonl" else 3
    assert str(error.value) == (
        f"--dataset_name '{path}' cannot be read: {path}, line {line}: {REASON}; split that row, or leave such rows "
        "out with --skip_bad_rows"
    )


@pytest.mark.parametrize("streaming", [True, False])
def test_a_row_that_datasets_has_read_is_refused_or_left_out_too(tmp_path: Path, caplog, streaming: bool):
    path = write_jsonl(tmp_path / "a.jsonl", ["a" * 30, TOO_LONG, "b" * 30])
    changes = dict(dataset_streaming=streaming, batch_size=1)
    with pytest.raises(ValueError, match=f"row 1 as read here holds text {REASON}, .* with --skip_bad_rows"):
        list(loader(options(path, **changes)))
    windows = windows_of(loader(options(path, skip_bad_rows=True, epochs=1, **changes)))
    assert f"skipped 1 of 3 rows: {path}, line 2: {REASON}" in caplog.text
    expected = expected_windows(["a" * 30, "b" * 30])
    assert windows == expected if streaming else sorted(windows) == sorted(expected)  # a cache is in random order


@pytest.mark.parametrize("long", [TOO_LONG, '"' + "one\n" * LARGEST + '"', '"' + TOO_LONG + '"'])
def test_a_csv_row_that_is_too_long_ends_its_file(tmp_path: Path, long: str):
    path = write(tmp_path / "a.csv.gz", "\n".join(["text", "a", FITS, long, "d"]))
    assert rows_read(path) == ["a", FITS, f"{path}, line 4: {REASON}, and nothing from here on can be read"]


def write_zst(path: Path, data: bytes, *, is_recorded: bool) -> Path:
    compressor = zstandard.ZstdCompressor(write_content_size=is_recorded, write_checksum=True)
    path.write_bytes(compressor.compress(data))
    return path


@pytest.mark.parametrize("is_recorded", [True, False])
def test_a_zst_file_says_to_what_size_it_expands(tmp_path: Path, is_recorded: bool, monkeypatch: pytest.MonkeyPatch):
    block = expansion.ZST_BLOCK
    for size in (10, 300, 70_000, block + 1, 5 * block):
        noise = random.Random(size).randbytes(size)
        for data in (b"a" * size, noise, noise[: size // 2] + b"a" * (size - size // 2)):
            most = most_expanded(str(write_zst(tmp_path / "a.zst", data, is_recorded=is_recorded)))
            assert most == size if is_recorded else size <= most <= size + 2 * block
    one = write_zst(tmp_path / "b.zst", b"a" * 1000, is_recorded=True).read_bytes()
    skipped = (expansion.ZST_SKIPPED + 3).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"12345"
    (tmp_path / "b.zst").write_bytes(skipped + one + skipped + one)
    assert most_expanded(str(tmp_path / "b.zst")) == 2000
    (tmp_path / "b.zst").write_bytes(one[:5] + b"damaged")
    assert most_expanded(str(tmp_path / "b.zst")) < 2 * block
    monkeypatch.setattr(expansion, "SMALL_FILE", 10)
    assert most_expanded(str(write_zst(tmp_path / "a.zst", b"a" * 900, is_recorded=is_recorded))) == 900 * is_recorded


def test_files_of_zstandard_are_looked_into_only_if_they_expand_much(tmp_path: Path):
    bomb = write_zst(tmp_path / "a.jsonl.zst", as_jsonl(["a", TOO_LONG * 200]).encode(), is_recorded=False)
    assert str(first_row_too_long([str(bomb)])) == f"{bomb}, line 2: {REASON}"
    usual = write_zst(tmp_path / "b.jsonl.zst", random.Random(0).randbytes(20 * LARGEST), is_recorded=True)
    assert not may_hold_too_long_a_row(str(usual))


BAD_BEFORE = {
    "a.jsonl.gz": ('{"text": "\\ud800"}\n{\n\n' + as_jsonl([FITS, TOO_LONG * 50]), "line 5"),
    "a.txt.gz": ("bad\udcff\n\n" + as_txt([FITS, TOO_LONG * 50]), "line 5"),
    "a.csv.gz": ("text\nbad\udcff\na,b\n" + f"{FITS}\n{TOO_LONG * 50}\n", "line 5"),
    "a.json.gz": ("[\n" + ",\n".join(["{}"] * 50 * LARGEST) + "]", "the whole file"),
}


@pytest.mark.parametrize("name", BAD_BEFORE)
def test_another_fault_does_not_hide_a_row_too_long_and_nothing_is_parsed(tmp_path: Path, name: str, monkeypatch):
    content, place = BAD_BEFORE[name]
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode(errors="surrogateescape")))
    monkeypatch.setattr(json, "loads", None)
    assert str(first_row_too_long([str(path)])) == f"{path}, {place}: {REASON}"


def test_looking_for_long_rows_is_logged_once_if_it_takes_long(tmp_path: Path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    files = [str(write(tmp_path / f"{i}.txt.gz", as_txt(["a\n\n"] * 50 * LARGEST))) for i in range(3)]
    assert first_row_too_long(files) is None and not caplog.messages
    monkeypatch.setattr(row_sizes, "LONG_S", 0.0)
    assert first_row_too_long(files) is None
    assert caplog.messages == ["looking for rows that are too long: 0 of 3 compressed files are done"]
