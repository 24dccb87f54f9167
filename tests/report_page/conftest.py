"""Fixtures: a run with its page, and two runs with theirs."""

import pytest

from report import write_page
from tests.report_page.run_folders import build, full_run, row_of


@pytest.fixture(scope="session")
def one(tmp_path_factory):
    """A run that has everything, with its report."""
    run = full_run(tmp_path_factory.mktemp("one"))
    return run, write_page([run], None)


@pytest.fixture(scope="session")
def two(tmp_path_factory):
    """Runs of one name; of the second nothing but its rows is there."""
    folder = tmp_path_factory.mktemp("two")
    runs = [full_run(folder / "a"), build(folder / "b" / "full", [row_of(step) for step in range(1, 6)])]
    (runs[1] / "status.json").unlink()
    return runs, write_page(runs, folder / "out" / "both.html")
