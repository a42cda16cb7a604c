"""Pictures are drawn from the history on the result; what is missing is said."""

import builtins
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import NETS

import fxprune
from fxprune import plot

pytest.importorskip("matplotlib")


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
