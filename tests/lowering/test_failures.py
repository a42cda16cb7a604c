"""An error while a graph is lowered makes one op opaque, with the reason, and nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.capture import capture
from fxprune.lowering import aliases, lower

lowering = __import__("sys").modules["fxprune.lowering.lower"]


class Net(nn.Module):
    """A constant made of a parameter, a write through a view, a leaf without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.encoder = nn.TransformerEncoderLayer(4, 1, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) * self.scale.exp().neg()
        x[:, 0].mul_(2)
        return self.second(self.encoder(x))


def fail(*args: Any, **kwargs: Any) -> Any:
    raise ZeroDivisionError("nobody has foreseen this")


PLACES: list[tuple[Any, str]] = [
    (lowering, "view_of"),
    (lowering, "capture_leaf"),
    (lowering, "leaf_attributes"),
    (aliases.Memory, "spread"),
    (aliases, "_rewritten"),
]


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("owner", "name"), PLACES)
def test_an_error_outside_of_a_rule_makes_the_op_opaque(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gm = capture(Net().eval(), torch.empty(2, 3, 4))
    assert not lower(gm).opaque
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(ZeroDivisionError):
        lower(gm, strict=True)
    graph = lower(gm)
    assert graph.opaque
    assert all("raised ZeroDivisionError: nobody has foreseen this" in op.reason for op in graph.opaque)
    assert {"first.weight", "second.weight"} <= graph.kernels.keys()
    assert all(value.live for value in graph.ops[-1].inputs)


# -- networks that have ended ``lower`` with an error


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        bias = x.new_zeros(x.shape[0], x.shape[1], x.shape[1])
        return bias.baddbmm(batch1=self.q(x), batch2=self.k(x).transpose(1, 2), beta=1.0, alpha=0.5)


class Cached(nn.Module):
    """Attention over keys and values that a buffer keeps."""

    def __init__(self, write: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("cache", torch.zeros(2, 6, 4))
        self.write = write

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        self.write(self.cache, places, self.k(x))
        return self.out(F.scaled_dot_product_attention(self.q(x), self.cache, self.cache))


def by_slice(cache: Tensor, places: Tensor, new: Tensor) -> None:
    cache[:, : new.shape[1]] = new


def by_index(cache: Tensor, places: Tensor, new: Tensor) -> None:
    cache[:, places] = new


def by_view(cache: Tensor, places: Tensor, new: Tensor) -> None:
    cache.narrow(1, 0, new.shape[1]).copy_(new)


def by_index_copy(cache: Tensor, places: Tensor, new: Tensor) -> None:
    cache.index_copy_(1, places, new)


def by_scatter(cache: Tensor, places: Tensor, new: Tensor) -> None:
    cache.scatter_(1, places.view(1, -1, 1).expand(new.shape), new)


class TwoSpeeds(nn.Module):
    """Every fourth frame with many channels, all frames with few, joined sideways."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = nn.Conv3d(3, 4, (1, 3, 3), padding=(0, 1, 1))
        self.fast = nn.Conv3d(3, 2, 3, padding=1)
        self.across = nn.Conv3d(2, 4, (5, 1, 1), stride=(4, 1, 1), padding=(2, 0, 0), bias=False)
        self.head = nn.Linear(10, 3)

    def forward(self, clips: list[Tensor]) -> Tensor:
        slow, fast = clips
        index = torch.linspace(0, slow.shape[2] - 1, slow.shape[2] // 4).long()
        fast = self.fast(fast)
        slow = torch.cat([self.slow(slow.index_select(2, index)), self.across(fast)], 1)
        return self.head(torch.cat([F.adaptive_avg_pool3d(x, 1) for x in (slow, fast)], 1).flatten(1))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 0):
            x = x * 2
        return self.fc(x)


X, PLACE = torch.empty(2, 3, 4), torch.arange(3)
NETS: list[tuple[Callable[[], nn.Module], Any]] = [
    (Products, X),
    *[
        (lambda write=write: Cached(write), (X, PLACE))
        for write in (by_slice, by_index, by_view, by_index_copy, by_scatter)
    ],
    (TwoSpeeds, ([torch.empty(2, 3, 8, 6, 6), torch.empty(2, 3, 8, 6, 6)],)),
    (lambda: nn.Sequential(nn.Linear(4, 4), torch.jit.script(Branches()), nn.Linear(4, 2)), X),
    (lambda: nn.Sequential(nn.Linear(4, 4), torch.jit.trace(nn.Linear(4, 4), X), nn.Linear(4, 2)), X),
]  # fmt: skip


@pytest.mark.thinned(3)
@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:.*of the 40 matrix weights")
@pytest.mark.parametrize(("build", "inputs"), NETS)
def test_lowered_without_an_error(build: Callable[[], nn.Module], inputs: Any) -> None:
    model = build().eval()
    graph = lower(capture(model, inputs))
    own = {name for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Conv3d)}
    assert {f"{name}.weight" for name in own} == graph.kernels.keys()
    assert all(value.live for value in graph.ops[-1].inputs)
    assert not any("raised" in op.reason for op in graph.opaque)
    pruned = fxprune.apply(model, "magnitude", 0.5, example_inputs=inputs, progress=False, on_collapse="warn")
    assert fxprune.analyze(pruned).density == pytest.approx(0.5, abs=0.02)


def test_a_scripted_part_is_opaque_by_that_name() -> None:
    (build, inputs) = NETS[-2]
    (op,) = lower(capture(build(), inputs)).opaque
    assert op.reason.endswith("is scripted: there is no Python code to trace")


transformers = pytest.importorskip("transformers")
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*kept whole")
def test_transformers_that_have_failed() -> None:
    bloom = transformers.BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2)
    speech = transformers.Wav2Vec2Config(
        conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2, vocab_size=9,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, **SIZES,
    )  # fmt: skip
    words = torch.zeros(2, 5, dtype=torch.long)
    text = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    sound = {"input_values": torch.randn(2, 400), "attention_mask": torch.ones(2, 400, dtype=torch.long)}
    models = (transformers.BloomForCausalLM(bloom), text), (transformers.Wav2Vec2ForCTC(speech), sound)
    for model, inputs in models:
        graph = lower(capture(model.eval(), inputs))
        assert not any("raised" in op.reason for op in graph.opaque)
