"""Nets of single operations and habits of user code, for `coverage_more.py`: name -> net and inputs."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class Net(nn.Module):
    """Two linear layers and what a function does with them in between."""

    def __init__(self, forward: Callable[..., Any], **modules: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 5)
        self.work = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Any:
        return self.work(self, x)


class Images(Net):
    def __init__(self, forward: Callable[..., Any], **modules: Any) -> None:
        super().__init__(forward, **modules)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)


@dataclass
class Result:
    first: Tensor
    second: Tensor | None = None


class Halve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x / 2

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] / 2


class LayerDrop(nn.Module):
    def __init__(self, draw: Callable[[], Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.training and self.draw() < 0.5:
                continue
            x = layer(x).relu()
        return x


class Cache(nn.Module):
    """A buffer of keys that grows by writing."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("keys", torch.zeros(2, 16, 8))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        self.keys[:, :n] = self.k(x).detach()
        weights = (self.q(x) @ self.keys.transpose(1, 2)).softmax(-1)
        return self.out(weights @ self.keys)


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.rnn = nn.LSTM(8, 12, bidirectional=True, batch_first=True)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.words(x), lengths, batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.head(out)


class Deform(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.offset = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 18, 3, padding=1)
        self.conv, self.head = torchvision.ops.DeformConv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(self.conv(x, self.offset(x)).relu())


class Fourier(nn.Module):
    """One layer of a Fourier neural operator: complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.drop = nn.Conv1d(2, 8, 1), nn.Conv1d(8, 2, 1)
        self.weight = nn.Parameter(torch.randn(8, 8, 4, dtype=torch.cfloat) / 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        modes = torch.fft.rfft(x)
        out = torch.zeros_like(modes)
        out[:, :, :4] = torch.einsum("bix,iox->box", modes[:, :, :4], self.weight)
        return self.drop(F.gelu(torch.fft.irfft(out, n=x.shape[-1]) + x))


class Scan(nn.Module):
    """A selective scan written as a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(8, 12), nn.Linear(6, 4)
        self.decay = nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.proj(x).chunk(2, -1)
        state, states = torch.zeros_like(value[:, 0]), []
        for t in range(x.shape[1]):
            state = torch.exp(-self.decay) * state + torch.sigmoid(gate[:, t]) * value[:, t]
            states.append(state)
        return self.out(torch.stack(states, 1))


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mix, self.head = (
            nn.Linear(8, 6),
            nn.Linear(8, 5),
            nn.Bilinear(6, 5, 7),
            nn.Linear(7, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.a(x).relu(), self.b(x).relu()).relu())


class Modulated(nn.Module):
    """StyleGAN2's convolution: weights scaled by a style, demodulated, one set per sample as groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.style = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(3, 8)
        self.weight, self.head = nn.Parameter(torch.randn(6, 8, 3, 3) / 8), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        style, x = self.style(x.mean((2, 3))), self.stem(x).relu()
        b, c, h, w = x.shape
        weight = self.weight[None] * (style[:, None, :, None, None] + 1)
        weight = weight * (weight.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
        x = F.conv2d(x.reshape(1, b * c, h, w), weight.reshape(b * 6, c, 3, 3), padding=1, groups=b)
        return self.head(x.reshape(b, 6, h, w).relu())


class Experts(nn.Module):
    """Tokens are sent to the best expert, by a mask for each."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(8, 3), nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 8)
        weights, chosen = self.router(flat).softmax(-1).topk(2, -1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == i)
            out.index_add_(0, rows, expert(flat[rows]) * weights[rows, place, None])
        return self.head(out.reshape(x.shape))


class Apply(nn.Module):
    """Is handed a list of modules."""

    def forward(self, x: Tensor, layers: Any) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x


class Handed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.work = nn.ModuleList([nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)]), Apply()

    def forward(self, x: Tensor) -> Tensor:
        return self.work(x, list(self.layers))


def _boxes(x: Tensor) -> Tensor:
    return x.new_tensor([[0, 1.0, 1.0, 6.0, 6.0], [1, 0.0, 2.0, 5.0, 7.0]])


def _stft(net: Any, x: Tensor) -> Tensor:
    window = torch.hann_window(8, device=x.device)
    spec = torch.stft(net.a(x).flatten(1), 8, 4, window=window, return_complex=True)
    return torch.istft(spec * 0.5, 8, 4, window=window)


def _masked(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    return net.b(h.masked_fill(h > 0.3, 0.1))


def _picked(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    return net.b(h[h.mean(-1) > -100.0])


def _written(net: Any, x: Tensor) -> Tensor:
    h = net.a(x).clone()
    h[h < 0] = 0
    return net.b(h)


def _branch(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    if h.isnan().any():
        raise ValueError("not a number")
    return net.b(h)


def _loss(net: Any, x: Tensor) -> dict[str, Tensor]:
    out = net.b(net.a(x).relu())
    target = torch.zeros(out.shape[:-1], dtype=torch.int64)
    return {"loss": F.cross_entropy(out.flatten(0, -2), target.flatten()), "out": out}


def _lists(net: Any, x: Tensor) -> Tensor:
    states: list[Tensor] = []
    states.append(net.a(x))
    states.insert(0, states[-1].relu())
    states[1] = states[1] + states[0]
    states.extend([states.pop(0)])
    return net.b(sum(states))


def _ema(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    if net.training:
        with torch.no_grad():
            net.mean.mul_(0.9).add_(h.mean((0, 1)), alpha=0.1)
    return net.b(h - net.mean)


TOKENS, IMAGE = (2, 6, 8), (2, 3, 8, 8)
ON_TOKENS: dict[str, Callable[[Any, Tensor], Any]] = {
    "cumsum": lambda m, x: m.b(m.a(x).cumsum(1)),
    "cumprod": lambda m, x: m.b(m.a(x).sigmoid().cumprod(1)),
    "logcumsumexp": lambda m, x: m.b(m.a(x).logcumsumexp(1)),
    "cdist": lambda m, x: torch.cdist(m.a(x), m.b.weight[None]),
    "pairwise": lambda m, x: F.pairwise_distance(m.a(x), m.a(x.flip(1))),
    "cosine": lambda m, x: F.cosine_similarity(m.a(x)[:, :, None], m.a(x)[:, None], dim=-1),
    "normalize": lambda m, x: m.b(F.normalize(m.a(x), dim=-1)),
    "meshgrid": lambda m, x: torch.stack(torch.meshgrid(m.a(x)[0, 0], m.a(x)[0, 1], indexing="ij")),
    "stft": _stft,
    "masked_fill": _masked,
    "mask_index": _picked,
    "mask_write": _written,
    "branch_on_nan": _branch,
    "loss": _loss,
    "lists": _lists,
    "autograd_function": lambda m, x: m.b(Halve.apply(m.a(x))),
    "dataclass": lambda m, x: Result(m.b(m.a(x))),
    "none_output": lambda m, x: (m.b(m.a(x)), None),
    "none_in_training": lambda m, x: (m.b(m.a(x)), None if m.training else m.a(x)),
    "topk_gather": lambda m, x: m.b(m.a(x).gather(1, m.a(x).topk(3, 1)[1])),
    "argmax_lookup": lambda m, x: m.b.weight.t()[m.a(x).argmax(-1)],
    "take_along_dim": lambda m, x: m.b(torch.take_along_dim(m.a(x), m.a(x).argsort(1), 1)),
    "scatter_add": lambda m, x: m.b(torch.zeros_like(m.a(x)).scatter_add(1, m.a(x).argsort(1), m.a(x))),
    "one_hot": lambda m, x: F.one_hot(m.a(x).argmax(-1), 12).float() @ m.b.weight.t(),
    "gumbel": lambda m, x: m.b(F.gumbel_softmax(m.a(x), hard=True)),
    "where_live": lambda m, x: m.b(torch.where(m.a(x) > 0, m.a(x), x.mean(-1, keepdim=True))),
    "lerp": lambda m, x: m.b(torch.lerp(m.a(x), m.a(x.flip(1)), 0.3)),
    "addcmul": lambda m, x: m.b(torch.addcmul(m.a(x), m.a(x), m.a(x).sigmoid(), value=0.5)),
    "renorm": lambda m, x: m.b(m.a(x).renorm(2, 0, 1.0)),
    "softmax_outer": lambda m, x: m.b(torch.einsum("bnc,bmc->bnm", m.a(x), m.a(x)).softmax(-1) @ m.a(x)),
    "kron": lambda m, x: torch.kron(m.a(x)[0], m.b(m.a(x))[0]),
    "outer": lambda m, x: torch.outer(m.a(x)[0, 0], m.a(x)[0, 1]),
    "vmap": lambda m, x: torch.vmap(lambda row: m.b(m.a(row)))(x),
    "quantile": lambda m, x: m.b(m.a(x)) - m.a(x).quantile(0.5, dim=-1, keepdim=True),
    "median": lambda m, x: m.b(m.a(x).median(1).values),
    "diff": lambda m, x: m.b(m.a(x).diff(dim=1)),
    "unique": lambda m, x: m.b(m.a(x)) * x.argmax(-1).unique().numel(),
    "histc": lambda m, x: m.b(m.a(x)).flatten().histc(4),
    "svd": lambda m, x: torch.linalg.svdvals(m.a(x)),
    "solve": lambda m, x: torch.linalg.solve(m.a(x)[0, :, :6] + 9 * torch.eye(6), m.b(m.a(x))[0]),
    "inverse": lambda m, x: torch.linalg.inv(m.a(x)[:, :, :6] + 9 * torch.eye(6)) @ m.b(m.a(x)),
    "det": lambda m, x: torch.linalg.det(m.a(x)[:, :, :6]),
    "fft": lambda m, x: m.b(torch.fft.fft2(m.a(x)).real),
    "fftshift": lambda m, x: m.b(torch.fft.fftshift(torch.fft.fft(m.a(x), dim=1)).abs()),
    "polar": lambda m, x: torch.view_as_real(torch.polar(m.a(x).exp(), m.a(x))),
    "expand_dims": lambda m, x: m.b(m.a(x)[:, None].expand(-1, 3, -1, -1).mean(1)),
    "bucketize": lambda m, x: m.b.weight.t()[torch.bucketize(m.a(x)[..., 0], torch.linspace(-1, 1, 11))],
    "logsumexp": lambda m, x: m.a(x).logsumexp(-1),
    "searchsorted": lambda m, x: m.b(m.a(x)) + torch.searchsorted(torch.linspace(0, 1, 5), m.a(x)[..., :5]),
    "tril": lambda m, x: (m.a(x)[..., :6].tril() @ m.a(x)) @ m.b.weight.t(),
    "embedding_bag": lambda m, x: F.embedding_bag(x.argmax(-1), m.a.weight.new_ones(8, 12)) @ m.b.weight.t(),
    "pixel_norm": lambda m, x: m.b(m.a(x) * (m.a(x).square().mean(-1, keepdim=True) + 1e-6).rsqrt()),
    "straight_through": lambda m, x: m.b(m.a(x) + (m.a(x).round() - m.a(x)).detach()),
    "norm_weight": lambda m, x: F.linear(m.a(x), F.normalize(m.b.weight, dim=1)),
    "addmm": lambda m, x: torch.addmm(m.b.bias, m.a(x).flatten(0, 1), m.b.weight.t()),
    "tensordot": lambda m, x: torch.tensordot(m.a(x), m.b.weight, dims=([2], [1])),
    "chain_matmul": lambda m, x: torch.linalg.multi_dot([x[0], m.a.weight.t(), m.b.weight.t()]),
    "cross": lambda m, x: torch.cross(m.a(x)[..., :3], m.b(m.a(x))[..., :3], dim=-1),
    "prod": lambda m, x: m.b(m.a(x).prod(1)),
    "std_mean": lambda m, x: m.b(m.a(x) / (torch.std_mean(m.a(x), dim=-1, keepdim=True)[0] + 1)),
}
ON_IMAGES: dict[str, Callable[[Any, Tensor], Any]] = {
    "grid_sample": lambda m, x: m.b(F.grid_sample(m.a(x), m.a(x)[:, :2].permute(0, 2, 3, 1).tanh())),
    "affine_grid": lambda m, x: m.b(
        F.grid_sample(m.a(x), F.affine_grid(m.a(x).mean((2, 3))[:, :6].view(-1, 2, 3), [2, 8, 8, 8]))
    ),
    "roi_align": lambda m, x: m.b(torchvision.ops.roi_align(m.a(x), _boxes(x), (4, 4))),
    "roi_pool": lambda m, x: m.b(torchvision.ops.roi_pool(m.a(x), _boxes(x), (4, 4))),
    "fold": lambda m, x: m.b(F.fold(F.unfold(m.a(x), 2, stride=2), (8, 8), 2, stride=2)),
    "lp_pool": lambda m, x: m.b(F.lp_pool2d(m.a(x), 2, 2)),
    "max_unpool": lambda m, x: m.b(F.max_unpool2d(*F.max_pool2d(m.a(x), 2, return_indices=True), 2)),
    "correlation": lambda m, x: torch.einsum("bchw,bcxy->bhwxy", m.a(x), m.a(x.flip(3))),
    "gram": lambda m, x: m.a(x).flatten(2) @ m.a(x).flatten(2).mT,
    "interpolate": lambda m, x: m.b(F.interpolate(m.a(x), scale_factor=2, mode="bicubic")),
    "local_response": lambda m, x: m.b(F.local_response_norm(m.a(x), 3)),
    "soft_argmax": lambda m, x: (m.a(x).flatten(2).softmax(-1) * torch.arange(64.0)).sum(-1),
    "adaptive_instance": lambda m, x: m.b(F.instance_norm(m.a(x)) * m.a(x).std((2, 3), keepdim=True)),
}


def _tokens(work: Callable[..., Any], **modules: Any) -> Callable[[], tuple[nn.Module, Any]]:
    return lambda: (Net(work, **modules), torch.randn(TOKENS))


def _images(work: Callable[..., Any]) -> Callable[[], tuple[nn.Module, Any]]:
    return lambda: (Images(work), torch.randn(IMAGE))


def _recording() -> nn.Module:
    net = Net(_ema)
    net.register_buffer("mean", torch.zeros(12))
    return net


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    **{f"nets:{name}": _tokens(work) for name, work in ON_TOKENS.items()},
    **{f"nets:{name}": _images(work) for name, work in ON_IMAGES.items()},
    "nets:layer_drop_torch": lambda: (LayerDrop(lambda: torch.rand([])), torch.randn(TOKENS)),
    "nets:layer_drop_python": lambda: (LayerDrop(random.random), torch.randn(TOKENS)),
    "nets:running_mean": lambda: (_recording(), torch.randn(TOKENS)),
    "nets:cache": lambda: (Cache(), torch.randn(TOKENS)),
    "nets:packed": lambda: (Lstm(), (torch.randint(0, 20, (3, 7)), torch.tensor([7, 3, 5]))),
    "nets:deform": lambda: (Deform(), torch.randn(IMAGE)),
    "nets:fourier": lambda: (Fourier(), torch.randn(2, 2, 16)),
    "nets:scan": lambda: (Scan(), torch.randn(TOKENS)),
    "nets:bilinear": lambda: (Bilinear(), torch.randn(TOKENS)),
    "nets:modulated": lambda: (Modulated(), torch.randn(IMAGE)),
    "nets:experts": lambda: (Experts(), torch.randn(TOKENS)),
    "nets:handed": lambda: (Handed(), torch.randn(TOKENS)),
}
