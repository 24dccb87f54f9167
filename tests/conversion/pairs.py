"""Students that have everything but their mixers from a small teacher, as make_student.py makes them."""

import functools

import torch

from conversion.alignment import Alignment
from conversion.student_config import student_config
from conversion.teacher_stream import TeacherStream
from conversion.teacher_weights import TeacherWeights
from distillation.objective import DistillationModel
from llamba import LlambaForCausalLM
from llamba.teacher_parts import take_parts
from tests.parsing import train_options
from tests.tiny import tiny_teacher


def save_teacher(folder, **changes):
    """Saves a teacher whose layers all do something, and returns it."""
    torch.manual_seed(2)
    teacher = tiny_teacher(**{"initializer_range": 0.3, **changes})
    teacher.save_pretrained(folder)
    return teacher


def student_of(teacher, dtype=torch.float32, layers=(), heads=None):
    """Returns a student with random mixers, and with the teacher's `layers` and `heads`."""
    torch.manual_seed(3)
    student = LlambaForCausalLM(student_config(teacher.config)).to(dtype)
    names = {"model.embed_tokens.weight": "backbone.embedding.weight"}
    names |= {"model.norm.weight": "backbone.final_layernorm.weight"}
    own, given = dict(student.named_parameters()), dict(teacher.named_parameters())
    with torch.no_grad():
        for name, tensor in given.items():
            twin = own.get(names.get(name, name.replace("model.layers", "backbone.layers")))
            if twin is not None:
                twin.copy_(tensor)
    if layers or heads:
        take_parts(student, teacher.config, list(layers), heads or {}, teacher.model.layers.__getitem__)
    return student


def freeze_all_but_mixers(student):
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(".mixer." in name)
    return student


def stream_of(folder, student):
    """Returns the stream of the teacher saved in `folder`, for a student of which the mixers are trained."""
    return TeacherStream(TeacherWeights(str(folder)), freeze_all_but_mixers(student), vocab=50)


def alignment_of(folder, student):
    stream = stream_of(folder, student)
    return Alignment(DistillationModel(student, stream.head, 50, train_options("--dtype float32")), stream)


def save_pair(folder, **changes):
    """Saves a teacher as `folder/teacher` and a student of it as `folder/made`."""
    teacher = save_teacher(folder / "teacher", **changes)
    student_of(teacher).save_pretrained(folder / "made")


storages = functools.partial(map, lambda tensor: tensor.untyped_storage().data_ptr())
