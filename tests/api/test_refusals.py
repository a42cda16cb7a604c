"""Bad input: one line that names the argument and the value, of the fitting type, before any work."""

import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxprune
from fxprune import api


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


REFUSALS = [
    ({"sparsity": 1.0}, ValueError, "sparsity=1.0"),
    ({"sparsity": -0.1}, ValueError, "sparsity=-0.1"),
    ({"sparsity": float("nan")}, ValueError, "sparsity=nan"),
    ({"sparsity": "0.5"}, TypeError, "sparsity='0.5'"),
    ({"sparsity": 0.9999}, ValueError, "keeps none of the 48 prunable weights"),
    ({"method": "synflwo"}, ValueError, "did you mean 'synflow'"),
    ({"method": 3}, TypeError, "method=3"),
    ({"method": "magnitude", "rounds": 3}, TypeError, "no option 'rounds'"),
    ({"method": "synflow", "rounds": 2.5}, TypeError, "rounds=2.5"),
    ({"method": "synflow", "rounds": 0}, ValueError, "rounds=0"),
    ({"method": "snip"}, ValueError, "method 'snip' needs data="),
    ({"loss_fn": 3}, TypeError, "loss_fn=3"),
    ({"loss_fn": nn.MSELoss}, TypeError, "got the class MSELoss; MSELoss()"),
    ({"budget": "global-ish"}, ValueError, "budget='global-ish'"),
    ({"budget": 0.5}, TypeError, "budget=0.5"),
    ({"budget": {"nope": 0.5}}, ValueError, "budget: 'nope' fits no prunable layer"),
    ({"budget": {"0": 1.5}}, ValueError, "budget['0']=1.5"),
    ({"granularity": "row"}, ValueError, "granularity='row'"),
    ({"granularity": 4}, TypeError, "granularity=4"),
    ({"schedule": "steep"}, ValueError, "schedule='steep'"),
    ({"schedule": 4}, TypeError, "schedule=4"),
    ({"exclude": "fc"}, ValueError, "exclude: 'fc' fits nothing"),
    ({"exclude": nn.Conv2d}, ValueError, "exclude: 'Conv2d' fits nothing"),
    ({"exclude": [3]}, TypeError, "exclude: 3"),
    ({"exclude": 3}, TypeError, "exclude=3"),
    ({"exclude": nn.Linear}, ValueError, "no prunable weights"),
    ({"seed": "1"}, TypeError, "seed='1'"),
    ({"seed": -1}, ValueError, "seed=-1"),
    ({"device": "gpu"}, ValueError, "device='gpu'"),
    ({"device": "meta"}, ValueError, "device='meta'"),
    ({"returns": "fx"}, ValueError, "returns='fx'"),
    ({"on_collapse": "ignore"}, ValueError, "on_collapse='ignore'"),
    ({"example_inputs": [torch.ones(1, 4)]}, TypeError, "example_inputs"),
    ({"example_inputs": (2, 4)}, TypeError, "example_inputs=(2, 4): a shape is no input; pass a tensor"),
    ({"example_inputs": torch.Size([2, 4])}, TypeError, "as in torch.ones(2, 4)"),
    ({"example_inputs": np.ones((2, 4))}, TypeError, "got ndarray; pass torch.from_numpy(x)"),
    ({"example_inputs": torch.ones(2, 5)}, ValueError, "example_inputs"),
    ({"example_inputs": None}, ValueError, "example_inputs"),
]


@pytest.mark.parametrize(("given", "kind", "message"), REFUSALS, ids=[str(row[0])[:40] for row in REFUSALS])
def test_refusals(given: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments = {"method": "magnitude", "sparsity": 0.5, "example_inputs": torch.ones(2, 4)} | given
    with pytest.raises(kind, match=re.escape(message)) as caught:
        fxprune.apply(net(), **arguments)
    assert "\n" not in str(caught.value)


CHEAP = [row for row in REFUSALS if "example_inputs" not in row[0] and row[0] != {"exclude": nn.Linear}]


@pytest.mark.parametrize(("given", "kind", "message"), CHEAP, ids=[str(row[0])[:40] for row in CHEAP])
def test_refusals_come_before_any_work(
    given: dict[str, Any], kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*args: Any) -> Any:
        pytest.fail("the model was captured before the arguments were checked")

    monkeypatch.setattr(api, "capture", work)
    with pytest.raises(kind, match=re.escape(message)):
        fxprune.apply(net(), **({"method": "magnitude", "sparsity": 0.5} | given))


def test_the_models_own_error_is_chained() -> None:
    with pytest.raises(ValueError, match="example_inputs") as caught:
        fxprune.apply(net(), "random", 0.5, example_inputs=torch.ones(2, 5))
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Sequential(nn.BatchNorm1d(4), nn.ReLU())])
def test_a_model_without_prunable_weights(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="no prunable weights"):
        fxprune.apply(model, "random", 0.5, example_inputs=torch.ones(2, 4))


def test_models_that_are_no_models_or_have_no_values() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got a str"):
        fxprune.apply("resnet18", "random", 0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got a OrderedDict; a state dict is loaded into a model first"):
        fxprune.apply(net().state_dict(), "random", 0.5)  # type: ignore[arg-type]
    exported = torch.export.export(net(), (torch.ones(2, 4),))
    with pytest.raises(TypeError, match="got a ExportedProgram; pass the module that was exported"):
        fxprune.apply(exported, "random", 0.5)  # type: ignore[arg-type]
    for make in (torch.jit.script, lambda model: torch.jit.trace(model, torch.ones(2, 4))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = make(net())
        with pytest.raises(TypeError, match=r"got a module of torch\.jit.*pass the one that it was made of"):
            fxprune.apply(compiled, "random", 0.5, example_inputs=torch.ones(2, 4))
    with torch.device("meta"):
        empty = net()
    with pytest.raises(ValueError, match="meta device"):
        fxprune.apply(empty, "random", 0.5, example_inputs=torch.ones(2, 4))
    with pytest.raises(ValueError, match="no shape yet"):
        fxprune.apply(nn.LazyLinear(3), "random", 0.5, example_inputs=torch.ones(2, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fxprune.analyze("net"), "gm: expected a torch.nn.Module"),
        (lambda: fxprune.analyze(net(), "pixel"), "resolution='pixel'"),
        (
            lambda: fxprune.analyze(net(), torch.ones(2, 4)),
            "resolution: got a Tensor, expected 'spatial' or 'channel'; inputs are example_inputs",
        ),
        (lambda: fxprune.save(net(), None), "path: got a NoneType, expected the name of a file"),
        (lambda: fxprune.analyze(net()), "example_inputs"),
        (lambda: fxprune.capture(net()), "example_inputs"),
        (lambda: fxprune.lower(net()), "gm: expected a torch.fx.GraphModule"),
        (lambda: fxprune.verify("net"), "model: expected a torch.nn.Module, got a str"),
        (lambda: fxprune.finalize(net), "model: expected a torch.nn.Module, got the function net; call it"),
        (
            lambda: fxprune.plot.density(net()),
            "report: expected what fxprune.analyze returns, got a Sequential",
        ),
        (lambda: fxprune.plot.masks(net()), "masks: expected what fxprune.masks returns, got a Sequential"),
        (
            lambda: fxprune.lottery(net(), lambda model: 1.0, 1, example_inputs=torch.ones(1, 4)),
            "model_fn: expected a function that makes the network, got a Sequential",
        ),
        (
            lambda: fxprune.remap_optimizer("adam", net(), fxprune.compact(net(), torch.ones(1, 4))),
            "optimizer: expected a torch.optim.Optimizer, got a str",
        ),
    ],
)
def test_the_other_doors(call: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (
            {"loss_fn": lambda output: output.sum()},
            TypeError,
            r"^loss_fn: it is called with \(output, target\), or",
        ),
        (
            {"data": (torch.ones(4, 6, device="meta"), torch.arange(4) % 3)},
            ValueError,
            "stands on the meta device",
        ),
        (
            {"example_inputs": torch.ones(0, 6)},
            ValueError,
            r"^example_inputs: a tensor of shape \(0, 6\) is empty",
        ),
        (
            {"example_inputs": [torch.ones(1, 6)]},
            TypeError,
            r"^example_inputs: .*got list; pass tuple\(\.\.\.\) of it$",
        ),
    ],
)
def test_what_cannot_be_computed_with_is_named(given: Any, error: type[Exception], words: str) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    data = torch.ones(4, 6), torch.arange(4) % 3
    with pytest.raises(error, match=words):
        fxprune.apply(net, "snip", 0.5, **{"data": data, "example_inputs": data[0], **given})
