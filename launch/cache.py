"""Keeps what this machine caches from growing for ever: what was used longest ago goes first, and nothing that is in use."""

import contextlib
import os
import shutil
import time
import uuid
from pathlib import Path

DAY = 86400.0


def used(entry: Path) -> None:
    """Note that a cached file or directory is used now."""
    with contextlib.suppress(OSError):
        os.utime(entry)


def prune(folder: Path, *, keep: int, days: float = 0.0) -> None:
    """Delete entries of a cache, but for the `keep` that were used last, those used within `days`, and those that a process
    of this machine was started from or runs in. Processes of other machines, which may share a home directory, cannot be
    seen; `days` is for them."""
    with contextlib.suppress(OSError):
        entries = sorted(folder.iterdir(), key=lambda entry: entry.stat().st_mtime, reverse=True)
        old = [entry for entry in entries[keep:] if entry.stat().st_mtime < time.time() - days * DAY]
        in_use = _mentioned(old)
        for entry in old:
            if entry in in_use:
                continue
            gone = entry.with_name(f".{uuid.uuid4().hex}.gone")
            entry.rename(gone)  # so that nobody finds half of it
            shutil.rmtree(gone) if gone.is_dir() else gone.unlink()


def _mentioned(paths: list[Path]) -> set[Path]:
    """Return those paths that a process's command line, environment or working directory names."""
    names = {path: os.fsencode(path) for path in paths}
    found: set[Path] = set()
    for process in Path("/proc").iterdir() if paths else ():
        if not process.name.isdecimal():
            continue
        said = b""
        for file in ("cmdline", "environ"):
            with contextlib.suppress(OSError):
                said += (process / file).read_bytes()
        with contextlib.suppress(OSError):
            said += os.fsencode(os.readlink(process / "cwd"))
        found |= {path for path, name in names.items() if name in said}
    return found
