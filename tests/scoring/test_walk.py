"""Walks through networks: the outputs are the model's, and only what is still read is held."""

import gc
import weakref
from typing import Any

import pytest
import torch
from methods.problems import problem
from torch import Tensor, nn

import fxprune
from fxprune.scoring.data import batches
from fxprune.scoring.moments import Products, unfolded
from fxprune.scoring.walk import Arguments, arguments_of, checked_tokens, quiet, stages


class Residual(nn.Module):
    """A skip connection, a module that writes in place, and keyword inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        y = self.act(self.one(x) * scale)
        return self.two(y) + y


def test_outputs_are_those_of_the_model() -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    example = {"x": torch.ones(2, 4), "scale": torch.ones(1)}
    gm = fxprune.capture(model, example)
    calls = [Arguments((torch.randn(3, 4),), {"scale": torch.tensor(2.0 + i)}) for i in range(2)]
    seen: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for stage in stages(gm, calls):
            # Run as often as one likes: inputs are not written to.
            seen[stage.name] = [stage.run(piece) for piece in range(stage.count) for _ in range(2)][::2]
            stage.advance()
        for piece, call in enumerate(calls):
            assert torch.equal(list(seen.values())[-1][piece], model(*call.args, **call.kwargs))


@pytest.mark.slow
def test_only_the_frontier_is_held() -> None:
    alive: list[Any] = []

    class Noting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            alive.append(weakref.ref(y))
            return y

    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return isinstance(m, Noting)

    net = nn.Sequential(*[Noting(4, 4) for _ in range(6)])
    gm = torch.fx.GraphModule(net, Leaves().trace(net))
    with torch.no_grad():
        for index, stage in enumerate(stages(gm, [Arguments((torch.ones(2, 4),))] * 3)):
            stage.advance()
            gc.collect()
            held = [place for place, one in enumerate(alive) if one() is not None]
            # Of three batches, the outputs of this layer alone; nobody reads those of the last.
            assert held == ([] if index == 5 else [3 * index, 3 * index + 1, 3 * index + 2])


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(4, 6, 3, 2, 1),
        nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 2), groups=2),
        nn.Conv3d(2, 2, 2),
        nn.ConvTranspose1d(3, 5, 4, 3, 0, dilation=2),
        nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2),
    ],
    ids=repr,
)
def test_windows_times_weights_are_the_convolution(conv: Any) -> None:
    torch.manual_seed(0)
    conv = conv.double()
    nn.init.zeros_(conv.bias)
    x = torch.randn(2, conv.in_channels, *(7, 8, 9)[: conv.weight.dim() - 2]).double()
    found: list[Any] = []
    with (
        torch.no_grad(),
        Products({"w": conv.weight}, lambda name, place, rows: found.append((place, rows()))),
    ):
        y = conv(x)
    place, rows = found[0]
    weight = conv.weight.detach().flatten()[place.positions(conv.weight)]
    z = (torch.cat(rows, 1) @ weight).permute(1, 0, 2).reshape(2, -1, y.shape[1])
    assert torch.allclose(z.transpose(1, 2).reshape(y.shape), y)
    assert len(unfolded(torch.ones(1, 1, 4), (2,), [2], [0], [1])[0]) == 2


def test_a_loss_shows_how_it_calls_the_model() -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["image"] * 2).sum()  # type: ignore[no-any-return]

    given = problem(nn.Sequential(nn.Linear(2, 2)), data={"image": torch.ones(3, 2)}, loss_fn=loss)
    (call,) = arguments_of(given, batches(given, 1, "m"), "m")
    assert torch.equal(call.args[0], 2 * torch.ones(3, 2))
    given = problem(nn.Sequential(nn.Linear(2, 2)), data={"image": torch.ones(3, 2)}, loss_fn=lambda m, b: 0)
    with pytest.raises(ValueError, match="does not call the model"):
        arguments_of(given, batches(given, 1, "m"), "m")


def test_labels_are_left_out_where_the_model_takes_none() -> None:
    given = problem(nn.Sequential(nn.Linear(2, 2)), data={"input": torch.ones(3, 2), "labels": torch.ones(3)})
    (call,) = arguments_of(given, batches(given, 1, "m"), "m")
    assert list(call.kwargs) == ["input"]


class Optional(nn.Module):
    """A linear map that computes its own loss, as models of transformers do, and may be given a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None, factor: Tensor | None = None) -> Any:
        y = self.body(x if factor is None else x * factor)
        return y if labels is None else (nn.functional.cross_entropy(y, labels), y)


def test_labels_that_the_model_was_captured_without_are_left_out() -> None:
    x = torch.rand(3, 2)
    data = {"x": x, "labels": torch.zeros(3, dtype=torch.int64)}
    options: dict[str, Any] = {"example_inputs": {"x": x}, "returns": "module", "progress": False}
    for method in ("wanda", "sparsegpt"):
        pruned = fxprune.apply(Optional(), method, 0.5, data=data, **options)
        same = fxprune.apply(Optional(), method, 0.5, data=(x, x), **options)
        assert int(fxprune.masks(pruned)["body.weight"].sum()) == 2
        assert type(same) is type(pruned)


def test_other_arguments_that_the_model_was_captured_without_are_named() -> None:
    x = torch.rand(3, 2)
    with pytest.raises(
        ValueError, match=r"^method 'wanda': data has 'factor', which example_inputs has not; "
    ):
        fxprune.apply(Optional(), "wanda", 0.5, data={"x": x, "factor": x}, example_inputs={"x": x})


def test_quiet_puts_modes_buffers_and_fused_attention_back() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
    model[1].eval()
    with quiet(model, "m"):
        assert not model[0].training
        assert not torch.backends.mha.get_fastpath_enabled()
        model[0].running_mean.fill_(3)
    assert [module.training for module in model] == [True, False]
    assert torch.backends.mha.get_fastpath_enabled()
    assert not model[0].running_mean.any()


def test_tokens_of_empty_batches_and_other_inputs_pass() -> None:
    table = nn.Embedding(3, 2)
    with checked_tokens(table, "x"):
        table(torch.zeros(0, dtype=torch.long))
        with pytest.raises(ValueError, match=r"run from -1 to 2, but embedding '' has 3 rows"):
            table(torch.tensor([-1, 2]))
    assert not table._forward_pre_hooks
