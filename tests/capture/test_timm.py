"""timm families: captured once, right in both modes, at every batch size."""

import warnings
from typing import Any

import pytest
import timm
import torch

from capture.faithful import assert_faithful
from fxprune.capture import capture

DROPS = {"drop_rate": 0.2, "drop_path_rate": 0.2}
ATTENTION = {**DROPS, "attn_drop_rate": 0.2, "proj_drop_rate": 0.2}

# A small member of each family, how to build it, and the image size.
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    "resnet18": (DROPS, 64),
    "resnext26ts": (DROPS, 64),
    "res2net50_26w_4s": (DROPS, 64),
    "densenet121": ({"drop_rate": 0.2}, 64),
    "efficientnet_b0": (DROPS, 64),
    "tf_efficientnet_b0": (DROPS, 65),
    "mobilenetv3_small_050": (DROPS, 64),
    "convnext_atto": (DROPS, 64),
    "regnety_002": (DROPS, 64),
    "vgg11_bn": ({"drop_rate": 0.2, "mlp_ratio": 0.0625}, 32),
    "vit_tiny_patch16_224": ({**ATTENTION, "patch_drop_rate": 0.3, "img_size": 64}, 64),
    "deit_tiny_distilled_patch16_224": ({**ATTENTION, "img_size": 64}, 64),
    "swin_tiny_patch4_window7_224": ({**ATTENTION, "img_size": 64, "window_size": 4}, 64),
    "mixer_s32_224": ({"drop_rate": 0.2, "proj_drop_rate": 0.2, "drop_path_rate": 0.2, "img_size": 64}, 64),
    "test_nfnet": (DROPS, 64),
    "maxvit_pico_rw_256": ({**DROPS, "img_size": 64}, 64),
    # Branches in the forward of the model itself: tokens dropped along with their rotary embedding.
    "vit_tiny_patch16_dinov3_qkvb": ({**ATTENTION, "patch_drop_rate": 0.3, "img_size": 64}, 64),
    # A recurrent one, and one that keeps tables of attention biases.
    "sequencer2d_s": ({**DROPS, "img_size": 64}, 64),
}


# One to four seconds each; others of their kind stay in the default run.
LONG = {
    "deit_tiny_distilled_patch16_224", "densenet121", "efficientnet_b0", "maxvit_pico_rw_256",
    "mixer_s32_224", "mobilenetv3_small_050", "regnety_002", "res2net50_26w_4s", "resnext26ts",
    "sequencer2d_s", "swin_tiny_patch4_window7_224", "tf_efficientnet_b0", "vit_tiny_patch16_dinov3_qkvb",
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in FAMILIES]
)
def test_family(name: str) -> None:
    options, size = FAMILIES[name]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **options)
    assert_faithful(model, (3, size, size))


@pytest.mark.slow
def test_distilled_heads_differ_by_mode() -> None:
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=10, img_size=64, **ATTENTION)
    model.set_distilled_training(True)
    gm = assert_faithful(model, (3, 64, 64))
    x = torch.randn(2, 3, 64, 64)
    assert isinstance(gm.train()(x), tuple)
    assert isinstance(gm.eval()(x), torch.Tensor)


@pytest.mark.slow
def test_caches_of_attention_biases_are_computed_in_the_graph() -> None:
    model = timm.create_model("levit_128s", drop_path_rate=0.1).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gm = capture(model)
    x = torch.randn(1, 3, 224, 224)
    assert torch.equal(gm(x), model(x))
    gm.train(), model.train()
    torch.manual_seed(0)
    expected = model(x.repeat(2, 1, 1, 1))
    torch.manual_seed(0)
    assert torch.equal(gm(x.repeat(2, 1, 1, 1)), expected)


@pytest.mark.slow
def test_no_weights_are_allocated() -> None:
    with torch.device("meta"):
        model = timm.create_model("eva_giant_patch14_224")
    gm = capture(model)
    assert sum(p.numel() for p in gm.parameters()) > 1e9
    assert all(tensor.is_meta for tensor in gm.state_dict().values())
