"""The real entry on real ranks, on small random models and real text: what ranks agree on, what a step does, what is
left on disk. Ranks are forks here; the real torchrun runs in test_demo.py and test_restarts.py.
"""

import functools
import json
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from arguments import parse_train_args
from data import build_dataloader
from distillation.losses import compute_distill_loss
from llamba import LlambaForCausalLM
from tests import fresh, small_runs
from tests.small_runs import TEXT, TOKENIZER, compile_with, keep_final_weights, make_models, read_metrics
from tests.tiny import tiny_student, tiny_teacher

FROZEN = {"freeze_mlp": True, "freeze_replaced_layers": True}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


def options(models, output_dir, **changes):
    values = dict(student_model=models / "plain", max_steps=6, warmup_ratio=0.0, log_interval=2)
    return small_runs.options(models, output_dir, **{**values, **changes})


def train(n_ranks, argv, arm=None, **more):
    """Runs train_gpus.py, which has to succeed; returns what it wrote."""
    codes, log = fresh.ranks(argv, n_ranks, arm=arm, **more)
    assert codes == [0] * n_ranks, log[-4000:]
    return log


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    """Returns a function that runs once for each set of options and returns the output directory."""
    done = {}

    def run_once(n_ranks=2, ranks_per_node=None, **changes):
        key = (n_ranks, ranks_per_node, *sorted(changes.items()))
        if key not in done:
            folder = tmp_path_factory.mktemp("run") / "out"
            argv = options(models, folder, **changes)
            log = train(n_ranks, argv, keep_final_weights, ranks_per_node=ranks_per_node)
            (folder / "log.txt").write_text(log)
            done[key] = folder
        return done[key]

    return run_once


def final_weights(folder, rank=0):
    return torch.load(folder / f"rank-{rank}.pt", weights_only=True)


def moved(folder, step):
    """Names of weights that differ between checkpoint-0 and checkpoint-<step>."""
    before, after = (
        LlambaForCausalLM.from_pretrained(folder / f"checkpoint-{n}", dtype="auto").state_dict() for n in (0, step)
    )
    return {name for name in before if not torch.equal(before[name], after[name])}


# --- what ranks agree on -------------------------------------------------------------------------------------


def test_all_ranks_hold_the_same_weights(run):
    folder = run(2, **FROZEN)
    first, second = final_weights(folder, 0), final_weights(folder, 1)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_two_students_equal_one_with_twice_the_batch(run):
    two, one = run(2, **FROZEN), run(1, batch_size=4, **FROZEN)
    for a, b in zip(read_metrics(two), read_metrics(one), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["tokens"] == b["tokens"]
    two_weights, one_weights = final_weights(two), final_weights(one)
    for name in two_weights:
        torch.testing.assert_close(two_weights[name], one_weights[name], rtol=1e-3, atol=1e-4)


def test_two_nodes_equal_two_ranks_of_one(run):
    """Each node runs a teacher of its own."""
    two_nodes, one_node = run(2, ranks_per_node=1, **FROZEN), run(2, **FROZEN)
    for a, b in zip(read_metrics(two_nodes), read_metrics(one_node), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["kl"] == pytest.approx(b["kl"], rel=1e-6)
    for rank in (0, 1):
        for name, weight in final_weights(two_nodes, rank).items():
            torch.testing.assert_close(weight, final_weights(one_node)[name], rtol=1e-4, atol=1e-6)


def test_accumulated_steps_equal_one_large_batch(run):
    accumulated = run(1, grad_accumulation_steps=2, save_interval=4, **FROZEN)
    for a, b in zip(read_metrics(accumulated), read_metrics(run(1, batch_size=4, **FROZEN)), strict=True):
        assert a["micro_step"] == 2 * a["step"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_both_teacher_signals_give_the_same_losses(run):
    hidden, logits = run(2, **FROZEN), run(2, teacher_signal="logits", **FROZEN)
    for a, b in zip(read_metrics(hidden), read_metrics(logits), strict=True):
        for name in ("loss", "kl", "ce"):
            assert a[name] == pytest.approx(b[name], rel=1e-5)
        assert a["kl"] > 0.01


@pytest.mark.parametrize("changes", [{"teacher_prefetch": 1}, {"teacher_placement": "colocated"}])
def test_where_and_when_the_teacher_works_changes_no_figure(run, changes):
    """Bit for bit: each rank's part is computed alone wherever the teacher is, and batches drawn ahead do not count."""
    ahead, other = read_metrics(run(2, **FROZEN)), read_metrics(run(2, **changes, **FROZEN))
    for a, b in zip(ahead, other, strict=True):
        for name in ("micro_step", "tokens", "loss", "kl", "ce", "grad_norm", "lr"):
            assert a[name] == b[name], name
    for name, weight in final_weights(run(2, **FROZEN)).items():
        assert torch.equal(weight, final_weights(run(2, **changes, **FROZEN))[name]), name


# --- what a step does ----------------------------------------------------------------------------------------


def test_the_first_loss_is_the_reference_loss(run, models):
    """Compares the logged figures with a plain computation in one process on the same windows."""
    folder = run(2, **FROZEN)
    args = parse_train_args(options(models, folder, **FROZEN))
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    args.batch_size = 4
    batch = next(iter(build_dataloader(args, tokenizer, rank=0, world_size=1, is_builder=True)))
    student = LlambaForCausalLM.from_pretrained(folder / "checkpoint-0").eval()
    teacher = AutoModelForCausalLM.from_pretrained(models / "teacher").eval()
    with torch.no_grad():
        total, kl, ce = compute_distill_loss(
            student(batch.input_ids).logits,
            teacher(batch.input_ids).logits,
            batch.labels,
            batch.loss_mask,
            args.ce_weight,
            args.kl_weight,
            args.temperature,
        )
    first = read_metrics(folder)[0]
    assert (first["loss"], first["kl"], first["ce"]) == pytest.approx((total.item(), kl.item(), ce.item()), rel=1e-5)


def test_frozen_weights_stay_and_all_others_move(run):
    folder = run(2, **FROZEN)
    changed = moved(folder, 6)
    everything = set(final_weights(folder))
    frozen = {name for name in everything if ".mlp." in name or ".layers.1." in name or ".layers.3." in name}
    assert changed == everything - frozen


def test_weights_move_in_bfloat16_at_a_small_learning_rate(run):
    """At lr 1e-5 a bfloat16 AdamW loses most of its steps; with float32 masters they add up."""
    folder = run(1, dtype="bfloat16", max_lr=1e-5, max_steps=30, save_interval=0, weight_decay=0.0)
    before, after = (LlambaForCausalLM.from_pretrained(folder / f"checkpoint-{n}", dtype="auto") for n in (0, 30))
    assert after.dtype == torch.bfloat16
    name = "backbone.layers.0.mixer.in_proj.weight"
    old, new = before.state_dict()[name], after.state_dict()[name]
    spacing = old.abs().float() * 2**-8  # half of a bfloat16 step
    reachable = spacing < 30 * 1e-5 * 0.5  # weights that half of the summed steps would carry across
    assert reachable.float().mean() > 0.02
    assert (old != new)[reachable].float().mean() > 0.5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_train_like_float32(run, dtype):
    reference, half = read_metrics(run(2, **FROZEN)), read_metrics(run(2, dtype=dtype, **FROZEN))
    for a, b in zip(reference, half, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.02)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=0.1)


def test_without_kl_no_teacher_runs(run):
    folder = run(2, kl_weight=0.0, **FROZEN)
    assert all(row["kl"] == 0 and row["teacher_wait_s"] == 0 for row in read_metrics(folder))
    with_teacher = read_metrics(run(2, **FROZEN))[0]
    # The layers are replaced all the same.
    assert read_metrics(folder)[0]["ce"] == pytest.approx(with_teacher["ce"], rel=1e-5)


def losses(folder):
    return [row["loss"] for row in read_metrics(folder)]


@pytest.mark.parametrize("more", [{}, {"checkpoint_blocks": 2, "loss_chunk_tokens": 10}])
def test_ways_to_save_memory_change_no_loss(run, more):
    other = run(2, gradient_checkpointing=True, **more, **FROZEN)
    assert losses(other) == pytest.approx(losses(run(2, **FROZEN)), rel=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_change_no_loss(run, models, tmp_path, backend):
    """A mixer, an attention layer and the loss. Compiling their C++ takes minutes and is left to `make test-slow`;
    aot_eager makes the same graphs and runs them without a compiler.
    """
    tiny_teacher(vocab_size=1030, num_hidden_layers=2).save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(tmp_path / "teacher")
    tiny_student(vocab_size=1024, n_layer=2).save_pretrained(tmp_path / "student")
    changes = dict(teacher_model=tmp_path / "teacher", student_model=tmp_path / "student", layers="1", **FROZEN)
    argv = options(models, tmp_path / "out", compile=True, **changes)
    log = train(1, argv, functools.partial(compile_with, backend))
    assert log.count(f"torch.compile with {backend}") == 3  # two blocks and the loss
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-6")  # raises if a weight has another name
    assert losses(tmp_path / "out") == pytest.approx(losses(run(1, **changes)), rel=1e-5)


# --- what is left on disk ------------------------------------------------------------------------------------


def test_checkpoints_metrics_and_log(run):
    folder = run(2, **FROZEN)
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-0", "checkpoint-3", "checkpoint-6"}
    state = json.loads((folder / "checkpoint-3" / "training_state.json").read_text())
    assert (state["micro_step"], state["step"], state["arguments"]["layers"]) == (3, 3, [1, 3])
    assert AutoTokenizer.from_pretrained(folder / "checkpoint-6").eos_token == "<|endoftext|>"
    assert AutoModelForCausalLM.from_pretrained(folder / "checkpoint-6").config.attention_layers == [1, 3]

    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["tokens"] == 6 * 2 * 2 * 32
    names = {"step", "micro_step", "loss", "ce", "kl", "lr", "grad_norm", "tokens", "tokens_per_s", "step_time_s"}
    assert names | {"teacher_wait_s", "data_wait_s"} <= rows[0].keys()
    log = (folder / "log.txt").read_text()
    assert "[train] micro_step 6 (opt 6) | loss " in log
    assert log.count("[train] micro_step 2 ") == 1  # one rank speaks
    assert "replaced layers" in log


def test_the_environment_of_slow_links_changes_nothing(run, models, tmp_path):
    """Users with a bad interconnect set these; gloo ignores those of NCCL, and torch's DETAIL crashes DDP on gloo."""
    slow = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_ALGO": "Ring", "NCCL_MAX_NCHANNELS": "1"}
    slow |= {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_DISTRIBUTED_DEBUG": "DETAIL"}
    log = train(2, options(models, tmp_path / "out", **FROZEN), **slow)
    assert losses(tmp_path / "out") == losses(run(2, **FROZEN))
    assert "NCCL_P2P_DISABLE=1" in log and "DETAIL taken as INFO" in log


def test_streaming_resume_step_and_wandb_offline(models, tmp_path):
    """A run from a checkpoint's weights with --resume_step has the counters, schedule and layers of the first run."""
    first = tmp_path / "first"
    changes = dict(no_dataset_streaming=False, shuffle_buffer=20, max_steps=4, save_interval=2, decay_ratio=0.5)
    train(1, options(models, first, wandb=True, **changes))
    assert list((first / "wandb").glob("offline-run-*"))

    second = tmp_path / "second"
    train(1, options(models, second, student_model=first / "checkpoint-2", resume_step=2, **changes))
    rows, expected = read_metrics(second), read_metrics(first)[2:]
    assert [(r["step"], r["micro_step"], r["lr"]) for r in rows] == [
        (r["step"], r["micro_step"], r["lr"]) for r in expected
    ]
    assert {path.name for path in second.glob("checkpoint-*")} == {"checkpoint-4"}


def test_streaming_that_ends_on_a_save_or_within_an_accumulation(models, tmp_path):
    """Micro steps after the last update change nothing: the last checkpoint is that of the update, saved once."""
    text, stream = tmp_path / "short.jsonl", dict(no_dataset_streaming=False, max_steps=1000, batch_size=1)
    text.write_text("".join(TEXT.read_text().splitlines(keepends=True)[:8]))
    for accumulate, save_interval in ((1, 1), (3, 0)):
        folder = tmp_path / f"out-{accumulate}"
        changes = dict(grad_accumulation_steps=accumulate, save_interval=save_interval)
        log = train(1, options(models, folder, dataset_name=text, **stream, **changes))
        last = read_metrics(folder)[-1]["micro_step"]
        assert max(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")) == last
        assert "before the learning rate had decayed" in log


def test_rates_by_part_and_the_separator_are_kept_by_a_resumed_run(models, tmp_path):
    changes = dict(copied_lr_factor=0.1, warmup_steps=2, save_interval=2, max_steps=4)
    first, second = tmp_path / "first", tmp_path / "second"
    log = train(1, options(models, first, **changes), keep_final_weights)
    assert "each document ends with '<|endoftext|>' (0): the eos_token" in log
    assert re.search(r"^mixers .* 0.001$", log, re.MULTILINE) and re.search(r"^norms .* 0.0001$", log, re.MULTILINE)
    shutil.copytree(first / "checkpoint-2", second / "checkpoint-2")
    train(1, options(models, second, resume="auto", **changes), keep_final_weights)
    expected = final_weights(first)
    assert all(torch.equal(weight, expected[name]) for name, weight in final_weights(second).items())
    assert [row["lr"] for row in read_metrics(second)] == [row["lr"] for row in read_metrics(first)[2:]]
    for checkpoint in (first / "checkpoint-0", second / "checkpoint-4"):
        arguments = json.loads((checkpoint / "training_state.json").read_text())["arguments"]
        assert (arguments["document_separator"], arguments["copied_lr_factor"]) == ("<|endoftext|>", 0.1)
