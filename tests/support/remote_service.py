"""A real service in front of model servers, which are fakes of vLLM and SGLang over real HTTP."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event
from typing import Any

from dense_reward.serving.loaders import loader
from model_server import Handler, ModelServer
from running_service import Served, served

IDS: dict[str, Any] = {"prompt_ids": [5, 6, 7], "response_ids": [[8, 9, 10], [9, 9]]}


@contextmanager
def serving(pair: Path, sft: str, reference: str, *, ready: bool = True, **settings: str | Path) -> Iterator[Served]:
    settings = {"sft_url": sft, "reference_url": reference, **settings}
    folders = pair / "sft", pair / "reference"
    with served(
        loader("remote"), ready=ready, engine="remote", sft=folders[0], reference=folders[1], **settings
    ) as running:
        yield running


@contextmanager
def servers(pair: Path, *roles: str, **options: Any) -> Iterator[list[ModelServer]]:  # noqa: ANN401 - of ModelServer
    with ExitStack() as stack:
        yield [stack.enter_context(ModelServer(pair / role, **options)) for role in roles]


def hold(handler: Handler, until: Event) -> None:
    until.wait()
    handler.close_connection = True
