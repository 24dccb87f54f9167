"""text/csv_reader.py and csv_builder.py: CSV and TSV files are read like the others, and every field is text."""

import gzip
import json
import re
from pathlib import Path

import datasets
import pytest

from tests.text.files import source_of, texts_of, warnings
from text.csv_reader import csv_columns, csv_rows

pytestmark = pytest.mark.usefixtures("offline")

BOTH_FORMS = pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
GOOD = {
    "plain": b"n,text\n1,a\n2,b\n",
    "newlines in quotes": b'n,text\r\n1,"a\r\nb\n\nc"\r\n2,"say ""no"""\r\n',
    "a mark in front": b'\xef\xbb\xbf"text",n\na,1\n',
    "blank lines": b"text\n\n  \na\n\n \t \nb\n",
    "rows too short": b"n,text\n1\n2,b\n",
    "old line ends": b"text\ra\rb\r",
    "no last line end": b"text\na\nb",
    "quotes in the middle": b'text,n\na"b,1\nc"d",2\n',
    "what pandas takes for missing or numbers": b"text,n\nNA,1\nnull,2\n007,3\nnan,4\n1e5,5\n",
    "quoted blanks": b'text\n" "\n""\nx\n',
    "blanks around": b"n,text\n1, a \n",
    "a long text": b"text\n" + b"x" * 300_000 + b"\nb\n",
    "separators of unicode": "text\nnaïve \u2028 日\x0bq\x85w\n".encode(),
    "a tab": b"text\na\tb\n",
}


def write(folder: Path, data: bytes, name: str = "a.csv") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(gzip.compress(data) if name.lower().endswith(".gz") else data)
    return folder / name


@pytest.mark.parametrize("case", GOOD)
def test_good_files_are_read_as_datasets_reads_them(tmp_path: Path, case: str):
    """If it is made to take every field for text."""
    file = write(tmp_path, GOOD[case])
    strings = datasets.Features(dict.fromkeys(csv_columns(str(file)), datasets.Value("string")))
    table = datasets.load_dataset("csv", data_files=str(file), features=strings, na_filter=False, split="train")
    assert list(csv_rows(str(file), "text")) == table["text"][:]


@BOTH_FORMS
@pytest.mark.parametrize("skip_bad_rows", [False, True])
@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.tsv", "A.TSV.GZ"])
@pytest.mark.parametrize("in_folder", [False, True])
def test_a_file_and_a_folder(tmp_path: Path, streaming: bool, skip_bad_rows: bool, name: str, in_folder: bool):
    separator = b"\t" if "tsv" in name.lower() else b","
    texts = ['one, two\tand "three"', "NA", "x\ny"]
    quoted = [json.dumps(text).replace('\\"', '""').replace("\\n", "\n").replace("\\t", "\t") for text in texts]
    rows = [separator.join([b"n", b"text"]), *(separator.join([b"1", text.encode()]) for text in quoted)]
    file = write(tmp_path / "data", b"\n".join(rows), name)
    source = source_of(file.parent if in_folder else file, skip_bad_rows=skip_bad_rows)
    assert texts_of(source, streaming) == texts


@BOTH_FORMS
def test_a_folder_of_both(tmp_path: Path, streaming: bool, caplog):
    write(tmp_path / "data", b"n,text\n1,a\n")
    write(tmp_path / "data", b"text\tn\nb,c\t2\n", "b.tsv")
    assert texts_of(source_of(tmp_path / "data"), streaming) == ["a", "b,c"]
    assert warnings(caplog) == []


BAD = {
    "a field too many in the first row": (b"text\nhello, world\nfoo\n", "line 2: 2 fields, expected 1", ["foo"]),
    "a field too many": (b'text\nfoo\n"x\ny"\na, b\nbar\n', "line 5: 2 fields, expected 1", ["foo", "x\ny", "bar"]),
    "a separator at each end": (b"text,n\na,1,\n", "line 2: 3 fields, expected 2", []),
    "wrong bytes": (b"text\nfoo\n\nb\xffr\nx\n", "line 4: not valid UTF-8 (byte 0xff, 1 characters in)", ["foo", "x"]),
    "wrong bytes in the header": (b"text,\xff\nfoo,1\n", "line 1: not valid UTF-8 (byte 0xff, 0 characters in)", None),
    "text behind a quotation mark": (
        b'text,n\nfoo,1\n"say "hi"",2\n"c"d,3\nbar,4\n',
        "line 3: CSV: ',' expected after '\"'",
        ["foo", "bar"],
    ),
    "an open quotation mark before another": (
        b'n,text\n0,foo\n1,"quoted start\n2,z\n3,he said "hi"\n4,last\n',
        "line 3: CSV: ',' expected after '\"' in line 5, nothing in between can be read",
        ["foo", "last"],
    ),
    "an open quotation mark": (
        b'text\nfoo\n"bar\nx\n',
        "line 3: a quotation mark is not closed, nothing from here on can be read",
        ["foo"],
    ),
}


@BOTH_FORMS
@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_or_skipped(tmp_path: Path, case: str, streaming: bool, caplog):
    data, problem, left = BAD[case]
    file = write(tmp_path, data)
    with pytest.raises(ValueError, match=re.escape(f"cannot be read: {file}, {problem}")) as error:
        texts_of(source_of(file), streaming)
    assert "; correct it" in str(error.value)
    if left is None:
        return
    assert texts_of(source_of(file, skip_bad_rows=True), streaming) == left
    assert f"{file}, {problem}" in warnings(caplog)[-1]


@BOTH_FORMS
def test_quotation_marks_mean_the_same_in_tsv(tmp_path: Path, streaming: bool, caplog):
    data = b'n\ttext\n0\tfoo "bar"\n1\t"quoted start\n2\tz\n3\the said\t"hi"\n4\tlast\n'
    file = write(tmp_path, data, "a.tsv")
    problem = f"{file}, line 3: CSV: '\t' expected after '\"' in line 5, nothing in between can be read"
    with pytest.raises(ValueError, match=re.escape(problem)):
        texts_of(source_of(file), streaming)
    assert texts_of(source_of(file, skip_bad_rows=True), streaming) == ['foo "bar"', "last"]
    assert problem in warnings(caplog)[-1]


@BOTH_FORMS
@pytest.mark.parametrize("skip_bad_rows", [False, True])
def test_two_columns_of_the_name_are_refused(tmp_path: Path, streaming: bool, skip_bad_rows: bool):
    file = write(tmp_path, b"text,n,text\na,1,b\n")
    with pytest.raises(ValueError, match="--dataset_text_field 'text': 2 columns of .*a.csv have that name; rename"):
        texts_of(source_of(file, skip_bad_rows=skip_bad_rows), streaming)
    write(tmp_path, b"n,n,text\na,1,b\n")
    assert texts_of(source_of(file, skip_bad_rows=skip_bad_rows), streaming) == ["b"]


def test_a_later_file_with_two_columns_of_the_name_is_a_bad_file(tmp_path: Path, caplog):
    write(tmp_path / "data", b"text\na\n", "1.csv")
    file = write(tmp_path / "data", b"text,text\nb,c\n", "2.csv")
    assert texts_of(source_of(file.parent, skip_bad_rows=True), True) == ["a"]
    assert f"{file}, the whole file: 2 columns 'text'" in warnings(caplog)[-1]


@BOTH_FORMS
@pytest.mark.parametrize("skip_bad_rows", [False, True])
def test_a_wrong_column_and_an_empty_file(tmp_path: Path, streaming: bool, skip_bad_rows: bool):
    file = write(tmp_path, b"n,body\n1,a\n")
    with pytest.raises(ValueError, match="--dataset_text_field 'text': no such column; available: n, body"):
        texts_of(source_of(file, skip_bad_rows=skip_bad_rows), streaming)
    write(tmp_path, b"")
    with pytest.raises(ValueError, match="split 'train' has no rows"):
        texts_of(source_of(file, skip_bad_rows=skip_bad_rows), streaming)


@BOTH_FORMS
def test_a_file_with_a_header_alone(tmp_path: Path, streaming: bool):
    with pytest.raises(ValueError, match="split 'train' has no rows"):
        texts_of(source_of(write(tmp_path, b"text\n")), streaming)


@BOTH_FORMS
def test_a_later_file_without_the_column_is_named(tmp_path: Path, streaming: bool):
    write(tmp_path / "data", b"text\na\n", "1.csv")
    file = write(tmp_path / "data", b"body\nb\n", "2.csv")
    with pytest.raises(ValueError, match=re.escape(f"{file}, the whole file: no column 'text'")):
        texts_of(source_of(file.parent), streaming)
    assert texts_of(source_of(file.parent, skip_bad_rows=True), streaming) == ["a"]


def test_an_edited_file_is_read_again(tmp_path: Path):
    file = write(tmp_path, b"text\na\n")
    assert texts_of(source_of(file), False) == ["a"]
    write(tmp_path, b"text\na\nb\n")
    assert texts_of(source_of(file), False) == ["a", "b"]
