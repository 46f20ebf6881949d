"""The parser of both commands: help with examples, arguments that are added when they are needed, shell completion.

Imports the standard library only, so that `--help` answers at once.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

SHELLS = ("bash", "zsh", "fish")
Fill = Callable[["CommandParser"], None]


class CommandParser(argparse.ArgumentParser):
    """`fill` adds the arguments when the parser is first used: those of other subcommands are never built.

    `examples`: command lines that the help shows at its end.
    """

    def __init__(self, *, fill: Fill | None = None, examples: Sequence[str] = (), **options: Any) -> None:  # noqa: ANN401
        options.setdefault("formatter_class", _HelpFormatter)
        super().__init__(**options)
        self._fill = fill
        if examples:
            self.epilog = _HelpFormatter.RAW + "\n  ".join(("examples:", *examples))

    def filled(self) -> "CommandParser":
        """This parser with all its arguments."""
        if self._fill is not None:
            fill, self._fill = self._fill, None
            fill(self)
        return self

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # noqa: ANN401
        """argparse's entry to every parser, those of subcommands too."""
        return super(CommandParser, self.filled()).parse_known_args(args, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # noqa: ANN401
        """argparse's, which reports an unknown flag with the usage of the subcommand and the nearest flag."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.refuse(unknown, options)
        return options

    def refuse(self, unknown: Sequence[str], options: argparse.Namespace, advice: str = "") -> NoReturn:
        """Ends with an error about unknown arguments, in the words of the subcommand that was named."""
        words = [value for value in vars(options).values() if isinstance(value, str)]
        parser = next((self.subcommands()[word] for word in words if word in self.subcommands()), self)
        flags = [flag for action in parser._actions for flag in action.option_strings]
        cure = _nearest(unknown[0].partition("=")[0], flags) or advice
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{cure}")

    def error(self, message: str) -> NoReturn:
        """argparse's, with the nearest value where one of several is expected, and help where there is none."""
        found = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if found is not None:
            message += _nearest(found[1], re.findall(r"[\w-]+", found[2]))
        if "are required: COMMAND" in message or "are required: JOB" in message:
            message += f"; {self.prog} --help lists them"
        super().error(message)

    def subcommands(self) -> Mapping[str, "CommandParser"]:
        """The parsers of the subcommands by name, filled."""
        actions = [action for action in self.filled()._actions if isinstance(action, argparse._SubParsersAction)]
        return {name: parser.filled() for action in actions for name, parser in action.choices.items()}


def _nearest(word: str, known: Sequence[str]) -> str:
    near = get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


class _HelpFormatter(argparse.HelpFormatter):
    """Leaves the lines of examples as they are; other texts are wrapped."""

    RAW = "\0"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        raw = text.startswith(self.RAW)
        return text.removeprefix(self.RAW) if raw else super()._fill_text(text, width, indent)


class ShowVersion(argparse.Action):
    """`--version`: reads the distribution's metadata only if it is asked to."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from dense_reward.checkpoints.versions import library_versions

        print(library_versions().get("dense-reward", "not installed"))
        parser.exit()


class PrintCompletion(argparse.Action):
    """`--print-completion SHELL`: the script that completes this command in a shell, made by shtab."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(
            option_strings, argparse.SUPPRESS, choices=SHELLS, help="print the completion script of a shell"
        )

    def __call__(
        self, parser: argparse.ArgumentParser, _: argparse.Namespace, shell: object, option: str | None = None
    ) -> NoReturn:
        try:
            import shtab
        except ImportError:
            parser.exit(2, f"{parser.prog}: {option} needs shtab: {sys.executable} -m pip install shtab\n")
        if isinstance(parser, CommandParser):
            for filled in (parser, *parser.subcommands().values()):
                _complete_paths(filled)
        print(shtab.complete(parser, str(shell)))
        parser.exit()


FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "fish": "(__fish_complete_path (commandline -ct))"}
"""shtab's own completion of paths."""


def words_or_files(name: str, words: Iterable[str]) -> dict[str, Any]:
    """What shtab completes an argument with: these words, and files. `name` is that of the shell's function."""
    function, listed = f"_dense_reward_{name.replace('-', '_')}", " ".join(words)
    return {
        "bash": function,
        "zsh": function,
        "fish": f"({function})",
        "preamble": {
            "bash": f'{function}() {{\n  compgen -W "{listed}" -- "$1"\n  {FILES["bash"]} "$1"\n}}',
            "zsh": f"{function}() {{\n  compadd - {listed}\n  _files\n}}",
            "fish": f"function {function}\n  printf '%s\\n' {listed}\n  __fish_complete_path (commandline -ct)\nend",
        },
    }


def _complete_paths(parser: argparse.ArgumentParser) -> None:
    """Lets shells complete paths where an argument is one."""
    for action in parser._actions:
        metavar = action.metavar if isinstance(action.metavar, str) else ""
        if not hasattr(action, "complete") and metavar in {"PATH", "FILE", "RUN", "CHECKPOINT"}:
            action.complete = FILES  # type: ignore[attr-defined] # shtab reads it
