"""Runs that an earlier version began, resumed by this one. `earlier_run/` holds a teacher, a text and two runs of two
ranks that commit 13dec8d trained to the end: args.yaml, all rows of metrics.jsonl, and the checkpoint half way.
"""

import shutil
from pathlib import Path

import pytest

from tests import fresh
from tests.small_runs import read_metrics

EARLIER = Path(__file__).parent / "earlier_run"
FIGURES = ("loss", "ce", "kl", "lr", "grad_norm", "tokens", "skipped_updates")


@pytest.mark.parametrize("form,tolerance", [("cached", 1e-3), ("stream", 2e-2)])  # float32 and bfloat16
def test_a_run_of_an_earlier_version_resumes(tmp_path, monkeypatch, form, tolerance):
    """Its options are read from its args.yaml; it takes the steps that are left, with the figures they had then."""
    shutil.copytree(EARLIER, tmp_path, dirs_exist_ok=True)
    rows = read_metrics(tmp_path / form)
    monkeypatch.chdir(tmp_path)
    codes, log = fresh.ranks(["--config", f"{form}/args.yaml", "--resume", "auto"], 2)
    assert codes == [0, 0], log[-4000:]
    resumed = read_metrics(tmp_path / form)
    assert [row["micro_step"] for row in resumed] == list(range(1, 9))
    assert resumed[:4] == rows[:4]  # these stood in the checkpoint's past and are not taken again
    for before, after in zip(rows[4:], resumed[4:], strict=True):
        assert {name: after[name] for name in FIGURES} == pytest.approx({n: before[n] for n in FIGURES}, rel=tolerance)
    assert (tmp_path / form / "latest").resolve().name == "checkpoint-8"
