"""What a judge is asked, in words of our own, with the verdicts that each benchmark's own code reads.

Names in braces are replaced: the question and both answers, or those of both turns.
"""

from collections.abc import Mapping

from dense_reward_trainer.configs.judge import JudgePrompt, PromptName
from dense_reward_trainer.win_rates.benchmarks import Benchmark

_RULES = (
    "You compare two answers to the same request of a user. The better answer is correct, does what was asked, and "
    "leaves out what does not help. Neither the order nor the length of the answers is a reason to prefer one."
)
_SOLVE = "Solve the request yourself first, and name the errors of both answers."
_ONE_TO_FIVE = (
    "End with exactly one of these lines, from A much better, over a tie, to B much better: [[A>>B]], [[A>B]], "
    "[[A=B]], [[B>A]], [[B>>A]]."
)
_ONE_TO_THREE = "Say briefly why. End with [[A]] if A is better, [[B]] if B is, or [[C]] if neither is."
_LETTER = "Reply with one letter alone: m if answer A is better, M if answer B is better."
_VERDICTS: Mapping[Benchmark, str] = {
    "alpaca_eval": _LETTER,
    "arena_hard": f"{_SOLVE} {_ONE_TO_FIVE}",
    "mt_bench": _ONE_TO_THREE,
    "lima": _ONE_TO_THREE,
}
_USER = "# Request\n{question}\n\n# Answer A\n{answer_a}\n\n# Answer B\n{answer_b}\n\n# Your verdict"
_USER_OF_SECOND = (
    "# First request\n{question_1}\n\n# Second request\n{question_2}\n\n"
    "# A's answer to the first\n{answer_a_1}\n\n# A's answer to the second\n{answer_a_2}\n\n"
    "# B's answer to the first\n{answer_b_1}\n\n# B's answer to the second\n{answer_b_2}\n\n# Your verdict"
)


def own_prompt(benchmark: Benchmark, name: PromptName) -> JudgePrompt:
    """The prompt that is used unless the configuration has one of this name."""
    if name == "second_turn":
        only_second = "The user asked twice: judge the answers to the second request."
        return JudgePrompt(system=f"{_RULES} {only_second} {_VERDICTS[benchmark]}", user=_USER_OF_SECOND)
    verdict = _ONE_TO_FIVE if name == "creative_writing" else _VERDICTS[benchmark]
    return JudgePrompt(system=f"{_RULES} {verdict}", user=_USER)
