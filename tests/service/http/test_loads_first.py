"""An app that starts only once its pair is loaded, for servers that route requests to whatever has started."""

import asyncio

import pytest
from dense_reward.engines.fake import FakeEngine
from dense_reward.errors import CheckpointError
from dense_reward.http.app import create_app
from dense_reward.records import OnDevice, Report
from dense_reward.serving.loaders import LoadedPair
from dense_reward.serving.service import Service
from dense_reward.settings import Settings, read_settings
from faulty_engines import Gate
from running_service import PATIENCE_S, loading


def test_it_starts_when_the_pair_is_loaded() -> None:
    gate = Gate()

    def load(settings: Settings, report: Report, on_device: OnDevice) -> LoadedPair:
        gate(())
        return loading(FakeEngine())(settings, report, on_device)

    async def live() -> None:
        service = Service(read_settings({}, ()), load, lambda: None)
        app = create_app(service, loads_first=True)
        lifespan = app.router.lifespan_context(app)
        starting = asyncio.create_task(lifespan.__aenter__())
        assert await asyncio.to_thread(gate.entered.wait, PATIENCE_S)
        assert not starting.done()
        gate.opened.set()
        await asyncio.wait_for(starting, PATIENCE_S)
        assert service.state == "ready"
        await lifespan.__aexit__(None, None, None)

    asyncio.run(live())


def test_it_does_not_start_if_the_pair_cannot_be_loaded() -> None:
    def load(settings: Settings, report: Report, on_device: OnDevice) -> LoadedPair:
        raise CheckpointError("the weights changed")

    async def live() -> None:
        app = create_app(Service(read_settings({}, ()), load, lambda: None), loads_first=True)
        async with app.router.lifespan_context(app):
            pytest.fail("it has started")

    with pytest.raises(RuntimeError, match="the weights changed"):
        asyncio.run(live())
