"""Small models of other libraries for `coverage_more.py`: name -> model with random weights, and inputs."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Build = Callable[[], tuple[nn.Module, Any]]

# What configurations of transformers call the same few sizes.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "word_embed_proj_dim"), 16),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "layers"), 2
    ),
    **dict.fromkeys(
        ("decoder_layers", "num_decoder_layers", "encoder_attention_heads", "n_head", "n_heads"), 2
    ),
    **dict.fromkeys(
        ("decoder_attention_heads", "num_attention_heads", "num_heads", "num_key_value_heads"), 2
    ),
    **dict.fromkeys(
        ("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "d_ff", "d_inner"), 32
    ),
    **dict.fromkeys(("hidden_dim", "n_inner", "ffn_hidden_size"), 32),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "embedding_size", "rotary_dim", "attention_head_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions", "n_ctx"), 64),
    **dict.fromkeys(("max_target_positions",), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 8),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok",), 2),
    **{"vocab_size": 60, "type_vocab_size": 2, "image_size": 32, "patch_size": 8, "num_channels": 3},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}


def small(config: str, **own: Any) -> Any:
    """A configuration with small sizes; ``own`` are those that this model needs otherwise."""
    import transformers

    kind = getattr(transformers, config)
    known = vars(kind())
    names = {**known, **kind.attribute_map}
    sizes = {name: size for name, size in SIZES.items() if name in names and known.get(name, 0) is not None}
    sizes = {name: size for name, size in sizes.items() if kind.attribute_map.get(name) not in sizes}
    return kind(**{**sizes, **own})


def words(length: int = 7) -> torch.Tensor:
    return torch.randint(3, 50, (2, length), generator=torch.Generator().manual_seed(0))


def image(side: int = 32, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def sound(length: int) -> torch.Tensor:
    return torch.randn(2, length, generator=torch.Generator().manual_seed(0))


def hf(model: str, config: str, inputs: Any = None, **own: Any) -> Build:
    def build() -> tuple[nn.Module, Any]:
        import transformers

        return getattr(transformers, model)(small(config, **own)), words() if inputs is None else inputs()

    return build


def text(name: str, head: str = "ForCausalLM", prefix: str = "", **own: Any) -> dict[str, Build]:
    return {f"transformers:{(prefix or name).lower()}": hf(name + head, name + "Config", **own)}


def seen(name: str, head: str = "ForImageClassification", side: int = 32, **own: Any) -> dict[str, Build]:
    inputs = lambda: {"pixel_values": image(side)}  # noqa: E731
    return {f"transformers:{name.lower()}": hf(name + head, name + "Config", inputs, **own)}


def heard(name: str, length: int = 1600, **own: Any) -> dict[str, Build]:
    convs = {"conv_dim": (8, 8), "conv_kernel": (10, 8), "conv_stride": (5, 4), "num_feat_extract_layers": 2}
    own = {**convs, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, **own}
    inputs = lambda: {"input_values": sound(length)}  # noqa: E731
    return {
        f"transformers:{name.lower()}": hf(
            name + "ForCTC",
            name + "Config",
            inputs,
            vocab_size=12,
            mask_time_length=2,
            mask_feature_length=2,
            **own,
        )
    }


def both() -> dict[str, Any]:
    return {"input_ids": words(), "decoder_input_ids": words(5)}


def pair() -> dict[str, Any]:
    return {"input_ids": words(), "pixel_values": image()}


VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 60,
    "max_position_embeddings": 32,
}
STAGES: dict[str, Any] = {
    "depths": [1, 1],
    "embed_dim": 8,
    "num_heads": [2, 2],
    "window_size": 4,
    "patch_size": 4,
}
ROPE = {"rope_theta": 1e4, "rope_type": "default"}

TRANSFORMERS: dict[str, Build] = {
    **text("Bert", "ForMaskedLM"),
    **text("Roberta", "ForSequenceClassification", pad_token_id=1),
    **text("Deberta", "ForMaskedLM", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    **text("DebertaV2", "ForMaskedLM", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    **text("Albert", "ForMaskedLM"),
    **text("DistilBert", "ForMaskedLM"),
    **text("Electra", "ForPreTraining"),
    **text("MPNet", "ForMaskedLM", pad_token_id=1),
    **text("MobileBert", "ForMaskedLM", intra_bottleneck_size=16, embedding_size=16, true_hidden_size=16),
    **text("SqueezeBert", "ForMaskedLM", embedding_size=16),
    **text("ConvBert", "ForMaskedLM", num_attention_heads=4, head_ratio=2),
    **text("Funnel", "ForMaskedLM", block_sizes=[1, 1], n_head=2, d_head=8),
    **text("Longformer", "ForMaskedLM", attention_window=[4, 4], pad_token_id=1),
    **text("BigBird", "ForMaskedLM", attention_type="original_full"),
    **text(
        "BigBird",
        "ForMaskedLM",
        prefix="bigbird_sparse",
        attention_type="block_sparse",
        block_size=2,
        num_random_blocks=1,
        inputs=lambda: words(24),
    ),
    **text("Nystromformer", "ForMaskedLM", num_landmarks=4, segment_means_seq_len=8, inputs=lambda: words(8)),
    **text("Yoso", "ForMaskedLM", use_expectation=True),
    **text("RoFormer", "ForMaskedLM", embedding_size=16),
    **text("FNet", "ForMaskedLM"),
    **text("IBert", "ForMaskedLM", pad_token_id=1),
    **text(
        "Canine",
        "ForSequenceClassification",
        downsampling_rate=2,
        upsampling_kernel_size=2,
        local_transformer_stride=4,
        num_hash_buckets=50,
    ),
    **text("XLNet", "LMHeadModel"),
    **text("XLM", "WithLMHeadModel", emb_dim=16),
    **text("ModernBert", "ForMaskedLM", global_attn_every_n_layers=2, local_attention=4),
    **text("Xmod", "ForMaskedLM", pad_token_id=1, default_language="en_XX"),
    **text("Rembert".replace("b", "B"), "ForMaskedLM", input_embedding_size=8, output_embedding_size=8),
    **text("GPT2", "LMHeadModel"),
    **text("GPTNeo", attention_types=[[["global", "local"], 1]], num_layers=2, window_size=4),
    **text("GPTNeoX", rotary_pct=0.5),
    **text("GPTJ", rotary_dim=4),
    **text("GPTBigCode"),
    **text("CodeGen", rotary_dim=4, n_head=4),
    **text("OpenAIGPT", "LMHeadModel"),
    **text("CTRL", "LMHeadModel", dff=32),
    **text("Bloom"),
    **text("Falcon", num_kv_heads=1),
    **text("OPT"),
    **text("Mpt"),
    **text("Llama"),
    **text("Mistral", sliding_window=4),
    **text("Mixtral"),
    **text("Qwen2"),
    **text("Qwen2Moe"),
    **text("Qwen3"),
    **text("Qwen3Moe"),
    **text("Gemma"),
    **text("Gemma2", sliding_window=4),
    **text("Phi"),
    **text("Phi3", pad_token_id=0),
    **text("StableLm"),
    **text("Starcoder2"),
    **text("Olmo"),
    **text("Olmo2"),
    **text("Olmoe"),
    **text("Granite"),
    **text("GraniteMoe"),
    **text("Cohere"),
    **text("Glm", head_dim=8),
    **text("Persimmon"),
    **text("SmolLM3"),
    **text(
        "DeepseekV3",
        kv_lora_rank=8,
        q_lora_rank=8,
        head_dim=4,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        num_key_value_heads=2,
    ),
    **text("GptOss", layer_types=["sliding_attention", "full_attention"], sliding_window=4),
    **text("Mamba", state_size=4, time_step_rank=4),
    **text("Mamba2", num_heads=4, head_dim=8, state_size=4, n_groups=1, chunk_size=4),
    **text("FalconMamba", state_size=4, time_step_rank=4),
    **text(
        "Jamba",
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    **text("Rwkv", attention_hidden_size=16, context_length=32),
    **text("RecurrentGemma", lru_width=16, block_types=["recurrent", "attention"], attention_window_size=4),
    **text(
        "Bamba",
        attn_layer_indices=[1],
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=4,
        mamba_n_groups=1,
        mamba_chunk_size=4,
    ),
    **text("Lfm2", layer_types=["conv", "full_attention"], block_multiple_of=8),
    **text("T5", "ForConditionalGeneration", inputs=both),
    **text("UMT5", "ForConditionalGeneration", inputs=both),
    **text("LongT5", "ForConditionalGeneration", inputs=both, local_radius=3),
    **text(
        "SwitchTransformers",
        "ForConditionalGeneration",
        inputs=both,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    ),
    **text("Bart", "ForConditionalGeneration", inputs=both),
    **text("Marian", "MTModel", inputs=both, decoder_vocab_size=60),
    **text("Pegasus", "ForConditionalGeneration", inputs=both),
    **text("Blenderbot", "ForConditionalGeneration", inputs=both),
    **text("M2M100", "ForConditionalGeneration", inputs=both),
    **text(
        "LED",
        "ForConditionalGeneration",
        inputs=both,
        attention_window=[4, 4],
        max_encoder_position_embeddings=32,
        max_decoder_position_embeddings=32,
    ),
    **text(
        "ProphetNet",
        "ForConditionalGeneration",
        inputs=both,
        num_encoder_layers=2,
        num_encoder_attention_heads=2,
        num_decoder_attention_heads=2,
    ),
    **heard("Wav2Vec2"),
    **heard("Hubert"),
    **heard("WavLM"),
    **heard("UniSpeechSat"),
    **heard("SEW", squeeze_factor=2),
    **heard("Wav2Vec2Conformer"),
    "transformers:whisper": hf(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        lambda: {"input_features": torch.randn(2, 8, 128), "decoder_input_ids": words(5)},
        num_mel_bins=8,
    ),
    "transformers:speech_to_text": hf(
        "Speech2TextForConditionalGeneration",
        "Speech2TextConfig",
        lambda: {"input_features": torch.randn(2, 32, 8), "decoder_input_ids": words(5)},
        input_feat_per_channel=8,
        conv_channels=16,
    ),
    "transformers:ast": hf(
        "ASTForAudioClassification",
        "ASTConfig",
        lambda: {"input_values": torch.randn(2, 32, 16)},
        max_length=32,
        num_mel_bins=16,
        frequency_stride=8,
        time_stride=8,
    ),
    **seen("ViT"),
    **seen("DeiT"),
    **seen("Beit", use_relative_position_bias=True),
    **seen("Data2VecVision"),
    **seen("Dinov2"),
    **seen("Dinov2WithRegisters"),
    **seen("Swin", depths=[1, 1], embed_dim=8, num_heads=[2, 2], window_size=4, patch_size=4),
    **seen("Swinv2", depths=[1, 1], embed_dim=8, num_heads=[2, 2], window_size=4, patch_size=4),
    **seen("ConvNext", depths=[1, 1, 1, 1], hidden_sizes=[16, 16, 16, 16], patch_size=4, side=64),
    **seen("ConvNextV2", depths=[1, 1, 1, 1], hidden_sizes=[16, 16, 16, 16], patch_size=4, side=64),
    **seen("ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    **seen("RegNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8),
    **seen("Bit", embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], num_groups=4),
    **seen(
        "LevitX".replace("X", ""),
        image_size=64,
        hidden_sizes=[16, 16, 16],
        num_attention_heads=[2, 2, 2],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
        patch_size=16,
        side=64,
    ),
    **seen(
        "PoolFormer",
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        patch_sizes=[7, 3, 3, 3],
        patch_size=16,
        side=64,
    ),
    **seen(
        "Pvt",
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 2],
        sequence_reduction_ratios=[8, 4, 2, 1],
        image_size=64,
        side=64,
        patch_sizes=[4, 2, 2, 2],
    ),
    **seen(
        "Segformer",
        "ForSemanticSegmentation",
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        side=64,
        num_attention_heads=[1, 2, 2, 2],
        decoder_hidden_size=16,
    ),
    **seen(
        "MobileViT",
        "ForImageClassification",
        hidden_sizes=[8, 8, 16],
        neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 8],
        side=64,
        image_size=64,
        patch_size=2,
    ),
    **seen(
        "EfficientNet", width_coefficient=0.2, depth_coefficient=0.2, hidden_dim=256, image_size=64, side=64
    ),
    **seen("MobileNetV2", depth_multiplier=0.25, image_size=64, side=64),
    **seen("FocalNet", embed_dim=8, depths=[1, 1], focal_levels=[1, 1], focal_windows=[3, 3], patch_size=4),
    "transformers:videomae": hf(
        "VideoMAEForVideoClassification",
        "VideoMAEConfig",
        lambda: {"pixel_values": torch.randn(2, 4, 3, 32, 32)},
        num_frames=4,
    ),
    **seen(
        "DPT",
        "ForDepthEstimation",
        image_size=32,
        num_hidden_layers=4,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        is_hybrid=False,
    ),
    **seen(
        "GLPN",
        "ForDepthEstimation",
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        side=64,
        num_attention_heads=[1, 2, 2, 2],
        decoder_hidden_size=16,
    ),
    **seen("Yolos", "ForObjectDetection", image_size=[32, 32], num_detection_tokens=5),
    **seen(
        "Swin2SR",
        "ForImageSuperResolution",
        depths=[1, 1],
        embed_dim=8,
        num_heads=[2, 2],
        window_size=4,
        patch_size=1,
    ),
    **seen(
        "ViTMAE",
        "ForPreTraining",
        decoder_num_hidden_layers=1,
        decoder_hidden_size=16,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    ),
    **seen(
        "Hiera",
        embed_dim=8,
        depths=[1, 1],
        num_heads=[1, 2],
        image_size=[32, 32],
        patch_size=[7, 7],
        query_stride=[2, 2],
        num_query_pool=1,
        masked_unit_size=[4, 4],
    ),
    **seen("VitDet", "Model", window_size=2, window_block_indices=[0]),
    "transformers:clip": hf(
        "CLIPModel", "CLIPConfig", pair, text_config=TEXT, vision_config=VISION, projection_dim=8
    ),
    "transformers:siglip": hf(
        "SiglipModel", "SiglipConfig", pair, text_config={**TEXT, "pad_token_id": 0}, vision_config=VISION
    ),
    "transformers:owlvit": hf(
        "OwlViTForObjectDetection",
        "OwlViTConfig",
        pair,
        text_config=TEXT,
        vision_config=VISION,
        projection_dim=16,
    ),
    "transformers:blip": hf(
        "BlipForConditionalGeneration",
        "BlipConfig",
        pair,
        vision_config=VISION,
        text_config={
            **TEXT,
            "encoder_hidden_size": 16,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "sep_token_id": 2,
        },
    ),
    "transformers:vilt": hf("ViltModel", "ViltConfig", pair),
    "transformers:altclip": hf(
        "AltCLIPModel",
        "AltCLIPConfig",
        pair,
        projection_dim=8,
        vision_config=VISION,
        text_config={**TEXT, "project_dim": 8, "pad_token_id": 1},
    ),
    "transformers:groupvit": hf(
        "GroupViTModel",
        "GroupViTConfig",
        pair,
        projection_dim=8,
        text_config=TEXT,
        vision_config={
            **VISION,
            "depths": [1, 1, 1],
            "num_group_tokens": [4, 2, 0],
            "num_output_groups": [4, 2, 0],
        },
    ),
    "transformers:layoutlm": hf(
        "LayoutLMForMaskedLM",
        "LayoutLMConfig",
        lambda: {"input_ids": words(), "bbox": torch.zeros(2, 7, 4, dtype=torch.int64)},
        max_2d_position_embeddings=32,
    ),
    "transformers:layoutlmv3": hf(
        "LayoutLMv3Model",
        "LayoutLMv3Config",
        lambda: {**pair(), "bbox": torch.zeros(2, 7, 4, dtype=torch.int64)},
        max_2d_position_embeddings=32,
        input_size=32,
        coordinate_size=2,
        shape_size=4,
        pad_token_id=1,
    ),
    "transformers:git": hf("GitForCausalLM", "GitConfig", pair, vision_config=VISION),
    "transformers:detr": hf(
        "DetrForObjectDetection",
        "DetrConfig",
        lambda: {"pixel_values": image(64)},
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        num_queries=5,
        backbone=None,
        backbone_config={
            "model_type": "resnet",
            "embedding_size": 8,
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "layer_type": "basic",
            "out_features": ["stage2"],
        },
    ),
    "transformers:deformable_detr": hf(
        "DeformableDetrForObjectDetection",
        "DeformableDetrConfig",
        lambda: {"pixel_values": image(64)},
        use_timm_backbone=False,
        backbone=None,
        use_pretrained_backbone=False,
        num_queries=5,
        num_feature_levels=2,
        backbone_config={
            "model_type": "resnet",
            "embedding_size": 8,
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "layer_type": "basic",
            "out_features": ["stage1", "stage2"],
        },
        d_model=32,
    ),
    "transformers:maskformer": hf(
        "MaskFormerForInstanceSegmentation",
        "MaskFormerConfig",
        lambda: {"pixel_values": image(64)},
        fpn_feature_size=32,
        mask_feature_size=32,
        backbone_config={
            "model_type": "swin",
            "depths": [1, 1, 1, 1],
            "embed_dim": 8,
            "num_heads": [1, 1, 2, 2],
            "window_size": 4,
            "image_size": 64,
            "patch_size": 4,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
        decoder_config={
            "model_type": "detr",
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "num_queries": 5,
        },
    ),
    "transformers:mask2former": hf(
        "Mask2FormerForUniversalSegmentation",
        "Mask2FormerConfig",
        lambda: {"pixel_values": image(64)},
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=5,
        backbone_config={
            "model_type": "swin",
            "depths": [1, 1, 1, 1],
            "embed_dim": 8,
            "num_heads": [1, 1, 2, 2],
            "window_size": 4,
            "image_size": 64,
            "patch_size": 4,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
    ),
    "transformers:sam": hf(
        "SamModel",
        "SamConfig",
        lambda: {"pixel_values": image(64, 1), "input_points": torch.rand(1, 1, 2, 2) * 32},
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 16,
            "output_channels": 16,
            "window_size": 2,
            "global_attn_indexes": [1],
            "mlp_dim": 16,
            "num_pos_feats": 8,
        },
        prompt_encoder_config={
            "hidden_size": 16,
            "image_size": 64,
            "patch_size": 16,
            "mask_input_channels": 4,
        },
        mask_decoder_config={
            "hidden_size": 16,
            "mlp_dim": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "attention_downsample_rate": 1,
            "iou_head_hidden_dim": 8,
        },
    ),
    "transformers:time_series": hf(
        "PatchTSTForPrediction",
        "PatchTSTConfig",
        lambda: {"past_values": torch.randn(2, 16, 2)},
        num_input_channels=2,
        context_length=16,
        patch_length=4,
        patch_stride=4,
        prediction_length=4,
    ),
    "transformers:autoformer": hf(
        "InformerModel",
        "InformerConfig",
        lambda: {
            "past_values": torch.randn(2, 15),
            "past_time_features": torch.randn(2, 15, 2),
            "past_observed_mask": torch.ones(2, 15),
            "future_values": torch.randn(2, 4),
            "future_time_features": torch.randn(2, 4, 2),
        },
        prediction_length=4,
        context_length=8,
        num_time_features=2,
        lags_sequence=[1, 2, 7],
    ),
    "transformers:encodec": hf(
        "EncodecModel",
        "EncodecConfig",
        lambda: {"input_values": torch.randn(2, 1, 640)},
        num_filters=4,
        codebook_size=16,
        codebook_dim=8,
        hidden_size=8,
        target_bandwidths=[1.5],
        num_lstm_layers=1,
    ),
    "transformers:vits": hf(
        "VitsModel",
        "VitsConfig",
        None,
        spectrogram_bins=9,
        flow_size=16,
        hidden_size=16,
        upsample_initial_channel=16,
        prior_encoder_num_flows=1,
        wavenet_dilation_rate=1,
        posterior_encoder_num_wavenet_layers=1,
        prior_encoder_num_wavenet_layers=1,
        duration_predictor_filter_channels=16,
        depth_separable_num_layers=1,
    ),
}


def _made(library: str, build: Callable[[], tuple[nn.Module, Any]]) -> Build | None:
    return build if importlib.util.find_spec(library) else None


def _vit(name: str, module: str, *args: Any, side: int = 32, **own: Any) -> Build:
    def build() -> tuple[nn.Module, Any]:
        return getattr(importlib.import_module(f"vit_pytorch.{module}"), name)(*args, **own), image(side)

    return build


PLAIN = {
    "image_size": 32,
    "patch_size": 8,
    "num_classes": 5,
    "dim": 16,
    "depth": 2,
    "heads": 2,
    "mlp_dim": 32,
}
OTHERS: dict[str, Build] = {
    "vit_pytorch:vit": _vit("ViT", "vit", **PLAIN),
    "vit_pytorch:simple_vit": _vit("SimpleViT", "simple_vit", **PLAIN),
    "vit_pytorch:deepvit": _vit("DeepViT", "deepvit", **PLAIN),
    "vit_pytorch:cait": _vit("CaiT", "cait", **PLAIN, cls_depth=1, layer_dropout=0.1),
    "vit_pytorch:t2t": _vit(
        "T2TViT",
        "t2t",
        image_size=32,
        num_classes=5,
        dim=16,
        depth=2,
        heads=2,
        mlp_dim=32,
        t2t_layers=((7, 4), (3, 2)),
    ),
    "vit_pytorch:cvt": _vit(
        "CvT",
        "cvt",
        num_classes=5,
        s1_emb_dim=8,
        s2_emb_dim=8,
        s3_emb_dim=16,
        s3_depth=1,
        s2_heads=2,
        s3_heads=2,
    ),
    "vit_pytorch:crossformer": _vit(
        "CrossFormer",
        "crossformer",
        num_classes=5,
        dim=(32, 32, 64, 64),
        depth=(1, 1, 1, 1),
        global_window_size=(4, 2, 2, 1),
        side=64,
        local_window_size=(4, 4, 2, 2),
    ),
    "vit_pytorch:max_vit": _vit(
        "MaxViT", "max_vit", num_classes=5, dim=16, depth=(1, 1), dim_head=8, window_size=4, side=64
    ),
    "vit_pytorch:patch_merger": _vit(
        "ViT", "vit_with_patch_merger", **PLAIN, patch_merge_layer=0, patch_merge_num_tokens=4
    ),
    "vit_pytorch:vit_small_dataset": _vit("ViT", "vit_for_small_dataset", **PLAIN),
    "vit_pytorch:nest": _vit(
        "NesT",
        "nest",
        image_size=32,
        patch_size=4,
        num_classes=5,
        dim=8,
        heads=2,
        num_hierarchies=2,
        block_repeats=(1, 1),
    ),
    "vit_pytorch:regionvit": _vit(
        "RegionViT",
        "regionvit",
        num_classes=5,
        dim=(8, 8, 16, 16),
        depth=(1, 1, 1, 1),
        window_size=2,
        side=64,
    ),
    "vit_pytorch:scalable": _vit(
        "ScalableViT",
        "scalable_vit",
        num_classes=5,
        dim=8,
        heads=(1, 2),
        depth=(1, 1),
        ssa_dim_key=(8, 8),
        reduction_factor=(4, 2),
        window_size=(4, 4),
        side=64,
    ),
    "vit_pytorch:pit": _vit(
        "PiT", "pit", image_size=32, patch_size=4, num_classes=5, dim=16, depth=(1, 1), heads=2, mlp_dim=32
    ),
    "vit_pytorch:xcit": _vit("XCiT", "xcit", **PLAIN, cls_depth=1),
    "vit_pytorch:sep_vit": _vit(
        "SepViT",
        "sep_vit",
        num_classes=5,
        dim=8,
        dim_head=8,
        heads=(1, 2),
        depth=(1, 1),
        side=56,
    ),
    "vit_pytorch:mobile_vit": _vit(
        "MobileViT", "mobile_vit", (64, 64), [8, 8, 8], [8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 16], 5, side=64
    ),
    "vit_pytorch:na_vit": lambda: (
        importlib.import_module("vit_pytorch.na_vit_nested_tensor").NaViT(
            image_size=32, patch_size=8, num_classes=5, dim=16, depth=1, heads=2, mlp_dim=16
        ),
        ([torch.randn(3, 16, 32), torch.randn(3, 32, 16)],),
    ),
}


def _library(name: str, build: Callable[[Any], tuple[nn.Module, Any]]) -> Build:
    return lambda: build(importlib.import_module(name))


def _yolo(size: str, kind: str = "DetectionModel") -> Build:
    def build(tasks: Any) -> tuple[nn.Module, Any]:
        return getattr(tasks, kind)(f"{size}.yaml", nc=3, verbose=False), image(64)

    return _library("ultralytics.nn.tasks", build)


def _geometric(layer: str, **own: Any) -> Build:
    def build(pyg: Any) -> tuple[nn.Module, Any]:
        class Graph(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.one = getattr(pyg, layer)(8, 12, **own)
                self.two = getattr(pyg, layer)(12, 4, **own)

            def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
                return self.two(self.one(x, edges).relu(), edges)

        edges = torch.tensor([[0, 1, 2, 3, 4, 5, 1, 3], [1, 2, 3, 4, 5, 0, 0, 1]])
        return Graph(), (torch.randn(6, 8), edges)

    return _library("torch_geometric.nn", build)


def _smp(kind: str, side: int = 64, **own: Any) -> Build:
    return _library(
        "segmentation_models_pytorch",
        lambda smp: (getattr(smp, kind)("resnet18", encoder_weights=None, classes=2, **own), image(side)),
    )


def _monai(kind: str, side: int = 32, **own: Any) -> Build:
    shape = (1, 1, side, side, side) if own.get("spatial_dims", 3) == 3 else (2, 1, side, side)
    return _library("monai.networks.nets", lambda nets: (getattr(nets, kind)(**own), torch.randn(shape)))


MORE: dict[str, Build] = {
    "x_transformers:decoder": _library(
        "x_transformers",
        lambda x: (
            x.TransformerWrapper(
                num_tokens=60,
                max_seq_len=16,
                attn_layers=x.Decoder(dim=16, depth=2, heads=2, attn_dim_head=8),
            ),
            words(),
        ),
    ),
    "x_transformers:rotary_glu": _library(
        "x_transformers",
        lambda x: (
            x.TransformerWrapper(
                num_tokens=60,
                max_seq_len=16,
                attn_layers=x.Decoder(
                    dim=16,
                    depth=2,
                    heads=2,
                    attn_dim_head=8,
                    rotary_pos_emb=True,
                    ff_glu=True,
                    use_rmsnorm=True,
                    attn_qk_norm=True,
                    layer_dropout=0.2,
                ),
            ),
            words(),
        ),
    ),
    "x_transformers:alibi": _library(
        "x_transformers",
        lambda x: (
            x.TransformerWrapper(
                num_tokens=60,
                max_seq_len=16,
                attn_layers=x.Encoder(dim=16, depth=2, heads=2, attn_dim_head=8, alibi_pos_bias=True),
            ),
            words(),
        ),
    ),
    "ultralytics:yolov5": _yolo("yolov5n"),
    "ultralytics:yolov8": _yolo("yolov8n"),
    "ultralytics:yolo11": _yolo("yolo11n"),
    "ultralytics:yolo12": _yolo("yolo12n"),
    "ultralytics:yolov9": _yolo("yolov9t"),
    "ultralytics:yolov10": _yolo("yolov10n"),
    "ultralytics:yolo26": _yolo("yolo26n"),
    "ultralytics:segment": _yolo("yolov8n-seg", "SegmentationModel"),
    "ultralytics:pose": _yolo("yolov8n-pose", "PoseModel"),
    "ultralytics:classify": _yolo("yolov8n-cls", "ClassificationModel"),
    "torch_geometric:gcn": _geometric("GCNConv"),
    "torch_geometric:sage": _geometric("SAGEConv"),
    "torch_geometric:gat": _geometric("GATConv"),
    "torch_geometric:gatv2": _geometric("GATv2Conv"),
    "torch_geometric:graph": _geometric("GraphConv"),
    "torch_geometric:cheb": _geometric("ChebConv", K=2),
    "torch_geometric:tag": _geometric("TAGConv"),
    "torch_geometric:transformer": _geometric("TransformerConv"),
    "torch_geometric:simple": _geometric("SGConv", K=2),
    "torch_geometric:arma": _geometric("ARMAConv"),
    "torch_geometric:local_extremum": _geometric("LEConv"),
    "torch_geometric:gated": _geometric("ResGatedGraphConv"),
    "torch_geometric:general": _geometric("GeneralConv"),
    "torch_geometric:cluster": _geometric("ClusterGCNConv"),
    "torch_geometric:film": _geometric("FiLMConv"),
    "torch_geometric:feast": _geometric("FeaStConv"),
    "segmentation_models_pytorch:unet": _smp("Unet", decoder_channels=(16, 8, 8, 8, 8)),
    "segmentation_models_pytorch:unetplusplus": _smp("UnetPlusPlus", decoder_channels=(16, 8, 8, 8, 8)),
    "segmentation_models_pytorch:fpn": _smp(
        "FPN", decoder_pyramid_channels=32, decoder_segmentation_channels=32
    ),
    "segmentation_models_pytorch:pan": _smp("PAN", side=128, decoder_channels=8),
    "segmentation_models_pytorch:linknet": _smp("Linknet"),
    "segmentation_models_pytorch:manet": _smp(
        "MAnet", decoder_channels=(16, 8, 8, 8, 8), decoder_pab_channels=8
    ),
    "segmentation_models_pytorch:deeplab": _smp("DeepLabV3Plus", decoder_channels=16),
    "segmentation_models_pytorch:upernet": _smp("UPerNet", decoder_channels=16),
    "monai:unet": _monai(
        "UNet",
        spatial_dims=3,
        in_channels=1,
        out_channels=2,
        channels=(4, 8, 8),
        strides=(2, 2),
        num_res_units=1,
        side=16,
    ),
    "monai:unetr": _monai(
        "UNETR",
        in_channels=1,
        out_channels=2,
        img_size=32,
        feature_size=4,
        hidden_size=16,
        mlp_dim=16,
        num_heads=2,
    ),
    "monai:swin_unetr": _monai(
        "SwinUNETR", in_channels=1, out_channels=2, feature_size=12, spatial_dims=2, side=64
    ),
    "monai:segresnet": _monai(
        "SegResNet", spatial_dims=3, init_filters=8, blocks_down=(1, 1), blocks_up=(1,)
    ),
    "monai:dynunet": _monai(
        "DynUNet",
        spatial_dims=2,
        in_channels=1,
        out_channels=2,
        kernel_size=[3, 3, 3],
        strides=[1, 2, 2],
        upsample_kernel_size=[2, 2],
        filters=[4, 8, 8],
    ),
    "monai:attention_unet": _monai(
        "AttentionUnet", spatial_dims=2, in_channels=1, out_channels=2, channels=(4, 8, 8), strides=(2, 2)
    ),
    "monai:vnet": _monai("VNet", spatial_dims=3),
    "monai:basic_unet": _monai(
        "BasicUNet", spatial_dims=3, features=(4, 4, 8, 8, 8, 4), norm=("batch", {"affine": True})
    ),
    "monai:highresnet": _monai("HighResNet", spatial_dims=3, in_channels=1, out_channels=2, side=16),
    "monai:vit": _monai(
        "ViT",
        spatial_dims=2,
        in_channels=1,
        img_size=32,
        patch_size=8,
        hidden_size=16,
        mlp_dim=32,
        num_layers=2,
        num_heads=2,
        classification=True,
    ),
    "monai:autoencoder": _monai(
        "AutoEncoder", spatial_dims=2, in_channels=1, out_channels=1, channels=(4, 8), strides=(2, 2)
    ),
    "diffusers:unet": _library(
        "diffusers",
        lambda d: (
            d.UNet2DModel(
                sample_size=8,
                in_channels=3,
                out_channels=3,
                block_out_channels=(8, 16),
                layers_per_block=1,
                norm_num_groups=4,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                attention_head_dim=8,
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            ),
            (image(8), torch.tensor([1, 5])),
        ),
    ),
    "diffusers:unet_condition": _library(
        "diffusers",
        lambda d: (
            d.UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(8, 16),
                layers_per_block=1,
                norm_num_groups=4,
                cross_attention_dim=8,
                attention_head_dim=2,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            ),
            (torch.randn(2, 4, 8, 8), torch.tensor([1, 5]), torch.randn(2, 3, 8)),
        ),
    ),
    "diffusers:vae": _library(
        "diffusers",
        lambda d: (
            d.AutoencoderKL(
                block_out_channels=(8, 8),
                layers_per_block=1,
                norm_num_groups=4,
                latent_channels=4,
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
            ),
            image(16),
        ),
    ),
    "diffusers:dit": _library(
        "diffusers",
        lambda d: (
            d.DiTTransformer2DModel(
                num_attention_heads=2,
                attention_head_dim=8,
                in_channels=4,
                num_layers=1,
                sample_size=8,
                num_embeds_ada_norm=10,
            ),
            {
                "hidden_states": torch.randn(2, 4, 8, 8),
                "timestep": torch.tensor([1, 5]),
                "class_labels": torch.tensor([1, 2]),
            },
        ),
    ),
    "torchaudio:conformer": _library(
        "torchaudio.models",
        lambda a: (a.Conformer(8, 2, 16, 2, 3), (torch.randn(2, 10, 8), torch.tensor([10, 7]))),
    ),
    "torchaudio:emformer": _library(
        "torchaudio.models",
        lambda a: (
            a.Emformer(8, 2, 16, 2, 4, right_context_length=1),
            (torch.randn(2, 9, 8), torch.tensor([8, 6])),
        ),
    ),
    "torchaudio:convtasnet": _library(
        "torchaudio.models", lambda a: (a.ConvTasNet(2, 16, 8, 3, 8, 16, 2, 1), torch.randn(2, 1, 160))
    ),
    "torchaudio:wav2letter": _library(
        "torchaudio.models", lambda a: (a.Wav2Letter(5, "mfcc", 8), torch.randn(2, 8, 40))
    ),
    "torchaudio:deepspeech": _library(
        "torchaudio.models", lambda a: (a.DeepSpeech(8, 16, 5), torch.randn(2, 1, 20, 8))
    ),
    "torchaudio:hdemucs": _library(
        "torchaudio.models",
        lambda a: (a.HDemucs(["a"], channels=4, nfft=256, depth=3), torch.randn(1, 2, 2048)),
    ),
    "kornia:hardnet": _library(
        "kornia.feature", lambda k: (k.HardNet(pretrained=False), torch.randn(2, 1, 32, 32))
    ),
    "kornia:defmo_tfeat": _library(
        "kornia.feature", lambda k: (k.TFeat(pretrained=False), torch.randn(2, 1, 32, 32))
    ),
    "kornia:disk": _library("kornia.feature", lambda k: (k.DISK().unet, torch.randn(1, 3, 32, 32))),
    "open_clip:clip": _library(
        "open_clip.model",
        lambda o: (
            o.CLIP(
                8,
                o.CLIPVisionCfg(layers=2, width=16, head_width=8, image_size=32, patch_size=8),
                o.CLIPTextCfg(context_length=7, vocab_size=60, width=16, heads=2, layers=2),
            ),
            (image(), words()),
        ),
    ),
}

MODELS: dict[str, Build] = {
    name: build
    for name, build in {**TRANSFORMERS, **OTHERS, **MORE}.items()
    if importlib.util.find_spec(name.partition(":")[0])
}
