"""The clients of the service, synchronous and asynchronous. Needs only httpx2, numpy and pydantic."""

from dense_reward.client.client import AsyncClient, Client, to_torch

__all__ = ["AsyncClient", "Client", "to_torch"]
