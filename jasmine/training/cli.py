"""From a command line to a config, with one clear line for what does not fit."""

import dataclasses
import difflib
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar, get_type_hints

import tyro

from jasmine.errors import UserError
from jasmine.training.distributed import exit_with_job

Config = TypeVar("Config")


def option_names(config_class: type) -> list[str]:
    """All options of a config dataclass, without dashes; nested ones as `mesh.fsdp`."""
    names = []
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            names += [f"{field.name}.{name}" for name in option_names(kind)]
        else:
            names.append(field.name)
    return names


def parse(config_class: type[Config], argv: Sequence[str], description: str = "") -> Config:
    """Parses options; dashes and underscores are the same.

    Raises:
        UserError: an option that does not exist, with the nearest that does.
        SystemExit: 0 after --help; 2 after a value of the wrong type, which tyro explains.
    """
    config, unknown = tyro.cli(
        config_class,
        args=list(argv),
        description=description,
        config=(tyro.conf.OmitSubcommandPrefixes,),
        use_underscores=True,
        return_unknown_args=True,
    )
    if unknown:
        given = unknown[0].partition("=")[0]
        if not given.startswith("--"):
            raise UserError(f"unexpected argument {given!r}: options are given as --name value")
        names = option_names(config_class)
        near = difflib.get_close_matches(given.lstrip("-").replace("-", "_"), names, n=1)
        hint = f"; did you mean --{near[0]}?" if near else ""
        raise UserError(f"unknown option {given}{hint} (--help lists all)")
    return config


def run(main: Callable[[Config], None], config_class: type[Config], description: str = "") -> None:
    """The entry point of a baseline: parse, run, and turn a user's mistake into one line and exit code 2."""
    with exit_with_job():
        config = parse(config_class, sys.argv[1:], description)
        main(config)
