"""Connected components, against networkx."""

import networkx
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxprune.channels.components import components, joined


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 30), st.data())
def test_every_vertex_has_the_smallest_of_its_component(count: int, data: st.DataObject) -> None:
    vertices = st.integers(0, count - 1)
    edges = data.draw(st.lists(st.tuples(vertices, vertices), max_size=40))
    graph = networkx.Graph(edges)
    graph.add_nodes_from(range(count))
    expected = {v: min(part) for part in networkx.connected_components(graph) for v in part}
    found = components(count, torch.tensor(edges, dtype=torch.int64).reshape(-1, 2).T)
    assert found.tolist() == [expected[v] for v in range(count)]


def test_a_long_chain_in_any_order() -> None:
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    assert not components(5000, torch.stack([order[:-1], order[1:]])).any()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12), st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=20), st.data()
)
def test_edges_that_come_later_give_the_same(
    count: int, edges: list[tuple[int, int]], data: st.DataObject
) -> None:
    inside = torch.tensor([e for e in edges if max(e) < count], dtype=torch.int64).reshape(-1, 2).T
    first = data.draw(st.integers(0, inside.shape[1]))
    found = joined(components(count, inside[:, :first]), inside[:, first:])
    assert torch.equal(found, components(count, inside))
