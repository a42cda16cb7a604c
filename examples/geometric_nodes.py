"""Prune a graph network of PyTorch Geometric, train it for a step, and save and load it.

Run it with ``uv run python examples/geometric_nodes.py``; it needs ``pip install fxprune torch-geometric``.
"""

import tempfile
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch_geometric.data import Data
from torch_geometric.nn import GCN

import fxprune


def main(sparsity: float = 0.8) -> float:
    """Return the sparsity of the model that was loaded."""
    torch.manual_seed(0)
    nodes = Data(x=torch.randn(30, 8), edge_index=torch.randint(0, 30, (2, 90)), y=torch.arange(30) % 3)
    inputs = (nodes.x, nodes.edge_index)
    model = fxprune.apply(GCN(8, 16, 2, 3), "synflow", sparsity, example_inputs=inputs, returns="module")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    cross_entropy(model.train()(*inputs), nodes.y).backward()
    optimizer.step()
    fxprune.verify(model)  # the masks held

    plain = fxprune.finalize(model).eval()
    with tempfile.TemporaryDirectory() as folder:
        torch.save(plain.state_dict(), Path(folder, "gcn.pt"))
        loaded = GCN(8, 16, 2, 3).eval()
        loaded.load_state_dict(torch.load(Path(folder, "gcn.pt")))
    assert torch.equal(loaded(*inputs), plain(*inputs))
    report = fxprune.analyze(loaded, example_inputs=inputs)
    print(report)
    return report.sparsity


if __name__ == "__main__":
    main()
