"""The entry point of a baseline. What it parses its options with (`jasmine.command_line`) needs no jax."""

import sys
from collections.abc import Callable

from jasmine.command_line import Config, option_names, parse
from jasmine.training.distributed import exit_with_job

__all__ = ["exit_with_job", "option_names", "parse", "run"]


def run(main: Callable[[Config], None], config_class: type[Config], description: str = "") -> None:
    """The entry point of a baseline: parse, run, and turn a user's mistake into one line and exit code 2."""
    with exit_with_job():
        config = parse(config_class, sys.argv[1:], description)
        main(config)
