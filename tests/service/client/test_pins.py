"""What a client that pinned a pair sends with its later requests."""

import pytest
from dense_reward import ScoreOptions
from dense_reward.client.tokenizer import Pins
from faulty_service import CARD

OTHER = CARD.model_copy(update={"name": "other", "revision": "r2", "tokenizer_sha256": "1" * 64})


def named(options: ScoreOptions) -> tuple[str | None, str | None, str | None]:
    return options.model, options.tokenizer_sha256, options.expect_revision


def test_the_first_pair_is_pinned_for_requests_without_a_name() -> None:
    pins = Pins()
    pins.pin_one_of(CARD, [CARD, OTHER])
    pins.pin_one_of(OTHER, [CARD, OTHER])
    assert named(pins.applied(ScoreOptions())) == ("made-up", "0" * 64, "r1")
    assert named(pins.applied(ScoreOptions(model="other"))) == ("other", "1" * 64, "r2")


def test_unpin_forgets_one_pair_or_all() -> None:
    pins = Pins()
    pins.pin(CARD, also_unnamed=True)
    pins.pin(OTHER, also_unnamed=False)
    pins.unpin("made-up")
    assert named(pins.applied(ScoreOptions())) == (None, None, None)
    assert named(pins.applied(ScoreOptions(model="other"))) == ("other", "1" * 64, "r2")
    pins.unpin(None)
    assert named(pins.applied(ScoreOptions(model="other"))) == ("other", None, None)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("tokenizer_sha256", ScoreOptions(tokenizer_sha256="other"), id="tokenizer_sha256"),
        pytest.param("expect_revision", ScoreOptions(expect_revision="other"), id="expect_revision"),
    ],
)
def test_an_option_that_conflicts_with_the_pin_is_refused(name: str, options: ScoreOptions) -> None:
    pins = Pins()
    pins.pin(CARD, also_unnamed=True)
    with pytest.raises(ValueError, match=rf"ScoreOptions\.{name} is other.*unpin\(\)"):
        pins.applied(options)
