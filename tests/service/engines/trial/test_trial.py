"""What would take too much time or memory is found out in another process, and nothing else is refused there."""

import json
from pathlib import Path

import pytest
from dense_reward.engines.trial.run import TrialError, check_by_trial, check_tokenizer_by_trial
from dense_reward.hashed_files import stamp_of
from kinds_of_templates import KINDS
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

pytestmark = pytest.mark.slow


def test_templates_of_every_kind_pass_and_so_do_broken_ones_which_are_refused_where_they_are_used() -> None:
    check_by_trial(
        templates=(*KINDS.values(), "{{", "{{ messages.nothing.at_all }}", "{% generation %}a{% endgeneration %}")
    )


def test_ordinary_patterns_pass_and_so_do_broken_ones() -> None:
    names = tuple(f"model.layers.{at}.self_attn.q_proj" for at in range(100))
    unsloth = r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\..*)"
    check_by_trial(
        patterns=(r".*\.(q_proj|v_proj)", r"^(?!.*visual).*q_proj$", unsloth, "((", "a{99999999999}"), names=names
    )


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}", "takes more than 1 second"),
        ("{% set x = 'a' * 400000000 %}{{ x ~ x }}", "or takes more than 512 MB"),
        ("{{ 'a' * 1000001 }}", "makes more than 1000000 characters"),
    ],
)
def test_the_limit_that_was_reached_is_named(template: str, why: str) -> None:
    with pytest.raises(TrialError, match=why):
        check_by_trial(templates=(template,))


GROWS = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}


@pytest.mark.parametrize(
    ("normalizers", "why"),
    [
        ([], None),
        ([GROWS] * 12, "or takes more than 2048 MB"),  # a library in Rust ends the process that has no memory
        ([{"type": "Prepend", "prepend": "x" * 100_000}], "makes more than 16 tokens a character"),
    ],
)
def test_a_tokenizer_must_encode_short_texts(tmp_path: Path, normalizers: list[object], why: str | None) -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator(["a b"], trainer)
    content = json.loads(backend.to_str()) | {"normalizer": {"type": "Sequence", "normalizers": normalizers}}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    if why is None:
        check_tokenizer_by_trial(path, stamp_of(path))
    else:
        with pytest.raises(TrialError, match=why):
            check_tokenizer_by_trial(path, stamp_of(path))
