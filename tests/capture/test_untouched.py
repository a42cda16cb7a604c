"""No capture changes what a model computes: representatives of timm, and classes of transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from capture.untouched import assert_untouched

transformers = pytest.importorskip("transformers")

NAMES = json.loads((Path(__file__).parent.parent / "representatives.json").read_text())
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
TEXT = {"vocab_size": 50, "max_position_embeddings": 32, **SIZES}
PICTURE = {"image_size": 32, "patch_size": 8, **SIZES}
KEYS = {"num_key_value_heads": 1}
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
WORDS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))

# The model class, and the options of its configuration.
IMAGE_MODELS: dict[str, dict[str, Any]] = {
    "ViTModel": PICTURE,
    "DeiTModel": PICTURE,
    "BeitModel": PICTURE,
    "Dinov2Model": PICTURE,
    "Data2VecVisionModel": PICTURE,
    "IJepaModel": PICTURE,
    "YolosModel": {**PICTURE, "image_size": [32, 32]},
    "ConvNextModel": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "ConvNextV2Model": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "ResNetModel": {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "RegNetModel": {
        "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "groups_width": 8,
    },
    "SwinModel": {"image_size": 64, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
    "SegformerModel": {
        "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2],
    },
    "PoolFormerModel": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "MobileNetV2Model": {"depth_multiplier": 0.35},
}  # fmt: skip
TEXT_MODELS: dict[str, dict[str, Any]] = {
    "BertModel": TEXT,
    "RobertaModel": TEXT,
    "ElectraModel": {**TEXT, "embedding_size": 8},
    "AlbertModel": {**TEXT, "embedding_size": 8},
    "MPNetModel": TEXT,
    "RoFormerModel": TEXT,
    "MegatronBertModel": TEXT,
    "GPT2Model": {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2},
    "GPTNeoXModel": TEXT,
    "OPTModel": {**TEXT, "ffn_dim": 32, "word_embed_proj_dim": 16},
    "LlamaModel": {**TEXT, **KEYS},
    "MistralModel": {**TEXT, **KEYS},
    "Qwen2Model": {**TEXT, **KEYS},
    "GemmaModel": {**TEXT, **KEYS, "head_dim": 8},
    "PhiModel": TEXT,
}
FAST = ["SegformerModel", "ResNetModel", "BertModel", "GPT2Model"]


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


def of_class(name: str) -> Callable[[], nn.Module]:
    kind = getattr(transformers, name)
    options = {**IMAGE_MODELS, **TEXT_MODELS}[name]
    return lambda: kind(kind.config_class(**options))


@pytest.mark.parametrize("build", [rt_detr, maskformer])
def test_detectors_that_cache_tables(build: Callable[[], nn.Module]) -> None:
    assert_untouched(build, {"pixel_values": IMAGES})


@pytest.mark.parametrize(
    "name",
    [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in (*IMAGE_MODELS, *TEXT_MODELS)],
)
def test_transformers(name: str) -> None:
    size = IMAGE_MODELS.get(name, {}).get("image_size", 64)
    size = size if isinstance(size, int) else size[0]
    inputs = {"pixel_values": IMAGES[..., :size, :size]} if name in IMAGE_MODELS else {"input_ids": WORDS}
    assert_untouched(of_class(name), inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_timm(name: str) -> None:
    size = NAMES[name]
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))

    def build() -> nn.Module:
        try:
            return timm.create_model(name, img_size=size)
        except TypeError:
            return timm.create_model(name)

    assert_untouched(build, (x,))
