"""Saving what a run has reached: `<output_dir>/checkpoint-<micro step>` with the model and its hybrid layout, the
tokenizer, and the run's counters and options. A checkpoint appears whole or not at all.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llamba import LlambaForCausalLM
from utils import flush_to_disk

STATE_FILE = "training_state.json"


def save_checkpoint(
    output_dir: Path,
    micro_step: int,
    student: LlambaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Any],
) -> Path:
    """Writes beside, flushes to the disk, renames. `state` must be JSON. An existing checkpoint of that step is
    left alone: FileExistsError.
    """
    final = output_dir / f"checkpoint-{micro_step}"
    if final.exists():
        raise FileExistsError(f"{final} exists already")
    partial = output_dir / f".partial-{final.name}"
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that died while saving
    student.save_pretrained(partial, max_shard_size="5GB")
    tokenizer.save_pretrained(partial)
    (partial / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")
    for path in [*partial.iterdir(), partial]:
        flush_to_disk(path)
    partial.rename(final)
    flush_to_disk(output_dir)
    return final
