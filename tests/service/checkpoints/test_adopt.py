"""Checkpoints of other programs get a manifest, or a refusal that names the cure."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from dense_reward.checkpoints.adopt import adopt, download, locate
from dense_reward.checkpoints.probe import PROBE_TEXTS, ProbeIds, ProbeText, measure_probe
from dense_reward.engines.tokenizer import load_tokenizer
from dense_reward.engines.torch.load import LoadContext, ServingOptions, load_pair
from dense_reward.engines.torch.model import TorchModel
from dense_reward.engines.torch.weights import stored_dtype
from dense_reward.errors import CheckpointError
from dense_reward.hashed_files import MANIFEST_NAME
from dense_reward.manifest import load_manifest, verify_files
from peft import LoraConfig, get_peft_model
from tiny_configs import SPECIALS
from tiny_models import CHAT, tiny_model, write_tokenizer

# peft 0.21 asks transformers 5.23 for an attribute by its old name
OLD_NAME_IN_PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def made(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, template: str | None = CHAT) -> Path:
    """A checkpoint as any training program writes it: weights, configuration and tokenizer."""
    folder.mkdir(parents=True)
    tiny_model(seed=seed, dtype=dtype).save_pretrained(folder)
    write_tokenizer(folder, template=template)
    return folder


def made_adapter(folder: Path, base: Path) -> Path:
    adapter = get_peft_model(tiny_model(dtype=torch.float32), LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    adapter.peft_config["default"].base_model_name_or_path = str(base)
    adapter.save_pretrained(folder, save_embedding_layers=False)
    write_tokenizer(folder, template=CHAT)
    return folder


def refusal(source: str | Path, **options: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        adopt(str(source), role="sft", **options)  # type: ignore[arg-type]
    return str(caught.value)


def related(sft: Path, reference: Path, *, allow_unrelated: bool = False) -> bool:
    serving = ServingOptions(max_batch_tokens=1024, allow_unrelated=allow_unrelated)
    engine, _, _ = load_pair(sft, reference, serving, LoadContext(lambda _: None))
    return engine.info.related


def test_two_folders_adopted_with_one_run_id_are_a_pair(tmp_path: Path) -> None:
    sft = adopt(str(made(tmp_path / "a", seed=1)), role="sft", run_id="mine")
    reference = adopt(str(made(tmp_path / "b", seed=2)), role="reference", run_id="mine")
    assert (sft, reference) == (tmp_path / "a", tmp_path / "b")
    assert related(sft, reference)


def test_without_a_run_id_two_checkpoints_are_unrelated_but_can_be_served_so(tmp_path: Path) -> None:
    sft = adopt(str(made(tmp_path / "a", seed=1)), role="sft")
    reference = adopt(str(made(tmp_path / "b", seed=2)), role="reference")
    with pytest.raises(CheckpointError, match="different runs"):
        related(sft, reference)
    assert not related(sft, reference, allow_unrelated=True)


def test_the_manifest_says_what_the_files_say(tmp_path: Path) -> None:
    folder = made(tmp_path / "a", dtype=torch.bfloat16)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 123}))
    adopt(str(folder), role="policy")
    manifest = load_manifest(folder)
    verify_files(folder, manifest)
    assert (manifest.role, manifest.renderer, manifest.dtype) == ("policy", "chat", "bfloat16")
    assert manifest.optimiser_step == 123
    assert manifest.samples_processed is None, "an adopted checkpoint does not record it"
    assert manifest.end_of_turn_id == 256
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= manifest.files.keys()


def test_the_probe_covers_several_languages_maths_and_code(tmp_path: Path) -> None:
    manifest = load_manifest(adopt(str(made(tmp_path / "a")), role="sft"))
    assert len(manifest.probe) == len(PROBE_TEXTS)
    assert all(len(sequence.responses) >= 2 for sequence in manifest.probe)
    texts = "".join(text.prompt + "".join(text.responses) for text in PROBE_TEXTS)
    assert any(0x4E00 <= ord(c) <= 0x9FFF for c in texts)
    assert any(0x0600 <= ord(c) <= 0x06FF for c in texts)
    assert "def " in texts


def test_texts_of_ones_own_can_be_the_probe(tmp_path: Path) -> None:
    texts = [ProbeText("one", ("1", "eins")), ProbeText("two", ("2", "zwei"))]
    manifest = load_manifest(adopt(str(made(tmp_path / "a")), role="sft", texts=texts))
    assert len(manifest.probe) == 2


def test_adopting_again_replaces_the_manifest(tmp_path: Path) -> None:
    folder = adopt(str(made(tmp_path / "a")), role="sft", run_id="one")
    adopt(str(folder), role="reference", run_id="two", renderer="plain")
    manifest = load_manifest(folder)
    assert (manifest.role, manifest.run_id, manifest.renderer) == ("reference", "two", "plain")


def test_a_side_folder_holds_the_manifest_alone_and_names_the_source(tmp_path: Path) -> None:
    source = made(tmp_path / "a")
    out = adopt(str(source), role="sft", out=tmp_path / "side")
    assert [path.name for path in out.iterdir()] == [MANIFEST_NAME]
    assert not (source / MANIFEST_NAME).exists()
    manifest = load_manifest(out)
    assert manifest.source == "../a", "relative, so that both can be moved"
    verify_files(out, manifest)
    (source / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json does not match"):
        verify_files(out, manifest)


def test_a_hub_id_is_downloaded_and_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = made(tmp_path / "cache")
    asked: list[tuple[str, str | None]] = []

    def fetch(name: str, revision: str | None) -> Path:
        asked.append((name, revision))
        return cached

    monkeypatch.chdir(tmp_path)
    out = adopt("organisation/model@v2", role="sft", fetch=fetch)
    assert asked == [("organisation/model", "v2")]
    assert out == Path("adopted/organisation--model@v2")
    manifest = load_manifest(out)
    assert (manifest.source, manifest.base_model) == ("../../cache", "organisation/model@v2")
    assert not (cached / MANIFEST_NAME).exists()


@OLD_NAME_IN_PEFT
def test_an_adapter_is_adopted_with_its_base(tmp_path: Path) -> None:
    base = made(tmp_path / "base")
    adapter = adopt(str(made_adapter(tmp_path / "adapter", base)), role="sft", run_id="mine")
    manifest = load_manifest(adapter)
    assert manifest.adapter_base == "../base", "relative, so that both can be moved"
    assert "model.safetensors" in manifest.adapter_base_files
    assert related(adapter, adopt(str(base), role="reference", run_id="mine"))
    assert manifest.probe != load_manifest(base).probe, "the adapter is part of what is measured"


@OLD_NAME_IN_PEFT
def test_the_base_of_an_adapter_may_be_a_hub_id(tmp_path: Path) -> None:
    base = made(tmp_path / "base")
    adapter = made_adapter(tmp_path / "adapter", Path("organisation/base"))
    manifest = load_manifest(adopt(str(adapter), role="sft", fetch=lambda _, __: base))
    assert manifest.adapter_base == "../base"


def test_an_end_of_turn_can_be_named(tmp_path: Path) -> None:
    folder = made(tmp_path / "a")
    adopt(str(folder), role="sft", end_of_turn=SPECIALS[1])
    assert load_manifest(folder).end_of_turn_id == 257
    assert "must be one token, but 'bye' is 3" in refusal(folder, end_of_turn="bye")


def only_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def only_inner_checkpoints(folder: Path) -> None:
    (folder / "checkpoint-7").mkdir()
    shutil.move(folder / "model.safetensors", folder / "checkpoint-7")


def broken_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (only_bin, "has only pytorch_model.bin: only safetensors are loaded"),
        (no_tokenizer, "holds no tokenizer (neither tokenizer.json nor another vocabulary): copy"),
        (no_config, "no usable config.json"),
        (only_inner_checkpoints, "has no weights of its own: name one of checkpoint-7 in it"),
        (broken_adapter, "has no base_model_name_or_path"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(
    tmp_path: Path, break_it: Callable[[Path], None], reason: str
) -> None:
    folder = made(tmp_path / "a")
    break_it(folder)
    assert reason in refusal(folder)
    assert not (folder / MANIFEST_NAME).exists()


def test_other_formats_are_refused_with_the_way_to_convert_them(tmp_path: Path) -> None:
    folder = made(tmp_path / "a")
    only_bin(folder)
    assert f"from_pretrained('{folder}', dtype='auto').save_pretrained('OUT')" in refusal(folder)


def test_a_tokenizer_without_chat_template_needs_a_renderer(tmp_path: Path) -> None:
    folder = made(tmp_path / "a", template=None)
    assert "--renderer plain or --renderer instruction" in refusal(folder)
    adopt(str(folder), role="sft", renderer="instruction")
    assert load_manifest(folder).renderer == "instruction"


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "~/nowhere", "no/such/folder", "two words"])
def test_what_reads_as_a_path_is_not_looked_for_on_the_hub(source: str) -> None:
    def fetch(_: str, __: str | None) -> Path:
        raise AssertionError("asked the hub")

    with pytest.raises(CheckpointError, match="no such folder, and no hub id"):
        locate(source, fetch)


def test_without_a_network_a_hub_id_is_refused_in_plain_words() -> None:
    """The tests run offline."""
    with pytest.raises(CheckpointError, match=r"the model hub cannot be reached .*download it"):
        download("organisation/a-model-that-is-not-here", None)


def test_a_probe_has_two_prompts_with_two_responses_at_least() -> None:
    model = TorchModel(tiny_model())
    one = ProbeIds((1, 2), ((3,), (4, 5)))
    with pytest.raises(ValueError, match="at least two prompts"):
        measure_probe(model, [one])
    with pytest.raises(ValueError, match="two responses"):
        measure_probe(model, [one, ProbeIds((1,), ((2,),))])
    assert [len(sequence.responses) for sequence in measure_probe(model, [one, one])] == [2, 2]


def with_code(folder: Path, marker: Path, *, beside: bool) -> Path:
    """A checkpoint with its own code: in addition to classes of transformers if `beside`, else instead of them."""
    made(folder)
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\n")
    for name, autos in (("config.json", ["AutoConfig", "AutoModelForCausalLM"]), ("tokenizer_config.json", [])):
        content = json.loads((folder / name).read_text())
        content["auto_map"] = dict.fromkeys(autos, "code.Evil") if autos else {"AutoTokenizer": [None, "code.Evil"]}
        if not beside:
            content |= {"model_type": "evil"} if autos else {"tokenizer_class": "Evil"}
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("beside", [True, False])
def test_code_in_a_checkpoint_is_never_run_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    """If trust_remote_code is not set, transformers asks the user on the terminal."""
    marker = tmp_path / "it ran"
    folder = with_code(tmp_path / "evil", marker, beside=beside)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for read in (load_tokenizer, stored_dtype, lambda files: adopt(str(files), role="sft")):
        with suppress(CheckpointError, ValueError):
            read(folder)
    assert not marker.exists()
