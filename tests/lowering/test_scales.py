"""Numbers that only scale others, and those that scale what they were computed from."""

import pytest
from torch import Tensor, fx, nn

from fxprune.lowering.scales import only_scales, scales_its_source


class Sums(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        total = (x * x).sum(-1, keepdim=True)
        match self.kind:
            case "itself":
                return x * total.rsqrt()
            case "a part of it":
                return x.float().chunk(2, -1)[0] / (total + 1).sqrt()
            case "another":
                return y * total
            case "both":
                return x * total + y * total
            case _:
                return x + total


@pytest.mark.every_case
@pytest.mark.parametrize(
    ("kind", "scales", "its_source"),
    [
        ("itself", True, True),
        ("a part of it", True, True),
        ("another", True, False),
        ("both", True, False),
        ("none", False, False),
    ],
)
def test_what_a_sum_of_squares_scales(kind: str, scales: bool, its_source: bool) -> None:
    graph = fx.symbolic_trace(Sums(kind)).graph
    (total,) = [node for node in graph.nodes if node.target == "sum"]
    assert only_scales(total) is scales
    assert scales_its_source(total) is its_source
