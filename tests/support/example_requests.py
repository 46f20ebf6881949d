"""The requests of the OpenAPI document's examples, in the order in which one service gets them."""

from collections.abc import Mapping

from dense_reward.http.openapi.examples import Example
from dense_reward.http.openapi.operations import JSON, TEXT

SHOWN = "/checkpoints"
"""What the examples have in place of the folder of the pair."""
QUESTION = "Add 11 and 31."
IDS = {"prompt_ids": [35, 66, 66], "response_ids": [[23, 21, 3], [23, 22, 3]]}
EVERYTHING = ["token_ids", "tokens", "offsets", "text", "reward", "sft_logprob", "reference_logprob", "kl", "centred"]
EVERYTHING += ["entropy", "varentropy", "return_to_go", "candidate_sft_logprob"]
CHAT = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "42"}]
VLLM = {"max_tokens": 1, "prompt_logprobs": 2}
SGLANG = {"sampling_params": {"max_new_tokens": 0}, "return_logprob": True, "logprob_start_len": 1}
TEACHER = {"teacher": "default:tilted=1"}


def _asked(
    name: str,
    summary: str,
    place: str,
    request: object = None,
    *,
    parameters: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
    media_type: str = JSON,
) -> Example:
    method, path = place.split()
    return Example(name, summary, method, path, 0, None, request, headers or {}, parameters or {}, media_type)


REQUESTS = [
    _asked("responses", "Two responses to one prompt", "POST /score", {"prompt": QUESTION, "responses": ["42", "43"]}),
    _asked(
        "chat",
        "A chat, its last message scored, with the two likeliest ids at each token",
        "POST /score",
        {"messages": CHAT, "include": ["tokens", "reward"], "top_k": 2},
    ),
    _asked(
        "token_ids",
        "Token ids, with arrays as base64",
        "POST /score",
        IDS | {"include": ["reward", "kl"], "encoding_format": "base64"},
    ),
    _asked(
        "everything",
        "All arrays, candidates in place of each token, and sums of segments",
        "POST /score",
        {
            "prompt_ids": [35, 66, 66],
            "response_ids": [[23, 21]],
            "candidate_ids": [[[22, 24], [20, 25]]],
            "segments": [[[0, 1], [0, 2]]],
            "include": EVERYTHING,
            "gamma": 0.9,
        },
    ),
    _asked(
        "one_bad_item",
        "Several items, of which one cannot be scored",
        "POST /score",
        {
            "items": [{"prompt": QUESTION, "response": "42"}, {"prompt": "", "response": "43"}],
            "include": [],
            "on_error": "per_item",
        },
    ),
    _asked(
        "heatmap_json",
        "The data of a heatmap",
        "POST /heatmap",
        {"prompt": QUESTION, "response": "42", "format": "json", "include": ["text", "offsets", "reward"]},
    ),
    _asked(
        "heatmap_ansi",
        "A heatmap for a terminal",
        "POST /heatmap",
        {"prompt": QUESTION, "response": "42", "format": "ansi"},
        media_type=TEXT,
    ),
    _asked("models", "One pair", "GET /models"),
    _asked(
        "get_reward",
        "Two responses, decoded with their special tokens",
        "POST /get_reward",
        {"query": [f"{QUESTION}42<|im_end|>", f"{QUESTION}43<|im_end|>"], "prompts": [QUESTION, QUESTION]},
    ),
    _asked("teachers", "The two models of one pair", "GET /v1/models"),
    _asked(
        "completions", "One sequence", "POST /v1/completions", {"model": "default", "prompt": [35, 66, 23, 21], **VLLM}
    ),
    _asked(
        "generate",
        "One sequence",
        "POST /inference/v1/generate",
        {"model": "default:reference", "token_ids": [35, 66, 23, 21], "sampling_params": VLLM},
    ),
    _asked(
        "generate_sglang",
        "One sequence, from its second id on",
        "POST /generate",
        {"input_ids": [35, 66, 23, 21], "top_logprobs_num": 2, **SGLANG},
    ),
    _asked("teacher", "A tilted teacher", "GET /teacher/{teacher}/v1/models", parameters=TEACHER),
    _asked(
        "completions_of",
        "Two sequences",
        "POST /teacher/{teacher}/v1/completions",
        {"prompt": [[35, 66, 23], [35, 66, 24]], "max_tokens": 0, "prompt_logprobs": 1},
        parameters=TEACHER,
    ),
    _asked(
        "generate_of",
        "One sequence",
        "POST /teacher/{teacher}/inference/v1/generate",
        {"token_ids": [35, 66, 23, 21], "sampling_params": VLLM},
        parameters=TEACHER,
    ),
    _asked(
        "generate_sglang_of",
        "Two sequences, and the ids whose log-probs are wanted at each position",
        "POST /teacher/{teacher}/generate",
        {"input_ids": [[35, 66, 23], [35, 66, 24]], "token_ids_logprob": [20, 21], **SGLANG},
        parameters=TEACHER,
    ),
    _asked("teacher_ready", "It is", "GET /teacher/{teacher}/health", parameters=TEACHER),
    _asked("health", "It works", "GET /health"),
    _asked("ready", "It is", "GET /ready"),
    _asked(
        "load_pair",
        "A pair with an earlier reference",
        "POST /admin/models",
        {"name": "early", "sft": f"{SHOWN}/sft", "reference": f"{SHOWN}/early"},
    ),
    _asked("loaded", "Two pairs", "GET /admin/models"),
    _asked("remove_pair", "The pair is no longer served", "DELETE /admin/models/{name}", parameters={"name": "early"}),
    _asked("invalid_json", "JSON that ends too early", "POST /score", "{"),
    _asked("invalid_unicode", "Half of a surrogate pair", "POST /score", '{"text": "\\ud800"}'),
    _asked("invalid_encoding", "Plain JSON, sent as gzip", "POST /score", {}, headers={"Content-Encoding": "gzip"}),
    _asked("not_found", "A file that does not exist", "GET /web/{file}", parameters={"file": "page.gif"}),
    _asked("model_not_found", "A pair that is not served", "POST /score", IDS | {"model": "halfway"}),
    _asked("in_use", "The first pair cannot be removed", "DELETE /admin/models/{name}", parameters={"name": "default"}),
    _asked("tokenizer_mismatch", "Ids of another tokenizer", "POST /score", IDS | {"tokenizer_sha256": "51f2d8"}),
    _asked("revision_mismatch", "The checkpoints were changed", "POST /score", IDS | {"expect_revision": "9be1c0"}),
    _asked("unsupported_media_type", "No JSON", "POST /score", {}, headers={"Content-Type": "text/plain"}),
    _asked("invalid_request", "An option out of its range", "POST /score", IDS | {"gamma": 1.5}),
    _asked("empty_prompt", "No id before the response", "POST /score", {"prompt_ids": [], "response_ids": [[1]]}),
    _asked("too_long", "More tokens than fit", "POST /score", {"prompt": QUESTION, "response": "42 " * 40}),
    _asked(
        "unknown_token_id", "An id above the vocabulary", "POST /score", {"prompt_ids": [9999], "response_ids": [[1]]}
    ),
    _asked("wrong_shape", "Segments of one response are missing", "POST /score", IDS | {"segments": [[[0, 1]]]}),
    _asked(
        "bad_template", "A renderer without tools", "POST /score", {"messages": CHAT, "tools": [{"type": "function"}]}
    ),
    _asked(
        "load_failed",
        "A folder that holds no checkpoint",
        "POST /admin/models",
        {"name": "early", "sft": f"{SHOWN}/none", "reference": f"{SHOWN}/early"},
    ),
]
