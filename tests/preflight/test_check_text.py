"""What doctor.py finds about text, as it should be and damaged."""

import dataclasses
import json
import shutil

import datasets
import pytest

from preflight.checks import text as text_checks
from preflight.checks.basics import FAILURE, OK, WARNING, PlannedRun, run_check
from tests.preflight.cases import TINY, found, full_disk, planned, statuses, the_bad_one


def rows(path, *texts):
    path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts))
    return path


ENOUGH = ("--seq_length", 3, "--batch_size", 1, "--grad_accumulation_steps", 1, "--epochs", 1)  # for a few letters


@pytest.mark.parametrize("streaming", ["--dataset_streaming", "--no_dataset_streaming"])
def test_text_that_can_be_read(tmp_path, own_cache, streaming):
    file = rows(tmp_path / "text.jsonl", "abcd", "", "abcdef")
    finding, empty = found(text_checks.check_data, "--dataset_name", file, streaming, *ENOUGH)
    assert finding.status == OK and "2 of the first 3 rows have text, of 5 characters" in finding.found
    assert empty.status == WARNING and "skipped 1 of 3 rows" in empty.found


@pytest.mark.parametrize(
    "options,word",
    [
        (("--dataset_text_field", "content"), "no such column"),
        (("--dataset_text_field", "n"), "expected text"),
        (("--dataset_split", "test"), "no such split"),
        (("--dataset_split", "tset[:50%]"), "no such split"),
        (("--dataset_split", "train[:50%", "--dataset_streaming"), "--dataset_split"),
    ],
)
def test_text_that_cannot_be_read(tmp_path, own_cache, options, word):
    file = rows(tmp_path / "text.jsonl", "abcd")
    options = ("--dataset_name", file, "--no_dataset_streaming", *options)
    assert word in the_bad_one(found(text_checks.check_data, *options)).found


@pytest.mark.parametrize(
    "options,needed",
    [
        (("--dataset_streaming", "--batch_size", 2), 16),
        (("--dataset_streaming", "--batch_size", 2, "--grad_accumulation_steps", 2), 16),
        (("--no_dataset_streaming", "--batch_size", 2, "--grad_accumulation_steps", 2), 32),
        (("--no_dataset_streaming", "--batch_size", 2, "--grad_accumulation_steps", 4, "--epochs", 2), 32),
    ],
)
def test_text_that_fills_no_step_of_a_run(tmp_path, own_cache, options, needed):
    options = (*ENOUGH, *options, "--dataset_name", tmp_path / "text.jsonl")
    rows(tmp_path / "text.jsonl", *["~"] * (needed // 2))  # and an end-of-text each
    assert statuses(found(text_checks.check_data, *options, nproc=2)) == [OK]
    rows(tmp_path / "text.jsonl", *["~"] * (needed // 2 - 1))
    bad = the_bad_one(found(text_checks.check_data, *options, nproc=2))
    assert f"{needed - 2} tokens in all, expected {needed}" in bad.found and "use more text" in bad.remedy


def test_held_out_text_that_fills_no_window(tmp_path, own_cache):
    options = ("--eval_interval", 5, "--eval_dataset_name", rows(tmp_path / "text.jsonl", "~"), "--seq_length")
    assert statuses(found(text_checks.check_held_out_data, *options, 1)) == [OK]
    assert "2 tokens in all, expected 3" in the_bad_one(found(text_checks.check_held_out_data, *options, 2)).found


def test_data_that_is_not_there(tmp_path, own_cache):
    bad = the_bad_one(found(text_checks.check_data, "--dataset_name", tmp_path / "none.jsonl"))
    assert "no such file" in bad.found
    empty = rows(tmp_path / "empty.jsonl", "", "")
    bad = next(f for f in found(text_checks.check_data, "--dataset_name", empty) if f.status == FAILURE)
    assert "none of the first 2 rows has text" in bad.found
    hub = ("--dataset_name", "someone/something", "--dataset_subset", "part")
    bad = the_bad_one(found(text_checks.check_data, *hub, "--local_files_only"))
    assert "load_dataset('someone/something', 'part', split='train')" in bad.remedy
    online = dataclasses.replace(planned(*hub).args, local_files_only=False)
    bad = the_bad_one(run_check("data", text_checks.check_data, PlannedRun(online)), WARNING)
    assert "not on this disk" in bad.found


def test_a_data_set_of_the_hub_that_was_prepared_before(tmp_path, own_cache):
    """As `load_dataset` leaves it in its cache."""
    folder = own_cache / "someone___something" / "default" / "0.0.0" / ("0" * 40)
    folder.mkdir(parents=True)
    info = {"splits": {"train": {"name": "train", "num_bytes": 999, "num_examples": 30, "dataset_name": "something"}}}
    info |= {"dataset_size": 999, "version": "0.0.0", "config_name": "default", "dataset_name": "something"}
    table = datasets.Dataset.from_dict({"text": ["abcd"] * 30})
    info["features"] = {"text": {"dtype": "string", "_type": "Value"}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with datasets.arrow_writer.ArrowWriter(path=str(folder / "something-train.arrow"), features=table.features) as w:
        w.write_table(table.data.table)
        w.finalize()
    for more in (("--no_dataset_streaming", "--dataset_split", "train[:50%]"), ("--dataset_streaming",)):
        options = ("--dataset_name", "someone/something", "--local_files_only", *more)
        (finding,) = found(text_checks.check_data, *options)
        assert finding.status == OK and "16 of the first 16 rows" in finding.found
    options = ("--dataset_name", "someone/something", "--no_dataset_streaming")
    (finding,) = found(text_checks.check_room_for_packed_data, *options)
    assert finding.status == OK and "about 2e-06 GB" in finding.found, "its rows are there already: 3e-06 with them"


def test_of_a_part_of_a_split_the_first_rows_are_read(tmp_path, own_cache):
    file = rows(tmp_path / "text.jsonl", *["abcd"] * 40)
    options = ("--dataset_name", file, "--no_dataset_streaming", "--dataset_split", "train[:50%]")
    assert statuses(found(text_checks.check_data, *options)) == [OK]
    assert not list(own_cache.rglob("*.arrow")), "no table is made"


def test_held_out_text_is_checked_too(tmp_path, own_cache):
    assert found(text_checks.check_held_out_data) == []
    options = ("--eval_interval", 5, "--eval_dataset_name", tmp_path / "none.jsonl")
    assert "--eval_dataset_name" in the_bad_one(found(text_checks.check_held_out_data, *options)).found
    options = ("--eval_interval", 5, "--eval_mmlu_dir", tmp_path)
    assert "--eval_mmlu_dir" in the_bad_one(found(text_checks.check_held_out_data, *options)).found
    options = ("--eval_interval", 5, "--eval_mmlu_dir", TINY / "mmlu")
    assert statuses(found(text_checks.check_held_out_data, *options)) == [OK, OK]


def test_held_out_text_that_is_trained_on(tmp_path, own_cache):
    rows(tmp_path / "text.jsonl", *["abcdefgh"] * 40)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "text.jsonl")
    run = (*ENOUGH, "--no_dataset_streaming", "--dataset_name", tmp_path / "text.jsonl", "--eval_interval", 5)
    bad = the_bad_one(found(text_checks.check_held_out_data, *run, "--eval_dataset_name", tmp_path / "link.jsonl"))
    assert "all of it is trained on by the run" in bad.found and "keep a part from training" in bad.remedy
    parts = ("--dataset_split", "train[:60%]", "--eval_dataset_split")
    bad = the_bad_one(found(text_checks.check_held_out_data, *run, *parts, "train[40%:]"))
    assert "some of its rows are trained on by the run" in bad.found
    assert statuses(found(text_checks.check_held_out_data, *run, *parts, "train[60%:]")) == [OK]
    assert not list(own_cache.rglob("*.arrow")), "no table is made"


def test_room_for_packed_data(tmp_path, monkeypatch):
    options = ("--dataset_cache_dir", tmp_path / "packed")
    assert statuses(found(text_checks.check_room_for_packed_data, *options)) == [OK]
    assert found(text_checks.check_room_for_packed_data, "--dataset_streaming") == []
    monkeypatch.setattr(shutil, "disk_usage", full_disk(1_000_000))
    bad = the_bad_one(found(text_checks.check_room_for_packed_data, *options), WARNING)
    assert "about 0.0029 GB" in bad.found and "--dataset_cache_dir" in bad.remedy
    bad = the_bad_one(found(text_checks.check_room_for_packed_data, "--dataset_text_field", "n"), WARNING)
    assert "the data cannot be read" in bad.found
    (tmp_path / "file").write_text("")
    options = ("--dataset_cache_dir", tmp_path / "file")
    assert "cannot be written" in the_bad_one(found(text_checks.check_room_for_packed_data, *options)).found
