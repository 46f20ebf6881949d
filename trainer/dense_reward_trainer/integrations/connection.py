"""One connection of a process to each reward service, for programs that call functions and construct nothing.

A pair is pinned at the first use, with its tokenizer and revision: a service with other models is an error from then.
"""

import atexit
from contextlib import ExitStack
from threading import Lock

from dense_reward.client.tokenizer import CallersTokenizer, sha256_of
from dense_reward.schemas import SignalName
from transformers.utils import logging

from dense_reward_trainer.configs.service import ServiceOptions
from dense_reward_trainer.rl.reward_service import ServiceAddress, ServiceRewards, connected

_OPEN: dict[tuple[ServiceAddress, SignalName, bool], ServiceRewards] = {}
_STACK = ExitStack()
_LOCK = Lock()
atexit.register(_STACK.close)


def rewards_of(
    url: str, options: ServiceOptions, tokenizer: CallersTokenizer, *, signal: SignalName, with_kl: bool = False
) -> ServiceRewards:
    """Waits for the service at the first call; threads can share the result. Raises JobError if it cannot be used."""
    key = ServiceAddress.of(url, options), signal, with_kl
    with _LOCK:
        if key not in _OPEN:
            report = logging.get_logger(__name__).info
            opened = connected(key[0], sha256_of(tokenizer), report, signal=signal, with_kl=with_kl)
            _OPEN[key] = _STACK.enter_context(opened)
        return _OPEN[key]
