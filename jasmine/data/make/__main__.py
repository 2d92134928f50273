"""The command `python -m jasmine.data.make KIND …`."""

import sys
from typing import Any

import tyro
from rich.console import Console

from jasmine.command_line import did_you_mean, parse
from jasmine.data.make import atari, minatar_games, procgen_games, recordings
from jasmine.data.make.maker import make_dataset
from jasmine.errors import EXIT_USER_ERROR, UserError

PROG = "python -m jasmine.data.make"
INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Parses `arguments` (those of the process by default) and makes the dataset; returns the exit code."""
    defaults: dict[str, Any] = {game: procgen_games.Procgen(game=game) for game in sorted(procgen_games.GAMES)}
    defaults |= {
        "atari": atari.Atari(),
        "minatar": minatar_games.MinAtar(),
        "video": recordings.Video(input_path=tyro.MISSING),
        "pngs": recordings.Pngs(input_path=tyro.MISSING),
    }
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] in (["-h"], ["--help"]):
        tyro.cli(
            tyro.extras.subcommand_type_from_defaults(defaults),
            prog=PROG,
            description="Makes a dataset of episodes: train, val and test splits of a game or of recordings.",
            args=arguments,
            use_underscores=True,
        )
    console = Console(stderr=True)
    try:
        if not arguments or arguments[0].startswith("-"):
            raise UserError(f"say first what to make: {PROG} KIND … (there are: {', '.join(defaults)})")
        kind, *rest = arguments
        if kind not in defaults:
            hint = did_you_mean(kind, defaults)
            raise UserError(f"nothing to make is called {kind!r}{hint} (there are: {', '.join(defaults)})")
        options = parse(type(defaults[kind]), rest, prog=f"{PROG} {kind}", default=defaults[kind])
        match options:
            case procgen_games.Procgen():
                make_dataset(options.game, options, procgen_games.source(options), console)
            case atari.Atari():
                make_dataset("atari", options, atari.source(options), console)
            case minatar_games.MinAtar():
                make_dataset("minatar", options, minatar_games.source(options), console)
            case recordings.Video():
                make_dataset("video", options, recordings.video_source(options), console)
            case recordings.Pngs():
                make_dataset("pngs", options, recordings.pngs_source(options), console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
