"""Held-out figures: windows of a text as training packs them, and sums over tokens against the reference loss."""

import json
import logging

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from distillation.losses import compute_distill_loss
from evaluation import held_out
from evaluation.held_out import HeldOutSums, TextSource, held_out_sums, naming, read_windows
from tests.launch import ROOT
from text.encoding import Encoder

TINY = ROOT / "presets" / "tiny"
TEXT = TINY / "text" / "heldout.jsonl"
FLAGS = {"--dataset_name": "--held_out", "--dataset_split": "--held_out_split"}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "teacher")


# --- the text ------------------------------------------------------------------------------------------------


def documents():
    return [json.loads(line)["text"] for line in TEXT.read_text().splitlines()]


def source(name=TEXT, **changes):
    return TextSource(str(name), **{"local_files_only": True, "flags": FLAGS, **changes})


@pytest.mark.parametrize("n_windows,seq_length", [(1, 16), (7, 33), (40, 1)])
def test_windows_are_the_first_of_the_packed_text(tokenizer, n_windows, seq_length):
    windows = read_windows(source(), tokenizer, n_windows, seq_length)
    assert windows.dtype == torch.int64 and windows.shape == (n_windows, seq_length + 1)
    ids = [i for text in documents() for i in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    assert windows.flatten().tolist() == ids[: windows.numel()]


def test_only_what_is_needed_is_tokenised(tokenizer, monkeypatch):
    seen, real = [], Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda encoder, texts: seen.extend(texts) or real(encoder, texts))
    read_windows(source(), tokenizer, 3, 16)
    assert len(seen) == held_out.TEXTS_AT_ONCE < len(documents())


def test_fewer_windows_than_asked_for(tokenizer, caplog):
    caplog.set_level(logging.WARNING, logger="train")
    windows = read_windows(source(), tokenizer, 10_000, 256)
    n_tokens = len(Encoder(tokenizer)(documents()))
    assert len(windows) == n_tokens // 257
    assert f"has {len(windows)} of the 10000 windows" in caplog.text


def test_a_part_of_a_split(tokenizer):
    """Which a stream does not have."""
    windows = read_windows(source(split="train[50%:]"), tokenizer, 2, 16)
    ids = Encoder(tokenizer)(documents()[round(0.5 * len(documents())) :])
    assert windows.flatten().tolist() == ids[:34].tolist()


def test_bad_rows_are_left_out_if_asked(tokenizer, tmp_path):
    lines = TEXT.read_text().splitlines(keepends=True)
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join([lines[0], '{"text": "cut', "\n", *lines[1:]]))
    with pytest.raises(ValueError, match="bad.jsonl.* line 2.*--skip_bad_rows"):
        read_windows(source(bad), tokenizer, 2, 16)
    windows = read_windows(source(bad, skip_bad_rows=True), tokenizer, 2, 16)
    assert torch.equal(windows, read_windows(source(), tokenizer, 2, 16))


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"name": "nowhere.jsonl"}, ["--held_out 'nowhere.jsonl'", "no such file"]),
        ({"split": "test"}, ["--held_out_split 'test'", "available: train"]),
        ({"split": "test[:5%]"}, ["--held_out_split 'test[:5%]'", "available: train"]),
        ({"text_field": "body"}, ["--dataset_text_field 'body'", "available: text"]),  # of which FLAGS does not tell
        ({"name": "short.jsonl"}, ["--held_out", "short.jsonl", "does not fill one window of 17 tokens"]),
    ],
)
def test_mistakes_name_the_option_that_was_given(tokenizer, tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.jsonl").write_text('{"text": "three short words"}\n')
    with pytest.raises(ValueError) as error:
        read_windows(source(**changes), tokenizer, 2, 16)
    for word in words:
        assert word in str(error.value)


def test_other_errors_stay_as_they_are():
    mistake = ValueError("--dataset_names of another kind")
    with pytest.raises(ValueError) as error, naming(FLAGS):
        raise mistake
    assert error.value is mistake


# --- the figures ---------------------------------------------------------------------------------------------


def case(dtype=torch.float32, bias=False, signal="hidden"):
    """2 x 11 tokens of a student with 40 entries and a teacher with 36, some labels in neither, some masked."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    hidden, head, teacher_head = random(2, 11, 8), random(40, 8), random(36, 6)
    teacher_hidden = random(2, 11, 6)
    labels = torch.randint(0, 38, (2, 11), generator=generator)
    mask = torch.rand(2, 11, generator=generator) < 0.8
    teacher = {"hidden": (teacher_hidden, teacher_head), "logits": (teacher_hidden @ teacher_head.T, None)}
    return hidden, head, random(40) if bias else None, *teacher.get(signal, (None, None)), labels, mask


def logits_of(hidden, head, bias, teacher, teacher_head, labels, mask):
    student = hidden.double() @ head.double().T + (0 if bias is None else bias.double())
    if teacher is not None and teacher_head is not None:
        teacher = teacher.double() @ teacher_head.double().T
    return student, teacher


@pytest.mark.parametrize("chunk_tokens", [1, 5, 22, 100])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("signal,bias", [("hidden", False), ("hidden", True), ("logits", False), (None, True)])
def test_figures_are_those_of_the_reference_loss(chunk_tokens, temperature, signal, bias):
    inputs = case(signal=signal, bias=bias)
    vocab = 36 if signal else 40
    figures = held_out_sums(*inputs, vocab, temperature, chunk_tokens).figures(0.7, 0.3)
    student, teacher = logits_of(*inputs)
    labels, mask = inputs[-2:]
    total, kl, ce = compute_distill_loss(student, teacher, labels, mask, 0.7, 0.3, temperature)
    assert (figures["loss"], figures["ce"]) == pytest.approx((total.item(), ce.item()), rel=1e-5)
    assert figures["perplexity"] == pytest.approx(ce.exp().item(), rel=1e-5)
    known = mask & (labels < vocab)
    assert figures["tokens"] == known.sum()
    if teacher is None:
        assert figures.keys() == {"loss", "ce", "perplexity", "tokens"}
    else:
        same = student[..., :vocab].argmax(-1) == teacher.argmax(-1)
        assert figures["kl"] == pytest.approx(kl.item(), rel=1e-5)
        assert figures["agreement"] == pytest.approx(same[known].double().mean().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_not_rounded_to_sixteen_bits(dtype):
    inputs = case(dtype)
    labels, mask = inputs[-2:]
    _, kl, ce = compute_distill_loss(*logits_of(*inputs), labels, mask, 1.0, 1.0, 1.0)
    figures = held_out_sums(*inputs, 36, 1.0, 5).figures(1.0, 1.0)
    assert (figures["ce"], figures["kl"]) == pytest.approx((ce.item(), kl.item()), rel=1e-5)


def test_a_model_agrees_with_itself():
    hidden, head, _, _, _, labels, mask = case(torch.bfloat16)
    figures = held_out_sums(hidden, head, None, hidden, head, labels, mask, 40, 2.0, 5).figures(1.0, 1.0)
    assert figures["agreement"] == 1.0 and figures["kl"] == pytest.approx(0.0, abs=1e-6)


def test_sums_of_parts_add_up_and_masked_windows_count_nothing():
    hidden, head, bias, teacher, teacher_head, labels, mask = case()
    whole = held_out_sums(hidden, head, bias, teacher, teacher_head, labels, mask, 36, 1.0, 4)
    first, second = (
        held_out_sums(hidden[i], head, bias, teacher[i], teacher_head, labels[i], mask[i], 36, 1.0, 4) for i in (0, 1)
    )
    added = first + second
    assert added.values.dtype == torch.float64 and added.with_teacher
    torch.testing.assert_close(added.values, whole.values)
    spoilt = hidden.masked_fill(~mask[..., None], float("nan"))
    assert torch.equal(held_out_sums(spoilt, *case()[1:], 36, 1.0, 4).values, whole.values)


def test_no_more_logits_than_a_chunk_exist(monkeypatch):
    made, real = [], held_out._logits
    monkeypatch.setattr(held_out, "_logits", lambda *args: made.append(real(*args)) or made[-1])
    held_out_sums(*case(), 36, 1.0, 5)
    assert {len(logits) for logits in made} == {5, 2}  # of 22 tokens


def test_what_is_not_finite_stays_so():
    figures = HeldOutSums(torch.tensor([1e6, np.inf, 3, 10], dtype=torch.float64), True).figures(1.0, 0.5)
    assert figures["perplexity"] == figures["kl"] == figures["loss"] == np.inf and figures["agreement"] == 0.3
