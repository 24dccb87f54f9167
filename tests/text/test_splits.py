"""text/splits.py: a split, or a part of one, means the same rows for every kind of data, as a table and as a stream."""

import gzip
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from tests.text.documents import cache_as_hub_dataset, write_jsonl
from tests.text.files import source_of, texts_of
from text.opening import open_source, open_stream
from text.sources import TextSource
from text.splits import parts_of

pytestmark = pytest.mark.usefixtures("offline")

ROWS = [f"row {i}" for i in range(57)]
TEST = [f"test {i}" for i in range(9)]


def hub(folder: Path) -> str:
    cache_as_hub_dataset(folder, {"train": ROWS, "test": TEST})
    return "someone/something"


def files(folder: Path) -> Path:
    for name, rows in (("train-1", ROWS[:20]), ("train-2", ROWS[20:]), ("test", TEST)):
        write_jsonl(folder / "data" / f"{name}.jsonl", rows)
    return folder / "data"


def file(folder: Path) -> Path:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(b'{"text": "%s"}\n' % row.encode() for row in ROWS)))
    return folder / "a.jsonl.gz"


def csv(folder: Path) -> Path:
    (folder / "a.csv").write_text("\n".join(["text", *ROWS]))
    return folder / "a.csv"


def saved(folder: Path, split: str | None = None) -> Path:
    table = datasets.Dataset.from_dict({"text": ROWS}, split=split)
    table.save_to_disk(folder / "saved", num_shards=3)
    return folder / "saved"


def saved_that_knows_its_split(folder: Path) -> Path:
    return saved(folder, "train")


def saved_part_that_knows_its_split(folder: Path) -> Path:
    return saved(folder, "train[:57]")


def saved_splits(folder: Path) -> Path:
    tables = {name: datasets.Dataset.from_dict({"text": rows}) for name, rows in (("train", ROWS), ("test", TEST))}
    datasets.DatasetDict(tables).save_to_disk(folder / "saved")
    return folder / "saved"


WITH_TEST = [hub, files, saved_splits]
KINDS = [*WITH_TEST, file, csv, saved, saved_that_knows_its_split, saved_part_that_knows_its_split]
BOTH_FORMS = pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])


def rows_of_split(name: object, split: str, streaming: bool) -> list[str]:
    return texts_of(source_of(name, split=split, local_files_only=True, streaming=streaming), streaming)  # type: ignore[arg-type]


@BOTH_FORMS
@pytest.mark.parametrize("kind", KINDS)
def test_a_part_is_the_same_rows_for_every_kind_of_data(tmp_path: Path, kind: Callable, streaming: bool):
    name = kind(tmp_path)
    for split, expected in {
        "train": ROWS,
        "train[:90%]": ROWS[:51],  # 51.3
        "train[90%:]": ROWS[51:],
        "train[10:-10]": ROWS[10:-10],
        "train[:3]+train[50:]": [*ROWS[:3], *ROWS[50:]],
        "train[:100%]": ROWS,
    }.items():
        assert rows_of_split(name, split, streaming) == expected, split


@BOTH_FORMS
@pytest.mark.parametrize("kind", WITH_TEST)
def test_sums_of_splits(tmp_path: Path, kind: Callable, streaming: bool):
    name = kind(tmp_path)
    assert rows_of_split(name, "test[:2]+train[55:]", streaming) == [*TEST[:2], *ROWS[55:]]
    assert sorted(rows_of_split(name, "all", streaming)) == sorted([*ROWS, *TEST])
    assert sorted(rows_of_split(name, "train+test", streaming)) == sorted([*ROWS, *TEST])


@BOTH_FORMS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("trian", "no such split; available: .*train"),
        ("trian[:90%]", "no such split; available: .*train"),
        ("train+trian[9:]", "no such split; available: .*train"),
        ("all[:5]", "no such split; available: .*train"),
        ("train[:90", "expected names of splits and whole numbers"),
        ("train[:90.5%]", "expected names of splits and whole numbers"),
        ("train[:900%]", "expected names of splits and whole numbers"),
    ],
)
def test_a_wrong_split_is_refused_when_it_is_opened(tmp_path: Path, kind: Callable, streaming: bool, split, words):
    source = source_of(kind(tmp_path), split=split, local_files_only=True, streaming=streaming)
    with pytest.raises(ValueError, match=f"--dataset_split '.*': .*{words}"):
        open_source(source)


@BOTH_FORMS
@pytest.mark.parametrize("kind", KINDS)
def test_a_part_without_rows_is_refused(tmp_path: Path, kind: Callable, streaming: bool):
    with pytest.raises(ValueError, match="split 'train.57:.' has no rows"):
        rows_of_split(kind(tmp_path), "train[57:]", streaming)


def test_a_part_of_a_stream_does_not_download_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub(tmp_path)
    source = TextSource("someone/something", split="train[:9]", local_files_only=True)
    builder = open_source(source)
    monkeypatch.setattr(type(builder), "cache_dir", str(tmp_path / "not there"), raising=False)
    builder._cache_dir = str(tmp_path / "not there")
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    with pytest.raises(ValueError, match="--dataset_split 'train.:9.': a part is found by reading all rows.*--no_data"):
        open_source(source)


def test_rounding_is_that_of_datasets():
    (part,) = parts_of(TextSource("x", split="train[33%:66%](pct1_dropremainder)"), {"train": 199})
    assert (part.first, part.end, part.is_whole) == (33, 66, False)


def test_a_whole_table_keeps_its_fingerprint_and_its_tokens(tmp_path: Path):
    whole, part = (open_source(source_of(saved(tmp_path), split=split)) for split in ("train", "train[:56]"))
    assert isinstance(whole, datasets.Dataset) and isinstance(part, datasets.Dataset)
    assert whole._fingerprint == datasets.load_from_disk(str(tmp_path / "saved"))._fingerprint != part._fingerprint


def test_a_part_that_is_streamed_has_shards_to_share_out(tmp_path):
    """Each rank of one shard would read all rows to keep its own; a whole table stays one, for streams begun before."""
    datasets.Dataset.from_dict({"text": [str(i) for i in range(2000)]}).save_to_disk(tmp_path / "saved")
    for split, shards in ("train", 1), ("train[:1000]", 840), ("train[:50]", 1):
        source = TextSource(str(tmp_path / "saved"), split=split)
        stream = open_stream(open_source(source), source)
        assert stream.num_shards == shards
        texts = sorted(int(row["text"]) for row in stream)
        assert texts == list(range({"train": 2000, "train[:1000]": 1000, "train[:50]": 50}[split]))
