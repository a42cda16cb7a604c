"""Pictures are drawn from the history on the result; what is missing is said."""

import builtins
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import NETS
from torch import nn

import fxprune
from fxprune import plot
from fxprune.sweeps import Results

pytest.importorskip("matplotlib")


def test_a_history_that_is_none_is_named() -> None:
    with pytest.raises(TypeError, match=r"^source: got a NoneType, expected what apply returned, or"):
        fxprune.plot_history(None)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_history_of_a_result(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, example = NETS["conv_chain"]()
    pruned = fxprune.apply(net, "dpai", 0.5, example_inputs=example, steps=30, progress=False)
    figure = fxprune.plot_history(pruned)
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["ln paths", "effective nodes", "effective kernels", "objective"]
    for axes, column in zip(figure.axes, ("log_paths", "nodes", "kernels", "objective"), strict=True):
        x, y = axes.lines[0].get_data()
        assert list(x) == [0, 10, 20, 30]
        assert list(y) == pruned.meta["fxprune"]["history"][column]
    figure.savefig(tmp_path / "history.png")
    assert (tmp_path / "history.png").stat().st_size > 1000


def test_steps_without_a_path_are_left_out() -> None:
    figure = plot.plot_history({"step": [0, 10, 20], "log_paths": [-math.inf, 1.0, 2.0], "other": [1, 2, 3]})
    assert [list(axes.lines[0].get_xdata()) for axes in figure.axes] == [[10, 20], [0, 10, 20]]
    assert figure.axes[1].get_ylabel() == "other"


def test_no_history_is_said() -> None:
    with pytest.raises(ValueError, match="has no history"):
        plot.plot_history(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="a column 'step' and others, got nodes"):
        plot.plot_history({"nodes": [1.0]})


def test_matplotlib_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install 'fxprune\[plot\]'"):
        plot.plot_history({"step": [0], "nodes": [1.0]})


def test_densities_and_masks_are_drawn_as_they_are() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, :2] = True
    fxprune.set_masks(net, {"0.weight": mask, "1.weight": torch.ones(2, 3, dtype=torch.bool)})
    found = fxprune.analyze(net, example_inputs=torch.ones(1, 4))
    bars = [bar.get_width() for bar in fxprune.plot.density(found).axes[0].patches]
    assert bars == [2 / 12, 1.0, 2 / 12, 2 / 6]
    drawn = fxprune.plot.masks(fxprune.masks(net), ["0.weight"]).axes[0].images[0].get_array()
    assert torch.equal(torch.as_tensor(drawn.data), mask.float())
    with pytest.raises(ValueError, match="names: 'x' has no mask"):
        fxprune.plot.masks(fxprune.masks(net), ["x"])


def test_a_comparison_has_means_and_bands_of_one_deviation() -> None:
    rows = [
        {"method": "a", "sparsity": 0.5, "seed": seed, "accuracy": value}
        for seed, value in enumerate((0.8, 0.9))
    ] + [{"method": "dense", "sparsity": 0.0, "seed": 0, "accuracy": 0.95}]
    axes = fxprune.plot.compare(rows).axes[0]
    assert [line.get_label() for line in axes.lines] == ["a", "dense"]
    assert axes.lines[0].get_ydata()[0] == pytest.approx(0.85)
    edges = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (edges.max() - edges.min()) / 2 == pytest.approx(0.1 / 2**0.5)
    assert len(fxprune.plot.compare(Results(rows)).axes[0].lines) == 2
    rows[0]["nodes"] = 3.0
    with pytest.raises(ValueError, match=r"none has 'f1' and 'sparsity'; there are .*accuracy, nodes$"):
        fxprune.plot.compare(rows[::-1], "f1")


def test_no_masks_are_no_picture() -> None:
    with pytest.raises(ValueError, match=r"^masks: there are none to draw$"):
        plot.masks({})
