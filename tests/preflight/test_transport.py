"""By which way ranks reach each other: by NCCL's settings and the GPUs, and which settings are worth a try."""

import shutil
import stat

import pytest
import torch

from preflight.transport import (
    CHANNEL_LIMITS,
    HOST_MEMORY,
    NETWORK,
    NVLINK,
    PCIE,
    RATES,
    SOCKET_SETTINGS,
    SOCKETS,
    find_link,
    has_nvlink,
    settings_to_try,
)

OFF = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}
NAMES = (*OFF, "NCCL_IB_DISABLE", *SOCKET_SETTINGS, *CHANNEL_LIMITS)


@pytest.fixture
def machine(monkeypatch):
    """Returns a function that mocks GPUs, their links and NCCL's settings."""

    def become(settings, n_gpus=0, nvlink=False, peers=True):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *_: peers)
        monkeypatch.setattr("preflight.transport.has_nvlink", lambda: nvlink)

    return become


@pytest.mark.parametrize(
    ("settings", "gpus", "n_nodes", "way"),
    [
        (OFF, {}, 1, SOCKETS),
        (OFF, {"n_gpus": 4, "nvlink": True}, 1, SOCKETS),
        ({"NCCL_P2P_DISABLE": "1"}, {}, 1, HOST_MEMORY),
        ({"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "0"}, {}, 1, HOST_MEMORY),
        ({"NCCL_SHM_DISABLE": "1"}, {"n_gpus": 4, "nvlink": True}, 1, NVLINK),
        ({}, {"n_gpus": 4}, 1, PCIE),
        ({}, {"n_gpus": 4, "peers": False}, 1, HOST_MEMORY),
        ({}, {}, 1, PCIE),  # a machine that is not here
        ({}, {"n_gpus": 8, "nvlink": True}, 2, NETWORK),
        ({"NCCL_IB_DISABLE": "1"}, {"n_gpus": 8, "nvlink": True}, 2, SOCKETS),
    ],
)
def test_the_link_by_settings_and_gpus(machine, settings, gpus, n_nodes, way):
    machine(settings, **gpus)
    link = find_link(None, n_nodes)
    assert link.rate == RATES[way] and way in link.source
    given = [f"{name}=1" for name, value in settings.items() if value == "1"]
    assert all(setting in link.source for setting in given)
    assert find_link(1.25, n_nodes) == (1.25e9, "--link_gb_per_s")


def test_rates_are_in_the_ranges_that_were_reported():
    assert 2e9 < RATES[SOCKETS] < 5e9 and 6e9 < RATES[HOST_MEMORY] < 9e9


@pytest.mark.parametrize(("table", "found"), [("GPU0\t X \tNV18\t", True), ("GPU0\t X \tPHB\tNODE", False)])
def test_nvlink_is_read_from_nvidia_smi(tmp_path, monkeypatch, table, found):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not has_nvlink()  # there is no nvidia-smi
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!{shutil.which('sh', path='/bin:/usr/bin')}\nprintf '{table}'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    assert has_nvlink() == found


def test_settings_to_try_in_their_order(machine):
    machine({**OFF, "NCCL_MAX_NCHANNELS": "1"})
    first, second, third = settings_to_try()
    assert first.startswith("unset NCCL_SHM_DISABLE first") and "/dev/shm" in first
    assert "export NCCL_SOCKET_NTHREADS=4 NCCL_NSOCKS_PERTHREAD=4" in second
    assert third.startswith("unset NCCL_MAX_NCHANNELS")


def test_settings_that_do_not_apply_are_not_named(machine):
    machine({"NCCL_P2P_DISABLE": "1"})
    assert settings_to_try() == []
    machine({}, n_gpus=4, nvlink=True)
    assert settings_to_try() == []
    machine({**OFF, "NCCL_SOCKET_NTHREADS": "4", "NCCL_NSOCKS_PERTHREAD": "4"})
    assert len(settings_to_try()) == 1
    machine({"NCCL_IB_DISABLE": "1"}, n_gpus=8)  # sockets between nodes alone
    assert settings_to_try() == [] and settings_to_try(n_nodes=2)[0].startswith("where sockets must stay")
