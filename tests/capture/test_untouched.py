"""No capture changes what a model computes, and no run of a model changes what capture makes of it.

For one model of every class of timm, and for models of transformers from small configurations.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from capture.untouched import assert_untouched, assert_untouched_before_and_after_a_run

transformers = pytest.importorskip("transformers")

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
PICTURE = {"image_size": 32, "patch_size": 8, **SIZES}
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

TEXT = {"vocab_size": 50, "max_position_embeddings": 32, **SIZES}
FEW_KEYS = {**TEXT, "num_key_value_heads": 1}
SPEECH = {
    "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, **SIZES,
}  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
SEQUENCES = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, **TOKENS,
}  # fmt: skip
SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "patch_size": 2}
WORDS = torch.randint(4, 50, (2, 7), generator=torch.Generator().manual_seed(0))
IDS = {"input_ids": WORDS}
BOTH = {"input_ids": WORDS, "decoder_input_ids": WORDS[:, :5]}
SMALL = {"pixel_values": IMAGES[..., :32, :32]}
SOUND = {"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(0))}
SPECTRUM = {
    "input_features": torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0)),
    "decoder_input_ids": WORDS[:, :5],
}

CLASSES: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {
    "AlbertModel": ({**TEXT, "embedding_size": 8}, IDS),
    "BartForConditionalGeneration": ({**SEQUENCES, "vocab_size": 50, "max_position_embeddings": 32}, BOTH),
    "BeitModel": (PICTURE, SMALL),
    "BertForSequenceClassification": (TEXT, IDS),
    "BloomForCausalLM": ({"vocab_size": 50, "hidden_size": 16, "n_layer": 2, "n_head": 2}, IDS),
    "CLIPModel": ({"text_config": {**TEXT}, "vision_config": {**PICTURE}}, {**SMALL, **IDS}),
    "ConvNextModel": ({"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}, SMALL),
    "DPTForDepthEstimation": (
        {
            **PICTURE, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "fusion_hidden_size": 8,
            "neck_hidden_sizes": [8, 8, 8, 8], "reassemble_factors": [4, 2, 1, 0.5],
        },
        SMALL,
    ),
    "DeiTModel": (PICTURE, SMALL),
    "Dinov2Model": (PICTURE, SMALL),
    "DistilBertModel": ({"vocab_size": 50, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}, IDS),
    "ElectraModel": ({**TEXT, "embedding_size": 8}, IDS),
    "GPT2LMHeadModel": (
        {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}, IDS
    ),
    "GPTNeoForCausalLM": (
        {
            "vocab_size": 50, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32,
            "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 32,
        },
        IDS,
    ),
    "GPTNeoXForCausalLM": (TEXT, IDS),
    "GemmaForCausalLM": ({**FEW_KEYS, "head_dim": 8}, IDS),
    "HubertModel": (SPEECH, SOUND),
    "LlamaForCausalLM": (FEW_KEYS, IDS),
    "MambaModel": ({"vocab_size": 50, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}, IDS),
    "MistralForCausalLM": (FEW_KEYS, IDS),
    "MixtralForCausalLM": ({**FEW_KEYS, "num_local_experts": 4, "num_experts_per_tok": 2}, IDS),
    "MobileViTModel": (
        {
            "image_size": 32, "hidden_sizes": [8, 8, 8], "num_attention_heads": 2, "mlp_ratio": 2.0,
            "neck_hidden_sizes": [4, 4, 8, 8, 8, 8, 8],
        },
        SMALL,
    ),
    "OPTForCausalLM": (
        {
            "vocab_size": 50, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 32, "word_embed_proj_dim": 16,
        },
        IDS,
    ),
    "PhiForCausalLM": (TEXT, IDS),
    "Qwen2ForCausalLM": (FEW_KEYS, IDS),
    "ResNetModel": (
        {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}, SMALL
    ),
    "RobertaModel": (TEXT, IDS),
    "SegformerForSemanticSegmentation": (
        {
            "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 32], "num_attention_heads": [1, 2, 2, 4],
            "decoder_hidden_size": 16,
        },
        {"pixel_values": IMAGES},
    ),
    "SwinModel": ({**SWIN, "image_size": 32}, SMALL),
    "T5ForConditionalGeneration": (
        {
            "vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
            "decoder_start_token_id": 0,
        },
        BOTH,
    ),
    "ViTModel": (PICTURE, SMALL),
    "Wav2Vec2ForCTC": ({**SPEECH, "vocab_size": 9}, SOUND),
    "WhisperForConditionalGeneration": (
        {
            **SEQUENCES, "vocab_size": 60, "num_mel_bins": 8, "max_source_positions": 20,
            "max_target_positions": 16,
        },
        SPECTRUM,
    ),
}  # fmt: skip
IMAGE_SIZES = json.loads((Path(__file__).parent.parent / "representatives.json").read_text())
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


def mask2former() -> nn.Module:
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(
            **{**SWIN, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}, image_size=64,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32, encoder_layers=1,
        decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=5,
    )  # fmt: skip
    return transformers.Mask2FormerForUniversalSegmentation(config)


def detr() -> nn.Module:
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = transformers.DetrConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=5, backbone_config=backbone,
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
    )  # fmt: skip
    return transformers.DetrForObjectDetection(config)


@pytest.mark.parametrize("build", [rt_detr, maskformer])
def test_detectors_that_cache_tables(build: Callable[[], nn.Module]) -> None:
    assert_untouched(build, {"pixel_values": IMAGES})


@pytest.mark.parametrize("build", [detr, mask2former])
def test_detectors(build: Callable[[], nn.Module]) -> None:
    fresh, again = assert_untouched_before_and_after_a_run(build, {"pixel_values": IMAGES})
    assert fresh == again


@pytest.mark.parametrize("name", CLASSES)
def test_transformers(name: str) -> None:
    kind, (options, inputs) = getattr(transformers, name), CLASSES[name]
    fresh, again = assert_untouched_before_and_after_a_run(lambda: kind(kind.config_class(**options)), inputs)
    assert fresh == again


@pytest.mark.timeout(1200)  # the largest have 400 million weights
@pytest.mark.zoo
@pytest.mark.parametrize("name", IMAGE_SIZES)
def test_every_class_of_timm(name: str) -> None:
    size = IMAGE_SIZES[name]

    def build() -> nn.Module:
        try:
            return timm.create_model(name, img_size=size)
        except TypeError:
            return timm.create_model(name)

    channels = build().pretrained_cfg["input_size"][0]
    found = assert_untouched_before_and_after_a_run(build, (torch.randn(2, channels, size, size),))
    # One that fills a table when it first runs may be entered after that; none is refused, with a sentence.
    assert not any(" " in name for called in found for name in called)
