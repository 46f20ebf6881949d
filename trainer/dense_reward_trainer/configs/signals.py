"""Names of the signals of a token, and of the ways to aggregate one over an answer. Must not import torch."""

from typing import Literal

TokenSignal = Literal["sft_logprob", "entropy_corrected", "z_score", "margin", "reward", "centred"]
"""What a token gets, in nats (z_score: standard deviations). credit/signals.py has the formulas and their sources."""
Aggregate = Literal["sum", "mean", "min", "window_min"]
"""How the signals of its tokens become one number of an answer: see credit/aggregates.py."""
WINDOW_TOKENS = 8
"""Default length of the window of `window_min`, in tokens."""
