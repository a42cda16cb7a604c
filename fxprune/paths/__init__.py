"""Count paths on the graph, exactly and without overflow."""
