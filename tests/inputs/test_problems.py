"""Options that cannot be used: each bound, and each pair that does not go together, as one line with flag, value and
remedy; and what a resumed run must keep.
"""

from pathlib import Path

import pytest

from arguments import TrainArguments
from inputs.options import free_options, kept_options
from tests.parsing import eval_error, eval_options, train_error, train_options

BOUNDS = [
    *((f"--{name} 0", "expected at least 1") for name in ("seq_length", "batch_size", "max_steps", "epochs")),
    *((f"--{name} 0", "expected at least 1") for name in ("log_interval", "grad_accumulation_steps")),
    *((f"--{name} 0", "expected at least 1") for name in ("max_bad_steps", "save_total_limit")),
    *((f"--{name} 0", "expected at least 1") for name in ("eval_windows", "eval_mmlu_limit")),
    *((f"--{name} -1", "expected at least 0") for name in ("health_interval", "eval_interval")),
    *((f"--time_limit {value}", "expected a number above 0") for value in ("0.0", "-5.0", "nan", "inf")),
    *((f"--{name} -1", "expected at least 0") for name in ("shuffle_buffer", "dataset_workers", "save_interval")),
    ("--resume_step -1", "expected at least 0"),
    *((f"--{name} -0.5", "expected at least 0") for name in ("ce_weight", "kl_weight", "max_lr", "min_lr")),
    *((f"--{name} -0.5", "expected at least 0") for name in ("weight_decay", "grad_clip")),
    *((f"--{name} nan", "expected at least 0") for name in ("ce_weight", "max_lr", "weight_decay", "grad_clip")),
    *((f"--temperature {value}", "expected at least 0.001, at most 1_000") for value in ("0.0", "-1.0", "nan")),
    ("--min_lr 0.2", "expected at most --max_lr 1e-05"),
    *((f"--{name}_ratio {value}", "expected at least 0") for name in ("warmup", "decay") for value in ("-0.1", "nan")),
    ("--warmup_ratio 0.6 --decay_ratio 0.5", "expected parts of the run, together at most 1"),
    ("--copied_lr_factor -0.1", "expected at least 0"),
    ("--warmup_steps -1", "expected at least 0"),
]


@pytest.mark.parametrize("line,remedy", BOUNDS)
def test_bounds_name_flag_value_and_remedy(line, remedy):
    message = train_error(line)
    assert f"{line}: " in message
    assert remedy in message


@pytest.mark.parametrize(
    "line",
    [
        "--save_interval 0 --resume_step 0 --shuffle_buffer 0 --grad_clip 0 --weight_decay 0",
        "--ce_weight 0 --kl_weight 1",
        "--ce_weight 1 --kl_weight 0",
        "--warmup_ratio 0.5 --decay_ratio 0.5",
        "--warmup_ratio 0 --decay_ratio 0",
        "--warmup_steps 90 --max_steps 100 --decay_ratio 0.1",
        "--warmup_steps 0 --warmup_ratio 1 --decay_ratio 1 --max_steps 100",
        "--copied_lr_factor 0",
        "--min_lr 0.1 --max_lr 0.1",
        "--grad_accumulation_steps 4 --save_interval 8 --resume_step 4",
        "--seq_length 1 --batch_size 1 --max_steps 1 --epochs 1 --log_interval 1",
        "--max_bad_steps 1 --save_total_limit 1 --health_interval 0 --time_limit 0.5",
        "--time_limit 0.001",
    ],
)
def test_the_bounds_themselves_are_allowed(line):
    flag, value, *_ = line.split()
    assert getattr(train_options(line), flag.removeprefix("--")) == float(value)


def test_steps_of_warm_up_leave_room_for_the_decay():
    message = train_error("--warmup_steps 91 --max_steps 100")
    assert "--warmup_steps 91: the run has 100 optimizer steps, of which the last 10 are the decay's" in message
    assert message.endswith("expected at most 90")


def test_a_warm_up_of_a_preset_refuses_no_short_run():
    assert train_options("--preset llama-8b --max_steps 50").warmup_steps == 100
    assert "--warmup_steps 101: the run has 50" in train_error("--preset llama-8b --max_steps 50 --warmup_steps 101")


def test_an_empty_loss():
    assert "--ce_weight 0 --kl_weight 0: the loss is empty" in train_error("--ce_weight 0 --kl_weight 0")


def test_the_weights_of_the_loss_are_not_looked_at_where_mixers_are_aligned():
    args = train_options("--stage align --ce_weight 0 --kl_weight 0 --layer_map_interval 3")
    assert (args.has_teacher, args.placement, args.teacher_placement) == (True, "colocated", "dedicated")
    assert not train_options("--kl_weight 0").has_teacher


def test_an_aligned_student_has_its_teacher_beside_it():
    message = train_error("--stage align --teacher_placement colocated --teacher_device cuda:0")
    assert "--teacher_device cuda:0: with --stage align" in message and message.count("--teacher_device") == 1


@pytest.mark.parametrize("name", ["save_interval", "resume_step"])
def test_checkpoints_hold_whole_optimizer_steps(name):
    message = train_error(f"--grad_accumulation_steps 4 --save_interval 4 --{name} 6")
    assert f"--{name} 6: expected a multiple of --grad_accumulation_steps 4" in message


@pytest.mark.parametrize("name", ["auto", "runs/mine/checkpoint-30"])
def test_resume_and_resume_step_exclude_each_other(name):
    assert train_options(f"--resume {name}").resume == name
    assert train_options("--resume_step 4").resume is None
    message = train_error(f"--resume {name} --resume_step 4")
    assert f"--resume {name} --resume_step 4: " in message and "leave --resume_step out" in message
    assert train_options(f"--resume {name} --resume_step 0").resume == name  # as if it was not given


@pytest.mark.parametrize(
    "name,value",
    [("dataset_name", "F"), ("dataset_subset", "F"), ("dataset_split", "test"), ("mmlu_dir", "F")],
)
def test_held_out_options_need_an_eval_interval(name, value):
    assert f"--eval_{name} {value}: " in train_error(f"--eval_{name} {value}")
    if name == "mmlu_dir":
        name, value = "dataset_name", "other"
    assert getattr(train_options(f"--eval_interval 5 --eval_{name} {value}"), f"eval_{name}") == value


HUB = "--dataset_name D --dataset_subset C"


@pytest.mark.parametrize(
    "line",
    [
        HUB,
        f"{HUB} --eval_dataset_name D --eval_dataset_subset C",
        f"{HUB} --dataset_split test --eval_dataset_split test",
        f"{HUB} --eval_dataset_split train[99%:]",
        f"{HUB} --dataset_split train[:99%] --eval_dataset_split train",
        f"{HUB} --dataset_split test+train[:99%] --eval_dataset_split train[99%:]+test",
        f"{HUB} --dataset_split all --eval_dataset_split test",
        "--dataset_name a.jsonl --eval_dataset_name ./a.jsonl",
        f"--dataset_name a.jsonl --eval_dataset_name {Path.cwd() / 'a.jsonl'}",
    ],
)
def test_text_that_is_trained_on_is_not_held_out(line):
    message = train_error(f"{line} --eval_interval 5")
    assert "--eval_interval 5: " in message and "is trained on" in message and "--eval_dataset_name FILE" in message


@pytest.mark.parametrize(
    "line,text",
    [
        (f"{HUB} --dataset_split train[:99%] --eval_dataset_split train[99%:]", ("D", "C", "train[99%:]")),
        (f"{HUB} --eval_dataset_split test", ("D", "C", "test")),
        (f"{HUB} --eval_dataset_subset B", ("D", "B", "train")),
        (f"{HUB} --eval_dataset_name D --eval_dataset_split test", ("D", "C", "test")),
        (f"{HUB} --eval_dataset_name E", ("E", None, "train")),
    ],
)
def test_where_held_out_text_comes_from(line, text):
    assert train_options(f"{line} --eval_interval 5").held_out_text() == text


OF_A_RUN = {"seed", "stage", "layers", "heads", "dtype", "freeze_mlp", "freeze_replaced_layers", "master_weights"}
OF_A_RUN |= {"dataset_name", "dataset_subset", "dataset_split", "dataset_revision", "dataset_text_field"}
OF_A_RUN |= {"dataset_streaming", "seq_length", "document_separator"}


def test_what_a_resumed_run_must_keep():
    assert kept_options(train_options("--dataset_streaming")) == OF_A_RUN | {"shuffle_buffer", "batch_size"}
    assert kept_options(train_options("--no_dataset_streaming")) == OF_A_RUN | {"skip_bad_rows"}


def test_what_a_resumed_run_may_change_without_a_warning():
    free = free_options(TrainArguments)
    assert {"preset", "config", "local_files_only", "student_model", "dataset_cache_dir", "time_limit"} <= free
    assert {"resume", "resume_step", "teacher_prefetch", "wandb", "save_interval", "plan_json"} <= free
    assert not free & {*OF_A_RUN, "shuffle_buffer", "skip_bad_rows", "max_lr", "teacher_model", "eval_interval"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--batch_size many", "'many': expected a whole number, or auto"),
        ("--batch_size 0", "--batch_size 0: expected at least 1"),
        ("--held_out_windows 0", "--held_out_windows 0: expected at least 1"),
        ("--retrieval_pairs 4 1", "--retrieval_pairs 1: expected 2 to 900"),
        ("--retrieval_pairs 901", "--retrieval_pairs 901: expected 2 to 900"),
        ("--retrieval_lengths 1", "--retrieval_lengths 1: expected at least 2"),
        ("--tasks_num_fewshot -1", "--tasks_num_fewshot -1: expected at least 0"),
        ("--ckpt C --which student hybrid", "--ckpt C: --which student hybrid does not score it; add hybrid_ft"),
        ("--no_mmlu", "--no_mmlu: nothing is left to measure"),
        ("--resume", "--resume: resumes from the results beside --output"),
        ("--resume --overwrite --output F", "--resume --overwrite: the one keeps"),
    ],
)
def test_problems_of_an_evaluation(line, expected):
    assert expected in eval_error(line)


@pytest.mark.parametrize("line", ["--num_fewshot -1", "--num_fewshot 6"])
def test_examples_of_the_evaluation_are_bounded(line):
    assert f"{line}: expected 0 to 5" in eval_error(line)
    assert [eval_options(f"--num_fewshot {n}").num_fewshot for n in ("0", "5")] == [0, 5]


@pytest.mark.parametrize("line", ["--batch_size 0", "--limit 0", "--max_length 0"])
def test_bounds_of_the_evaluation(line):
    assert f"{line}: expected at least 1" in eval_error(line)


def test_all_problems_are_in_one_error():
    lines = train_error("--batch_size 0 --temperature 0 --layers 3 3 --min_lr 1").split("\n")
    assert lines[0] == "these options cannot be used:"
    assert [line.split()[0] for line in lines[1:]] == ["--batch_size", "--temperature", "--layers", "--min_lr"]
