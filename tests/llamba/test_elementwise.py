"""Norms, SwiGLU and the mixers' gate: the plain forms are transformers' own bit for bit; the fused ones round less, and
give way where nothing can be compiled. They reach every norm and MLP of a student and of a teacher.
"""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from arguments import parse_train_args
from distillation import models
from llamba import elementwise, kernels
from llamba.elementwise import FUSED_ELEMENTWISE, MOST_SHAPES, PLAIN_ELEMENTWISE, Region
from llamba.kernels import plain_kernels, using_kernels
from llamba.llama import FrozenMLP, RMSNorm, TrainedMLP, use_kernels
from processes.ranks import process_groups
from tests.tiny import tiny_hybrid, tiny_student, tiny_teacher, tokens

B, L, H, P, D_FF = 2, 13, 3, 8, 40


@pytest.fixture
def uncompiled(monkeypatch):
    """Has torch.compile give back what it is given, and returns what it was given."""
    given = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: given.append(function) or function)
    return given


def region(title):
    """Returns a fresh region like that of the fused forms."""
    shared = FUSED_ELEMENTWISE.swiglu if title == "swiglu" else FUSED_ELEMENTWISE.gate
    return Region(title, shared.plain, shared.forward, shared.backward)


def draw(name, dtype):
    """Draws the tensors that a function takes: a norm's weights and D are near 1."""
    torch.manual_seed(0)

    def normal(*shape, around=0.0):
        return (torch.randn(*shape) * (0.2 if around else 1.5) + around).to(dtype)

    return {
        "rms_norm": [normal(B, L, 64), normal(64, around=1.0)],
        "swiglu": [normal(B, L, D_FF), normal(B, L, D_FF)],
        "gate": [normal(B, L, H, P), normal(B, L, H, P), normal(H, around=1.0), normal(B, L, H * P), normal(H * P)],
    }[name]


def results(function, inputs):
    """Returns a function's result and the gradients of all its inputs."""
    leaves = [m.detach().requires_grad_() for m in inputs]
    y = function(*leaves)
    d_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    return [y.detach(), *torch.autograd.grad(y, leaves, d_y.to(y.dtype))]


def exact_rms_norm(x, weight, eps):
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


# --- numerics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "gate"])
def test_fused_forms_err_no_more_than_plain_ones(uncompiled, name, dtype):
    compare_errors(name, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["swiglu", "gate"])
def test_compiled_forms_err_no_more_than_plain_ones(name, dtype):
    compare_errors(name, dtype)


def compare_errors(name, dtype):
    """Compares a fused form with the plain one, by the errors of its result and of each gradient against float64. In
    float32 both round alike, and chance says which errs more: half a unit in the last place is allowed.
    """
    inputs = draw(name, dtype)
    if name == "rms_norm":
        exact, plain = (functools.partial(f, eps=1e-5) for f in (exact_rms_norm, elementwise.rms_norm))
        forms = (elementwise.library_rms_norm, elementwise.one_rounding_rms_norm)  # the second within compiled blocks
        fused = [functools.partial(f, eps=1e-5) for f in forms]
    else:
        exact = plain = getattr(PLAIN_ELEMENTWISE, name)
        fused = [region(name)]
    truths = results(exact, [m.double() for m in inputs])
    allowed = errors(results(plain, inputs), truths)
    for form in fused:
        found = errors(results(form, inputs), truths)
        for own, most in zip(found, allowed, strict=True):
            assert own <= most + (2.0**-24 if dtype == torch.float32 else 0), (found, allowed)


def errors(found, truths):
    return [((one - truth).norm() / truth.norm()).item() for one, truth in zip(found, truths, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plain_norm_is_that_of_transformers(dtype):
    x, weight = draw("rms_norm", dtype)
    norm = LlamaRMSNorm(64, eps=1e-5).to(dtype)
    found = results(functools.partial(elementwise.rms_norm, eps=1e-5), [x, weight])
    with torch.no_grad():
        norm.weight.copy_(weight)
    given = x.clone().requires_grad_()
    y = norm(given)
    assert torch.equal(y, found[0])
    d_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).to(dtype)
    for one, other in zip(torch.autograd.grad(y, [given, norm.weight], d_y), found[1:], strict=True):
        assert torch.equal(one, other)


def test_a_gate_without_a_bias(uncompiled):
    inputs = draw("gate", torch.float32)[:-1]
    plain, fused = (results(lambda *m, f=f: f(*m, None), inputs) for f in (elementwise.gate, region("gate")))
    for one, other in zip(fused, plain, strict=True):
        torch.testing.assert_close(one, other)


# --- regions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name,n_inputs", [("swiglu", 2), ("gate", 5)])
def test_inputs_alone_are_kept_for_backward(uncompiled, name, n_inputs):
    inputs = [m.requires_grad_() for m in draw(name, torch.bfloat16)]
    function, kept = region(name), []
    with torch.autograd.graph.saved_tensors_hooks(lambda m: kept.append(m.data_ptr()) or m, lambda m: m):
        function(*inputs)
    assert sorted(kept) == sorted(m.data_ptr() for m in inputs) and len(kept) == n_inputs
    assert len(uncompiled) == 2  # forward and backward, once


def test_a_first_trial_within_a_checkpointed_block(uncompiled):
    """Recomputation counts what is kept for backward: a trial must not keep anything."""
    inputs = draw("gate", torch.float32)
    function = region("gate")
    once = results(lambda *m: checkpoint(function, *m, use_reentrant=False), inputs)
    for one, other in zip(once, results(function, inputs), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_compiler_that_fails_leaves_the_plain_form_and_one_warning(monkeypatch, caplog, in_backward):
    calls = []

    def compile_(function, **_):
        def broken(*tensors):
            calls.append(function)
            raise RuntimeError("out of resource: shared memory\nand a long story")

        return broken if in_backward == (function is elementwise.swiglu_gradients) else function

    monkeypatch.setattr(torch, "compile", compile_)
    inputs, function = draw("swiglu", torch.bfloat16), region("swiglu")
    plain = results(elementwise.swiglu, inputs)
    for _ in range(2):
        for one, other in zip(results(function, inputs), plain, strict=True):
            assert torch.equal(one, other)
    function(*(m[:1] for m in inputs))  # another shape is not tried
    assert len(calls) == 1
    assert caplog.messages == ["swiglu cannot be compiled and runs slower: out of resource: shared memory"]


def test_memory_that_is_too_little_is_no_fault_of_the_compiler(monkeypatch):
    def full(*tensors):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch, "compile", lambda function, **_: full)
    with pytest.raises(torch.OutOfMemoryError):
        region("swiglu")(*draw("swiglu", torch.float32))


def test_no_more_shapes_are_compiled_for_than_torch_keeps(monkeypatch):
    compiled = []

    def compile_(function, **_):
        return lambda *tensors: compiled.append((function.__name__, tensors[0].shape)) or function(*tensors)

    monkeypatch.setattr(torch, "compile", compile_)
    function = region("swiglu")
    for length in range(1, MOST_SHAPES + 3):
        gate, up = torch.randn(2, length, 4)  # without gradients: no backward
        torch.testing.assert_close(function(gate, up), F.silu(gate) * up)
    assert len(set(compiled)) == MOST_SHAPES == torch._dynamo.config.recompile_limit
    assert {name for name, _ in compiled} == {"one_rounding_swiglu"}


# --- where they are used -------------------------------------------------------------------------------------


@pytest.fixture
def fused_on_cpu(uncompiled, monkeypatch):
    """Has CPUs use the fused forms, and returns a list of the calls by name."""
    calls = []

    def counted(name, function):
        return lambda *inputs: calls.append(name) or function(*inputs)

    forms = [FUSED_ELEMENTWISE.rms_norm, region("swiglu"), region("gate")]
    named = zip(("rms_norm", "swiglu", "gate"), forms, strict=True)
    fused = elementwise.Elementwise("fused", *(counted(*pair) for pair in named))
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setitem(kernels._chosen, ("cpu", dtype), plain_kernels()._replace(elementwise=fused))
    return calls


def loss_and_gradients(model):
    model.zero_grad()
    loss = model(tokens(), use_cache=False).logits.square().mean()
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_hybrid_in_training_is_fused_throughout(fused_on_cpu, checkpointing):
    model = tiny_hybrid().train()  # of 4 layers, 2 of them of a teacher
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found, calls = loss_and_gradients(model), list(fused_on_cpu)
    times = 2 if checkpointing else 1
    expected = {"rms_norm": 8 * times + 1, "swiglu": 4 * times, "gate": 2 * times}
    assert {name: calls.count(name) for name in expected} == expected
    with using_kernels(plain_kernels(), "cpu", torch.float32):
        for one, other in zip(found, loss_and_gradients(model), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_in_evaluation_only_the_norms_are_fused(fused_on_cpu):
    tiny_hybrid().eval()(tokens(), use_cache=False)
    assert fused_on_cpu == ["rms_norm"] * 9


def test_a_teacher_is_fused_and_is_the_same_model(fused_on_cpu):
    teacher = tiny_teacher()
    names, expected = list(teacher.state_dict()), teacher(tokens()).logits
    assert not fused_on_cpu
    use_kernels(teacher, FrozenMLP)
    torch.testing.assert_close(teacher(tokens()).logits, expected, rtol=1e-4, atol=1e-5)
    assert (fused_on_cpu.count("rms_norm"), fused_on_cpu.count("swiglu")) == (9, 4)
    assert list(teacher.state_dict()) == names
    for twin in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        assert [type(module) for module in twin.modules()] == [type(module) for module in teacher.modules()]


def test_a_run_fuses_its_teacher(monkeypatch):
    monkeypatch.setattr(models, "get_teacher_model", lambda *_, **__: tiny_teacher())
    monkeypatch.setattr(models, "get_student_model", lambda *_, **__: tiny_student())
    cpu, args = torch.device("cpu"), parse_train_args(["--layers", "1", "--dtype", "float32"])
    with process_groups(cpu) as ranks:
        student, _, lane = models.load_models(args, models.Models("", "", 50, None), ranks, cpu)
        lane.close()
    for model, mlp in ((lane.teacher.model, FrozenMLP), (student, TrainedMLP)):
        kinds = {type(module) for module in model.modules()}
        assert {mlp, RMSNorm} <= kinds and not {LlamaMLP, LlamaRMSNorm} & kinds


def test_other_architectures_are_left_alone():
    sizes = dict(vocab_size=56, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4)
    model = GraniteForCausalLM(GraniteConfig(**sizes, num_key_value_heads=2))
    before = [type(module) for module in model.modules()]
    use_kernels(model, FrozenMLP)
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize("kind", [TrainedMLP, FrozenMLP])
def test_another_activation_is_computed_as_it_is(fused_on_cpu, kind):
    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2, hidden_act="gelu")
    mlp, x = LlamaMLP(config), torch.randn(2, 16)
    expected = mlp(x)
    use_kernels(mlp, kind)
    assert type(mlp) is kind and torch.equal(mlp(x), expected) and not fused_on_cpu


def test_new_norms_are_initialised_as_transformers_does():
    model = tiny_hybrid()
    norms = [module for module in model.modules() if isinstance(module, LlamaRMSNorm)]
    assert len(norms) == 9 and {type(norm) for norm in norms} == {RMSNorm}
    for norm in norms:
        model._init_weights(norm)
        assert torch.equal(norm.weight, torch.ones(32))
