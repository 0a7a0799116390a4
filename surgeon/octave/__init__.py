"""Two streams through a graph: where they go, and the exact rewriting that passes them on."""
