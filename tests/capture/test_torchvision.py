"""torchvision's classification models: all captured, the smallest of each family compared in numbers."""

import pytest
import torch
import torchvision
from torchvision.models import get_model, list_models

from capture.faithful import assert_faithful
from fxprune.capture import capture

SMALLEST = {
    "alexnet": 64,
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "efficientnet_v2_s": 32,
    "googlenet": 64,
    "inception_v3": 299,
    "mnasnet0_5": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "regnet_y_400mf": 32,
    "resnet18": 32,
    "resnext50_32x4d": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 32,
    "swin_t": 32,
    "swin_v2_t": 32,
    "vgg11": 32,
    "vit_b_32": 64,
}
OPTIONS = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
    "vit_b_32": {"image_size": 64},
}
# Their constructors read numbers off the weights they have just made.
NEED_WEIGHTS = "regnet"


@pytest.mark.parametrize("name", SMALLEST)
def test_smallest_of_family(name: str) -> None:
    torch.manual_seed(0)
    options = {"num_classes": 10, **OPTIONS.get(name, {})}
    size = SMALLEST[name]
    assert_faithful(get_model(name, weights=None, **options), (3, size, size), (1,) if size > 100 else (1, 3))


def test_maxvit() -> None:
    torch.manual_seed(0)
    model = torchvision.models.MaxVit(
        (64, 64), 16, 2, [16, 32], [1, 2], 16, stochastic_depth_prob=0.3, num_classes=10
    )
    assert_faithful(model, (3, 64, 64))


@pytest.mark.parametrize("name", [n for n in list_models(torchvision.models) if NEED_WEIGHTS not in n])
def test_every_model_on_the_meta_device(name: str) -> None:
    if name in SMALLEST:
        pytest.skip("compared in numbers above")
    with torch.device("meta"):
        model = get_model(name, weights=None)
    gm = capture(model)
    assert all("val" in node.meta for node in gm.graph.nodes)
    assert gm.graph.output_node().meta["val"].shape == (2, 1000)
    assert type(gm).__name__ == type(model).__name__
