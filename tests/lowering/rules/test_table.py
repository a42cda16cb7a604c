"""A user's own op rules: they win over the built-in ones; what is no rule is refused."""

from typing import Any

import pytest
import torch
from torch import nn

from fxprune import Pruner, apply, capture, lower
from fxprune.graph import ir
from fxprune.lowering import Context, RuleTable

TABLE = RuleTable()


@TABLE.rule(nn.ReLU)
def never_zero(context: Context, x: Any) -> ir.Value:
    return context.build.map(context.build.materialise(x), floor=True)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def floors(graph: Any) -> int:
    return sum(isinstance(op, ir.Map) and op.floor for op in graph.ops)


@pytest.mark.parametrize("rules", [TABLE, {nn.ReLU: never_zero}])
def test_own_rules_win(rules: Any) -> None:
    gm = capture(net(), torch.ones(2, 4))
    assert floors(lower(gm)) == 0
    assert floors(lower(gm, rules=rules)) == 1
    assert floors(lower(gm)) == 0
    pruner = Pruner(net(), "gmp", 0.5, total=4, example_inputs=torch.ones(2, 4), rules=rules)
    assert floors(pruner.graph) == 1


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([never_zero], "rules: expected a RuleTable or a dict"),
        ({3: never_zero}, "rules: 3 is no operation; take a function"),
        ({"relu": None}, "rules: the rule of 'relu' is None; take a function"),
    ],
)
def test_refusals(rules: Any, message: str) -> None:
    gm = capture(net(), torch.ones(2, 4))
    with pytest.raises(TypeError, match=message):
        lower(gm, rules=rules)
    with pytest.raises(TypeError, match=message):
        apply(net(), "magnitude", 0.5, example_inputs=torch.ones(2, 4), rules=rules)
    with pytest.raises(TypeError, match=message):
        Pruner(net(), "gmp", 0.5, total=4, example_inputs=torch.ones(2, 4), rules=rules)
