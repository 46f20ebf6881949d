"""The command `score`."""

import argparse
import asyncio
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from dense_reward.bulk.arguments import ARRAYS, ReadSettings
from dense_reward.bulk.columns import Columns, parse_columns
from dense_reward.bulk.job import Job, Progress, Writing, opened, score
from dense_reward.bulk.local_scorer import LocalScorer, ScoreTerms, chosen_pair
from dense_reward.bulk.outputs import check_output, remove_output
from dense_reward.bulk.run_state import load_state, locked, state_file, writing
from dense_reward.bulk.sources import library, open_source
from dense_reward.bulk.url_scorer import UrlScorer
from dense_reward.bulk.windows import Shard
from dense_reward.checkpoints.slow_step import slow_step
from dense_reward.errors import BulkError, SettingsError
from dense_reward.settings import Settings, flag


def score_file(options: argparse.Namespace, read: ReadSettings) -> int:
    """Score a file or data set, and say what to run next. Raises SettingsError, CheckpointError, BulkError."""
    # Ray ends its own processes at a normal exit.
    with stopped_like_ctrl_c(wait=options.ray):
        try:
            return _report(_scored(options, read), options)
        except KeyboardInterrupt:
            without = " without --overwrite" if options.overwrite else ""
            print(f"dense-reward: interrupted: the same command{without} goes on after the saved rows", file=sys.stderr)
            raise
        except BulkError as error:
            if options.overwrite and state_file(options.out).exists():
                raise BulkError(f"{error}\nLeave out --overwrite to go on after the saved rows") from error
            raise


def _scored(options: argparse.Namespace, read: ReadSettings) -> Writing:
    _check_together(options)
    check_output(options.out)
    terms = _terms(options)
    mapping = parse_columns(options.columns)
    shard = parse_shard(options.shard)
    settings = None if options.url else chosen_pair(read(options), terms.model)
    source = open_source(options.file, options.config)
    columns = Columns(mapping, options.turns, terms.columns, typed=source.arrow_schema is not None)
    chosen = {
        "columns": columns.mapping,
        "turns": options.turns,
        "include": list(terms.columns),
        "render": terms.render,
        "add_eos": terms.add_eos,
        "shard": f"{shard.index}/{shard.of}",
    }
    job = Job(source, options.out, columns, chosen, shard, options.on_error)
    # Before the minutes that a pair takes to load: whether the output can be written, and goes on.
    with locked(job.out):
        finished = not options.overwrite and load_state(job.out, job.made_from).done
    if options.ray and settings is not None and not finished:
        from dense_reward.bulk.ray_data import Workers, score_with_ray

        workers = Workers(options.ray_workers, options.ray_gpus, options.ray_address)
        with _output(job, overwrite=options.overwrite) as writer:
            score_with_ray(writer, settings, terms, workers)
    else:
        scorer = _scorer(settings, terms, options)
        words = "waiting for the services" if settings is None else "loading the models"
        writer = asyncio.run(_score_here(job, scorer, words, overwrite=options.overwrite))
    return writer


@contextmanager
def stopped_like_ctrl_c(*, wait: bool) -> Iterator[None]:
    """SIGTERM saves what was scored, as Ctrl-C does, and the exit code is 143. Raises SystemExit.

    `wait`: end only when no thread works any more.
    """
    terminated = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal terminated
        terminated = True
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in the background
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)

    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        if not wait:
            _end_if_busy(128 + (signal.SIGTERM if terminated else signal.SIGINT))
        if terminated:
            raise SystemExit(128 + signal.SIGTERM) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_if_busy(code: int) -> None:
    """End the process if a thread still loads or computes: a normal exit would wait for it, perhaps for minutes."""
    threads = [each for each in threading.enumerate() if each is not threading.main_thread() and not each.daemon]
    if threads:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _check_together(options: argparse.Namespace) -> None:
    if options.url and options.ray:
        raise SettingsError("--ray loads the pair itself: leave out --url or --ray")
    given = [name for name in Settings.model_fields if hasattr(options, name) and not name.startswith("log_")]
    if options.url and given:
        raise SettingsError(
            f"{flag(given[0])} has no effect with --url, whose service loaded its own pair: leave out one of them"
        )
    if options.ray and options.shard:
        raise SettingsError("--ray divides the rows itself: leave out --shard")
    if options.url_key_file and not options.url:
        raise SettingsError("--url-key-file needs a service: give --url too")
    if Path(options.file).exists() and options.out.exists() and options.out.samefile(options.file):
        raise SettingsError(f"--out {options.out} is the input: name another file")


def _terms(options: argparse.Namespace) -> ScoreTerms:
    names = tuple(filter(None, (name.strip() for name in (options.include or "").split(","))))
    unknown = [name for name in names if name not in ARRAYS]
    if unknown:
        raise SettingsError(f"--include: there is no array {unknown[0]!r}; choose from {', '.join(ARRAYS)}")
    return ScoreTerms(tuple(dict.fromkeys(names)), options.model, options.render, options.add_eos)


def parse_shard(text: str | None) -> Shard:
    """The shard of "3/8". Raises SettingsError."""
    if text is None:
        return Shard()
    matched = re.fullmatch(r"(\d+)/(\d+)", text)
    if matched is None or not 1 <= int(matched[1]) <= int(matched[2]):
        raise SettingsError(f"--shard {text}: write K/N with K from 1 to N, such as 3/8")
    return Shard(int(matched[1]), int(matched[2]))


def _scorer(settings: Settings | None, terms: ScoreTerms, options: argparse.Namespace) -> LocalScorer | UrlScorer:
    """Made before there is an event loop, in which Ctrl-C would wait for the imports of torch."""
    if settings is None:
        return UrlScorer(options.url, _key(options.url_key_file), terms)
    with slow_step(_say, "loading the libraries"):
        return LocalScorer(settings, terms)


async def _score_here(job: Job, scorer: LocalScorer | UrlScorer, words: str, *, overwrite: bool) -> Writing:
    """Score what is missing; of a complete output, check that it is of these models."""
    try:
        with slow_step(_say, words):
            await scorer.start()
        with _output(job, overwrite=overwrite) as writer:
            await score(writer, scorer)
        return writer
    finally:
        await scorer.close()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _output(job: Job, *, overwrite: bool) -> Iterator[Writing]:
    """The output, with a progress bar. An earlier one is removed only now, when there are models to score with."""
    if overwrite:
        with locked(job.out), writing(job.out):
            remove_output(job.out)
            state_file(job.out).unlink(missing_ok=True)
    with progress_bar(job.total) as progress, opened(job, progress) as writer:
        progress(writer.state.rows, 0)
        yield writer


def _key(file: Path | None) -> str | None:
    try:
        return None if file is None else file.read_text("utf-8").strip()
    except OSError as error:
        raise SettingsError(f"--url-key-file {file}: {error.strerror}") from None


@contextmanager
def progress_bar(total: int) -> Iterator[Progress]:
    """Rows, tokens per second and the time left, on stderr; rarely, if that is no terminal."""
    options = {"mininterval": 0.1 if sys.stderr.isatty() else 10.0, "delay": 0 if sys.stderr.isatty() else 2.0}
    tqdm = library("tqdm", "the progress bar").tqdm
    bar = tqdm(total=total, unit=" rows", file=sys.stderr, smoothing=0.05, **options)
    seen = 0

    def progress(rows: int, tokens: int) -> None:
        nonlocal seen
        seen += tokens
        if not tokens:  # rows of an earlier run say nothing about the speed
            bar.initial = bar.n = bar.n + rows
            if sys.stderr.isatty():
                bar.refresh()
            return
        elapsed = bar.format_dict["elapsed"]
        bar.set_postfix_str(f"{seen / elapsed:,.0f} tokens/s" if elapsed else "", refresh=False)
        bar.update(rows)

    try:
        yield progress
    finally:
        bar.close()


def _report(writer: Writing, options: argparse.Namespace) -> int:
    state, out = writer.state, writer.job.out
    errors = f", {state.errors} of them with an error" if state.errors else ""
    responses = state.output_rows - state.errors
    print(f"{out}: {state.rows} rows{errors}, {responses} responses, {state.tokens:,} scored tokens")
    if "reward" in writer.job.columns.arrays:
        shard = writer.job.shard
        others = f" and the outputs of the other {shard.of - 1} shards" if shard.of > 1 else ""
        print(f"next: dense-reward stats {shlex.quote(str(out))}{others}")
    if state.rows and state.errors == state.rows:
        raise BulkError(f"no row could be scored: read the column error of {out}")
    return 0
