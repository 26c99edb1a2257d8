"""A tokenizer that others are trained from."""

import pytest

from tests.conftest import make_tokenizer


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Return the folder of a tokenizer of three levels in which no weight has its initial zeros."""
    folder = tmp_path_factory.mktemp("teacher")
    make_tokenizer(settle=0.05).save_pretrained(folder)
    return folder
