"""The plan that --dry_run prints: which machine it is for, where the teacher sits, what goes over the wire and onto the
disk, and the advice at its end. That its bytes are those of real runs is in tests/preflight/test_footprint.py.
"""

import functools
import json
import re
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from arguments import parse_train_args
from checkpointing import run_folder
from checkpointing.run_folder import disk_room
from monitoring.speed import peak_operations
from preflight.footprint import measure_footprint
from preflight.machine import Machine, find_machine
from preflight.plan import Plan, asked_placement, make_plan
from preflight.plan_report import advice, disk_advice, machine_text, print_plan, run_table, seats
from preflight.step_time import StepTime
from preflight.time_report import assumptions
from preflight.transport import RATES, SOCKETS, Link
from preflight.wire import NOTHING
from tests import fresh
from tests.parsing import train_options
from tests.preflight.test_footprint import folder, options
from tests.project.test_readme import PRODUCTION

__all__ = ["folder"]  # a fixture
ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


# --- the machine ---------------------------------------------------------------------------------------------


@pytest.fixture
def visible(monkeypatch):
    """Returns a function that mocks visible GPUs."""

    def see(*gpus):
        found = [SimpleNamespace(name=name, total_memory=size) for name, size in gpus]
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: found[i])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: found[i].name)
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *_: True)

    see()
    return see


@pytest.fixture
def launched(monkeypatch):
    """Returns a function that sets the environment of a process that torchrun has started."""

    def launch(n_local, n_nodes=1):
        words = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": n_local * n_nodes, "LOCAL_WORLD_SIZE": n_local}
        for name, value in words.items():
            monkeypatch.setenv(name, str(value))

    return launch


def test_without_gpus_it_is_the_machine_of_the_long_run(visible, no_torchrun):
    found = find_machine(train_options())
    assert (found.n_gpus, found.gpu_bytes, found.n_nodes) == (5, 80e9, 1)
    assert found.speed == pytest.approx(650e12, rel=0.01) and found.memory_rate == pytest.approx(3e12, rel=0.01)
    described = find_machine(train_options("--dry_run --gpus 3 --gpu_gb 24 --tflops 100 --nodes 2 --link_gb_per_s 1.5"))
    assert (described.n_gpus, described.gpu_bytes, described.n_nodes) == (3, 24e9, 2)
    assert described.link == Link(1.5e9, "--link_gb_per_s") and described.inside_rate >= RATES[SOCKETS]
    part = 100 / 989
    assert described.speed / found.speed == pytest.approx(part) == described.memory_rate / found.memory_rate


def test_gpus_that_are_visible_are_planned_for(visible, no_torchrun):
    visible(("NVIDIA A100-SXM4-80GB", 85e9), ("NVIDIA A100-SXM4-80GB", 84e9))
    found = find_machine(train_options())
    assert (found.n_gpus, found.gpu_bytes) == (2, 84e9)
    assert found.speed == 0.66 * peak_operations("NVIDIA A100-SXM4-80GB", torch.bfloat16)
    assert found.memory_rate == 0.9 * 2.04e12
    visible(("A card of tomorrow", 1e12))
    assert find_machine(train_options("--kl_weight 0")).speed == 0.66 * 989e12
    assert find_machine(train_options("--kl_weight 0 --dry_run --gpu_gb 24")).gpu_bytes == 24e9


def test_torchrun_says_how_many_students_there_are(visible, launched):
    launched(3, n_nodes=2)
    machine = find_machine(train_options())
    assert (machine.n_gpus, machine.n_students, machine.n_nodes) == (4, 3, 2)
    assert find_machine(train_options("--teacher_placement colocated")).n_gpus == 3
    assert find_machine(train_options("--teacher_device cuda:0")).n_gpus == 3
    assert find_machine(train_options("--teacher_device cuda:5")).n_gpus == 6
    visible(*[("NVIDIA H100", 80e9)] * 8)
    machine = find_machine(train_options())
    assert (machine.n_gpus, machine.n_students) == (8, 3)


@pytest.mark.parametrize(
    "text,message",
    [
        ("--dry_run --gpus 1", "--gpus 1: too few, this run takes 2"),
        ("--teacher_device cpux", "--teacher_device cpux: expected cpu, or cuda:N"),
        ("--dry_run --gpu_gb -1", "--gpu_gb -1.0: expected at least 0.001"),
        ("--dry_run --tflops 0", "--tflops 0.0: expected at least 0.001"),
        ("--dry_run --link_gb_per_s 0", "--link_gb_per_s 0.0: expected a number above 0"),
        ("--link_gb_per_s 5", "--link_gb_per_s 5.0: is for a plan; add --dry_run"),
        ("--gpus 4", "--gpus 4: is for a plan; add --dry_run"),
        ("--plan_json x", "--plan_json x: is for a plan; add --dry_run"),
    ],
)
def test_mistakes_are_named(visible, no_torchrun, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        find_machine(train_options(text))


# --- placements and advice -----------------------------------------------------------------------------------


MACHINE = Machine(n_gpus=5, gpu_bytes=80e9, speed=650e12)


@pytest.mark.parametrize(
    "text,placement",
    [
        ("", "dedicated"),
        ("--teacher_device cuda:4", "dedicated"),
        ("--teacher_device cuda:0", "shared"),
        ("--teacher_device cuda:3", "shared"),
        ("--teacher_device cpu", "none"),
        ("--kl_weight 0", "none"),
        ("--teacher_placement colocated", "colocated"),
    ],
)
def test_the_options_say_where_the_teacher_sits(text, placement):
    assert asked_placement(train_options(text), MACHINE) == placement


def test_memory_of_the_placements(folder):
    args = parse_train_args(options(folder, "wide", "--seq_length 40"))
    footprint = measure_footprint(args)
    dedicated, colocated, shared = (
        make_plan(args, footprint, MACHINE, name).gpus for name in ("dedicated", "colocated", "shared")
    )
    teacher = footprint.teacher.weights
    assert list(dedicated) == ["student GPU", "teacher GPU"]
    assert dedicated["teacher GPU"]["forward"]["teacher's weights"] == teacher
    assert "teacher's weights" not in dedicated["student GPU"]["forward"]
    assert dedicated["student GPU"]["forward"]["teacher's head"] == 4 * 8192 * 256
    assert colocated["every GPU"]["forward"]["teacher's weights"] == teacher
    assert "teacher's head" not in colocated["every GPU"]["forward"]
    assert shared["student GPU"]["forward"]["teacher's head"] == 4 * 8192 * 256
    both = shared["GPU of student and teacher"]["backward"]
    assert (both["teacher's weights"], both["teacher's head"]) == (teacher, 0)


def placed(placement, n_students):
    return Plan(placement, n_students, n_students, {}, step_of(1.0), 0, 100)


def step_of(seconds, micro_steps=1):
    return StepTime(micro_steps, 0.0, seconds, 0.0, 0.0, 0, 0.0, NOTHING)


def made_up(placement, gb, tokens_per_second):
    moments = {"student GPU": {"forward": {"all": int(gb * 1e9)}}}
    return Plan(placement, 4, 4, moments, step_of(1.0), answer_bytes=0, micro_step_tokens=tokens_per_second)


@pytest.mark.parametrize(
    "asked,other,expected",
    [
        ((60, 100), (70, 150), "Colocated fits and is the fastest: give --teacher_placement colocated."),
        ((60, 200), (70, 150), "Dedicated fits and is the fastest."),
        ((60, 100), (90, 150), "Dedicated fits; colocated would be 1.50 times as fast and does not fit."),
        ((90, 100), (70, 50), "Colocated fits; dedicated would be 2.00 times as fast and does not fit: give "
                              "--teacher_placement colocated."),
        ((90, 100), (95, 150), "Does not fit."),
    ],
)  # fmt: skip
def test_the_fastest_that_fits_is_advised(asked, other, expected):
    assert advice(made_up("dedicated", *asked), [made_up("colocated", *other)], MACHINE) == expected


def test_a_teacher_on_a_named_gpu_shares_it_if_a_student_is_there():
    """By the students that torchrun has started, if it has."""
    args = train_options("--teacher_device cuda:1")
    for machine, placement in (
        (Machine(2, 80e9, 1e12), "dedicated"),
        (Machine(2, 80e9, 1e12, n_students=2), "shared"),
        (Machine(5, 80e9, 1e12, n_students=1), "dedicated"),
        (Machine(1, 80e9, 1e12), "dedicated"),
    ):
        assert asked_placement(args, machine) == placement
    assert asked_placement(train_options("--teacher_device cuda:0"), Machine(1, 80e9, 1e12)) == "shared"
    made = placed("dedicated", 1)
    assert "runs the teacher on cuda:1" in seats(made, args, Machine(5, 80e9, 1e12, n_students=1))
    assert seats(made, args, Machine(5, 80e9, 1e12, n_students=1)).endswith("cuda:2, cuda:3, cuda:4: not used")


def test_without_a_teacher_on_a_gpu_there_is_one_placement():
    assert advice(made_up("none", 60, 100), [], MACHINE) == "Fits."
    assert advice(made_up("none", 90, 100), [], MACHINE) == "Does not fit."


@pytest.mark.parametrize("text,asks", [("", False), ("--dtype float32", True), ("--dtype float32 --tflops 100", False)])
def test_a_peak_that_is_not_known_is_asked_for(visible, text, asks):
    assert ("Give --tflops" in assumptions(train_options(text), MACHINE)) == asks
    visible(("A card of tomorrow", 1e12))
    assert ("Give --tflops" in assumptions(train_options(text), MACHINE)) == ("--tflops" not in text)


def test_the_plan_says_how_sure_its_times_are():
    assert "estimates, not yet measured on CUDA: +-25%." in assumptions(train_options(""), MACHINE)


def test_what_is_not_known_is_asked_for(visible, capsys):
    text = machine_text(train_options("--dry_run --gpus 3"), MACHINE)
    assert text.endswith("describe yours with --gpu_gb, --tflops, --link_gb_per_s.")
    assert machine_text(train_options("--dry_run --gpus 3 --gpu_gb 24 --tflops 9 --link_gb_per_s 5"), MACHINE).endswith(
        "of 80 GB."
    )


def test_a_plan_that_cannot_be_written_is_the_first_error():
    with pytest.raises(ValueError, match="--plan_json /absent/x.json: its folder is not there"):
        print_plan(train_options("--dry_run --plan_json /absent/x.json"))


def test_layers_that_cannot_be_compared_are_an_error_of_a_plan(folder):
    argv = [*options(folder, "wide", "--layer_map_interval 5"), "--teacher_model", str(folder / "narrow" / "teacher")]
    with pytest.raises(ValueError, match="--layer_map_interval 5|--layers"):
        measure_footprint(parse_train_args(argv))


def test_windows_beyond_the_context_are_an_error_of_a_plan(folder):
    with pytest.raises(ValueError, match="--seq_length 2049: .* 2048 tokens at once"):
        measure_footprint(parse_train_args(options(folder, "narrow", "--seq_length 2049")))


def test_advice_names_the_option_that_is_in_the_way():
    text = advice(made_up("shared", 60, 100), [made_up("colocated", 70, 150)], MACHINE)
    assert text.endswith("give --teacher_placement colocated and no --teacher_device.")


# --- steps, wire, disk ---------------------------------------------------------------------------------------


def test_the_seats_are_those_of_the_readme():
    made = placed("dedicated", 4)
    lines = [line.split(maxsplit=3) for line in seats(made, train_options(), MACHINE).splitlines()]
    assert lines[1] == ["rank", "0", "cuda:0", "runs the teacher on cuda:4"]
    assert lines[4] == ["rank", "3", "cuda:3"] and len(lines) == 5
    beside = placed("colocated", 5)
    assert seats(beside, train_options(), MACHINE).count("a teacher beside its student") == 5
    none = placed("none", 5)
    text = seats(none, train_options("--teacher_device cpu"), MACHINE)
    assert "rank 0    cuda:0      runs the teacher on the CPU\n" in text
    assert "teacher" not in seats(none, train_options("--kl_weight 0"), MACHINE)
    few = placed("dedicated", 2)
    assert seats(few, train_options(), MACHINE).endswith("cuda:2, cuda:3: not used")


def test_tokens_and_time(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**12))
    text = f"--seq_length 40 --batch_size 2 --grad_accumulation_steps 3 --max_steps 1000 --output_dir {tmp_path}"
    args = parse_train_args(options(folder, "wide", text + " --save_interval 0"))
    footprint = measure_footprint(args)
    made = make_plan(args, footprint, MACHINE, "dedicated")
    shown = run_table(args, made, MACHINE, disk_room(args, footprint.student, 3000))
    assert f"{3 * 4 * 2 * 40:,}" in shown and "960,000 in 1,000 steps" in shown
    assert "as measured" not in shown
    rows = [{"tokens_per_s": speed} for speed in (1.0, 200.0, 1000.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "\0\n{}\n" + '{"tokens_p')
    shown = run_table(args, made, MACHINE, disk_room(args, footprint.student, 3000))
    assert f"80 min at the 200 tokens/s of {tmp_path}" in shown


def test_room_on_the_disk(folder, tmp_path, monkeypatch):
    text = f"--seq_length 8 --max_steps 10 --save_interval 2 --output_dir {tmp_path}/a/b"
    args = parse_train_args(options(folder, "wide", text))
    footprint = measure_footprint(args)
    size = sum(footprint.weights.values()) + 8 * sum(
        p.numel() for p in footprint.student.parameters() if p.requires_grad
    )

    def advised(n_checkpoints):
        usage = SimpleNamespace(free=int(n_checkpoints * size))
        monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda folder: usage if folder == tmp_path else None)
        room = disk_room(args, footprint.student, 10)
        assert (room.size, room.n_here, room.n_most, room.n_fit) == (size, 0, 6, int(n_checkpoints))
        return disk_advice(args, room)

    assert advised(7.5) == ""
    assert "room for 4 checkpoint(s) of 6: give --save_total_limit 3" in advised(4.5)
    assert "room for 1 checkpoint(s): the run would not start" in advised(1.9)


# --- whole plans ---------------------------------------------------------------------------------------------


def without_network(rank):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    socket.socket.connect = socket.getaddrinfo = refuse


def test_the_production_command_is_planned_without_models_or_network(tmp_path, monkeypatch):
    """By its own entry, on a machine without GPUs, by ranks as its own torchrun would start them."""
    file = tmp_path / "plan.json"
    monkeypatch.chdir(tmp_path)
    argv = [*PRODUCTION.split("train_gpus.py ")[1].split(), "--dry_run", "--plan_json", str(file)]
    codes, printed = fresh.ranks(argv, 4, arm=without_network, CUDA_VISIBLE_DEVICES="")
    assert codes == [0] * 4, printed
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]  # it leaves nothing else
    dedicated, colocated = json.loads(file.read_text())
    forward = dedicated["gpus"]["student GPU"]["forward"]
    assert forward["weights, trained"] == forward["gradients"] == 2 * 2_934_887_296
    assert sum(size for name, size in forward.items() if name.startswith("weights")) == 2 * 8_739_836_800
    assert dedicated["gpus"]["teacher GPU"]["forward"]["teacher's weights"] == 2 * 8_030_261_248
    assert (dedicated["n_students"], colocated["n_students"]) == (4, 5)
    assert dedicated["fits"]
    assert f"{dedicated['largest_bytes'] / 1e9:.1f} of 80 GB" in printed
    assert printed.count("rank 0") == 1 and "819,200,000 in 100,000 steps" in printed


def test_what_does_not_fit_comes_with_what_to_change(folder, capsys):
    text = "--batch_size 4 --seq_length 96"
    machine = Machine(2, 0, 1e12)
    kept, recomputed = (
        make_plan(args, measure_footprint(args), machine, "dedicated").largest
        for args in (parse_train_args(options(folder, "wide", t)) for t in (text, f"{text} --gradient_checkpointing"))
    )
    text += f" --dry_run --gpus 2 --gpu_gb {(kept + recomputed) / 2e9}"
    print_plan(parse_train_args(options(folder, "wide", text)))
    printed = capsys.readouterr().out
    assert "does not fit, " in printed
    changes = {
        line.split(" saves ")[0].strip(): line.split(":")[1].split()[0]
        for line in printed[printed.index("To make dedicated fit:") :].splitlines()
        if " saves " in line
    }
    assert "--freeze_mlp" in changes
    assert changes["--gradient_checkpointing"] == "fits"
    fewest = next(change for change in changes if "--checkpoint_blocks" in change)
    assert changes[fewest] == "fits"
    print_plan(parse_train_args(options(folder, "wide", f"{text} {fewest}")))
    assert ": fits, " in capsys.readouterr().out


# --- the files under configs/ --------------------------------------------------------------------------------


@functools.cache
def footprint_of(*values):
    return measure_footprint(parse_train_args([*values]))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_config_fits_where_it_says(file):
    """Its first lines name the machine and the command."""
    text = file.read_text()
    n_gpus, gb = map(int, re.search(r"on (\d+) GPUs of (\d+) GB", text).groups())
    (command,) = re.findall(r"# +(torchrun .*)", text)
    args = parse_train_args(["--config", str(file)])
    assert f"--config configs/{file.name} --output_dir DIR" in command
    shapes = ("preset", "batch_size", "seq_length", "gradient_checkpointing")
    values = [f"--{name}={vars(args)[name]}" for name in shapes[:3]] + ["--gradient_checkpointing"] * vars(args)[
        shapes[3]
    ]
    footprint = footprint_of(*values, "--freeze_mlp", "--freeze_replaced_layers")
    assert args.freeze_mlp and args.freeze_replaced_layers
    made = make_plan(args, footprint, Machine(n_gpus, gb * 1e9, 1e14), args.teacher_placement)
    assert f"--nproc_per_node={made.n_students} " in command
    tokens = made.n_ranks * args.batch_size * args.grad_accumulation_steps * args.seq_length
    assert f"{tokens:,} tokens per optimizer step" in text
    assert made.largest < 0.9 * gb * 1e9, (made.largest / 1e9, gb)


def test_every_size_has_configs_for_2_4_and_8_gpus_and_the_production_command_has_its_own():
    names = {f"{size}-{n}gpus" for size in ("1b", "3b", "8b") for n in (2, 4, 8)}
    assert {file.stem for file in CONFIGS} == {*names, "production"}
    own = parse_train_args(["--config", str(ROOT / "configs" / "production.yaml")])
    command = parse_train_args(PRODUCTION.split("train_gpus.py ")[1].split())
    differ = {name for name, value in vars(command).items() if vars(own)[name] != value}
    assert differ == {"config", "output_dir", "wandb_run_name", "resume", "save_total_limit"}
