"""Each benchmark at sizes that take a second or two, in this process: that it still fits the code that it measures, and
that an option which matches nothing is an error. `make test-bench` runs the benchmarks from end to end.
"""

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from processes.ranks import process_groups

ROOT = Path(__file__).parents[2]
SCRIPTS = ["bench_data", "bench_launches", "bench_loss", "bench_mmlu", "bench_overlap", "bench_save", "bench_step"]
SCRIPTS += ["bench_sync", "bench_wire"]
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("no_torchrun")


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "presets" / "tiny" / "teacher")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flag,expected", [("--cases", "a part of one of these names"), ("--candidates", "one of")])
def test_an_option_that_matches_nothing_is_an_error(monkeypatch, script, flag, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", [script, "--quick", flag, "fusd"])
    with pytest.raises(SystemExit, match=f"{flag} 'fusd': expected {expected}") as error:
        importlib.import_module(script).main()
    assert "\n" not in str(error.value)


def test_a_script_starts_from_any_folder_without_a_path_being_set(tmp_path):
    """At its start it imports only what is beside it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_loss.py"), "--cases", "V=0"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.startswith("--cases 'V=0': expected")


def test_data(tmp_path, tokenizer):
    from bench_data import check_windows
    from data_candidates import SEQ_LEN, PackInputs, make_documents, ours

    from text.encoding import Encoder

    documents, encoder = make_documents(megabytes=0.1, characters=1000), Encoder(tokenizer)
    windows = ours(PackInputs(documents, None, tmp_path, tokenizer, encoder, tmp_path))
    expected = np.asarray(encoder(documents))
    check_windows("ours", windows, expected, most_missing=0)
    assert len(windows) == len(expected) // (SEQ_LEN + 1) > 0


def test_gpu(capsys):
    import gpu_step
    from gpu_measure import PartRun

    gpu_step.step(PartRun("step", "batch 1", "--batch_size 1", CPU, quick=True, ends=time.monotonic() + 60))
    assert '"mfu"' in capsys.readouterr().out


def test_loss(tmp_path):
    import bench_loss

    case = "V=300 N=130 float32"
    bench_loss.reference(case, str(tmp_path))
    inputs = bench_loss.make_inputs(case)
    for name in ("plain", "fused"):
        for leaf in inputs.leaves():
            leaf.grad = None
        loss = bench_loss.CANDIDATES[name](inputs)()
        loss.backward()
        errors = bench_loss.errors(name, loss.detach(), inputs, bench_loss.reference_file(case, str(tmp_path)))
        assert max(errors.values()) < 1e-5


def test_mmlu(tokenizer):
    import bench_mmlu

    model = bench_mmlu.make_model("hybrid", len(tokenizer))
    answers, n_tokens = bench_mmlu.answer_ours(model, tokenizer, CPU, bench_mmlu.make_questions(2))
    assert [len(answer) for answer in answers] == [4, 4] and n_tokens > 0


@pytest.mark.parametrize("candidate", ["alone", "pass per rank", "one pass"])
def test_launches(monkeypatch, candidate):
    """A step is taken, and the teacher's thread answers; a process would import torch."""
    import bench_launches

    monkeypatch.setattr(bench_launches, "LAYERS", 2)
    assert bench_launches.run("2 ranks, 32 layers", candidate, 5)["seconds"] > 0


def test_sync():
    """Its rows, and a rank's steps; links are made by root alone."""
    import bench_sync

    found = {("case", "allreduce"): [{"seconds": 2.0, "received_share": 1.5, "same": True}] * 3}
    found["case", "owners"] = [{"seconds": s, "received_share": 0.5, "same": True} for s in (1.0, 0.5, 3.0)]
    found["case", "powersgd"] = [{"problem": "it crashed"}]
    figures = {"seconds": 1.0, "received_share": 0.5, "ratio": 0.5, "same": True}
    assert bench_sync.row(found, "case", "owners") == {"case": "case", "candidate": "owners", **figures}
    assert bench_sync.row(found, "case", "powersgd")["problem"] == "it crashed"
    with process_groups(CPU):
        for candidate in ("allreduce", "owners, 8 bits"):
            model = bench_sync.Words().to(torch.bfloat16)
            before = bench_sync.hash_of(model)
            bench_sync.BUILD[candidate.split(",")[0]](model, candidate)(torch.arange(8))
            assert bench_sync.hash_of(model) != before


def test_overlap(monkeypatch):
    import bench_overlap

    with mock.patch.dict(os.environ, MASTER_PORT="0"):
        monkeypatch.setattr(bench_overlap, "RANKS", 1)
        results = []
        bench_overlap.run_rank(0, "teacher 2 x 40 ms, student 100 ms", "one step ahead", 4, results.append)
    assert results[0]["seconds"] > 0.09


@pytest.mark.parametrize("candidate", ["in the foreground", "in the background"])
def test_save(monkeypatch, candidate):
    import bench_save

    monkeypatch.setitem(bench_save.CASES, "tiny", (32, 1, 1024))
    row = bench_save.run("tiny", candidate)
    assert 0 < row["seconds"] <= row["written_s"] and row["checkpoint_bytes"] > 0


@pytest.mark.parametrize("candidate", ["plain loop", "ours"])
def test_step(candidate):
    from step_candidates import train
    from step_case import Case

    row = train(Case(vocab=300, ranks=1, d_model=32, seq_len=16), candidate)
    assert row["seconds"] > 0 and row["loss"] > 0


def test_wire():
    from bench_wire import FORMS, Case

    from processes.ranks import process_groups

    with process_groups(CPU) as ranks:
        case = Case.parse("ranks=1 B=2 S=5 V=130 D=70", "ours")
        with FORMS["ours"](case, case.all_answers(), ranks) as ask:
            case.check(ask(case.input_ids(0))(), 0)
