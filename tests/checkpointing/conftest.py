"""The hybrid and the tokenizer that tests of checkpoints save."""

import pytest

from tests.checkpointing.saved_checkpoints import make_hybrid, make_tokenizer


@pytest.fixture(scope="module")
def hybrid():
    return make_hybrid()


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()
