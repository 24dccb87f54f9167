"""Devices by name, and what torch.compile needs on a machine."""

import pytest
import torch

from processes.devices import can_compile, check_compiler, checked_device


@pytest.mark.parametrize("name", ["cuda:0", "cuda:7", "gpu", "meta"])
def test_a_device_that_is_not_there(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=f"--device {name}"):
        checked_device("--device", name)
    assert checked_device("--device", None) == torch.device("cpu")


def test_devices_are_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert checked_device("--device", "cuda:1") == torch.device("cuda:1")
    assert checked_device("--teacher_device", "cuda") == torch.device("cuda:0")
    assert checked_device("--device", None) == torch.device("cuda:0")
    with pytest.raises(ValueError, match="2 GPUs are visible here; expected cpu or cuda:0 to cuda:1"):
        checked_device("--device", "cuda:2")


@pytest.mark.parametrize(
    "device_type,programs,has_triton,expected",
    [
        ("cpu", {"g++"}, False, True),
        ("cpu", {"gcc"}, True, False),
        ("cuda", {"gcc"}, True, True),
        ("cuda", {"gcc"}, False, False),
        ("cuda", set(), True, False),
    ],
)
def test_a_missing_compiler_is_reported_before_a_run(monkeypatch, device_type, programs, has_triton, expected):
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("processes.devices.shutil.which", lambda name: name if name in programs else None)
    monkeypatch.setattr("processes.devices.importlib.util.find_spec", lambda name: object() if has_triton else None)
    can_compile.cache_clear()
    try:
        assert can_compile(device_type) is expected
        if not expected:
            with pytest.raises(ValueError, match="--compile: torch.compile needs .*, not found here"):
                check_compiler(device_type)
    finally:
        can_compile.cache_clear()
