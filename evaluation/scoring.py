"""Computes log-likelihoods of continuations after prompts: the tokens and the numbers of lm-evaluation-harness, faster.
The beginning that prompts share, as few-shot prompts do, runs once, and each prompt continues from its keys, values and
states. Logits are computed for the tokens to predict only, and at their positions only.

Shapes: B rows in a batch, L tokens of a row after the shared prefix, D hidden size, V columns of the head, T tokens
of a continuation, K continuations that one row scores, N = sum of T over a batch, U different tokens to predict.
"""

import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from llamba import SharedPrefix, can_share
from model_utils import MOST_BEYOND_HEAD, logits_beyond_head

logger = logging.getLogger("train")

# Tokens of a batch where --batch_size is auto. This many fill a GPU; a CPU gains nothing from more.
CUDA_BATCH_TOKENS, CPU_BATCH_TOKENS = 2**13, 2**11
HEAD_COLUMNS = 2**14  # of the vocabulary at a time


@dataclass(frozen=True)
class Request:
    """Holds a prompt and the continuations to score after it."""

    prompt: str
    continuations: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """Holds one sequence to run through the model, and the tokens to look up at its last T positions."""

    request: int  # its place in the list of requests
    choices: tuple[int, ...]  # which of the continuations it scores: K of them
    tokens: list[int]
    targets: list[list[int]]  # K lists of T tokens
    is_cut: bool  # whether tokens are missing on the left


class Scorer:
    """Maps requests to log-likelihoods, by a model and its tokenizer.

    batch_size: rows per forward pass; None takes as many as fit, by their length.
    max_length: longer sequences lose tokens on the left; None means that the model has no limit.

    `tokens_run` counts what went through the model, padding included; `tokens_plain` what would have without a shared
    prefix and without padding; `n_cut` the prompts that were longer than `max_length`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        batch_size: int | None = None,
        max_length: int | None = None,
    ) -> None:
        assert not model.training, "scoring needs a model in eval mode"
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.name = model.name_or_path or model.config.model_type  # for messages
        beyond = logits_beyond_head(model, with_bias=True)
        if math.isnan(beyond):
            raise ValueError(f"{self.name}: its logits are not finite; its weights or its dtype are broken")
        if beyond > MOST_BEYOND_HEAD:
            raise ValueError(f"{self.name}: does more to its logits than its head; such a model cannot be scored here")
        self.batch_size, self.max_length = batch_size, max_length
        self.shares_prefixes = True  # until the model turns out to keep no states to share
        self.batch_tokens = CUDA_BATCH_TOKENS if device.type == "cuda" else CPU_BATCH_TOKENS
        self.tokens_run = self.tokens_plain = self.n_cut = 0

    @torch.inference_mode()
    def __call__(self, requests: Sequence[Request]) -> list[list[float]]:
        """Returns for each request the summed log-likelihood of each continuation. Requests of one call should begin
        alike: the longer the prefix that all of them share, the less there is to compute. Raises ValueError where a
        value is not finite.
        """
        rows = self._encode(requests)
        self._check_vocabulary(rows)
        self.tokens_plain += sum(len(row.tokens) for row in rows)
        self.n_cut += len({row.request for row in rows if row.is_cut})
        scores = [[0.0] * len(request.continuations) for request in requests]
        # Sequences that were cut on the left no longer share the prefix.
        for members in ([row for row in rows if not row.is_cut], [row for row in rows if row.is_cut]):
            for row, values in self._score(members):
                if not all(map(math.isfinite, values)):
                    text = requests[row.request].prompt[-60:]
                    raise ValueError(
                        f"{self.name}: log-likelihoods {values} after {text!r}; its weights or its dtype are broken"
                    )
                for choice, value in zip(row.choices, values, strict=True):
                    scores[row.request][choice] = value
        return scores

    def _encode(self, requests: Sequence[Request]) -> list[Row]:
        """Encodes as lm-eval does: prompt and continuation together, less as many tokens as the prompt alone has. This
        holds for tokenizers that need several tokens for " A", and adds a BOS where the tokenizer does by default.
        """
        texts = [request.prompt + end for request in requests for end in ("", *request.continuations)]
        encoded = iter(self.tokenizer(texts).input_ids if texts else ())  # one call uses all threads
        rows: list[Row] = []
        for i, request in enumerate(requests):
            rows += self._rows(i, request, next(encoded), [next(encoded) for _ in request.continuations])
        return rows

    def _rows(self, position: int, request: Request, prompt: list[int], wholes: list[list[int]]) -> Iterator[Row]:
        """Yields the rows of a request. Continuations that differ in their last token alone share a row: they need the
        same forward pass.
        """
        shared: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for choice, whole in enumerate(wholes):
            continuation = whole[len(prompt) :]
            if not continuation:
                text = request.continuations[choice]
                raise ValueError(f"the tokenizer has no token of its own for {text!r} after a prompt")
            if self.max_length is not None and len(continuation) > self.max_length:
                raise ValueError(f"--max_length {self.max_length}: an answer alone is {len(continuation)} tokens long")
            shared.setdefault((len(continuation), *continuation[:-1]), []).append((choice, continuation))
        for (_, *given), members in shared.items():
            tokens = [*prompt, *given]  # the last token is only ever predicted: `max_length` bounds the others
            kept = tokens if self.max_length is None else tokens[-self.max_length :]
            choices = tuple(choice for choice, _ in members)
            yield Row(position, choices, kept, [targets for _, targets in members], len(kept) < len(tokens))

    def _check_vocabulary(self, rows: list[Row]) -> None:
        # On a GPU an id out of range would cause a device-side assert, reported far from its cause.
        largest = max((max(*row.tokens, *map(max, row.targets)) for row in rows), default=0)
        known = len(next(self.model.get_input_embeddings().parameters()))
        if largest >= known:
            raise ValueError(f"the tokenizer gives token {largest}, the model knows {known}: they do not match")

    def _score(self, rows: list[Row]) -> Iterator[tuple[Row, list[float]]]:
        """Yields the rows in another order, each with its K log-likelihoods."""
        # The longest rows come first, so that a batch that does not fit in memory fails at once. Rows of similar
        # length share a batch, so that little is padded.
        rows = sorted(rows, key=lambda row: -len(row.tokens))
        prefix = self._run_prefix(rows)
        n_past = 0 if prefix is None else prefix.get_seq_length()
        while rows:
            longest = len(rows[0].tokens) - n_past
            batch = rows[: self.batch_size or max(1, self.batch_tokens // longest)]
            values = self._forward_if_it_fits(batch, prefix, n_past)
            if values is not None:
                yield from zip(batch, values, strict=True)
                rows = rows[len(batch) :]

    def _run_prefix(self, rows: list[Row]) -> Cache | None:
        """Runs the prefix that all rows share, up to their first predicting position. Returns the states after it."""
        if len(rows) < 2 or not self.shares_prefixes:
            return None
        longest = min(len(row.tokens) - len(row.targets[0]) for row in rows)
        prefix = os.path.commonprefix([row.tokens[:longest] for row in rows])
        if not prefix:
            return None
        ids = torch.tensor([prefix], device=self.device)  # (1, P)
        cache = self.model.base_model(input_ids=ids, use_cache=True).past_key_values
        if not can_share(cache):
            logger.info("a %s keeps no states to share: prompts run whole", self.model.config.model_type)
            self.shares_prefixes = False
            return None
        self.tokens_run += len(prefix)
        return cache

    def _forward_if_it_fits(self, rows: list[Row], prefix: Cache | None, n_past: int) -> list[list[float]] | None:
        """Returns each row's log-likelihoods, or None if memory ran out; the next batches are then smaller."""
        try:
            return self._forward(rows, prefix, n_past)
        except torch.OutOfMemoryError as error:
            if self.batch_size is not None:
                message = f"--batch_size {self.batch_size}: does not fit into the memory of {self.device}"
                raise ValueError(f"{message}; give a smaller one, or auto") from error
            if len(rows) == 1:
                raise
        # This stands outside the handler, because its traceback would keep the allocated tensors alive.
        self.batch_tokens = len(rows) * (len(rows[0].tokens) - n_past) // 2
        torch.cuda.empty_cache()
        logger.info("out of memory; batches of %d tokens from here on", self.batch_tokens)
        return None

    def _forward(self, rows: list[Row], prefix: Cache | None, n_past: int) -> list[list[float]]:
        # Padding on the right changes nothing before it in a causal model, so no mask is needed, and any id will do.
        tails = [torch.tensor(row.tokens[n_past:]) for row in rows]
        input_ids = nn.utils.rnn.pad_sequence(tails, batch_first=True).to(self.device)  # (B, L)
        cache = None if prefix is None else SharedPrefix(prefix, len(rows))
        outputs = self.model.base_model(input_ids=input_ids, past_key_values=cache, use_cache=cache is not None)
        self.tokens_run += input_ids.numel()
        hidden = outputs.last_hidden_state  # (B, L, D)
        ends = [(len(tail), len(row.targets[0])) for tail, row in zip(tails, rows, strict=True)]
        picked = torch.cat([hidden[i, end - count : end] for i, (end, count) in enumerate(ends)])  # (N, D)
        return self._log_likelihoods(picked, rows)

    def _log_likelihoods(self, hidden: Tensor, rows: list[Row]) -> list[list[float]]:
        """Returns for each row K sums over its T tokens; hidden (N, D) at the predicting positions."""
        head = self.model.get_output_embeddings()
        ids = sorted({token for row in rows for target in row.targets for token in target})  # U
        column_of = {token: column for column, token in enumerate(ids)}
        index = torch.tensor(ids, device=self.device)
        bias = None if head.bias is None else head.bias[index]
        log_probs = F.linear(hidden, head.weight[index], bias).float() - log_normaliser(hidden, head)  # (N, U)
        sums, start = [], 0
        for row in rows:
            columns = torch.tensor([[column_of[token] for token in target] for target in row.targets]).T  # (T, K)
            part = log_probs[start : start + len(columns)]  # (T, U)
            sums.append(part.gather(1, columns.to(self.device)).sum(dim=0))  # (K,)
            start += len(columns)
        values = iter(torch.cat(sums).tolist())  # one wait for the device
        return [[next(values) for _ in row.targets] for row in rows]


def log_normaliser(hidden: Tensor, head: nn.Linear) -> Tensor:
    """Returns log sum exp of all V logits: (N, D) -> (N, 1), some columns at a time. Padded columns of the vocabulary
    count too, as they do in the model's own distribution and in lm-eval.
    """
    weights = head.weight.split(HEAD_COLUMNS)
    biases = [None] * len(weights) if head.bias is None else head.bias.split(HEAD_COLUMNS)
    parts = [F.linear(hidden, w, b).float().logsumexp(-1) for w, b in zip(weights, biases, strict=True)]  # (N,) each
    return torch.stack(parts, dim=-1).logsumexp(-1, keepdim=True)
