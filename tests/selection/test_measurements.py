"""Rows of measured.jsonl: written, read, and damaged."""

import pytest

from selection.measurements import Measured, name_of
from selection.probes import Score
from selection.swaps import Figures

SHAPES = {"choosing": (2, {"copying": 1}), "ablation": (0, {"copying": 1})}
ROW = Figures([0.25, 1e-7], {"copying": Score([2.5], [0.5])})


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "measured.jsonl"
    rows = Measured(path, SHAPES)
    rows.put("choosing 1,2", ROW)
    rows.put("ablation 3,1", Figures([], ROW.probes))
    rows.close()
    return path


def test_rows_are_read_as_they_were_written(file):
    rows = Measured(file, SHAPES)
    assert rows["choosing 1,2"] == ROW and "ablation 3,1" in rows and "choosing 1" not in rows
    assert name_of("choosing", [2, 1]) == "choosing 1,2" and name_of("ablation", (3, 1)) == "ablation 3,1"


def test_a_row_that_was_not_written_to_its_end_is_dropped(file, caplog):
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    rows = Measured(file, SHAPES)
    assert list(rows.rows) == ["choosing 1,2"] and "last row was not written to its end" in caplog.text
    rows.put("ablation 3,1", Figures([], ROW.probes))
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    "row",
    [
        b"{",
        b"[]",
        b'{"name": "choosing 1", "kl": [0.1, 0.2]}',
        b'{"name": "choosing 1", "kl": [0.1], "probes": {"copying": {"loss": [1], "acc": [1]}}}',
        b'{"name": "choosing 1", "kl": [0.1, NaN], "probes": {"copying": {"loss": [1], "acc": [1]}}}',
        b'{"name": "choosing 1", "kl": [0.1, "2"], "probes": {"copying": {"loss": [1], "acc": [1]}}}',
        b'{"name": "choosing 1", "kl": [0.1, 0.2], "probes": {"copying": {"loss": [1, 2], "acc": [1]}}}',
        b'{"name": "choosing 1", "kl": [0.1, 0.2], "probes": {}}',
        b'{"name": "elsewhere 1", "kl": [], "probes": {}}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_or_short_row_is_one_line(file, row):
    file.write_bytes(file.read_bytes() + row + b"\n")
    with pytest.raises(ValueError) as error:
        Measured(file, SHAPES)
    text = str(error.value)
    assert f"{file}: row 3 is damaged" in text and "delete that line" in text and "\n" not in text
