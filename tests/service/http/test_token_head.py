"""A token head over HTTP: /score, /heatmap and /models answer, and what needs a distribution is refused in words."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dense_reward import Client, ScoreOptions
from dense_reward.errors import SettingsError
from dense_reward.serving.loaders import loader
from dense_reward.serving.pair_sources import first_pairs
from dense_reward.settings import Settings
from running_service import Served, served, wait_until_ready
from tiny_heads import values_of_prefixes, write_head
from tiny_models import write_pair

pytestmark = pytest.mark.slow
RESPONSES = [[8, 9, 10], [], [9, 9], [8, 11, 12, 13]]
IDS = {"prompt_ids": [5, 6, 7], "response_ids": RESPONSES}
NEEDED = ["sft_logprob", "reference_logprob", "kl", "centred", "entropy", "varentropy"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("head") / "head"
    write_head(folder)
    return folder


@pytest.fixture(scope="module")
def head(folder: Path) -> Iterator[Served]:
    with served(loader("torch"), token_head=folder) as running:
        yield running


def results(running: Served, body: object) -> list[dict[str, Any]]:
    answer = running.score(body)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["results"]
    return found


def test_rewards_are_transformers_own_scores_of_prefixes(head: Served, folder: Path) -> None:
    for row, response in zip(results(head, IDS), RESPONSES, strict=True):
        expected = values_of_prefixes(folder, [5, 6, 7], response)
        np.testing.assert_allclose(row["reward"], expected, atol=1e-5)
        assert row["sum"] == pytest.approx(sum(expected), abs=1e-4)


def test_every_form_of_input_is_answered_alike(head: Served) -> None:
    whole = results(head, {"prompt": "1+1=", "responses": ["2", "3"], "include": ["reward", "token_ids", "offsets"]})
    assert [len(row["reward"]) for row in whole] == [2, 2], "the end of turn is scored too"
    assert whole[0]["reward"] != whole[1]["reward"]
    ids = {"prompt_ids": [*b"1+1="], "response_ids": [row["token_ids"] for row in whole]}
    stream = {"token_ids": [*b"1+1=", *whole[1]["token_ids"]], "score_mask": [0, 0, 0, 0, 0, 1]}
    assert len(results(head, {"text": "1+1=2"})[0]["reward"]) == 4
    assert [len(row["reward"]) for row in results(head, ids)] == [2, 2]
    assert len(results(head, stream)[0]["reward"]) == 1


def test_sums_over_segments_and_returns_are_those_of_the_values(head: Served) -> None:
    body = {**IDS, "segments": [[[0, 2]], [], [[0, 1]], [[1, 4]]], "include": ["reward", "return_to_go"]}
    first = results(head, body)[0]
    assert first["segments"] == pytest.approx([sum(first["reward"][:2])], abs=1e-5)
    assert first["return_to_go"][0] == pytest.approx(sum(first["reward"]), abs=1e-5)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        *(({"include": [name]}, name) for name in NEEDED),
        ({"signal": "centred"}, "centred"),
        ({"signal": "sft_logprob"}, "sft_logprob"),
        ({"top_k": 2}, "alternatives"),
        ({"candidate_ids": [[[1], [2], [3]], [], [[1], [2]], [[1], [2], [3], [4]]]}, "candidate_reward"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else value,
)
def test_what_needs_a_distribution_is_refused_in_words(head: Served, asked: dict[str, Any], named: str) -> None:
    for path in ("/score", "/heatmap"):
        if path == "/heatmap" and "include" in asked:
            continue  # a picture takes what there is
        answer = head.client.post(path, json={**IDS, **asked})
        assert answer.status_code == 422
        error = answer.json()["error"]
        assert error["code"] == "unsupported_by_engine"
        assert (
            f"is a token head, which has one value for each token and no distribution, so it has no {named}"
            in (error["message"])
        )


@pytest.mark.parametrize(("form", "sign"), [("html", "<!doctype html>"), ("svg", "<svg"), ("ansi", "log-odds")])
def test_a_heatmap_says_what_the_values_are(head: Served, form: str, sign: str) -> None:
    answer = head.client.post("/heatmap", json={"prompt": "1+1=", "responses": ["2", "3"], "format": form})
    assert answer.status_code == 200, answer.text
    assert sign in answer.text.lower()
    flat = " ".join(answer.text.split())
    assert "log π_sft" not in flat
    assert "log-odds" in flat


def test_the_data_of_a_heatmap_hold_only_what_a_head_has(head: Served) -> None:
    answer = head.client.post("/heatmap", json={**IDS, "format": "json"})
    row = answer.json()["results"][0]
    assert "reward" in row
    assert not set(row) & set(NEEDED)


def test_the_card_names_the_head_and_no_pair(head: Served, folder: Path) -> None:
    with Client(str(head.client.base_url)) as client:
        (card,) = client.models()
        assert (card.sft, card.reference, card.token_head) == (None, None, str(folder))
        assert card.offered == frozenset()
        scored = client.score_ids([5, 6], [[7, 8]], options=ScoreOptions(expect_revision=card.revision))
    assert scored.model.token_head == str(folder)
    assert scored.model.sft is None
    assert scored.results[0].reward is not None


def test_one_service_has_pairs_and_heads(folder: Path, tmp_path: Path) -> None:
    sft, reference = write_pair(tmp_path)
    listed = tmp_path / "pairs.json"
    pair = {"name": "pair", "sft": str(sft), "reference": str(reference)}
    listed.write_text(json.dumps([pair, {"name": "head", "token_head": str(folder)}]))
    with served(loader("torch"), pairs_file=listed) as running:
        cards = {card["name"]: card for card in running.client.get("/models").json()["models"]}
        assert cards["pair"]["token_head"] is None
        assert cards["head"]["token_head"] == str(folder)
        by_pair, by_head = (results(running, {**IDS, "model": name})[0]["reward"] for name in ("pair", "head"))
        assert by_pair != by_head
        assert results(running, {**IDS, "model": "pair", "include": ["sft_logprob"]})[0]["sft_logprob"]


def test_a_head_is_loaded_while_others_are_served(folder: Path, tmp_path: Path) -> None:
    write_head(tmp_path / "other", seed=1)
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps([{"name": "all", "key": "k" * 32, "rights": ["score", "admin"]}]))
    with served(
        loader("torch"), token_head=folder, checkpoints_folder=tmp_path.parent.parent, api_keys_file=keys, ready=False
    ) as running:
        running.client.headers["Authorization"] = "Bearer " + "k" * 32
        wait_until_ready(running)
        body = {"name": "other", "token_head": str(tmp_path / "other")}
        answer = running.client.post("/admin/models", json=body)
        assert answer.status_code == 200, answer.text
        one, other = (results(running, {**IDS, "model": name})[0]["reward"] for name in ("default", "other"))
        assert one != other
        wrong = running.client.post("/admin/models", json={**body, "sft": str(folder)})
        assert wrong.status_code == 422
        assert "give sft and reference, or token_head alone" in wrong.json()["error"]["message"]


@pytest.mark.parametrize("engine", ["vllm", "remote", "fake"])
def test_other_engines_compute_no_heads(engine: str, folder: Path) -> None:
    with pytest.raises(SettingsError, match=f"--engine {engine} computes no token heads: use --engine torch"):
        first_pairs(Settings.model_validate({"engine": engine, "token_head": folder}))


def test_a_head_is_given_instead_of_a_pair(folder: Path) -> None:
    with pytest.raises(SettingsError, match=rf"give either .* together give sft {folder}, token_head {folder}"):
        first_pairs(Settings.model_validate({"sft": folder, "token_head": folder}))


def test_a_token_head_is_no_teacher_and_says_so(head: Served) -> None:
    asked = {"prompt": [5, 6, 7], "max_tokens": 1, "prompt_logprobs": 1}
    answers = [head.client.post("/v1/completions", json=asked), head.client.get("/teacher/default/v1/models")]
    for answer in answers:
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_by_engine")
        assert "a token head, which has values and no distribution" in answer.json()["error"]["message"]
