"""Prompts of this service and of vLLM, compared id by id: `python -m bench.rendering`.

Writes bench/results/rendering.json. Public chat templates (downloaded, or from `--folder FOLDER`: see bench.templates)
render the chats below by this service and by vLLM: as its server does, from a request to /tokenize, and as its method
LLM.chat does. Run it in an environment with vLLM; no model and no GPU are needed. `python -m bench.templates page` then
writes the table.
"""

import argparse
import copy
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from dense_reward.engines.tokenizer import TransformersTokenizer
from dense_reward.errors import RequestError
from dense_reward.text.encode import Encoder
from dense_reward.text.special_tokens import JsonValue, Message
from dense_reward.text.template import TemplateChoices
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from bench.templates.sources import Template, templates
from bench.templates.vocabulary import family_of, tokenizer_for

RESULTS = Path(__file__).resolve().parent / "results" / "rendering.json"
RENDERED = (
    "Qwen-Qwen3-0.6B",
    "Qwen3.5-4B",
    "Qwen3-Coder",
    "meta-llama-Llama-3.1-8B-Instruct",
    "mistralai-Mistral-Nemo-Instruct-2407",
    "openai-gpt-oss-120b",
    "deepseek-ai-DeepSeek-V3.1",
    "GLM-4.6",
    "ibm-granite-granite-4.0",
    "MiniMax-M2",
    "moonshotai-Kimi-K2",
    "google-gemma-4-31B-it",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use",
    "gemma3",
    "tool_chat_template_hermes",
)
"""Templates of each kind, those with tool calls among them."""
Render = Callable[[Sequence[Message], Sequence[JsonValue] | None], list[int]]


def _tool(name: str, **properties: str) -> JsonValue:
    described: JsonValue = {key: {"type": kind, "description": f"the {key}"} for key, kind in properties.items()}
    parameters: JsonValue = {"type": "object", "properties": described, "required": sorted(properties)}
    return {
        "type": "function",
        "function": {"name": name, "description": f"Tells the {name}", "parameters": parameters},
    }


def _call(identifier: str, name: str, arguments: JsonValue) -> JsonValue:
    """A call in the order of keys in which OpenAI's client writes it and vLLM's server reads it."""
    return {"id": identifier, "function": {"arguments": arguments, "name": name}, "type": "function"}


def _said(role: str, content: JsonValue, **others: JsonValue) -> Message:
    return {"role": role, "content": content, **others}


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat up to the assistant's answer."""

    name: str
    messages: tuple[Message, ...]
    tools: tuple[JsonValue, ...] | None = None


TOOLS = (_tool("weather", city="string", days="integer"), _tool("time", zone="string"))
ASKED = _said("user", "What is the weather in Oslo?")
CALLED = _call("abcdefgh1", "weather", '{"city": "Oslo", "days": 2}')
RESULT = _said("tool", '{"celsius": 4.0}', tool_call_id="abcdefgh1", name="weather")
CHATS = (
    Chat("one message", (_said("user", "Hello, world!"),)),
    Chat("system", (_said("system", "Be brief."), _said("user", "Name a prime."))),
    Chat(
        "several turns",
        (
            _said("system", "You add numbers."),
            *(_said("user", "12 + 34"), _said("assistant", "46"), _said("user", "and 7?"), _said("assistant", "53")),
            _said("user", "  Thanks!\n\nOnce more?  "),
        ),
    ),
    Chat("tools", (_said("system", "Use tools."), ASKED), TOOLS),
    Chat("call with null content", (ASKED, _said("assistant", None, tool_calls=[CALLED]), RESULT), TOOLS),
    Chat("call without content", (ASKED, {"role": "assistant", "tool_calls": [CALLED]}, RESULT), TOOLS),
    Chat(
        "text beside a call, and no arguments",
        (
            *(_said("system", "Use tools."), ASKED),
            _said("assistant", "I will look.", tool_calls=[_call("abcdefgh2", "time", "")]),
            _said("tool", "12:00", tool_call_id="abcdefgh2"),
        ),
        TOOLS,
    ),
    Chat(
        "two calls at once, then another turn",
        (
            ASKED,
            _said("assistant", None, tool_calls=[CALLED, _call("abcdefgh3", "time", '{"zone": "Europe/Oslo"}')]),
            *(RESULT, _said("tool", "12:00", tool_call_id="abcdefgh3", name="time")),
            *(_said("assistant", "4 degrees at noon."), _said("user", "Thanks. And in 数学 naïve?")),
        ),
        TOOLS,
    ),
    Chat(
        "parts",
        (
            _said("system", [{"type": "text", "text": "Be brief."}]),
            _said("user", [{"type": "text", "text": "First."}, {"type": "text", "text": "Second, {{ 1 }}."}]),
        ),
    ),
    Chat(
        "result in parts, nested arguments",
        (
            ASKED,
            _said(
                "assistant", "", tool_calls=[_call("abcdefgh4", "weather", '{"city": ["Å", {"x": null}], "days": 1e2}')]
            ),
            _said("tool", [{"type": "text", "text": "4"}, {"type": "text", "text": "5"}], tool_call_id="abcdefgh4"),
        ),
        TOOLS,
    ),
    Chat("developer", (_said("developer", "Be brief."), _said("user", "Name a prime."))),
    Chat("developer after system", (_said("system", "Be kind."), _said("developer", "Be brief."), _said("user", "Hi"))),
)


def with_name_first(messages: Sequence[Message]) -> list[Message]:
    """The messages with the keys of each call in the order in which people write them: name before arguments."""
    return [_with_name_first(message) for message in messages]


def _with_name_first(message: Message) -> Message:
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_name_first(call) for call in calls]} if isinstance(calls, Sequence) else message


def _name_first(call: JsonValue) -> JsonValue:
    assert isinstance(call, Mapping)
    function = call["function"]
    assert isinstance(function, Mapping)
    ordered: JsonValue = {"name": function["name"], "arguments": function["arguments"]}
    return {"id": call["id"], "type": call["type"], "function": ordered}


def vllm_renders(folder: Path) -> tuple[Render, Render]:
    """vLLM's rendering of chats with the tokenizer of a model folder: as its server does it, and as LLM.chat does."""
    from vllm.config import ModelConfig, VllmConfig  # noqa: PLC0415
    from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest  # noqa: PLC0415
    from vllm.exceptions import VLLMClientError  # noqa: PLC0415
    from vllm.renderers.registry import renderer_from_config  # noqa: PLC0415

    renderer = renderer_from_config(VllmConfig(model_config=ModelConfig(model=str(folder))))

    def rendered(request: TokenizeChatRequest, messages: Sequence[Message], tools: JsonValue) -> list[int]:
        params = request.build_chat_params(None, "auto").with_defaults({"tools": tools, "tokenize": False})
        try:
            _, prompts = renderer.render_chat([messages], params, request.build_tok_params(renderer.model_config))
        except VLLMClientError as error:
            raise ValueError(str(error)) from error
        return list(prompts[0]["prompt_token_ids"])

    def as_the_server(messages: Sequence[Message], tools: Sequence[JsonValue] | None) -> list[int]:
        request = TokenizeChatRequest.model_validate_json(json.dumps({"messages": messages, "tools": tools}))
        return rendered(request, request.messages, None if tools is None else [t.model_dump() for t in request.tools])

    def as_llm_chat(messages: Sequence[Message], tools: Sequence[JsonValue] | None) -> list[int]:
        any_request = TokenizeChatRequest(messages=[{"role": "user", "content": "a"}])
        given = None if tools is None else list(tools)
        return rendered(any_request, copy.deepcopy(list(messages)), given)  # vLLM writes into the messages

    return as_the_server, as_llm_chat


@dataclass(frozen=True, slots=True)
class Comparison:
    """One chat, rendered by one way of vLLM and here. `ours`, `theirs`: ids, or the reason of a refusal."""

    chat: str
    way: str
    ours: list[int] | str
    theirs: list[int] | str

    @property
    def verdict(self) -> str:
        if isinstance(self.ours, str):
            return "refused by both" if isinstance(self.theirs, str) else "refused here"
        return "equal" if self.ours == self.theirs else "DIFFERENT"


def compare(folder: Path, chats: Sequence[Chat] = CHATS) -> list[Comparison]:
    """Every chat by every way, with the tokenizer and template of a model folder."""
    tokenizer = TransformersTokenizer(AutoTokenizer.from_pretrained(folder, local_files_only=True))
    encoder = Encoder(tokenizer, "chat", None, choices=TemplateChoices(response_prefix=""))
    as_the_server, as_llm_chat = vllm_renders(folder)
    comparisons = []
    for chat in chats:
        named_first = with_name_first(chat.messages)
        for way, render, messages in (
            ("server", as_the_server, chat.messages),
            ("LLM.chat", as_llm_chat, chat.messages),
            ("LLM.chat, name first", as_llm_chat, named_first),
        ):
            ours = _outcome(lambda m, t: encoder.chat_prompt(m, t).tolist(), messages, chat.tools)
            comparisons.append(Comparison(chat.name, way, ours, _outcome(render, messages, chat.tools)))
    return comparisons


def _outcome(render: Render, messages: Sequence[Message], tools: Sequence[JsonValue] | None) -> list[int] | str:
    try:
        return render(messages, tools)
    except (RequestError, ValueError) as error:
        return str(error)


def model_folder(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with the tokenizer and the configuration of a tiny model, without weights: all that rendering needs."""
    tokenizer.save_pretrained(folder)
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    return folder


def vllm_version() -> str:
    """The version of the installed package."""
    import vllm  # noqa: PLC0415

    return str(vllm.__version__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit code 1 if a prompt differs."""
    parser = argparse.ArgumentParser(prog="python -m bench.rendering", description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the templates lie: see python -m bench.templates")
    options = parser.parse_args(arguments)
    found: dict[str, Counter[str]] = {}
    for template in templates(options.folder):
        if template.name in RENDERED:
            found[f"{template.repository}/{template.name}"] = _verdicts(template)
    today = date.today().isoformat()  # noqa: DTZ011 - the day of the measurement
    versions = {"vllm": vllm_version()}
    result = {"date": today, "versions": versions, "chats": len(CHATS), "templates": found}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return int(any(verdicts["DIFFERENT"] for verdicts in found.values()))


def _verdicts(template: Template) -> Counter[str]:
    tokenizer = tokenizer_for(template.source, family_of(template.source, spaced=template.spaced))
    with tempfile.TemporaryDirectory() as folder:
        compared = compare(model_folder(Path(folder), tokenizer))
    verdicts = Counter(one.verdict for one in compared)
    print(f"{template.name}: {', '.join(f'{count} {verdict}' for verdict, count in verdicts.items())}")
    for one in compared:
        if one.verdict in {"DIFFERENT", "refused here"}:
            print(f"  {one.verdict}: {one.chat} ({one.way}){f': {one.ours}' if isinstance(one.ours, str) else ''}")
    return verdicts


if __name__ == "__main__":
    sys.exit(main())
