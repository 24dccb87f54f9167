"""Who is who among the ranks, which devices they take, and what two real ones agree on."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from processes.devices import choose_device, choose_devices, default_prefetch
from processes.ranks import Ranks, is_main_rank, launched_world_size, process_groups
from tests.two_ranks import on_two_ranks

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch, no_torchrun):
    """Mocks a machine with some GPUs and torchrun's environment of one rank."""

    def become(n_gpus, n_students, local_rank=0):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
        os.environ.update(LOCAL_WORLD_SIZE=str(n_students), LOCAL_RANK=str(local_rank))

    return become


@pytest.mark.parametrize("local_rank", range(4))
def test_students_take_the_first_gpus_and_the_teacher_the_last(machine, local_rank):
    machine(5, 4, local_rank)
    assert choose_devices(None, "dedicated", True) == (torch.device("cuda", local_rank), torch.device("cuda:4"))


def test_the_teacher_takes_the_last_visible_gpu_of_many(machine):
    machine(8, 2, 1)
    assert choose_devices(None, "dedicated", True) == (torch.device("cuda:1"), torch.device("cuda:7"))


@pytest.mark.parametrize("n_gpus,n_students,needed", [(4, 4, 5), (1, 1, 2), (2, 4, 5)])
def test_there_is_one_more_gpu_than_students(machine, n_gpus, n_students, needed):
    machine(n_gpus, n_students)
    with pytest.raises(ValueError) as error:
        choose_devices(None, "dedicated", True)
    message = str(error.value)
    assert f"--nproc_per_node {n_students}: needs {needed} visible GPUs" in message
    assert f"and {n_gpus} are visible" in message and "--teacher_device cuda:0" in message


@pytest.mark.parametrize("name", ["cuda:0", "cuda:3", "cpu"])
def test_a_named_teacher_device_may_be_a_students_own(machine, name):
    machine(4, 4, 2)
    assert choose_devices(name, "dedicated", True) == (torch.device("cuda:2"), torch.device(name))


def test_students_need_their_own_gpus_all_the_same(machine):
    machine(3, 4)
    with pytest.raises(ValueError, match="needs 4 visible GPUs .4 for students., and 3 are visible"):
        choose_devices("cpu", "dedicated", True)


@pytest.mark.parametrize("name", ["cuda:5", "cuda:17", "cuda:-1", "gpu", "gpu:0", "5"])
def test_a_teacher_device_that_is_not_there(machine, name):
    machine(5, 4)
    with pytest.raises(ValueError, match=f"--teacher_device {name}: .*cuda:0 to cuda:4"):
        choose_devices(name, "dedicated", True)


def test_the_teacher_works_ahead_where_it_has_a_device_of_its_own(machine):
    machine(5, 4)
    assert [default_prefetch(torch.device(name)) for name in ("cuda:4", "cpu", "cuda:0")] == [1, 1, 0]
    machine(0, 2)
    assert default_prefetch(CPU) == 0


def test_a_colocated_teacher_is_beside_every_student(machine):
    machine(4, 4, 3)
    assert choose_devices(None, "colocated", True) == (torch.device("cuda:3"), torch.device("cuda:3"))


def test_without_a_teacher_its_gpu_is_not_needed(machine):
    machine(4, 4, 3)
    assert choose_devices(None, "dedicated", runs_teacher=False)[0] == torch.device("cuda:3")


def test_without_gpus_all_are_on_the_cpu(machine):
    machine(0, 4, 2)
    assert choose_devices(None, "dedicated", True) == choose_devices("cpu", "dedicated", True) == (CPU, CPU)
    with pytest.raises(ValueError, match="--teacher_device cuda:0: 0 GPUs are visible"):
        choose_devices("cuda:0", "dedicated", True)


@pytest.mark.parametrize("local_rank", range(4))
def test_without_a_teacher_beside_it_each_rank_has_a_gpu_of_its_own(machine, local_rank):
    machine(n_gpus=4, n_students=4, local_rank=local_rank)
    assert choose_device(None) == torch.device("cuda", local_rank)
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="--device cuda:1: 4 ranks cannot share it; leave it out"):
        choose_device("cuda:1")


def test_one_rank_takes_the_gpu_that_is_named(machine):
    machine(n_gpus=4, n_students=1)
    assert choose_device("cuda:2") == torch.device("cuda:2")


def test_ranks_without_enough_gpus_are_refused(machine):
    machine(n_gpus=2, n_students=3)
    with pytest.raises(ValueError, match="--nproc_per_node 3: each rank takes a GPU, and 2 are visible"):
        choose_device(None)
    machine(n_gpus=0, n_students=2)
    assert choose_device(None) == torch.device("cpu")
    with pytest.raises(ValueError, match="--device cuda:0: 0 GPUs are visible here; expected cpu"):
        choose_device("cuda:0")


def test_a_plain_run_is_the_main_rank(no_torchrun):
    assert is_main_rank()
    os.environ["RANK"] = "5"
    assert not is_main_rank()


def test_the_number_of_ranks_is_known_before_they_meet(no_torchrun):
    assert launched_world_size() == 1
    os.environ["WORLD_SIZE"] = "6"
    assert launched_world_size() == 6


def test_process_groups_of_a_plain_run(no_torchrun):
    environment = dict(os.environ)
    with process_groups(CPU) as ranks:
        assert os.environ == environment
        assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_world_size) == (0, 1, 0, 1)
        assert ranks.is_main and ranks.owns_teacher and ranks.teacher_rank == 0
        assert dist.get_backend() == "gloo"
    assert not dist.is_initialized()


def test_who_has_to_wait_long_may(no_torchrun):
    with process_groups(CPU, timedelta(days=7)) as ranks:
        assert ranks.control._get_backend(CPU).options._timeout == timedelta(days=7)
        assert ranks.node._get_backend(CPU).options._timeout == timedelta(hours=2)


def test_on_an_error_the_groups_are_not_waited_for(no_torchrun):
    """NCCL would wait, in destroying them, for collectives that the failed rank never joins."""
    with pytest.raises(KeyError), process_groups(CPU):
        raise KeyError
    assert dist.is_initialized()


class GroupIsMade(Exception):
    pass


@pytest.fixture
def under_detail():
    """Sets torch's debug level as TORCH_DISTRIBUTED_DEBUG=DETAIL does at its import."""
    before = dist.get_debug_level()
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    yield
    dist.set_debug_level(before)


@pytest.mark.parametrize("kept", ["", "0", "1"])
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_detail_is_lowered_before_a_group_is_made(no_torchrun, under_detail, monkeypatch, caplog, device, kept):
    def make(*args, **kwargs):
        raise GroupIsMade(dist.get_debug_level())

    monkeypatch.setenv("KEEP_DISTRIBUTED_DEBUG", kept)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", make)
    with pytest.raises(GroupIsMade) as made, process_groups(torch.device(device)):
        pass
    level = dist.DebugLevel.DETAIL if kept == "1" else dist.DebugLevel.INFO
    assert made.value.args == (level,)
    assert len(caplog.messages) == (kept != "1")
    assert all("DETAIL taken as INFO" in line and "KEEP_DISTRIBUTED_DEBUG=1" in line for line in caplog.messages)


@pytest.mark.parametrize("rank,local_rank,teacher_rank", [(0, 0, 0), (3, 3, 0), (4, 0, 4), (6, 2, 4)])
def test_each_node_has_its_own_teacher(rank, local_rank, teacher_rank):
    ranks = Ranks(rank, 8, local_rank, 4, CPU, node=None, control=None)
    assert ranks.teacher_rank == teacher_rank
    assert ranks.owns_teacher is (local_rank == 0)
    assert ranks.is_main is (rank == 0)


def test_one_rank_agrees_with_itself(no_torchrun):
    with process_groups(CPU) as ranks:
        assert ranks.maximum(3, 0, -1) == [3, 0, -1]
        values = torch.tensor([1.0, 2.5])
        total = ranks.total(values)
        assert torch.equal(total, values) and total is not values


# --- two real ranks ------------------------------------------------------------------------------------------


def work(ranks):
    own = torch.tensor([ranks.rank + 1.0, 0.25])
    return {
        "ranks": (ranks.rank, ranks.local_rank, ranks.owns_teacher, ranks.is_main, ranks.teacher_rank),
        "sizes": (dist.get_world_size(ranks.node), dist.get_world_size(ranks.control)),
        "maximum": ranks.maximum(ranks.rank, 1 - ranks.rank, 3 - 5 * ranks.rank),
        "total": ranks.total(own),
        "own": own,
        "gathered": ranks.gather({"rank": ranks.rank}),
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Returns what each of two real ranks found."""
    return on_two_ranks(work, tmp_path_factory.mktemp("ranks"))


def test_two_ranks_of_one_node(two_ranks):
    assert [found["ranks"] for found in two_ranks] == [(0, 0, True, True, 0), (1, 1, False, False, 0)]
    assert [found["sizes"] for found in two_ranks] == [(2, 2), (2, 2)]


def test_ranks_agree_on_maximum_and_total(two_ranks):
    for rank, found in enumerate(two_ranks):
        assert found["maximum"] == [1, 1, 3]
        assert found["total"].tolist() == [3.0, 0.5]
        assert found["own"].tolist() == [rank + 1.0, 0.25]


def test_the_first_rank_gathers_what_all_have(two_ranks):
    assert [found["gathered"] for found in two_ranks] == [[{"rank": 0}, {"rank": 1}], []]
