"""A caller verifies, before it sends ids, that the service has the same tokenizer."""

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
from dense_reward import Client, TokenizerMismatchError
from dense_reward.client.tokenizer import card_named, sha256_of
from dense_reward.engines.tokenizer import TransformersTokenizer
from faulty_service import CARD, FaultyService
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(*added: str) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>", *added])
    return tokenizer


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.fixture
def service() -> Iterator[FaultyService]:
    served = TransformersTokenizer(fast(byte_tokenizer())).sha256()
    with FaultyService(card=CARD.model_copy(update={"tokenizer_sha256": served})) as running:
        yield running


def test_both_libraries_tokenizers_agree_with_the_service(service: FaultyService) -> None:
    with Client(service.url) as client:
        assert client.check_tokenizer(byte_tokenizer()) == service.card.tokenizer_sha256
        assert client.check_tokenizer(fast(byte_tokenizer()), model=CARD.name) == service.card.tokenizer_sha256


def test_truncation_and_padding_do_not_change_the_hash_and_stay_as_they_were(service: FaultyService) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(max_length=8)
    tokenizer.enable_padding(length=500)
    assert sha256_of(tokenizer) == service.card.tokenizer_sha256
    assert tokenizer.truncation is not None
    assert tokenizer.padding is not None


def test_another_tokenizer_is_refused_with_both_hashes(service: FaultyService) -> None:
    other = byte_tokenizer("<new>")
    with Client(service.url) as client, pytest.raises(TokenizerMismatchError) as raised:
        client.check_tokenizer(other)
    assert raised.value.own_sha256 == sha256_of(other)
    assert raised.value.served_sha256 == service.card.tokenizer_sha256
    assert sha256_of(other) in str(raised.value)
    assert service.card.tokenizer_sha256 in str(raised.value)


def test_a_pair_must_be_named_where_several_are_served() -> None:
    cards = (CARD, CARD.model_copy(update={"name": "other"}))
    assert card_named(cards, "other") is cards[1]
    for name in (None, "absent"):
        with pytest.raises(ValueError, match="does not name one pair; served: made-up, other"):
            card_named(cards, name)
    with pytest.raises(ValueError, match="served: nothing yet"):
        card_named((), None)


def test_importing_the_package_brings_the_client_and_nothing_of_the_service() -> None:
    heavy = ["fastapi", "orjson", "prometheus_client", "pydantic_settings", "starlette", "torch", "transformers"]
    program = f"import json, sys, dense_reward; print(json.dumps([m for m in {heavy} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == []
