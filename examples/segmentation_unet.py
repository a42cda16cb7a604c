"""Prune a U-Net of segmentation-models, train it for a step, and save and load it in the library's own way.

Run it with ``uv run python examples/segmentation_unet.py``; it needs
``pip install fxprune segmentation-models-pytorch``.
"""

import tempfile

import segmentation_models_pytorch as smp
import torch

import fxprune


def main(sparsity: float = 0.8) -> float:
    """Return the sparsity of the model that was loaded."""
    torch.manual_seed(0)
    model = smp.Unet("resnet18", encoder_weights=None, decoder_channels=(32, 16, 16, 8, 8), classes=1)
    images = torch.randn(2, 3, 64, 64)
    masks = (images.mean(1, keepdim=True) > 0).float()
    model = fxprune.apply(model, "magnitude", sparsity, budget="erk", example_inputs=images, returns="module")
    optimizer = torch.optim.AdamW(model.parameters())
    smp.losses.DiceLoss("binary")(model.train()(images), masks).backward()
    optimizer.step()
    fxprune.verify(model)  # the masks held

    plain = fxprune.finalize(model).eval()
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        loaded = smp.from_pretrained(folder).eval()
    assert torch.equal(loaded(images), plain(images))
    report = fxprune.analyze(loaded, example_inputs=images)
    print(report)
    return report.sparsity


if __name__ == "__main__":
    main()
