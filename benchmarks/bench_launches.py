"""Measures what the teacher costs the student of the first rank on the host: both are run by one Python interpreter
there, and on a GPU a step is no faster than its kernels are launched. Models have the depth of 8B and tensors of a few
numbers, so that arithmetic is free and what is left is the launching. The scan is played by one operation.

Each step the student runs forward and backward while the teacher answers the next batch of every rank. alone: without a
teacher. pass per rank, one pass: in a thread beside the student, as the product does, with a forward pass for each
rank's batch or one for all. process: with one for each rank, in a process of its own. seconds: of a student's step.

    python benchmarks/bench_launches.py [--rounds N] [--json FILE] [--quick]
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from harness import parse_options, report, run_rounds

CANDIDATES = ["alone", "pass per rank", "one pass", "process"]
CASES = {"2 ranks, 32 layers": 2, "4 ranks, 32 layers": 4, "7 ranks, 32 layers": 7}
LAYERS, WIDTH, VOCAB = 32, 32, 64


def run(case: str, candidate: str, steps: int) -> dict:
    torch.set_num_threads(1)
    with teaching(candidate, CASES[case]) as (begin, wait):
        step, seconds = build_student(), []
        for _ in range(steps):
            start = time.perf_counter()
            begin()
            step()
            wait()
            seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[steps // 5 :])}


@contextmanager
def teaching(candidate: str, n_ranks: int) -> Iterator[tuple[Callable[[], object], Callable[[], object]]]:
    """Gives the block what begins the teacher's answers for a step, and what waits for them."""
    from utils import BackgroundThread

    if candidate == "alone":
        yield lambda: None, lambda: None
    elif candidate == "process":
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=serve_teacher, args=(there, n_ranks), daemon=True)
        process.start()
        here.recv()  # it is ready
        yield lambda: here.send(True), here.recv
        here.send(False)
        process.join()
    else:
        answer_all, thread = build_teacher(n_ranks, candidate), BackgroundThread("teacher")
        answer_all()
        pending = []
        yield lambda: pending.append(thread.submit(answer_all)), lambda: pending.pop().result()
        thread.close()


def serve_teacher(pipe, n_ranks: int) -> None:
    """Answers for all ranks as often as the pipe says so."""
    torch.set_num_threads(1)
    answer_all = build_teacher(n_ranks, "pass per rank")
    answer_all()
    pipe.send(None)
    while pipe.recv():
        answer_all()
        pipe.send(None)


def build_teacher(n_ranks: int, candidate: str) -> Callable[[], None]:
    """Returns what computes the answers to a batch of each rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from distillation.teacher_forward import Teacher

    shape = dict(hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=LAYERS, vocab_size=VOCAB)
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)).eval()
    teacher, batches = Teacher(model, "hidden", VOCAB), [torch.zeros(1, 4, dtype=torch.int64)] * n_ranks

    def answer_all() -> None:
        for _ in teacher.answers(batches) if candidate == "one pass" else map(teacher, batches):
            pass

    return answer_all


def build_student() -> Callable[[], None]:
    """Returns a student's forward and backward pass."""
    from llamba import LlambaConfig, LlambaForCausalLM
    from llamba.kernels import plain_kernels, using_kernels

    ssm = {"d_state": 8, "n_v_heads": 4, "n_qk_heads": 4, "chunk_size": 8}
    config = LlambaConfig(
        vocab_size=VOCAB, d_model=WIDTH, n_layer=LAYERS, mlp_cfg={"intermediate_size": WIDTH}, ssm_cfg=ssm
    )
    student, ids = LlambaForCausalLM(config).train(), torch.zeros(1, 4, dtype=torch.int64)
    kernels = plain_kernels()._replace(scan=lambda x, log_decay, *_, **__: (x * log_decay[..., None], x))

    def step() -> None:
        with using_kernels(kernels, "cpu", torch.float32):
            student.backbone(ids, use_cache=False).last_hidden_state.sum().backward()

    return step


def main() -> None:
    options = parse_options(__doc__, CASES, CANDIDATES, CANDIDATES[:2])
    cases = dict.fromkeys(options.cases, options.candidates)
    report(run_rounds(__file__, cases, options.rounds, CANDIDATES[0], 5 if options.quick else 40), options.json)


if __name__ == "__main__":
    main()
