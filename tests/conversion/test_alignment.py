"""The objective of --stage align on one rank: its errors and gradients against a plain reference, what it keeps in
memory, and steps of Adam from starts whose weights are balanced and are not.
"""

import copy
import itertools
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from conversion import closed_form
from conversion.alignment import LayerGradients, load_alignment, relative_error
from distillation.adamw import MasterWeightAdamW
from distillation.exchange import AllReduce
from distillation.models import Models
from distillation.teacher import PendingSignal
from distillation.update import LossScale, step_or_skip
from preflight.footprint import LiveMemory
from processes.ranks import process_groups
from tests.conversion.pairs import alignment_of, save_teacher, student_of
from tests.parsing import train_options
from tests.tiny import tiny_student, tokens
from text.batch import Batch

CPU = torch.device("cpu")


@pytest.fixture
def one_rank(no_torchrun):
    with process_groups(CPU) as ranks:
        yield ranks


def unasked(*_):
    raise AssertionError("the teacher's answer was asked for")


UNASKED = PendingSignal(unasked, waits=None)


def batch_of(n_windows, length):
    return Batch.from_windows(tokens(n_windows, length + 1))


# --- errors and gradients ------------------------------------------------------------------------------------


def test_the_error_of_zeros_is_one_and_that_of_the_target_is_zero():
    target = torch.randn(3, 5, 8)
    assert relative_error(torch.zeros_like(target), target, target) == 1
    assert relative_error(target, target, target) == 0
    torch.testing.assert_close(relative_error(1.5 * target, target, target), torch.tensor(0.25))


def test_the_error_of_windows_is_the_mean_of_theirs():
    """However large their targets are: ranks and micro steps can share them out."""
    output, target = torch.randn(4, 5, 8), torch.randn(4, 5, 8) * torch.tensor([1.0, 10, 100, 0.1])[:, None, None]
    windows = zip(output.split(1), target.split(1), strict=True)
    alone = [relative_error(o, t, t) for o, t in windows]
    torch.testing.assert_close(relative_error(output, target, target), torch.stack(alone).mean())


def test_errors_are_computed_in_float32():
    output, target = (torch.full((1, 2, 64), value, dtype=torch.float16) for value in (300.0, 100.0))
    assert relative_error(output, target, target) == 4  # squares of 200 and 100, summed, are beyond float16


def test_a_layer_that_gives_zeros_is_compared_with_its_input(tmp_path, one_rank):
    """As those have that are put in to make a Llama deeper; a mixer of zeros is right there, any other one wrong."""
    teacher = save_teacher(tmp_path / "before").requires_grad_(False)
    nn.init.zeros_(teacher.model.layers[1].self_attn.o_proj.weight)
    nn.init.zeros_(teacher.model.layers[1].mlp.down_proj.weight)
    teacher.save_pretrained(tmp_path)
    student = student_of(teacher)
    alignment = alignment_of(tmp_path, student)
    for is_right in (False, True):
        if is_right:
            for parameter in student.backbone.layers[1].mixer.parameters():
                nn.init.zeros_(parameter)
        _, *errors = alignment.backward(batch_of(2, 13), UNASKED, factor=1.0, is_last=True).tolist()
        assert all(map(math.isfinite, errors)) and errors[1] == 0 if is_right else errors[1] > 10
        assert all(gradients.flat.isfinite().all() for gradients in alignment.gradients)


def plain_errors(teacher, student, ids):
    """Returns each layer's squared error with every mixer, attention and MLP called one after another."""
    states = teacher.model(ids, output_hidden_states=True).hidden_states
    errors = {}
    for i, (block, layer) in enumerate(zip(student.backbone.layers, teacher.model.layers, strict=True)):
        if i in student.config.attention_layers:
            continue
        seen = []
        hook = layer.self_attn.register_forward_hook(lambda *args, seen=seen: seen.append(args[-1][0]))
        rotary = teacher.model.rotary_emb(states[i], torch.arange(ids.shape[1])[None])
        layer(states[i], position_embeddings=rotary)
        hook.remove()
        mixed = block.mixer(block.input_layernorm(states[i]))
        if kept := student.config.heads_of(i):
            attention = copy.deepcopy(layer.self_attn)
            others = [head for head in range(4) if head not in kept]
            attention.o_proj.weight.data.unflatten(1, (4, -1))[:, others] = 0.0
            mixed = mixed + attention(layer.input_layernorm(states[i]), rotary, attention_mask=None)[0]
        by_window = [(mixed[b] - seen[0][b]).norm() ** 2 / seen[0][b].norm() ** 2 for b in range(len(ids))]
        errors[i] = torch.stack(by_window).mean()
    return errors


@pytest.mark.parametrize("layers,heads", [((), {}), ((2,), {}), ((2,), {0: [1, 2, 3], 1: [0]})])
def test_errors_and_gradients_are_those_of_plain_autograd(tmp_path, one_rank, layers, heads):
    teacher = save_teacher(tmp_path).requires_grad_(False)
    student, batch = student_of(teacher, layers=layers, heads=heads), batch_of(3, 13)
    alignment = alignment_of(tmp_path, student)
    plain = copy.deepcopy(student)
    alignment.begin((3, 13))
    figures = alignment.backward(batch, UNASKED, factor=2.0, is_last=True)

    errors = plain_errors(teacher, plain, batch.input_ids)
    loss = sum(errors.values()) / len(errors)
    (2.0 * loss).backward()
    torch.testing.assert_close(figures, torch.stack([loss, *errors.values()]).detach())
    own = dict(student.named_parameters())
    for name, parameter in plain.named_parameters():
        if ".mixer." in name:
            torch.testing.assert_close(own[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)
            assert parameter.grad.any()
        else:
            assert own[name].grad is None, name


@pytest.mark.parametrize("layers", [(0, 2, 3), (2, 3)])
def test_the_teacher_runs_up_to_the_last_mixer(tmp_path, one_rank, layers):
    """Behind its attention nothing is needed."""
    alignment = alignment_of(tmp_path, student_of(save_teacher(tmp_path), layers=layers))
    ran = {"self_attn": [], "mlp": []}
    for i, layer in enumerate(alignment.stream.layers):
        for part, seen in ran.items():
            getattr(layer, part).register_forward_hook(lambda *_, i=i, seen=seen: seen.append(i))
    alignment.backward(batch_of(2, 13), UNASKED, 1.0, is_last=True)
    assert ran == {"self_attn": [0, 1], "mlp": [0]}


def test_accumulated_micro_steps_equal_one_batch(tmp_path, one_rank):
    teacher, batch = save_teacher(tmp_path), batch_of(4, 13)
    found = []
    for parts in (1, 2):
        alignment = alignment_of(tmp_path, student_of(teacher))
        sums = torch.zeros(5)
        for k in range(parts):
            rows = slice(k * 4 // parts, (k + 1) * 4 // parts)
            part = batch.with_tensors(lambda tensor, rows=rows: tensor[rows])
            sums += alignment.backward(part, UNASKED, 1 / parts, is_last=k + 1 == parts)
        row = alignment.named(sums.tolist(), parts)
        found.append((row, [gradients.flat for gradients in alignment.gradients]))
    (row, whole), (row_of_parts, in_parts) = found
    assert row["alignment"]["layers"] == [0, 1, 2, 3]
    assert row["loss"] == pytest.approx(row_of_parts["loss"], rel=1e-5)
    assert row["alignment"]["errors"] == pytest.approx(row_of_parts["alignment"]["errors"], rel=1e-5)
    mean_square = sum(error**2 for error in row["alignment"]["errors"]) / 4
    assert row["loss"] == pytest.approx(mean_square, rel=1e-4)
    for a, b in zip(whole, in_parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_gradients_of_a_layer_stay_in_one_tensor(one_rank):
    """Through backward, and through the clearing that follows an update."""
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    gradients = LayerGradients(list(module.parameters()))
    optimizer = MasterWeightAdamW(module.parameters(), lr=1e-3)
    for _ in range(2):
        module(torch.ones(5, 3)).sum().backward()
        gradients.begin_average()
        gradients.wait()
        assert gradients.flat.any()
        ends = itertools.accumulate((p.nbytes for p in module.parameters()), initial=gradients.flat.data_ptr())
        assert [p.grad.data_ptr() for p in module.parameters()] == list(ends)[:-1]
        torch.testing.assert_close(gradients.flat, torch.cat([p.grad.flatten() for p in module.parameters()]))
        step_or_skip(AllReduce(module, optimizer), LossScale(False, 1.0), 1.0, loss=1.0)
        assert not gradients.flat.any()


def test_a_rank_begins_with_the_student_of_rank_0(tmp_path, one_rank, monkeypatch):
    """Before it compares the teacher's tensors with its own."""
    first = student_of(save_teacher(tmp_path / "teacher"))
    other = copy.deepcopy(first)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other.save_pretrained(tmp_path / "other")
    sent = itertools.chain(first.parameters(), first.buffers())
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src: tensor.copy_(next(sent)))
    args = train_options("--dtype float32 --layers -1 --stage align")
    models = Models(str(tmp_path / "teacher"), str(tmp_path / "other"), vocab=50, tokenizer=None)
    alignment, _ = load_alignment(args, models, CPU)
    for name, tensor in alignment.model.student.state_dict().items():
        assert torch.equal(tensor, first.state_dict()[name]), name
    assert alignment.stream.bytes_held == sum(
        p.nbytes for x in alignment.stream.layers for p in x.self_attn.parameters()
    )


# --- memory --------------------------------------------------------------------------------------------------


def peak_of_a_step(folder, n_layer):
    """Returns the bytes beside weights, gradients and optimizer state at the peak of a micro step and its update."""
    teacher = save_teacher(folder / str(n_layer), num_hidden_layers=n_layer, initializer_range=0.02)
    student, batch = student_of(teacher), batch_of(2, 64)
    alignment = alignment_of(folder / str(n_layer), student)
    optimizer = MasterWeightAdamW([p for p in student.parameters() if p.requires_grad])
    alignment.begin((2, 64))

    def step():
        alignment.backward(batch, UNASKED, 1.0, is_last=True)
        step_or_skip(AllReduce(student, optimizer), LossScale(False, 1.0), 1.0, loss=1.0)

    step()  # which makes the optimizer's state
    stream = [alignment.stream.head, *(p for layer in alignment.stream.layers for p in layer.parameters())]
    state = [tensor for entry in optimizer.state.values() for tensor in entry.values()]
    given = [*student.parameters(), *stream, *state, *(gradients.flat for gradients in alignment.gradients)]
    with LiveMemory([*given, *alignment.stream.rotary.buffers(), batch.input_ids]) as memory:
        step()
    return memory.peak


def test_memory_does_not_grow_with_depth(tmp_path, one_rank):
    shallow, deep = (peak_of_a_step(tmp_path, n_layer) for n_layer in (4, 32))
    assert shallow > 2 * 64 * 40 * 4  # an MLP's activations
    assert deep == pytest.approx(shallow, rel=0.1)


# --- steps of Adam -------------------------------------------------------------------------------------------


def train(alignment, n_steps, lr):
    """Makes Adam's steps on the same windows, and returns the loss of each."""
    student, losses = alignment.model.student, []
    optimizer = MasterWeightAdamW([p for p in student.parameters() if p.requires_grad], lr=lr)
    for _ in range(n_steps):
        figures = alignment.backward(batch_of(4, 48), UNASKED, 1.0, is_last=True)
        losses.append(figures[0].item())
        step_or_skip(AllReduce(student, optimizer), LossScale(False, 1.0), 1.0, losses[-1])
    return losses


def closed_form_start(teacher, folder):
    """Returns the alignment of a student whose mixers are in closed form."""
    student = student_of(teacher)
    alignment = alignment_of(folder, student)
    for block, traced in zip(student.backbone.layers, alignment.stream.walk(tokens(16, 48, seed=99)), strict=True):
        attention = teacher.model.layers[block.layer_idx].self_attn
        u = block.input_layernorm(traced.hidden)  # (B, S, D)
        closed_form.fit_mixer(block.mixer, attention, u, u, traced.attention)
    return alignment


@torch.no_grad()
def move_into_C(mixer, factor):
    """Makes C small and x, B and out_proj large by the fourth root each: the mixer's function stays the same."""
    root, width = factor**0.25, mixer.n_qk_heads * mixer.d_state
    for tensor in (mixer.in_proj.weight, mixer.in_proj.bias, mixer.conv1d.bias):
        x, B, C = tensor[: mixer.d_xBC].split([mixer.d_inner, width, width])
        x /= root
        B /= root
        C *= root**3
    mixer.D *= root**2
    mixer.out_proj.weight /= root


def test_a_balanced_start_goes_down_where_an_unbalanced_one_rises(tmp_path, one_rank):
    """Both compute the same. With the factor 1 - a of a horizon of 1000 tokens in C alone, a step of Adam is as large
    as C itself.
    """
    teacher = save_teacher(tmp_path, hidden_size=64)
    calm = train(closed_form_start(teacher, tmp_path), 12, lr=1e-3)
    start = closed_form_start(teacher, tmp_path)
    for block in start.blocks.values():
        move_into_C(block.mixer, 1e-3)
    wild = train(start, 12, lr=1e-3)
    assert calm[0] == pytest.approx(wild[0], rel=1e-3)
    assert max(calm) < 1.2 * calm[0] and calm[-1] < calm[0]
    assert max(wild) > 2 * wild[0]


def test_students_of_another_shape_inside_can_be_aligned(tmp_path, one_rank):
    """Heads, state and MLP need not be the teacher's."""
    save_teacher(tmp_path)
    alignment = alignment_of(tmp_path, tiny_student())
    losses = train(alignment, 10, lr=1e-2)
    assert losses[-1] < losses[0]
