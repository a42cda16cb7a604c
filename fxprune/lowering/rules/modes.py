"""Choices between training and evaluation: paths are those of evaluation, the other value is noted."""

from __future__ import annotations

from typing import Any

import torch

from fxprune.capture import ModeSwitch
from fxprune.graph import ir
from fxprune.lowering.constant import Constant
from fxprune.lowering.rules.table import Context, RuleTable

__all__ = ["table"]

table = RuleTable()


@table.rule(ModeSwitch)
def mode_switch(context: Context, training: Any, evaluating: Any) -> Any:
    """Give what evaluation gives, as a value of its own where training has another in its place."""
    if isinstance(evaluating, (tuple, list)) and isinstance(training, (tuple, list)):
        if len(training) == len(evaluating):
            pairs = zip(training, evaluating, strict=True)
            return type(evaluating)([mode_switch(context, *pair) for pair in pairs])
    if isinstance(evaluating, dict) and isinstance(training, dict) and training.keys() == evaluating.keys():
        return {key: mode_switch(context, training[key], evaluating[key]) for key in evaluating}
    if isinstance(training, ir.Value) and training.live and type(evaluating) in (int, float):
        pattern = torch.zeros(training.shape, dtype=torch.bool) if evaluating == 0 else None
        numbers = context.build.source(training.shape, live=False, pattern=pattern)
        return _noted(context, training, numbers)
    operands = training, evaluating
    if not all(isinstance(x, (ir.Value, Constant)) for x in operands) or training is evaluating:
        return evaluating
    if not any(isinstance(x, ir.Value) and x.live for x in operands):
        return evaluating
    if len(training.shape) != len(evaluating.shape):
        return evaluating
    return _noted(context, *map(context.build.materialise, operands))


def _noted(context: Context, training: ir.Value, evaluating: ir.Value) -> ir.Value:
    value = context.build.map_anew(evaluating)
    context.build.in_training[value.index] = training
    return value
