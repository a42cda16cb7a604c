"""Flags of the options of channels."""

from fxprune.cli import channel_flags
from fxprune.sparsity.granularity import CHANNEL_OPTIONS


def test_every_option_of_channels_has_a_flag() -> None:
    assert tuple(channel_flags.HELP) == CHANNEL_OPTIONS
