"""The schema of `cluster_configs/*.yaml`, and what a user is told who gets one wrong.

A cluster is a YAML file; its stem is the cluster's name. Values come, in rising order of precedence, from the schema's
defaults, the file, `JASMINE_STORAGE` (for `storage`) and `--set KEY=VALUE`. A key that the schema does not know is an
error, never ignored: a misspelt limit that silently does not apply costs more than a refused submission.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from launch.errors import UserError, did_you_mean

REPOSITORY = Path(__file__).resolve().parents[1]
CLUSTER_DIR = REPOSITORY / "cluster_configs"


class _Loader(yaml.SafeLoader):
    """YAML whose 12:00:00 is text, as in YAML 1.2; by the rules of 1.1 it would be the number 43200."""


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

# Set for each process by the launcher; a cluster file that set them too would contradict it.
OWNED_VARIABLES = frozenset(
    {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JASMINE_RUN_DIR", "JASMINE_ATTEMPT"}
)

# Names whose values are not written anywhere.
SECRET_NAME = re.compile(r"KEY|TOKEN(?!IZER)|SECRET|PASSWORD", re.IGNORECASE)


def _numbers_as_text(env: Any) -> Any:
    """Let `OMP_NUM_THREADS: 2` mean "2"; a bare `true` stays an error, for programs disagree on how to spell it."""
    if not isinstance(env, dict):
        return env
    return {k: str(v) if isinstance(v, int | float) and not isinstance(v, bool) else v for k, v in env.items()}


def _not_ours(env: dict[str, str]) -> dict[str, str]:
    if taken := sorted(OWNED_VARIABLES & env.keys()):
        raise ValueError(f"{taken[0]} is set by the launcher for each process; leave it out")
    return env


class Cluster(BaseModel):
    """The keys that every backend has. Each description is what an error message says was expected."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    storage: str = Field("runs", min_length=1, description="a directory (text) under which run directories are made")
    env: Annotated[dict[str, str], BeforeValidator(_numbers_as_text), AfterValidator(_not_ours)] = Field(
        default_factory=dict, description="variables for the job, NAME: text (quote true, false, yes and no)"
    )
    python: str | None = Field(None, description="the path (text) of the job's Python interpreter")
    max_failures: int = Field(3, ge=0, description="a whole number, 0 or more")
    grace_seconds: int = Field(120, ge=1, description="a whole number of seconds, at least 1")
    compilation_cache: str = Field("~/.cache/jasmine/xla", description="a directory (text) for compiled programs")


class LocalCluster(Cluster):
    """This machine, as `processes` hosts that have `devices_per_process` CPU devices each."""

    backend: Literal["local"] = Field(description="the text 'local'")
    max_preemptions: int = Field(100, ge=0, description="a whole number, 0 or more")
    processes: int = Field(1, ge=1, description="a whole number, at least 1")
    devices_per_process: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1, description="a whole number of CPU devices, at least 1, or 'auto' for whatever devices this machine has"
    )

    @model_validator(mode="after")
    def _one_owner_of_real_devices(self) -> "LocalCluster":
        if self.devices_per_process == "auto" and self.processes > 1:
            raise ValueError(f"devices_per_process 'auto' is for 1 process, not {self.processes}; give a number")
        return self


def _one_line_each(lines: list[str]) -> list[str]:
    for line in lines:
        if "\n" in line:
            raise ValueError(f"{line!r} is more than one line; give one item for each")
    return lines


def _slurm_options(lines: list[str]) -> list[str]:
    for line in _one_line_each(lines):
        if not line.startswith("-"):
            raise ValueError(f"{line!r} is no option of sbatch; write it as sbatch takes it, for example --exclusive")
    return lines


def _minutes_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _a_duration(text: str) -> str:
    if not _SLURM_TIME.fullmatch(text):
        raise ValueError(f"{text!r} is no time as sbatch takes it, such as 90 (minutes), 12:00:00 or 2-00:00:00")
    return text


def _no_secrets(env: dict[str, str]) -> dict[str, str]:
    if secret := next((name for name in env if SECRET_NAME.search(name)), None):
        raise ValueError(f"{secret} looks like a secret, and would be stored: name it under secrets instead")
    return env


_SLURM_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}")
_Text = Annotated[str, Field(min_length=1, pattern=r"^[^\n]*$")]
ENVIRONMENT = "environment"


class SlurmCluster(Cluster):
    """A Slurm cluster, by what one job asks of it. Every key but `backend` may be left out."""

    backend: Literal["slurm"] = Field(description="the text 'slurm'")
    env: Annotated[
        dict[str, str], BeforeValidator(_numbers_as_text), AfterValidator(_not_ours), AfterValidator(_no_secrets)
    ] = Field(default_factory=dict, description="variables for the job, NAME: text (quote true, false, yes and no)")
    secrets: dict[str, _Text] = Field(
        default_factory=dict,
        description=f"NAME: '{ENVIRONMENT}' (of the shell that submits) or the path of a file that holds the value",
    )
    max_preemptions: int | None = Field(None, ge=0, description="a whole number, 0 or more, or null for no limit")

    partition: _Text | None = Field(None, description="a partition's name (text)")
    account: _Text | None = Field(None, description="an account's name (text)")
    qos: _Text | None = Field(None, description="the name of a quality of service (text)")
    nodes: int = Field(1, ge=1, description="a whole number, at least 1")
    gpus_per_node: int = Field(0, ge=0, description="a whole number, 0 or more")
    gpu_type: _Text | None = Field(None, description="a type as in the cluster's gres, such as h100")
    cpus_per_node: int | None = Field(None, ge=1, description="a whole number, at least 1, or null for the default")
    processes_per_node: Annotated[int, Field(ge=1)] | Literal["gpu"] = Field(
        1, description="a whole number, at least 1, or 'gpu' for one process for each GPU"
    )
    memory: _Text | None = Field(None, description="text such as '500G', or '0' for all of a node's")
    time_limit: Annotated[str, BeforeValidator(_minutes_as_text), AfterValidator(_a_duration)] | None = Field(
        None, description="a time as sbatch takes it: 90 (minutes), 12:00:00 or 2-00:00:00"
    )
    constraint: _Text | None = Field(None, description="features that nodes must have (text)")
    reservation: _Text | None = Field(None, description="a reservation's name (text)")
    exclude: _Text | None = Field(None, description="nodes to stay away from, as in node[01-03]")
    mail: _Text | None = Field(None, description="an address (text) that Slurm writes to when the job ends or fails")
    extra: Annotated[list[str], AfterValidator(_slurm_options)] = Field(
        default_factory=list, description="a list of options for sbatch, as in ['--exclusive']"
    )
    setup: Annotated[list[str], AfterValidator(_one_line_each)] = Field(
        default_factory=list, description="a list of shell lines, run on the first node before the job"
    )
    container: _Text | None = Field(None, description="an image (text): a path or what the runtime can fetch")
    container_runtime: Literal["apptainer", "pyxis"] = Field("apptainer", description="'apptainer' or 'pyxis'")
    container_mounts: list[_Text] = Field(
        default_factory=list, description="a list of paths that the container sees, as in ['/data', '/a:/b']"
    )
    init_timeout: int = Field(600, ge=1, description="a whole number of seconds, at least 1")
    heartbeat_timeout: int = Field(60, ge=1, description="a whole number of seconds, at least 1")
    preflight_seconds: int = Field(300, ge=0, description="a whole number of seconds, or 0 for no preflight")
    hang_timeout: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="a whole number of seconds without a step, or 'auto' for ten steps and at least 120 s"
    )
    exclude_hours: float = Field(24.0, ge=0, description="a number of hours, 0 or more")

    @model_validator(mode="after")
    def _a_share_for_each_process(self) -> "SlurmCluster":
        if self.processes_per_node == "gpu" and not self.gpus_per_node:
            raise ValueError("processes_per_node is 'gpu' but gpus_per_node is 0; give both, or a number of processes")
        if self.gpus_per_node % self.processes_on_a_node and self.gpus_per_node:
            raise ValueError(
                f"gpus_per_node {self.gpus_per_node} is not a multiple of processes_per_node {self.processes_per_node}; "
                "each process needs the same number of GPUs"
            )
        if self.gpu_type and not self.gpus_per_node:
            raise ValueError(f"gpu_type is {self.gpu_type!r} but gpus_per_node is 0; say how many")
        return self

    @property
    def processes_on_a_node(self) -> int:
        """How many processes of the job each node runs."""
        return self.gpus_per_node if self.processes_per_node == "gpu" else self.processes_per_node


AnyCluster = LocalCluster | SlurmCluster
BACKENDS: dict[str, type[AnyCluster]] = {"local": LocalCluster, "slurm": SlurmCluster}


def json_schema() -> dict[str, Any]:
    """Return the schema of a cluster file, for editors; `cluster_configs/schema.json` holds it."""
    schema = TypeAdapter(Annotated[AnyCluster, Field(discriminator="backend")]).json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A Jasmine cluster", **schema}


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
        path, name = Path(cluster).expanduser(), str(Path(cluster).expanduser().resolve())
        if not path.is_file():
            raise UserError(f"cluster file {cluster} does not exist; clusters by name: {', '.join(cluster_names())}")
    else:
        path, name = CLUSTER_DIR / f"{cluster}.yaml", cluster
        if cluster not in cluster_names():
            hint = did_you_mean(cluster, cluster_names())
            raise UserError(f"unknown cluster {cluster!r}{hint} (there are: {', '.join(cluster_names())})")
    values, lines = _read_yaml(path)
    shown = os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    if storage := os.environ.get("JASMINE_STORAGE"):
        values["storage"] = storage
    return name, _validated(values, overrides, lambda key: f"{shown}:{lines[key]}" if key in lines else shown)


def change_settings(settings: dict[str, Any], overrides: Sequence[str], origin: str) -> AnyCluster:
    """Validate settings that a run has stored, changed by `overrides`; `origin` names them in errors.

    Raises:
        UserError: an unknown key or a value of the wrong type.
    """
    return _validated(dict(settings), overrides, lambda key: origin)


def expand_path(text: str, key: str, base: Path) -> Path:
    """Return `text` with `~` and `$VARIABLES` replaced, relative to `base` where it is relative.

    Raises:
        UserError: a variable is not set.
    """
    expanded = os.path.expanduser(os.path.expandvars(text))
    if unset := re.search(r"\$\{?\w+\}?", expanded):
        raise UserError(f"{key}: {text}: the environment variable {unset.group()} is not set")
    return Path(os.path.normpath(base / expanded))


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return a YAML file's top-level values, and the line (from 1) of each of its keys."""
    try:
        text = path.read_text()
        node = yaml.compose(text, Loader=_Loader)
        values = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}: expected lines of `key: value`, the first of them `backend: local`")
    lines: dict[str, int] = {}
    for key_node, _ in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in lines:  # YAML parsers let the last one win, silently
            raise UserError(f"{path}:{line}: {key} is given twice, first on line {lines[key]}; keep one")
        lines[key] = line
    return {str(key): value for key, value in values.items()}, lines


def _validated(values: dict[str, Any], overrides: Sequence[str], origin: Callable[[str], str]) -> AnyCluster:
    """Apply overrides and validate; `origin(key)` says where a key that was not overridden stands."""
    overridden: set[str] = set()
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"--set {override}: expected KEY=VALUE, as in --set processes=2")
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            raise UserError(f"--set {override}: the value is not valid YAML; quote it") from error
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
        hint = did_you_mean(str(backend), BACKENDS)
        problem = "the key is missing" if backend is None else f"unknown value {backend!r}{hint}"
        raise UserError(f"{where('backend')}: backend: {problem} (there are: {', '.join(BACKENDS)})")
    schema = BACKENDS[backend]
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise UserError(_one_line(error, schema, where)) from error


def _one_line(error: ValidationError, schema: type[AnyCluster], where: Callable[[str], str]) -> str:
    """Turn the first complaint of pydantic into the line a user reads; a misspelt key comes before all others."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    keys = list(schema.model_fields)
    if not first["loc"]:
        return f"{where('')}: {first['msg'].removeprefix('Value error, ')}"
    key = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return f"{where(key)}: unknown key {key!r}{did_you_mean(key, keys)} (keys: {', '.join(sorted(keys))})"
    if first["type"] == "value_error":
        return f"{where(key)}: {key}: {first['msg'].removeprefix('Value error, ')}"
    shown = ".".join(map(str, first["loc"])) if key == "env" else key
    return f"{where(key)}: {shown} is {first['input']!r}; expected {schema.model_fields[key].description}"


if __name__ == "__main__":  # python -m launch.config > cluster_configs/schema.json
    print(json.dumps(json_schema(), indent=1))
