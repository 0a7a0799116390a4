"""Steps between convolutions in one pass over memory: Triton kernels on CUDA, and the same in plain torch elsewhere."""
