"""The names of teachers."""

import pytest
from dense_reward.errors import RequestError
from dense_reward.teacher.names import TeacherName, chosen_name, names_of, pinned, teacher_name

REVISION = "0123456789abcdef"


@pytest.mark.parametrize(
    ("name", "pair", "tilt"),
    [
        (None, None, 0.0),
        ("demo", "demo", 0.0),
        ("demo:reference", "demo", -1.0),
        ("demo:tilted=0", "demo", 0.0),
        ("demo:tilted=-1", "demo", -1.0),
        ("demo:tilted=1.5e-1", "demo", 0.15),
        ("demo:tilted=+2.", "demo", 2.0),
        ("a:b", "a:b", 0.0),
        ("a:b:reference", "a:b", -1.0),
        ("demo:Reference", "demo:Reference", 0.0),
    ],
)
def test_a_name_is_a_pair_and_a_tilt(name: str | None, pair: str | None, tilt: float) -> None:
    assert teacher_name(name) == TeacherName(pair, tilt)


@pytest.mark.parametrize("tilt", ["", "x", "nan", "inf", "-1.01", "100.1", "1_0", " 1", "1e999", "0x1", "\u0661"])
def test_a_tilt_that_is_no_such_number_is_refused_with_the_range(tilt: str) -> None:
    with pytest.raises(RequestError, match=r"from -1 \(the reference\) over 0 \(sft\) to 100") as refused:
        teacher_name(f"demo:tilted={tilt}")
    assert refused.value.code == "model_not_found"


def test_the_listed_names_are_those_that_can_be_listed() -> None:
    assert names_of("demo", REVISION) == [f"demo@{REVISION}", "demo", f"demo@{REVISION}:reference", "demo:reference"]


@pytest.mark.parametrize("name", ["demo", "demo:reference", "demo:tilted=.5", "a@b", "a:b", "a@0123"])
def test_a_name_can_have_the_revision_of_its_pair(name: str) -> None:
    found, plain = teacher_name(pinned(name, REVISION)), teacher_name(name)
    assert found == TeacherName(plain.pair, plain.tilt, REVISION)
    assert pinned(pinned(name, REVISION), "fedcba9876543210") == pinned(name, REVISION)
    found.check_revision(REVISION)
    plain.check_revision("fedcba9876543210")
    with pytest.raises(RequestError, match="revision fedcba9876543210, not 0123456789abcdef") as refused:
        found.check_revision("fedcba9876543210")
    assert refused.value.code == "model_not_found"


def test_a_revision_in_the_body_pins_the_teacher_of_the_url() -> None:
    here, other = f"demo@{REVISION}:tilted=1", "demo@fedcba9876543210:tilted=1"
    assert chosen_name("demo:tilted=1", here) == chosen_name(here, "demo:tilted=1") == chosen_name(here, here) == here
    for body in (other, f"demo@{REVISION}", "demo:reference"):
        with pytest.raises(RequestError, match="this URL is for the teacher"):
            chosen_name(here, body)


def test_the_name_of_the_url_counts_and_another_in_the_body_is_refused() -> None:
    assert chosen_name(None, "a") == chosen_name("a", None) == chosen_name("a", "a") == "a"
    assert chosen_name(None, None) is None
    with pytest.raises(RequestError, match="teacher 'a'"):
        chosen_name("a", "b")
