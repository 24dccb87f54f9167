"""text/files.py: endings in any case, which files of a folder are read, and that all others are named."""

import gzip
import importlib.util
import json
from pathlib import Path

import datasets
import pytest

from tests.text.documents import write_jsonl
from tests.text.files import source_of, texts_of, warnings
from text.files import file_ending
from text.opening import open_source

pytestmark = pytest.mark.usefixtures("offline")

BOTH_FORMS = pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])


@BOTH_FORMS
@pytest.mark.parametrize("skip_bad_rows", [False, True])
@pytest.mark.parametrize("in_folder", [False, True])
@pytest.mark.parametrize("name", ["A.JSONL", "a.Json", "A.TXT", "A.jsonl.GZ", "A.TXT.gz", "A.PARQUET", "a.ndjson"])
def test_the_case_of_an_ending_does_not_matter(tmp_path: Path, streaming, skip_bad_rows, in_folder, name):
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / name
    data = b'{"text": "a"}\n{"text": "b"}\n' if file_ending(file).startswith((".json", ".nd")) else b"a\n\nb"
    if file_ending(file) == ".parquet":
        datasets.Dataset.from_dict({"text": ["a", "b"]}).to_parquet(file)
    else:
        file.write_bytes(gzip.compress(data) if name.lower().endswith("gz") else data)
    assert texts_of(source_of(file.parent if in_folder else file, skip_bad_rows=skip_bad_rows), streaming) == ["a", "b"]


def test_endings_in_both_cases_are_of_one_kind(tmp_path: Path):
    tmp_path = tmp_path / "data"
    write_jsonl(tmp_path / "train-1.jsonl", ["a"])
    write_jsonl(tmp_path / "train-2.JSONL", ["b"])
    write_jsonl(tmp_path / "TEST.Jsonl", ["c"])
    write_jsonl(tmp_path / "test.JSONL", ["d"])
    assert texts_of(source_of(tmp_path), False) == ["a", "b"]
    assert texts_of(source_of(tmp_path, split="test"), True) == ["d"], "`datasets` knows splits by lower-case names"


def test_a_name_in_upper_case_that_is_not_there():
    with pytest.raises(ValueError, match="'NONE.JSONL': no such file or directory"):
        open_source(source_of(Path("NONE.JSONL")))


def test_all_files_that_are_not_read_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = write_jsonl(tmp_path / "data" / "a.jsonl", ["a"]).parent
    (folder / ".git").mkdir()
    for name in (".hidden.txt", ".git/config", "dataset_info.json", "dataset_infos.json"):
        (folder / name).touch()
    assert texts_of(source_of(folder), False) == ["a"]
    assert warnings(caplog) == []
    others = ["notes.txt", "table.csv", "picture.png", "sub/Makefile", "a.jsonl.bak"]
    for name in ("README.md", *others):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("text\nb\n")
    for streaming in (False, True):
        assert texts_of(source_of(folder), streaming) == ["a"]
    ours = [text for text in warnings(caplog) if not text.startswith("Repo card metadata")]  # of a README.md
    assert ours == [f"6 file(s) of {folder} are not read, for example {folder}/README.md"]


def test_files_that_are_links_are_read_and_not_taken_for_others(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """The cache of the hub is made of such folders."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").symlink_to(write_jsonl(tmp_path / "blobs" / "0123", ["a"]))
    assert texts_of(source_of(tmp_path / "data"), True) == ["a"]
    assert warnings(caplog) == []


def test_text_wins_over_notes_however_many(tmp_path: Path):
    """`datasets` takes such notes for a data set of their own."""
    tmp_path = tmp_path / "data"
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    for name in ("one.md", "two.md", "three.toml"):
        (tmp_path / name).write_text("# notes\n")
    assert texts_of(source_of(tmp_path), False) == ["a"]


def test_of_as_many_files_the_kind_is_read_that_datasets_reads(tmp_path: Path):
    tmp_path = tmp_path / "data"
    write_jsonl(tmp_path / "a.jsonl", ["jsonl"])
    (tmp_path / "a.csv").write_text("text\ncsv\n")
    (tmp_path / "a.txt").write_text("txt")
    assert texts_of(source_of(tmp_path), True) == ["jsonl"]
    datasets.Dataset.from_dict({"text": ["parquet"]}).to_parquet(tmp_path / "a.parquet")
    assert texts_of(source_of(tmp_path), True) == ["parquet"]


def test_the_card_of_a_folder_says_which_files_are_read(tmp_path: Path):
    for name in ("one", "two"):
        write_jsonl(tmp_path / f"{name}.jsonl", [name])
    card = {"configs": [{"config_name": name, "data_files": f"{name}.jsonl"} for name in ("one", "two")]}
    (tmp_path / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    assert texts_of(source_of(tmp_path, subset="two"), False) == ["two"]
    with pytest.raises(ValueError, match="Config name is missing"):
        open_source(source_of(tmp_path))


def test_a_folder_without_text(tmp_path: Path):
    (tmp_path / "data").mkdir()
    for _ in range(2):
        with pytest.raises(ValueError, match="--dataset_name .*data.* cannot be opened"):
            open_source(source_of(tmp_path / "data"))
        (tmp_path / "data" / "core").touch()


def test_a_folder_in_the_cache_of_datasets_is_read(tmp_path: Path):
    builder = datasets.load_dataset_builder("json", data_files=str(write_jsonl(tmp_path / "a.jsonl", ["a"])))
    builder.download_and_prepare()
    assert texts_of(source_of(Path(builder.cache_dir)), False) == ["a"]


# ---- zstandard


@pytest.mark.parametrize("name", ["a.jsonl.zst", "A.TXT.ZST", "a.csv.zst"])
def test_without_the_package_a_line_says_what_zst_needs(tmp_path: Path, monkeypatch, name: str):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name != "zstandard" and find(name, *rest))
    (tmp_path / name).write_bytes(b"x")
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match="(?i)--dataset_name .*zst needs the package zstandard") as error:
            open_source(source_of(path))
        assert str(error.value).endswith("; pip install zstandard, or decompress the file")


@BOTH_FORMS
@pytest.mark.parametrize("skip_bad_rows", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl.zst", "A.TXT.ZST", "a.csv.zst"])
def test_zst_in_several_frames(tmp_path: Path, streaming: bool, skip_bad_rows: bool, name: str):
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed, and is not required")
    parts = {"c": [b"text\n", b"a\n", b"b\n"], "t": [b"a\n\n", b"b\n"], "j": [b'{"text": "a"}\n', b'{"text": "b"}\n']}
    frames = parts[name.split(".")[1][0].lower()]
    (tmp_path / name).write_bytes(b"".join(zstandard.compress(frame) for frame in frames))
    texts = texts_of(source_of(tmp_path / name, skip_bad_rows=skip_bad_rows), streaming)
    assert [text.strip() for text in texts] == ["a", "b"]


@BOTH_FORMS
def test_a_damaged_zst_is_named(tmp_path: Path, streaming: bool):
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed, and is not required")
    file = tmp_path / "a.jsonl.zst"
    file.write_bytes(zstandard.compress(b'{"text": "a"}\n' * 1000)[:-9] + b"\xff" * 9)
    with pytest.raises(ValueError, match=f"cannot be read: {file}, line .*: the compressed file is damaged"):
        texts_of(source_of(file), streaming)
