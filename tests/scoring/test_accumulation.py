"""Micro-batches add up to the batch; gradients kept on the host; both leave the scores as they are."""

from typing import Any

import pytest
import torch
from methods.problems import problem
from torch import nn

from fxprune import methods
from fxprune.methods import Scores
from fxprune.scoring import gradients

X = torch.randn(7, 3, generator=torch.Generator().manual_seed(4)).double()
Y = torch.arange(7) % 3


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def close(left: Scores, right: Scores) -> bool:
    return all(torch.allclose(left[name], right[name], rtol=1e-9, atol=1e-15) for name in right)


@pytest.mark.parametrize("name", ["snip", "iter-snip", "force", "grasp", "grasp-it"])
@pytest.mark.parametrize("micro_batch", [1, 2, 5, 7, 100])
def test_micro_batches_give_the_scores_of_the_batch(
    scored: list[Scores], name: str, micro_batch: int
) -> None:
    rounds = {"rounds": 1} if "rounds" in methods.options(name) else {}
    for size in (None, micro_batch):
        methods.get(name, **rounds).find(problem(net(), 0.5, data=(X, Y), micro_batch=size))
    assert close(scored[1], scored[0])


def test_labels_that_do_not_count_do_not_weigh(scored: list[Scores]) -> None:
    labels = torch.tensor([0, -100, 2, -100, -100, -100, 1])
    for size in (None, 2, 3):
        methods.get("snip").find(problem(net(), 0.5, data=(X, labels), micro_batch=size))
    assert close(scored[1], scored[0])
    assert close(scored[2], scored[0])


def test_mappings_and_several_inputs_are_cut_too(scored: list[Scores]) -> None:
    sizes = []

    def loss_fn(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        sizes.append(len(batch["x"][0]))
        return nn.functional.cross_entropy(model(batch["x"][0]), batch["y"]) * batch["scale"]

    data = {"x": [X], "y": Y, "scale": torch.tensor(2.0), "names": ["a"]}
    for size in (None, 3):
        methods.get("snip").find(problem(net(), 0.5, data=data, loss_fn=loss_fn, micro_batch=size))
    assert sizes == [7, 3, 3, 1]
    assert close(scored[1], scored[0])


def test_several_batches_and_micro_batches(scored: list[Scores]) -> None:
    batches = [(X[:4], Y[:4]), (X[4:], Y[4:])]
    for size in (None, 2):
        methods.get("snip", batches=2).find(problem(net(), 0.5, data=batches, micro_batch=size))
    assert close(scored[1], scored[0])


def test_a_micro_batch_has_samples() -> None:
    with pytest.raises(ValueError, match="micro_batch=0: expected a number of samples, at least 1"):
        problem(net(), 0.5, micro_batch=0)


def test_layers_that_are_whole_are_not_copied() -> None:
    asked = problem(net(), 0.5)
    found = gradients.masked(asked, asked.masks)
    assert all(found[name].data_ptr() == weight.data_ptr() for name, weight in asked.weights.items())


# -- on an accelerator -----------------------------------------------------------------------------------
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Deep(nn.Module):
    """A network that is mostly weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2048, 2048, bias=False) for _ in range(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x).relu()
        return x


def gpu_problem(home: str, **fields: Any) -> methods.Problem:
    torch.manual_seed(0)
    asked = problem(Deep(), 0.9, data=(torch.randn(32, 2048), torch.arange(32)), **fields)
    asked.model.cuda()
    weights = {name: asked.model.get_parameter(name).detach().to(home) for name in asked.weights}
    masks = {name: mask.to(home) for name, mask in asked.masks.items()}
    return methods.Problem(
        model=asked.model, graph=asked.graph, weights=weights, masks=masks, budget=asked.budget,
        data=asked.data, device=torch.device("cuda"),
    )  # fmt: skip


def peak(find: Any, asked: methods.Problem) -> tuple[Any, float]:
    """Masks, and the peak of device memory relative to that of a plain forward and backward pass."""
    x, y = (part.cuda() for part in asked.data)
    torch.cuda.reset_peak_memory_stats()
    nn.functional.cross_entropy(asked.model(x), y).backward()
    plain = torch.cuda.max_memory_allocated()
    asked.model.zero_grad()
    torch.cuda.reset_peak_memory_stats()
    masks = find(asked)
    return masks, torch.cuda.max_memory_allocated() / plain


@needs_gpu
@pytest.mark.parametrize(("name", "limit"), [("snip", 1.2), ("grasp", 2.5)])
def test_memory_on_the_device(name: str, limit: float) -> None:
    here, ratio = peak(methods.get(name).find, gpu_problem("cuda"))
    assert ratio < limit
    there, offloaded = peak(methods.get(name).find, gpu_problem("cpu"))
    assert offloaded < ratio
    assert all(mask.device.type == "cpu" for mask in there.values())
    different = sum(int((mask.cpu() != there[key]).sum()) for key, mask in here.items())
    assert different < 1e-4 * sum(mask.numel() for mask in there.values())
