"""What several tests of kernels share."""

from __future__ import annotations

import pytest

from surgeon.one_pass import where


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the kernels run, on the CPU by Triton's interpreter, in many small slices, and note which do."""
    pytest.importorskip("triton")
    from surgeon.one_pass import normed_sum_triton

    calls: list[str] = []

    def noted(name: str) -> None:
        own = getattr(normed_sum_triton, name)
        monkeypatch.setattr(normed_sum_triton, name, lambda *args: (calls.append(name), own(*args))[1])

    noted("forward")
    noted("backward")
    monkeypatch.setattr(normed_sum_triton, "_TILE", 64)
    monkeypatch.setattr(normed_sum_triton, "_AT_ONCE", 4)
    monkeypatch.setattr(where, "on_cpu", True)
    return calls
