"""What doctor.py finds about the token between documents, by the teacher's losses at the start of a document."""

import json
import shutil

import pytest
import torch

from preflight.checks import separator
from preflight.checks.basics import OK, WARNING
from tests.byte_tokenizers import CHATML, tokenizer_of
from tests.preflight.cases import TINY, checkpoint_of, found, statuses
from tests.tiny import tiny_teacher, tokens


@pytest.fixture(scope="module")
def chat_teacher(tmp_path_factory):
    """Returns the folder of a teacher whose eos ends a turn."""
    folder = shutil.copytree(TINY / "teacher", tmp_path_factory.mktemp("chat") / "teacher")
    tokenizer_of(CHATML, bos_token="<|im_start|>", eos_token="<|im_end|>").save_pretrained(folder)
    return folder


@pytest.fixture
def losses(monkeypatch):
    """Returns what was asked for by name; the losses are made up: best after <|endoftext|>, unless they are changed."""
    asked = {}
    by_name = {"<|endoftext|>": (8.0, 3.9), "<|im_end|>": (22.0, 5.0)}

    def made_up(teacher, documents, variants):
        asked.update(variants, documents=documents, by_name=by_name)
        return {name: by_name.get(name, (9.0, 3.7)) for name in variants}

    monkeypatch.setattr(separator, "start_losses", made_up)
    return asked


def findings(folder, tmp_path, *options):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{i}: " + "some text " * i}) + "\n" for i in range(16)))
    options = ("--teacher_model", folder, "--dataset_name", text, *options)
    return found(separator.check_document_separator, *options)


def test_the_one_in_use_is_the_best(chat_teacher, tmp_path, own_cache, losses):
    chosen, measured = findings(chat_teacher, tmp_path)
    assert chosen.status == measured.status == OK
    assert chosen.found.startswith("'<|endoftext|>' (256): it ended documents in pretraining")
    assert "<|endoftext|> 8.00 / 3.90, <|im_end|> 22.00 / 5.00, <|endoftext|> and bos 9.00 / 3.70" in measured.found
    assert measured.found.endswith("best is <|endoftext|>")
    assert losses["<|im_end|> and bos"] == [258, 257] and "<|im_start|>" not in losses
    documents = losses["documents"]
    assert 2 <= len(documents) <= separator.MOST and all(max(ids) < 256 for ids in documents)


def test_one_that_is_clearly_worse_is_a_warning(chat_teacher, tmp_path, own_cache, losses):
    chosen, measured = findings(chat_teacher, tmp_path, "--document_separator", "<|im_end|>")
    assert (chosen.status, measured.status) == (OK, WARNING)
    assert measured.found.endswith("best is <|endoftext|>, the run takes <|im_end|>")
    assert measured.remedy == "--document_separator '<|endoftext|>'"


def test_a_resumed_run_keeps_the_worse_one(chat_teacher, tmp_path, own_cache, losses):
    same = ("--teacher_model", chat_teacher, "--dataset_name", tmp_path / "text.jsonl")
    checkpoint = checkpoint_of(tmp_path, 4, *same, "--document_separator", "<|im_end|>")
    chosen, measured = findings(chat_teacher, tmp_path, "--resume", checkpoint)
    assert chosen.found.startswith("'<|im_end|>' (258)")
    assert measured.status == WARNING and "nothing for this run" in measured.remedy


def test_a_wrong_token_is_a_failure(chat_teacher, tmp_path, own_cache):
    (bad,) = findings(chat_teacher, tmp_path, "--document_separator", "<|eot_id|>")
    assert "--document_separator '<|eot_id|>': not a special token" in bad.found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda monkeypatch: monkeypatch.setattr(separator, "available_memory", lambda: 10**6), "are free on cpu"),
        (lambda monkeypatch: monkeypatch.setattr(separator, "MOST_READ", 10**6), "in bfloat16, more than"),
        (lambda monkeypatch: monkeypatch.setattr(separator, "START", 10**6), "have no 2 texts"),
    ],
)
def test_where_it_is_not_measured(chat_teacher, tmp_path, own_cache, losses, monkeypatch, gpus, change, reason):
    gpus(0)
    change(monkeypatch)
    _, measured = findings(chat_teacher, tmp_path)
    assert measured.status == OK and "not measured" in measured.found and reason in measured.found


def test_a_tokenizer_with_one_token_for_it_needs_no_teacher(own_cache, losses):
    both = found(separator.check_document_separator)
    assert statuses(both) == [OK, OK] and "no other token" in both[1].found and not losses


def test_bos_is_no_candidate_by_itself(chat_teacher, tmp_path, own_cache, losses):
    """A base model with eos and bos, as Llama's, has one token to end a document with."""
    folder = shutil.copytree(chat_teacher, tmp_path / "base")
    tokenizer_of(["<|bos|>", "<|im_end|>"], bos_token="<|bos|>", eos_token="<|im_end|>").save_pretrained(folder)
    _, measured = findings(folder, tmp_path)
    assert "no other token" in measured.found and "best" not in losses


@pytest.mark.parametrize(("options", "n"), [(["--kl_weight", "0"], 1), (["--stage", "align", "--kl_weight", "0"], 2)])
def test_it_is_measured_where_a_teacher_runs(chat_teacher, tmp_path, own_cache, losses, options, n):
    assert len(findings(chat_teacher, tmp_path, *options)) == n


def test_losses_are_those_of_the_teacher_after_another_document(monkeypatch):
    monkeypatch.setattr(separator, "START", 5)
    teacher, documents = tiny_teacher(initializer_range=0.3), tokens(3, 40).tolist()
    found = separator.start_losses(teacher, documents, {"a": [51], "b": [52, 53]})
    for name, between in (("a", [51]), ("b", [52, 53])):
        losses = []
        for before, document in zip([documents[2], *documents[:2]], documents, strict=True):
            ids = torch.tensor([[*before[-32:], *between, *document[:5]]])
            log_p = teacher(ids).logits[0].log_softmax(-1)
            losses.append([-log_p[len(ids[0]) - 6 + k, document[k]].item() for k in range(5)])
        first, mean = torch.tensor(losses)[:, 0].mean().item(), torch.tensor(losses).mean().item()
        assert found[name] == pytest.approx((first, mean), rel=1e-5)


def test_no_document_is_begun_after_its_time():
    teacher, documents = tiny_teacher(), tokens(4, 40).tolist()
    first_two = separator.start_losses(teacher, documents, {"a": [51]}, seconds=0.0)
    assert first_two != separator.start_losses(teacher, documents, {"a": [51]})
    assert separator.FEWEST == 2
