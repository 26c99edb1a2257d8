"""Transformers whose patches are not square, or longer than one latent frame."""

import pytest

from promag.scripts.reliability.odd_arguments import make_transformer
from tests.pipelines.conftest import call, like


def test_patches_need_not_be_square(pipe):
    oblong = like(pipe, transformer=make_transformer(patch_size=(1, 1, 2)))
    assert call(oblong, height=24, width=32).shape[2:4] == (24, 32)
    with pytest.raises(ValueError, match="width 24: needs a multiple of 16; use 16 or 32"):
        call(oblong, height=24, width=24)


def test_a_ratio_that_the_patches_do_not_divide_is_named_on_the_card(pipe, tmp_path):
    pipe = like(pipe, transformer=make_transformer(patch_size=(2, 1, 1)))
    pipe.save_pretrained(tmp_path)  # 17 frames are 5 latent frames at 4x
    assert "| 4 | 5: not divisible by patches of 2 | |" in (tmp_path / "README.md").read_text()
