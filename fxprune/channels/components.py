"""Find the connected components of a graph given by its edges, all at once or some after others."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["components", "joined"]


def components(count: int, edges: Tensor) -> Tensor:
    """Return the smallest vertex of each vertex's component.

    ``edges``: (2, E), int64, of vertices 0..count-1. Each round lets both ends of every edge take the smaller
    root and then follows the roots to their ends, so that few rounds are needed for long chains.

    >>> components(5, torch.tensor([[0, 3], [3, 4]]))
    tensor([0, 1, 2, 0, 0])
    """
    root = torch.arange(count)
    left, right = edges.unbind(0)
    while True:
        a, b = root[left], root[right]
        open_edges = a != b
        if not bool(open_edges.any()):
            return root
        left, right, a, b = left[open_edges], right[open_edges], a[open_edges], b[open_edges]
        low, high = torch.minimum(a, b), torch.maximum(a, b)
        root = root.scatter_reduce(0, high, low, "amin")
        while True:
            jumped = root[root]
            if torch.equal(jumped, root):
                break
            root = jumped


def joined(root: Tensor, edges: Tensor) -> Tensor:
    """Return the smallest vertex of each vertex's component, with more edges than those that gave ``root``.

    Only the components that the new edges join are looked at: many calls with few edges take a pass over the
    vertices each.

    >>> joined(torch.tensor([0, 1, 2, 0]), torch.tensor([[3], [2]]))
    tensor([0, 1, 0, 0])
    """
    ends = root[edges]
    ends = ends[:, ends[0] != ends[1]]
    if not ends.numel():
        return root
    vertices, places = torch.unique(ends, return_inverse=True)
    new = torch.arange(len(root))
    new[vertices] = vertices[components(len(vertices), places)]
    return new[root]
