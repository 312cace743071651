"""Reading a command line: commands, flags and their values, and what is said of wrong ones."""

from __future__ import annotations

import argparse
import difflib
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from aaconv.cli.exits import UsageError
from aaconv.errors import close_matches


class Parser(argparse.ArgumentParser):
    """An argparse parser that knows no abbreviations and raises instead of leaving Python."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> Any:
        raise UsageError(f"{message}; see `{self.prog} --help`")


class Commands:
    """All commands: each file of this folder adds its own, and `parse` finds the one that a line names."""

    def __init__(self) -> None:
        self._parser = Parser(
            prog="aaconv",
            description="Attention-augmented convolution: train networks, look into them, use them.",
            epilog="`aaconv COMMAND --help` says more of a command.",
        )
        self._named: dict[str, Parser] = {}
        self._within: dict[str, Any] = {"": self._parser.add_subparsers(metavar="COMMAND", parser_class=Parser)}
        self._groups: dict[str, tuple[str, str]] = {}

    def add(
        self, name: str, function: Callable[[Any], int], help: str, *, config: str = "", workdir: str = ""
    ) -> Parser:
        """Adds a command.

        Args:
          name: after ``aaconv``; two words within a group or beside a command that `add_kinds` opened.
          function: runs it, of the parsed arguments; returns the exit code.
          help: one sentence.
          config: what ``--config`` is; empty: it takes none, and no ``--config.KEY=VALUE``.
          workdir: what ``--workdir`` is; empty: it takes none.

        Returns:
          Its parser, for its other flags.
        """
        epilog = (
            "Any key of the config can be set: --config.KEY=VALUE or --config.KEY VALUE, for example "
            "--config.model.num_heads=4 --config.model.stages=2,3. `aaconv show` lists the keys."
        )
        first, _, last = name.rpartition(" ")
        command = self._within[first].add_parser(last, help=help, description=help, epilog=epilog if config else None)
        command.set_defaults(function=function)
        command.add_argument("--debug", action="store_true", help="show where an error comes from")
        if config:
            command.add_argument("--config", metavar="FILE[:ARGUMENT]", help=config)
        if workdir:
            command.add_argument("--workdir", metavar="DIR", help=workdir)
        self._named[name] = command
        return command

    def add_group(self, name: str, help: str, description: str, *, metavar: str, unknown: str, missing: str) -> None:
        """Opens a word that is followed by a command and is none itself, such as ``bench``.

        Args:
          name: the word.
          help: one sentence, in the list of commands.
          description: of its own help.
          metavar: stands for its commands there.
          unknown: between the word and a command that it does not have, in what is said of that.
          missing: what is said where nothing follows.
        """
        group = self._within[""].add_parser(name, help=help, description=description)
        self._within[name] = group.add_subparsers(metavar=metavar, parser_class=Parser)
        self._groups[name] = unknown, missing

    def add_kinds(self, name: str) -> None:
        """Lets a command, such as ``sweep``, be followed by further ones."""
        # Not the parser's own: argparse would take the value of a misspelt flag for one of them.
        self._within[name] = Parser(prog=f"aaconv {name}").add_subparsers(parser_class=Parser)

    def parse(self, argv: Sequence[str]) -> tuple[Callable[[Any], int], argparse.Namespace]:
        """Returns the function that runs a line, and its arguments.

        Args:
          argv: what follows ``aaconv``.

        Raises:
          UsageError: the line is wrong.
        """
        first = list(dict.fromkeys(name.split()[0] for name in self._named))
        if not argv:
            self._parser.print_help(sys.stderr)
            raise UsageError(f"no command: give one of {', '.join(first)}")
        if argv[0] == "--version":
            argv = ["version"]
        asks_help = {"-h", "--help"}
        if argv[0] not in [*first, *asks_help]:
            near = close_matches(argv[0], first) or f": give one of {', '.join(first)}"
            raise UsageError(f"unknown command {argv[0]!r}{near}")
        name, parser, words = argv[0], self._parser, argv
        kinds = [command.split()[1] for command in self._named if command.startswith(f"{name} ")]
        what = argv[1] if len(argv) > 1 else ""
        if name in self._groups:
            if what not in [*kinds, *asks_help]:
                near = close_matches(what, kinds) or f": give one of {', '.join(kinds)}"
                unknown, missing = self._groups[name]
                raise UsageError(f"`aaconv {name}` {unknown} {what!r}{near}" if what else f"{missing}{near}")
            name = f"{name} {what}"
        elif kinds and what and not what.startswith("-"):
            if what not in kinds:
                near = close_matches(what, kinds) or f": it knows {', '.join(kinds)}"
                raise UsageError(f"`aaconv {name}` does not know {what!r}{near}; a config file comes after --config")
            name = f"{name} {what}"
            parser, words = self._named[name], argv[2:]
        rest, overrides = _take_overrides(words)
        arguments, wrong = parser.parse_known_args(rest)
        if wrong:
            flags = [flag for action in self._named[name]._actions for flag in action.option_strings]
            raise UsageError(_unknown(wrong[0], name, flags))
        arguments.overrides = overrides
        if overrides and not hasattr(arguments, "config"):
            raise UsageError(f"`aaconv {name}` takes no config: leave out --config.{overrides[0]}")
        return arguments.function, arguments


def _take_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits ``--config.KEY=VALUE`` and ``--config.KEY VALUE`` from the rest."""
    rest, overrides, waiting = [], [], list(argv)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--config."):
            rest.append(word)
            continue
        override = word.removeprefix("--config.")
        # A value may be negative, but not a flag.
        if "=" not in override and waiting and not waiting[0].startswith("--"):
            override = f"{override}={waiting.pop(0)}"
        if "=" not in override:
            raise UsageError(f"{word} has no value: write {word}=VALUE (true or false for a switch)")
        overrides.append(override)
    return rest, overrides


def _unknown(word: str, command: str, flags: Iterable[str]) -> str:
    if not word.startswith("-"):
        config = word.partition(":")[0].endswith(".py")
        hint = f"did you mean --config {word}?" if config else f"see `aaconv {command} --help`"
        return f"`aaconv {command}` does not take {word!r}; {hint}"
    name = word.partition("=")[0]
    from aaconv import config

    keys = config.keys()
    asked = name.removeprefix("--")
    same = [key for key in keys if asked in (key, key.rpartition(".")[2])]
    if same and "--config" in flags:
        return f"unknown flag {name}; did you mean {' or '.join(f'--config.{key}' for key in same)}?"
    near = difflib.get_close_matches(name, list(flags), n=2, cutoff=0.6)
    hint = f"; did you mean {' or '.join(near)}?" if near else f"; see `aaconv {command} --help`"
    return f"unknown flag {name} of `aaconv {command}`{hint}"


def at_least_one(text: str) -> int:
    """The value of a flag: a whole number."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least 1")
    return int(text)


def at_least_zero(text: str) -> int:
    """The value of a flag: a whole number."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least 0")
    return int(text)


def above_zero(text: str) -> float:
    """The value of a flag: a finite number."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0")
    return number
