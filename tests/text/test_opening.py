"""text/opening.py: every kind of data is opened, without network too, and what is wrong is named with its flag."""

import dataclasses
import logging
import socket
from pathlib import Path

import datasets
import pytest

from tests.text.documents import (
    as_directory,
    as_gzip,
    as_json,
    as_jsonl,
    as_parquet,
    as_saved,
    as_saved_splits,
    as_txt,
    cache_as_hub_dataset,
    expected_windows,
    loader,
    options,
    random_documents,
    windows_of,
    write_jsonl,
)

KINDS = [as_jsonl, as_json, as_gzip, as_parquet, as_txt, as_directory, as_saved, as_saved_splits]
BOTH_FORMS = pytest.mark.parametrize("streaming", [False, True], ids=["cached", "stream"])


# ---- kinds of data


@BOTH_FORMS
@pytest.mark.parametrize("as_folder", [False, True])
def test_in_a_txt_file_blank_lines_separate_documents(tmp_path: Path, streaming: bool, as_folder: bool):
    documents = ["First Citizen:\nBefore we proceed, hear me.", "All:\nSpeak, speak.", "one line"] * 5
    file = as_txt(tmp_path, documents)
    name = tmp_path / "texts" if as_folder else file
    if as_folder:
        name.mkdir()
        file.rename(name / "a.txt")
    batches = loader(options(name, dataset_streaming=streaming, batch_size=1))
    assert sorted(windows_of(batches)) == sorted(expected_windows(documents))


@BOTH_FORMS
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_local_data_without_network(tmp_path: Path, monkeypatch, kind, streaming: bool):
    forbid_network(monkeypatch)
    documents = [document.replace("\n", " ") or "x" for document in random_documents(9, 40)]
    args = options(kind(tmp_path, documents), dataset_streaming=streaming, local_files_only=True, batch_size=1)
    assert sorted(windows_of(loader(args))) == sorted(expected_windows(documents))


def forbid_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_, **__):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@BOTH_FORMS
def test_hub_dataset_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool):
    forbid_network(monkeypatch)
    args = options("someone/something", dataset_streaming=streaming, local_files_only=True, batch_size=1)
    with pytest.raises(ValueError, match="'someone/something'.*not in the cache .*--local_files_only"):
        loader(args)
    documents = random_documents(10, 30)
    cache_as_hub_dataset(tmp_path, {"train": documents})
    assert sorted(windows_of(loader(args))) == sorted(expected_windows(documents))
    with pytest.raises(ValueError, match="--dataset_split 'test': no such split; available: train"):
        loader(dataclasses.replace(args, dataset_split="test"))
    assert not datasets.config.HF_HUB_OFFLINE  # as it was found


def test_files_of_another_kind_in_a_directory_are_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    directory = as_directory(tmp_path, random_documents(12, 40))
    loader(options(directory))
    assert not caplog.records
    as_txt(directory, ["notes"])
    loader(options(directory))
    assert "1 file(s) of" in caplog.text and "a.txt" in caplog.text


def test_split_expressions(tmp_path: Path):
    write_jsonl(tmp_path / "dir" / "train.jsonl", ["abcd" * 40] * 10)
    write_jsonl(tmp_path / "dir" / "test.jsonl", ["efgh" * 40])
    expected = expected_windows(["abcd" * 40, "efgh" * 40])
    for streaming in (False, True):
        args = options(tmp_path / "dir", dataset_split="train[:10%]+test", batch_size=1, dataset_streaming=streaming)
        assert sorted(windows_of(loader(args))) == sorted(expected)


def test_rows_without_text_are_skipped_cached_and_streamed(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    documents = random_documents(11, 30)
    path = write_jsonl(tmp_path / "a.jsonl", ["", *documents[:9], None, *documents[9:]])
    for streaming in (False, True):
        args = options(path, dataset_streaming=streaming, batch_size=1)
        with caplog.at_level(logging.INFO, "train"):
            assert sorted(windows_of(loader(args))) == sorted(expected_windows(documents))
    skipped = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert skipped == ["skipped 2 of 32 rows: no text in column 'text'"] * 2


# ---- what is wrong is named


@BOTH_FORMS
@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (
            ["a" * 99],
            {"dataset_text_field": "body"},
            "--dataset_text_field 'body': no such column; available: text",
        ),
        ([1, 2], {}, "--dataset_text_field 'text': the column holds .*int64.*, expected text"),
        ([["a"]], {}, "--dataset_text_field 'text': the column holds List.*, expected text"),
        (["a" * 99, 5, "b"], {}, "--dataset_text_field 'text': row 1 as read here holds int .5., expected text"),
        (["a" * 99], {"dataset_split": "test"}, "--dataset_split 'test': no such split; available: train"),
        (["a" * 99], {"dataset_subset": "en"}, "--dataset_subset 'en': .*; leave it out"),
        (["a" * 99], {"dataset_revision": "v1"}, "--dataset_revision 'v1': .*; leave it out"),
    ],
)
def test_wrong_columns_rows_splits(tmp_path: Path, streaming: bool, rows: list, changes: dict, message: str):
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        list(loader(options(path, dataset_streaming=streaming, **changes)))


@BOTH_FORMS
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "none.jsonl': no such file or directory"),
        ("none/such/dir", None, "none/such/dir': no such file or directory"),
        ("a.docx", b"x", "a.docx': unsupported file ending, expected one of .jsonl, .json, .ndjson, .csv, .tsv"),
        ("a.parquet.gz", b"x", "unsupported file ending"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "JSON parse error"),
        ("a.txt", b"", "--dataset_name|too small"),
    ],
)
def test_wrong_files(tmp_path: Path, streaming: bool, name: str, content: bytes | None, message: str):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        loader(options(tmp_path / name, dataset_streaming=streaming))


@BOTH_FORMS
def test_an_empty_file(tmp_path: Path, streaming: bool):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(ValueError, match="--dataset_name .*split 'train' has no rows"):
        loader(options(tmp_path / "a.jsonl", dataset_streaming=streaming))


@BOTH_FORMS
def test_wrong_directories(tmp_path: Path, streaming: bool):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="--dataset_name .*empty.* cannot be opened"):
        loader(options(tmp_path / "empty", dataset_streaming=streaming))
    as_saved_splits(tmp_path, ["a"])
    with pytest.raises(ValueError, match="--dataset_split 'dev': no such split; available: test, train"):
        loader(options(tmp_path / "saved", dataset_split="dev", dataset_streaming=streaming))
    write_jsonl(tmp_path / "dir" / "a.jsonl", ["a"])
    with pytest.raises(ValueError, match="subset 'en'.* cannot be opened.*default"):
        loader(options(tmp_path / "dir", dataset_subset="en", dataset_streaming=streaming))


@pytest.mark.timeout(60)
def test_a_rank_that_would_wait_for_the_file_sees_a_wrong_column_itself(tmp_path: Path):
    with pytest.raises(ValueError, match="--dataset_text_field 'body'"):
        loader(options(as_saved(tmp_path, ["a"]), dataset_text_field="body"), rank=1, world_size=2)
