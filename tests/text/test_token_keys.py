"""text/token_file.py: by what packed tokens are found. Those of an earlier state of this repository, or of a cache that
was moved, are found: packing 500 GB once more takes days.
"""

from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from tests.text.documents import as_jsonl, as_parquet, as_saved, as_saved_splits, as_txt, small_tokenizer, write_jsonl
from tests.text.files import source_of
from text.encoding import Encoder
from text.opening import open_source
from text.token_file import token_file_inputs

pytestmark = pytest.mark.usefixtures("offline")

ROWS = [f"row {i}" for i in range(40)]


def key_of(path: Path, **changes) -> dict[str, object]:
    source = source_of(path, **changes)
    return token_file_inputs(open_source(source), source, Encoder(small_tokenizer()))


def in_folder(kind: Callable[[Path, list[str]], Path]) -> Callable[[Path, list[str]], Path]:
    def write(path: Path, rows: list[str]) -> Path:
        (path / "folder").mkdir()
        return kind(path / "folder", rows).parent

    write.__name__ = f"folder of {kind.__name__}"
    return write


def with_splits_and_a_card(path: Path, rows: list[str]) -> Path:
    for split in ("train", "test"):
        write_jsonl(path / "folder" / f"{split}.jsonl", rows)
    (path / "folder" / "notes.txt").write_text("of another kind, and fewer")
    (path / "folder" / "README.md").write_text("# Without settings\n")
    return path / "folder"


FILES = {as_jsonl: "json", as_txt: "text", as_parquet: "parquet"}
FOLDERS = [*map(in_folder, FILES), with_splits_and_a_card]


def of_builder(reader: str, **settings: object) -> str:
    """Returns the name that `datasets` has for the data, as the first released token files have it."""
    return "/".join(Path(datasets.load_dataset_builder(reader, **settings).cache_dir).parts[-4:])


@pytest.mark.parametrize("split", ["train", "train[:50%]"])
@pytest.mark.parametrize("kind", FILES, ids=lambda kind: kind.__name__)
def test_tokens_of_a_file_are_found_by_the_name_that_datasets_has_for_it(tmp_path: Path, kind, split: str):
    path, reader = kind(tmp_path, ROWS), FILES[kind]
    path = path.rename(tmp_path / f"a{path.suffix}")  # no pattern, which `datasets` would not take
    more = {"sample_by": "paragraph"} if kind is as_txt else {}
    key = key_of(path, split=split)
    assert key["fingerprint"] == of_builder(reader, data_files=str(path), **more)
    assert str(key["fingerprint"]).startswith(f"{reader}/default-") and key["split"] == split
    assert key["files"] == [[str(path), path.stat().st_size, path.stat().st_mtime_ns]]


@pytest.mark.parametrize("split", ["train", "train[:50%]"])
@pytest.mark.parametrize("kind", FOLDERS, ids=lambda kind: kind.__name__)
def test_tokens_of_a_folder_are_found_by_the_name_that_datasets_has_for_it(tmp_path: Path, kind, split: str):
    path = kind(tmp_path, ROWS)
    more = {"sample_by": "paragraph"} if next(path.glob("a.txt"), None) else {}
    key = key_of(path, split=split)
    assert key["fingerprint"] == of_builder(str(path), **more)
    assert str(key["fingerprint"]).startswith("folder/default") and key["split"] == split
    assert {Path(name).parent for name, *_ in key["files"]} == {path}  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [as_saved, as_saved_splits], ids=lambda kind: kind.__name__)
def test_tokens_of_a_whole_saved_table_are_found_by_its_fingerprint_and_a_part_has_its_own(tmp_path: Path, kind):
    path = kind(tmp_path, ROWS)
    saved = datasets.load_from_disk(str(path))
    table = saved["train"] if isinstance(saved, datasets.DatasetDict) else saved
    assert key_of(path)["fingerprint"] == table._fingerprint
    assert key_of(path, split="train[:50%]")["fingerprint"] != table._fingerprint


@pytest.mark.parametrize("name", ["B.JSONL", "b.jsonl.bak"])
def test_a_folder_of_which_datasets_would_read_other_files_has_another_key(tmp_path: Path, name: str):
    """`datasets` takes the copy for text, and knows no upper case in the names of splits."""
    path = write_jsonl(tmp_path / "folder" / "a.jsonl", ROWS).parent
    write_jsonl(path / (f"TEST-{name}" if name == "B.JSONL" else name), ROWS)
    assert key_of(path)["fingerprint"] != of_builder(str(path))


def test_the_place_of_the_cache_is_no_part_of_a_key(tmp_path: Path):
    for path in (tmp_path / "a.csv", tmp_path / "folder" / "a.csv"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("text\na\nb\n")
        keys = [key_of(path, cache_dir=str(tmp_path / cache)) for cache in ("one", "two")]
        assert keys[0] == keys[1]
    path = write_jsonl(tmp_path / "texts" / "a.jsonl", ROWS)
    for name in (path, path.parent):
        assert key_of(name, cache_dir=str(tmp_path / "one")) == key_of(name, cache_dir=str(tmp_path / "two"))
