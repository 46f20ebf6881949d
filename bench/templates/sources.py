"""Public chat templates by name, and where they are read from. None of them is part of this repository."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import urlopen

TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository on GitHub at a commit or tag. `place`: the folder of its templates. `names`: without .jinja."""

    name: str
    commit: str
    place: str
    names: tuple[str, ...]
    indented: bool = False

    @property
    def short(self) -> str:
        return self.name.partition("/")[2]

    def url(self, name: str) -> str:
        return f"https://github.com/{self.name}/raw/{self.commit}/{quote(self.place)}/{quote(name)}.jinja"


LLAMA_CPP = """
    Apertus-8B-Instruct Apriel-1.6-15b-Thinker-fixed Bielik-11B-v3.0-Instruct ByteDance-Seed-OSS Cohere2MoE
    CohereForAI-c4ai-command-r-plus-tool_use CohereForAI-c4ai-command-r7b-12-2024-tool_use GLM-4.6 GLM-4.7-Flash
    GigaChat3-10B-A1.8B GigaChat3.1-10B-A1.8B HuggingFaceTB-SmolLM3-3B Kimi-K2-Instruct Kimi-K2-Thinking Kimi-K3
    LFM2-8B-A1B LFM2.5-8B-A1B LFM2.5-Instruct MiMo-VL MiniMax-M1 MiniMax-M2 MiniMax-M3
    Mistral-Small-3.2-24B-Instruct-2506 NVIDIA-Nemotron-3-Nano-30B-A3B-BF16 NVIDIA-Nemotron-Nano-v2
    NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use NousResearch-Hermes-3-Llama-3.1-8B-tool_use Qwen-QwQ-32B
    Qwen-Qwen2.5-7B-Instruct Qwen-Qwen3-0.6B Qwen3-Coder Qwen3.5-4B Reka-Edge Spark2.5 StepFun3.5-Flash
    deepseek-ai-DeepSeek-R1-Distill-Llama-8B deepseek-ai-DeepSeek-R1-Distill-Qwen-32B deepseek-ai-DeepSeek-V3.1
    deepseek-ai-DeepSeek-V3.2 deepseek-ai-DeepSeek-V4-Flash-0731 deepseek-ai-DeepSeek-V4
    fireworks-ai-llama-3-firefunction-v2 google-gemma-2-2b-it google-gemma-4-31B-it-interleaved
    google-gemma-4-31B-it ibm-granite-granite-3.3-2B-Instruct ibm-granite-granite-4.0 ibm-granite-granite-4.1
    inclusionai-ling-3.0-flash llama-cpp-deepseek-r1 llama-cpp-rwkv-world meetkai-functionary-medium-v3.1
    meetkai-functionary-medium-v3.2 meta-llama-Llama-3.1-8B-Instruct meta-llama-Llama-3.2-3B-Instruct
    meta-llama-Llama-3.3-70B-Instruct microsoft-Phi-3.5-mini-instruct mistralai-Ministral-3-14B-Reasoning-2512
    mistralai-Mistral-Nemo-Instruct-2407 moonshotai-Kimi-K2 muse-glimmer openai-gpt-oss-120b openbmb-MiniCPM5-1B
    poolside-Laguna-S-2.1 poolside-Laguna-XS-2.1 poolside-Laguna-XS.2 tencent-Hy3 unsloth-Apriel-1.5
    unsloth-mistral-Devstral-Small-2507 upstage-Solar-Open-100B
"""
TRL = """
    cohere cohere2 deepseekv3 diffusion_gemma gemma gemma3 glm4moe gptoss idefics3 lfm2 lfm2_2_5 llama3 llama3_1
    llama3_2 llava_next nemotron_3_nano nemotron_3_super nemotron_3_ultra phi3 phi3_5 qwen2_5 qwen2_5_vl qwen3
    qwen3_5_nothink qwen3_5_think qwen3_6 qwen3_instruct_2507 qwen3_vl
"""
VLLM = """
    template_alpaca template_chatglm template_chatglm2 template_chatml template_falcon template_falcon_180b
    template_inkbot template_teleflm tool_chat_template_apertus tool_chat_template_deepseekr1
    tool_chat_template_deepseekv3 tool_chat_template_deepseekv31 tool_chat_template_functiongemma
    tool_chat_template_gemma3_pythonic tool_chat_template_gemma4 tool_chat_template_glm4
    tool_chat_template_granite tool_chat_template_granite_20b_fc tool_chat_template_hermes
    tool_chat_template_hunyuan_a13b tool_chat_template_internlm2_tool tool_chat_template_llama3.1_json
    tool_chat_template_llama3.2_json tool_chat_template_llama3.2_pythonic tool_chat_template_llama4_json
    tool_chat_template_llama4_pythonic tool_chat_template_mistral tool_chat_template_mistral3
    tool_chat_template_mistral_parallel tool_chat_template_muse_glimmer tool_chat_template_phi4_mini
    tool_chat_template_qwen3coder tool_chat_template_toolace tool_chat_template_xlam_llama
    tool_chat_template_xlam_qwen
"""
CHAT_TEMPLATES = """
    alpaca amberchat chatml chatqa falcon-instruct gemma-it granite-3.0-instruct llama-2-chat llama-3-instruct
    mistral-instruct openchat-3.5 phi-3-small phi-3 qwen2.5-instruct saiga solar-instruct vicuna zephyr
"""
REPOSITORIES = (
    Repository("ggml-org/llama.cpp", "0c1e57098", "models/templates", tuple(LLAMA_CPP.split())),
    Repository("huggingface/trl", "f2cd57710ae345ea6428ae95363267fcf38a3dc8", "trl/chat_templates", tuple(TRL.split())),
    Repository("vllm-project/vllm", "v0.32.0", "examples", tuple(VLLM.split())),
    Repository(
        "chujiezheng/chat_templates",
        "11c495621569969f264ee70b5c8bb49ba7a1a410",
        "chat_templates",
        tuple(CHAT_TEMPLATES.split()),
        indented=True,
    ),
)
SPACED = frozenset({"amberchat", "llama-2-chat", "mistral-instruct", "vicuna", "zephyr"})
"""Templates of models with the vocabulary of Llama 2, which puts a space before a text."""


@dataclass(frozen=True, slots=True)
class Template:
    """`spaced`: see SPACED."""

    repository: str
    name: str
    source: str
    spaced: bool


def templates(folder: Path | None = None) -> Iterator[Template]:
    """Each template, from `folder`/REPOSITORY/NAME.jinja, or downloaded if no folder is given.

    Raises SystemExit if one cannot be read.
    """
    for repository in REPOSITORIES:
        for name in repository.names:
            source = _read(folder / repository.short / f"{name}.jinja") if folder else _download(repository.url(name))
            if repository.indented:  # its README: remove line breaks and indentation before use
                source = source.replace("    ", "").replace("\n", "")
            yield Template(repository.short, name, source, repository.indented and name in SPACED)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise SystemExit(f"{path} cannot be read ({error.strerror}): copy the template there") from None


def _download(url: str) -> str:
    try:
        with urlopen(url, timeout=TIMEOUT_S) as answer:
            return str(answer.read().decode())
    except (URLError, TimeoutError) as error:
        raise SystemExit(f"{url} cannot be downloaded ({error}): give the templates with --folder FOLDER") from None
