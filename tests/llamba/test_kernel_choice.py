"""Which kernels are chosen for a GPU, with packages and GPUs that are played."""

import logging
import types

import pytest
import torch

from llamba import kernels
from llamba.elementwise import FUSED_ELEMENTWISE


@pytest.fixture
def machine(monkeypatch, caplog):
    """Returns a function that gives this machine a GPU's capability, a Triton, and packages: names to their modules."""
    caplog.set_level(logging.INFO, "llamba")

    def become(capability=(9, 0), triton="3.6.0", **packages):
        packages["triton"] = module(__version__=triton)

        def import_module(name):
            parts = name.split(".")
            for i in range(len(parts)):
                if (missing := ".".join(parts[: i + 1])) not in packages:
                    raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
            return packages[name]

        find_spec = types.SimpleNamespace(find_spec=lambda name: None)
        monkeypatch.setattr(kernels, "importlib", types.SimpleNamespace(import_module=import_module, util=find_spec))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        return kernels._choose("cuda", torch.bfloat16), caplog.messages

    return become


def module(**content):
    made = types.ModuleType("made")
    vars(made).update(content)
    return made


def fla():
    return {"fla": module(), "fla.ops": module(), "fla.ops.simple_gla": module(chunk_simple_gla=None)}


@pytest.mark.parametrize(
    "capability,triton,right",
    [
        ((9, 0), "3.3.1", True),
        ((9, 0), "3.4.0", False),
        ((9, 0), "3.6.0", False),
        ((9, 0), "3.7.0", False),
        ((9, 0), "3.7.1", True),
        ((8, 0), "3.6.0", True),
        ((10, 0), "3.6.0", True),
    ],
)
def test_fla_is_refused_where_its_backward_pass_is_wrong(machine, capability, triton, right):
    chosen, lines = machine(capability, triton, **fla())
    assert chosen.scan_name == ("flash-linear-attention" if right else "plain PyTorch")
    assert [f"capability {capability[0]}.{capability[1]} with Triton {triton}" in line for line in lines] == (
        [False] if right else [True, False]
    )


def test_fla_without_its_kernels_names_the_package_that_has_them(machine):
    chosen, lines = machine(fla=module())
    assert chosen.scan_name == "plain PyTorch" and "pip install --no-deps fla-core" in lines[0]


def test_a_gpu_without_packages_is_plain_and_says_nothing_else(machine):
    chosen, lines = machine()
    assert (chosen.scan_name, chosen.conv_name, len(lines)) == ("plain PyTorch", "plain PyTorch", 1)


def test_norms_and_gates_are_fused_on_gpus_and_the_log_says_so(machine):
    chosen, lines = machine()
    assert chosen.elementwise is FUSED_ELEMENTWISE
    assert lines[-1].endswith("norms and gates by F.rms_norm and torch.compile")
    assert kernels._choose("cpu", torch.bfloat16) == kernels.plain_kernels()
