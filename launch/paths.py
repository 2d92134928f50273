"""Where the launcher itself is, and what the texts in settings mean that name places on this machine or in a bucket."""

import os
import re
from pathlib import Path

from launch.errors import UserError
from launch.objects import SCHEME, place
from launch.text import told

REPOSITORY = Path(__file__).resolve().parents[1]


def expand_path(text: str, key: str, base: Path) -> Path:
    """Return `text` with `~` and `$VARIABLES` replaced, relative to `base` where it is relative.

    A variable that is not set stays as it is in a `gs://` URL: a dry run shows it, a submission refuses it.

    Raises:
        UserError: a variable is not set, or it is a URL that is not one of Cloud Storage.
    """
    if text.startswith(SCHEME):
        url = os.path.expandvars(text)
        if not re.match(r"gs://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9]|\$\{?\w+\}?)(/|$)", url):
            what = text if url == text else f"{told(url)} (from {text})"
            raise UserError(f"{key}: {what}: not a place in Cloud Storage; expected gs://BUCKET/FOLDER")
        return place(url)
    if "://" in text:
        raise UserError(f"{key}: {text}: expected a directory that every host sees, or gs://BUCKET/FOLDER")
    expanded = os.path.expanduser(os.path.expandvars(text))
    if unset := re.search(r"\$\{?\w+\}?", expanded):
        raise UserError(f"{key}: {text}: the environment variable {unset.group()} is not set")
    return Path(os.path.normpath(base / expanded))
