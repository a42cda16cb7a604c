"""The calls of modules go to whoever traces, and to themselves again afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxprune
from fxprune.capture.tracer.calls_replaced import calls_go_to, replaced_calls


def test_the_last_taker_is_in_charge_and_errors_end_its_time() -> None:
    original = nn.Module.__call__
    net = nn.Identity()
    with replaced_calls(), calls_go_to(lambda module, x: x + 1):
        with pytest.raises(ZeroDivisionError), calls_go_to(lambda module, x: 1 // x):
            net(0)
        assert net(0) == 1
    assert nn.Module.__call__ is original
    assert net(0) == 0


def test_work_that_ends_in_another_order_than_it_began_leaves_the_original() -> None:
    original = nn.Module.__call__
    one, other = replaced_calls(), replaced_calls()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert nn.Module.__call__ is not original
    with calls_go_to(lambda module, x: x + 1):
        assert nn.Identity()(0) == 1
    other.__exit__(None, None, None)
    assert nn.Module.__call__ is original


def test_rules_that_call_modules_while_a_network_is_lowered_run_them() -> None:
    seen = []

    class Doubled(nn.Linear):
        pass

    def rule(ctx: object, x: object) -> object:
        seen.append(nn.Identity()(torch.ones(2)).sum().item())
        return x

    graph = fxprune.capture(nn.Sequential(Doubled(3, 3)), torch.ones(1, 3))
    fxprune.lower(graph, rules={Doubled: rule})
    assert seen == [2.0]
