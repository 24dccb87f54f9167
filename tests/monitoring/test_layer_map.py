"""Maps of how far layers stray: against what transformers and a loop over the layers say, and what they must leave
alone. That a run with maps is bit for bit the run without is in tests/monitoring/test_evaluator.py.
"""

import math

import pytest
import torch

from arguments import parse_train_args
from distillation.pairing import check_layer_map
from distillation.teacher import ColocatedTeacher
from distillation.teacher_forward import Teacher
from model_utils import apply_replacements
from monitoring.layer_map import MOST_TOKENS, LayerMap, format_map, layer_map
from tests.tiny import tiny_config, tiny_hybrid, tiny_student, tiny_teacher, tokens
from text.batch import Batch

CPU = torch.device("cpu")


@pytest.fixture
def models():
    teacher = tiny_teacher()
    return tiny_hybrid(teacher=teacher), Teacher(teacher, "hidden", vocab=50)


def relative(wrong, scale):
    return (wrong.norm(dim=-1) / scale.norm(dim=-1)).mean().item()


@torch.no_grad()
def test_hidden_states_are_transformers_own(models):
    _, teacher = models
    states = teacher.hidden_states(tokens())
    outputs = teacher.model(tokens(), output_hidden_states=True).hidden_states
    assert len(states) == len(outputs) == 5
    for state, output in zip(states[:-1], outputs[:-1], strict=True):
        assert torch.equal(state, output)
    assert torch.equal(teacher.model.model.norm(states[-1]), outputs[-1])
    assert len(teacher.hidden_states(tokens())) == 5  # the hooks of the first call are gone


@torch.no_grad()
def test_stream_compares_both_models_on_the_same_tokens(models):
    student, teacher = models
    states = teacher.hidden_states(tokens())
    found = layer_map(student, tokens(), states)["stream"]
    ours = student.backbone(tokens(), use_cache=False, output_hidden_states=True).hidden_states[1:]
    expected = [relative(h - t, t) for h, t in zip(ours[:-1], states[1:-1], strict=True)]  # the last of ours is normed
    assert found[:-1] == pytest.approx(expected, rel=1e-4)
    assert len(found) == 4


@torch.no_grad()
def test_own_asks_each_layer_alone(models):
    student, teacher = models
    states = teacher.hidden_states(tokens())
    found = layer_map(student, tokens(), states)["own"]
    for i in (0, 2):
        before, after = states[i], states[i + 1]
        assert found[i] == pytest.approx(relative(student.backbone.layers[i](before) - after, after - before), rel=1e-4)
    assert found[1] == found[3] == 0.0  # the teacher's own layers


@torch.no_grad()
def test_a_layer_with_heads_reads_the_teachers_input_in_all_its_parts():
    teacher = Teacher(tiny_teacher(), "hidden", vocab=50)
    student = tiny_hybrid(teacher=teacher.model, heads={2: [0, 3]})
    states = teacher.hidden_states(tokens())
    before, after = states[2], states[3]
    angles = student.backbone.rotary_emb(before, torch.arange(before.shape[1])[None])
    expected = relative(student.backbone.layers[2](before, position_embeddings=angles) - after, after - before)
    assert layer_map(student, tokens(), states)["own"][2] == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_a_layer_that_does_nothing_errs_by_one(models):
    student, teacher = models
    layer = student.backbone.layers[2]
    layer.mixer.out_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()
    assert layer_map(student, tokens(), teacher.hidden_states(tokens()))["own"][2] == pytest.approx(1.0)


@torch.no_grad()
@pytest.mark.parametrize("width", [torch.float32, torch.bfloat16])
def test_where_the_teachers_layer_does_nothing_only_nothing_is_right(width):
    """As the layers do that are put in to make a Llama deeper. Any error is then a large one, and none is NaN."""
    teacher = tiny_teacher()
    for i in (0, 2, 3):
        teacher.model.layers[i].self_attn.o_proj.weight.zero_()
        teacher.model.layers[i].mlp.down_proj.weight.zero_()
    student = tiny_hybrid(teacher=teacher).to(width)  # layers 1 and 3 are the teacher's
    right = student.backbone.layers[0]
    right.mixer.out_proj.weight.zero_()
    right.mlp.down_proj.weight.zero_()
    states = Teacher(teacher.to(width), "hidden", vocab=50).hidden_states(tokens())
    found = layer_map(student, tokens(), states)
    assert all(map(math.isfinite, found["own"] + found["stream"]))
    assert found["own"][0] == found["own"][1] == found["own"][3] == 0 and found["own"][2] > 100


@torch.no_grad()
def test_a_token_whose_embedding_is_zero_is_no_error_of_a_layer_that_leaves_it_so():
    """As that of a padding token often is. A layer that adds something to it has an error without bounds."""
    teacher = tiny_teacher()
    teacher.model.embed_tokens.weight[7].zero_()
    student, ids = tiny_hybrid(teacher=teacher), tokens()
    ids[:, 0] = 7
    states = Teacher(teacher, "hidden", vocab=50).hidden_states(ids)
    mixers = [student.backbone.layers[i].mixer for i in (0, 2)]
    for mixer in mixers:
        mixer.conv1d.bias.zero_()
    assert all(map(math.isfinite, layer_map(student, ids, states)["own"]))
    mixers[0].conv1d.bias.fill_(1.0)
    row = {"step": 5, "layer_map": layer_map(student, ids, states)}
    assert row["layer_map"]["own"][0] == math.inf and math.isfinite(row["layer_map"]["own"][2])
    assert "largest errors: layers 0 (inf)" in format_map(row)


def test_a_student_that_is_the_teacher_strays_nowhere(models):
    _, teacher = models
    student = tiny_student()
    apply_replacements(student, teacher.model, [0, 1, 2, 3])
    with torch.no_grad():
        student.backbone.embedding.weight.copy_(teacher.model.model.embed_tokens.weight[: student.config.vocab_size])
    found = layer_map(student.eval(), tokens(), teacher.hidden_states(tokens()))
    assert max(found["stream"] + found["own"]) < 1e-5


def test_a_map_goes_into_its_row_and_leaves_the_student_in_training(models, caplog, monkeypatch):
    student, teacher = models
    student.train()
    monkeypatch.setattr("monitoring.layer_map.logger.propagate", True)
    maps = LayerMap(5, student, ColocatedTeacher(teacher, CPU))
    batch = Batch.from_windows(tokens(batch=3, length=MOST_TOKENS // 4))
    before, random = [p.clone() for p in student.parameters()], torch.get_rng_state()
    rows = [{"step": step} for step in (4, 5)]
    with caplog.at_level("INFO"):
        for row in rows:
            maps.add_to(row, batch)
    assert "layer_map" not in rows[0] and {len(values) for values in rows[1]["layer_map"].values()} == {4}
    assert student.training and all(map(torch.equal, before, student.parameters()))
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None for p in student.parameters())
    assert "layer map (opt 5)" in caplog.text
    row = {"step": 5}
    LayerMap(0, student, ColocatedTeacher(teacher, CPU)).add_to(row, batch)
    assert row == {"step": 5}


def test_a_map_that_cannot_be_made_ends_no_run(models, caplog, monkeypatch):
    student, teacher = models
    student.train()
    monkeypatch.setattr("monitoring.layer_map.logger.propagate", True)
    monkeypatch.setattr(teacher, "hidden_states", lambda input_ids: 1 / 0)
    maps = LayerMap(1, student, ColocatedTeacher(teacher, CPU))
    for step in (1, 2):
        row = {"step": step}
        maps.add_to(row, Batch.from_windows(tokens()))
        assert row == {"step": step}
    assert caplog.text.count("layer map: ZeroDivisionError: division by zero; no more are made") == 1
    assert student.training


def test_the_line_names_the_layers_that_stray_most():
    row = {"step": 7, "layer_map": {"own": [0.5, float("nan"), 0.25, 2.0, 0.1], "stream": [1, 2, 3, 4, 0.75]}}
    assert format_map(row) == (
        "layer map (opt 7) | largest errors: layers 1 (nan), 3 (2.000), 0 (0.500) | after the last layer 0.750"
    )


def test_models_of_other_shapes_are_refused():
    check_layer_map(5, tiny_config(), tiny_teacher().config)
    with pytest.raises(ValueError, match="--layer_map_interval 5: the student has 3 layers of width 32, the teacher 4"):
        check_layer_map(5, tiny_config(n_layer=3), tiny_teacher().config)
    check_layer_map(0, tiny_config(n_layer=3), tiny_teacher().config)


def test_without_a_teacher_there_is_nothing_to_compare():
    with pytest.raises(ValueError, match="--layer_map_interval 5 --kl_weight 0"):
        parse_train_args(["--layer_map_interval", "5", "--kl_weight", "0"])
