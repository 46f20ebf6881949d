"""The clients of the service, synchronous and asynchronous. Needs only httpx2, numpy and pydantic."""

from dense_reward.client.client import AsyncClient, Client
from dense_reward.client.tables import to_pandas, to_torch

__all__ = ["AsyncClient", "Client", "to_pandas", "to_torch"]
