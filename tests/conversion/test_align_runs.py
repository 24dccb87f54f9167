"""`train_gpus.py --stage align` on real ranks: what ranks agree on, what is trained and saved, where checkpoints can
be used, and what it does in trouble.
"""

import functools
import json
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import eval_mmlu_hybrid
from conversion import alignment
from llamba import LlambaForCausalLM
from tests import fresh, small_runs
from tests.conversion.pairs import save_pair
from tests.faults.compare import differences, tensors
from tests.faults.kills import run_campaign
from tests.faults.scenarios import signal_self
from tests.faults.traps import trap
from tests.launch import ROOT
from tests.small_runs import compile_with, keep_final_weights, make_models, read_metrics

ENGLISH = ROOT / "presets" / "tiny" / "text" / "english.txt"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Returns the folder of a teacher, a student `made` of it, and an unrelated one, `plain`."""
    folder = make_models(tmp_path_factory.mktemp("models"))
    save_pair(folder, vocab_size=1030)
    return folder


def options(models, output_dir, **changes):
    values = dict(student_model=models / "made", stage="align", layers="-1", max_steps=6, warmup_ratio=0.0)
    return small_runs.options(models, output_dir, **{**values, **changes})


def align(n_ranks, argv, arm=None):
    """Runs train_gpus.py, which has to succeed; returns what it wrote."""
    codes, log = fresh.ranks(argv, n_ranks, arm=arm)
    assert codes == [0] * n_ranks, log[-4000:]
    return log


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    """Returns a function that runs once for each set of options and returns the output directory."""
    done = {}

    def run_once(n_ranks=2, **changes):
        key = (n_ranks, *sorted(changes.items()))
        if key not in done:
            folder = tmp_path_factory.mktemp("run") / "out"
            log = align(n_ranks, options(models, folder, **changes), keep_final_weights)
            (folder / "log.txt").write_text(log)
            done[key] = folder
        return done[key]

    return run_once


def final_weights(folder, rank=0):
    return torch.load(folder / f"rank-{rank}.pt", weights_only=True)


def losses(folder):
    return [row["loss"] for row in read_metrics(folder)]


def moved(folder):
    """Names of weights that differ between checkpoint-0 and checkpoint-6."""
    before, after = (LlambaForCausalLM.from_pretrained(folder / f"checkpoint-{n}").state_dict() for n in (0, 6))
    return {name for name in before if not torch.equal(before[name], after[name])}


# --- what ranks agree on -------------------------------------------------------------------------------------


def assert_same_run(one, other):
    for a, b in zip(read_metrics(one), read_metrics(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["alignment"]["layers"] == b["alignment"]["layers"]
        assert a["alignment"]["errors"] == pytest.approx(b["alignment"]["errors"], rel=1e-5)
        assert (a["tokens"], a["step"]) == (b["tokens"], b["step"])
    weights, others = final_weights(one), final_weights(other)
    for name in weights:
        torch.testing.assert_close(weights[name], others[name], rtol=1e-3, atol=1e-4)


def test_two_ranks_equal_one_with_twice_the_batch_and_one_that_accumulates(run):
    two = run(2)
    assert_same_run(two, run(1, batch_size=4))
    assert_same_run(two, run(1, grad_accumulation_steps=2, save_interval=6))
    for name, weight in final_weights(two, 0).items():
        assert torch.equal(weight, final_weights(two, 1)[name]), name


def first_moments(checkpoint):
    """Returns what Adam has summed up of the clipped gradients of each mixer, of the shards of all ranks."""
    shards = [load_file(file) for file in sorted(checkpoint.glob("optimizer-*"))]
    found = {name: tensor for shard in shards for name, tensor in shard.items() if name.startswith("exp_avg/")}
    assert len(found) == sum(name.startswith("exp_avg/") for shard in shards for name in shard)  # each on one rank
    return found


def test_what_is_clipped_is_the_norm_over_all_mixers_of_all_ranks(run):
    """It is logged as it was before, and neither depends on how many ranks there are."""
    two, alone = (run(2), run(1, batch_size=4))
    norms = [[row["grad_norm"] for row in read_metrics(folder)] for folder in (two, alone)]
    assert min(norms[0]) > 2 and norms[0] == pytest.approx(norms[1], rel=1e-4)  # --grad_clip is 1
    found, expected = first_moments(two / "checkpoint-6"), first_moments(alone / "checkpoint-6")
    assert found.keys() == expected.keys() and all(".mixer." in name for name in found)
    for name, moment in found.items():
        torch.testing.assert_close(moment, expected[name], rtol=1e-2, atol=1e-5)
    whole = torch.cat([moment.flatten() for moment in found.values()]).norm()
    assert 0.1 < whole < 1 - 0.9**6  # a mean of six gradients of norm 1, weighted by (1 - 0.9) 0.9^k


def test_every_layer_gets_closer(run):
    first, *_, last = (row["alignment"]["errors"] for row in read_metrics(run(2, max_steps=100, save_interval=0)))
    assert len(first) == 4
    assert all(b < 0.99 * a for a, b in zip(first, last, strict=True)), (first, last)


def test_bfloat16_aligns_like_float32(run):
    for a, b in zip(read_metrics(run(2)), read_metrics(run(2, dtype="bfloat16")), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.02)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=0.1)


def test_float16_aligns_once_its_loss_scale_has_fallen(run):
    """These gradients are so large that the first scale is too: updates are skipped until it fits."""
    rows, expected = read_metrics(run(2, dtype="float16")), read_metrics(run(2))
    assert 0 < rows[-1]["skipped_updates"] < 4
    assert rows[0]["loss"] == pytest.approx(expected[0]["loss"], rel=0.02)
    first = next(row for row in rows if row["grad_norm"] is not None)  # of the same weights
    assert first["grad_norm"] == pytest.approx(expected[first["step"] - 1]["grad_norm"], rel=0.2)


def test_compiled_mixers_change_no_loss(run, models, tmp_path):
    argv = options(models, tmp_path / "out", layers="1 3", compile=True)
    log = align(1, argv, functools.partial(compile_with, "aot_eager"))
    assert log.count("torch.compile with aot_eager") == 2  # the mixers of layers 0 and 2
    assert losses(tmp_path / "out") == pytest.approx(losses(run(1, layers="1 3")), rel=1e-5)


# --- what is trained and saved -------------------------------------------------------------------------------


@pytest.mark.parametrize("layers,aligned", [("-1", [0, 1, 2, 3]), ("1 3", [0, 2])])
def test_only_mixers_learn_and_rows_have_their_errors(run, layers, aligned):
    folder = run(2, layers=layers)
    everything = set(final_weights(folder))
    assert moved(folder) == {name for name in everything if ".mixer." in name and int(name.split(".")[2]) in aligned}
    for row in read_metrics(folder):
        assert row["alignment"]["layers"] == aligned
        assert not {"kl", "ce", "ignored_labels"} & row.keys()
        assert row["teacher_wait_s"] == 0
    state = json.loads((folder / "checkpoint-3" / "training_state.json").read_text())
    assert (state["arguments"]["stage"], state["arguments"]["teacher_placement"]) == ("align", "dedicated")


def test_options_of_distillation_are_named_and_change_nothing(run):
    idle = dict(freeze_mlp=True, gradient_checkpointing=True, kl_weight=0.0)
    folder = run(2, **idle)
    assert losses(folder) == losses(run(2))
    text = "does not use --freeze_mlp, --gradient_checkpointing, --kl_weight\n"
    assert (folder / "log.txt").read_text().count(text) == 1


def test_layers_given_are_the_teachers_own(run, models):
    teacher = AutoModelForCausalLM.from_pretrained(models / "teacher").state_dict()
    hybrid = final_weights(run(2, layers="1 3"))
    for name, weight in hybrid.items():
        if ".layers.1." in name or ".layers.3." in name:
            assert torch.equal(weight, teacher[name.replace("backbone", "model")]), name


# --- where its checkpoints can be used -----------------------------------------------------------------------


def test_an_aligned_student_is_distilled_with_layers_of_the_teacher(run, models, tmp_path):
    aligned = run(2)
    argv = options(models, tmp_path / "out", student_model=aligned / "latest", stage="distil", layers="1 3")
    align(2, argv)
    before, after = (final_weights(aligned), tensors(tmp_path / "out" / "checkpoint-0"))
    assert read_metrics(tmp_path / "out")[0]["kl"] > 0
    mixer = "backbone.layers.0.mixer.in_proj.weight"
    assert after[mixer] == tensors(aligned / "checkpoint-6")[mixer] and mixer in before


def test_a_hybrid_checkpoint_is_aligned_further(run, models, tmp_path):
    """One that was distilled has layers and MLPs that are no longer the teacher's: those are read beside."""
    align(1, options(models, tmp_path / "distilled", stage="distil", layers="1 3", max_steps=3))
    argv = options(models, tmp_path / "out", student_model=tmp_path / "distilled" / "latest", layers="1 3")
    log = align(1, argv)
    assert read_metrics(tmp_path / "out")[-1]["alignment"]["layers"] == [0, 2]
    assert "0.0 MB are the student's own" in log  # all has moved


def test_an_aligned_student_can_be_scored(run, models, tmp_path):
    argv = ["--local_files_only", "--no_mmlu", "--held_out", str(ENGLISH), "--held_out_windows", "2"]
    argv += ["--held_out_seq_length", "32", "--teacher_model", str(models / "teacher"), "--layers", "-1"]
    argv += ["--student_model", str(models / "made"), "--dtype", "float32", "--output", str(tmp_path / "eval.json")]
    code, log = fresh.script([*argv, "--ckpt", str(run(2) / "latest")], eval_mmlu_hybrid.main)
    assert code == 0, log
    assert json.loads((tmp_path / "eval.json").read_text())["held_out"]["kl"] > 0


# --- in trouble ----------------------------------------------------------------------------------------------


def test_a_run_that_was_killed_equals_one_that_was_left_alone(tmp_path):
    result = fresh.call(run_campaign, tmp_path, "aligned", 2, 1, 0, 6)
    assert (result["kills"], result["differences"]) == (1, [])
    assert result["runs"] >= 1


def signal_in_a_micro_step(n, number, to, rank):
    """Has rank `to` send itself a signal at the beginning of its n-th micro step."""
    if rank == to:
        trap(alignment.Alignment, "backward", n, signal_self(number))


def test_signals_and_the_time_limit_stop_all_ranks_and_the_run_resumes_exactly(models, tmp_path):
    """Within an accumulation, too, whose first micro steps are then computed again."""
    changes = dict(grad_accumulation_steps=2, save_interval=0)
    align(2, options(models, tmp_path / "straight", **changes))
    argv = options(models, tmp_path / "out", **changes, resume="auto")
    stops = [(signal.SIGTERM, 3, 1), (signal.SIGINT, 2, 0), (signal.SIGUSR1, 1, 1)]
    for number, n, to in stops:
        codes, log = fresh.ranks(argv, 2, arm=functools.partial(signal_in_a_micro_step, n, number, to))
        assert codes == [75, 75] and f"stopped by {number.name} at step" in log, log[-2000:]
    codes, log = fresh.ranks([*argv, "--time_limit", "1e-6"], 2)
    assert codes == [75, 75] and "stopped by --time_limit at step" in log, log[-2000:]
    assert 0 < len(read_metrics(tmp_path / "out")) < 6
    align(2, argv)
    assert differences(tmp_path / "straight", tmp_path / "out", 12) == []


def spoil_one_layer(first, last, rank):
    """Has rank 1 find an error that is not finite in layer 2, from micro step `first` to `last`."""
    real, calls = alignment.attention_error, 0

    def spoilt(block, traced):
        nonlocal calls
        error = real(block, traced)
        calls += block.layer_idx == 2
        return error * float("nan") if rank == 1 and block.layer_idx == 2 and first <= calls <= last else error

    alignment.attention_error = spoilt


def test_all_ranks_skip_what_is_not_finite_on_one_and_stop_in_the_end(models, tmp_path):
    arm = functools.partial(spoil_one_layer, 2, 3)
    align(2, options(models, tmp_path / "out"), arm)
    rows = read_metrics(tmp_path / "out")
    assert [row["skipped_updates"] for row in rows] == [0, 1, 2, 2, 2, 2]
    assert rows[1]["loss"] is None and rows[1]["alignment"]["errors"][2] is None
    codes, log = fresh.ranks(
        options(models, tmp_path / "stopped", max_bad_steps=2), 2, arm=functools.partial(spoil_one_layer, 3, 99)
    )
    assert len(set(codes)) == 1 and codes[0] != 0
    assert "2 updates in a row were skipped" in log


@pytest.mark.parametrize("stage,other", [("align", "distil"), ("distil", "align")])
def test_a_run_is_not_resumed_in_the_other_stage(run, models, stage, other):
    folder = run(1, stage=stage, layers="1 3")
    argv = options(models, folder, stage=other, layers="1 3", resume="auto", max_steps=9)
    codes, log = fresh.ranks(argv, 1)
    assert codes == [2]
    assert f"--stage {other}: the run of {folder / 'checkpoint-6'} has {stage}; give the same" in log
