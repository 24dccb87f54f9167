"""The teacher's first answer, looked at before anything is learned or saved."""

from types import SimpleNamespace

import pytest
import torch

from distillation.first_answer import CHUNK_TOKENS, check_first_answer, count_not_finite
from distillation.teacher import ColocatedTeacher, NoTeacher, teacher_head
from distillation.teacher_forward import Teacher
from tests import small_runs
from tests.fresh import ranks as run_ranks
from tests.model_files import change_json, change_weight
from tests.tiny import tiny_teacher
from text.batch import Batch

CPU = torch.device("cpu")
BATCH = Batch.from_windows(torch.arange(24, 50).view(2, 13))  # 24 inputs, none twice


class Ranks:
    """Agrees with another rank that has found `other`."""

    def __init__(self, other=0):
        self.other, self.asked = other, 0

    def maximum(self, value):
        self.asked += 1
        return [max(value, self.other)]


def asked(model, signal, ranks):
    lane = ColocatedTeacher(Teacher(model, signal, 50), CPU)
    head = teacher_head(model, 50) if signal == "hidden" else None
    check_first_answer("NAME", lane, head, BATCH, ranks)
    return lane


@pytest.mark.parametrize("signal", ["hidden", "logits"])
def test_a_good_answer_costs_nobody_a_wait(signal):
    ranks = Ranks()
    assert asked(tiny_teacher(), signal, ranks).waits.take() == 0
    assert ranks.asked == 1


@pytest.mark.parametrize("signal", ["hidden", "logits"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_bad_answer_is_the_teachers_fault(signal, value):
    model = tiny_teacher()
    with torch.no_grad():
        model.get_input_embeddings().weight[BATCH.input_ids[1, 5]] = float(value)
    with pytest.raises(ValueError, match="--teacher_model NAME: its logits for the first batch are not finite"):
        asked(model, signal, Ranks())


def test_what_one_rank_finds_all_of_them_report():
    with pytest.raises(ValueError, match="not finite .7 tokens of a rank"):
        asked(tiny_teacher(), "hidden", Ranks(other=7))


def test_without_a_teacher_or_a_batch_nothing_is_asked():
    ranks = Ranks()
    check_first_answer("NAME", NoTeacher(CPU), None, BATCH, ranks)
    check_first_answer("NAME", SimpleNamespace(waits=NoTeacher(CPU).waits), None, None, ranks)
    assert ranks.asked == 2  # the other ranks, which may have an answer


@pytest.mark.parametrize("n_bad", [1, CHUNK_TOKENS, CHUNK_TOKENS + 1, 2 * CHUNK_TOKENS + 8])
def test_bad_tokens_are_counted(n_bad):
    signal = torch.ones(2, CHUNK_TOKENS + 4, 5)
    assert count_not_finite(signal, None) == 0
    signal.view(-1, 5)[-n_bad:, 3] = float("-inf")
    assert count_not_finite(signal, None) == n_bad


def test_hidden_states_whose_logits_overflow():
    hidden, head = torch.full((1, 3, 4), 200.0, dtype=torch.float16), torch.full((6, 4), 50.0, dtype=torch.float16)
    assert count_not_finite(hidden, head) == 0
    assert count_not_finite(hidden, head * 2) == 3


# --- whole runs ----------------------------------------------------------------------------------------------


def with_nan(weight):
    weight = weight.clone()
    weight[3, 4] = float("nan")
    return weight


def test_a_run_of_two_ranks_ends_before_it_saves(tmp_path):
    models = small_runs.make_models(tmp_path)
    change_json(models / "teacher" / "config.json", rms_norm_eps=-1e9)
    codes, text = run_ranks(small_runs.options(models, tmp_path / "out"), 2)
    # The first to end with 2 has the others ended by a signal, as under torchrun, whichever it is.
    assert 2 in codes and all(codes), text[-3000:]
    assert text.count("its logits for the first batch are not finite") == 1 and "Traceback" not in text
    assert not list((tmp_path / "out").glob("checkpoint-*")) and not (tmp_path / "out" / "metrics.jsonl").exists()


NAMES = {"teacher": "model.layers.2.mlp.up_proj.weight", "student": "backbone.layers.0.mlp.up_proj.weight"}


@pytest.mark.parametrize(("role", "weight"), NAMES.items())
def test_a_nan_among_the_weights_is_named_with_its_model(tmp_path, role, weight):
    models = small_runs.make_models(tmp_path)
    change_weight(models / role, weight, with_nan)
    codes, text = run_ranks(small_runs.options(models, tmp_path / "out"), 1)
    assert codes == [2], text[-3000:]
    assert f"error: --{role}_model {models / role}: {weight} holds nan in float32, expected numbers; copy" in text
    assert not list((tmp_path / "out").glob("checkpoint-*"))
