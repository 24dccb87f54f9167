"""The check of doctor.py for the token between documents: which of the tokenizer's the teacher expects there, by how
well it predicts the start of a document after another document and that token.
"""

import gc
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from model_utils import get_teacher_model
from preflight.checks.basics import OK, WARNING, CheckSkipped, Finding, PlannedRun
from preflight.checks.machine import GB, run_device
from preflight.checks.models import resumed, separator_of, skeletons, teacher_place, teacher_tokenizer
from preflight.checks.storage import available_memory
from preflight.checks.text import first_texts, open_here
from preflight.checks.weights import MOST_READ, small_teacher
from text.encoding import Encoder
from text.separators import Separator, pretraining_separators
from text.sources import TextSource

BEFORE, START = 32, 16  # tokens of the document before, and of the start that is predicted
FEWEST, MOST = 2, 8  # documents
MOST_SECONDS = 30.0  # no document is added after it
CLEARLY = 0.2  # nats per token of the start


def check_document_separator(run: PlannedRun) -> Iterator[Finding]:
    """Reports which token ends a document, and compares it with the others that could."""
    title, used, tokenizer = "document separator", separator_of(run), teacher_tokenizer(run)
    yield Finding(OK, title, f"{used}: {used.why}")
    others = candidates(used, tokenizer)
    measured = f"{title}, measured"
    if not run.args.has_teacher:
        return
    if reason := _why_not_measured(run, len(others)):
        yield Finding(OK, measured, f"not measured: {reason}")
        return
    documents = _documents(run, tokenizer)
    if len(documents) < FEWEST:
        yield Finding(OK, measured, f"not measured: the first rows have no {FEWEST} texts of {START} tokens")
        return
    teacher, bos = _teacher(run), tokenizer.bos_token_id
    variants = {name: [i] for name, i in others.items()}
    if bos is not None:  # as company, since a teacher may know it at the start of a text only
        variants |= {f"{name} and bos": [i, bos] for name, i in others.items() if i != bos}
    found = start_losses(teacher, documents, variants)
    del teacher
    gc.collect()
    yield _judged(measured, run, used, {name: found[name] for name in others}, found)


def candidates(used: Separator, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Returns the tokens, with their ids, that could end a document: the one in use, those of pretraining, eos."""
    known = [(used.token, used.id), *pretraining_separators(tokenizer)]
    known.append((tokenizer.eos_token, tokenizer.eos_token_id))
    return {token: i for token, i in known if token is not None}


@torch.no_grad()
def start_losses(
    teacher: PreTrainedModel, documents: list[list[int]], variants: dict[str, list[int]], seconds: float = MOST_SECONDS
) -> dict[str, tuple[float, float]]:
    """Returns, for each variant of what stands between two documents, the teacher's cross entropy on a document's first
    token, and per token on its first `START`. All variants are measured on the same documents: no document is begun
    after `seconds`, but for the first `FEWEST`.
    """
    began, sums, n = time.monotonic(), {name: torch.zeros(START) for name in variants}, 0
    for before, document in zip([documents[-1], *documents[:-1]], documents, strict=True):
        if n >= FEWEST and time.monotonic() - began > seconds:
            break
        for name, between in variants.items():
            sums[name] += _losses_of_start(teacher, [*before[-BEFORE:], *between], document[:START])
        n += 1
    return {name: (total[0].item() / n, total.mean().item() / n) for name, total in sums.items()}


def _losses_of_start(teacher: PreTrainedModel, before: list[int], start: list[int]) -> Tensor:
    """Returns the cross entropies of a document's first tokens after others, (START,)."""
    ids = torch.tensor([[*before, *start]], device=teacher.device)  # (1, N)
    logits = teacher(ids, use_cache=False).logits[0, -len(start) - 1 : -1].float()  # (START, V)
    return torch.nn.functional.cross_entropy(logits, ids[0, -len(start) :], reduction="none").cpu()


def _judged(
    title: str,
    run: PlannedRun,
    used: Separator,
    single: dict[str, tuple[float, float]],
    found: dict[str, tuple[float, float]],
) -> Finding:
    """Returns the finding on losses by what stands between documents. single: those of one token."""
    best = min(single, key=lambda name: single[name][1])
    losses = ", ".join(f"{name} {first:.2f} / {mean:.2f}" for name, (first, mean) in found.items())
    text = f"CE of the teacher on the first token / per token of the first {START} of a document, after another one "
    text += f"and {losses}; best is {best}"
    if single[used.token][1] - single[best][1] <= CLEARLY:
        return Finding(OK, title, text)
    resume, _ = resumed(run)
    remedy = f"--document_separator '{best}'"
    if resume is not None and resume.checkpoint is not None:
        remedy = f"nothing for this run, which keeps what it began with; for another run {remedy}"
    return Finding(WARNING, title, f"{text}, the run takes {used.token}", remedy)


# --- what it is measured with --------------------------------------------------------------------------------


def _why_not_measured(run: PlannedRun, n_candidates: int) -> str | None:
    """Returns why the teacher is not asked, or None if it is."""
    if n_candidates < 2:
        return "the tokenizer has no other token for it"
    parameters = sum(p.numel() for p in skeletons(run)[0].parameters())
    needed = 2 * parameters  # bytes in bfloat16
    if needed > MOST_READ:
        return f"the teacher has {needed / GB:.3g} GB in bfloat16, more than {MOST_READ / GB:.3g} GB"
    device = run_device()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if 1.2 * needed > free:
        return f"the teacher needs {1.2 * needed / GB:.3g} GB, and {free / GB:.3g} GB are free on {device}"
    return None


def _documents(run: PlannedRun, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Returns the ids of some texts of the run that are as long as a start. Raises CheckSkipped."""
    source, encoder = TextSource.for_training(run.args), Encoder(tokenizer, separator_of(run).token)
    try:
        _, texts = first_texts(open_here(source), source)
    except ValueError as error:  # reported by `check_data`
        raise CheckSkipped("the data cannot be read") from error
    documents = [encoder([text])[:-1].tolist() for text in texts]
    return [ids for ids in documents if len(ids) >= START][:MOST]


def _teacher(run: PlannedRun) -> PreTrainedModel:
    """Returns the teacher: a small one in the run's dtype, as other checks have it, else in bfloat16."""
    try:
        small = small_teacher(run)
        return small or get_teacher_model(teacher_place(run, needs_weights=True), torch.bfloat16, run_device())
    except ValueError as error:  # reported by `check_logits`
        raise CheckSkipped("the teacher cannot be loaded") from error
