"""Texts from elsewhere: which may be passed on to shells, schedulers and processes, and how the others are shown.

What is passed on arrives exactly as it was written or is refused beforehand. What is shown on a terminal cannot steer it.
"""

import re
from typing import Any

# All control characters but tab and line feed, and the halves of characters that UTF-8 does not have (Python's stand-in for
# bytes of a command line that are not UTF-8).
_UNFIT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_COLOUR = re.compile(r"\x1b\[[0-9;:]*m")


def unfit(text: str, *, lines: bool = False) -> str | None:
    """Return why a text cannot be passed on, None if it can; `lines` says whether it may have several."""
    if found := _UNFIT.search(text):
        kind = "bytes that are not UTF-8" if "\ud800" <= found[0] <= "\udfff" else f"the control character {found[0]!r}"
        return f"{shown(text)} has {kind} in it"
    if "\n" in text and not lines:
        return f"{shown(text)} is more than one line"
    return None


def printable(text: str, *, colours: bool = False) -> str:
    """Return a text as a terminal may have it: control characters as escapes; colours may stay colours."""
    if colours:
        found = [*_COLOUR.finditer(text)]
        plain = [printable(part) for part in _COLOUR.split(text)]
        return plain[0] + "".join(mark[0] + part for mark, part in zip(found, plain[1:], strict=True))
    return _UNFIT.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def told(name: str) -> str:
    """Return a name for a message as it is, or what `shown` makes of one that would not do there."""
    return name if len(name) <= 200 and not unfit(name) else shown(name)


def shown(value: Any, most: int = 120) -> str:
    """Return `repr(value)` for an error message: one line of at most about `most` characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"
