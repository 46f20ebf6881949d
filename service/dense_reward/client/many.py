"""The plan of `score_many`: which items form a request, how many requests are in flight, and the order of the results.

Pure: both clients drive it. Memory is bounded: items are taken only while there is room for their results.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np

from dense_reward.client.errors import ItemError, MismatchError, ScoringError
from dense_reward.client.ids import item_of
from dense_reward.client.requests import Encoding, OnError, ScoreCall, ScoreOptions, expected_of, score_many
from dense_reward.client.results import Scored, ScoredItem, ServedModel
from dense_reward.client.routes import Routes
from dense_reward.client.scored_response import ScoredResponse

CHARACTERS_PER_TOKEN = 4
MOST_ITEMS = 256
# With 16 candidates at each token, a request has about as many bytes of candidates as of everything else.
CANDIDATES_PER_TOKEN = 8
REQUESTS_AHEAD = 4
FIRST_IN_FLIGHT = 4
MOST_IN_FLIGHT = 100
SLOW_S = 10.0
# Statuses of a request in which a single item can be at fault. Its items are then sent in halves to find out which.
OF_AN_ITEM = frozenset({400, 413, 422, 504})
OPTION_NAMES = frozenset(option.name for option in fields(ScoreOptions))


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """An item that has no result yet, its tokens (about), and the services that get it in order of preference."""

    index: int
    item: dict[str, object]
    tokens: int
    order: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The items of one request. Their first choice among the services is the same."""

    members: tuple[Waiting, ...]

    @property
    def order(self) -> tuple[int, ...]:
        return self.members[0].order


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What became of a request: an answer or an error, how long it took, and how many attempts failed."""

    group: Group
    answer: Scored | Exception
    took_s: float
    failures: int


@dataclass(slots=True)
class InFlight:
    """How many requests to keep in flight: more while answers come fast, fewer if they are refused or slow.

    A fast service needs many to stay busy. To a slow service a long queue only means that callers hang up on it.
    """

    most: int
    slow_s: float
    limit: int = field(init=False)

    def __post_init__(self) -> None:
        self.limit = min(FIRST_IN_FLIGHT, self.most)

    def learn(self, took_s: float, failures: int) -> None:
        if failures:
            self.limit = max(1, self.limit // 2)
        elif took_s > self.slow_s:
            self.limit = min(self.limit, max(2, self.limit - 1))
        elif took_s < self.slow_s / 2:
            self.limit = min(self.most, self.limit + 1)


@dataclass(frozen=True, slots=True)
class Plan:
    """The arguments of `score_many`."""

    options: ScoreOptions
    encoding: Encoding
    on_error: OnError
    request_tokens: int
    in_flight: int

    def __post_init__(self) -> None:
        if self.request_tokens < 1 or self.in_flight < 1:
            raise ValueError(
                f"request_tokens and in_flight must be at least 1, not {self.request_tokens} and {self.in_flight}"
            )
        if self.on_error not in ("fail", "per_item"):
            raise ValueError(f'on_error must be "fail" or "per_item", not {self.on_error!r}')

    def call(self, group: Group) -> ScoreCall:
        """Bad items are always answered one by one, so that a failure names the place of its item among all items."""
        return score_many([member.item for member in group.members], self.options, self.encoding, "per_item")


class Many:
    """The state of one `score_many`. A single thread uses it."""

    def __init__(self, plan: Plan, routes: Routes, timeout_s: float) -> None:
        self.plan = plan
        most = min(plan.in_flight * routes.count, MOST_IN_FLIGHT)
        self.in_flight = InFlight(most, slow_s=min(SLOW_S, timeout_s / 4))
        self._routes = routes
        self._room = REQUESTS_AHEAD * self.in_flight.most * plan.request_tokens
        self._taken = 0
        self._ended = False
        self._unsent: dict[int, list[Waiting]] = {}
        self._ready: deque[Group] = deque()
        self._done: dict[int, ScoredItem | Exception] = {}
        self._next = 0
        self._open: deque[int] = deque()
        self._open_tokens = 0
        self._model: ServedModel | None = None

    def wants_item(self) -> bool:
        """Whether the next item should be taken now."""
        return not self._ended and not self._ready and self._open_tokens < self._room

    def take(self, item: object) -> None:
        index, self._taken = self._taken, self._taken + 1
        try:
            plain = item_of(item)
            expected_of(index, plain)
        except (TypeError, ValueError) as error:
            self._enter(1)
            self._done[index] = self._refused(index, _with_place(error, index))
            return
        tokens = tokens_of(plain)
        self._enter(tokens)
        order = tuple(self._routes.preferred(plain))
        if tokens + sum(member.tokens for member in self._unsent.get(order[0], [])) > self.plan.request_tokens:
            self._flush(order[0])
        unsent = self._unsent.setdefault(order[0], [])
        unsent.append(Waiting(index, plain, tokens, order))
        if len(unsent) == MOST_ITEMS:
            self._flush(order[0])

    def end(self) -> None:
        """There are no more items."""
        self._ended = True
        self._flush_all()

    def next_group(self, running: int) -> Group | None:
        """The next request to send; None if enough are running, or none is ready."""
        if running >= self.in_flight.limit:
            return None
        if not self._ready and not self.wants_item():
            self._flush_all()
        return self._ready.popleft() if self._ready else None

    def finish(self, outcome: Outcome) -> None:
        """Keeps what became of a request."""
        self.in_flight.learn(outcome.took_s, outcome.failures)
        members, answer = outcome.group.members, outcome.answer
        if isinstance(answer, Scored):
            self._keep(members, answer)
        elif len(members) > 1 and _of_an_item(answer):
            half = len(members) // 2
            self._ready.extendleft([Group(members[half:]), Group(members[:half])])
        else:
            self._done[members[0].index] = self._refused(members[0].index, answer)

    def results(self) -> list[ScoredItem]:
        """The results whose turn it is. Raises the error of an item if it is the first of them."""
        found: list[ScoredItem] = []
        while self._next in self._done:
            result = self._done[self._next]
            if isinstance(result, Exception):
                if found:
                    return found
                raise result
            del self._done[self._next]
            found.append(result)
            self._next += 1
            self._open_tokens -= self._open.popleft()
        return found

    def finished(self, running: int) -> bool:
        """Whether every item has its result, or its error is the next result."""
        return self._ended and not running and not self._ready and not self._unsent

    def _enter(self, tokens: int) -> None:
        self._open.append(tokens)
        self._open_tokens += tokens

    def _flush(self, service: int) -> None:
        """The collected items whose first choice is this service become a request."""
        members = self._unsent.pop(service, [])
        if members:
            self._ready.append(Group(tuple(members)))

    def _flush_all(self) -> None:
        for service in list(self._unsent):
            self._flush(service)

    def _mismatch(self, model: ServedModel) -> MismatchError | None:
        """The error if another pair answered than before."""
        first = self._model = self._model or model
        if (model.revision, model.tokenizer_sha256) == (first.revision, first.tokenizer_sha256):
            return None
        message = (
            f"revision {model.revision} of {model.name} answered after revision {first.revision}: the services serve "
            "different checkpoints, or one was restarted with others"
        )
        return MismatchError(409, "revision_mismatch", message)

    def _keep(self, members: Sequence[Waiting], answer: Scored) -> None:
        mismatch = self._mismatch(answer.model)
        if mismatch is not None:
            self._done[members[0].index] = mismatch
            return
        by_item: list[list[ScoredResponse]] = [[] for _ in members]
        for result in answer.results:
            by_item[result.item].append(result)
        for member, results in zip(members, by_item, strict=True):
            error = results[0].error
            if error is not None:
                self._done[member.index] = self._refused(member.index, _as_exception(error))
            else:
                placed = tuple(replace(result, item=member.index) for result in results)
                self._done[member.index] = ScoredItem(member.index, answer.model, placed)

    def _refused(self, index: int, error: Exception) -> ScoredItem | Exception:
        """With on_error "per_item" a result that holds the error of an item; else the exception."""
        of_item = _of_an_item(error)
        if isinstance(error, ScoringError) and of_item:
            fault = ItemError(error.code, error.message, error.param, index)
            error = ScoringError(error.status, error.code, f"item {index}: {error.message}", error.param, (fault,))
        else:
            fault = ItemError("invalid_request", str(error), None, index)
        return ScoredItem(index, None, (), fault) if of_item and self.plan.on_error == "per_item" else error


def _of_an_item(error: Exception) -> bool:
    if isinstance(error, TypeError | ValueError):
        return True
    if not isinstance(error, ScoringError) or error.status not in OF_AN_ITEM:
        return False
    return error.param is None or error.param.split(".")[0] not in OPTION_NAMES


def _with_place(error: TypeError | ValueError, index: int) -> TypeError | ValueError:
    kind = TypeError if isinstance(error, TypeError) else ValueError
    return kind(f"item {index}: {error}")


def _as_exception(error: ItemError) -> ScoringError:
    return ScoringError(422, error.code, error.message, error.param)


def tokens_of(item: Mapping[str, object]) -> int:
    """About how many tokens an item has, at least 1: ids count one each, four characters count as one token."""
    total = 0.0
    for name, value in item.items():
        if name in ("prompt_ids", "token_ids"):
            total += np.size(np.asarray(value))
        elif name == "response_ids" and isinstance(value, Sequence | np.ndarray):
            total += sum(len(row) for row in value)
        elif name == "candidate_ids" and isinstance(value, Sequence | np.ndarray):
            total += sum(np.size(np.asarray(row)) for row in value) / CANDIDATES_PER_TOKEN
        elif name != "score_mask":
            total += _characters(value) / CHARACTERS_PER_TOKEN
    return max(1, round(total))


def _characters(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_characters(part) for part in value.values())
    return sum(_characters(part) for part in value) if isinstance(value, Sequence) else 1
