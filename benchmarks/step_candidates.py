"""What bench_step.py compares, and what every candidate is given: models, windows, options, and a recorder to be told
when the first step begins and when each is done. TRL's trainers are in step_trl.py.
"""

import ctypes
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plain_loop
import torch
from bare_run import train_steps
from bench_step import STEPS, Case
from harness import Row
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from arguments import TrainArguments, parse_train_args
from distillation.teacher import open_lane
from llamba import LlambaConfig, LlambaForCausalLM, attention_cfg_from
from model_utils import prepare_student
from monitoring.run_log import RunLog
from processes.ranks import Ranks, process_groups
from text.batch import Batch
from training_utils import DistillationModel, wrap_ddp


def train(case: Case, candidate: str) -> Row:
    """This rank's steps."""
    recorder = Recorder()
    if candidate.startswith("trl"):
        import step_trl  # not installed where none of them runs

        step_trl.train(case, candidate, recorder)
    else:
        with process_groups(torch.device("cpu")) as ranks:
            if candidate == "plain loop":
                train_plain(case, recorder, ranks)
            else:
                train_ours(case, recorder, ranks, *candidate.split()[1:])
    return recorder.result()


def train_ours(case: Case, recorder: "Recorder", ranks: Ranks, *more_options: str) -> None:
    args = train_options(case, *more_options)
    teacher = build_teacher(case, "cpu" if ranks.owns_teacher else "meta")
    head, lane = open_lane(teacher, args.teacher_signal, args.teacher_placement, case.vocab, ranks)
    student = build_student(case)
    prepare_student(student, args)
    model = wrap_ddp(DistillationModel(student, head, case.vocab, args), ranks.device)
    batches = batches_of(case, ranks, recorder)
    log = RecorderLog(args, recorder)
    train_steps(args, batches, STEPS, model, lane, ranks, log)
    lane.close()


class RecorderLog(RunLog):
    """A run's log that writes no file and tells the recorder."""

    def __init__(self, args: TrainArguments, recorder: "Recorder") -> None:
        super().__init__(args, start=0, is_main=False)
        self.recorder = recorder

    def write(self, row: dict[str, Any]) -> None:
        self.recorder.step_done({name: row[name] for name in ("loss", "kl", "ce")})


def train_plain(case: Case, recorder: "Recorder", ranks: Ranks) -> None:
    def after_step(loss: Tensor, kl: Tensor, ce: Tensor) -> None:
        recorder.step_done({"loss": loss.item(), "kl": kl.item(), "ce": ce.item()})

    teacher = build_teacher(case) if ranks.owns_teacher else None
    batches = batches_of(case, ranks, recorder)
    plain_loop.train(build_student(case), teacher, batches, train_options(case), after_step)


# --- what each is given --------------------------------------------------------------------------------------


class Recorder:
    """Takes down the times, the memory and the first losses of one rank."""

    def __init__(self) -> None:
        self.before = 0
        self.times: list[float] = []
        self.losses: dict[str, float] = {}

    def start(self) -> None:
        """Just before the first step."""
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that glibc still has would count as held before
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        self.before = process_bytes("VmRSS")
        self.times = [time.perf_counter()]

    def step_done(self, losses: dict[str, float]) -> None:
        self.times.append(time.perf_counter())
        self.losses = self.losses or losses

    def result(self) -> Row:
        assert len(self.times) == STEPS + 1
        steps = [end - start for start, end in zip(self.times, self.times[1:], strict=False)]
        peak = process_bytes("VmHWM") - self.before
        return {"seconds": statistics.median(steps[1:-1]), "peak_bytes": peak, **self.losses}


def process_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def train_options(case: Case, *more: str) -> TrainArguments:
    """The defaults of training, but for sizes and what `more` says."""
    sizes = f"--dtype float32 --seq_length {case.seq_len} --batch_size {case.batch_size} --max_steps {STEPS}"
    return parse_train_args([*sizes.split(), "--save_interval", "0", *more])


def windows_of(case: Case) -> Tensor:
    """Of all steps and ranks: (STEPS, W, B, S + 1)."""
    shape = (STEPS, case.ranks, case.batch_size, case.seq_len + 1)
    return torch.randint(0, case.vocab, shape, generator=torch.Generator().manual_seed(0))


def batches_of(case: Case, ranks: Ranks, recorder: Recorder) -> Iterator[Batch]:
    """This rank's batches; the recorder starts when the first is asked for."""
    recorder.start()
    for windows in windows_of(case)[:, ranks.rank]:  # (B, S + 1)
        yield Batch.from_windows(windows)


# Random models, the same on every rank. With this range their distributions are far from even, and from one another.
INITIALIZER_RANGE = 0.1


def build_student(case: Case) -> LlambaForCausalLM:
    """A hybrid of four layers, the third of which is a Llama's."""
    torch.manual_seed(0)
    config = LlambaConfig(
        vocab_size=case.vocab,
        d_model=case.d_model,
        n_layer=4,
        mlp_cfg={"intermediate_size": 4 * case.d_model},
        ssm_cfg={"d_state": 32, "n_v_heads": 4, "n_qk_heads": 4},
        attention_layers=[2],
        attention_cfg=attention_cfg_from(teacher_config(case)),
        initializer_range=INITIALIZER_RANGE,
    )
    return LlambaForCausalLM(config)


def build_teacher(case: Case, device: str = "cpu") -> LlamaForCausalLM:
    torch.manual_seed(1)
    with torch.device(device):
        return LlamaForCausalLM(teacher_config(case)).eval().requires_grad_(False)


def teacher_config(case: Case) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=case.vocab,
        hidden_size=case.d_model,
        intermediate_size=4 * case.d_model,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=INITIALIZER_RANGE,
    )
