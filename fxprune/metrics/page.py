"""Write a report as one page of HTML that needs no network: numbers and masks come in, text goes out."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import adaptive_avg_pool2d

from fxprune.sparsity.masks import Masks

__all__ = ["page", "table"]

CELLS = 96
"""The most rows and columns of the picture of a mask; larger ones are averaged."""


def page(numbers: Mapping[str, Any], effective: Masks, notes: Sequence[str]) -> str:
    """Write the page of a report.

    Args:
        numbers: ``Report.to_dict()``.
        effective: the masks of what is on a path, by layer.
        notes: lines under the totals.
    """
    title = f"{numbers['network']}: {numbers['sparsity']:.2%} sparse"
    data = {
        "totals": [[name, value] for name, value in totals(numbers).items()],
        "notes": [*_remarks(numbers), *notes],
        "layers": [_layer(name, layer, effective[name]) for name, layer in numbers["layers"].items()],
    }
    # No name in the data may end the script that holds them.
    text = json.dumps(data).replace("<", "\\u003c")
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return template.replace("@@TITLE@@", html.escape(title)).replace("@@DATA@@", text)


def table(numbers: Mapping[str, Any]) -> str:
    """Write the totals and a bar for each layer, without scripts, for a cell of a notebook."""
    pairs = totals(numbers).items()
    cells = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in pairs)
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{layer['kept_params']:,}</td><td>{layer['density']:.2%}</td>"
        f"<td>{_bar(layer['density'], layer['effective_params'] / layer['params'])}</td></tr>"
        for name, layer in numbers["layers"].items()
    )
    head = "<tr><th>layer</th><th>kept</th><th>density</th><th>density, effective</th></tr>"
    name = html.escape(f"{numbers['network']}, {numbers['resolution']} resolution")
    return f"<div><b>{name}</b><table>{cells}</table><table>{head}{rows}</table></div>"


def totals(numbers: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the numbers of the whole network by name, as text."""
    paths = numbers["log_paths"]
    return {
        "sparsity": f"{numbers['sparsity']:.4%}",
        "weights kept": f"{numbers['kept_params']:,} of {numbers['params']:,}",
        "effective weights": f"{numbers['effective_params']:,}",
        "output channels": f"{numbers['effective_nodes']:,} of {numbers['nodes']:,}",
        "kernels": f"{numbers['effective_kernels']:,} of {numbers['kernels']:,}",
        "multiply-adds": f"{numbers['masked_macs']:,} of {numbers['macs']:,}",
        "effective paths": "none" if paths is None else f"e^{paths:.2f}",
    }


def _remarks(numbers: Mapping[str, Any]) -> list[str]:
    lines = [f"{numbers['resolution']} resolution"]
    if numbers["asked"]:
        lines.append(f"no sparsity was asked for: {numbers['asked']}, the default")
    if numbers["dead_layers"]:
        lines.append(f"dead layers: {', '.join(numbers['dead_layers'])}")
    if numbers["opaque"]:
        lines.append(f"opaque operations: {numbers['opaque']}; behind them, effective is an upper bound")
    return lines


def _layer(name: str, numbers: Mapping[str, Any], effective: torch.Tensor) -> dict[str, Any]:
    mask = effective.detach().cpu().float()
    kernels = mask.flatten(2).mean(2) if mask.dim() > 2 else mask.reshape(len(mask), -1)
    rows, columns = (min(CELLS, size) for size in kernels.shape)
    shares = adaptive_avg_pool2d(kernels[None, None], (rows, columns))[0, 0]
    alive = (kernels > 0).any(1).float()
    strip = adaptive_avg_pool2d(alive[None, None, None], (1, min(2 * CELLS, len(alive))))[0, 0, 0]
    return {
        "name": name,
        "shape": numbers["shape"],
        "params": numbers["params"],
        "kept": numbers["kept_params"],
        "density": numbers["density"],
        "effective_params": numbers["effective_params"],
        "effective": numbers["effective_params"] / numbers["params"],
        "nodes": numbers["nodes"],
        "alive": numbers["effective_nodes"],
        "grid": [rows, columns],
        "mask": _bytes(shares),
        "strip": _bytes(strip),
    }


def _bytes(shares: torch.Tensor) -> str:
    """Write shares in [0, 1] as bytes; one that is not zero is not written as zero."""
    values = (shares.flatten() * 255).ceil().to(torch.uint8).tolist()
    return base64.b64encode(bytes(values)).decode()


def _bar(density: float, effective: float) -> str:
    outer = "width:12em;height:0.8em;border:1px solid #aaa"
    return (
        f'<div style="{outer}"><div style="width:{density:.1%};height:50%;background:#b7c6da"></div>'
        f'<div style="width:{effective:.1%};height:50%;background:#2f5d9b"></div></div>'
    )
