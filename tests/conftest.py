"""One thread: where cores are shared, two of them wait 20 ms for each other at every tiny conv, 100 times its work."""

import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
os.environ.pop("COLUMNS", None)  # tables are as wide as for a pipe, wherever the tests run

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():  # before Triton is imported: its kernels then run on the CPU, step by step
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Give every run a folder of its own: by default pytest removes those of other runs, which may not be over."""
    if config.option.basetemp is None:  # workers are given a part of their run's
        folder = tempfile.mkdtemp(prefix="surgeon-tests-", dir=os.environ.get("PYTEST_DEBUG_TEMPROOT"))
        config.option.basetemp = Path(folder, "run")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_collection_finish() -> None:
    """Spare the garbage collector what lives as long as the run: with torch and 5000 tests, 0.7 s at every call."""
    gc.collect()
    gc.freeze()
