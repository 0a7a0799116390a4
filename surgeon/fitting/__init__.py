"""Fit a converted network to what the original computes on images."""
