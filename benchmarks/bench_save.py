"""How long training stands still for a checkpoint, beside how long a step takes: the project's Saver, model and
optimizer on one rank, in float32. `seconds` is the standstill; `step_s` is a step of one short window, the shortest
that it can be compared with; `written_s` is the time until the checkpoint is complete.

    python benchmarks/bench_save.py [--json FILE] [--quick]
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch
from harness import parse_options, report, run_rounds

CASES = {  # d_model, layers, vocabulary
    "14 M weights": (256, 8, 16000),
    "110 M weights": (768, 12, 32000),
}
CANDIDATES = ["in the foreground", "in the background"]
SEQ_LEN, STEPS = 128, 5


def run(case: str, candidate: str) -> dict:
    """Trains `STEPS` steps on one rank and saves after each. Medians leave out the first."""
    from transformers import AutoTokenizer

    from arguments import parse_train_args
    from checkpointing.saver import Saver
    from checkpointing.state import RunState, random_state
    from distillation.exchange import AllReduce
    from distillation.objective import DistillationModel, wrap_ddp
    from distillation.update import LossScale, step_or_skip
    from inputs.option_values import PRESETS
    from llamba import LlambaConfig, LlambaForCausalLM
    from processes.ranks import process_groups
    from text.batch import Batch
    from training_utils import build_optimizer

    d_model, n_layer, vocab = CASES[case]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = LlambaConfig(
        vocab_size=vocab,
        d_model=d_model,
        n_layer=n_layer,
        mlp_cfg={"intermediate_size": 4 * d_model},
        ssm_cfg={"d_state": 16, "n_v_heads": 8, "n_qk_heads": 8, "chunk_size": 64},
    )
    background = "--background_save" if candidate == "in the background" else "--no_background_save"
    with tempfile.TemporaryDirectory() as folder, process_groups(device) as ranks:
        args = parse_train_args(["--kl_weight", "0", "--dtype", "float32", "--output_dir", folder, background])
        student = LlambaForCausalLM(config).to(device)
        model = wrap_ddp(DistillationModel(student, None, vocab, args), device)
        exchange = AllReduce(model, build_optimizer(model, args.max_lr, args.weight_decay, args.master_weights))
        saver = Saver(args, student, exchange, AutoTokenizer.from_pretrained(PRESETS / "tiny" / "teacher"), ranks, -1)
        batch = Batch.from_windows(torch.randint(vocab, (1, SEQ_LEN + 1), device=device))
        scale = LossScale.for_dtype(torch.float32)
        steps, standing, written = [], [], []
        for micro_step in range(1, STEPS + 1):
            start = time.perf_counter()
            loss, _ = model(batch, None)
            loss.backward()
            step_or_skip(exchange, scale, 1.0, loss.item())
            steps.append(time.perf_counter() - start)
            start = time.perf_counter()
            saver.save(RunState(micro_step, micro_step, rng=random_state(device)))
            standing.append(time.perf_counter() - start)
            saver.wait()
            written.append(time.perf_counter() - start)
        n_bytes = sum(path.stat().st_size for path in Path(folder, "checkpoint-1").iterdir())
        del model
    return {
        "seconds": statistics.median(standing[1:]),
        "step_s": statistics.median(steps[1:]),
        "written_s": statistics.median(written[1:]),
        "checkpoint_bytes": n_bytes,
    }


def main() -> None:
    options = parse_options(__doc__, CASES, CANDIDATES, CANDIDATES[:1])
    cases = dict.fromkeys(options.cases, options.candidates)
    report(run_rounds(__file__, cases, options.rounds, CANDIDATES[0]), options.json)


if __name__ == "__main__":
    main()
