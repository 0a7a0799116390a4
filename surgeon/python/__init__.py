"""Networks as files that run without surgeon."""
