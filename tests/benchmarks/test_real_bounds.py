"""real_bounds.py: its held-out windows are the first tokens of each source, and a bound that is missed is named."""

import json

import pytest
from transformers import AutoTokenizer

from benchmarks.real_bounds import WINDOW, compare, one_window, prepare
from inputs.option_values import PRESETS

SEPARATOR = 0


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(PRESETS / "tiny" / "teacher")


def stream_of(texts, tokenizer) -> list[int]:
    return [token for text in texts for token in [*tokenizer(text).input_ids, SEPARATOR]]


@pytest.mark.parametrize(
    "texts", [["The assert statement is short. " * 90], ["Yes.", "The name is bound. " * 20, "No! " * 400]]
)
def test_a_window_is_the_first_tokens_of_a_source(tokenizer, texts):
    parts = list(one_window(texts, tokenizer))
    assert len(stream_of(parts, tokenizer)) == WINDOW + 1
    assert stream_of(parts, tokenizer)[:WINDOW] == stream_of(texts, tokenizer)[:WINDOW]


def test_a_text_that_fills_a_window_but_for_its_separator(tokenizer):
    ids = tokenizer("The name is bound. " * 100).input_ids[: WINDOW - 1]
    text = tokenizer.decode(ids)
    assert len(tokenizer(text).input_ids) == WINDOW - 1
    found = stream_of(one_window([text, "No, it is not."], tokenizer), tokenizer)
    assert len(found) == WINDOW + 1 and found[: WINDOW - 2] == ids[: WINDOW - 2]
    assert found[WINDOW - 2 :] == [SEPARATOR, tokenizer("No").input_ids[0], SEPARATOR]


def test_every_source_has_a_window(tokenizer, tmp_path):
    rows = [{"text": f"{word} " * 400, "source": word} for word in ("this", "that", "this")]
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "train.jsonl").write_text('{"text": "x"}\n')
    prepare(tmp_path, tmp_path / "out", tokenizer)
    texts = [json.loads(line)["text"] for line in (tmp_path / "out" / "heldout.jsonl").read_text().splitlines()]
    assert [text.split()[0] for text in texts] == ["this", "that"]
    assert len(stream_of(texts, tokenizer)) == 2 * (WINDOW + 1)
    assert (tmp_path / "out" / "train.jsonl").read_text() == '{"text": "x"}\n'


def test_a_bound_that_is_missed_is_named(tmp_path):
    (tmp_path / "distil").mkdir()
    (tmp_path / "align").mkdir()
    start = {"all": {"closed_form": {"kl": 1.9}}, "every second": {"closed_form": {"kl": 0.93}}}
    (tmp_path / "start.json").write_text(json.dumps(start))
    trained, teacher = {"kl": 0.27, "agreement": 0.75, "perplexity": 23.0}, {"perplexity": 20.0}
    models = {"hybrid_ft": {"held_out": trained}, "teacher": {"held_out": teacher}}
    (tmp_path / "distil" / "eval.json").write_text(json.dumps({"models": models}))
    rows = [{"alignment": {"errors": [error, error]}} for error in (9.0, *[0.5] * 10)]  # the last ten count
    (tmp_path / "align" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {row[0]: row[1:] for row in compare(tmp_path)}
    assert found["error of the mixers, aligned"] == ["0.500", "0.53", ""]
    assert found["trained, perplexity, of the teacher's"] == ["1.150", "1.15", ""]
    assert [name for name, row in found.items() if row[-1]] == ["closed form, KL, every second"]
