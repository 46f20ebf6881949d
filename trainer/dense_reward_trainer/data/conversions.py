"""Layouts of known data sets and columns of a prompt that are not read directly, and the command that converts them.

A conversion is a Python expression over `rows`, the list of all rows. Pure functions of one row. Must not import files,
data sets, tokenizers or chat templates.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dense_reward_trainer.data.layouts import Layout, matching
from dense_reward_trainer.data.records import ChatMessage, LineError, RawRow
from dense_reward_trainer.data.row_values import is_empty, quoted_keys, texts_in

# The names of the task itself. Derived columns, such as original_question, are not part of a prompt.
_TASKS = frozenset(
    {"prompt", "instruction", "question", "query", "input", "problem"}
    | {"instructions", "task_description", "problem_description", "problem_statement", "input_text", "source_text"}
)
# The names of a response, and words in the names of what a model thinks before it.
_ANSWERS = frozenset({"response", "output", "completion", "answer", "solution", "target", "targets"})
_THOUGHTS = frozenset(
    {"reasoning", "thinking", "thought", "thoughts", "cot", "rationale", "trajectory", "trajectories"}
)
# Words in the names of columns that a model must see before it answers.
_AFTER_THE_TASK = frozenset({"choices", "options"})
_WORDS = _AFTER_THE_TASK | frozenset(
    (
        *("context", "contexts", "ctx", "background", "knowledge", "evidence", "evidences", "hint", "hints"),
        *("passage", "passages", "document", "documents", "docs", "paragraph", "paragraphs", "article", "articles"),
        *("excerpt", "excerpts", "snippet", "snippets", "story", "premise", "table", "tables", "schema", "schemas"),
        *("definition", "definitions", "starter"),
        *("history", "system", "persona", "examples", "shots", "demonstrations", "tools", "functions", "kwargs"),
        *("image", "images", "picture", "pictures", "audio", "audios", "video", "videos"),
    )
)
_FACTS = frozenset(
    (
        *("id", "ids", "idx", "index", "hash", "sha", "count", "num", "len", "length", "tokens", "level", "rating"),
        *("score", "scores", "category", "difficulty", "domain", "topic", "type", "types", "lang", "language"),
        *("name", "names", "title", "titles", "source", "sources", "url", "urls", "date", "time", "version"),
    )
)
_TURNS = (
    '(f := lambda t: [{"role": {"prompter": "user"}.get(t["role"], t["role"]), "content": t["text"]}]) and '
    '(g := lambda t, b: [b + f(t)] * (t["role"] == "assistant") + [x for s in '
    'sorted(t.get("replies") or (), key=lambda s: s.get("rank") or 0)[:1 if t["role"] == "prompter" else None] '
    "for x in g(s, b + f(t))]) and "
)


@dataclass(frozen=True, slots=True)
class KnownLayout:
    """A layout that is recognised but not read, because its rows leave a choice to the author of the data."""

    name: str
    applies: Callable[[RawRow], bool]
    detail: str
    conversion: str = ""


def _has(*keys: str) -> Callable[[RawRow], bool]:
    return lambda row: row.keys() >= set(keys)


def _is_verdict(row: RawRow) -> bool:
    """Whether the column `label` says yes or no."""
    return str(row.get("label")).strip().lower() in ("true", "false", "0", "1", "0.0", "1.0")


def _lists(key: str, *inner: str) -> Callable[[RawRow], bool]:
    """Whether a column is a list of objects with these keys."""

    def applies(row: RawRow) -> bool:
        value = row.get(key)
        if not isinstance(value, list | tuple) or not value:
            return False
        return all(isinstance(one, dict) and one.keys() >= set(inner) for one in value)

    return applies


def _pair(prompt: str, response: str, name: str) -> KnownLayout:
    """Two columns that are a prompt and a response under other names."""
    return KnownLayout(
        name,
        _has(prompt, response),
        f"{prompt!a} and {response!a} are not names that are read",
        f'[{{**r, "prompt": r["{prompt}"], "response": r["{response}"], "{prompt}": None, "{response}": None}} '
        "for r in rows]",
    )


def _renamed(key: str) -> KnownLayout:
    return KnownLayout(
        "a chat",
        lambda row: isinstance(row.get(key), list | tuple) and not is_empty(row[key]),
        f"a chat is read from `messages` or `conversations`, not from {key!a}",
        f'[{{**r, "conversations": r["{key}"], "{key}": None}} for r in rows]',
    )


KNOWN_LAYOUTS: tuple[KnownLayout, ...] = (
    KnownLayout(
        "OASST, one message in a row",
        _has("message_id", "text", "role"),
        "a row is one message of a tree, not a chat; the conversion takes each best ranked answer with all messages "
        "before it",
        '(m := {r["message_id"]: r for r in rows}) and (f := lambda r: (f(m[r["parent_id"]]) if r["parent_id"] else '
        '[]) + [{"role": {"prompter": "user"}.get(r["role"], r["role"]), "content": r["text"]}]) and '
        '[{"messages": f(r)} for r in rows if r["role"] == "assistant" and not r.get("rank")]',
    ),
    KnownLayout(
        "OASST, one tree in a row",
        lambda row: isinstance(row.get("prompt"), dict) and "replies" in row["prompt"],  # type: ignore[operator]
        "a row is a tree of answers; the conversion takes each best ranked answer with all messages before it",
        _TURNS + '[{"messages": c} for r in rows for c in g(r["prompt"], [])]',
    ),
    KnownLayout(
        "verl",
        _has("prompt", "reward_model"),
        "it has prompts and right answers, but no response to learn: name it as prompts.source of dpr or gradient, or "
        "add a column `response`",
    ),
    KnownLayout(
        "KTO",
        lambda row: "prompt" in row and not row.keys().isdisjoint(("completion", "response")) and _is_verdict(row),
        "`label` says whether a completion is wanted; the conversion keeps those that are",
        '[{**r, "label": None} for r in rows if str(r["label"]).lower() in ("1", "1.0", "true")]',
    ),
    KnownLayout(
        "UltraFeedback, all completions in a row",
        lambda row: "instruction" in row and isinstance(row.get("completions"), list | tuple),
        "a row has several responses; the conversion takes the one with the highest `overall_score`",
        '[{"prompt": r["instruction"], "response": max(r["completions"], key=lambda c: c["overall_score"])'
        '["response"]} for r in rows if r["completions"]]',
    ),
    KnownLayout(
        "Nectar",
        lambda row: "prompt" in row and _lists("answers", "answer", "rank")(row),
        "a row has several ranked answers; the conversion takes the best",
        '[{"prompt": r["prompt"], "response": min(r["answers"], key=lambda a: a["rank"])["answer"]} for r in rows]',
    ),
    KnownLayout(
        "xLAM",
        lambda row: row.keys() >= {"query", "answers", "tools"} and isinstance(row["answers"], str),
        "`answers` are the calls of the tools; the conversion writes them as tool_calls",
        '[{"messages": [{"role": "user", "content": r["query"]}, {"role": "assistant", "content": "", "tool_calls": '
        '[{"type": "function", "function": c} for c in json.loads(r["answers"])]}], "tools": r["tools"]} '
        "for r in rows]",
    ),
    KnownLayout(
        "SQuAD",
        lambda row: row.keys() >= {"context", "question"} and isinstance(row.get("answers"), dict),
        "a row has several answers; the conversion takes the first, and puts the context before the question",
        '[{"prompt": r["context"] + "\\n\\n" + r["question"], "response": r["answers"]["text"][0]} for r in rows '
        'if r["answers"]["text"]]',
    ),
    KnownLayout(
        "MMLU",
        lambda row: (
            "question" in row
            and isinstance(row.get("choices"), list | tuple)
            and isinstance(row.get("answer"), int)
            and not isinstance(row.get("answer"), bool)
        ),
        "the answer is the number of a choice; the conversion lists the choices as A. B. C., and answers with a letter",
        '[{"prompt": "\\n".join([r["question"], *(f"{chr(65 + i)}. {c}" for i, c in enumerate(r["choices"]))]), '
        '"response": chr(65 + r["answer"])} for r in rows]',
    ),
    KnownLayout(
        "ARC",
        lambda row: isinstance(row.get("choices"), dict) and row.keys() >= {"question", "answerKey"},
        "the answer is the label of a choice; the conversion lists the choices under the question",
        '[{"prompt": "\\n".join([r["question"], *(f"{a}. {c}" for a, c in zip(r["choices"]["label"], '
        'r["choices"]["text"]))]), "response": r["answerKey"]} for r in rows]',
    ),
)
# Looked at only if no layout matches: these names are too common to know more.
_RENAMED: tuple[KnownLayout, ...] = (
    KnownLayout(
        "a chat of pairs",
        _lists("conversation", "input", "output"),
        "a chat is read from `messages`; the conversion writes each pair of input and output as two messages",
        '[{**r, "conversation": None, "messages": [m for t in r["conversation"] for m in ({"role": "user", "content": '
        't["input"]}, {"role": "assistant", "content": t["output"]})]} for r in rows]',
    ),
    KnownLayout(
        "a chat",
        _lists("conversation", "role", "content"),
        "a chat is read from `messages`, not from 'conversation'; the conversion keeps role and content",
        '[{**r, "conversation": None, "messages": [{k: m[k] for k in ("role", "content")} for m in r["conversation"]]} '
        "for r in rows]",
    ),
    *(_renamed(key) for key in ("conversation", "dialogue", "dialog", "chat", "turns", "chat_history")),
    _pair("input", "output", "input and output"),
    _pair("inputs", "targets", "inputs and targets"),
    _pair("instruction", "completion", "instruction and completion"),
    _pair("instruction", "answer", "instruction and answer"),
    _pair("query", "answer", "query and answer"),
    _pair("prompt", "output", "prompt and output"),
    _pair("prompt", "answer", "prompt and answer"),
    _pair("user", "assistant", "user and assistant"),
    _pair("human", "assistant", "human and assistant"),
    _pair("Question", "Answer", "Question and Answer"),
    _pair("article", "highlights", "a summary"),
    _pair("document", "summary", "a summary"),
    _pair("problem", "answer", "problem and answer"),
    KnownLayout(
        "plain text",
        lambda row: isinstance(row.get("text"), str),
        "`text` alone does not say where the prompt ends and the response begins: write `prompt` and `response`",
    ),
)


def is_layout(row: RawRow) -> bool:
    """Whether the keys of an object are those of a row, read or recognised; those of a message are not."""
    known = any(known.applies(row) for known in (*KNOWN_LAYOUTS, *_RENAMED))
    return bool(matching(row)) or (known and row.keys().isdisjoint(("role", "from")))


def refuse_known_layout(row: RawRow, *, prompts_only: bool) -> None:
    """Raises LineError, with the conversion, for a layout that is recognised but not read."""
    for known in KNOWN_LAYOUTS:
        if known.applies(row) and not (prompts_only and known.name == "verl"):
            raise LineError("known layout", f"{known.name}: {known.detail}", known.conversion)


def unknown_keys(row: RawRow, formats: str) -> LineError:
    """The refusal of a row that has no layout, with the conversion if its keys are known under other names."""
    for known in _RENAMED:
        if known.applies(row):
            return LineError("known layout", f"{known.name}: {known.detail}", known.conversion)
    found = quoted_keys(row) or "none"
    return LineError("unknown keys", f"has {found}, needs one of {formats} (null is missing)")


def is_prompt_column(name: str) -> bool:
    """Whether the name of a column says that it is part of the prompt."""
    words = _words_of(name)
    if not words or words[-1] in _FACTS or words[0] in ("original", "rejected"):
        return False
    return "_".join(words) in _TASKS or not _WORDS.isdisjoint(words)


def _words_of(name: str) -> list[str]:
    return re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower())


def refuse_lost_columns(
    row: RawRow, columns: Iterable[str], layouts: Sequence[Layout], prompt: Sequence[ChatMessage]
) -> None:
    """Raises LineError for columns of a prompt that are not read, unless the prompt holds their text already."""
    content = "\n".join(message.content for message in prompt)
    lost = [
        name
        for name in columns
        if is_prompt_column(name) and not all(text.strip() in content for text in texts_in(row[name]))
    ]
    if lost:
        detail = (
            f"{quoted_keys(lost)} belongs to the prompt, but its place there is not known: put it into "
            f"{layouts[0].keys[0]!a}, or name it in ignore_columns (beside `source`) if the model must not see it"
        )
        raise LineError("unsupported column", detail, _joined(row, lost, layouts))


def refuse_lost_response(row: RawRow, columns: Iterable[str], layouts: Sequence[Layout], response: ChatMessage) -> None:
    """Raises LineError for columns that are not read although their names say that they are part of the response.

    Another answer is accepted if it is shorter than the response, or in it: data sets state the final answer too.
    """
    content = f"{response.reasoning_content or ''}\n{response.content}"
    lost = [name for name in columns if _is_lost_response(name, row[name], content, response.content)]
    if lost:
        read = layouts[0].keys[-1]
        detail = (
            f"{quoted_keys(lost)} would be a part of the response, which is read from {read!a}: put it there (thoughts "
            "as reasoning_content of a message), or name it in ignore_columns (beside `source`) to leave it out"
        )
        raise LineError("unsupported column", detail, _answered(lost, layouts[0]))


def _is_lost_response(name: str, value: object, content: str, answer: str) -> bool:
    words = _words_of(name)
    if not isinstance(value, str) or value.strip() in content or words[-1:] == [] or words[-1] in _FACTS:
        return False
    if not _THOUGHTS.isdisjoint(words):
        return len(value.split()) > 1  # a single word is a setting, such as "on"
    return "_".join(words) in _ANSWERS and len(value.strip()) > len(answer.strip())


def _answered(lost: Sequence[str], layout: Layout) -> str:
    """The conversion that learns the columns; "" for a layout that is more than a prompt and a response."""
    if len(lost) != 1 or len(layout.keys) != 2 or layout.also:
        return ""
    task, answer = layout.keys
    if _THOUGHTS.isdisjoint(_words_of(lost[0])):
        return f'[{{**r, "{answer}": r["{lost[0]}"], "{lost[0]}": None}} for r in rows]'
    turns = f'{{"role": "user", "content": r["{task}"]}}, {{"role": "assistant", "content": r["{answer}"], '
    turns += f'"reasoning_content": r["{lost[0]}"]}}'
    nulls = ", ".join(f'"{key}": None' for key in (task, answer, lost[0]))
    return f'[{{**r, "messages": [{turns}], {nulls}}} for r in rows]'


def _joined(row: RawRow, lost: Sequence[str], layouts: Sequence[Layout]) -> str:
    """The conversion that writes the columns before the task, or after it for choices; "" if they are no texts."""
    task = layouts[0].keys[0]
    if not isinstance(row[task], str) or not all(_is_text(row[name]) for name in lost):
        return ""
    after = [name for name in lost if name in _AFTER_THE_TASK]
    order = [*(name for name in lost if name not in after), task, *after]
    # A column can be null in another row.
    parts = [f'r.get("{k}")' if isinstance(row[k], str) else f'*(r.get("{k}") or ())' for k in order]
    nulls = ", ".join(f'"{name}": None' for name in lost)
    return f'[{{**r, "{task}": "\\n\\n".join(filter(None, ({", ".join(parts)}))), {nulls}}} for r in rows]'


def _is_text(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list | tuple) and all(isinstance(v, str) for v in value))
