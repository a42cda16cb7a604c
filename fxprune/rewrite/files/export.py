"""Export a network for deployment, its zeros baked in, and run what was written against the network."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from fxprune.capture.errors import check_module, first_line
from fxprune.capture.inputs import example_inputs_for
from fxprune.capture.tracer.meta_values import map_structure
from fxprune.finite import warn_of_strange_parameters
from fxprune.keywords import refuse_unknown
from fxprune.progress import Display
from fxprune.rewrite.compact.trial import RUN_ERRORS, difference
from fxprune.rewrite.masking.finalize import finalize
from fxprune.rewrite.masking.parameters import unwrap
from fxprune.torch_private import check_entry, check_number, pytree
from fxprune.whole_files import check_file_name, check_folder_of, named, put_in_place

__all__ = ["ONNX_PACKAGES", "check_path", "drawn_arguments", "export", "require", "run_onnx", "write_onnx"]

ONNX_PACKAGES = ("onnx", "onnxscript")
TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Of the largest output; 1e-4 for other types."""

_Call = tuple[tuple[Any, ...], dict[str, Any]]


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    progress: bool = True,
    **others: NoReturn,
) -> None:
    """Write a network for deployment, in evaluation mode, with its zeros baked in.

    ``.onnx`` is for onnxruntime, OpenVINO, TensorRT and others; ``.pt2`` is a ``torch.export`` program. The
    batch size stays free. What was written is run on random inputs at two batch sizes and compared with the
    network: the ``.onnx`` in onnxruntime, where that is installed.

    Args:
        model: a masked, compact or plain network; it is not changed.
        path: the file to write; its ending, ``.onnx`` or ``.pt2``, says the format.
        example_inputs: as in :func:`fxprune.apply`; not needed for what ``apply``, ``compact`` or ``load``
            returned as a graph. A graph's inputs become positional.
        progress: say on stderr what goes on, once it takes over a second.

    Raises:
        TypeError: ``model`` is no module, or there is no such argument.
        ValueError: ``path`` has another ending, or the inputs are not known.
        ModuleNotFoundError: a package that writes ``.onnx`` is not installed.
        RuntimeError: the outputs of what was written differ; no file is left then.

    Warns (``UserWarning``) where the batch size could not stay free, or the file could not be run.

    >>> import tempfile
    >>> net = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export(net, f"{folder}/net.pt2", torch.ones(2, 4))
    ...     torch.export.load(f"{folder}/net.pt2").module()(torch.ones(3, 4)).shape
    torch.Size([3, 2])
    """
    refuse_unknown(export, others)
    check_module(model)
    check_path(path)
    check_folder_of(path)
    with Display(enabled=progress).step(f"export {os.fspath(path)}"):
        _export(model, path, example_inputs)


def _export(model: nn.Module, path: str | os.PathLike[str], example_inputs: Any) -> None:
    given = example_inputs_for(unwrap(model), example_inputs)
    if isinstance(unwrap(model), fx.GraphModule):
        given = _in_order(unwrap(model), given)
    network = finalize(model).eval()
    _make_checks_operations(network)
    hollow = next((name for name, parameter in network.named_parameters() if parameter.is_meta), None)
    if hollow is not None:
        raise ValueError(
            f"model: {hollow!r} has no values (it is on the meta device); load the weights first"
        )
    warn_of_strange_parameters(network, "they are written as they are", stacklevel=3)
    calls = [drawn_arguments(given, network, batch) for batch in (2, 3)]
    with torch.inference_mode(False), torch.no_grad(), named(path), _folder_beside(path) as folder:
        part = folder / Path(path).name
        free = _runs(network, calls[1])
        if not free:
            _check_inputs(network, calls[0])
        program = _program(network, calls[0], free=free)
        if Path(path).suffix == ".onnx":
            write_onnx(program, part)
        else:
            _write_program(program, part)
        if not free or not _has_free_batch(program):
            warnings.warn(f"export: the batch size is fixed at 2 in {part.name}", stacklevel=3)
            calls = calls[:1]
        _check(network, part, calls)
        for written in folder.iterdir():  # large networks have their weights in a file of their own
            put_in_place(written, Path(path).parent / written.name)


def _make_checks_operations(network: nn.Module) -> None:
    """Replace the checks of tensors in a graph by an operation that programs have.

    Before 2.15, PyTorch cannot export ``torch._assert`` of a tensor.
    """
    if not isinstance(network, fx.GraphModule):
        return
    for node in network.graph.nodes:
        if node.target is check_number and isinstance(node.args[0], fx.Node):
            if isinstance(node.args[0].meta.get("val"), Tensor):
                node.target = check_entry
    network.recompile()


def check_path(path: str | os.PathLike[str]) -> None:
    """Raise as :func:`export` does where the ending of ``path`` is unknown, or a package is missing."""
    check_file_name(path, example="net.onnx")
    ending = Path(path).suffix
    if ending not in (".onnx", ".pt2"):
        raise ValueError(f"path={os.fspath(path)!r}: expected a name that ends in .onnx or .pt2")
    if ending == ".onnx":
        require(ONNX_PACKAGES, "export to .onnx", "onnx")


def require(packages: Sequence[str], purpose: str, extra: str) -> None:
    """``ModuleNotFoundError``, with the remedy, unless all packages are installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(
                f"{purpose} needs the package {package!r}, which is not installed; pip install {package}, or"
                f" 'fxprune[{extra}]'"
            )


def drawn_arguments(given: _Call, network: nn.Module, batch: int | None = None) -> _Call:
    """Return arguments with numbers drawn for floats, of another batch size where they have one in common.

    Integers keep their values, or are 0 and 1 where the examples stand on the meta device.
    """
    tensors = [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor)]
    common = next((x.shape[0] for x in tensors if x.dim()), None)
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)

    def draw(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        shape = list(x.shape)
        if batch is not None and shape and shape[0] == common:
            shape[0] = batch
        if x.is_floating_point():
            return torch.randn(shape, generator=generator).to(device, x.dtype)
        if x.is_meta or x.is_complex():
            return torch.randint(0, 2, shape, generator=generator).to(device, x.dtype)
        rows = torch.arange(shape[0]) % max(x.shape[0], 1) if shape else None
        return (x if rows is None else x[rows.to(x.device)]).to(device)

    args, kwargs = pytree.tree_map(draw, given)
    return args, kwargs


def _in_order(network: nn.Module, given: _Call) -> _Call:
    """Turn keyword arguments into positional ones; those left out in between have their defaults."""
    args, kwargs = list(given[0]), dict(given[1])
    for name, parameter in list(inspect.signature(network.forward).parameters.items())[len(args) :]:
        known = name in kwargs or parameter.default is not parameter.empty
        if not kwargs or not known or parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            break
        args.append(kwargs.pop(name, parameter.default))
    return tuple(args), kwargs


def _runs(network: nn.Module, call: _Call) -> bool:
    """Whether a network accepts these arguments."""
    try:
        network(*call[0], **call[1])
    except RUN_ERRORS:
        return False
    return True


def _check_inputs(network: nn.Module, call: _Call) -> None:
    """``ValueError`` for arguments that a network does not accept."""
    try:
        network(*call[0], **call[1])
    except RUN_ERRORS as error:
        shapes = map_structure(lambda x: list(x.shape) if isinstance(x, Tensor) else x, call[1] or call[0])
        raise ValueError(
            f"example_inputs: {type(network).__name__} does not accept {shapes}: {first_line(error)}; pass"
            " inputs that it runs on"
        ) from error


def _program(network: nn.Module, call: _Call, *, free: bool) -> torch.export.ExportedProgram:
    """Export a network, with a free batch size if it has one."""
    args, kwargs = call
    batch = next((x.shape[0] for x in pytree.tree_leaves(call) if isinstance(x, Tensor) and x.dim()), None)

    def sizes(x: Any) -> Any:
        dynamic = free and isinstance(x, Tensor) and x.dim() and x.shape[0] == batch
        return {0: torch.export.Dim.AUTO} if dynamic else None

    shapes = pytree.tree_map(sizes, (args, kwargs))
    whole: Any = shapes[0]
    if kwargs:  # by name, in the order of the signature
        names = list(inspect.signature(network.forward).parameters)
        whole = {**dict(zip(names, shapes[0], strict=False)), **shapes[1]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(network, args, kwargs, dynamic_shapes=whole)


def _has_free_batch(program: torch.export.ExportedProgram) -> bool:
    """Whether some size of the inputs is no number."""
    values = (node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder")
    shapes = [tuple(value.shape) for value in values if isinstance(value, Tensor)]
    return any(isinstance(size, torch.SymInt) for shape in shapes for size in shape)


def write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write an exported program as ONNX."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        written = torch.onnx.export(program, dynamo=True, verbose=False)
        assert written is not None
        written.save(str(path))


def _write_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write an exported program; by way of memory: PyTorch's writer ends the process on a full disk."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    path.write_bytes(buffer.getbuffer())


@contextlib.contextmanager
def _folder_beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder on the file system of ``path`` that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix=".export", dir=Path(path).parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def run_onnx(session: Any, call: _Call) -> list[Tensor]:
    """Run an onnxruntime session on the tensors of a call, in their order."""
    tensors = [x for x in pytree.tree_leaves(call) if isinstance(x, Tensor)]
    names = [place.name for place in session.get_inputs()]
    feed = {name: x.detach().cpu().numpy() for name, x in zip(names, tensors, strict=True)}
    return [torch.from_numpy(result) for result in session.run(None, feed)]


def _check(network: nn.Module, path: Path, calls: list[_Call]) -> None:
    """Run a file at two batch sizes; ``RuntimeError`` where it gives other numbers than the network."""
    if path.suffix == ".onnx" and importlib.util.find_spec("onnxruntime") is None:
        warnings.warn(
            f"export: {path.name} was not run, as onnxruntime is not installed; pip install onnxruntime",
            stacklevel=3,
        )
        return
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    else:
        loaded = torch.export.load(path).module()
    for args, kwargs in calls:
        expected = [x.cpu() for x in pytree.tree_leaves(network(*args, **kwargs)) if _is_tensor(x)]
        if path.suffix == ".onnx":
            found = run_onnx(session, (args, kwargs))
        else:
            found = [x.cpu() for x in pytree.tree_leaves(loaded(*args, **kwargs)) if _is_tensor(x)]
        far = difference(expected, found)
        if not far <= max((TOLERANCE.get(x.dtype, 1e-4) for x in expected), default=1e-4):
            raise RuntimeError(f"export: the outputs of {path.name} differ by {far:.1e} of the largest")


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)
