"""Remove channels of a MONAI U-Net for volumes, train it for a step, and run it over a volume in windows.

Run it with ``uv run python examples/monai_volumes.py``; it needs ``pip install fxprune monai``.
"""

import tempfile
from pathlib import Path

import torch
from monai.inferers import sliding_window_inference
from monai.losses import DiceLoss
from monai.networks.nets import UNet
from torch import nn

import fxprune


def network() -> nn.Module:
    return UNet(3, in_channels=1, out_channels=2, channels=(8, 16, 32), strides=(2, 2), num_res_units=1)


def main(sparsity: float = 0.4) -> float:
    """Return the share of parameters that is gone."""
    torch.manual_seed(0)
    window, labels = torch.randn(2, 1, 16, 16, 16), torch.randint(0, 2, (2, 1, 16, 16, 16))
    model = fxprune.apply(
        network(), "magnitude", sparsity, granularity="channel", example_inputs=window, returns="module"
    )
    optimizer = torch.optim.AdamW(model.parameters())
    DiceLoss(softmax=True, to_onehot_y=True)(model.train()(window), labels).backward()
    optimizer.step()

    plain = fxprune.finalize(model).eval()
    with tempfile.TemporaryDirectory() as folder:  # MONAI's checkpoints are state dicts
        torch.save(plain.state_dict(), Path(folder, "model.pt"))
        loaded = network().eval()
        loaded.load_state_dict(torch.load(Path(folder, "model.pt")))
    small = fxprune.compact(loaded, window)
    volume = torch.randn(1, 1, 24, 24, 24)
    with torch.no_grad():
        found, wanted = (sliding_window_inference(volume, (16, 16, 16), 2, net) for net in (small, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    before, after = (sum(p.numel() for p in net.parameters()) for net in (plain, small))
    print(f"{before:,} parameters, {after:,} are left")
    return 1 - after / before


if __name__ == "__main__":
    main()
