"""CUDA graphs of small rows: the launches of a whole forward, recorded once and started by one call.

A small row is computed faster than the host can launch its kernels one by one. A graph computes rows of one length, so
a row is padded to the next length that was recorded. The padding belongs to no sequence: nothing attends to it.

Shapes: N tokens of a row, L tokens of a graph, S sequences, K gathered keys, D hidden size.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dense_reward.engines.kernels.varlen import Call, Ends, Varlen

STEP, LARGEST = 128, 2048
"""Graphs are recorded for the multiples of STEP tokens up to LARGEST, and kept where they are faster."""
REPEATS = 3
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
    """The graphs of one model. Raises RuntimeError if its forward cannot be recorded.

    A graph is kept if it is faster than launching a row of STEP / 2 tokens less, as many as it pads on average. That is
    so where the host is slower than the GPU: in large models only for the smallest rows.
    """

    def __init__(self, states: States, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[int, RowGraph] = {}
        with torch.cuda.device(device):
            pool = torch.cuda.graph_pool_handle()
            for length in range(LARGEST, 0, -STEP):  # the largest first: the smaller ones then fit into its memory
                graph = _recorded(states, length, device, pool)
                launched = _one_sequence(length - STEP // 2, device)
                if _seconds(graph.graph.replay) < _seconds(partial(states, *launched)):
                    self._graphs[length] = graph

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row that has a graph; 0 if there is no graph."""
        return max(self._graphs, default=0)

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
        with torch.cuda.device(self._device):
            graph.graph.replay()
        return graph.states_LD


def _recorded(states: States, length: int, device: torch.device, pool: tuple[int, int]) -> RowGraph:
    ids, positions, (one,) = _one_sequence(length, device)
    ends = [torch.full((SEQUENCES + 1,), length, dtype=torch.int32, device=device) for _ in range(2)]
    for each in ends:
        each[0] = 0
    key_K = torch.zeros(KEYS_PER_TOKEN * length, dtype=torch.int64, device=device)
    call = Call(one.part, Ends(ends[0], length), Ends(ends[1], length), key_K)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # compiles and allocates what a recording must not
        states(ids, positions, (call,))
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # type: ignore[arg-type]
        found = states(ids, positions, (call,))
    return RowGraph(graph, ids, positions, call, key_K, found)


def _one_sequence(tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Varlen]:
    """A row of one sequence: ids and positions, all 0, and its attention."""
    ends = Ends(torch.tensor([0, tokens], dtype=torch.int32, device=device), tokens)
    ids, positions = (torch.zeros(1, tokens, dtype=torch.int64, device=device) for _ in range(2))
    return ids, positions, (Call(slice(0, tokens), ends, ends, None),)


def _seconds(call: Callable[[], object]) -> float:
    """Seconds of the fastest of some calls, measured until the GPU has finished."""
    found = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        call()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - started_s)
    return min(found)
