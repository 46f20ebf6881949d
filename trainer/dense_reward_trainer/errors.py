"""Errors that a user can fix; the command line prints them as one line, without a traceback."""


class ConfigError(ValueError):
    """A configuration cannot be used; the message names the key and the cure."""


class JobError(RuntimeError):
    """A job cannot continue; the message states the reason and the cure."""
