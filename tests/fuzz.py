"""Damaged and hostile versions of valid files, for tests that feed them to everything that reads files.

`JASMINE_FUZZ=20 pytest …` tries twenty times as many as CI does; `--hypothesis-show-statistics` counts them.
"""

import json
import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EFFORT = float(os.environ.get("JASMINE_FUZZ", "1"))


def tries(count: int) -> settings:
    """The settings of a test that makes `count` tries in CI. Whether one hangs is pytest's to say, not a deadline's."""
    return settings(
        max_examples=max(1, int(count * EFFORT)),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# Bytes that mean something to those who parse.
_TOKENS = [
    b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\n", b"\r", b"{", b"}", b"[", b"]", b'"', b":", b",", b"- ", b"&a ", b"*a", b"? ",
    b"| ", b"<<: *a", b"!!python/object/apply:os.system ['true']", b"!!binary x", b"!!timestamp x", b"!!int x", b"!!set {a}",
    b"%YAML 9", b"---\n", b"...", b"2001-99-99", b"1e999", b"0x", b"1_0", b"9" * 5000, b"-0", b"NaN", b"null", b"true",
    b"[" * 400, b'{"a":' * 400, b"\x1b[2J", b"\xe2\x80\xae", b"\\ud800", b"../", b"%s%n", b"${HOME}",
]  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """A valid file after some accidents: bytes flipped, lost, doubled, moved, put in, or its end cut off."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        size = draw(st.integers(1, 40))
        match draw(st.integers(0, 6)):
            case 0 if data:
                data[at] ^= draw(st.integers(1, 255))
            case 1:
                del data[at : at + size]
            case 2:
                data[at:at] = data[at : at + size] * draw(st.integers(1, 3))
            case 3:
                data[at:at] = draw(st.sampled_from(_TOKENS))
            case 4:
                data[at : at + size] = draw(st.sampled_from(_TOKENS))
            case 5:
                data[at:at] = draw(st.binary(max_size=20))
            case _:
                del data[at:]
    return bytes(data)


_ODD_TEXTS = [
    "", " ", "\0", "\x1b]0;x\x07", "\ud800", "a\nb", "../../x", "/etc/passwd", "-x", "--x=y", "$(x)", "`x`", "é" * 300,
    "9" * 5000, "nan", "[/red]", "x" * 70_000,
]  # fmt: skip
odd_texts = st.one_of(st.text(max_size=20), st.sampled_from(_ODD_TEXTS))
odd_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 3),
        st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**30, 10**400]),
        st.floats(),
        odd_texts,
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(odd_texts, inner, max_size=3)),
    max_leaves=6,
)


@st.composite
def altered(draw: st.DrawFn, valid: Any) -> Any:
    """A JSON value of which some parts are others, missing, or called otherwise."""
    value = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(1, 4))):
        places = list(_places(value))
        if not places:
            return draw(odd_values)
        parent, key = draw(st.sampled_from(places))
        match draw(st.integers(0, 3)):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[draw(odd_texts)] = parent.pop(key)
            case 2 if isinstance(parent, list):
                parent.insert(key, parent[key])
            case _:
                parent[key] = draw(odd_values)
    return value


def _places(value: Any) -> Any:
    """Every (container, key) in a JSON value."""
    for key, part in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(part, dict | list):
            yield from _places(part)
