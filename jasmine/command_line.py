"""From a command line to a dataclass of options, with one clear line for what does not fit.

tyro and argparse explain a mistake in a box or in a page of usage; the last line of that is what a log ends with, and what
`jobs.py explain` quotes. Here a mistake is a `UserError` instead, whoever made the parser.
"""

import argparse
import contextlib
import dataclasses
import difflib
import io
import re
import sys
import types
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from jasmine.errors import UserError

Config = TypeVar("Config")


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, without the usage text around them."""

    def error(self, message: str) -> NoReturn:
        """Raises `message` as a UserError."""
        raise UserError(f"{message} (see `{self.prog} --help`)")


def option_kinds(config_class: type) -> dict[str, Any]:
    """The type of every option of a config dataclass, by its name without dashes; nested ones as `mesh.fsdp`."""
    kinds: dict[str, Any] = {}
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            kinds |= {f"{field.name}.{name}": inner for name, inner in option_kinds(kind).items()}
        else:
            kinds[field.name] = kind
    return kinds


def option_names(config_class: type) -> list[str]:
    """All options of a config dataclass, without dashes; nested ones as `mesh.fsdp`."""
    return list(option_kinds(config_class))


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`"; did you mean x?"` for the choice nearest to `word`, or `""` where none is near."""
    near = difflib.get_close_matches(word, list(choices), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def parse(
    config_class: type[Config],
    argv: Sequence[str],
    description: str | None = None,
    *,
    prog: str | None = None,
    default: Config | None = None,
) -> Config:
    """Parses options; dashes and underscores are the same.

    Raises:
        UserError: an option that does not exist, with the nearest that does; one with a value of another type, or without
            any; one that has to be given and is not.
        SystemExit: 0 after --help.
    """
    given_default: dict[str, Any] = {} if default is None else {"default": default}
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            config, unknown = tyro.cli(
                config_class,
                prog=prog,
                args=list(argv),
                description=description,
                config=(tyro.conf.OmitSubcommandPrefixes,),
                use_underscores=True,
                return_unknown_args=True,
                **given_default,
            )
    except SystemExit as leaving:
        if leaving.code in (0, None):
            raise
        raise UserError(_one_line(complaint.getvalue(), config_class, argv)) from None
    sys.stderr.write(complaint.getvalue())  # warnings
    if unknown:
        given = unknown[0].partition("=")[0]
        if not given.startswith("--"):
            raise UserError(f"unexpected argument {given!r}: options are given as --name value")
        hint = did_you_mean("--" + _normal(given), [f"--{name}" for name in option_names(config_class)])
        raise UserError(f"unknown option {given}{hint} (--help lists all)")
    return config


def _normal(option: str) -> str:
    return option.partition("=")[0].lstrip("-").replace("-", "_")


def _one_line(box: str, config_class: type, argv: Sequence[str]) -> str:
    """What tyro says in a box, in a line: the option, its value, and what is expected of it."""
    text = _unboxed(box)
    names = re.findall(r"--[A-Za-z][\w.-]*", text)
    kinds = option_kinds(config_class)
    if "required" in text and names:
        return f"{', '.join(dict.fromkeys(names))}: missing, and has no default (--help says what it is)"
    expected = _expected(kinds[_normal(names[0])]) if names and _normal(names[0]) in kinds else None
    if expected is None:
        return text
    values = _values(_normal(names[0]), argv)
    if "Missing value" in text or not values:
        return f"{names[0]}: its value is missing; expected {expected}"
    choice = re.search(r"invalid choice '(.*?)'", text)
    value = choice.group(1) if choice and choice.group(1) in values else values[-1]
    return f"{names[0]}={value}: expected {expected}"


def _unboxed(box: str) -> str:
    """The sentences of one of tyro's boxes: what stands between its title and the rule after them. The frame is of ASCII, or
    there is none, where the terminal has nothing better."""
    lines: list[str] = []
    _, *rest = [*filter(None, (line.strip("│| ") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()))] or [""]
    for words in rest:
        if words.strip("─-╰╯+"):
            lines.append(words)
        elif lines:
            break
    return " ".join(lines)


def _values(name: str, argv: Sequence[str]) -> list[str]:
    """The values that an option is given on the command line, in order."""
    found: list[str] = []
    for index, argument in enumerate(argv):
        if argument.startswith("--") and _normal(argument) == name:
            found += [argument.partition("=")[2]] if "=" in argument else argv[index + 1 : index + 2]
    return found


def _expected(kind: Any) -> str | None:
    """What a value of this type looks like, in words; None for a type that has none."""
    if get_origin(kind) in (Union, types.UnionType):
        (kind, *others) = (part for part in get_args(kind) if part is not types.NoneType)
        return None if others else _expected(kind)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    return {int: "a whole number", float: "a number", str: "a text"}.get(kind)
