"""One thread: where cores are shared, two of them wait 20 ms for each other at every tiny conv, 100 times its work."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
os.environ.pop("COLUMNS", None)  # tables are as wide as for a pipe, wherever the tests run

import torch

torch.set_num_threads(1)
