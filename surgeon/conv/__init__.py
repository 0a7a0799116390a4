"""Arithmetic on one convolution: tensors in, tensors out."""
