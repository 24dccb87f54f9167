"""Checks lengths in tokens before any weights are read: those of prompts, contexts and windows against what the models
can read, and against the memory of the machine.
"""

import logging

import psutil
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from arguments import EvalArguments
from evaluation.retrieval import build_contexts
from inputs.context import shortest
from model_utils import DTYPES

logger = logging.getLogger("train")


def check_max_length(args: EvalArguments, max_length: int, readers: dict[str, PretrainedConfig]) -> None:
    """Raises ValueError if prompts may be longer than one of the models can read: positions beyond its context give
    nonsense. readers: by name, the configs of what has a limit.
    """
    found = shortest(readers)
    if found is not None and max_length > found[1]:
        name, limit = found
        origin = "the teacher's context, because it is not given" if args.max_length is None else "too long"
        raise ValueError(
            f"--max_length {max_length} ({origin}): {name} can read {limit} tokens at once; give at most {limit}"
        )


def check_retrieval(args: EvalArguments, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Raises ValueError if no context would be measured; logs which of several lengths are not."""
    fitting = [length for length in args.retrieval_lengths if length <= max_length]
    shown = f"--retrieval_lengths {' '.join(map(str, args.retrieval_lengths))}"
    if not fitting:
        raise ValueError(f"{shown}: expected at most {max_length} tokens, the teacher's context or --max_length")
    n_pairs = min(args.retrieval_pairs)
    if not build_contexts(tokenizer, max(fitting), n_pairs, 1, args.seed):
        raise ValueError(f"{shown}: {n_pairs} pairs and a question take more than {max(fitting)} tokens; give more")
    if too_long := [str(length) for length in args.retrieval_lengths if length > max_length]:
        logger.info("--retrieval_lengths: no score at %s, which is beyond %d tokens", ", ".join(too_long), max_length)


def check_memory(args: EvalArguments, windows: Tensor, teacher: PretrainedConfig) -> None:
    """Raises ValueError if the teacher's hidden states of the windows (n, S + 1) do not fit into main memory."""
    per_window = (windows.shape[1] - 1) * teacher.hidden_size * DTYPES[args.dtype].itemsize
    memory = psutil.virtual_memory().total
    if len(windows) * per_window > memory:
        raise ValueError(
            f"--held_out_windows {args.held_out_windows}: the teacher's hidden states of {len(windows)} windows take "
            f"{len(windows) * per_window / 1e9:.0f} GB of main memory, and this machine has {memory / 1e9:.0f} GB; "
            f"give at most {memory // per_window // 2}"
        )
