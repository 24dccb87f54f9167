"""The teacher's stream beside a student: against the whole teacher in transformers, and what of it is in memory."""

import pytest
import torch

from distillation.teacher_forward import Teacher
from model_utils import get_teacher_model
from tests.conversion.pairs import save_teacher, stream_of, student_of
from tests.tiny import tiny_student, tokens


def parameters(stream):
    """Returns all tensors of a stream by the names of the teacher's."""
    found = {f"layers.{i}.{name}": p for i, layer in enumerate(stream.layers) for name, p in layer.named_parameters()}
    return {"embedding": stream.embedding, "norm": stream.norm.weight, "head": stream.head, **found}


def held_beside(stream, student):
    """Returns the names of the tensors that a stream has in memory of their own."""
    own = {p.untyped_storage().data_ptr() for p in student.parameters()}
    return {name for name, p in parameters(stream).items() if p.untyped_storage().data_ptr() not in own}


def attention_of(layers):
    return {f"layers.{i}.self_attn.{part}_proj.weight" for i in layers for part in "qkvo"}


@pytest.mark.parametrize("layers", [(), (1, 3)])
@pytest.mark.parametrize("tied", [True, False])
def test_a_stream_is_the_teacher_with_only_attention_beside_the_student(tmp_path, tied, layers):
    """Of a student of this teacher every tensor is shared but the attention of recurrent layers."""
    teacher = save_teacher(tmp_path, tie_word_embeddings=tied)
    student = student_of(teacher, layers=layers)
    stream, ids = stream_of(tmp_path, student), tokens(3, 21)
    held = held_beside(stream, student)
    assert held == attention_of({0, 1, 2, 3} - set(layers))
    assert stream.bytes_held == sum(parameters(stream)[name].nbytes for name in held)
    assert torch.equal(stream(ids), teacher.model(ids).last_hidden_state)
    assert torch.equal(stream.head, teacher.lm_head.weight[:50])
    expected = Teacher(teacher, "hidden", 50).hidden_states(ids)
    assert all(torch.equal(own, given) for own, given in zip(stream.hidden_states(ids), expected, strict=True))
    assert all(p.requires_grad is (".mixer." in name) for name, p in student.named_parameters())


def test_sixteen_bits_are_shared_too(tmp_path):
    """The teacher's files have float32: what is the same after rounding is held once."""
    teacher = save_teacher(tmp_path)
    student = student_of(teacher, torch.bfloat16)
    stream, ids = stream_of(tmp_path, student), tokens(2, 9)
    assert held_beside(stream, student) == attention_of(range(4))
    teacher = get_teacher_model(str(tmp_path), torch.bfloat16, torch.device("cpu"))
    assert torch.equal(stream(ids), teacher.model(ids).last_hidden_state)


def test_what_was_trained_since_is_held_separately(tmp_path):
    """The student keeps its own, and the stream is still the teacher's."""
    teacher = save_teacher(tmp_path)
    student = student_of(teacher, layers=(2,))
    with torch.no_grad():
        student.backbone.layers[0].mlp.up_proj.weight[0, 0] += 1
        student.backbone.layers[2].self_attn.q_proj.weight[0, 0] += 1
        student.backbone.final_layernorm.weight[3] += 1
    before = {name: p.clone() for name, p in student.named_parameters()}
    stream, ids = stream_of(tmp_path, student), tokens(2, 9)
    changed = {"norm", "layers.0.mlp.up_proj.weight", "layers.2.self_attn.q_proj.weight"}
    assert held_beside(stream, student) == attention_of({0, 1, 3}) | changed
    assert torch.equal(stream(ids), teacher.model(ids).last_hidden_state)
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())


def test_a_student_of_another_teacher_shares_nothing(tmp_path):
    """Only width and depth have to agree; the vocabularies differ, and the MLPs."""
    teacher = save_teacher(tmp_path)
    student = tiny_student()
    stream, ids = stream_of(tmp_path, student), tokens(2, 9)
    assert held_beside(stream, student) == parameters(stream).keys()
    assert stream.bytes_shared == 0
    assert torch.equal(stream(ids), teacher.model(ids).last_hidden_state)
    assert stream.head.shape == (50, 32)
