"""The ways to the teacher's answers: what comes back, who works while whom, and how a failure is reported."""

import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM

from distillation import teacher, teacher_forward
from distillation.teacher import (
    ColocatedTeacher,
    NoTeacher,
    TeacherLane,
    ask_ahead,
    share_head,
    teacher_head,
)
from distillation.teacher_forward import Teacher
from distillation.wait_clock import WaitClock
from processes.ranks import process_groups
from tests import fresh
from tests.distillation import lane_ranks
from tests.distillation.lane_ranks import StandIn
from tests.tiny import tiny_teacher, tokens
from tests.waiting import wait_until
from text.batch import Batch

CPU = torch.device("cpu")


@pytest.fixture
def ranks(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with process_groups(CPU) as ranks:
        yield ranks


@pytest.mark.parametrize("placement", ["dedicated", "colocated"])
@torch.no_grad()
def test_both_signals_tell_the_teachers_logits(ranks, placement):
    model, vocab = tiny_teacher(), 50  # of the teacher's 56
    expected = model(tokens()).logits[..., :vocab]

    def answer(signal):
        teacher = Teacher(model, signal, vocab)
        lane = TeacherLane(teacher, ranks) if placement == "dedicated" else ColocatedTeacher(teacher, CPU)
        result = lane.submit(tokens()).result()
        lane.close()
        assert result.shape[-1] == teacher.width
        return result

    assert torch.equal(answer("logits"), expected)
    hidden, head = answer("hidden"), share_head(model, vocab, ranks)
    assert hidden.shape == (2, 21, 32) and head.shape == (50, 32)
    assert torch.equal(head, teacher_head(model, vocab))
    torch.testing.assert_close(hidden @ head.T, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rope", [None, {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}])
@torch.no_grad()
def test_a_llama_is_run_without_asking_the_device(monkeypatch, dtype, rope):
    """Bit for bit as transformers runs it, which reads from the device whether positions are consecutive."""
    if rope:
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model = tiny_teacher(**({"rope_parameters": rope} if rope else {})).to(dtype)
    whole, logits = model.base_model(tokens()).last_hidden_state, model(tokens()).logits[..., :50]
    hidden, full = Teacher(model, "hidden", 50), Teacher(model, "logits", 50)

    def ask(*args, **kwargs):
        raise AssertionError("a mask is made")

    monkeypatch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", ask)
    assert torch.equal(hidden(tokens()), whole) and torch.equal(full(tokens()), logits)
    states = hidden.hidden_states(tokens())
    assert torch.equal(model.base_model.norm(states[-1]), whole) and len(states) == 5


@pytest.mark.parametrize("signal", ["hidden", "logits"])
@torch.no_grad()
def test_attention_that_needs_a_mask_gets_one(signal):
    model = tiny_teacher()
    expected = Teacher(model, signal, 50)(tokens())
    model.set_attn_implementation("eager")
    torch.testing.assert_close(Teacher(model, signal, 50)(tokens()), expected)


def test_a_teacher_whose_hidden_states_do_not_tell_its_logits_is_refused():
    """Granite divides its logits by a constant after the head."""
    config = GraniteConfig(
        vocab_size=56,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        logits_scaling=8.0,
    )
    model = GraniteForCausalLM(config).eval()
    with pytest.raises(ValueError, match="--teacher_signal hidden.*use --teacher_signal logits"):
        Teacher(model, "hidden", 50)
    with torch.no_grad():
        assert torch.equal(Teacher(model, "logits", 50)(tokens()), model(tokens()).logits[..., :50])


@pytest.mark.parametrize("signal,passes", [("hidden", [4, 4, 2]), ("logits", [2, 2, 2, 2, 2])])
@torch.no_grad()
def test_hidden_states_for_several_ranks_come_from_one_forward_pass(monkeypatch, signal, passes):
    monkeypatch.setattr(teacher_forward, "TOKENS_AT_ONCE", 4 * 21)
    model, seen = tiny_teacher(), []
    asked = [tokens(seed=seed) for seed in range(5)]
    expected = [Teacher(model, signal, 50)(ids) for ids in asked]
    asking = Teacher(model, signal, 50)
    model.base_model.embed_tokens.register_forward_pre_hook(lambda _module, args: seen.append(len(args[0])))
    answers = list(asking.answers(asked))
    assert seen == passes
    for answer, one in zip(answers, expected, strict=True):
        torch.testing.assert_close(answer, one)


@pytest.mark.parametrize("n_tokens,n", [(512, 16), (2048, 4), (8192, 1), (100_000, 1)])
def test_a_forward_pass_for_several_ranks_has_a_bounded_size(n_tokens, n):
    assert teacher_forward.batches_at_once("hidden", n_tokens) == n


# --- who works while whom ------------------------------------------------------------------------------------


class Announcing(StandIn):
    """Says when it begins with a batch."""

    def __init__(self, n_batches):
        super().__init__(fails_at=0)
        self.begun = [threading.Event() for _ in range(n_batches)]

    def __call__(self, input_ids):
        self.begun[self.calls].set()
        return super().__call__(input_ids)


def test_the_lane_releases_an_answer_once_it_is_taken(ranks):
    lane = TeacherLane(StandIn(fails_at=0), ranks)
    answer = weakref.ref(lane.submit(batches(1)[0].input_ids).result())
    wait_until(lambda: answer() is None, seconds=30)  # its thread may still be about to release it
    lane.close()


def batches(n):
    return [Batch.from_windows(torch.full((1, 4), i)) for i in range(n)]


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_the_teacher_works_ahead_of_the_student_by_prefetch_batches(ranks, prefetch):
    """The student stays in its step until the teacher has begun with a later batch: it never would, had it to wait
    for the student."""
    n = 6
    teacher = Announcing(n)
    lane = TeacherLane(teacher, ranks, prefetch)
    for i, (batch, asked) in enumerate(ask_ahead(batches(n), lane)):
        assert asked.result()[0, 0, 0] == i == batch.input_ids[0, 0]
        ahead = min(i + prefetch, n - 1)
        assert teacher.begun[ahead].wait(timeout=60)
        assert not any(event.is_set() for event in teacher.begun[ahead + 1 :])
    assert i == n - 1
    lane.close()


def test_ask_ahead_takes_no_more_batches_than_it_must(ranks):
    taken = []

    def watched():
        for batch in batches(5):
            taken.append(batch)
            yield batch

    lane = TeacherLane(StandIn(fails_at=0), ranks, prefetch=1)
    asked = ask_ahead(watched(), lane)
    next(asked)
    assert len(taken) == 2
    assert len(list(asked)) == 4
    lane.close()


def test_every_rank_gets_its_own_answers_while_other_collectives_run():
    """Under what users with slow links set; of it gloo knows the blocking wait and the checks of DETAIL, which are kept
    here: only DDP crashes under them.
    """
    slow = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_ALGO": "Ring", "NCCL_MAX_NCHANNELS": "1"}
    slow |= {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_DISTRIBUTED_DEBUG": "DETAIL", "KEEP_DISTRIBUTED_DEBUG": "1"}
    codes, text = fresh.ranks(["1", "20", "0"], 3, lane_ranks.main, **slow)
    assert codes == [0, 0, 0], text[-3000:]


def test_the_lanes_thread_is_on_the_students_gpu_from_its_first_job_on(monkeypatch):
    """Or leaving a stream would set GPU 0, and every rank would hold a context there. What the lane's streams run comes
    after the teacher's weights.
    """
    calls, waited_for = [], []
    stream = SimpleNamespace(wait_stream=lambda other: waited_for.append(other))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device} that models are read on")
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: calls.append((threading.current_thread().name, str(device)))
    )
    ranks = SimpleNamespace(device=torch.device("cuda:2"), owns_teacher=False)
    lane = TeacherLane(StandIn(fails_at=0), ranks)
    lane.worker.submit(lambda: calls.append("a job")).result()
    lane.close()
    assert calls == [("teacher-lane", "cuda:2"), "a job"]
    assert waited_for == ["the stream of cuda:2 that models are read on"]


class OnGpu:
    """Plays a tensor on a GPU and records its copies."""

    def __init__(self, device, copies):
        self.device, self.copies = torch.device(device), copies

    def to(self, device, non_blocking):
        self.copies.append(f"{self.device} to {device}")
        return self


@pytest.mark.parametrize(
    "disabled,source,copies",
    [
        ("1", "cuda:4", ["cuda:4 to pinned", "waited", "cpu to cuda:0"]),
        ("0", "cuda:4", ["cuda:4 to cuda:0"]),
        (None, "cuda:4", ["cuda:4 to cuda:0"]),
        ("1", "cuda:0", ["cuda:0 to cuda:0"]),
        ("1", "cpu", ["cpu to cuda:0"]),
    ],
)
def test_where_gpus_must_not_copy_answers_go_through_the_host(monkeypatch, disabled, source, copies):
    made = []

    def to_host(answer):
        made.append(f"{answer.device} to pinned")
        return OnGpu("cpu", made), SimpleNamespace(synchronize=lambda: made.append("waited"))

    monkeypatch.setattr(teacher, "_start_copy_to_host", to_host)
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    if disabled is not None:
        monkeypatch.setenv("NCCL_P2P_DISABLE", disabled)
    teacher._to_student(OnGpu(source, made), torch.device("cuda:0"))
    assert made == copies


def test_a_teacher_that_fails_ends_all_ranks_with_its_error():
    codes, text = fresh.ranks(["1", "1000", "5"], 2, lane_ranks.main)
    assert codes[0] == 1 and codes[1] != 0
    assert "RuntimeError: the stand-in teacher is out of memory" in text


# --- waiting -------------------------------------------------------------------------------------------------


def test_waiting_is_counted_once(ranks):
    lane = TeacherLane(Teacher(tiny_teacher(), "hidden", 50), ranks)
    lane.submit(tokens()).result()
    lane.close()
    assert lane.waits.take() > 0
    assert lane.waits.take() == 0


def test_only_the_time_until_the_answer_is_there_counts(ranks, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("distillation.wait_clock.time.perf_counter", lambda: now[0])
    clock = WaitClock(CPU)
    for _ in range(2):
        with clock.counting():
            now[0] += 3.0
        now[0] += 5.0
    assert clock.take() == 6.0


def test_without_a_teacher_nothing_comes_and_nobody_waits():
    lane = NoTeacher(CPU)
    assert lane.submit(tokens()).result() is None
    assert lane.waits.take() == 0
    lane.close()
