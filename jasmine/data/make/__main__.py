"""The command `python -m jasmine.data.make KIND …`."""

import sys
from typing import Any

import tyro
from rich.console import Console

from jasmine.data.make import atari, minatar_games, procgen_games, recordings
from jasmine.data.make.maker import make_dataset
from jasmine.errors import EXIT_USER_ERROR, UserError

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
    options = tyro.cli(
        tyro.extras.subcommand_type_from_defaults(defaults),
        prog="python -m jasmine.data.make",
        description="Makes a dataset of episodes: train, val and test splits of a game or of recordings.",
        args=arguments,
        use_underscores=True,
    )
    console = Console(stderr=True)
    try:
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
