"""The service on Ray Serve: one replica a GPU, on any host of a cluster. Needs `pip install 'ray[serve]==2.60.0'`.

cd examples && serve run --working-dir . ray_serve:app replicas=8 gpus=1 sft=/DIR/sft reference=/DIR/reference

Other arguments are settings of the service. A replica gets requests once its pair is loaded and verified.
"""

from dense_reward.http.app import create_app
from dense_reward.serving.loaders import loader
from dense_reward.serving.service import Service
from dense_reward.settings import read_settings
from fastapi import FastAPI
from ray import serve


@serve.ingress()
class Rewards:
    def __init__(self, arguments: dict[str, str]) -> None:
        settings = read_settings(arguments, ())
        self.service = Service(settings, loader(settings.engine), on_failure=lambda: None)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.service, loads_first=True)

    def check_health(self) -> None:  # Ray Serve replaces a replica that fails it
        if self.service.state == "failed":
            raise RuntimeError(self.service.progress)


def app(arguments: dict[str, str]) -> serve.Application:
    replicas, gpus = int(arguments.pop("replicas", "1")), float(arguments.pop("gpus", "0"))
    # The service queues by itself: it makes batches of requests that wait inside it, and above its bound answers 429.
    options = {"max_ongoing_requests": 10_000, "graceful_shutdown_timeout_s": 600, "num_replicas": replicas}
    return serve.deployment(Rewards, ray_actor_options={"num_gpus": gpus}, **options).bind(arguments)
