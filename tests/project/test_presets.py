"""The committed tiny preset: its tokenizer, text and questions, what its models can do, and that presets/make_tiny.py
makes the same text, questions, tokenizer and (in `make test-slow`) student again.
"""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from evaluation import mmlu, mmlu_files, statistics
from llamba import LlambaForCausalLM
from presets import make_tiny, tiny_text

TINY = Path(__file__).parents[2] / "presets" / "tiny"
FACT = re.compile(r" (\w+) (?:likes|sees|eats|has) (\w+)\.")
ASKED = re.compile(r" What does (\w+) (?:like|see|eat|have)\?$")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "teacher")


@pytest.fixture(scope="module")
def teacher():
    return LlamaForCausalLM.from_pretrained(TINY / "teacher", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def english():
    return (TINY / "text" / "english.txt").read_text(encoding="utf-8")


def documents(name: str) -> list[str]:
    lines = (TINY / "text" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def accuracy(model, tokenizer, num_fewshot: int) -> float:
    questions = mmlu.build_questions(mmlu_files.load_mmlu(TINY / "mmlu"), num_fewshot, limit=30)
    predictions = mmlu.score(model, tokenizer, questions, batch_size=30, device=torch.device("cpu"), max_length=None)
    return statistics.aggregate(predictions)["acc"]


@pytest.mark.parametrize("sample", ["", " A", "a\n\nb", "tab\tand  spaces ", "é “quotes” 漢字 🙂", "\x00\x7f"])
def test_tokenizer_gives_back_any_text_and_adds_nothing(tokenizer, sample):
    ids = tokenizer(sample)["input_ids"]
    assert tokenizer.decode(ids) == sample
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_words_of_the_questions_are_single_tokens(tokenizer):
    for word in [*tiny_text.WORDS, *tiny_text.LETTERS]:
        assert len(tokenizer(f" {word}")["input_ids"]) == 1, word


def test_both_models_have_the_same_tokenizer():
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (TINY / "teacher" / name).read_bytes() == (TINY / "student" / name).read_bytes()


def test_answers_follow_from_their_questions():
    for subject in mmlu_files.load_mmlu(TINY / "mmlu"):
        assert (len(subject.dev), len(subject.test)) == (5, 100)
        for row in [*subject.dev, *subject.test]:
            facts = dict(FACT.findall(row.question))
            asked = ASKED.search(row.question).group(1)
            assert len(facts) == len(set(row.choices)) == 4
            assert set(row.choices) == set(facts.values())
            assert row.choices["ABCD".index(row.answer)] == facts[asked]


def test_answers_are_not_all_of_one_letter():
    rows = [row for subject in mmlu_files.load_mmlu(TINY / "mmlu") for row in subject.test]
    for letter in "ABCD":
        assert 0.15 < sum(row.answer == letter for row in rows) / len(rows) < 0.35


def test_test_questions_are_not_in_the_training_text():
    stated = set()
    train = documents("train.jsonl")
    everything = "\n".join(train)
    for document in train:
        stated.update(FACT.findall(document))
    for subject in mmlu_files.load_mmlu(TINY / "mmlu"):
        for row in subject.test:
            asked = ASKED.search(row.question).group(1)
            assert row.question not in everything
            assert (asked, dict(FACT.findall(row.question))[asked]) not in stated


def test_held_out_text_is_not_in_the_training_text():
    train = set(documents("train.jsonl"))
    held_out = documents("heldout.jsonl")
    generated_short = [document for document in held_out if document in train and len(document) > 200]
    assert held_out and not generated_short


def test_committed_text_and_questions_are_what_the_generator_makes(english):
    made = {**tiny_text.make_text(english, seed=0), **tiny_text.make_mmlu(seed=0)}
    assert len(made) == 10
    for name, contents in made.items():
        assert (TINY / name).read_bytes() == contents.encode(), name


def test_generator_follows_its_seed(english):
    again = tiny_text.make_mmlu(seed=3)
    assert again == tiny_text.make_mmlu(seed=3) != tiny_text.make_mmlu(seed=4)
    short = [tiny_text.make_text(english, seed, characters=20_000) for seed in (3, 3, 4)]
    assert short[0] == short[1] != short[2]


def test_committed_tokenizer_is_what_the_generator_makes(english, tmp_path):
    make_tiny.save_tokenizer(make_tiny.make_tokenizer(english), tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == json.loads(
        (TINY / "teacher" / "tokenizer.json").read_text()
    )
    made = AutoTokenizer.from_pretrained(tmp_path)
    assert (made.bos_token, made.eos_token) == ("<|endoftext|>", "<|endoftext|>")


@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_teacher_answers(teacher, tokenizer, num_fewshot):
    assert accuracy(teacher, tokenizer, num_fewshot) >= 0.85


def student_of(folder: Path) -> LlambaForCausalLM:
    return LlambaForCausalLM.from_pretrained(folder / "student", dtype=torch.float32).eval()


def test_student_does_not(tokenizer):
    assert accuracy(student_of(TINY), tokenizer, 0) <= 0.45


def test_all_of_the_student_but_its_mixers_is_the_teacher(teacher):
    student, llama = student_of(TINY), teacher.model
    pairs = [
        (student.backbone.embedding, llama.embed_tokens),
        (student.backbone.final_layernorm, llama.norm),
        (student.lm_head, teacher.lm_head),
    ]
    for block, layer in zip(student.backbone.layers, llama.layers, strict=True):
        parts = ("input_layernorm", "post_attention_layernorm", "mlp")
        pairs += [(block.get_submodule(part), layer.get_submodule(part)) for part in parts]
    for copied, source in pairs:
        assert copied.state_dict().keys() == source.state_dict().keys()
        assert all(torch.equal(copied.state_dict()[name], weight) for name, weight in source.state_dict().items())


@pytest.mark.slow
def test_committed_student_is_made_from_the_committed_teacher(tmp_path, tokenizer):
    shutil.copytree(TINY / "teacher", tmp_path / "teacher")
    shutil.copytree(TINY / "text", tmp_path / "text")
    make_tiny.make(tmp_path, 0, ["student"])
    assert {file.name for file in (tmp_path / "student").iterdir()} == {
        file.name for file in (TINY / "student").iterdir()
    }
    text = "".join(documents("heldout.jsonl")[:20])
    ids = torch.tensor(tokenizer(text)["input_ids"][:1024])[None]  # (1, S)
    made, committed = (student_of(folder) for folder in (tmp_path, TINY))
    assert made.config.ssm_cfg == committed.config.ssm_cfg
    with torch.no_grad():
        log_p, log_q = (model(ids).logits.log_softmax(dim=-1) for model in (committed, made))  # (1, S, V)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean().item()
    assert kl < 0.01  # bits that differ with the processor; other fits differ by more than 0.1


@pytest.mark.parametrize("answers", [True, False])
def test_a_teacher_is_kept_only_if_it_answers(tmp_path, monkeypatch, teacher, answers):
    shutil.copytree(TINY / "mmlu", tmp_path / "mmlu")
    shutil.copytree(TINY / "teacher", tmp_path / "teacher")
    weights = tmp_path / "teacher" / "model.safetensors"
    weights.unlink()
    made = teacher if answers else LlamaForCausalLM(teacher.config)
    monkeypatch.setattr(make_tiny, "make_teacher", lambda *_: copy.deepcopy(made))
    if answers:
        make_tiny.make(tmp_path, 0, ["teacher"])
    else:
        with pytest.raises(SystemExit, match="has to answer 90%"):
            make_tiny.make(tmp_path, 0, ["teacher", "student"])
    assert weights.exists() == answers
    assert (tmp_path / "teacher.rejected").exists() != answers
    assert not (tmp_path / "student").exists()
