"""No capture changes what a model computes: detectors that cache tables, and encoders of transformers."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from capture.untouched import assert_untouched

transformers = pytest.importorskip("transformers")

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
PICTURE = {"image_size": 32, "patch_size": 8, **SIZES}
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

CLASSES = ["ViTModel", "DeiTModel", "BeitModel"]
# Every model is captured and run several times.
pytestmark = pytest.mark.slow


def rt_detr() -> nn.Module:
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"], layer_type="basic",
    )  # fmt: skip
    config = transformers.RTDetrConfig(
        backbone_config=backbone, encoder_hidden_dim=16, encoder_in_channels=[8, 16, 16], encoder_layers=1,
        encoder_ffn_dim=32, encoder_attention_heads=2, d_model=16, decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=32, decoder_layers=1, decoder_attention_heads=2, num_queries=10, num_denoising=0,
        decoder_n_points=2,
    )  # fmt: skip
    return transformers.RTDetrForObjectDetection(config)


def maskformer() -> nn.Module:
    backbone = transformers.SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    decoder = transformers.DetrConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=5, backbone_config=backbone,
    )  # fmt: skip
    config = transformers.MaskFormerConfig(
        backbone_config=backbone, decoder_config=decoder, fpn_feature_size=32, mask_feature_size=32
    )
    return transformers.MaskFormerForInstanceSegmentation(config)


@pytest.mark.parametrize("build", [rt_detr, maskformer])
def test_detectors_that_cache_tables(build: Callable[[], nn.Module]) -> None:
    assert_untouched(build, {"pixel_values": IMAGES})


@pytest.mark.parametrize("name", CLASSES)
def test_transformers(name: str) -> None:
    kind = getattr(transformers, name)
    assert_untouched(lambda: kind(kind.config_class(**PICTURE)), {"pixel_values": IMAGES[..., :32, :32]})
