"""Files of networks whose weights are computed from others and masked behind that."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import fxprune

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 8, 3)),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv1d(4, 8, 3)),
    "orthogonal": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(9, 9)),
    "old spectral_norm": lambda: nn.utils.spectral_norm(nn.Conv1d(4, 8, 3)),
}


@pytest.mark.parametrize("returns", ["graph", "module"])
@pytest.mark.parametrize("name", LAYERS)
def test_masks_of_computed_weights_are_saved_and_loaded(name: str, returns: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 9)
    net = nn.Sequential(LAYERS[name](), nn.ReLU())
    pruned = fxprune.apply(net, "magnitude", 0.5, example_inputs=x, returns=returns, progress=False)
    fxprune.save(pruned, tmp_path / "net.safetensors")
    torch.manual_seed(1)
    fresh = nn.Sequential(LAYERS[name](), nn.ReLU())
    keys = list(fresh.state_dict())
    again = fxprune.load(tmp_path / "net.safetensors", fresh)
    assert list(fresh.state_dict()) == keys
    masks, loaded = fxprune.masks(pruned), fxprune.masks(again)
    assert masks.keys() == loaded.keys() == {"0.weight"}
    assert torch.equal(masks["0.weight"], loaded["0.weight"])
    assert float(masks["0.weight"].float().mean()) == pytest.approx(0.5, abs=0.02)
    assert torch.equal(again.eval()(x), pruned.eval()(x))
    fxprune.verify(again)


def test_a_model_without_the_computation_is_another_one(tmp_path: Path) -> None:
    net = nn.Sequential(LAYERS["weight_norm"]())
    pruned = fxprune.apply(net, "magnitude", 0.5, example_inputs=torch.randn(2, 4, 9), progress=False)
    fxprune.save(pruned, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=r"0\.(weight|parametrizations)"):
        fxprune.load(tmp_path / "net.safetensors", nn.Sequential(nn.Conv1d(4, 8, 3)))


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_a_compact_network_is_loaded_into_one_that_computes_its_weights(name: str, tmp_path: Path) -> None:
    def made() -> nn.Module:
        return nn.Sequential(LAYERS[name](), nn.ReLU(), nn.Conv1d(8, 6, 3), nn.ReLU(), nn.Conv1d(6, 2, 1))

    torch.manual_seed(0)
    x = torch.randn(2, 4, 9)
    pruned = fxprune.apply(made(), "magnitude", 0.3, granularity="channel", example_inputs=x, progress=False)
    small = fxprune.compact(pruned.eval())
    fxprune.save(small, tmp_path / "net.safetensors")
    again = fxprune.load(tmp_path / "net.safetensors", made().eval())
    assert again.get_submodule("0").weight.shape == small.get_submodule("0").weight.shape
    assert torch.equal(again(x), small(x))
