"""The versions of the libraries that determine results. Imports the standard library only."""

from importlib.metadata import PackageNotFoundError, version

LIBRARIES = ("dense-reward", "torch", "transformers", "tokenizers", "trl", "peft", "accelerate")


def library_versions() -> dict[str, str]:
    """The installed versions by name; a library that is not installed is left out."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
