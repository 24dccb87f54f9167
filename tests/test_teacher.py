"""The teacher lane in one process (its exchange between ranks is tested with the whole script)."""

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM

from teacher import TeacherLane, share_head
from tests.tiny import tiny_teacher, tokens
from training_utils import process_groups

CPU = torch.device("cpu")


@pytest.fixture
def ranks(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with process_groups(CPU) as ranks:
        yield ranks


@torch.no_grad()
def test_both_signals_tell_the_teachers_logits(ranks):
    teacher, vocab = tiny_teacher(), 50  # of the teacher's 56
    expected = teacher(tokens()).logits[..., :vocab]
    sent = TeacherLane(teacher, "logits", vocab, ranks).submit(tokens()).result()
    assert torch.equal(sent, expected)

    hidden = TeacherLane(teacher, "hidden", vocab, ranks).submit(tokens()).result()
    head = share_head(teacher, vocab, ranks)
    assert hidden.shape == (2, 21, 32) and head.shape == (50, 32)
    torch.testing.assert_close(hidden @ head.T, expected)


def test_waiting_is_counted_once(ranks):
    lane = TeacherLane(tiny_teacher(), "hidden", 50, ranks)
    lane.submit(tokens()).result()
    assert lane.take_wait() > 0
    assert lane.take_wait() == 0


def test_a_teacher_whose_hidden_states_do_not_tell_its_logits_is_refused(ranks):
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
    teacher = GraniteForCausalLM(config).eval()
    with pytest.raises(ValueError, match="--teacher_signal hidden.*use --teacher_signal logits"):
        TeacherLane(teacher, "hidden", 50, ranks)
    sent = TeacherLane(teacher, "logits", 50, ranks).submit(tokens()).result()
    assert torch.equal(sent, teacher(tokens()).logits[..., :50])
