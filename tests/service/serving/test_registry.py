"""Pairs that are loaded, replaced and removed while the service runs: real checkpoints and a real server."""

import gc
import json
import os
import re
import shutil
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
from dense_reward.engines.torch.pair import PairEngine
from dense_reward.errors import SettingsError
from dense_reward.hashed_files import MANIFEST_NAME
from dense_reward.records import OnDevice
from dense_reward.serving.loaders import LoadedPair, LoadPair, loader
from dense_reward.serving.pair_sources import first_pairs
from dense_reward.settings import Settings
from faulty_engines import INFO, Gate, Recorder
from running_service import PATIENCE_S, Served, loading, served, wait_until
from tiny_models import copy_pair, write_checkpoint
from torch.nn import Module

pytestmark = pytest.mark.slow

KEY = "key-of-the-operator"
ENTRY = {"name": "operator", "key": KEY, "rights": ["score", "admin"]}
IDS = {"prompt_ids": [1, 2, 3], "response_ids": [[4, 5], [6]]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sft checkpoint, three references of its run, and a file of keys."""
    folder = tmp_path_factory.mktemp("pairs")
    write_checkpoint(folder / "sft", role="sft", step=20, seed=1)
    for step in (5, 10, 15):
        write_checkpoint(folder / f"step-{step}", role="reference", step=step, seed=step)
    (folder / "keys.json").write_text(json.dumps([ENTRY]))
    return folder


@contextmanager
def serving(folder: Path, root: Path | None = None, load: LoadPair | None = None) -> Iterator[Served]:
    """A service with the pair "half", sft against step-10; `root` is its --checkpoints-folder."""
    with served(
        load or loader("torch"),
        sft=folder / "sft",
        reference=folder / "step-10",
        name="half",
        api_keys_file=folder / "keys.json",
        checkpoints_folder=root or folder,
    ) as running:
        running.client.headers["Authorization"] = f"Bearer {KEY}"
        yield running
    gc.unfreeze()


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Served]:
    """One service for all tests that do not change its pairs."""
    with serving(folder, root=folder.parent) as running:
        yield running


def scored(running: Served, model: str | None = None) -> dict[str, object]:
    answer = running.score(IDS if model is None else IDS | {"model": model})
    assert answer.status_code == 200, answer.text
    content: dict[str, object] = answer.json()
    return content


def rewards(answer: dict[str, object]) -> list[list[float]]:
    results = answer["results"]
    assert isinstance(results, list)
    return [row["reward"] for row in results]


def load(running: Served, name: str, sft: Path, reference: Path) -> httpx2.Response:
    source = {"name": name, "sft": str(sft), "reference": str(reference)}
    return running.client.post("/admin/models", json=source)


def remove(running: Served, name: str) -> httpx2.Response:
    return running.client.delete(f"/admin/models/{name}")


def refusal(answer: httpx2.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_a_second_pair_is_asked_by_its_name_and_shares_what_it_can(service: Served, folder: Path) -> None:
    before = scored(service)
    card = load(service, "early", folder / "sft", folder / "step-5").json()
    assert (card["name"], card["reference"]) == ("early", str(folder / "step-5"))
    early = scored(service, "early")
    assert early["model"] == {name: card[name] for name in before["model"]}  # type: ignore[attr-defined]
    assert rewards(scored(service)) == rewards(before) != rewards(early)
    assert scored(service, "half")["model"] == scored(service)["model"] == before["model"]
    assert [c["name"] for c in service.client.get("/models").json()["models"]] == ["half", "early"]
    engines = [service.service.scorer(name).engine for name in ("half", "early")]
    assert isinstance(engines[0], PairEngine)
    assert isinstance(engines[1], PairEngine)
    assert engines[0].models[0] is engines[1].models[0]
    assert refusal(service.score(IDS | {"model": "late"})) == (404, "model_not_found")
    assert "half, early" in service.score(IDS | {"model": "late"}).text
    assert remove(service, "early").status_code == 200


def test_a_pair_is_replaced_and_what_it_alone_used_is_freed(folder: Path) -> None:
    with serving(folder) as running:
        before = scored(running)
        engine = running.service.scorer().engine
        assert isinstance(engine, PairEngine)
        kept, freed = (weakref.ref(model) for model in engine.models)
        del engine
        card = load(running, "half", folder / "sft", folder / "step-15").json()
        after = scored(running)
        assert rewards(after) != rewards(before)
        assert after["model"]["revision"] == card["revision"] != before["model"]["revision"]  # type: ignore[index]
        refused = running.score(IDS | {"expect_revision": before["model"]["revision"]})  # type: ignore[index]
        assert refusal(refused) == (409, "revision_mismatch")
        assert kept() is not None
        assert freed() is None


def test_the_garbage_collector_passes_over_libraries_but_not_over_models(folder: Path) -> None:
    """Libraries: it would visit their objects for a third of a second. Models: they could never be freed."""
    with serving(folder) as running:
        engine = running.service.scorer().engine
        assert isinstance(engine, PairEngine)
        weight = next(engine.models[0].transformers_model.parameters())
        visited = gc.get_objects()
        assert any(found is weight for found in visited)
        assert all(found is not Module for found in visited)


def test_a_request_in_flight_is_answered_by_the_pair_that_it_found_although_that_is_replaced(folder: Path) -> None:
    gate = Gate()

    def load_recorder(settings: Settings, report: Callable[[str], None], on_device: OnDevice) -> LoadedPair:
        name = str(settings.reference)
        engine = Recorder(gate, info=replace(INFO, revision=name))
        return loading(engine)(settings, report, on_device)

    with serving(folder, load=load_recorder) as running, ThreadPoolExecutor(2) as pool:
        before = pool.submit(scored, running)
        wait_until(gate.entered.is_set)
        assert load(running, "half", folder / "sft", folder / "step-15").status_code == 200
        after = pool.submit(scored, running)
        gate.opened.set()
        revisions = [answer.result(PATIENCE_S)["model"]["revision"] for answer in (before, after)]  # type: ignore[index]
    assert revisions == [str(folder / "step-10"), str(folder / "step-15")]


def test_a_first_pair_without_a_manifest_fails_with_the_cure(folder: Path, tmp_path: Path) -> None:
    sft, reference = copy_pair((folder / "sft", folder / "step-5"), tmp_path)
    (sft / MANIFEST_NAME).unlink()
    with served(loader("torch"), ready=False, sft=sft, reference=reference) as running:
        wait_until(lambda: bool(running.failures))
        assert f"dense-reward adopt {sft}" in running.service.progress


@pytest.mark.parametrize("fault", ["a flipped byte", "no manifest", "no folder", "another vocabulary"])
def test_a_pair_that_cannot_be_loaded_changes_nothing(
    service: Served, folder: Path, tmp_path: Path, fault: str
) -> None:
    copy_pair((folder / "sft", folder / "step-5"), tmp_path)
    broken = tmp_path / "reference"
    if fault == "a flipped byte":
        content = bytearray((broken / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (broken / "model.safetensors").write_bytes(content)
    elif fault == "no manifest":
        (broken / MANIFEST_NAME).unlink()
    elif fault == "no folder":
        broken = tmp_path / "nothing"
    else:
        manifest = json.loads((broken / MANIFEST_NAME).read_text())
        (broken / MANIFEST_NAME).write_text(json.dumps(manifest | {"vocabulary": 7}))
    before = scored(service)
    refused = load(service, "half", tmp_path / "sft", broken)
    assert refusal(refused) == (422, "load_failed")
    assert str(broken) in refused.text or "vocabularies" in refused.text
    assert (scored(service)["model"], service.client.get("/ready").status_code) == (before["model"], 200)
    assert load(service, "half", folder / "sft", folder / "step-10").status_code == 200
    assert scored(service)["model"] == before["model"]


def test_nothing_outside_the_folder_of_checkpoints_is_loaded(folder: Path, tmp_path: Path) -> None:
    copy_pair((folder / "sft", folder / "step-5"), tmp_path)
    inside = folder / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(tmp_path / "sft")
    manifest = json.loads((tmp_path / "sft" / MANIFEST_NAME).read_text())
    for name, change in (("source", {"source": str(tmp_path / "sft")}), ("base", {"adapter_base": "/etc"})):
        (inside / name).mkdir()
        (inside / name / MANIFEST_NAME).write_text(json.dumps(manifest | change))
    shutil.copytree(folder / "sft", inside / "weights")
    (inside / "weights" / "model.safetensors").unlink()
    (inside / "weights" / "model.safetensors").symlink_to(tmp_path / "sft" / "model.safetensors")
    with serving(folder) as running:
        for sft in (
            tmp_path / "sft",
            inside / "weights",
            inside / "link",
            inside / "source",
            inside / "base",
            inside / ".." / ".." / "x",
        ):
            refused = load(running, "half", sft, folder / "step-5")
            assert refusal(refused) == (422, "load_failed")
            assert "--checkpoints-folder" in refused.text


def test_pairs_are_loaded_over_http_only_where_their_folder_and_a_key_say_so(folder: Path) -> None:
    with served() as running:
        refused = load(running, "half", folder / "sft", folder / "step-5")
        assert refusal(refused) == (403, "forbidden")
        assert "--api-keys-file" in refused.text
    with served(api_keys_file=folder / "keys.json") as running:
        running.client.headers["Authorization"] = f"Bearer {KEY}"
        refused = load(running, "half", folder / "sft", folder / "step-5")
        assert refusal(refused) == (403, "forbidden")
        assert "--checkpoints-folder" in refused.text


def test_one_pair_is_loaded_at_a_time_and_its_progress_is_reported(folder: Path) -> None:
    gate, load_now = Gate(), loader("torch")

    def load_later(settings: Settings, report: Callable[[str], None], on_device: OnDevice) -> LoadedPair:
        if settings.name != "half":
            report("taking its time")
            gate(())
        return load_now(settings, report, on_device)

    with serving(folder, load=load_later) as running, ThreadPoolExecutor(1) as pool:
        early = pool.submit(load, running, "early", folder / "sft", folder / "step-5")
        wait_until(gate.entered.is_set)
        models = running.client.get("/admin/models").json()
        assert models["loading"] == {"name": "early", "progress": "taking its time"}
        assert [card["name"] for card in models["models"]] == ["half"]
        assert refusal(load(running, "late", folder / "sft", folder / "step-15")) == (409, "loading")
        scored(running)
        gate.opened.set()
        assert early.result(PATIENCE_S).status_code == 200
        assert running.client.get("/admin/models").json()["loading"] is None
        scored(running, "early")


def test_a_student_that_pinned_its_teacher_never_learns_from_the_pair_that_replaced_it(folder: Path) -> None:
    with serving(folder) as running:

        def taught(name: str) -> httpx2.Response:
            body = {"model": name, "prompt": [1, 2, 3], "max_tokens": 1, "prompt_logprobs": 1}
            return running.client.post("/v1/completions", json=body)

        pinned = running.client.get("/teacher/half:reference/v1/models").json()["data"][0]["id"]
        assert re.fullmatch("half@[0-9a-f]{16}:reference", pinned)
        before = taught(pinned).json()["choices"]
        assert taught("half:reference").json()["choices"] == before
        assert load(running, "half", folder / "sft", folder / "step-5").status_code == 200
        assert taught("half:reference").json()["choices"] != before
        assert refusal(taught(pinned)) == (404, "model_not_found")
        assert load(running, "half", folder / "sft", folder / "step-10").status_code == 200
        assert taught(pinned).json()["choices"] == before


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a priority for each thread")
def test_a_pair_that_is_loaded_beside_others_gives_way_to_their_requests(folder: Path) -> None:
    found: dict[str, tuple[int, int]] = {}
    load_now, ours = loader("torch"), os.getpriority(os.PRIO_PROCESS, os.getpid())

    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def load_niced(settings: Settings, report: Callable[[str], None], on_device: OnDevice) -> LoadedPair:
        found[settings.name] = niceness(), on_device(niceness)
        return load_now(settings, report, on_device)

    with serving(folder, load=load_niced) as running:
        assert load(running, "early", folder / "sft", folder / "step-5").status_code == 200
    assert found == {"half": (ours, ours), "early": (min(ours + 10, 19), ours)}


def test_a_pair_is_removed_but_not_the_one_that_nameless_requests_mean(service: Served, folder: Path) -> None:
    load(service, "early", folder / "sft", folder / "step-5")
    assert refusal(remove(service, "half")) == (409, "in_use")
    assert remove(service, "early").json() == {"removed": "early"}
    assert refusal(remove(service, "early")) == (404, "model_not_found")
    assert refusal(service.score(IDS | {"model": "early"})) == (404, "model_not_found")
    scored(service)


def test_every_answer_names_the_revision_that_it_is_of_while_pairs_change(folder: Path) -> None:
    """Sends requests without pause during several switches; every second switch is to a broken pair."""
    steps = (5, 10, 15)
    with serving(folder) as running, ThreadPoolExecutor(4) as pool:
        expected = {}
        for step in steps:
            assert load(running, "half", folder / "sft", folder / f"step-{step}").status_code == 200
            answer = scored(running)
            expected[answer["model"]["revision"]] = rewards(answer)  # type: ignore[index]
        assert len(expected) == len(steps)
        answers: list[dict[str, object]] = []
        stop = False

        def keep_asking() -> None:
            while not stop:
                answers.append(scored(running))

        tasks = [pool.submit(keep_asking) for _ in range(4)]
        for turn in range(6):
            load(running, "half", folder / "sft", folder / ("nothing" if turn % 2 else f"step-{steps[turn % 3]}"))
            enough = len(answers) + 2 * len(tasks)  # so that each task has sent a request since the switch
            wait_until(lambda enough=enough: len(answers) >= enough)  # type: ignore[misc]
        stop = True
        for task in tasks:
            task.result(PATIENCE_S)
    assert {answer["model"]["revision"] for answer in answers} == set(expected)  # type: ignore[index]
    for answer in answers:
        for found, row in zip(rewards(answer), expected[answer["model"]["revision"]], strict=True):  # type: ignore[index]
            assert found == pytest.approx(row, abs=1e-4)


def test_several_pairs_are_served_from_a_file(folder: Path, tmp_path: Path) -> None:
    pairs = [{"name": f"step-{s}", "sft": str(folder / "sft"), "reference": str(folder / f"step-{s}")} for s in (5, 10)]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    with served(loader("torch"), pairs_file=tmp_path / "pairs.json") as running:
        assert scored(running)["model"] == scored(running, "step-5")["model"] != scored(running, "step-10")["model"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "at least 1 item"),
        ('[{"name": "a", "sft": "b"}]', "0: .* give sft and reference, or token_head alone; this has sft"),
        ('[{"name": "a/b", "sft": "b", "reference": "c"}]', "0.name"),
        ('[{"name": "a", "sft": "b", "reference": "c", "x": 1}]', "0.x: Extra inputs"),
        (json.dumps([{"name": "a", "sft": "b", "reference": "c"}] * 2), "two entries have the same name"),
    ],
)
def test_a_wrong_file_of_pairs_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "pairs.json").write_text(text)
    with pytest.raises(SettingsError, match=reason):
        first_pairs(Settings.model_validate({"pairs_file": tmp_path / "pairs.json"}))


def test_servers_compute_one_pair(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="serves one pair"):
        first_pairs(Settings.model_validate({"pairs_file": tmp_path / "pairs.json", "engine": "remote"}))


def test_pairs_come_either_from_a_file_or_from_the_settings(tmp_path: Path) -> None:
    both = Settings.model_validate({"pairs_file": tmp_path / "pairs.json", "sft": tmp_path, "reference": tmp_path})
    with pytest.raises(SettingsError, match="either --pairs-file"):
        first_pairs(both)
    with pytest.raises(SettingsError, match="No such file"):
        first_pairs(Settings.model_validate({"pairs_file": tmp_path / "pairs.json"}))
