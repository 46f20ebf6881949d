"""When kernels of a CPU are compiled, and where the compiled code is kept; what they compute: test_fused_*.py."""

import os
from pathlib import Path

import pytest
import torch
from dense_reward.engines.kernels import compiled
from dense_reward.engines.kernels.compiled import computed, gate_of, start


def test_without_a_compiler_nothing_is_compiled_and_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert start(torch.float32) == "there is no C++ compiler"
    assert not compiled.is_started(torch.float32)


def test_a_dtype_without_kernels_is_named() -> None:
    assert start(torch.float16) == "there are none for float16"


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: torch.dtype) -> None:
        raise RuntimeError("cannot find\n-lomp")

    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr(compiled, "_compile_all", fails)
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.setenv(name, "kept")
    assert start(torch.float32) == "the compiler failed (cannot find -lomp)"
    assert not compiled.is_started(torch.float32)


def test_what_was_not_compiled_is_computed_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> torch.Tensor:
        raise AssertionError("compiled")

    monkeypatch.setattr(compiled, "_compiled", {gate_of: never})
    gate, up = torch.randn(3, 5), torch.randn(3, 5)
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(computed(gate_of, gate, up), expected)
    monkeypatch.setattr(compiled, "_started", {torch.float32})
    torch.testing.assert_close(computed(gate_of, gate[:1], up[:1]), expected[:1])  # the compiler treats 1 as a constant
    with pytest.raises(AssertionError, match="compiled"):
        computed(gate_of, gate, up)


def test_what_was_compiled_can_be_left_unused_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_started", {torch.float32})
    with compiled.off():
        assert not compiled.is_started(torch.float32)
    assert compiled.is_started(torch.float32)


def test_compiled_code_is_kept_where_no_other_user_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = compiled._private_folder()
    assert folder == tmp_path / "cache" / "dense-reward" / "compiled"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    other = compiled._private_folder()
    assert other != folder
    assert other.stat().st_mode & 0o777 == 0o700
    other.rmdir()


@pytest.mark.parametrize("kind", ["a file", "no home"])
def test_without_a_folder_of_its_own_a_new_one_is_made(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    (tmp_path / "cache").write_text("not a folder")
    if kind == "a file":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    else:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", no_home)
    folder = compiled._private_folder()
    assert os.access(folder, os.W_OK)
    folder.rmdir()
