"""Functions that are compiled on a GPU: the kernel is used only if it has the bits of the plain function on samples."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from distillation import changes, compiled, gradient_codes
from distillation.compiled import Compiled, have_same_bits
from distillation.gradient_codes import BlockIntegers
from distillation.owners import coding_kernels
from preflight.checks import coding
from preflight.checks.basics import OK, WARNING
from processes.devices import can_compile
from tests.preflight.cases import found

CPU = torch.device("cpu")
ALL = {kernel for bits in (16, 8, 4) for kernel in coding_kernels(bits, torch.bfloat16, torch.bfloat16)}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(compiled, "DEVICES", {"cpu"})


def doubled(x):
    return 2 * x, -x


def compiled_to(monkeypatch, function):
    """Returns `doubled`, of which torch.compile makes the given function."""
    monkeypatch.setattr(torch, "compile", lambda plain, **_: function)
    return Compiled("doubling", doubled, lambda device, dtype: [(torch.arange(5, device=device).to(dtype),)])


def test_a_kernel_with_the_same_bits_takes_the_place(monkeypatch, caplog):
    calls = []
    function = compiled_to(monkeypatch, lambda x: calls.append(len(x)) or doubled(x))
    for _ in range(2):
        assert torch.equal(function(torch.ones(3))[0], torch.full((3,), 2.0))
    assert calls == [5, 3, 3] and not caplog.messages  # tried once
    function(torch.ones(3, dtype=torch.float64))
    assert calls == [5, 3, 3, 5, 3]  # once more for another dtype


WRONG = {
    "one number": lambda x: (2 * x + (x == 3), -x),
    "a zero's sign": lambda x: (2 * x, 0 - x),
    "dtype": lambda x: (2 * x.double(), -x),
    "shape": lambda x: (2 * x[:-1], -x),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_one_with_other_bits_is_never_used(monkeypatch, caplog, wrong):
    function = compiled_to(monkeypatch, WRONG[wrong])
    for _ in range(2):
        assert all(map(have_same_bits, function(torch.arange(4.0)), doubled(torch.arange(4.0))))
    assert caplog.messages == [
        "doubling is not compiled and takes longer: the kernel that torch.compile made gives other bits"
    ]


def test_a_compiler_that_fails_leaves_the_plain_function(monkeypatch, caplog):
    def broken(x):
        raise RuntimeError("no such compiler\nand a long story")

    function = compiled_to(monkeypatch, broken)
    assert torch.equal(function(torch.ones(3))[0], torch.full((3,), 2.0))
    assert caplog.messages == ["doubling is not compiled and takes longer: no such compiler"]


def test_memory_that_is_too_little_is_no_fault_of_the_compiler(monkeypatch):
    def full(x):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        compiled_to(monkeypatch, full)(torch.ones(3))


def test_on_a_cpu_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(compiled, "DEVICES", {"cuda"})
    function = compiled_to(monkeypatch, None)
    assert torch.equal(function(torch.ones(3))[0], torch.full((3,), 2.0))


def test_any_nan_equals_any_other():
    one, other = torch.tensor([0x7FC0, 0x3F80]), torch.tensor([-0x40, 0x3F80])
    one, other = (m.to(torch.int16).view(torch.bfloat16) for m in (one, other))
    assert have_same_bits(one, other) and not have_same_bits(one, other + 1)


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def counted(request, monkeypatch):
    """Returns a function that says how often a graph was compiled. aot_eager traces the same ones, and runs them
    without a compiler.
    """
    if request.param == "inductor" and not can_compile("cpu"):
        pytest.skip("there is no C++ compiler")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(request.param)
    for function, _ in ALL:
        monkeypatch.setattr(function, "tried", {})
        monkeypatch.setitem(vars(function), "compiled", torch.compile(function.plain, dynamic=True, backend=counter))
    return lambda: counter.frame_count


def test_the_coding_is_compiled_with_the_bits_of_the_plain_form_and_only_when_it_is_tried(counted):
    """Otherwise a bucket of another size or place could have a kernel of its own, which nobody has compared."""
    for function, dtype in ALL:
        assert function.why_plain(CPU, dtype) is None, function.title
    before = counted()
    assert before > len(ALL)
    for n_ranks, n in itertools.product((2, 3), (128, 256, 1152)):
        own, new = torch.randn(2, n_ranks, n).bfloat16()
        for code in (BlockIntegers(8), BlockIntegers(4)):
            for message in code.encode(own):
                code.decode(message)
        for old_piece, new_piece in zip(own, new, strict=True):
            count = int(changes.count_longer(old_piece, new_piece))
            changes.apply_changes(old_piece, *changes.encode_changes(old_piece, new_piece, count))
        assert torch.equal(own, new)
    assert counted() == before


SPOILED = {
    "moved & 3": ("_plain_codes", lambda old, new: (changes._plain_codes(old, new)[0] ^ (old[::4] == 77), None)),
    "a tie": (
        "_plain_rounded_8",
        lambda blocks, inverse: (blocks.float() * inverse[..., None] + 1e-3).round().to(torch.int8).view(torch.uint8),
    ),
    "the shift of a sign": (
        "_plain_widened_4",
        lambda packed, scale: torch.stack([packed & 15, packed >> 4], -1).flatten(1).float() * scale[:, None],
    ),
    "a scale of NaN": ("_plain_largest", lambda blocks: blocks.float().abs().nan_to_num().amax(-1)),
}


@pytest.mark.parametrize("case", SPOILED)
def test_the_samples_tell_a_wrong_kernel(monkeypatch, case):
    name, wrong = SPOILED[case]
    (function, dtype), *_ = [kernel for kernel in ALL if kernel[0].plain.__name__ == name]
    monkeypatch.setattr(torch, "compile", lambda plain, **_: wrong)
    assert Compiled("it", function.plain, function.samples).why_plain(CPU, dtype) is not None


def test_the_doctor_says_what_is_compiled(monkeypatch):
    options = ("--gradient_exchange", "owners", "--gradient_bits", 4)
    assert found(coding.check_coding) == []  # another exchange
    (finding,) = found(coding.check_coding, *options)
    assert (finding.status, finding.found) == (OK, "plain PyTorch, as always on a CPU")
    gpu = torch.device("cuda")
    for function, dtype in coding_kernels(4, torch.float32, torch.float32):
        monkeypatch.setitem(function.tried, (gpu, dtype), None)
    monkeypatch.setattr(coding, "run_device", lambda: gpu)
    (finding,) = found(coding.check_coding, *options)
    assert finding.status == OK and finding.found.startswith("3 functions compiled")
    monkeypatch.setitem(gradient_codes._largest.tried, (gpu, torch.float32), "no such compiler")
    (finding,) = found(coding.check_coding, *options)
    assert finding.status == WARNING and "the scale of gradients: no such compiler" in finding.found
