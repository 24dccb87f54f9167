"""Everything that watches a run after each optimizer step, in one object for the training loop."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from checkpointing.state import RunState
from conversion.alignment import Alignment
from monitoring.evaluator import Evaluator, Material
from monitoring.health import Spikes, UpdateHealth, warn_of_anomalies
from monitoring.layer_map import LayerMap
from monitoring.run_log import RunLog
from monitoring.speed import Gauges
from text.batch import Batch
from training_utils import Job, Learner, Meter, Update


@dataclass(frozen=True)
class Watchers:
    """Holds everything that observes a run; none of it changes the run. A context manager that closes the log."""

    rank: int
    total_steps: int
    log: RunLog
    spikes: Spikes
    health: UpdateHealth
    layer_map: LayerMap
    evaluator: Evaluator

    def after_step(self, state: RunState, update: Update, seconds: float, meter: Meter, batch: Batch) -> None:
        """Warns, measures what is due, and writes the step's row. Called by all ranks.

        seconds: what the step took; meter: of its micro steps; batch: the last of them, on the student's device.
        """
        warn_of_anomalies(state.step, update, self.spikes, meter, self.rank)
        row = metrics_row(state, update, seconds)
        self.health.add_to(row)
        self.layer_map.add_to(row, batch)
        self.evaluator.add_to(row, self.total_steps)
        self.log.write(row)

    def flush_to_disk(self) -> None:
        self.log.flush_to_disk()

    def __enter__(self) -> "Watchers":
        return self

    def __exit__(self, *error: Any) -> None:
        self.log.__exit__(*error)


def build_watchers(
    job: Job, learner: Learner, state: RunState, material: Material | None, tokenizer: PreTrainedTokenizerBase
) -> Watchers:
    """Returns what the options ask for. state: where the run begins; material: what it is evaluated on, if at all."""
    args, ranks, student = job.args, job.ranks, learner.student
    alignment = learner.objective if isinstance(learner.objective, Alignment) else None
    gauges = Gauges(student, ranks.device, ranks.world_size, args.seq_length, args.tflops, alignment)
    health = UpdateHealth(args.health_interval, student, learner.exchange, ranks)
    layer_map = LayerMap(args.layer_map_interval if ranks.is_main else 0, student, learner.lane, args.compile)
    evaluator = Evaluator(args, material, tokenizer, ranks, learner.objective.model, learner.lane, job.stop)
    total = learner.total_steps
    # Last: it opens files and trackers, which have to be closed.
    log = RunLog(args, state.micro_step, ranks.is_main, step=state.step, total_steps=total, gauges=gauges)
    return Watchers(ranks.rank, total, log, Spikes(), health, layer_map, evaluator)


def metrics_row(state: RunState, update: Update, seconds: float) -> dict[str, Any]:
    """Returns the row of metrics.jsonl for the optimizer step that led to `state` and took `seconds`."""
    return {
        "step": state.step,
        "micro_step": state.micro_step,
        **update.means,
        "lr": update.lr,
        "grad_norm": update.grad_norm,
        "skipped_updates": state.skipped_updates,
        "tokens": state.tokens,
        "tokens_per_s": update.tokens / seconds,
        "step_time_s": seconds,
    }
