"""Complex weights, as of Fourier layers: one weight each, with one mask for both of its parts."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.scoring.complex_weights import removal, squared


class Spectral(nn.Module):
    """Every low frequency has a matrix of its own."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        self.weight = nn.Parameter(torch.randn(width, width, modes, dtype=torch.cfloat) / width)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x)
        out = torch.zeros_like(spectrum)
        out[..., : self.modes] = torch.einsum("bix,iox->box", spectrum[..., : self.modes], self.weight)
        return torch.fft.irfft(out, n=x.shape[-1])


class Operator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lift, self.out = nn.Conv1d(2, 4, 1), nn.Conv1d(4, 1, 1)
        self.spectral, self.local = Spectral(4, 3), nn.Conv1d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        out: Tensor = self.out(F.gelu(self.spectral(x) + self.local(x)))
        return out


@pytest.fixture
def net() -> Operator:
    torch.manual_seed(0)
    return Operator()


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 2, 16, generator=generator), torch.randn(3, 1, 16, generator=generator)


def test_a_complex_weight_is_a_kernel(net: Operator, data: tuple[Tensor, Tensor]) -> None:
    graph = fxprune.lower(fxprune.capture(net, data[0]))
    assert "spectral.weight" in graph.kernels
    assert not graph.opaque


def test_the_derivative_by_a_factor(net: Operator, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    weight = net.spectral.weight
    factor = torch.ones(weight.shape, requires_grad=True)
    out = torch.func.functional_call(net, {"spectral.weight": weight.detach() * factor}, (x,))
    F.mse_loss(out, y).backward()
    F.mse_loss(net(x), y).backward()
    assert weight.grad is not None
    assert torch.allclose(removal(weight.grad, weight.detach()), factor.grad, atol=1e-6)
    assert torch.allclose(squared(weight), weight.real**2 + weight.imag**2)


@pytest.mark.thinned(4)
@pytest.mark.filterwarnings("ignore:layer collapse:UserWarning")
@pytest.mark.parametrize(
    "method",
    "magnitude snip synflow grasp grasp-it force iter-snip prospr obd taylor lamp ntk-sap".split(),
)
def test_one_mask_holds_for_both_parts(
    method: str, net: Operator, data: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    x, y = data
    pruned = fxprune.apply(net, method, 0.5, example_inputs=x, data=data, loss_fn=F.mse_loss, progress=False)
    mask = fxprune.masks(pruned)["spectral.weight"]
    assert mask.shape == (4, 4, 3)
    assert 0 < mask.sum() < mask.numel()
    weight = pruned.get_parameter("spectral.weight")
    assert torch.equal(torch.view_as_real(weight.detach()).ne(0).all(-1), mask)
    optimizer = torch.optim.Adam(pruned.parameters(), 1e-2, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.mse_loss(pruned(x), y).backward()
        optimizer.step()
    fxprune.verify(pruned)
    assert torch.equal(torch.view_as_real(weight.detach()).ne(0).any(-1), mask)
    fxprune.save(pruned, tmp_path / "net.safetensors")
    again = fxprune.load(tmp_path / "net.safetensors", Operator())
    assert torch.equal(again(x), pruned(x))
    assert torch.allclose(fxprune.finalize(pruned)(x), pruned(x), atol=1e-6)


@pytest.mark.filterwarnings("error:Casting complex")
def test_channels_of_a_complex_weight_are_pruned_and_compacted(
    net: Operator, data: tuple[Tensor, Tensor]
) -> None:
    pruned = fxprune.apply(
        net, "magnitude", 0.3, granularity="channel", example_inputs=data[0], progress=False
    )
    small = fxprune.compact(pruned)
    assert torch.allclose(small(data[0]), pruned(data[0]), atol=1e-5)


def test_the_smallest_sizes_go(net: Operator, data: tuple[Tensor, Tensor]) -> None:
    pruned = fxprune.apply(
        net, "magnitude", 0.5, example_inputs=data[0], exclude=["lift", "local", "out"], progress=False
    )
    weight = net.spectral.weight.detach()
    size = (weight.real**2 + weight.imag**2).sqrt()
    kept = fxprune.masks(pruned)["spectral.weight"]
    assert float(size[kept].min()) >= float(size[~kept].max())


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "obc", "alps", "dsnot", "px"])
def test_methods_for_real_weights_say_so(method: str, net: Operator, data: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"real weights, and 'spectral.weight' is complex"):
        fxprune.apply(net, method, 0.5, example_inputs=data[0], data=data, loss_fn=F.mse_loss, progress=False)


class Phases(nn.Module):
    """Complex layers, with a real step between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6, dtype=torch.cfloat)
        self.second = nn.Linear(6, 2, dtype=torch.cfloat)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(torch.fft.fft(x))
        hidden = torch.complex(self.norm(hidden.real).relu(), hidden.imag.relu())
        out: Tensor = self.second(hidden).abs()
        return out


@pytest.mark.filterwarnings("error:Casting complex")
def test_complex_constants_move_into_biases() -> None:
    torch.manual_seed(0)
    net, x = Phases().eval(), torch.randn(3, 4)
    with torch.no_grad():
        net.first.weight[:2] = 0
        net.first.bias[:2] = 2 + 3j
    small = fxprune.compact(net, x, verify=False)
    assert small.get_parameter("first.weight").shape == (4, 4)
    assert torch.allclose(small(x), net(x), atol=1e-5)


@pytest.mark.filterwarnings("error:Casting complex")
@pytest.mark.parametrize("method", ["fpgm", "bn-scale"])
def test_channels_by_their_distance_and_scale(method: str) -> None:
    torch.manual_seed(0)
    net, x = Phases(), torch.randn(3, 4)
    with torch.no_grad():
        net.norm.weight.copy_(torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]))
        net.first.weight.copy_(1j * torch.arange(6.0)[:, None].square().expand(6, 4))
    pruned = fxprune.apply(
        net, method, 1 / 3, granularity="channel", example_inputs=x, exclude=["second"], progress=False
    )
    rows = fxprune.masks(pruned)["first.weight"].any(1)
    assert (
        rows.tolist()
        == {
            "fpgm": [True, True, False, False, True, True],
            "bn-scale": [True, False, False, True, True, True],
        }[method]
    )


@pytest.mark.parametrize("kind", ["group-lasso", "group-norm", "greg"])
def test_penalties_of_complex_weights(kind: str, net: Operator, data: tuple[Tensor, Tensor]) -> None:
    one = fxprune.regularizer(kind, net, example_inputs=data[0])
    before = one.squares().detach()
    weight = net.spectral.weight
    one.penalty().backward()
    assert weight.grad is not None
    with torch.no_grad():
        weight *= 1j  # a turn leaves sizes as they are
    assert torch.allclose(one.squares(), before)
