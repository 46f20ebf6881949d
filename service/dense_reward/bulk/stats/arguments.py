"""Arguments of the command `stats`. What it does is imported only when it runs."""

import argparse
from pathlib import Path


def add_stats(parser: argparse.ArgumentParser) -> None:
    """Arguments of `stats`."""
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="outputs of dense-reward score")
    parser.add_argument("--lowest", type=int, default=20, metavar="N", help="number of spans to list; default 20")
    parser.add_argument("--span", type=int, default=5, metavar="N", help="tokens per span; default 5")
    parser.add_argument(
        "--plot", type=Path, metavar="PATH", help="picture to write; default the first FILE, with the suffix .stats.png"
    )
    parser.add_argument("--no-plot", action="store_true", help="draw no picture")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the numbers to this JSON file")
