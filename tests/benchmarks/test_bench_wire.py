"""benchmarks/bench_wire.py: its trial run from end to end, and every form gives every rank its own answer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.bench
ROOT = Path(__file__).parents[2]
BENCHMARK = ROOT / "benchmarks" / "bench_wire.py"
FORMS = ["broadcast logits", "scatter logits", "scatter hidden", "ours", "ours, logits", "ours, ahead"]
NAME = "ranks=3 B=2 S=5 V=130 D=70"


def test_trial_run(tmp_path):
    command = [sys.executable, str(BENCHMARK), "--quick", "--json", str(tmp_path / "wire.json")]
    run = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = {row["candidate"]: row for row in json.loads((tmp_path / "wire.json").read_text())}
    assert list(rows) == FORMS and all("case" in row and row["peak_bytes"] >= 0 for row in rows.values())
    assert all(row["seconds"] > 0 and row["default_seconds"] > 0 for row in rows.values())
    base = rows["broadcast logits"]["seconds"]
    assert all(row["ratio_to_baseline"] == row["seconds"] / base for row in rows.values())


def test_bytes_on_the_wire():
    """Three ranks get 2048 tokens each from the first; ids of 8 bytes come from them, bfloat16 goes to them."""
    from bench_wire import Case

    name = "ranks=4 B=2 S=1024 V=128256 D=4096"
    logits, hidden = Case.parse(name, "scatter logits"), Case.parse(name, "ours")
    assert logits.wire_bytes(copies=1) == 3 * 2048 * (8 + 128256 * 2)
    assert logits.wire_bytes(copies=4) == 3 * 2048 * (8 + 4 * 128256 * 2)
    assert hidden.wire_bytes(copies=1) == 3 * 2048 * (8 + 4096 * 2)


def test_every_form_gives_every_rank_its_own_answer():
    from harness import run_child

    got = run_child(__file__, "answers_got")
    assert list(got) == FORMS
    for form, ranks in got.items():
        assert ranks == [[True, False, False], [False, True, False], [False, False, True]], form


def answers_got():
    """Returns, for each form and each of three ranks, which of the three answers it received."""
    import bench_wire
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    launch = LaunchConfig(1, 1, 3, start_method="fork", rdzv_backend="c10d", rdzv_endpoint="localhost:0")
    by_rank = elastic_launch(launch, answers_of_rank)()
    return {form: [by_rank[rank][form] for rank in range(3)] for form in bench_wire.FORMS}


def answers_of_rank():
    import bench_wire

    from processes.ranks import process_groups

    got = {}
    with process_groups(torch.device("cpu")) as ranks:
        for form, open_form in bench_wire.FORMS.items():
            case = bench_wire.Case.parse(NAME, form)
            answers = case.all_answers()  # (3 * B, S, width)
            with open_form(case, answers if ranks.owns_teacher else None, ranks) as ask:
                answer = ask(case.input_ids(ranks.rank))()  # (B, S, width)
            got[form] = [torch.equal(answer, part) for part in answers.split(2)]
    return got


def test_a_strangers_answer_is_refused():
    from bench_wire import Case

    case = Case.parse(NAME, "scatter hidden")
    mine, other, _ = case.all_answers().split(2)
    case.check(mine, 0)
    with pytest.raises(ValueError, match="rank 0 did not get the answer to its own row 0"):
        case.check(other, 0)
    with pytest.raises(ValueError, match="own row 1"):
        case.check(torch.stack([mine[0], mine[0]]), 0)
