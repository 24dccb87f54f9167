"""Gives each test of text its own cache of `datasets`."""

import pytest


@pytest.fixture(autouse=True)
def every_test_has_its_own_cache(own_cache):
    pass
