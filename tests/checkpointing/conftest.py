"""The hybrid and the tokenizer that tests of checkpoints save."""

import pytest

from tests.checkpointing.saved_checkpoints import make_tokenizer
from tests.tiny import tiny_hybrid


@pytest.fixture(scope="module")
def hybrid():
    return tiny_hybrid()


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()
