"""One number for an answer from the signals of its tokens. Pure numpy; must not know models or the service.

The sum of rewards over an answer is its log-ratio, but a sum also adds up what varies between right answers. The
minimum looks only at the worst token ("min-form credit assignment", arXiv 2504.15275), and the minimum over a moving
window at the worst passage, so that one rare but right token weighs less.
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from dense_reward_trainer.configs.signals import WINDOW_TOKENS, Aggregate


def aggregate(values_T: NDArray[np.floating], name: Aggregate, window: int = WINDOW_TOKENS) -> float:
    """The aggregate of one answer's signal [T], in its unit, accumulated in float64.

    `window_min`: the least mean over `window` consecutive tokens; of a shorter answer, the mean of all. Raises
    ValueError for an answer without tokens, which has a sum only, for nan, and for a window below 1.
    """
    if np.isnan(values_T).any():
        raise ValueError(f"the signal is nan at {int(np.isnan(values_T).sum())} of {len(values_T)} tokens")
    if name == "sum":
        return float(values_T.sum(dtype=np.float64))
    if not len(values_T):
        raise ValueError(f"an answer without tokens has no {name}: leave it out")
    match name:
        case "mean":
            return float(values_T.mean(dtype=np.float64))
        case "min":
            return float(values_T.min())
        case "window_min":
            return _least_mean(values_T, window)


def _least_mean(values_T: NDArray[np.floating], window: int) -> float:
    if window < 1:
        raise ValueError(f"the window of window_min is {window} tokens: set it to at least 1")
    windows = sliding_window_view(values_T, min(window, len(values_T)))
    return float(windows.mean(axis=-1, dtype=np.float64).min())
