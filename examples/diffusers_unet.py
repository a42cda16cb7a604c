"""Prune a small diffusion model, train it for a step, and save and load it in the way of diffusers.

Run it with ``uv run python examples/diffusers_unet.py``; it needs ``pip install fxprune diffusers``.
"""

import tempfile

import torch
from diffusers import DDPMScheduler, UNet2DModel

import fxprune


def main(sparsity: float = 0.8) -> float:
    """Return the sparsity of the model that was loaded."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    scheduler = DDPMScheduler(100)
    images, noise, steps = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.tensor([3, 20, 50, 90])
    noisy = scheduler.add_noise(images, noise, steps)
    unet = fxprune.apply(unet, "synflow", sparsity, example_inputs=(noisy, steps), returns="module")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    (unet.train()(noisy, steps).sample - noise).square().mean().backward()
    optimizer.step()
    fxprune.verify(unet)  # the masks held

    plain = fxprune.finalize(unet).eval()
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        loaded = UNet2DModel.from_pretrained(folder)
    assert torch.equal(loaded(noisy, steps).sample, plain(noisy, steps).sample)
    report = fxprune.analyze(loaded, example_inputs=(noisy, steps))
    print(report)
    return report.sparsity


if __name__ == "__main__":
    main()
