"""What there is to see of a network's kernels, as plain data; `display` and the page draw it."""
