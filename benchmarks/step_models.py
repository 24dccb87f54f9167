"""What every candidate of bench_step.py is given: models, windows of tokens, options, and a recorder of its steps."""

import ctypes
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from harness import Row, process_bytes
from step_case import STEPS, Case
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from arguments import TrainArguments, parse_train_args
from llamba import LlambaConfig, LlambaForCausalLM, attention_cfg_from
from processes.ranks import Ranks
from text.batch import Batch


class Recorder:
    """Records the times, the memory and the first losses of one rank."""

    def __init__(self) -> None:
        self.before = 0
        self.times: list[float] = []
        self.losses: dict[str, float] = {}

    def start(self) -> None:
        """Marks the beginning of the first step: times and memory count from here."""
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that glibc still has would count as held before
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        self.before = process_bytes("VmRSS")
        self.times = [time.perf_counter()]

    def step_done(self, losses: dict[str, float]) -> None:
        """Marks the end of a step. Of all steps' losses, the first step's are kept."""
        self.times.append(time.perf_counter())
        self.losses = self.losses or losses

    def result(self) -> Row:
        """Returns the median seconds of the timed steps, the bytes above those held at the start, and the losses."""
        assert len(self.times) == STEPS + 1
        steps = [end - start for start, end in zip(self.times, self.times[1:], strict=False)]
        peak = process_bytes("VmHWM") - self.before
        return {"seconds": statistics.median(steps[1:-1]), "peak_bytes": peak, **self.losses}


def train_options(case: Case, *more: str) -> TrainArguments:
    """Returns the default options of training but for the case's sizes and what `more` sets."""
    sizes = f"--dtype float32 --seq_length {case.seq_len} --batch_size {case.batch_size} --max_steps {STEPS}"
    return parse_train_args([*sizes.split(), "--save_interval", "0", *more])


def windows_of(case: Case) -> Tensor:
    """Returns the same random windows for every candidate, int64 (STEPS, W, B, S + 1)."""
    shape = (STEPS, case.ranks, case.batch_size, case.seq_len + 1)
    return torch.randint(0, case.vocab, shape, generator=torch.Generator().manual_seed(0))


def batches_of(case: Case, ranks: Ranks, recorder: Recorder) -> Iterator[Batch]:
    """Yields this rank's batches, one a step. Starts the recorder when the first batch is asked for."""
    recorder.start()
    for windows in windows_of(case)[:, ranks.rank]:  # (B, S + 1)
        yield Batch.from_windows(windows)


# With this range the models' distributions are far from uniform, and from each other.
INITIALIZER_RANGE = 0.1


def build_student(case: Case) -> LlambaForCausalLM:
    """Builds a hybrid of four layers, the third of which is a Llama's. The weights are the same on every rank."""
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
    """Builds a Llama of four layers. The weights are the same on every rank."""
    torch.manual_seed(1)
    with torch.device(device):
        return LlamaForCausalLM(teacher_config(case)).eval().requires_grad_(False)


def teacher_config(case: Case) -> LlamaConfig:
    """Returns the teacher's shapes, from which the student's attention layer takes its own."""
    return LlamaConfig(
        vocab_size=case.vocab,
        hidden_size=case.d_model,
        intermediate_size=4 * case.d_model,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=INITIALIZER_RANGE,
    )
