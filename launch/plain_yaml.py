"""Reads YAML that people write: plain data only, within bounds, whoever it comes from.

Tags that make objects are refused (it is PyYAML's safe loader), and so is what a small file can cost: aliases that repeat
each other ("billion laughs") or themselves, nesting that no file of ours has, numbers of thousands of digits. Whatever is
wrong is one `YamlError`; no other exception leaves this module but the OSErrors of reading a file.
"""

import re
import stat
from pathlib import Path
from typing import Any

import yaml

# Far more than any file of ours; PyYAML takes a second or two for so much.
MAX_BYTES = 64 << 10
# Values in a file, each as often as aliases repeat it.
MAX_VALUES = 10_000
MAX_DIGITS = 100


class YamlError(Exception):
    """What is wrong, in one line; `line` is where, from 1, None where that is not known."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.line = line


class _Loader(yaml.SafeLoader):
    """YAML whose 12:00:00 is text, as in YAML 1.2; by the rules of 1.1 it would be the number 43200."""

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        if node.tag in (_INTEGER, _FLOAT) and len(node.value) > MAX_DIGITS:
            raise yaml.constructor.ConstructorError(None, None, "a number of too many digits", node.start_mark)
        return super().construct_scalar(node)


_INTEGER, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INTEGER, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _INTEGER, re.compile(r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0o?[0-7_]+|0|[1-9][0-9_]*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"([-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> tuple[Any, list[tuple[str, int]]]:
    """Return the value in a file (None for an empty one), and where it is a mapping its keys as written, each with its line
    (from 1), those that are given twice as well.

    Raises:
        YamlError: it is not YAML, or not within the bounds.
        OSError: it cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise YamlError("it is no ordinary file")
    with path.open("rb") as file:
        contents = file.read(MAX_BYTES + 1)
    if len(contents) > MAX_BYTES:
        raise YamlError(f"it is longer than {MAX_BYTES >> 10} KiB")
    try:
        return parse_yaml(contents.decode())
    except UnicodeDecodeError as error:
        raise YamlError(f"byte {error.start} is not UTF-8") from error


def parse_yaml(text: str) -> tuple[Any, list[tuple[str, int]]]:
    """Return the value of a text, and its keys, as `read_yaml` does; raises `YamlError`."""
    if len(text) > MAX_BYTES:
        raise YamlError(f"it is longer than {MAX_BYTES >> 10} KiB")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None, []
            _count(node, {}, set())
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            keys = [(str(key.value), key.start_mark.line + 1) for key, _ in pairs]  # before merges are carried out
            return loader.construct_document(node), keys
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(_one_line(error.problem), mark.line + 1 if mark else None) from error
    except RecursionError as error:
        raise YamlError("it is nested too deeply") from error
    # PyYAML lets through what int(), float() and datetime say of a value, or of a tag that does not fit it.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise YamlError(_one_line(str(error))) from error


def _count(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """Return of how many values a node is made, with all repetitions."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in above:
        raise yaml.composer.ComposerError(None, None, "an alias that contains itself", node.start_mark)
    if id(node) not in known:
        above.add(id(node))
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_count(part, known, above) for part in parts)
        above.remove(id(node))
        if known[id(node)] > MAX_VALUES:
            raise yaml.composer.ComposerError(
                None, None, f"more than {MAX_VALUES} values, counting what aliases repeat", node.start_mark
            )
    return known[id(node)]


def _one_line(problem: str | None) -> str:
    return " ".join((problem or "").split())[:200] or "it cannot be read"
