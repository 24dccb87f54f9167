"""What docs/choosing-layers.md says of the published list of heads follows from the list."""

import json
from pathlib import Path

import pytest

LIST = Path(__file__).parent / "llama31_heads.json"
PAGE = Path(__file__).parents[2] / "docs" / "choosing-layers.md"


@pytest.fixture
def heads():
    return [tuple(map(int, head.split(":"))) for head in json.loads(LIST.read_text())["heads"]]


def held(layers, heads):
    return sum(layer in layers for layer, _ in heads)


def test_it_is_forty_heads_of_the_8b_model(heads):
    assert len(set(heads)) == 40 and all(0 <= layer < 32 and 0 <= head < 32 for layer, head in heads)


def test_the_page_counts_them_rightly(heads):
    page = PAGE.read_text()
    for layers, n in (((14, 16, 17, 30), 10), ((13, 14, 15, 16), 16)):
        assert held(layers, heads[:20]) == n
        assert f"| {' '.join(map(str, layers))} | {n} of 20" in page
    assert held((30,), heads) == 0 and "layer 30 holds none, of all 40 either" in page
