"""The value of a search has floors that no gain makes up for."""

from fxprune.methods.balance.target import Target
from fxprune.methods.dpai.objective import Figures


def test_no_gain_makes_up_for_a_node_below_the_least() -> None:
    """Of 5000 nodes one is a 5000th; a floor of kernels out of reach must not buy it."""
    start = Figures(60.0, 5000, 100_000)
    target = Target((1e-3, 1.0, 1e-3), Figures(61.0, 5250, 102_000), start)
    assert target.value(start) > target.value(Figures(90.0, 4999, 110_000))
    assert target.value(start) > target.value(Figures(90.0, 5100, 99_999))
    assert target.value(Figures(60.0, 5000, 100_001)) > target.value(start)
