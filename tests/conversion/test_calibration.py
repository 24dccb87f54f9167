"""The text of a conversion: windows of distinct documents for fitting and measuring, the same at every call."""

import json

import pytest
from transformers import AutoTokenizer

from conversion.calibration import read_windows
from tests.launch import ROOT
from text.sources import SourceFlags, TextSource


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "presets" / "tiny" / "teacher")


def source_of(folder, texts):
    file = folder / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return TextSource(str(file), cache_dir=str(folder / "cache"), flags=SourceFlags(name="--calibration"))


def words(tokenizer, windows):
    return {word for row in windows.tolist() for word in tokenizer.decode(row).replace("<|endoftext|>", " ").split()}


def test_no_document_is_in_both_parts(tmp_path, tokenizer):
    """Each document repeats a word of its own, and stands in the file twice."""
    texts = [f"{number}{'x' * 5} " * 20 for number in range(100, 160)] * 2
    source = source_of(tmp_path, texts)
    calibration, held_out = read_windows(source, tokenizer, (1000, 500), 64, seed=0)
    assert calibration.shape == (16, 64) and held_out.shape == (8, 65)
    whole = {word for word in words(tokenizer, calibration) & words(tokenizer, held_out) if len(word) == 8}
    assert whole == set()
    again = read_windows(source, tokenizer, (1000, 500), 64, seed=0)
    assert again.calibration.equal(calibration) and again.held_out.equal(held_out)
    assert not read_windows(source, tokenizer, (1000, 500), 64, seed=1).calibration.equal(calibration)


@pytest.mark.parametrize("tokens,part", [((10**5, 64), "--calibration_tokens"), ((64, 10**5), "--held_out_tokens")])
def test_too_little_text_is_one_line(tmp_path, tokenizer, tokens, part):
    with pytest.raises(
        ValueError, match=rf"--calibration '.*text.jsonl'.* expected 1563 for {part}.*use more text .a doc.* twice"
    ):
        read_windows(source_of(tmp_path, ["A text of some words."] * 3 + ["B " * 300]), tokenizer, tokens, 64, seed=0)
