"""The result of the credit job as text: a line for each column, and the verdict in sentences."""

from collections.abc import Iterator, Mapping

from dense_reward_trainer.credit.auroc import Interval
from dense_reward_trainer.credit.error_localisation import Localisation
from dense_reward_trainer.credit.judged_answers import AGGREGATES, Rankings


def localisation_lines(title: str, by_column: Mapping[str, Localisation]) -> Iterator[str]:
    """A title, then AUROC and hit@1 of each column."""
    yield f"{title}: AUROC, hit@1"
    width = max(map(len, by_column))
    for column, one in by_column.items():
        yield f"  {column:{width}}  {_cell(one.auroc)}  {_cell(one.hit)}"


def ranking_lines(title: str, ranking: Rankings, window: int) -> Iterator[str]:
    """A title, the names of the aggregates, then the AUROCs of each column by aggregate."""
    yield f"{title}: AUROC by aggregate (window_min: over {window} tokens)"
    width = max(map(len, ranking))
    yield f"  {'':{width}}  {'  '.join(f'{name:20}' for name in AGGREGATES)}".rstrip()
    for column, found in ranking.items():
        yield f"  {column:{width}}  {'  '.join(_cell(found[name].auroc) for name in AGGREGATES)}"


def reference_lines(references: Mapping[str, str], left_out: tuple[str, ...]) -> Iterator[str]:
    """Which checkpoint is the reference of each pair, and which columns the engine does not compute."""
    for pair, reference in references.items():
        yield f"reference of the pair {pair}: {reference}"
    if left_out:
        yield f"left out, because the engine of the service does not compute what they need: {', '.join(left_out)}"


def legend() -> str:
    """What the columns of all tables mean."""
    return (
        "AUROC: the chance that an error is below another token, or a wrong answer below a right one; 0.5 says "
        "nothing. hit@1: the share of answers whose lowest token is the error. In brackets: 95 % bootstrap intervals"
    )


def _cell(x: Interval) -> str:
    return f"{x.value:.3f} [{x.low:.3f}, {x.high:.3f}]"
