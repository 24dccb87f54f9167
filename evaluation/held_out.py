"""How well a model predicts held-out text: the first windows of the text, packed as training packs its own, and sums of
cross entropy, KL and agreement with the teacher over their tokens. Knows of no ranks; sums can be added.

Shapes: n windows of S + 1 tokens, N tokens, D and D_t hidden sizes, V_s and V_t columns of the heads.
"""

import dataclasses
import functools
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from arguments import TrainArguments
from distillation.fused_loss import choose_chunk_tokens
from distillation.losses import mask_unknown_labels, shared_vocab
from text.encoding import Encoder, blocks, text_batches
from text.sources import explain_fault, network_forbidden, open_source, open_stream, open_table
from text.stream import TextStream

logger = logging.getLogger("train")

TEXTS_AT_ONCE = 64  # for the tokenizer; a few windows need no more
WINDOWS_AT_ONCE = 8  # whose hidden states are held


# --- the text ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextSource:
    """Where held-out text comes from. name: a data set of the hub, a directory or a file.

    flags: what the options are called here that training calls --dataset_name, --dataset_subset, --dataset_split and so
        on: errors name what the user gave.
    """

    name: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    text_field: str = "text"
    skip_bad_rows: bool = False
    local_files_only: bool = False
    flags: Mapping[str, str] = dataclasses.field(default_factory=dict)


@contextmanager
def naming(flags: Mapping[str, str]) -> Iterator[None]:
    """Has a ValueError name other options than the code that raises it knows: those of `flags`, by their values."""
    try:
        yield
    except ValueError as error:
        message = re.sub(r"--\w+", lambda flag: flags.get(flag[0], flag[0]), str(error))
        if message == str(error):
            raise
        raise ValueError(message) from error


def read_windows(source: TextSource, tokenizer: PreTrainedTokenizerBase, n_windows: int, seq_length: int) -> Tensor:
    """The first windows of the text in its own order: (n_windows, S + 1) int64, or fewer, with a warning, if it has no
    more. No more of the text is read than they take, unless the split is a part of one. Raises ValueError.
    """
    encoder, size = Encoder(tokenizer), seq_length + 1
    stacks: list[np.ndarray] = []
    with naming(source.flags), network_forbidden(source.local_files_only):
        for stack in blocks(map(encoder, text_batches(_texts(source), max_rows=TEXTS_AT_ONCE)), size):
            stacks.append(stack)  # (some windows, S + 1)
            if sum(map(len, stacks)) >= n_windows:
                break
        if not stacks:
            raise ValueError(
                f"--dataset_name {source.name!r}: split {source.split!r} does not fill one window of {size} tokens; "
                "use more text"
            )
    windows = np.concatenate(stacks)[:n_windows].astype(np.int64)  # (n, S + 1)
    if len(windows) < n_windows:
        logger.warning("held-out text: %s has %d of the %d windows asked for", source.name, len(windows), n_windows)
    return torch.from_numpy(windows)


def _texts(source: TextSource) -> Iterator[str]:
    options = _as_options(source)
    opened = open_source(options)
    # A part such as "train[99%:]" can be told from a table alone.
    data = open_table(opened, options) if "[" in source.split else open_stream(opened, options)
    stream = TextStream(
        data.to_iterable_dataset() if isinstance(data, datasets.Dataset) else data,
        source.text_field,
        shuffle_buffer=0,
        seed=0,
        rank=0,
        world_size=1,
        skip_bad_rows=source.skip_bad_rows,
        explain=functools.partial(explain_fault, source=opened, args=options),
    )
    for _, texts in stream.batches(epoch=0):
        yield from texts


def _as_options(source: TextSource) -> TrainArguments:
    """As sources.py takes it, which reads the options of the data; the others are left empty."""
    return TrainArguments(
        dataset_name=source.name,
        dataset_subset=source.subset,
        dataset_split=source.split,
        dataset_revision=source.revision,
        dataset_text_field=source.text_field,
        skip_bad_rows=source.skip_bad_rows,
        local_files_only=source.local_files_only,
        teacher_model="",
        student_model="",
        layers=[],
        dtype="float32",
        seq_length=0,
        batch_size=0,
        output_dir="",
    )


# --- the figures ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOutSums:
    """Over some tokens: their cross entropies, their KLs (times T^2), how often student and teacher find the same next
    token the likeliest, and how many they are.
    """

    values: Tensor  # (4,) float64 on the CPU; summed up over ranks as it is
    with_teacher: bool  # else KL and agreement are none

    def __add__(self, other: "HeldOutSums") -> "HeldOutSums":
        assert self.with_teacher == other.with_teacher
        return HeldOutSums(self.values + other.values, self.with_teacher)

    def means(self) -> dict[str, float]:
        """Per token, and how many they are; `kl` and `agreement` only with a teacher."""
        means = self.values / self.values[3]
        ce, kl, agreement, _ = means.tolist()
        of_teacher = {"kl": kl, "agreement": agreement} if self.with_teacher else {}
        return {"ce": ce, **of_teacher, "perplexity": means[0].exp().item(), "tokens": int(self.values[3])}

    def figures(self, ce_weight: float, kl_weight: float) -> dict[str, float]:
        """The means, and before them the `loss` that training would have with these weights."""
        means = self.means()
        kl_part = kl_weight * means["kl"] if self.with_teacher else 0.0
        return {"loss": ce_weight * means["ce"] + kl_part, **means}


@torch.no_grad()
def held_out_sums(
    student_hidden: Tensor,
    student_head: Tensor,
    student_bias: Tensor | None,
    teacher_signal: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor,
    loss_mask: Tensor,
    vocab: int,
    temperature: float,
    chunk_tokens: int,
) -> HeldOutSums:
    """Over the unmasked of N tokens, of any leading shape (...), in chunks, so that no more logits exist at a time:

    student_hidden (..., D), student_head (V_s, D), student_bias (V_s,) or None; teacher_signal: its hidden states
    (..., D_t) with teacher_head (vocab, D_t), its logits (..., vocab) with None, or None without a teacher;
    labels, loss_mask (...). Softmax runs over the first `vocab` entries; labels outside them are left out.
    """
    hidden, labels = student_hidden.flatten(0, -2), labels.flatten()  # (N, D), (N,)
    mask, _ = mask_unknown_labels(labels, loss_mask.flatten().bool(), vocab)  # (N,)
    labels = labels.masked_fill(~mask, 0)
    head, bias = student_head[:vocab], None if student_bias is None else student_bias[:vocab]
    signal = None if teacher_signal is None else teacher_signal.flatten(0, -2)  # (N, D_t) or (N, vocab)
    sums = torch.zeros(4, dtype=torch.float64, device=hidden.device)
    for start in range(0, len(labels), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        logits = _logits(hidden[chunk], head, bias)  # (n, vocab)
        teacher_logits = None
        if signal is not None:
            teacher_logits = signal[chunk] if teacher_head is None else _logits(signal[chunk], teacher_head, None)
        columns = _token_figures(logits, teacher_logits, labels[chunk], temperature)  # (4, n)
        sums += torch.where(mask[chunk], columns, 0.0).sum(dim=1, dtype=torch.float64)
    return HeldOutSums(sums.cpu(), teacher_signal is not None)


def _logits(hidden: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
    """(n, vocab), in float32 or better: rounded to 16 bits the two largest would often be equal."""
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
        logits = torch.mm(hidden, head.T, out_dtype=torch.float32)  # a widened head would take twice its memory
        return logits if bias is None else logits.add_(bias)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return F.linear(hidden.to(dtype), head.to(dtype), None if bias is None else bias.to(dtype))


def _token_figures(logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, temperature: float) -> Tensor:
    """Cross entropy, KL, agreement and 1 for each token: (4, n). logits (n, V), overwritten; teacher_logits (n, V)."""
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
    """Windows of text (n, S + 1), and in host memory the teacher's last hidden states for them: so the teacher and the
    model that is compared with it need not be on the device together. It is asked for WINDOWS_AT_ONCE of them.
    """

    def __init__(self, windows: Tensor, device: torch.device) -> None:
        self.windows, self.device = windows, device
        self.hidden: dict[int, Tensor] = {}  # by the first of these windows: (n, S, D_t) on the CPU
        self.head: Tensor | None = None  # (V_t, D_t) on the device

    @torch.inference_mode()
    def ask_teacher(self, teacher: PreTrainedModel, starts: list[int]) -> None:
        head = teacher.get_output_embeddings()
        if head.bias is not None:
            raise ValueError(
                "--held_out: the teacher's head has a bias, its hidden states do not tell all; leave it out"
            )
        self.head = head.weight.detach()
        for start in starts:
            self.hidden[start] = self._hidden(teacher, start).cpu()

    @torch.inference_mode()
    def compare(self, model: PreTrainedModel, start: int) -> HeldOutSums:
        """Of the windows from `start` on, for which the teacher has been asked."""
        head, hidden = model.get_output_embeddings(), self._hidden(model, start)  # (n, S, D)
        assert self.head is not None
        labels = self._windows(start)[:, 1:]  # (n, S)
        vocab = shared_vocab(len(head.weight), len(self.head))
        return held_out_sums(
            hidden,
            head.weight,
            head.bias,
            self.hidden[start].to(self.device),
            self.head[:vocab],
            labels,
            torch.ones_like(labels, dtype=torch.bool),
            vocab,
            temperature=1.0,
            chunk_tokens=choose_chunk_tokens(vocab, hidden.dtype, self.device),
        )

    def _windows(self, start: int) -> Tensor:
        return self.windows[start : start + WINDOWS_AT_ONCE].to(self.device)

    def _hidden(self, model: PreTrainedModel, start: int) -> Tensor:
        """(n, S, D), one window after another: what is held of each is its last layer alone."""
        inputs = self._windows(start)[:, :-1]
        return torch.cat([model.base_model(row[None], use_cache=False).last_hidden_state for row in inputs])
