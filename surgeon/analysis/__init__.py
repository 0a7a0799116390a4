"""Network to sites: graphs, what a run shows, and what stands in the way of a swap."""
