"""No bad folder, manifest or file gives a traceback: each is refused in one line, which names the cure."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from broken_files import BROKEN
from damaged_checkpoints import DAMAGED, tiny_llama, write_model
from data_files import CORPUS
from dense_reward import cli
from dense_reward.checkpoints.adopt import adopt
from dense_reward.engines import tokenizer as tokenizer_module
from dense_reward.engines.torch.load import LoadContext, ServingOptions, load_pair
from dense_reward.errors import CheckpointError
from dense_reward.hashed_files import MANIFEST_NAME

pytestmark = pytest.mark.slow
LONG = "x" * 5_000
Fields = dict[str, object]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    for seed, role in ((1, "sft"), (2, "reference")):
        adopt(str(write_model(folder / role, tiny_llama(seed))), role=role, run_id="mine")  # type: ignore[arg-type]
    return folder


def test_the_corpus_has_over_200_bad_folders_and_files() -> None:
    """Each is tried by a test that a traceback fails: here, in test_damaged_checkpoints and in test_sources."""
    files = [each for each in CORPUS if each.refused is not None]
    assert len(BROKEN) >= 50
    assert len(DAMAGED) >= 50
    assert len(BROKEN) + len(DAMAGED) + len(MANIFESTS) + len(files) >= 150


@pytest.mark.parametrize("name", BROKEN)
def test_adoption_refuses_broken_files_in_one_line(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(tokenizer_module, "RENDERING_S", 0.5)
    folder = tmp_path / "broken"
    shutil.copytree(pair / "sft", folder)
    (folder / MANIFEST_NAME).unlink()
    BROKEN[name].change(folder)
    assert cli.main(["adopt", str(folder), "--role", "sft", "--run-id", "mine"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dense-reward: ")]
    assert len(lines) == 1
    assert re.search(BROKEN[name].says, lines[0]), lines[0]
    assert not (folder / MANIFEST_NAME).is_file()


def fields(**changes: object) -> Callable[[Fields], object]:
    return lambda manifest: manifest.update(changes)


def first_probe(**changes: object) -> Callable[[Fields], object]:
    def apply(manifest: Fields) -> None:
        probe = manifest["probe"]
        assert isinstance(probe, list)
        probe[0].update(changes)

    return apply


MANIFESTS: dict[str, tuple[Callable[[Fields], object], str]] = {
    "a later version": (fields(manifest_version=2), "another version of manifests .2, this program reads 1"),
    "an unknown field": (fields(colour="red"), "colour: Extra inputs are not permitted"),
    "no role": (lambda manifest: manifest.pop("role"), "role: Field required"),
    "a role that is none": (fields(role="teacher"), "role: Input should be"),
    "a vocabulary in words": (fields(vocabulary="many"), "vocabulary: Input should be a valid integer"),
    "a vocabulary that is too small": (fields(vocabulary=10), "is not in the vocabulary of 10"),
    "an end of turn beyond the vocabulary": (fields(end_of_turn_id=99_999), "the id 99999 is not in the vocabulary"),
    "a negative end of turn": (fields(end_of_turn_id=-1), "the id -1 is not in the vocabulary"),
    "a probe without a prompt": (first_probe(prompt_ids=[]), "prompt_ids: Tuple should have at least 1 item"),
    "a probe beyond the vocabulary": (first_probe(prompt_ids=[1 << 40]), "is not in the vocabulary"),
    "a probe of another prompt": (first_probe(prompt_ids=[1, 2, 3]), "computed wrong"),
    "no probe": (fields(probe=[]), "has an empty probe"),
    "a dtype that is none": (fields(dtype="int8"), "cannot be served in dtype 'int8'"),
    "a date that is none": (fields(template_date="2024-13-01"), "month must be in 1..12"),
    "files that are a list": (fields(files=[]), "files: Input should be an object"),
    "no files": (fields(files={}), "is not in manifest.json"),
    "a file outside": (fields(files={"../../x": "0"}), "x is missing"),
    "a source that is gone": (fields(source="/gone"), "/gone: .* missing .*manifest.json names that folder"),
    "a source too long for a path": (fields(source="/" + LONG), "the checkpoint's files are missing"),
    "a base too long for a path": (fields(adapter_base=LONG), "is not there"),
    "a base that is gone": (fields(adapter_base="./gone"), "its base model ./gone is not there"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_damaged_manifest_is_refused_at_load(pair: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "sft"
    shutil.copytree(pair / "sft", folder)
    change, says = MANIFESTS[name]
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    change(manifest)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=says):
        load_pair(folder, pair / "reference", ServingOptions(max_batch_tokens=1000), LoadContext(lambda _: None))


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"[" * 100_000, b"\xff\xfe{"], ids=range(5))
def test_a_manifest_that_is_no_object_is_refused(pair: Path, tmp_path: Path, text: bytes) -> None:
    folder = tmp_path / "sft"
    shutil.copytree(pair / "sft", folder)
    (folder / MANIFEST_NAME).write_bytes(text)
    with pytest.raises(CheckpointError, match=r"manifest.json is not a manifest: .* \(adopt the checkpoint again\)"):
        load_pair(folder, pair / "reference", ServingOptions(max_batch_tokens=1000), LoadContext(lambda _: None))


@pytest.mark.parametrize("source", [LONG, "org/" + "y" * 300, "\0", "https://x/y", "C:\\models", "org/"], ids=range(6))
def test_a_source_that_is_no_folder_and_no_hub_id_is_refused(source: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        adopt(source, role="sft", fetch=lambda name, _: pytest.fail(name))
