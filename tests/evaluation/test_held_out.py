"""Held-out figures: windows of a text as training packs them, and sums over tokens against the reference loss."""

import json
import logging

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from distillation.losses import LossInputs, compute_distill_loss
from evaluation import held_out
from evaluation.held_out import HeldOutSums, held_out_sums, read_windows
from tests.byte_tokenizers import CHATML, tokenizer_of
from tests.launch import ROOT
from text.encoding import Encoder
from text.sources import SourceFlags, TextSource

TINY = ROOT / "presets" / "tiny"
TEXT = TINY / "text" / "heldout.jsonl"
FLAGS = SourceFlags(name="--held_out", split="--held_out_split")


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
    """It is read from a table, because a stream has no parts."""
    windows = read_windows(source(split="train[50%:]", streaming=False), tokenizer, 2, 16)
    ids = Encoder(tokenizer)(documents()[round(0.5 * len(documents())) :])
    assert windows.flatten().tolist() == ids[:34].tolist()


def test_bad_rows_are_left_out_if_asked(tokenizer, tmp_path):
    lines = TEXT.read_text().splitlines(keepends=True)
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join([lines[0], '{"text": "cut', "\n", *lines[1:]]))
    with pytest.raises(ValueError, match="bad.jsonl.* line 2.*--skip_bad_rows"):
        read_windows(source(bad), tokenizer, 2, 16)
    with pytest.raises(ValueError, match="bad.jsonl.* line 2.*; correct it \\("):  # eval_mmlu_hybrid.py skips no rows
        read_windows(source(bad, flags=SourceFlags(skip_bad_rows=None)), tokenizer, 2, 16)
    windows = read_windows(source(bad, skip_bad_rows=True), tokenizer, 2, 16)
    assert torch.equal(windows, read_windows(source(), tokenizer, 2, 16))


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"name": "nowhere.jsonl"}, ["--held_out 'nowhere.jsonl'", "no such file"]),
        ({"split": "test"}, ["--held_out_split 'test'", "available: train"]),
        ({"split": "test[:5%]", "streaming": False}, ["--held_out_split 'test[:5%]'", "available: train"]),
        ({"text_field": "body"}, ["--dataset_text_field 'body'", "available: text"]),
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


STATE = {"dataset_name": "a.jsonl", "dataset_split": "train", "dataset_text_field": "text", "dataset_streaming": True}


def test_the_text_of_a_checkpoint_is_opened_as_its_run_did(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    opened = []
    monkeypatch.setattr(held_out, "check_not_trained_on", lambda one, training, who: opened.append(training))
    options = {**STATE, "dataset_revision": "v1", "dataset_cache_dir": "~/cache"}
    (tmp_path / "training_state.json").write_text(json.dumps({"arguments": options}))
    held_out.check_not_trained_on_by(tmp_path, source(), "--ckpt")
    assert opened == [
        TextSource("a.jsonl", revision="v1", cache_dir="/home/me/cache", streaming=True, local_files_only=True)
    ]


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"arguments": []}',
        "[" * 100_000,
        *(json.dumps({"arguments": STATE | {name: 7}}) for name in (*STATE, "dataset_cache_dir")),
    ],
)
def test_a_checkpoint_that_does_not_say_its_text_is_a_warning(tmp_path, caplog, content):
    (tmp_path / "training_state.json").write_text(content)
    held_out.check_not_trained_on_by(tmp_path, source(), "--ckpt")
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "is not known" in caplog.text


@pytest.mark.parametrize("mistake", [KeyError, TypeError])
def test_our_own_mistake_is_no_unknown_text(tmp_path, monkeypatch, mistake):
    def fail(*args):
        raise mistake

    monkeypatch.setattr(held_out, "check_not_trained_on", fail)
    (tmp_path / "training_state.json").write_text(json.dumps({"arguments": STATE}))
    with pytest.raises(mistake):
        held_out.check_not_trained_on_by(tmp_path, source(), "--ckpt")


@pytest.mark.parametrize(
    ("recorded", "option", "separator"),
    [
        ("no run", "auto", "<|endoftext|>"),
        ("no run", "<|im_end|>", "<|im_end|>"),
        ("<|im_start|>", "auto", "<|im_start|>"),
        (None, "auto", "<|im_end|>"),  # an earlier version, which took eos
        (None, "<|im_end|>", "<|im_end|>"),
        (None, "<|endoftext|>", "<|endoftext|>"),
    ],
)
def test_documents_end_as_in_the_run_of_the_checkpoint(tmp_path, caplog, recorded, option, separator):
    caplog.set_level(logging.INFO, logger="train")
    if recorded != "no run":
        state = {"arguments": STATE if recorded is None else STATE | {"document_separator": recorded}}
        (tmp_path / "training_state.json").write_text(json.dumps(state))
    tokenizer = tokenizer_of(CHATML, eos_token="<|im_end|>")
    assert held_out.separator_of_text(option, tokenizer, tmp_path).token == separator
    assert f"held-out text: each document ends with {separator!r}" in caplog.text
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert bool(warnings) is ((recorded, separator) == (None, "<|endoftext|>"))
    if warnings:
        assert f"--document_separator <|endoftext|>: the run of --ckpt {tmp_path} had <|im_end|>" in caplog.text


def test_a_separator_of_the_checkpoints_run_that_the_tokenizer_lacks_is_named_as_that(tmp_path):
    (tmp_path / "training_state.json").write_text(json.dumps({"arguments": STATE | {"document_separator": "<sep>"}}))
    tokenizer = tokenizer_of(CHATML, eos_token="<|im_end|>")
    with pytest.raises(ValueError, match=f"^--ckpt {tmp_path}: its run ended each document with '<sep>'"):
        held_out.separator_of_text("auto", tokenizer, tmp_path)
    with pytest.raises(ValueError, match="^--document_separator '<other>'"):
        held_out.separator_of_text("<other>", tokenizer, tmp_path)


def test_windows_have_the_separator(tokenizer):
    chat = tokenizer_of(CHATML, eos_token="<|im_end|>")
    found = [set(read_windows(source(), chat, 40, 64, *option).flatten().tolist()) for option in ((), ("<|im_end|>",))]
    assert [{i for i in ids if i >= 256} for ids in found] == [{256}, {258}]


# --- the figures ---------------------------------------------------------------------------------------------


def case(dtype=torch.float32, bias=False, signal="hidden"):
    """Returns 2 x 11 tokens of a student with 40 entries and a teacher with 36; some labels are unknown or masked."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    hidden, head, teacher_head = random(2, 11, 8), random(40, 8), random(36, 6)
    teacher_hidden = random(2, 11, 6)
    labels = torch.randint(0, 38, (2, 11), generator=generator)
    mask = torch.rand(2, 11, generator=generator) < 0.8
    teacher = {"hidden": (teacher_hidden, teacher_head), "logits": (teacher_hidden @ teacher_head.T, None)}
    student_bias, vocab = random(40) if bias else None, 36 if signal else 40
    return LossInputs(hidden, head, student_bias, *teacher.get(signal, (None, None)), labels, mask, vocab)


def reference_loss(inputs, *weights):
    """Returns total, KL and CE of the readable loss, and the student's and the teacher's logits, in float64."""
    student = inputs.student_hidden.double() @ inputs.student_head.double().T
    if inputs.student_bias is not None:
        student += inputs.student_bias.double()
    teacher = inputs.teacher
    if inputs.teacher_head is not None:
        teacher = teacher.double() @ inputs.teacher_head.double().T
    return *compute_distill_loss(student, teacher, inputs.labels, inputs.loss_mask, *weights), student, teacher


@pytest.mark.parametrize("chunk_tokens", [1, 5, 22, 100])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("signal,bias", [("hidden", False), ("hidden", True), ("logits", False), (None, True)])
def test_figures_are_those_of_the_reference_loss(chunk_tokens, temperature, signal, bias):
    inputs = case(signal=signal, bias=bias)
    figures = held_out_sums(inputs, temperature, chunk_tokens).figures(0.7, 0.3)
    total, kl, ce, student, teacher = reference_loss(inputs, 0.7, 0.3, temperature)
    assert (figures["loss"], figures["ce"]) == pytest.approx((total.item(), ce.item()), rel=1e-5)
    assert figures["perplexity"] == pytest.approx(ce.exp().item(), rel=1e-5)
    known = inputs.loss_mask & (inputs.labels < inputs.vocab)
    assert figures["tokens"] == known.sum()
    if teacher is None:
        assert figures.keys() == {"loss", "ce", "perplexity", "tokens"}
    else:
        same = student[..., : inputs.vocab].argmax(-1) == teacher.argmax(-1)
        assert figures["kl"] == pytest.approx(kl.item(), rel=1e-5)
        assert figures["agreement"] == pytest.approx(same[known].double().mean().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_not_rounded_to_sixteen_bits(dtype):
    inputs = case(dtype)
    _, kl, ce, *_ = reference_loss(inputs, 1.0, 1.0, 1.0)
    figures = held_out_sums(inputs, 1.0, 5).figures(1.0, 1.0)
    assert (figures["ce"], figures["kl"]) == pytest.approx((ce.item(), kl.item()), rel=1e-5)


def test_a_model_agrees_with_itself():
    inputs = case(torch.bfloat16)
    inputs = inputs._replace(teacher=inputs.student_hidden, teacher_head=inputs.student_head, vocab=40)
    figures = held_out_sums(inputs, 2.0, 5).figures(1.0, 1.0)
    assert figures["agreement"] == 1.0 and figures["kl"] == pytest.approx(0.0, abs=1e-6)


def test_sums_of_parts_add_up_and_masked_windows_count_nothing():
    inputs = case()
    whole = held_out_sums(inputs, 1.0, 4)
    by_token = ("student_hidden", "teacher", "labels", "loss_mask")
    parts = [inputs._replace(**{name: getattr(inputs, name)[i] for name in by_token}) for i in (0, 1)]
    added = held_out_sums(parts[0], 1.0, 4) + held_out_sums(parts[1], 1.0, 4)
    assert added.values.dtype == torch.float64 and added.with_teacher
    torch.testing.assert_close(added.values, whole.values)
    spoilt = inputs.student_hidden.masked_fill(~inputs.loss_mask[..., None], float("nan"))
    assert torch.equal(held_out_sums(inputs._replace(student_hidden=spoilt), 1.0, 4).values, whole.values)


def test_no_more_logits_than_a_chunk_exist(monkeypatch):
    made, real = [], held_out.wide_logits
    monkeypatch.setattr(held_out, "wide_logits", lambda *args: made.append(real(*args)) or made[-1])
    held_out_sums(case(), 1.0, 5)
    assert {len(logits) for logits in made} == {5, 2}  # of 22 tokens


def test_what_is_not_finite_stays_so():
    figures = HeldOutSums(torch.tensor([1e6, np.inf, 3, 10], dtype=torch.float64), True).figures(1.0, 0.5)
    assert figures["perplexity"] == figures["kl"] == figures["loss"] == np.inf and figures["agreement"] == 0.3
