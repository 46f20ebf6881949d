"""The table from error code to status, and what a refusal carries."""

import ast
from pathlib import Path

import dense_reward
import pytest
from dense_reward.errors import STATUS_BY_CODE, Fault, RequestError, refuse

SOURCES = sorted(Path(dense_reward.__path__[0]).rglob("*.py"))


def codes_in(source: Path) -> set[str]:
    """Codes that are a literal first argument of refuse() or Fault()."""
    return {
        call.args[0].value
        for call in ast.walk(ast.parse(source.read_text("utf-8")))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id in {"refuse", "Fault"}
        and call.args
        and isinstance(call.args[0], ast.Constant)
        and isinstance(call.args[0].value, str)
    }


def test_every_code_that_is_written_anywhere_has_a_status() -> None:
    written = {code for source in SOURCES for code in codes_in(source)}
    assert len(written) > 10
    assert written <= STATUS_BY_CODE.keys()


def test_a_code_without_a_status_cannot_be_used() -> None:
    with pytest.raises(KeyError, match="'odd' has no status: add it"):
        refuse("odd", "message")


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("invalid_json", 400),
        ("invalid_unicode", 400),
        ("not_found", 404),
        ("model_not_found", 404),
        ("method_not_allowed", 405),
        ("tokenizer_mismatch", 409),
        ("revision_mismatch", 409),
        ("body_too_large", 413),
        ("unsupported_media_type", 415),
        ("empty_prompt", 422),
        ("too_long", 422),
        ("unknown_token_id", 422),
        ("queue_full", 429),
        ("non_finite", 500),
        ("starting", 503),
        ("draining", 503),
        ("out_of_memory", 503),
        ("deadline_exceeded", 504),
    ],
)
def test_the_status_of_a_code_is_that_of_the_contract(code: str, status: int) -> None:
    assert refuse(code, "message").status == status


def test_a_refusal_carries_every_fault_and_speaks_with_the_first() -> None:
    faults = [Fault("too_long", "first is long", "response", 0), Fault("empty_prompt", "second is empty", item=1)]
    error = RequestError(faults, retry_after_s=3.0)
    assert (error.code, error.status, error.retry_after_s) == ("too_long", 422, 3.0)
    assert str(error) == "first is long; second is empty"
    assert error.faults == tuple(faults)
