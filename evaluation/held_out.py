"""How well a model predicts held-out text: the first windows of the text, packed as training packs its own, and sums of
cross entropy, KL and agreement with the teacher over their tokens. Sums over several texts or ranks can be added.

Shapes: n windows of S + 1 tokens, N tokens, D and D_t hidden sizes, V_s and V_t columns of the heads.
"""

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distillation.fused_loss import choose_chunk_tokens
from distillation.losses import LossInputs, mask_unknown_labels, shared_vocab
from llamba.export import STATE_FILE
from text.encoding import Encoder, blocks, text_batches
from text.faults import Faults
from text.opening import open_source, open_stream, open_table
from text.overlap import TrainedOn, check_not_trained_on
from text.separators import AUTO, Separator, choose_separator
from text.sources import TextSource, network_forbidden
from text.stream import TextStream

logger = logging.getLogger("train")

TEXTS_AT_ONCE = 64  # for the tokenizer; a few windows need no more
TEXT_OR_NONE = (str, type(None))
RECORDED: dict[str, type | tuple[type, ...]] = {  # options of a run, less their "dataset_", as TextSource has them
    **{"name": str, "subset": TEXT_OR_NONE, "split": str, "revision": TEXT_OR_NONE, "text_field": str},
    **{"streaming": bool, "cache_dir": TEXT_OR_NONE},
}
WINDOWS_AT_ONCE = 8  # whose hidden states are held


# --- the text ------------------------------------------------------------------------------------------------


def read_windows(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, n_windows: int, seq_length: int, separator: str = AUTO
) -> Tensor:
    """Returns the first windows of the text in its own order: (n_windows, S + 1) int64, or fewer, with a warning, if it
    has no more. Reads no more of the text than they take, unless the split is a part of one. Raises ValueError.
    separator: what ends a document, as --document_separator names it.
    """
    encoder, size = Encoder(tokenizer, separator), seq_length + 1
    stacks: list[np.ndarray] = []
    with network_forbidden(source.local_files_only):
        for stack in blocks(map(encoder, text_batches(_texts(source), max_rows=TEXTS_AT_ONCE)), size):
            stacks.append(stack)  # (some windows, S + 1)
            if sum(map(len, stacks)) >= n_windows:
                break
    if not stacks:
        raise ValueError(
            f"{source.flags.name} {source.name!r}: split {source.split!r} does not fill one window of {size} tokens; "
            "use more text"
        )
    windows = np.concatenate(stacks)[:n_windows].astype(np.int64)  # (n, S + 1)
    if len(windows) < n_windows:
        logger.warning("held-out text: %s has %d of the %d windows asked for", source.name, len(windows), n_windows)
    return torch.from_numpy(windows)


def _texts(source: TextSource) -> Iterator[str]:
    opened = open_source(source)
    data = open_stream(opened, source) if source.streaming else open_table(opened, source)
    stream = TextStream(
        data.to_iterable_dataset() if isinstance(data, datasets.Dataset) else data,
        source,
        shuffle_buffer=0,
        seed=0,
        rank=0,
        world_size=1,
        explain=Faults(opened, source),
    )
    for _, texts in stream.batches(epoch=0):
        yield from texts


def check_not_trained_on_by(checkpoint: Path, source: TextSource, flag: str) -> None:
    """Raises ValueError if the run that wrote a checkpoint was trained on rows of `source`. Where that cannot be known,
    because its text is not on this machine, a warning says so. flag: what names the checkpoint.
    """
    try:
        training = _trained_on(checkpoint, source.local_files_only)
        check_not_trained_on(source, training, f"the run of {flag} {checkpoint}")
    except TrainedOn:
        raise
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("whether %s %s was trained on %s is not known: %s", flag, checkpoint, source.name, error)


def separator_of_text(option: str, tokenizer: PreTrainedTokenizerBase, checkpoint: Path | None) -> Separator:
    """Returns what ends each document of the held-out text, and logs it. Under "auto" it is, if a checkpoint is scored,
    what ended them in its run. Raises ValueError. option: --document_separator.
    """
    of_run = None if checkpoint is None else _separator_of_run(checkpoint, tokenizer.eos_token)
    if of_run is not None and option in (AUTO, of_run):
        try:
            separator = choose_separator(of_run, tokenizer)._replace(why=f"as in the run of --ckpt {checkpoint}")
        except ValueError as error:
            raise ValueError(
                f"--ckpt {checkpoint}: its run ended each document with {of_run!r:.80}, which is no special token of "
                f"the tokenizer {tokenizer.name_or_path!r}; give the teacher of that run, or --document_separator TOKEN"
            ) from error
    else:
        separator = choose_separator(option, tokenizer)
    if of_run not in (None, separator.token):
        logger.warning(
            "--document_separator %s: the run of --ckpt %s had %s; figures on --held_out do not compare with those of "
            "its own evaluations, leave the option out for that",
            *(option, checkpoint, of_run),
        )
    logger.info("held-out text: each document ends with %s: %s", separator, separator.why)
    return separator


def _separator_of_run(checkpoint: Path, eos: str | None) -> str | None:
    """Returns what ended each document in the run that wrote a checkpoint: `eos` before that was an option. None where
    it cannot be known, as of a student that no run wrote.
    """
    try:
        separator = _options_of_run(checkpoint).get("document_separator", eos)
    except (OSError, ValueError, RecursionError):
        return None
    return separator if isinstance(separator, str) else None


def _options_of_run(checkpoint: Path) -> dict[str, Any]:
    """Returns the options of the run that wrote a checkpoint. Raises ValueError or OSError if the file that has them
    cannot be read.
    """
    state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    options = state.get("arguments") if isinstance(state, dict) else None
    if not isinstance(options, dict):
        raise ValueError(f"{STATE_FILE} has no options")
    return options


def _trained_on(checkpoint: Path, local_files_only: bool) -> TextSource:
    """Returns the text of the run that wrote a checkpoint. Raises ValueError or OSError if it cannot be read."""
    options = _options_of_run(checkpoint)
    for name, kinds in RECORDED.items():
        if not isinstance(options.get(f"dataset_{name}"), kinds):
            raise ValueError(f"{STATE_FILE} has dataset_{name} {options.get(f'dataset_{name}')!r}")
    recorded: dict[str, Any] = {name: options.get(f"dataset_{name}") for name in RECORDED}
    for name in ("name", "cache_dir"):  # earlier versions kept `~` as it was written
        if recorded[name] is not None and recorded[name][:1] == "~":
            recorded[name] = os.path.expanduser(recorded[name])
    return TextSource(**recorded, local_files_only=local_files_only)


# --- the figures ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOutSums:
    """Holds sums over some tokens: their cross entropies, their KLs (times T^2), how often student and teacher find the
    same next token the likeliest, and how many tokens they are.
    """

    values: Tensor  # (4,) float64 on the CPU
    with_teacher: bool  # else KL and agreement are zeros that mean nothing

    def __add__(self, other: "HeldOutSums") -> "HeldOutSums":
        assert self.with_teacher == other.with_teacher
        return HeldOutSums(self.values + other.values, self.with_teacher)

    def means(self) -> dict[str, float]:
        """Returns `ce`, `perplexity` and, with a teacher, `kl` and `agreement`, per token; and how many `tokens`."""
        means = self.values / self.values[3]
        ce, kl, agreement, _ = means.tolist()
        of_teacher = {"kl": kl, "agreement": agreement} if self.with_teacher else {}
        return {"ce": ce, **of_teacher, "perplexity": means[0].exp().item(), "tokens": int(self.values[3])}

    def figures(self, ce_weight: float, kl_weight: float) -> dict[str, float]:
        """Returns the means, and before them the `loss` that training would have with these weights."""
        means = self.means()
        kl_part = kl_weight * means["kl"] if self.with_teacher else 0.0
        return {"loss": ce_weight * means["ce"] + kl_part, **means}


@torch.no_grad()
def held_out_sums(inputs: LossInputs, temperature: float, chunk_tokens: int) -> HeldOutSums:
    """Returns the sums over the unmasked tokens. Works in chunks of `chunk_tokens`, so that no more logits exist at a
    time. Softmax runs over the first `inputs.vocab` entries; labels outside them are left out.
    """
    return HeldOutSums(sums_on_device(inputs, temperature, chunk_tokens).cpu(), inputs.teacher is not None)


def sums_on_device(inputs: LossInputs, temperature: float, chunk_tokens: int) -> Tensor:
    """Returns the `values` of a HeldOutSums on the device of the inputs, (4,) float64; on the meta device, too."""
    vocab, teacher, teacher_head = inputs.vocab, inputs.teacher, inputs.teacher_head
    hidden, labels = inputs.student_hidden.flatten(0, -2), inputs.labels.flatten()  # (N, D), (N,)
    mask, _ = mask_unknown_labels(labels, inputs.loss_mask.flatten().bool(), vocab)  # (N,)
    labels = labels.masked_fill(~mask, 0)
    head, bias = inputs.student_head[:vocab], None if inputs.student_bias is None else inputs.student_bias[:vocab]
    signal = None if teacher is None else teacher.flatten(0, -2)  # (N, D_t) or (N, vocab)
    sums = torch.zeros(4, dtype=torch.float64, device=hidden.device)
    for start in range(0, len(labels), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        logits = wide_logits(hidden[chunk], head, bias)  # (n, vocab)
        teacher_logits = None
        if signal is not None:
            teacher_logits = signal[chunk] if teacher_head is None else wide_logits(signal[chunk], teacher_head, None)
        columns = _token_figures(logits, teacher_logits, labels[chunk], temperature)  # (4, n)
        sums += torch.where(mask[chunk], columns, 0.0).sum(dim=1, dtype=torch.float64)
    return sums


def wide_logits(hidden: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
    """Returns logits (n, vocab) in float32 or better: rounded to 16 bits the two largest would often be equal."""
    if hidden.device.type in ("cuda", "meta") and hidden.dtype in (torch.bfloat16, torch.float16):
        logits = torch.mm(hidden, head.T, out_dtype=torch.float32)  # a widened head would take twice its memory
        return logits if bias is None else logits.add_(bias)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return F.linear(hidden.to(dtype), head.to(dtype), None if bias is None else bias.to(dtype))


def _token_figures(logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, temperature: float) -> Tensor:
    """Returns cross entropy, KL, agreement and 1 for each token: (4, n). logits (n, V) is overwritten; teacher_logits
    is (n, V).
    """
    likeliest = logits.argmax(-1)  # (n,)
    log_p_T = None if temperature == 1 else (logits / temperature).log_softmax(-1)  # (n, V)
    log_p = torch.log_softmax(logits, -1, out=logits)
    ce = -log_p.gather(1, labels[:, None])[:, 0]
    kl = agreement = torch.zeros_like(ce)
    if teacher_logits is not None:
        agreement = (teacher_logits.argmax(-1) == likeliest).to(ce.dtype)
        log_q_T = (teacher_logits.to(logits.dtype) / temperature).log_softmax(-1)  # (n, V)
        log_ratio = log_q_T - (log_p if log_p_T is None else log_p_T)
        kl = temperature**2 * log_ratio.mul_(log_q_T.exp_()).sum(-1)
    return torch.stack([ce, kl, agreement, torch.ones_like(ce)])


# --- a text for many models ----------------------------------------------------------------------------------


class HeldOutText:
    """Holds windows of text (n, S + 1), and in host memory the teacher's last hidden states for them, so that the
    teacher and the model that is compared with it need not be on the device together. Takes WINDOWS_AT_ONCE of them at
    a time.
    """

    def __init__(self, windows: Tensor, device: torch.device) -> None:
        self.windows, self.device = windows, device
        self.hidden: dict[int, Tensor] = {}  # by the number of their first window: (n, S, D_t) on the CPU
        self.head: Tensor | None = None  # (V_t, D_t) on the device

    @torch.inference_mode()
    def ask_teacher(self, teacher: PreTrainedModel, starts: list[int]) -> None:
        """Keeps the teacher's hidden states of the windows from each of `starts` on. Raises ValueError for a teacher
        whose head has a bias.
        """
        head = teacher.get_output_embeddings()
        if head.bias is not None:
            raise ValueError(
                "--held_out: the teacher's head has a bias, which its hidden states lack; leave --held_out out"
            )
        self.head = head.weight.detach()
        for start in starts:
            self.hidden[start] = self._hidden(teacher, start).cpu()

    @torch.inference_mode()
    def compare(self, model: PreTrainedModel, start: int) -> HeldOutSums:
        """Returns the model's sums over the windows from `start` on, for which the teacher has been asked."""
        head, hidden = model.get_output_embeddings(), self._hidden(model, start)  # (n, S, D)
        assert self.head is not None
        labels = self._windows(start)[:, 1:]  # (n, S)
        vocab = shared_vocab(len(head.weight), len(self.head))
        mask = torch.ones_like(labels, dtype=torch.bool)
        reference = (self.hidden[start].to(self.device), self.head[:vocab])
        inputs = LossInputs(hidden, head.weight, head.bias, *reference, labels, mask, vocab)
        return held_out_sums(inputs, 1.0, choose_chunk_tokens(vocab, hidden.dtype, self.device))

    def _windows(self, start: int) -> Tensor:
        return self.windows[start : start + WINDOWS_AT_ONCE].to(self.device)

    def _hidden(self, model: PreTrainedModel, start: int) -> Tensor:
        """Returns (n, S, D). Windows go through the model one by one, and only the last layer of each is held."""
        inputs = self._windows(start)[:, :-1]
        return torch.cat([model.base_model(row[None], use_cache=False).last_hidden_state for row in inputs])
