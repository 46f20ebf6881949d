"""Small data files of our own in the layouts and the wrong forms that people have, and what becomes of each."""

import codecs
import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass

JsonRow = Mapping[str, object]
ASK, ANSWER = "How deep is the lake?", "Forty metres."
TURNS = [{"role": "user", "content": ASK}, {"role": "assistant", "content": ANSWER}]
SHARED = [{"from": "human", "value": ASK}, {"from": "gpt", "value": ANSWER}]
CHAT = (("user", ASK), ("assistant", ANSWER))
RULES = "Answer in metres."
TEXT = "The lake was measured in 1904: forty metres."
CALL = {"id": "c1", "type": "function", "function": {"name": "depth", "arguments": '{"lake": "Mjosa"}'}}
TOOL = {"type": "function", "function": {"name": "depth", "parameters": {"type": "object", "properties": {}}}}
TREE = {
    "role": "prompter",
    "text": ASK,
    "replies": [
        {"role": "assistant", "text": "No idea.", "rank": 1, "replies": []},
        {"role": "assistant", "text": ANSWER, "rank": 0, "replies": []},
    ],
}
FLAT: list[JsonRow] = [
    {"message_id": "a", "parent_id": None, "text": ASK, "role": "prompter", "rank": None},
    {"message_id": "b", "parent_id": "a", "text": ANSWER, "role": "assistant", "rank": 0},
    {"message_id": "c", "parent_id": "a", "text": "No idea.", "role": "assistant", "rank": 1},
]


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file. `read`: role and content of the first demonstration's messages; or `refused`: a phrase of the error.

    `unread`: the columns that the summary names. `converted`: what the printed command makes of it, if there is one.
    """

    name: str
    content: bytes
    read: tuple[tuple[str, str], ...] = ()
    unread: str = ""
    refused: str = ""
    converted: tuple[tuple[str, str], ...] = ()
    suffix: str = ".jsonl"


def lines(*rows: JsonRow) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def after(*before: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    return (*before, *CHAT)


def asked(prompt: str) -> tuple[tuple[str, str], ...]:
    return (("user", prompt), ("assistant", ANSWER))


def read(name: str, *rows: JsonRow, gives: tuple[tuple[str, str], ...] = CHAT, unread: str = "") -> DataFile:
    return DataFile(name, lines(*rows), read=gives, unread=unread)


def refused(name: str, phrase: str, *rows: JsonRow, converted: tuple[tuple[str, str], ...] = ()) -> DataFile:
    return DataFile(name, lines(*rows), refused=phrase, converted=converted)


HH = f"\n\nHuman: {ASK}\n\nAssistant: {ANSWER}"
READ_LAYOUTS = [
    read("messages", {"messages": TURNS, "source": "own"}, unread="source"),
    read("sharegpt", {"id": "1", "conversations": SHARED}, unread="id"),
    read("sharegpt in messages", {"messages": SHARED}),
    read("sharegpt with a system turn", {"conversations": [{"from": "system", "value": RULES}, *SHARED]},
         gives=after(("system", RULES))),
    read("sharegpt with a system column", {"system": RULES, "conversations": SHARED}, gives=after(("system", RULES))),
    read("openai roles in conversations", {"conversations": TURNS}),
    read("sharegpt with a function", {"conversations": [
        {"from": "human", "value": "Look."}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
        {"from": "function", "value": "40"}, {"from": "gpt", "value": ANSWER}]},
        gives=(("user", "Look."), ("assistant", ""), ("tool", "40"), ("assistant", ANSWER))),
    read("lima", {"conversations": [ASK, ANSWER], "source": "own"}, unread="source"),
    read("hh-rlhf", {"chosen": HH, "rejected": HH.replace("Forty", "Nine")}, unread="rejected"),
    read("hh-rlhf, a paragraph that names a human", {"chosen": HH + "\n\nHumans measured it."},
         gives=(("user", ASK), ("assistant", ANSWER + "\n\nHumans measured it."))),
    read("hh-rlhf without the first blank line", {"prompt": f"Human: {ASK}\n\nAssistant:", "response": ANSWER}),
    read("hh-rlhf, split", {"prompt": f"\n\nHuman: {ASK}\n\nAssistant:", "response": f" {ANSWER}"}),
    read("dolly without a context", {"instruction": ASK, "context": "", "response": ANSWER, "category": "qa"},
         unread="category"),
    read("metamathqa", {"query": ASK, "response": ANSWER, "type": "x", "original_question": "How deep?"},
         unread="type, original_question"),
    read("openorca", {"id": "1", "system_prompt": RULES, "question": ASK, "response": ANSWER},
         gives=after(("system", RULES)), unread="id"),
    read("openorca without a system prompt", {"system_prompt": "", "question": ASK, "response": ANSWER}),
    read("ultrafeedback", {"prompt": ASK, "chosen": TURNS, "rejected": TURNS, "messages": TURNS, "score_chosen": 9.0},
         unread="rejected, score_chosen"),
    read("a preference as texts", {"prompt": ASK, "chosen": ANSWER, "rejected": "No."}, unread="rejected"),
    read("a preference as messages", {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": TURNS[1:]},
         unread="rejected"),
    read("orca pairs", {"system": RULES, "question": ASK, "chosen": ANSWER, "rejected": "No."},
         gives=after(("system", RULES)), unread="rejected"),
    read("numina", {"source": "x", "problem": ASK, "solution": ANSWER, "messages": TURNS}, unread="source"),
    read("ultrachat", {"prompt": ASK, "prompt_id": "7", "messages": TURNS}, unread="prompt, prompt_id"),
    read("alpaca with an empty input", {"instruction": ASK, "input": "", "output": ANSWER, "text": "### x"},
         unread="text"),
    read("alpaca with an input", {"instruction": "How deep?", "input": "The lake.", "output": ANSWER},
         gives=asked("How deep?\n\nThe lake.")),
    read("a system prompt beside prompt and response", {"system_prompt": RULES, "prompt": ASK, "response": ANSWER},
         gives=after(("system", RULES))),
    read("openai with tool calls", {"messages": [
        TURNS[0], {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "40"}, TURNS[1]],
        "tools": [TOOL], "parallel_tool_calls": False},
        gives=(("user", ASK), ("assistant", ""), ("tool", "40"), ("assistant", ANSWER)), unread="parallel_tool_calls"),
    read("openai's older functions", {"messages": [
        TURNS[0], {"role": "assistant", "function_call": {"name": "depth", "arguments": "{}"}},
        {"role": "function", "name": "depth", "content": "40"}, TURNS[1]], "functions": [{"name": "depth"}]},
        gives=(("user", ASK), ("assistant", ""), ("tool", "40"), ("assistant", ANSWER))),
    read("openai with a text part", {"messages": [{"role": "user", "content": [{"type": "text", "text": ASK}]},
         {"role": "assistant", "content": ANSWER, "weight": 1}]}),
    read("a context that the prompt holds", {"prompt": f"{TEXT}\n{ASK}", "context": TEXT, "response": ANSWER},
         gives=asked(f"{TEXT}\n{ASK}"), unread="context"),
]  # fmt: skip
THOUGHT = "The chart says forty. "
READ_LAYOUTS += [
    read(
        "openhermes",
        {
            "conversations": [{**turn, "weight": None} for turn in SHARED],
            "system_prompt": None,
            "skip_prompt_formatting": False,
            "views": None,
        },
        unread="skip_prompt_formatting",
    ),
    read(
        "slimorca",
        {
            "conversations": [
                {"from": "system", "value": RULES, "weight": None},
                {**SHARED[0], "weight": 0.0},
                {**SHARED[1], "weight": 1.0},
            ]
        },
        gives=after(("system", RULES)),
    ),
    read(
        "numina with a final answer",
        {"problem": ASK, "solution": ANSWER, "answer": "40", "problem_type": "x"},
        unread="answer, problem_type",
    ),
    read("a prompt of messages, and a text", {"prompt": TURNS[:1], "response": ANSWER}),
    read(
        "a thought that the response holds",
        {"prompt": ASK, "response": ANSWER, "reasoning": ANSWER},
        unread="reasoning",
    ),
    read(
        "a switch that is named as a thought",
        {"prompt": ASK, "response": ANSWER, "reasoning": "on"},
        unread="reasoning",
    ),
]
REFUSED_LAYOUTS = [
    refused("limo", "'solution' would be a part of the response, which is read from 'answer'",
            {"question": ASK, "solution": THOUGHT + ANSWER, "answer": "40"},
            converted=(("user", ASK), ("assistant", THOUGHT + ANSWER))),
    refused("a rationale", "'rationale' would be a part of the response",
            {"question": ASK, "rationale": THOUGHT, "answer": ANSWER}, converted=CHAT),
    refused("alpaca with thoughts", "'reasoning_content' would be a part of the response",
            {"instruction": ASK, "input": "", "reasoning_content": THOUGHT, "output": ANSWER}),
    refused("kto with numbers", "KTO", {"prompt": ASK, "completion": "No.", "label": 0},
            {"prompt": ASK, "completion": ANSWER, "label": 1}, converted=CHAT),
    refused("kto with texts", "KTO", {"prompt": ASK, "response": "No.", "label": "False"},
            {"prompt": ASK, "response": ANSWER, "label": "True"}, converted=CHAT),
    refused("natural instructions", "'definition' belongs to the prompt",
            {"definition": RULES, "prompt": ASK, "response": ANSWER}, converted=asked(f"{RULES}\n\n{ASK}")),
    refused("starter code", "'starter_code' belongs to the prompt",
            {"question": ASK, "starter_code": "def depth():", "answer": ANSWER},
            converted=asked(f"def depth():\n\n{ASK}")),
    refused("capybara", "a chat of pairs", {"conversation": [{"input": ASK, "output": ANSWER}]}, converted=CHAT),
    refused("wildchat", "keeps role and content",
            {"conversation": [{**turn, "country": "NO", "toxic": False} for turn in TURNS]}, converted=CHAT),
    refused("nectar", "the conversion takes the best", {"prompt": f"\n\nHuman: {ASK}\n\nAssistant: ",
            "answers": [{"answer": "No.", "rank": 2.0}, {"answer": ANSWER, "rank": 1.0}]}, converted=CHAT),
    refused("xlam", "writes them as tool_calls", {"query": ASK, "answers": json.dumps([CALL["function"]]),
            "tools": json.dumps([TOOL["function"]])}, converted=(("user", ASK), ("assistant", ""))),
    refused("hermes, tools in the system message too", "the system message defines the tools",
            {"conversations": [{"from": "system", "value": f"Use <tools>{json.dumps(TOOL)}</tools>"}, *SHARED],
             "tools": json.dumps([TOOL])}),
    refused("openr1", "name the columns of the other in ignore_columns",
            {"problem": ASK, "solution": "40", "messages": TURNS}),

    refused("dolly", "'context' belongs to the prompt",
            {"instruction": ASK, "context": TEXT, "response": ANSWER}, converted=asked(f"{TEXT}\n\n{ASK}")),
    refused("sql-create-context", "'context' belongs to the prompt",
            {"question": ASK, "context": TEXT, "answer": ANSWER}, {"question": ASK, "context": None, "answer": ANSWER},
            converted=asked(f"{TEXT}\n\n{ASK}")),
    refused("documents", "'documents' belongs to the prompt",
            {"question": ASK, "documents": [TEXT, RULES], "answer": ANSWER},
            converted=asked(f"{TEXT}\n\n{RULES}\n\n{ASK}")),
    refused("options", "'options' belongs to the prompt",
            {"question": ASK, "options": ["Forty", "Nine"], "answer": ANSWER},
            converted=asked(f"{ASK}\n\nForty\n\nNine")),
    refused("a context in capitals", "'retrievedContext' belongs to the prompt",
            {"prompt": ASK, "retrievedContext": TEXT, "response": ANSWER}, converted=asked(f"{TEXT}\n\n{ASK}")),
    refused("arguments of a template", "'chat_template_kwargs' belongs to the prompt",
            {"messages": TURNS, "chat_template_kwargs": {"enable_thinking": False}}),
    refused("two system prompts", "differs from another system message",
            {"system": "Be brief.", "messages": [{"role": "system", "content": RULES}, *TURNS]}),
    refused("a prompt that the messages do not hold", "'prompt' belongs to the prompt",
            {"prompt": RULES, "messages": TURNS}),
    refused("oasst, flat", "one message of a tree", *FLAT, converted=CHAT),
    refused("oasst, trees", "a tree of answers", {"message_tree_id": "a", "prompt": TREE}, converted=CHAT),
    refused("verl", "no response to learn",
            {"data_source": "x", "prompt": TURNS[:1], "reward_model": {"style": "rule", "ground_truth": "40"}}),
    refused("ultrafeedback, all completions", "several responses", {"instruction": ASK, "completions": [
        {"response": "No.", "overall_score": 1.0}, {"response": ANSWER, "overall_score": 9.0}]}, converted=CHAT),
    refused("kto", "whether a completion is wanted", {"prompt": ASK, "completion": "No.", "label": False},
            {"prompt": ASK, "completion": ANSWER, "label": True}, converted=CHAT),
    refused("tools in words", "`tools`: Expecting value", {"messages": TURNS, "tools": "search, calculator"}),
    refused("thoughts under another name", "write the thoughts as reasoning_content",
            {"messages": [TURNS[0], {**TURNS[1], "reasoning": "Look it up."}]}),
    refused("squad", "several answers", {"id": "1", "title": "t", "context": TEXT, "question": ASK,
            "answers": {"text": [ANSWER], "answer_start": [0]}}, converted=asked(f"{TEXT}\n\n{ASK}")),
    refused("mmlu", "the number of a choice", {"question": ASK, "choices": ["nine", "forty"], "answer": 1},
            converted=(("user", f"{ASK}\nA. nine\nB. forty"), ("assistant", "B"))),
    refused("arc", "the label of a choice", {"id": "1", "question": ASK, "answerKey": "2",
            "choices": {"text": ["nine", "forty"], "label": ["1", "2"]}},
            converted=(("user", f"{ASK}\n1. nine\n2. forty"), ("assistant", "2"))),
    refused("input and output", "not names that are read", {"input": ASK, "output": ANSWER}, converted=CHAT),
    refused("question and answer in capitals", "not names that are read",
            {"Question": ASK, "Answer": ANSWER}, converted=CHAT),
    refused("a chat under another name", "not from 'dialogue'", {"dialogue": SHARED}, converted=CHAT),
    refused("text alone", "does not say where the prompt ends", {"text": f"### Human: {ASK}"}),
    refused("unknown keys", "needs one of messages; conversations", {"ask": ASK, "reply": ANSWER}),
    refused("a preference without a prompt", "there is no `prompt`", {"chosen": ANSWER, "rejected": "No."}),
    refused("a response of weight 0", "has weight 0", {"messages": [TURNS[0], {**TURNS[1], "weight": 0}]}),
    refused("a name that templates drop", "no chat template writes",
            {"messages": [{**TURNS[0], "name": "Ada"}, TURNS[1]]}, converted=CHAT),
    refused("an image part", "images are not read", {"messages": [{"role": "user", "content": [
        {"type": "text", "text": ASK}, {"type": "image_url", "image_url": {"url": "x"}}]}, TURNS[1]]}),
    refused("arguments that are not JSON", "not JSON", {"messages": [
        TURNS[0], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{lake"}}]}]}),
    refused("a chat that ends with the user", "the last message is by the user", {"conversations": [ASK]}),
]  # fmt: skip
ROW = {"prompt": "Wie tief ist der M\u00fcggelsee?", "response": "Acht Meter."}
PLAIN = (("user", ROW["prompt"]), ("assistant", ROW["response"]))
PRETTY = json.dumps(ROW, indent=2, ensure_ascii=False).encode()
FILES = [
    DataFile("an array", b"[\n" + lines(ROW).strip() + b",\n" + lines(ROW) + b"]\n", read=PLAIN),
    DataFile("an array on one line", json.dumps([ROW, ROW]).encode(), read=PLAIN, suffix=".json"),
    DataFile("an array of another layout", json.dumps([{"input": ASK, "output": ANSWER}]).encode(),
             refused="not names that are read", converted=CHAT, suffix=".json"),
    DataFile("objects over several lines", PRETTY + b"\n" + PRETTY + b"\n", read=PLAIN),
    DataFile("objects over several lines, of another layout",
             2 * json.dumps({"input": ASK, "output": ANSWER}, indent=2).encode(),
             refused="not names that are read", converted=CHAT, suffix=".json"),
    DataFile("a chat over several lines", b'{\n"messages": [\n' + lines(TURNS[0]).strip() + b",\n" + lines(TURNS[1])
             + b"]\n}", read=CHAT, suffix=".json"),
    DataFile("objects on one line", 2 * lines(ROW).strip(), read=PLAIN),
    DataFile("carriage returns alone", 2 * (lines(ROW).strip() + b"\r"), read=PLAIN),
    DataFile("an object with data", json.dumps({"data": [ROW]}).encode(), read=PLAIN, suffix=".json"),
    DataFile("an object with data, of another layout", json.dumps({"data": [FLAT[0]]}, indent=1).encode(),
             refused="one message of a tree", suffix=".json"),
    DataFile("an object with splits", json.dumps({"train": [ROW], "test": [ROW]}).encode(),
             refused="rows in 'train', 'test'", converted=PLAIN, suffix=".json"),
    DataFile("a byte order mark", codecs.BOM_UTF8 + lines(ROW), read=PLAIN),
    DataFile("compressed", gzip.compress(lines(ROW), mtime=0), read=PLAIN, suffix=".jsonl.gz"),
    DataFile("compressed, of another layout", gzip.compress(lines({"input": ASK, "output": ANSWER}), mtime=0),
             refused="not names that are read", converted=CHAT, suffix=".jsonl.gz"),
    DataFile("an array that breaks off", json.dumps([ROW, ROW]).encode()[:-9], refused="damaged or incomplete"),
    DataFile("an array that ends early", b'[{"a": 1}] {"a": 2}', refused="ends early"),
    DataFile("an array with a comma too many", b'[{"a": 1},\n]', refused="a comma follows the last element"),
    DataFile("an object that breaks off", PRETTY[:-3], refused="damaged or incomplete"),
    DataFile("an empty array", b"[]", refused="an empty JSON array"),
    DataFile("nothing", b"", refused="is empty"),
    DataFile("blank lines", b"\n  \n", refused="is empty"),
    DataFile("utf-16", lines(ROW).decode().encode("utf-16"), refused="is UTF-16 text", converted=PLAIN),
    DataFile("utf-16 without a mark", lines(ROW).decode().encode("utf-16-le"), refused="is UTF-16LE text",
             converted=PLAIN),
    DataFile("utf-16 in the other order", lines(ROW).decode().encode("utf-16-be"), refused="is UTF-16BE text",
             converted=PLAIN),
    DataFile("utf-32", lines(ROW).decode().encode("utf-32"), refused="is UTF-32 text", converted=PLAIN),
    DataFile("latin-1", lines(ROW).decode().encode("latin-1"), refused="Latin-1 or Windows-1252 is likely",
             converted=PLAIN),
    DataFile("an array in latin-1", json.dumps([ROW], ensure_ascii=False).encode("latin-1"),
             refused="Latin-1 or Windows-1252 is likely", converted=PLAIN),
    DataFile("git-lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4096\n",
             refused="a git-lfs pointer, not the data"),
    DataFile("gzip under another name", gzip.compress(lines(ROW), mtime=0), refused="compressed with gzip: rename it"),
    DataFile("parquet", b"PAR1\x15\x04\x15", refused="a Parquet file: rename it"),
    DataFile("parquet that is damaged", b"PAR1\x15\x04\x15", refused="a Parquet file that is damaged",
             suffix=".parquet"),
    DataFile("arrow", b"ARROW1\0\0", refused="an Arrow file"),
    DataFile("zip", b"PK\x03\x04\x14\0", refused="a zip archive"),
    DataFile("zstd", b"\x28\xb5\x2f\xfd\x24", refused="zstd -dc"),
    DataFile("tar inside gzip", gzip.compress(b"x" * 257 + b"ustar\0" + b"\0" * 249, mtime=0),
             refused="a tar archive", suffix=".jsonl.gz"),
    DataFile("csv", f'prompt,response\n"{ASK}",{ANSWER}\n'.encode(), refused="is CSV", converted=CHAT),
    DataFile("tsv", f"prompt\tresponse\n{ASK}\t{ANSWER}\n".encode(), refused="is TSV", converted=CHAT),
    DataFile("csv with semicolons", f"prompt;response\n{ASK};{ANSWER}\n".encode(), refused="is CSV", converted=CHAT),
    DataFile("python's notation", str(ROW).encode(), refused="single quotes are Python's notation"),
    DataFile("a page", b"<!DOCTYPE html>\n<html><title>Sign in</title></html>", refused="a download that failed"),
    DataFile("prose", f"{ASK}\n{ANSWER}\n".encode(), refused="is text, not JSON"),
    DataFile("binary", b"\x01\x02\0\0\x07", refused="a binary file"),
    DataFile("another suffix", lines(ROW), refused="rename it", suffix=".txt"),
    DataFile("a deep array", b"[" * 100_000, refused="damaged or incomplete"),
]  # fmt: skip
CORPUS = [*READ_LAYOUTS, *REFUSED_LAYOUTS, *FILES]
