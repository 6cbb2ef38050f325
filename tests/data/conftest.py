"""What the tests of the data folder share."""

import pytest

from moe.data.tokenizer import Tokenizer


@pytest.fixture
def byte_tokenizer():
    return Tokenizer.load("bytes")
