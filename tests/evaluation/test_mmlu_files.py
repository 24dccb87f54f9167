"""MMLU's rows from all three places they can be in, and what is said where they are not."""

import shutil
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaluation import mmlu_files
from evaluation.mmlu_files import load_mmlu
from tests.evaluation.mmlu_data import GEOGRAPHY, LOGIC, write_mmlu, write_parquet, write_snapshot

# The original release


def test_fields_with_commas_quotes_and_newlines_survive(mmlu_dir):
    logic, geography = load_mmlu(mmlu_dir)
    assert (logic.name, geography.name) == ("logic", "world_geography")
    assert [[e.question, *e.choices, e.answer] for e in logic.test] == LOGIC
    assert [[e.question, *e.choices, e.answer] for e in geography.dev] == GEOGRAPHY
    assert [[e.question, *e.choices, e.answer] for e in geography.test] == GEOGRAPHY[::-1]


def test_only_the_subjects_asked_for_in_that_order_and_once(mmlu_dir):
    asked = ["world_geography", "logic", "world_geography"]
    assert [s.name for s in load_mmlu(mmlu_dir, asked)] == ["world_geography", "logic"]
    assert [s.name for s in load_mmlu(mmlu_dir, ["logic"])] == ["logic"]


@pytest.mark.parametrize(
    "row",
    [["q", "1", "2", "3", "4"], ["q", "1", "2", "3", "4", "E"], ["q", "1", "2", "3", "4", "A", "B"], []],
)
def test_a_malformed_row_is_named(mmlu_dir, row):
    write_mmlu(mmlu_dir, {"test/logic_test": [LOGIC[0], row]})
    with pytest.raises(ValueError, match=r"logic_test\.csv, row 1 "):
        load_mmlu(mmlu_dir)


def test_bytes_that_are_not_utf8_name_the_file(mmlu_dir):
    (mmlu_dir / "dev" / "logic_dev.csv").write_bytes("Zoë?,1,2,3,4,A\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"logic_dev\.csv, row 0 "):
        load_mmlu(mmlu_dir)


def test_an_unknown_subject_gets_the_nearest_names(mmlu_dir):
    with pytest.raises(ValueError, match="--subjects word geography.*did you mean world_geography"):
        load_mmlu(mmlu_dir, ["logic", "word geography"])
    with pytest.raises(ValueError, match="--subjects zzz.*there are logic, world_geography"):
        load_mmlu(mmlu_dir, ["zzz"])


def test_a_folder_without_data_is_named(tmp_path, mmlu_dir):
    with pytest.raises(ValueError, match="--mmlu_dir .*nowhere.*is not a folder"):
        load_mmlu(tmp_path / "nowhere")
    (tmp_path / "empty" / "dev").mkdir(parents=True)
    with pytest.raises(ValueError, match="--mmlu_dir .*empty.*holds no"):
        load_mmlu(tmp_path / "empty")
    (mmlu_dir / "dev" / "logic_dev.csv").unlink()
    with pytest.raises(ValueError, match="do not both have logic"):
        load_mmlu(mmlu_dir)
    (mmlu_dir / "dev" / "logic_dev.csv").touch()
    with pytest.raises(ValueError, match=r"logic_dev\.csv.*empty"):
        load_mmlu(mmlu_dir)


# cais/mmlu


@pytest.fixture
def snapshot(tmp_path, mmlu_dir) -> Path:
    return write_snapshot(tmp_path / "snapshot", load_mmlu(mmlu_dir))


def test_a_snapshot_gives_the_rows_of_the_original_release(mmlu_dir, snapshot):
    assert load_mmlu(snapshot) == load_mmlu(mmlu_dir)
    assert load_mmlu(snapshot, ["logic"]) == load_mmlu(mmlu_dir, ["logic"])
    with pytest.raises(ValueError, match="--subjects logik.*did you mean logic"):
        load_mmlu(snapshot, ["logik"])


def put_all_together(snapshot: Path, subjects: list) -> Path:
    """Adds a folder `all` with the rows of every subject, as cais/mmlu has; the folders by subject stay."""
    for split in ("dev", "test"):
        parts = [snapshot / s.name / f"{split}-00000-of-00001.parquet" for s in subjects]
        (snapshot / "all").mkdir(exist_ok=True)
        together = pa.concat_tables([pq.read_table(part) for part in parts])
        pq.write_table(together, snapshot / "all" / f"{split}-00000-of-00001.parquet")
    return snapshot


def test_of_a_snapshot_the_folder_all_is_enough(mmlu_dir, snapshot, tmp_path):
    subjects = load_mmlu(mmlu_dir)
    put_all_together(snapshot, subjects)
    assert load_mmlu(snapshot) == subjects  # `all` is no subject
    alone = tmp_path / "alone"
    alone.mkdir()
    (snapshot / "all").rename(alone / "all")
    assert load_mmlu(alone) == subjects


def test_a_snapshot_with_holes_is_named(snapshot, mmlu_dir):
    (snapshot / "logic" / "dev-00000-of-00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"logic has 0 file\(s\) dev-\*\.parquet"):
        load_mmlu(snapshot)
    file = snapshot / "logic" / "test-00000-of-00001.parquet"
    write_parquet(snapshot / "logic" / "dev-00000-of-00001.parquet", "logic", load_mmlu(mmlu_dir, ["logic"])[0].dev)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"--mmlu_dir: .*logic/test.*cannot be read"):
        load_mmlu(snapshot)
    file.rename(file.with_name("test-00000-of-00002.parquet"))
    with pytest.raises(ValueError, match=r"logic has 1 file\(s\) test-\*\.parquet, not as many"):
        load_mmlu(snapshot)


@pytest.mark.parametrize(
    "change",
    [
        {"choices": ["1", "2", "3"]},
        {"choices": ["1", "2", "3", None]},
        {"choices": "1234"},
        {"answer": 4},
        {"answer": 1.0},
        {"answer": "B"},
        {"answer": None},
        {"question": None},
        {"question": 7},
    ],
)
def test_a_row_of_a_snapshot_that_is_no_question_is_named(snapshot, change):
    good = {"question": "q", "choices": ["1", "2", "3", "4"], "answer": 1, "subject": "logic"}
    file = snapshot / "logic" / "test-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist([good]), file)
    load_mmlu(snapshot, ["logic"])
    pq.write_table(pa.Table.from_pylist([good | change]), file)
    with pytest.raises(ValueError, match="--mmlu_dir: .*logic, row 0 .*four choices"):
        load_mmlu(snapshot, ["logic"])


def test_a_subject_without_questions_is_named(snapshot):
    """It would be missing in the results, and a run of such subjects alone would measure nothing."""
    file = snapshot / "logic" / "test-00000-of-00001.parquet"
    pq.write_table(pq.read_table(file).slice(0, 0), file)
    with pytest.raises(ValueError, match="--mmlu_dir .*: 'logic' has no question"):
        load_mmlu(snapshot)
    (snapshot / "all").mkdir()
    for split in ("dev", "test"):
        pq.write_table(pq.read_table(file), snapshot / "all" / f"{split}-00000-of-00001.parquet")
    shutil.rmtree(snapshot / "logic")
    shutil.rmtree(snapshot / "world_geography")
    with pytest.raises(ValueError, match="--mmlu_dir .*: its split `test` has no question"):
        load_mmlu(snapshot)


def test_a_file_that_cannot_be_read_is_named(mmlu_dir):
    file = mmlu_dir / "test" / "logic_test.csv"
    file.unlink()
    file.mkdir()
    with pytest.raises(ValueError, match=r"logic_test.csv: cannot be read \(Is a directory\)"):
        load_mmlu(mmlu_dir)


def test_all_together_needs_to_say_of_which_subject(snapshot, mmlu_dir, tmp_path):
    alone = tmp_path / "alone"
    for split in ("dev", "test"):
        write_parquet(alone / "all" / f"{split}-00000-of-00001.parquet", None, load_mmlu(mmlu_dir)[0].test)
    with pytest.raises(ValueError, match="--mmlu_dir: .*column `subject`"):
        load_mmlu(alone)


def test_a_mark_at_the_beginning_of_a_file_is_no_part_of_a_question(mmlu_dir):
    before = load_mmlu(mmlu_dir)
    for file in mmlu_dir.rglob("*.csv"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_mmlu(mmlu_dir) == before


@pytest.fixture
def hub(monkeypatch, own_cache, mmlu_dir, snapshot):
    """Stands in for the hub: `datasets` gets a local folder instead of the name, and the cache is empty."""
    card = ["---", "configs:", "- config_name: all", "  data_files:"]
    card += [line for split in ("dev", "test") for line in (f"  - split: {split}", f"    path: all/{split}-*")]
    put_all_together(snapshot, load_mmlu(mmlu_dir))
    (snapshot / "README.md").write_text("\n".join([*card, "---", ""]))
    monkeypatch.setattr(mmlu_files, "HUB_NAME", str(snapshot))

    def nothing_in_the_cache(*args, **kwargs):
        raise FileNotFoundError("not in the cache")

    monkeypatch.setattr(mmlu_files, "snapshot_download", nothing_in_the_cache)
    return snapshot


def test_without_a_folder_the_data_set_is_loaded_by_its_name(hub, mmlu_dir):
    assert load_mmlu(None) == load_mmlu(mmlu_dir)


def test_what_hf_download_has_left_is_found_first(hub, mmlu_dir, monkeypatch):
    monkeypatch.setattr(mmlu_files, "snapshot_download", lambda *args, **kwargs: str(hub))
    monkeypatch.setattr(datasets, "load_dataset", None)  # is not asked
    assert load_mmlu(None, local_files_only=True) == load_mmlu(mmlu_dir)


def test_one_subject_in_the_cache_is_not_all_of_mmlu(hub, mmlu_dir, monkeypatch, tmp_path):
    """A run of lm-eval on one subject leaves that alone."""
    part = write_snapshot(tmp_path / "part", load_mmlu(mmlu_dir, ["logic"]))
    monkeypatch.setattr(mmlu_files, "snapshot_download", lambda *args, **kwargs: str(part))
    assert load_mmlu(None) == load_mmlu(mmlu_dir)  # as `datasets` finds it


def test_a_data_set_that_is_nowhere_is_one_error(hub, monkeypatch):
    monkeypatch.setattr(mmlu_files, "HUB_NAME", "cais/mmlu")
    with pytest.raises(ValueError, match="--mmlu_dir: not given, and cais/mmlu is neither .*hf download cais/mmlu"):
        load_mmlu(None, local_files_only=True)
