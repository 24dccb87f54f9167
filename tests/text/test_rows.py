"""text/rows.py: rows without text are skipped and counted, and other rows that are no text are named."""

import logging

import pytest

from text.rows import RowCounts, only_texts
from text.sources import TextSource


def test_rows_without_text_are_skipped_and_counted_once(caplog):
    with caplog.at_level(logging.WARNING, "train"):
        assert list(only_texts(["a", None, "", "b", None], TextSource("rows"))) == ["a", "b"]
    assert [record.getMessage() for record in caplog.records] == ["skipped 3 of 5 rows: no text in column 'text'"]


def test_row_that_is_not_text_is_named():
    with pytest.raises(ValueError, match="--dataset_text_field 'body': row 2 as read here holds int .5."):
        list(only_texts(["a", None, 5], TextSource("rows", text_field="body")))


def test_counting_resumes_from_what_was_stored(caplog):
    counts = RowCounts()
    with pytest.raises(ValueError):
        list(only_texts(["a", None, "", 5], TextSource("rows"), counts))
    stored = counts.to_json()
    again = RowCounts.from_json(stored)
    assert list(only_texts([6, None, "b"], TextSource("rows", skip_bad_rows=True), again)) == ["b"]
    assert [record.getMessage() for record in caplog.records] == [
        "skipped 3 of 7 rows: no text in column 'text'",
        "--skip_bad_rows: skipped 1 of 7 rows: row 4 as read here: int (6)",
    ]
    assert stored == RowCounts(seen=4, empty=2).to_json()
