"""The training of the tiny preset's teacher: where its lessons say to look, and stages that end by a probe."""

import random
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from evaluation import mmlu_files
from inputs.option_values import PRESETS
from presets import tiny_lessons, tiny_teacher, tiny_text
from presets.tiny_lessons import Lessons, looks
from presets.tiny_teacher import attention_alone, learn_stage, lesson_loss, new_model, orthogonal, stages

TINY = PRESETS / "tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "teacher")


def words_of(tokenizer, text):
    return [tokenizer.decode([index]) for index in tokenizer(text)["input_ids"]]


def places(words, layer):
    return [(look.at, look.to) for look in looks(words) if look.layer == layer]


def test_looks_lead_to_the_answers_of_the_committed_questions(tokenizer):
    for subject in mmlu_files.load_mmlu(TINY / "mmlu"):
        for row in subject.test[:20]:
            choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABCD", row.choices, strict=True))
            words = words_of(tokenizer, f"{row.question}{choices}\nAnswer: {row.answer}")
            ((asked, fact),) = places(words, 1)
            ((end, asked_again),) = places(words, 2)
            ((from_end, choice),) = places(words, 3)
            assert (words[asked], words[end]) == ("?", ":") and (asked_again, from_end) == (asked, end)
            assert words[fact] == words[choice] and fact < asked < choice < end
            assert words[choice - 2] == row.answer


def test_looks_of_other_documents(tokenizer):
    words = words_of(tokenizer, "Note: Bob likes rose. Ray likes jade. What does Ray like? jade.")
    assert [(words[at], words[to]) for at, to in places(words, 1)] == [("?", " jade")]
    words = words_of(tokenizer, "A. red\nB. blue\nWhich is blue? B\nWhich is red? A")
    assert [words[to - 2] for _, to in places(words, 3)] == ["B", "A"]
    words = words_of(tokenizer, "Which is blue?\nA. red\nB. blue\nAnswer: B")
    assert [(words[at], words[to - 2]) for at, to in places(words, 3)] == [(":", "B")]
    assert places(words, 0)[:2] == [(1, 0), (2, 1)] and (2, 0) in places(words, 0)


def test_a_name_that_was_noted_before_is_looked_up_in_the_last_note(tokenizer):
    words = words_of(tokenizer, "Note: Bob likes rose. What does Bob like? Note: Bob likes jade. What does Bob like?")
    assert [words[to] for _, to in places(words, 1)] == [" rose", " jade"]


def test_every_stage_draws_lessons(tokenizer):
    for stage in stages():
        lesson = Lessons(stage.kinds, stage.shape, stage.filler, tokenizer, stage.shown).draw(random.Random(0))
        assert lesson.inputs.shape == lesson.labels.shape == lesson.weights.shape == stage.shape
        assert (lesson.inputs[:, 1:] == lesson.labels[:, :-1]).all()
        assert (lesson.weights == tiny_text.CHOICE).any()
        assert bool(lesson.looks) == stage.shown
        for window, at, to in (places for group in lesson.looks.values() for places in group.T.tolist()):
            assert window < stage.shape[0] and 0 <= to < at < stage.shape[1]


def test_attention_is_shown_where_to_look(tokenizer):
    model = new_model(seed=0)
    lesson = Lessons(stages()[0].kinds, (4, 64), 0.0, tokenizer, shown=True).draw(random.Random(0))
    with attention_alone(model):
        shown, plain = (lesson_loss(model, lesson, shown) for shown in (True, False))
        uniform = sum(0.5 * (at + 1).log().mean() for _, at, _ in lesson.looks.values())
        torch.testing.assert_close(shown - plain, uniform, atol=0.5, rtol=0)  # nothing is preferred yet
        shown.backward()
    assert model.model.layers[3].self_attn.k_proj.weight.grad.abs().max() > 0
    assert all(p.grad is None for layer in model.model.layers for p in layer.mlp.parameters())


def test_mlps_that_come_back_change_nothing():
    model = new_model(seed=0).eval()
    ids = torch.arange(12)[None]  # (1, S)
    with attention_alone(model), torch.no_grad():
        alone = model(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, alone)


def test_orthogonal_brings_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((2, 8, 8), (2, 8, 32), (2, 32, 8)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert values.min() > 0.5 and values.max() < 1.5


# Stages that end by a probe


@pytest.fixture
def quick(monkeypatch):
    """Lets each step of a model of one layer shrink its weights, and the probe give the next of these values."""
    values = []
    config = tiny_teacher.teacher_config()
    config.num_hidden_layers = 1
    monkeypatch.setattr(tiny_teacher, "teacher_config", lambda: config)
    monkeypatch.setattr(tiny_teacher, "right_letters", lambda *_: values.pop(0))
    monkeypatch.setattr(
        tiny_teacher, "lesson_loss", lambda model, *_: sum(p.square().sum() for p in model.parameters())
    )
    monkeypatch.setattr(tiny_teacher, "PROBE_INTERVAL", 1)
    return values


def stage(**changes):
    questions = ((1, tiny_lessons.questions(2)),)
    return replace(tiny_teacher.Stage("look", questions, questions, (1, 64), 0.0, least=2, most=4), **changes)


def test_a_stage_ends_when_its_probe_passes_but_not_before_its_least_steps(tokenizer, quick):
    quick += [0.99, 0.5, 0.91, 0.99]
    learn_stage(new_model(0), stage(), tokenizer, 0)
    assert quick == [0.99]


def test_a_stage_that_is_not_learned_begins_again_from_its_start_and_stops_at_last(tokenizer, quick, capsys):
    model = new_model(0)
    start = model.lm_head.weight.detach().clone()
    quick += [0.1] * 12
    with pytest.raises(SystemExit, match="'look' has to reach 0.9 .* 3 attempts of 4 steps"):
        learn_stage(model, stage(), tokenizer, 0)
    assert not quick and torch.equal(model.lm_head.weight, start)
    assert [line for line in capsys.readouterr().out.splitlines() if "not learned" in line] == [
        f"look: not learned in 4 steps, attempt {attempt} of 3" for attempt in (1, 2, 3)
    ]


def test_an_attempt_draws_other_documents(tokenizer, quick, monkeypatch):
    quick += [0.1] * 4 + [0.99] * 2
    drawn = []
    draw = Lessons.draw
    monkeypatch.setattr(Lessons, "draw", lambda self, rng: drawn.append(draw(self, rng)) or drawn[-1])
    learn_stage(new_model(0), stage(), tokenizer, 0)
    assert len(drawn) == 6 and not torch.equal(drawn[0].inputs, drawn[4].inputs)
