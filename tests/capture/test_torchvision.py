"""torchvision: the smallest model of each family in numbers, other tasks in shapes.

``benchmarks/capture_fidelity.py`` compares every classification model in numbers.
"""

from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import get_model

from capture.faithful import assert_faithful
from fxprune.capture import capture

SMALLEST = {
    "densenet121": 32,
    "efficientnet_b0": 32,
    "googlenet": 64,
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
}
OPTIONS = {
    "googlenet": {"init_weights": False},
}


# Two to three seconds each; others of their kind stay in the default run.
LONG = {"densenet121", "googlenet", "swin_v2_t"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in SMALLEST]
)
def test_smallest_of_family(name: str) -> None:
    torch.manual_seed(0)
    options = {"num_classes": 10, **OPTIONS.get(name, {})}
    size = SMALLEST[name]
    assert_faithful(get_model(name, weights=None, **options), (3, size, size))


@pytest.mark.slow
def test_maxvit() -> None:
    torch.manual_seed(0)
    model = torchvision.models.MaxVit(
        (64, 64), 16, 2, [16, 32], [1, 2], 16, stochastic_depth_prob=0.3, num_classes=10
    )
    assert_faithful(model, (3, 64, 64))


def test_vision_transformer() -> None:
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(
        image_size=64, patch_size=16, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128, dropout=0.1
    )
    assert_faithful(model, (3, 64, 64))


def built(name: str) -> nn.Module:
    options: dict[str, Any] = (
        {} if name in torchvision.models.list_models(torchvision.models) else {"weights_backbone": None}
    )
    with torch.device("meta"):
        return get_model(name, weights=None, **options)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", ["alexnet", "vgg11_bn", "inception_v3"])
def test_models_with_large_weights_in_shapes(name: str) -> None:
    gm = capture(built(name))
    assert gm.graph.output_node().meta["val"].shape == (2, 1000)
    assert all(tensor.is_meta for tensor in gm.state_dict().values())


@pytest.mark.slow
def test_segmentation_video_and_backbones_of_detectors() -> None:
    images, clips = torch.empty(2, 3, 64, 64, device="meta"), torch.empty(2, 3, 8, 112, 112, device="meta")
    masks = capture(built("lraspp_mobilenet_v3_large"), images).graph.output_node().meta["val"]
    assert masks["out"].shape == (2, 21, 64, 64)
    with torch.device("meta"):
        clip_model = get_model("mc3_18", weights=None)
    assert capture(clip_model, clips).graph.output_node().meta["val"].shape == (2, 400)
    maps = capture(built("retinanet_resnet50_fpn").backbone, images).graph.output_node().meta["val"]
    assert [tuple(maps[key].shape[2:]) for key in maps] == [(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:capture")
def test_what_depends_on_the_data_in_a_detector_is_a_node() -> None:
    images = [torch.empty(3, 96, 96, device="meta")] * 2
    with pytest.warns(UserWarning, match=r"rpn \(RegionProposalNetwork\) kept whole: .*they decide a length"):
        gm = capture(built("fasterrcnn_mobilenet_v3_large_320_fpn"), (images,))
    whole = [
        str(n.target) for n in gm.graph.nodes if n.op == "call_module" and "backbone" not in str(n.target)
    ]
    assert whole == ["rpn", "roi_heads"]
    gm = capture(built("retinanet_resnet50_fpn"), (images,))
    assert "postprocess_detections" in [getattr(node.target, "__name__", "") for node in gm.graph.nodes]
