"""text/overlap.py: held-out rows are not rows of training, whatever both are called."""

import filecmp
import os
import shutil
from pathlib import Path

import pytest

from tests.text.documents import write_jsonl
from tests.text.files import texts_of
from tests.text.test_splits import BOTH_FORMS, KINDS, ROWS, TEST, files, hub, saved, saved_splits
from text import overlap
from text.overlap import TrainedOn, check_not_trained_on
from text.sources import SourceFlags, TextSource

pytestmark = pytest.mark.usefixtures("offline")

FLAGS = SourceFlags(name="--eval_dataset_name", split="--eval_dataset_split")


def source_of(name: object, split: str = "train", **more) -> TextSource:
    return TextSource(str(name), split=split, local_files_only=True, **more)


def check(held_out: tuple, training: tuple, **more) -> None:
    check_not_trained_on(source_of(*held_out, flags=FLAGS), source_of(*training), "this run", **more)


@BOTH_FORMS
@pytest.mark.parametrize("kind", KINDS)
def test_no_row_that_is_held_out_is_trained_on(tmp_path: Path, kind, streaming: bool):
    """Of every pair of parts of one split that is allowed, no row is in both; of every one that is refused, one is."""
    name, splits = kind(tmp_path), ["train", "train[:90%]", "train[90%:]", "train[2:52]"]
    rows = {split: set(texts_of(source_of(name, split, streaming=streaming), streaming)) for split in splits}
    for one in splits:
        for other in splits:
            try:
                check((name, one), (name, other))
                is_allowed = True
            except TrainedOn:
                is_allowed = False
            assert is_allowed == rows[one].isdisjoint(rows[other]), (one, other)


def test_the_rows_are_named(tmp_path: Path):
    with pytest.raises(TrainedOn) as error:
        check((saved(tmp_path), "train[80%:]"), (tmp_path / "saved", "train[:90%]"))
    for words in (
        f"--eval_dataset_name '{tmp_path}/saved', split 'train[80%:]': its rows 46 to 50 of split 'train' (from 0) "
        f"are trained on by this run (--dataset_name '{tmp_path}/saved', split 'train[:90%]'); give other text with ",
        '--dataset_split "train[:99%]" --eval_dataset_split "train[99%:]"',
    ):
        assert words in str(error.value)


def link(folder: Path) -> Path:
    (folder / "link.jsonl").symlink_to(folder / "train-2.jsonl")
    return folder / "link.jsonl"


def hard_link(folder: Path) -> Path:
    (folder / "other.jsonl").hardlink_to(folder / "train-2.jsonl")
    return folder / "other.jsonl"


def copy(folder: Path) -> Path:
    return Path(shutil.copy(folder / "train-2.jsonl", folder / "other.jsonl"))


@pytest.mark.parametrize("split", ["train", "train[:5%]", "test+train"])
@pytest.mark.parametrize("other", [link, hard_link, copy, lambda folder: folder / "train-2.jsonl"])
def test_a_file_of_a_folder_under_another_name(tmp_path: Path, other, split: str):
    folder = files(tmp_path)
    inside = other(folder)
    held_out = Path(shutil.move(inside, tmp_path)) if inside.name != "train-2.jsonl" else inside
    with pytest.raises(TrainedOn, match=rf"1 file\(s\) of it, for example {held_out}, are trained on"):
        check((held_out,), (folder, split))
    with pytest.raises(TrainedOn, match=rf"1 file\(s\) of it, for example {folder}/train-2.jsonl, are"):
        check((folder, split), (held_out,))
    check((held_out,), (folder, "test"))
    check((folder, "test"), (held_out,))


def test_a_folder_under_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "link").symlink_to(files(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("link", "data/../data", tmp_path / "data"):
        with pytest.raises(TrainedOn, match="its rows 46 to 50 of split 'train'"):
            check((name, "train[80%:]"), ("data", "train[:90%]"))
        check((name, "train[90%:]"), ("data", "train[:90%]"))
        check((name, "test"), ("data", "train"))


def test_one_split_of_a_saved_folder_by_the_name_of_its_own_folder(tmp_path: Path):
    folder = saved_splits(tmp_path)
    with pytest.raises(TrainedOn, match="all of it is trained on"):
        check((folder / "train",), (folder,))
    with pytest.raises(TrainedOn, match="its rows 10 to 19 of split 'train'"):
        check((folder / "train", "train[10:30]"), (folder, "train[:20]"))
    check((folder / "test",), (folder,))
    shutil.copytree(folder / "train", tmp_path / "copy")
    with pytest.raises(TrainedOn, match="all of it is trained on"):
        check((tmp_path / "copy",), (folder,))


def test_other_data_is_not_looked_at(tmp_path: Path):
    name = hub(tmp_path)
    check((write_jsonl(tmp_path / "a.jsonl", ROWS),), (name,))
    check(("someone/else",), (name,))
    check((name, "test"), (name,))
    with pytest.raises(TrainedOn, match="all of it is trained on"):
        check((name,), (name,))


def test_where_rows_are_not_counted_what_overlaps_anyway_is_found(tmp_path: Path, own_cache: Path):
    """As for doctor.py, which makes no table."""
    folder = files(tmp_path)
    for one, other in [("train[:60%]", "train[40%:]"), ("train", "train[5000:]"), ("train[:100]", "train[99:]")]:
        with pytest.raises(TrainedOn, match="some of its rows are|all of it is"):
            check((folder, one), (folder, other), may_count=False)
    for one, other in [("train[:90%]", "train[90%:]"), ("train[:100]", "train[100:]"), ("train[:100]", "train[-9:]")]:
        check((folder, one), (folder, other), may_count=False)
    assert not list(own_cache.rglob("*.arrow")), "no table is made"


def test_copies_in_another_order_have_other_rows(tmp_path: Path):
    for folder, names in (("one", ("a", "b")), ("two", ("b", "a"))):
        for name, rows in zip(names, (ROWS[:20], TEST), strict=True):
            write_jsonl(tmp_path / folder / f"{name}.jsonl", rows)
    with pytest.raises(TrainedOn, match=r"2 file\(s\) of it, for example"):  # rows 0 to 8 of two are TEST
        check((tmp_path / "one", "train[20:]"), (tmp_path / "two", "train[:9]"))


def test_empty_files_are_not_copies_of_each_other(tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "empty.jsonl").touch()
        write_jsonl(tmp_path / name / "a.jsonl", [name])
    assert os.path.getsize(tmp_path / "one" / "a.jsonl") == os.path.getsize(tmp_path / "two" / "a.jsonl")
    check((tmp_path / "one",), (tmp_path / "two",))


def test_no_table_is_made_of_data_that_has_no_file_in_common(tmp_path: Path, own_cache: Path):
    held_out = write_jsonl(tmp_path / "a.jsonl", ROWS)
    check((held_out, "train[:9]"), (files(tmp_path), "train[:90%]"))
    assert not list(own_cache.rglob("*.arrow"))


def test_files_of_one_size_are_compared_whole_only_if_they_begin_and_end_alike(tmp_path: Path, monkeypatch):
    compared, whole = [], filecmp.cmp
    monkeypatch.setattr(filecmp, "cmp", lambda one, other, shallow: compared.append(one) or whole(one, other, shallow))
    for folder in ("one", "two"):
        for i in range(9):
            write_jsonl(tmp_path / folder / f"{i}.jsonl", [f"{folder}{i}" + "x" * 100])
    check((tmp_path / "one",), (tmp_path / "two",))
    assert not compared
    end = "x" * overlap.END_BYTES
    one, two = (write_jsonl(tmp_path / f"{word}.jsonl", [end + word + end]) for word in ("day", "sea"))
    check((one,), (two,))
    assert compared == [str(one)]
