"""The ways in which a CPU can compute a GPU's kernels: a fixture that tests of kernels import."""

from collections.abc import Iterator

import pytest
import torch
from dense_reward.engines.kernels import compiled


@pytest.fixture(autouse=True, params=["triton", "steps", pytest.param("compiled", marks=pytest.mark.slow)])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Triton's interpreter; the functions of compiled.py by torch, step by step; and these functions compiled.

    A compiled function that would be compiled again, for other shapes, fails.
    """
    name: str = request.param
    if name == "triton":
        yield name
        return
    monkeypatch.setattr(compiled, "interpreted", False)
    if name == "steps":
        yield name
        return
    for dtype in compiled.DTYPES:
        reason = compiled.start(dtype)
        if reason == "there is no C++ compiler":
            pytest.skip(reason)
        assert reason is None, reason
    torch.compiler.set_stance("fail_on_recompile")
    try:
        with torch.inference_mode():
            yield name
    finally:
        torch.compiler.set_stance("eager_on_recompile")
        compiled._started.clear()
