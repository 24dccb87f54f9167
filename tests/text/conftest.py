"""Gives each test of text its own cache of `datasets`, and forbids the network to those that ask for it."""

import pytest

from text.sources import network_forbidden


@pytest.fixture(autouse=True)
def every_test_has_its_own_cache(own_cache):
    pass


@pytest.fixture
def offline():
    with network_forbidden(True):
        yield
