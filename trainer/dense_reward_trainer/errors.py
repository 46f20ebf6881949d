"""What a user of a job can mend; the command line prints these as one line."""


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and the cure."""


class JobError(RuntimeError):
    """A job that cannot go on; the message says why and what cures it."""
