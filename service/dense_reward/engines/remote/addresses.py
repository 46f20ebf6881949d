"""The addresses of a model's servers: fixed URLs, and names of which every address is a server.

Such a name is that of a headless Kubernetes service: it resolves to all its ready pods, whose number changes.
"""

import asyncio
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

FOLLOWED = "dns+"
"""Starts a URL whose name is resolved, and followed: dns+http://NAME:8000."""


async def server_urls(urls: Sequence[str]) -> list[str]:
    """The URL of each server, each once, in order. Raises OSError if a name has no address now."""
    found: list[str] = []
    for url in urls:
        found += await _resolved(url.removeprefix(FOLLOWED)) if url.startswith(FOLLOWED) else [url.rstrip("/")]
    return list(dict.fromkeys(found))


async def _resolved(url: str) -> list[str]:
    address = urlsplit(url)
    port = address.port or 80
    answers = await asyncio.get_running_loop().getaddrinfo(address.hostname, port, type=socket.SOCK_STREAM)
    of_family: dict[socket.AddressFamily, set[str]] = {}
    for family, _, _, _, place in answers:
        of_family.setdefault(family, set()).add(str(place[0]))
    # a server that has both an IPv4 and an IPv6 address is one server
    hosts = of_family.get(socket.AF_INET) or {f"[{host}]" for host in of_family.get(socket.AF_INET6, ())}
    return sorted(f"{address.scheme}://{host}:{port}" for host in hosts)
