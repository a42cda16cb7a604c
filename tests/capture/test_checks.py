"""Code that asks for numbers only to check them, or to know a size: traced, with a check in the graph."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.capture import CaptureError, capture, capture_own
from fxprune.lowering import lower

Step = Callable[[Tensor, Tensor], Tensor]
LENGTHS = torch.tensor([7, 5, 2])


class Step0(nn.Module):
    """One step as a module of its own."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def forward(self, h: Tensor, lengths: Tensor) -> Tensor:
        return self.step(h, lengths)


class Net(nn.Module):
    def __init__(self, step: Any) -> None:
        super().__init__()
        self.first, self.last, self.step = nn.Linear(4, 6), nn.Linear(6, 3), step

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        result: Tensor = self.last(self.step(self.first(x), lengths))
        return result


def batch(lengths: list[int], longest: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(lengths), longest or max(lengths), 4, generator=generator)
    return x, torch.tensor(lengths)


def outcome(net: nn.Module, given: tuple[Tensor, Tensor]) -> Any:
    try:
        return net(*given)
    except Exception as error:
        return error


def _no_nan(h: Tensor, lengths: Tensor) -> Tensor:
    if h.isnan().any():
        raise ValueError("not a number")
    return h


def _in_range(h: Tensor, lengths: Tensor) -> Tensor:
    if not ((h > -50).all() and lengths.min() > 0):
        raise ValueError(f"too small: {h.min().item():.1f}")
    return h


def _side_by_side(h: Tensor, lengths: Tensor) -> Tensor:
    if (h > 1e3).any() or not (h > -1e3).all():
        raise ValueError("out of range")
    return h


def _asserted(h: Tensor, lengths: Tensor) -> Tensor:
    if not bool(torch.all(h < 1e3)):
        raise AssertionError("too large")  # pytest rewrites assert statements: theirs ask for more
    return h


def _normal(h: Tensor, lengths: Tensor) -> Tensor:
    spread: Any = torch.distributions.Normal(
        h[..., :3], h[..., 3:].exp(), validate_args=True
    )  # torch.compile turns it off
    result: Tensor = spread.log_prob(h[..., :3].detach() + 1).repeat(1, 1, 2)
    return result


def _fits(h: Tensor, lengths: Tensor) -> Tensor:
    if lengths.max().item() > h.shape[1]:
        raise ValueError("too long")
    return h


CHECKS: dict[str, Step] = {
    "no nan": _no_nan, "in range": _in_range, "side by side": _side_by_side, "asserted": _asserted,
    "distribution": _normal, "fits": _fits,
}  # fmt: skip


@pytest.mark.parametrize("whole", [False, True], ids=["forward", "submodule"])
@pytest.mark.parametrize("name", CHECKS)
def test_checks_are_traced_and_raise_where_those_of_the_model_do(
    name: str, whole: bool, recwarn: pytest.WarningsRecorder
) -> None:
    torch.manual_seed(0)
    model = Net(Step0(CHECKS[name]) if whole else CHECKS[name])
    gm = capture(model, batch([7, 5, 2]))
    assert not any("capture" in str(warning.message) for warning in recwarn)
    assert [str(node.target) for node in gm.graph.nodes if node.op == "call_module"] == ["first", "last"]
    for copied in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        for lengths in ([7, 5, 2], [3, 6]):
            assert torch.equal(copied(*batch(lengths)), model(*batch(lengths)))
    bad = {
        "no nan": (batch([7, 7])[0] * torch.nan, LENGTHS[:2]),
        "in range": (batch([7])[0] * 1e4, LENGTHS[:1]),
        "side by side": (batch([7])[0] * 1e6, LENGTHS[:1]),
        "asserted": (batch([7])[0] * 1e6, LENGTHS[:1]),
        "distribution": (batch([7, 7])[0] * torch.nan, LENGTHS[:2]),
        "fits": batch([7], 5),
    }[name]
    assert isinstance(outcome(model, bad), Exception)
    with pytest.raises(AssertionError, match=r"Net: test_checks\.py:\d+ (raises|asks whether)"):
        gm(*bad)
    assert not lower(gm, strict=True).opaque


@pytest.mark.slow
def test_a_check_survives_compiling_and_exporting() -> None:
    model = Net(_in_range).eval()
    gm, x = capture(model, batch([7, 5, 2])), batch([4, 3])
    # Before 2.15, PyTorch breaks the graph at such a check, and only `fxprune.export` exports it.
    is_whole = torch.__version__ >= (2, 15)
    assert torch.equal(torch.compile(gm, backend="eager", fullgraph=is_whole)(*x), model(*x))
    if is_whole:
        assert torch.equal(torch.export.export(gm, x).module()(*x), model(*x))


def test_overflow_is_taken_for_an_error() -> None:
    def clamped(h: Tensor, lengths: Tensor) -> Tensor:
        if torch.isinf(h).any() or torch.isnan(h).any():
            h = h.clamp(-1, 1)
        return h

    model = Net(clamped)
    gm = capture(model, batch([7, 5, 2]))
    assert torch.equal(gm(*batch([3])), model(*batch([3])))
    with pytest.raises(AssertionError, match=r"test_checks\.py:\d+ asks whether numbers are finite"):
        gm(batch([3])[0] * torch.inf, LENGTHS[:1])


def _imputed(h: Tensor, lengths: Tensor) -> Tensor:
    return h.nan_to_num() if h.isnan().any() else h


def _doubled(h: Tensor, lengths: Tensor) -> Tensor:
    return h * 2 if (h > 0).any() else h


@pytest.mark.parametrize("step", [_imputed, _doubled])
def test_what_differs_between_inputs_keeps_its_module_whole(step: Step) -> None:
    """Inputs may well have gaps: that they have none is no check."""

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step, self.last = Step0(step), nn.Linear(4, 3)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            result: Tensor = self.last(self.step(x, lengths))
            return result

    model = First()
    with pytest.warns(UserWarning, match=r"step \(Step0\) kept whole: bool"):
        gm = capture(model, batch([7, 5, 2]))
    for x in (batch([3])[0], -batch([3])[0].abs(), torch.full((1, 3, 4), torch.nan)):
        assert torch.allclose(gm(x, LENGTHS[:1]), model(x, LENGTHS[:1]), equal_nan=True)
    with pytest.raises(CaptureError, match="asks for the numbers"):
        capture_own(Net(_doubled), batch([7, 5, 2]))


def test_printing_on_the_way_to_an_error_stays_untold(capsys: pytest.CaptureFixture[str]) -> None:
    def printed(h: Tensor, lengths: Tensor) -> Tensor:
        if not (h > -50).all():
            print("too small")
            raise ValueError("too small")
        return h

    capture(Net(printed), batch([7, 5, 2]))
    assert capsys.readouterr().out == ""


def _masked(h: Tensor, lengths: Tensor) -> Tensor:
    return h * (torch.arange(lengths.max().item())[None] < lengths[:, None])[..., None]


def _cut(h: Tensor, lengths: Tensor) -> Tensor:
    return h[:, : lengths.max().item()]


def _scaled(h: Tensor, lengths: Tensor) -> Tensor:
    return h / (h.abs().max().item() + 1) - lengths.float().mean().item()


def _split(h: Tensor, lengths: Tensor) -> Tensor:
    least: Any = lengths.min().item()
    parts = torch.split(h, [least, h.shape[1] - least], dim=1)
    return torch.cat([parts[1], parts[0]], 1)


@pytest.mark.parametrize("whole", [False, True], ids=["forward", "submodule"])
@pytest.mark.parametrize("step", [_masked, _cut, _scaled, _split])
def test_numbers_that_are_read_follow_the_input(step: Step, whole: bool) -> None:
    torch.manual_seed(0)
    model = Net(Step0(step) if whole else step)
    gm = capture(model, batch([7, 5, 2]))
    assert [str(node.target) for node in gm.graph.nodes if node.op == "call_module"] == ["first", "last"]
    for lengths in ([7, 5, 2], [3, 6], [4], [1, 2, 3, 4]):
        assert torch.equal(gm(*batch(lengths)), model(*batch(lengths)))


def _looped(h: Tensor, lengths: Tensor) -> Tensor:
    longest: Any = lengths.max().item()
    for i in range(longest):
        h = h + h[:, i : i + 1]
    return h


def _table(h: Tensor, lengths: Tensor) -> Tensor:
    longest: Any = lengths.max().item()
    scale: float = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0][longest]
    return h * scale


def _plain(h: Tensor, lengths: Tensor) -> Tensor:
    return h * (torch.arange(int(lengths.max()))[None] < lengths[:, None])[..., None]


def _branched(h: Tensor, lengths: Tensor) -> Tensor:
    return h * 2 if lengths.max().item() > 5 else h


@pytest.mark.parametrize("step", [_looped, _table, _plain, _branched])
def test_plain_numbers_hold_for_the_example_alone(step: Step) -> None:
    torch.manual_seed(0)
    model = Net(step)
    gm = capture(model, batch([7, 5, 2]))
    assert torch.equal(gm(*batch([7, 1])), model(*batch([7, 1])))
    with pytest.raises(AssertionError, match=r"Net: test_checks\.py:\d+ .*captured with.*capture it"):
        gm(*batch([4, 3]))
    with pytest.raises(CaptureError):  # no numbers to tell what they are
        capture_own(model, tuple(x.to("meta") for x in batch([7, 5, 2])))


@pytest.mark.parametrize("step", [_looped, _table, _plain, _branched])
def test_a_module_that_makes_plain_numbers_stays_whole(step: Step) -> None:
    model = Net(Step0(step))
    with pytest.warns(UserWarning, match=r"step \(Step0\) kept whole: "):
        gm = capture(model, batch([7, 5, 2]))
    for lengths in ([7, 5, 2], [3, 6]):
        assert torch.equal(gm(*batch(lengths)), model(*batch(lengths)))
    assert {op.reason.partition(":")[0] for op in lower(gm).opaque} == {"inside of step"}


def test_numbers_of_parameters_are_read_when_the_graph_runs() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(4, 3), nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.layer(x) * self.scale.item()
            return result

    model, x = Scaled(), torch.randn(2, 4)
    gm = capture(model, x)
    with torch.no_grad():
        model.scale.fill_(5.0)
    assert torch.equal(gm(x), model(x))


def _by_sizes(h: Tensor, lengths: Tensor) -> Tensor:
    marked = lengths.new_zeros(h.shape[:2]) | h.new_zeros(1, h.shape[1]).bool()
    has_marks = marked.flatten().any().item()
    return h * 2 if has_marks else h + int(torch.ones_like(lengths).sum().clamp(max=1))


def _filled(h: Tensor, lengths: Tensor) -> Tensor:
    stride: Any = torch.tensor([4.0, 8.0])
    first = torch.tensor(min(h.shape[1], 2))
    return h + h.new_full((h.shape[1], 1), stride[1]) + h[:, first - 1 : first]


def _cut_by_a_tensor(h: Tensor, lengths: Tensor) -> Tensor:
    longest: Any = lengths.max()
    kept = torch.arange(longest) < lengths[:, None]
    return h[:, :longest] * kept[..., None] + torch.zeros(h.shape[0], longest, 1)


@pytest.mark.parametrize("whole", [False, True], ids=["forward", "submodule"])
@pytest.mark.parametrize("step", [_by_sizes, _filled, _cut_by_a_tensor])
def test_what_follows_from_sizes_is_traced_wherever_it_is(step: Step, whole: bool) -> None:
    torch.manual_seed(0)
    model = Net(Step0(step) if whole else step)
    gm = capture(model, batch([7, 5, 2]))
    assert [str(node.target) for node in gm.graph.nodes if node.op == "call_module"] == ["first", "last"]
    for lengths in ([7, 5, 2], [3, 6]):
        assert torch.equal(gm(*batch(lengths)), model(*batch(lengths)))
    graph = lower(gm, strict=True)
    assert not graph.opaque
    assert set(graph.kernels) == {"first.weight", "last.weight"}


def steps_of(module: nn.Module) -> Tensor:
    return module.get_buffer("steps")


def test_a_counter_is_no_constant() -> None:
    class Warm(nn.Module):
        """Changes its ways after some steps."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

        def forward(self, x: Tensor) -> Tensor:
            return x if steps_of(self) > 2 else torch.relu(self.layer(x))

    warm = Warm()
    net = nn.Sequential(warm, nn.Linear(4, 2))
    with pytest.warns(UserWarning, match=r"0 \(Warm\) kept whole"):
        gm = capture(net, torch.randn(2, 4))
    x = torch.randn(2, 4)
    for steps in (0, 3):
        steps_of(warm).fill_(steps)
        assert torch.equal(gm(x), net(x))


class Skipping(nn.Module):
    """Skips a mask that hides nothing, unless it is compiled: the same numbers either way."""

    def __init__(self, *, asks_always: bool = False) -> None:
        super().__init__()
        self.first, self.last, self.asks_always = nn.Linear(4, 6), nn.Linear(6, 3), asks_always

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.first(x)
        if (torch.compiler.is_compiling() and not self.asks_always) or not mask.all():
            scores = scores.masked_fill(~mask.bool()[:, None], 0.0)
        result: Tensor = self.last(scores)
        return result


@pytest.mark.parametrize("hidden", [False, True])
def test_code_that_has_another_way_for_compilers_goes_that_way(hidden: bool) -> None:
    """Padded batches and full ones follow each other, whichever of them was the example."""
    x, full = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), torch.ones(2, dtype=torch.long)
    padded = torch.tensor([1, 0])
    net = Skipping().eval()
    graph = capture(net, (x, padded if hidden else full))
    for mask in (full, padded):
        assert torch.equal(graph(x, mask), net(x, mask))


def test_code_that_asks_all_the_same_holds_for_the_example() -> None:
    x, full = torch.ones(2, 4), torch.ones(2, dtype=torch.long)
    net = Skipping(asks_always=True).eval()
    graph = capture(net, (x, full))
    assert torch.equal(graph(x, full), net(x, full))
    with pytest.raises(AssertionError, match="decides by numbers in the inputs"):
        graph(x, torch.tensor([1, 0]))
