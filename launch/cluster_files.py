"""Reads `cluster_configs/*.yaml`, and tells whoever gets one wrong what is wrong, where, and what would be right.

A cluster is a YAML file; its stem is the cluster's name. Values come, in rising order of precedence, from the schema's
defaults (`launch.config`), the file, `JASMINE_STORAGE` (for `storage`) and `--set KEY=VALUE`.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from launch.config import BACKENDS, AnyCluster
from launch.errors import UserError, did_you_mean
from launch.paths import REPOSITORY
from launch.plain_yaml import YamlError, parse_yaml, read_yaml
from launch.text import shown, told, unfit
from launch.values import SECRET_NAME

CLUSTER_DIR = REPOSITORY / "cluster_configs"

# More than anything here can need, and little enough for whatever computes with it.
_MOST = 10**9


def cluster_names() -> list[str]:
    """Return the names that `--cluster` takes, sorted."""
    return sorted(path.stem for path in CLUSTER_DIR.glob("*.yaml"))


def load_cluster(cluster: str, overrides: Sequence[str] = ()) -> tuple[str, AnyCluster]:
    """Read a cluster's settings.

    Args:
        cluster: the stem of a file in `cluster_configs/`, or the path of a YAML file.
        overrides: `KEY=VALUE` texts, the values in YAML; `env.NAME=VALUE` reaches into `env`.

    Returns:
        The name to call the cluster by (a file's path stays a path), and its validated settings.

    Raises:
        UserError: no such cluster, YAML that does not parse, an unknown key, or a value of the wrong type.
    """
    if "/" in cluster or cluster.endswith((".yaml", ".yml")):
        path = Path(os.path.expanduser(cluster))
        name = os.path.realpath(path)
        if not os.path.isfile(path):
            raise UserError(
                f"cluster file {told(cluster)} does not exist; clusters by name: {', '.join(cluster_names())}"
            )
    else:
        path, name = CLUSTER_DIR / f"{cluster}.yaml", cluster
        if cluster not in cluster_names():
            hint = did_you_mean(cluster[:99], cluster_names())
            raise UserError(f"unknown cluster {shown(cluster)}{hint} (there are: {', '.join(cluster_names())})")
    values, lines = _read_yaml(path)
    file = os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    if storage := os.environ.get("JASMINE_STORAGE"):
        values["storage"] = storage
    return name, _validated(values, overrides, lambda key: f"{file}:{lines[key]}" if key in lines else file)


def change_settings(settings: dict[str, Any], overrides: Sequence[str], origin: str) -> AnyCluster:
    """Validate settings that a run has stored, changed by `overrides`; `origin` names them in errors.

    Raises:
        UserError: an unknown key or a value of the wrong type.
    """
    return _validated(dict(settings), overrides, lambda key: origin)


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return a YAML file's top-level values, and the line (from 1) of each of its keys."""
    try:
        values, keys = read_yaml(path)
    except YamlError as error:
        where = path if error.line is None else f"{path}:{error.line}"
        raise UserError(f"{where}: not valid YAML: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected lines of `key: value`, the first of them `backend: local`")
    lines: dict[str, int] = {}
    for key, line in keys:
        if problem := unfit(key):
            raise UserError(f"{path}:{line}: {problem}")
        if key in lines:  # YAML parsers let the last one win, silently
            raise UserError(f"{path}:{line}: {shown(key)} is given twice, first on line {lines[key]}; keep one")
        lines[key] = line
    return {str(key): value for key, value in values.items()}, lines


def _validated(values: dict[str, Any], overrides: Sequence[str], origin: Callable[[str], str]) -> AnyCluster:
    """Apply overrides and validate; `origin(key)` says where a key that was not overridden stands."""
    overridden: set[str] = set()
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"--set {shown(key)}: expected KEY=VALUE, as in --set processes=2")
        if problem := unfit(key):
            raise UserError(f"--set: {problem}")
        try:
            value, _ = parse_yaml(text)
        except YamlError as error:
            raise UserError(f"--set {key}: the value is not valid YAML ({error}); quote it") from error
        first, dot, rest = key.partition(".")
        overridden.add(first)
        if dot:
            old = values.get(first)
            values[first] = {**(old if isinstance(old, dict) else {}), rest: value}
        else:
            values[first] = value

    def where(key: str) -> str:
        return f"--set {key}" if key in overridden else origin(key)

    backend = values.get("backend")
    if not isinstance(backend, str) or backend not in BACKENDS:
        hint = did_you_mean(str(backend)[:99], BACKENDS)
        problem = "the key is missing" if backend is None else f"unknown value {shown(backend)}{hint}"
        raise UserError(f"{_named(where('backend'), 'backend')}: {problem} (there are: {', '.join(BACKENDS)})")
    schema = BACKENDS[backend]
    for key, value in values.items():
        try:
            _check_passable(value, env=key == "env")
        except ValueError as error:
            # The error has the text in it, which may be a secret.
            hidden = "a name or a value has characters in it that cannot be passed on, such as control characters"
            raise UserError(f"{_named(where(key), key)}: {hidden if key in ('env', 'secrets') else error}") from error
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise UserError(_one_line(error, schema, where)) from error


def _check_passable(value: Any, *, env: bool = False) -> None:
    """Raise ValueError for texts and numbers that no process, shell or scheduler could be given; in `env`, whose numbers are
    texts, those may have several lines."""
    if isinstance(value, str) and (problem := unfit(value, lines=env)):
        raise ValueError(problem)
    if isinstance(value, int | float) and not abs(value) <= _MOST and not env:
        raise ValueError(f"{shown(value)} is too large; expected at most {_MOST:,}")
    if isinstance(value, dict):
        for name in value:
            _check_passable(name)
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_passable(part, env=env)


def _named(where: str, key: str) -> str:
    """Say a key's place and, unless that has it already, its name."""
    return where if where == f"--set {key}" else f"{where}: {key}"


def _one_line(error: ValidationError, schema: type[AnyCluster], where: Callable[[str], str]) -> str:
    """Turn the first complaint of pydantic into the line a user reads; a misspelt key comes before all others."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    keys = list(schema.model_fields)
    if not first["loc"]:
        return f"{where('')}: {first['msg'].removeprefix('Value error, ')}"
    key = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return f"{where(key)}: unknown key {shown(key)}{did_you_mean(key[:99], keys)} (keys: {', '.join(sorted(keys))})"
    if first["type"] == "value_error":
        return f"{_named(where(key), key)}: {first['msg'].removeprefix('Value error, ')}"
    if first["type"] == "missing":
        return f"{where(key)}: the key {key} is missing; expected {schema.model_fields[key].description}"
    inside = ".".join(map(str, first["loc"])) if key == "env" else key
    found = f"{inside} is {shown(first['input'])}"
    if key == "secrets" or SECRET_NAME.search(found):  # perhaps with its value in it
        found = f"{inside} is not that" if key in ("env", "secrets") else f"{key} is something else"
    return f"{where(key)}: {found}; expected {schema.model_fields[key].description}"
