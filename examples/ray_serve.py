"""The service on Ray Serve: one replica a GPU, on any host of a cluster. Needs `pip install 'ray[serve]==2.60.0'`.

serve run --app-dir examples ray_serve:app replicas=8 gpus=1 sft=DIR/sft reference=DIR/reference

The other arguments are settings of `dense-reward serve`. A replica gets requests once its pair is loaded and verified.
"""

from dense_reward.client.http import RETRY_FOR_S
from dense_reward.http.app import create_app
from dense_reward.serving.loaders import loader
from dense_reward.serving.service import Service
from dense_reward.settings import read_settings
from fastapi import FastAPI
from ray import serve


# The service queues by itself: it makes batches from requests that wait inside it, and answers 429 above its bound.
@serve.deployment(max_ongoing_requests=10_000, graceful_shutdown_timeout_s=RETRY_FOR_S)
@serve.ingress()
class Rewards:
    def __init__(self, settings: dict[str, str]) -> None:
        chosen = read_settings(settings, ())
        self.service = Service(chosen, loader(chosen.engine), on_failure=lambda: None)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.service, loads_first=True)

    def check_health(self) -> None:
        if self.service.state == "failed":
            raise RuntimeError(self.service.progress)  # Ray Serve replaces the replica


def app(arguments: dict[str, str]) -> serve.Application:
    replicas, gpus = int(arguments.pop("replicas", "1")), float(arguments.pop("gpus", "0"))
    return Rewards.options(num_replicas=replicas, ray_actor_options={"num_gpus": gpus}).bind(arguments)
