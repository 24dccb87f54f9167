"""What is wrong in a dataset is named by file and row, or with --skip_bad_rows skipped, counted and logged."""

import dataclasses
import json
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import PackedTextDataset
from tests.text.documents import EOS, plain_ids, small_tokenizer
from tests.text.files import (
    FAULTS,
    GOOD,
    jsonl_with,
    source_of,
    texts_of,
    warnings,
    whole_parquet,
    without,
    write_ragged_jsonl,
    write_txt,
)
from text.encoding import Encoder
from text.opening import open_source, open_stream
from text.stream import TextStream
from text.token_file import token_file_inputs, write_token_file

BOTH_FORMS = pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
EACH_FAULT = pytest.mark.parametrize("fault", FAULTS)


# ---- rows that `datasets` reads, whatever they hold


@BOTH_FORMS
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
    assert ids.count(encoder.separator_id) == len(texts)
    assert ids == plain_ids(texts)


@BOTH_FORMS
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


@BOTH_FORMS
def test_rows_of_another_type_in_a_saved_table_cannot_be_skipped_but_empty_ones_are(tmp_path: Path, streaming, caplog):
    datasets.Dataset.from_dict({"text": ["a", None, "", "b"]}).save_to_disk(tmp_path / "saved")
    assert texts_of(source_of(tmp_path / "saved", skip_bad_rows=True), streaming) == ["a", "b"]
    assert "is read by `datasets`, which stops at a row that it cannot read" in caplog.text
    assert warnings(caplog)[-1] == "skipped 2 of 4 rows: no text in column 'text'"


# ---- files with a fault: which row is named, and what is left when it is skipped


@BOTH_FORMS
@EACH_FAULT
def test_a_fault_is_named_by_file_and_row(tmp_path: Path, streaming: bool, fault: str):
    write, place, _ = FAULTS[fault]
    file = write(tmp_path)
    with pytest.raises(ValueError, match=rf"--dataset_name '.*' cannot be read: {tmp_path}/{place}") as caught:
        texts_of(source_of(file), streaming)
    assert "correct it, or leave such rows out with --skip_bad_rows" in str(caught.value)


@BOTH_FORMS
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


def test_each_rank_counts_its_own_bad_rows_and_resumes_counting(tmp_path: Path, caplog):
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


def test_a_fault_in_a_split_that_is_prepared_with_the_one_asked_for_is_named(tmp_path: Path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a"}\n')
    (folder / "test.jsonl").write_text('{"text": "b"}\n{"text"\n')
    with pytest.raises(ValueError, match=r"test.jsonl, line 2: JSON parse error"):
        texts_of(source_of(folder), False)
    assert texts_of(source_of(folder), True) == ["a"]


def test_what_datasets_alone_objects_to_is_passed_on(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "text": "b"}')
    with pytest.raises(
        ValueError, match="cannot be read: .*specified twice.*; --skip_bad_rows reads the rows that can"
    ):
        texts_of(source_of(tmp_path / "a.jsonl"), True)


# ---- what --skip_bad_rows does not change


@BOTH_FORMS
def test_a_wrong_column_is_named_with_the_option_too(tmp_path: Path, streaming: bool):
    for write in (write_ragged_jsonl, whole_parquet, write_txt):
        file = write(tmp_path)
        source = source_of(file, skip_bad_rows=True, text_field="body")
        with pytest.raises(ValueError, match="--dataset_text_field 'body': no such column; available: .*text"):
            texts_of(source, streaming)
        file.unlink()


@BOTH_FORMS
def test_splits_with_the_option(tmp_path: Path, streaming: bool):
    for split, text in (("train", "a"), ("test", "b")):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": text}))
    source = source_of(tmp_path, skip_bad_rows=True)
    assert texts_of(source, streaming) == ["a"]
    assert texts_of(dataclasses.replace(source, split="test"), streaming) == ["b"]
    assert sorted(texts_of(dataclasses.replace(source, split="train+test"), streaming)) == ["a", "b"]
    with pytest.raises(ValueError, match=r"--dataset_split 'train\[:1%\]': with --skip_bad_rows .*leave out the part"):
        texts_of(dataclasses.replace(source, split="train[:1%]"), streaming)


@BOTH_FORMS
def test_nothing_to_read_is_an_error_with_the_option_too(tmp_path: Path, streaming: bool):
    file = tmp_path / "a.jsonl"
    file.write_text("{\n")
    with pytest.raises(ValueError, match=f"cannot be read: {file}, line 1: JSON parse error.*; correct it"):
        texts_of(source_of(file, skip_bad_rows=True), streaming)
    file.write_text("\n")
    with pytest.raises(ValueError, match="--dataset_name .*split 'train' has no rows"):
        texts_of(source_of(file, skip_bad_rows=True), streaming)
    file.write_text("{\n" * 200 + '{"text": "a"}')
    assert texts_of(source_of(file, skip_bad_rows=True), streaming) == ["a"]


@pytest.mark.parametrize("split", ["train[:1", "train[:101%]", "train[0.5%:]"])
def test_a_wrong_split_of_a_stream_is_not_taken_for_bad_data(tmp_path: Path, split: str):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    with pytest.raises(ValueError, match=rf"^--dataset_split '{re.escape(split)}': .*; expected names of splits and"):
        texts_of(source_of(tmp_path / "a.jsonl", split=split), True)


def test_a_packed_file_is_not_shared_with_one_that_skipped_rows(tmp_path: Path):
    source, encoder = source_of(write_ragged_jsonl(tmp_path)), Encoder(small_tokenizer())
    plain, skipping = (
        token_file_inputs(open_source(each), each, encoder)
        for each in (source, dataclasses.replace(source, skip_bad_rows=True))
    )
    assert skipping == {**plain, "skip_bad_rows": True}
