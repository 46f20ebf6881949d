"""Clients and answers as objects: pickled clients, tables, and answers that contradict themselves."""

import json
import math
import pickle
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from threading import Thread

import numpy as np
import pytest
from dense_reward import AnswerError, AsyncClient, Backoff, Client, ScoreOptions, ServiceUnavailableError
from dense_reward.client.requests import one_item, score_one
from dense_reward.client.responses import check_version, parse_scored
from dense_reward.client.tables import to_pandas
from dense_reward.schemas import ScoreRequest
from faulty_service import FaultyService, Server, answer_to, made_up_reward
from served_pair import free_port


def test_a_pickled_client_scores_with_its_key_and_pins() -> None:
    with FaultyService() as service, Client(service.url, api_key="secret") as client:
        client.pin(service.card, also_unnamed=True)
        client.score_ids([1], [[2]])
        copied = pickle.loads(pickle.dumps(client))
        with copied:
            assert copied.score_ids([1], [[5]]).results[0].reward.tolist() == made_up_reward([5])
        assert [json.loads(body)["expect_revision"] for body in service.bodies] == [service.card.revision] * 2
        assert {headers["authorization"] for headers in service.headers} == {"Bearer secret"}
        assert "secret" not in repr(copied)
    assert isinstance(pickle.loads(pickle.dumps(AsyncClient(service.url))), AsyncClient)


def test_a_name_without_address_fails_at_once_and_a_closed_port_is_retried() -> None:
    with (
        Client("http://no-such-host.invalid", retry_for_s=2) as client,
        pytest.raises(ServiceUnavailableError, match="check base_url"),
    ):
        client.models()
    quick = Backoff(0.001, 0.001)
    with (
        Client(f"http://127.0.0.1:{free_port()}", retry_for_s=2, backoff=quick) as client,
        pytest.raises(ServiceUnavailableError) as caught,
    ):
        client.models()
    assert caught.value.attempts > 1


@contextmanager
def tls_service(folder: Path) -> Iterator[str]:
    """A service behind a certificate without an authority."""
    subprocess.run(
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost "
        f"-keyout {folder}/key.pem -out {folder}/cert.pem",
        shell=True,
        check=True,
        capture_output=True,
    )
    service = FaultyService()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    server: Server = service._server
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"https://localhost:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.skipif(which("openssl") is None, reason="makes its certificate with openssl")
def test_a_certificate_that_is_not_trusted_fails_at_once(tmp_path: Path) -> None:
    with (
        tls_service(tmp_path) as url,
        Client(url, retry_for_s=2) as client,
        pytest.raises(ServiceUnavailableError, match="SSL_CERT_FILE"),
    ):
        client.models()


def answered(reference: float, version: str | None = None) -> bytes:
    """An answer for one id whose reward is 1.5 and whose sft_logprob is -1."""
    row = {"item": 0, "response": 0, "length": 1, "token_ids": [2], "sum": 1.5, "mean": 1.5, "min": 1.5}
    arrays = {"reward": [1.5], "sft_logprob": [-1.0], "reference_logprob": [reference]}
    request = ScoreRequest.model_validate({"prompt_ids": [1], "response_ids": [[2]]})
    answer = answer_to(request) | {"results": [row | arrays]}
    return json.dumps(answer if version is None else {**answer, "wire_version": version}).encode()


INCLUDED = ScoreOptions(include=["reward", "sft_logprob", "reference_logprob"])
EXPECTED = score_one(one_item(prompt_ids=[1], response_ids=[[2]]), INCLUDED, "float").expectation


def test_a_reward_that_is_not_the_difference_of_its_log_probs_is_an_error() -> None:
    assert parse_scored(answered(-2.5), EXPECTED).results[0].sum == 1.5
    with pytest.raises(AnswerError, match=r"the reward of token 0 is 1\.5, but .* is 1\.0"):
        parse_scored(answered(-2.0), EXPECTED)


@pytest.mark.parametrize("version", [None, "1.0", "1.7"])
def test_a_format_of_the_same_major_version_is_read(version: str | None) -> None:
    assert parse_scored(answered(-2.5, version), EXPECTED).results[0].sum == 1.5


def test_a_format_of_another_major_version_is_refused_with_the_cure() -> None:
    with pytest.raises(AnswerError, match="install the same version of dense-reward on both sides"):
        parse_scored(answered(-2.5, "2.0"), EXPECTED)
    with pytest.raises(AnswerError, match=r"format 0\.9"):
        check_version("0.9")


def test_tables_have_a_row_for_each_token_or_each_response() -> None:
    items: list[dict[str, object]] = [
        {"prompt_ids": [1], "response_ids": [[2, 3], [4]]},
        {"prompt_ids": [], "response_ids": [[5]]},
    ]
    with FaultyService() as service, Client(service.url) as client:
        found = list(client.score_many(items, on_error="per_item"))
    tokens, responses = to_pandas(found), to_pandas(found, "responses")
    assert tokens[["item", "response", "position", "token_id"]].values.tolist() == [
        [0, 0, 0, 2],
        [0, 0, 1, 3],
        [0, 1, 0, 4],
    ]
    np.testing.assert_array_equal(tokens["reward"], [*made_up_reward([2, 3]), *made_up_reward([4])])
    assert responses["sum"].tolist()[:2] == [sum(made_up_reward([2, 3])), made_up_reward([4])[0]]
    assert responses["error"].isna().tolist() == [True, True, False]
    assert responses["error"].tolist()[2] == "empty_prompt: empty"
    assert math.isnan(responses["sum"].tolist()[2])
    with pytest.raises(ValueError, match="rows must be"):
        to_pandas(found, "words")  # type: ignore[arg-type]
