"""A user's mistake, and how an entry point shows it.

`launch` runs where jax is absent or slow to import, so it cannot share `jasmine.errors`; the idea is the same. A
`UserError` is one line (what is wrong, where, what instead); entry points print it and exit with `EXIT_USER_ERROR`.
Everything else is a bug of ours and keeps its traceback.
"""

import argparse
import difflib
import functools
import io
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from launch.text import printable

EXIT_USER_ERROR = 2


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: what, where, what instead."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the choice nearest to `word`, or `""` when none is near."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


@functools.cache
def notice_once(text: str) -> None:
    """Write a line to stderr, however often it is given."""
    print(printable(text), file=sys.stderr)


def warn_once(text: str) -> None:
    """Write a warning to stderr, however often it is given."""
    notice_once(f"warning: {text}")


class _Once(argparse.Action):
    """Stores a value, as argparse does by default, but refuses to let a second one win silently."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        given = f"{self.dest} was given"
        if option_string is not None and given in vars(namespace):
            parser.error(f"{option_string} is given twice: keep one")
        setattr(namespace, given, True)
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, without the usage text around them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("action", None, _Once)

    def error(self, message: str) -> NoReturn:
        """Raise `message` as a UserError.

        Raises:
            UserError: always.
        """
        raise UserError(f"{message} (see `{self.prog} --help`)")


def run_entry_point(main: Callable[[list[str]], int]) -> NoReturn:
    """Exit with what `main(arguments)` returns, or with the one line of its UserError on stderr and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        code = EXIT_USER_ERROR
    except BrokenPipeError:  # `logs RUN | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
