"""What the log, the bar, the trackers and the warnings make of a row of the stage `align`."""

import json
import logging
import math

import pytest

from monitoring.health import Spikes, SpikeWatch, warn_of_anomalies
from monitoring.layer_errors import errors_by_layer, worst_layers
from monitoring.run_log import RunLog, format_metrics
from monitoring.trackers import flat
from tests.monitoring.test_run_log import row
from tests.parsing import options_in
from training_utils import Update


def aligned(step, errors, **changes):
    """Returns a row of the stage: neither CE nor KL, and maybe no time of waiting for a teacher."""
    kept = {name: value for name, value in row(step).items() if name not in ("ce", "kl", "teacher_wait_s")}
    return {**kept, "alignment": {"layers": list(errors), "errors": list(errors.values())}, **changes}


def test_the_line_of_a_step_names_the_worst_layers():
    errors = {2: 0.4, 10: 0.703, 23: 0.684, 26: 0.681}
    assert format_metrics(aligned(3, errors, loss=0.38123, memory_gb=0.9), 61) == (
        "micro_step 6 (opt 3) | loss 0.3812 | error 0.6170 | worst layers 10 (0.703), 23 (0.684), 26 (0.681) | "
        "lr 1.00e-05 | grad 0.50 | tok/s 12,346 | mem 0.9 GB | eta 0:01:01"
    )
    assert "worst layers 4 (nan), 2 (0.400) |" in format_metrics(aligned(1, {2: 0.4, 4: math.nan}))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_layer_without_a_number_is_the_worst(bad):
    assert worst_layers({1: 5.0, 2: bad, 3: 0.5}, 2).startswith("2 (") and worst_layers({1: 0.5}) == "1 (0.500)"


def test_a_curve_for_each_layer_by_its_own_number():
    charts = flat(aligned(3, {2: 0.4, 30: 0.6}))
    assert {name: value for name, value in charts.items() if name.startswith("alignment")} == {
        "alignment/02": 0.4,
        "alignment/30": 0.6,
        "alignment/mean": 0.5,
    }
    assert charts["train/loss"] == 2.5 and "train/kl" not in charts
    broken = flat(aligned(3, {2: math.nan, 30: 0.6}))
    assert "alignment/02" not in broken and "alignment/mean" not in broken and broken["alignment/30"] == 0.6


def test_rows_on_the_disk_can_be_shown_again(tmp_path):
    """A resumed run sends them to its trackers; what was not finite is null there."""
    with RunLog(options_in(tmp_path), 0, is_main=True) as log:
        log.write(aligned(1, {2: 0.4, 3: math.nan}))
        (found,) = log.file.rows()
    assert found["alignment"] == {"layers": [2, 3], "errors": [0.4, None]}
    assert flat(found)["alignment/02"] == 0.4 and math.isnan(errors_by_layer(found)[3])
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == found


class Seen:
    """Stands for the meter of a rank."""

    def windows(self, only_bad=False):
        return [7, 8]


def warned(caplog, spikes, errors, outcome="stepped", loss=0.25):
    caplog.clear()
    means = {"loss": loss, "alignment": {"layers": list(errors), "errors": list(errors.values())}}
    update = Update(means, 1e-3, 1.0, outcome, {}, 1, 64)
    with caplog.at_level(logging.WARNING, "train"):
        warn_of_anomalies(40, update, spikes, Seen(), rank=1)
    return caplog.text


def test_a_layer_that_jumps_among_many_is_named(caplog):
    """The mean of 32 layers hardly moves."""
    spikes, usual = Spikes(), {layer: 0.5 for layer in range(32)}
    for n in range(SpikeWatch.LEAST):
        assert not warned(caplog, spikes, {layer: error + 0.01 * (n % 3) for layer, error in usual.items()})
    found = warned(caplog, spikes, {**usual, 28: 1.25})
    assert "step 40: the error of layers 28 (1.250) stands out; rank 1 had windows [7, 8]" in found
    found = warned(caplog, spikes, {**usual, 28: 41.2}, loss=53.1)
    assert "step 40: loss 53.1000 and the error of layers 28 (41.200) stands out" in found
    assert not warned(caplog, spikes, usual)


def test_a_skipped_update_names_the_layers_that_broke(caplog):
    found = warned(caplog, Spikes(), {2: 0.4, 3: math.nan, 5: math.inf}, "bad", math.nan)
    assert "step 40 skipped: loss nan (layers 3 (nan), 5 (inf)), gradient norm 1.0; rank 1 had windows" in found
    assert "step 40 skipped: loss 0.25, gradient norm" in warned(caplog, Spikes(), {2: 0.4}, "bad")
