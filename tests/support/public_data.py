"""Rows of our own with exactly the columns of public data sets, and what becomes of each."""

from collections.abc import Sequence
from dataclasses import dataclass

from data_files import ANSWER, ASK, CHAT, SHARED, TEXT, TURNS, JsonRow

WORKED = "Two jetties of 9 m are 2*9=<<2*9=18>>18 m.\n#### 18"
LATER = [{"role": "user", "content": "And how wide?"}, {"role": "assistant", "content": "Two kilometres."}]
TWO_TURNS = (*CHAT, ("user", "And how wide?"), ("assistant", "Two kilometres."))
HH = f"\n\nHuman: {ASK}\n\nAssistant: {ANSWER}\n\nHuman: And how wide?\n\nAssistant: Two kilometres."


@dataclass(frozen=True, slots=True)
class PublicData:
    """A data set: names that a user writes, rows, and the messages of the first one that is read.

    `unread`: the columns that the summary names. `refused`: a phrase of the error, whose command gives `messages`.
    """

    names: tuple[str, ...]
    rows: Sequence[JsonRow]
    messages: tuple[tuple[str, str], ...] = CHAT
    unread: str = ""
    refused: str = ""
    answer: str | None = None

    @property
    def id(self) -> str:
        return self.names[0]


def _tree(message_id: str, parent_id: str | None, text: str, role: str, rank: int | None) -> JsonRow:
    return {
        "message_id": message_id,
        "parent_id": parent_id,
        "user_id": "u",
        "created_date": "2023-02-05T14:23:50",
        "text": text,
        "role": role,
        "lang": "en",
        "review_count": 3,
        "review_result": True,
        "deleted": False,
        "rank": rank,
        "synthetic": False,
        "model_name": None,
        "detoxify": None,
        "message_tree_id": "a",
        "tree_state": "ready_for_export",
        "emojis": {"name": ["+1"], "count": [2]},
        "labels": {"name": ["quality"], "value": [0.7], "count": [3]},
    }


OASST = [
    _tree("a", None, ASK, "prompter", None),
    _tree("b", "a", ANSWER, "assistant", 0),
    _tree("c", "a", "No idea.", "assistant", 1),
]
OPENHERMES: JsonRow = {
    "custom_instruction": None,
    "topic": None,
    "model_name": None,
    "model": None,
    "skip_prompt_formatting": False,
    "category": "lakes",
    "conversations": [{**turn, "weight": None} for turn in SHARED],
    "views": None,
    "language": None,
    "id": None,
    "title": None,
    "idx": None,
    "hash": None,
    "avatarUrl": None,
    "system_prompt": None,
    "source": "own",
}
PUBLIC = [
    PublicData(
        ("ultrachat200k", "HuggingFaceH4/ultrachat_200k", "ultrachat_200k@train_sft"),
        [{"prompt": ASK, "prompt_id": "f0e3", "messages": [*TURNS, *LATER]}],
        TWO_TURNS,
        unread="prompt, prompt_id",
    ),
    PublicData(
        ("hh-rlhf", "Anthropic/hh-rlhf", "anthropic-hh"),
        [{"chosen": HH, "rejected": HH.replace("Two kilometres.", "No idea.")}],
        TWO_TURNS,
        unread="rejected",
    ),
    PublicData(
        ("alpaca", "tatsu-lab/alpaca"),
        [
            {"instruction": ASK, "input": "", "output": ANSWER, "text": f"### Instruction:\n{ASK}"},
            {"instruction": "How deep?", "input": TEXT, "output": ANSWER, "text": f"### Input:\n{TEXT}"},
        ],
        unread="text",
    ),
    PublicData(("alpaca-cleaned", "yahma/alpaca-cleaned"), [{"output": ANSWER, "input": "", "instruction": ASK}]),
    PublicData(
        ("gsm8k", "openai/gsm8k", "gsm8k:main", "openai/gsm8k:main@train"),
        [{"question": "How long are two jetties of 9 m?", "answer": WORKED}],
        (("user", "How long are two jetties of 9 m?"), ("assistant", WORKED)),
        answer="18",
    ),
    PublicData(
        ("lima", "GAIR/lima"),
        [{"conversations": [ASK, ANSWER], "source": "own"}],
        unread="source",
    ),
    PublicData(
        ("dolly", "databricks/databricks-dolly-15k"),
        [{"instruction": ASK, "context": "", "response": ANSWER, "category": "open_qa"}],
        unread="category",
    ),
    PublicData(
        ("dolly with a context",),
        [{"instruction": ASK, "context": TEXT, "response": ANSWER, "category": "closed_qa"}],
        (("user", f"{TEXT}\n\n{ASK}"), ("assistant", ANSWER)),
        refused="'context' belongs to the prompt",
    ),
    PublicData(("oasst1", "OpenAssistant/oasst1", "oasst2"), OASST, refused="one message of a tree"),
    PublicData(
        ("tulu3", "allenai/tulu-3-sft-mixture", "tulu-3"),
        [{"id": "own_1", "messages": [*TURNS, *LATER], "source": "own"}],
        TWO_TURNS,
        unread="id, source",
    ),
    PublicData(
        ("OpenHermes-2.5", "teknium/OpenHermes-2.5", "openhermes"),
        [OPENHERMES],
        unread="skip_prompt_formatting, category, source",
    ),
    PublicData(
        ("a ShareGPT dump",),
        [{"id": "QWJhYvA_0", "conversations": [*SHARED, *({"from": "human", "value": "Thanks."},)][:2]}],
        unread="id",
    ),
    PublicData(
        ("math", "DigitalLearningGmbH/MATH-lighteval", "hendrycks_math"),
        [{"problem": ASK, "level": "Level 2", "type": "Algebra", "solution": "It is $\\boxed{40}$ metres."}],
        (("user", ASK), ("assistant", "It is $\\boxed{40}$ metres.")),
        unread="level, type",
    ),
    PublicData(
        ("ultrafeedback", "HuggingFaceH4/ultrafeedback_binarized"),
        [
            {
                "prompt": ASK,
                "prompt_id": "a1",
                "chosen": TURNS,
                "rejected": TURNS,
                "messages": TURNS,
                "score_chosen": 8.5,
                "score_rejected": 7.0,
            }
        ],
        unread="prompt_id, rejected, score_chosen, score_rejected",
    ),
    PublicData(
        ("metamathqa", "meta-math/MetaMathQA"),
        [{"type": "MATH_Rephrased", "query": ASK, "original_question": "Depth?", "response": ANSWER}],
        unread="type, original_question",
    ),
    PublicData(
        ("no_robots", "HuggingFaceH4/no_robots"),
        [{"prompt": ASK, "prompt_id": "b2", "messages": TURNS, "category": "Open QA"}],
        unread="prompt, prompt_id, category",
    ),
]
