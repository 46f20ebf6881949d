"""Arguments of the command `score`. What it does is imported only when it runs."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from dense_reward.schemas import ArrayName
from dense_reward.settings import Settings

ReadSettings = Callable[[argparse.Namespace], Settings]
DEFAULT_ARRAYS: tuple[ArrayName, ...] = ("token_ids", "tokens", "reward", "sft_logprob", "reference_logprob")
"""`tokens` is here because statistics need no tokenizer then."""
ARRAYS = tuple(name for name in get_args(ArrayName) if name != "candidate_sft_logprob")
OF_A_SERVER = frozenset(
    {
        *("host", "port", "api_keys_file", "open_metrics", "tls_certificate", "tls_private_key", "isolate_keys"),
        *("max_queue_tokens", "max_body_bytes", "max_heatmap_tokens", "max_arrival_s", "max_request_s"),
        *("results_bytes", "drain_s", "checkpoints_folder", "otlp_endpoint"),
    }
)
"""Settings that only a server needs."""


def add_score(parser: argparse.ArgumentParser) -> None:
    """Arguments of `score`; the parser already has the flags of the pair's settings."""
    parser.add_argument(
        "file",
        metavar="FILE",
        help="JSONL or Parquet file, folder that datasets saved, NAME:SPLIT or NAME:CONFIG@SPLIT",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="output file; its suffix is .jsonl or .parquet"
    )
    parser.add_argument("--config", metavar="TEXT", help="configuration of the data set, such as main")
    parser.add_argument(
        "--columns", metavar="FIELD=COLUMN,...", help="columns to read, such as prompt=question,response=answer"
    )
    parser.add_argument(
        "--turns",
        choices=["last", "all_assistant"],
        default="last",
        help="which assistant messages of a chat are scored; default last",
    )
    parser.add_argument(
        "--include",
        metavar="NAME,...",
        help=f"arrays to write: {', '.join(ARRAYS)}; default {','.join(DEFAULT_ARRAYS)}",
    )
    parser.add_argument(
        "--render", choices=["chat", "raw"], help="chat: apply the chat template; raw: use texts as they are"
    )
    parser.add_argument(
        "--add-eos",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="append the end-of-turn token to each response",
    )
    parser.add_argument("--model", metavar="TEXT", help="name of the pair; default the first")
    parser.add_argument(
        "--on-error",
        choices=["fail", "keep"],
        default="fail",
        help="at a row that cannot be scored, fail stops; keep writes its error and continues; default fail",
    )
    parser.add_argument("--shard", metavar="K/N", help="score only share K of N, such as 3/8; K starts at 1")
    parser.add_argument("--overwrite", action="store_true", help="delete --out and start again")
    parser.add_argument("--url", action="append", metavar="URL", help="URL of a running service; repeat it for several")
    parser.add_argument("--url-key-file", type=Path, metavar="PATH", help="file with the API key of the services")
    parser.add_argument("--ray", action="store_true", help="score on Ray Data, with one actor per GPU")
    parser.add_argument(
        "--ray-workers", type=int, metavar="N", help="number of actors; default one per GPU of the cluster"
    )
    parser.add_argument("--ray-gpus", type=float, metavar="X", help="GPUs per actor; default 1, or 0 if there are none")
    parser.add_argument(
        "--ray-address", metavar="TEXT", help="address of the cluster; default the one on this machine, or a new one"
    )
