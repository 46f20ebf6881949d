"""How long each part waits for the next, in seconds. Chosen together: a part that waits for another outlasts it.

A service answers or refuses within MAX_REQUEST_S; a proxy gives up after it, and a client after the proxy. A service
that stops has DRAIN_S for what it admitted, and what kills it comes KILL_S later. A client retries for longer than a
request can take and a replica then takes to be replaced. The files of Compose, chart and proxy repeat these numbers;
tests/bench/test_defaults.py holds all of them together.
"""

MAX_REQUEST_S = 600.0
PROXY_S = MAX_REQUEST_S + 10.0
CLIENT_TIMEOUT_S = MAX_REQUEST_S + 20.0

MAX_QUEUE_TOKENS = 1_048_576
"""Requests that would wait longer than MAX_REQUEST_S are refused, however few tokens wait on a slow device."""
DRAIN_S = 300
"""Longer than a full queue takes at 6,600 tokens per second, a GPU of docs/scale.md: 160 s."""
KILL_S = 10
"""From the end of DRAIN_S to SIGKILL: the process ends within a second, after it has sent its spans."""

START_S = 240.0
"""A replica's start with weights that are there: reading, verifying, compiling kernels."""
CLIENT_RETRY_FOR_S = MAX_REQUEST_S + DRAIN_S
"""More than MAX_REQUEST_S + START_S: a replica can die while it holds a request that has waited its longest."""
