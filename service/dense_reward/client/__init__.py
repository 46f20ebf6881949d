"""Asks a service for rewards. Needs httpx2, numpy and pydantic only."""

from dense_reward.client.client import AsyncClient, Client, to_torch

__all__ = ["AsyncClient", "Client", "to_torch"]
