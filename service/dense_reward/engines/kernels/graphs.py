"""CUDA graphs of small rows: the launches of a whole forward, recorded once and started by one call.

A small row is computed faster than the host can launch its kernels one by one. A graph computes rows of one length, so
a row is padded to the next length that was recorded. The padding belongs to no sequence: nothing attends to it.

Shapes: N tokens of a row, L tokens of a graph, S sequences, K gathered keys, D hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dense_reward.engines.kernels.varlen import Call, Ends, Varlen

STEP, LARGEST = 256, 2048
"""Graphs are recorded for the multiples of STEP tokens up to LARGEST."""
SEQUENCES, KEYS_PER_TOKEN = 128, 4
"""Rows with more sequences, or more gathered keys for each token of the graph, are launched one by one."""
States = Callable[[Tensor, Tensor, Varlen], Tensor]
"""Ids and positions of a row, [1, N], and its attention -> hidden states, [N, D]."""


@dataclass(frozen=True, slots=True)
class RowGraph:
    """One recorded graph: its inputs, which `states` overwrites, and its output [L, D], which the next call does."""

    graph: torch.cuda.CUDAGraph
    ids_1L: Tensor
    positions_1L: Tensor
    call: Call
    key_K: Tensor
    states_LD: Tensor


class RowGraphs:
    """The graphs of one model. Raises RuntimeError if its forward cannot be recorded, or computes something else."""

    def __init__(self, states: States, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # The largest first: the smaller ones then fit into its memory.
        lengths = range(LARGEST, 0, -STEP)
        self._graphs = {length: _recorded(states, length, device, self._pool) for length in lengths}

    def states(self, ids_1N: Tensor, positions_1N: Tensor, varlen: Varlen | None) -> Tensor | None:
        """[L, D] with L >= N, valid until the next call; None if no graph fits the row."""
        tokens = ids_1N.shape[1]
        length = -(-tokens // STEP) * STEP
        if varlen is None or len(varlen) != 1 or length not in self._graphs:
            return None
        graph, call = self._graphs[length], varlen[0]
        keys = tokens if call.key_K is None else len(call.key_K)
        sequences = len(call.queries.ends) - 1
        if sequences > SEQUENCES or keys > len(graph.key_K):
            return None
        graph.ids_1L[0, :tokens] = ids_1N[0]
        graph.positions_1L[0, :tokens] = positions_1N[0]
        for mine, theirs in ((graph.call.queries.ends, call.queries.ends), (graph.call.keys.ends, call.keys.ends)):
            mine[: sequences + 1] = theirs
            mine[sequences + 1 :] = theirs[-1]  # sequences without tokens
        if call.key_K is None:
            torch.arange(tokens, out=graph.key_K[:tokens])
        else:
            graph.key_K[:keys] = call.key_K
        graph.graph.replay()
        return graph.states_LD


def _recorded(states: States, length: int, device: torch.device, pool: tuple[int, int]) -> RowGraph:
    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    key_K = zeros(KEYS_PER_TOKEN * length, dtype=torch.int64)
    ends = [torch.full((SEQUENCES + 1,), length, dtype=torch.int32, device=device) for _ in range(2)]
    for each in ends:
        each[0] = 0
    call = Call(slice(0, length), Ends(ends[0], length), Ends(ends[1], length), key_K)
    ids, positions = zeros(1, length, dtype=torch.int64), zeros(1, length, dtype=torch.int64)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # compiles and allocates what a recording must not
        states(ids, positions, (call,))
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # type: ignore[arg-type]
        found = states(ids, positions, (call,))
    return RowGraph(graph, ids, positions, call, key_K, found)
