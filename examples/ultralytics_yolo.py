"""Prune a YOLO of ultralytics, train it for a step with its own loss, and save and load its checkpoint.

Run it with ``uv run python examples/ultralytics_yolo.py``; it needs ``pip install fxprune ultralytics``.
"""

import tempfile
from pathlib import Path

import torch
from ultralytics import YOLO
from ultralytics.cfg import get_cfg

import fxprune


def main(sparsity: float = 0.5) -> float:
    """Return the sparsity of the model that was loaded."""
    torch.manual_seed(0)
    yolo, images = YOLO("yolov8n.yaml", verbose=False), torch.rand(2, 3, 64, 64)
    yolo.model.args = get_cfg()  # the weights of the parts of its loss
    model = fxprune.apply(
        yolo.model, "magnitude", sparsity, example_inputs=images, returns="module",
        exclude="*.dfl.*",  # its weights are the numbers 0 to 15, which never train
    )  # fmt: skip
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    boxes = {
        "img": images, "cls": torch.tensor([[0.0], [3.0]]), "batch_idx": torch.tensor([0.0, 1.0]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.3], [0.3, 0.6, 0.2, 0.2]]),
    }  # fmt: skip
    losses, _ = model.train().loss(boxes)
    losses.sum().backward()
    optimizer.step()
    fxprune.verify(model)  # the masks held

    yolo.model = fxprune.finalize(model).eval()
    with tempfile.TemporaryDirectory() as folder:
        yolo.save(str(Path(folder, "pruned.pt")))
        loaded = YOLO(Path(folder, "pruned.pt")).model.float().eval()
    report = fxprune.analyze(loaded, example_inputs=images)
    print(report)
    return report.sparsity


if __name__ == "__main__":
    main()
