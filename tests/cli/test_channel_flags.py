"""Flags of the options of channels."""

import pytest

from fxprune.cli import channel_flags
from fxprune.sparsity.granularity import CHANNEL_OPTIONS


def test_every_option_of_channels_has_a_flag() -> None:
    assert tuple(channel_flags.HELP) == CHANNEL_OPTIONS


@pytest.mark.parametrize("text", ["8,9", "8,fc=4", "fc=4,8", "=8", " =8", "8,8"])
def test_numbers_by_layer_name_their_layers(text: str) -> None:
    with pytest.raises(ValueError, match=r"^--min-channels .*: expected .*layer=number; '.*' names no layer"):
        channel_flags.split({"min_channels": text})


def test_one_number_is_for_all_layers() -> None:
    assert channel_flags.split({"min_channels": " 8 "}) == {"min_channels": 8}
