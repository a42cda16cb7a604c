"""Make a network callable in a runtime: eager PyTorch, its compiler, onnxruntime, OpenVINO."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxprune.rewrite.files.export import ONNX_PACKAGES, export
from fxprune.torch_private import pytree

__all__ = ["RUNTIMES", "check_runtime", "missing_package", "onnx_session", "prepare"]

Call = tuple[tuple[Any, ...], dict[str, Any]]
RUNTIMES = ("eager", "compile", "onnxruntime", "openvino")
_NEEDS = {"onnxruntime": (*ONNX_PACKAGES, "onnxruntime"), "openvino": (*ONNX_PACKAGES, "openvino")}


def missing_package(runtime: str) -> str | None:
    """Name the first package that a runtime needs and that is not installed."""
    return next((p for p in _NEEDS.get(runtime, ()) if importlib.util.find_spec(p) is None), None)


def prepare(
    runtime: str, network: nn.Module, example_inputs: Any, call: Call, threads: int, folder: Path
) -> Callable[[], object]:
    """Return a function of no arguments that runs the network once on the arguments of ``call``.

    Args:
        runtime: one of ``RUNTIMES``.
        network: in evaluation mode.
        example_inputs: as for :func:`fxprune.export`.
        call: positional and keyword arguments.
        threads: of runtimes that have their own.
        folder: where an ``.onnx`` file may be written.
    """
    args, kwargs = call
    if runtime in ("eager", "compile"):
        run = torch.compile(network) if runtime == "compile" else network
        return lambda: run(*args, **kwargs)
    path = folder / f"{id(network)}.onnx"
    if not path.exists():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="export: .* was not run")
            export(network, path, example_inputs)
    return _onnxruntime(path, call, threads) if runtime == "onnxruntime" else _openvino(path, call, threads)


def _arrays(call: Call) -> list[Any]:
    return [x.detach().cpu().numpy() for x in pytree.tree_leaves(call) if isinstance(x, torch.Tensor)]


def _onnxruntime(path: Path, call: Call, threads: int) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [place.name for place in session.get_inputs()]
    feed = dict(zip(names, _arrays(call), strict=True))
    return lambda: session.run(None, feed)


def onnx_session(threads: int) -> Callable[[Any, torch.Tensor], Callable[[], object]]:
    """Return a function that makes a runnable of an ONNX model in memory and the input ``x``."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads

    def session(model: Any, x: torch.Tensor) -> Callable[[], object]:
        made = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        feed = {"x": x.numpy()}
        return lambda: made.run(None, feed)

    return session


def check_runtime(runtime: str) -> None:
    """``ModuleNotFoundError`` for a runtime that is not installed."""
    package = missing_package(runtime)
    if package is not None:
        raise ModuleNotFoundError(
            f"runtime={runtime!r}: {package} is not installed; pip install {package}, or runtime='eager'"
        )


def _openvino(path: Path, call: Call, threads: int) -> Callable[[], object]:
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(str(path), "CPU", {"INFERENCE_NUM_THREADS": threads})
    request = compiled.create_infer_request()
    arrays = _arrays(call)
    return lambda: request.infer(arrays)
