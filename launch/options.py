"""Finds the script that a JOB names, and refuses options it does not have — before anything is submitted.

A baseline parses its options with tyro, from the fields of its `Config` dataclass; but importing a baseline imports
jax, which takes longer than a whole submission may. So the fields are read from the source text instead, following base
classes and nested dataclasses through the imports of this repository. What this reader cannot be sure of (a script
without a `Config`, a class from elsewhere, tyro markers) is not checked at all: the job itself has the last word.
"""

import ast
import functools
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.errors import UserError, did_you_mean
from launch.paths import REPOSITORY
from launch.text import shown, told

DEFAULT_JOB = "train_tokenizer_vqvae"

# What it depends on whether a batch splits over the devices.
_BATCH_OPTIONS = ("batch_size", "grad_accumulation_steps", "mesh.data", "mesh.fsdp", "mesh.tensor")


@dataclass(frozen=True)
class Job:
    """What a JOB argument means.

    Attributes:
        name: a baseline's name, or a script's path (relative to the checkout where it lies inside, else absolute);
            the same for every way to spell the same script.
        script: the absolute path of the Python file.
    """

    name: str
    script: Path


def baselines() -> dict[str, Path]:
    """Return the path of every baseline by its name."""
    files = sorted((REPOSITORY / "jasmine" / "baselines").rglob("*.py"))
    return {file.stem: file for file in files if not file.name.startswith("_")}


def find_job(job: str, cwd: Path) -> Job:
    """Return the script that `job` names: a baseline, or a path relative to `cwd` or else to the checkout.

    Raises:
        UserError: there is no such baseline or no such file.
    """
    known = baselines()
    if job in known:
        return Job(job, known[job])
    if "/" not in job and not job.endswith(".py"):
        hint = did_you_mean(job[:99], known)
        raise UserError(f"unknown job {shown(job)}{hint} (baselines: {', '.join(known) or 'none'}; or a script's path)")
    candidates = [Path(os.path.realpath(base / os.path.expanduser(job))) for base in (cwd, REPOSITORY)]
    script = next((path for path in candidates if os.path.isfile(path)), None)
    if script is None:
        raise UserError(f"job {told(job)}: there is no such file (baselines: {', '.join(known) or 'none'})")
    if script.suffix != ".py":
        raise UserError(f"job {told(job)}: expected a Python file, whose name ends in .py")
    if script in known.values():
        return Job(script.stem, script)
    return Job(script.relative_to(REPOSITORY).as_posix() if script.is_relative_to(REPOSITORY) else str(script), script)


def check_options(job: Job, arguments: Sequence[str], reserved: Sequence[str] = (), root: Path = REPOSITORY) -> None:
    """Refuse an option that the job's script does not take; pass when its options cannot be read.

    Args:
        job: the script is read from `job.script`.
        arguments: the job's arguments; only the names of options are checked, not their values.
        reserved: options of the command the user typed, for the message about one that came too late.
        root: the tree that `job.script` imports `jasmine` from.

    Raises:
        UserError: an option is unknown, or help is asked for.
    """
    options = known_options(job.script, root)
    if options is None:
        return
    for argument in arguments:
        if not argument.startswith("-") or not argument.lstrip("-")[:1].isalpha():
            continue
        if argument in ("-h", "--help"):
            raise UserError(
                f"{job.name}: its options are listed by `python {job.script} --help`; nothing was submitted"
            )
        typed = argument.partition("=")[0]
        name = typed.removeprefix("--").replace("-", "_")
        if name in options:
            continue
        if typed in reserved:
            raise UserError(f"{typed} is an option of the launcher: put it before {job.name}, not after")
        choices = [f"--{option}" for option in sorted(options)]
        hint = did_you_mean(f"--{typed.lstrip('-').replace('-', '_')}", choices)
        raise UserError(f"{job.name} has no option {typed}{hint or '; it has: ' + ', '.join(choices)}")


def check_batch(job: Job, arguments: Sequence[str], devices: int, root: Path = REPOSITORY) -> None:
    """Refuse a mesh or batch that does not fit the cluster's devices, as the job itself would once it runs there.

    Passes when a default cannot be read, or when the script is no baseline: its options may mean something else.

    Args:
        devices: of all processes of the job.

    Raises:
        UserError: the mesh is not of so many devices, or the batch does not split over its data-parallel ones.
    """
    values = [_whole_number(job.script, root, arguments, name) for name in _BATCH_OPTIONS]
    if job.name not in baselines() or None in values:
        return
    batch, accumulation, *sizes = (value for value in values if value is not None)
    mesh = " ".join(f"--{name}={size}" for name, size in zip(_BATCH_OPTIONS[2:], sizes, strict=True))
    fixed = math.prod(size for size in sizes if size != -1)
    if fixed < 1 or devices % fixed or (-1 not in sizes and fixed != devices):
        raise UserError(f"mesh {mesh} does not make the {devices} devices of this cluster; leave --mesh.data at -1")
    unit = devices // max(sizes[2], 1) * accumulation
    if batch < 1 or batch % unit:
        below, above = batch // unit * unit, (batch // unit + 1) * unit
        times = f" × {accumulation} accumulation steps" if accumulation > 1 else ""
        raise UserError(
            f"--batch_size={batch} does not split over the {unit // accumulation} data-parallel devices of this "
            f"cluster{times}; the nearest that does: {f'{below} or ' if below > 0 else ''}{above}"
        )


def splitting_batch(
    job: Job, arguments: Sequence[str], devices: int, root: Path = REPOSITORY
) -> tuple[int, int] | None:
    """Return the script's own batch size, where `arguments` leave it at that and it does not split over the cluster's
    data-parallel devices, and the smallest one above that does; None where there is nothing to choose, or nothing known.

    Args:
        devices: of all processes of the job.
    """
    values = [_whole_number(job.script, root, arguments, name) for name in _BATCH_OPTIONS]
    if job.name not in baselines() or None in values or given(arguments, "batch_size") is not None:
        return None
    batch, accumulation, *_, tensor = (value for value in values if value is not None)
    unit = devices // max(tensor, 1) * accumulation
    return None if unit < 1 or batch % unit == 0 else (batch, (batch // unit + 1) * unit)


def given(arguments: Sequence[str], name: str) -> str | None:
    """Return the value that `arguments` give to an option, the last one where there are several; None without any."""
    text = None
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        typed, equals, value = argument.partition("=")
        if typed.startswith("--") and typed.removeprefix("--").replace("-", "_") == name:
            text = value if equals else following
    return text


def known_options(script: Path, root: Path = REPOSITORY) -> frozenset[str] | None:
    """Return the options of the script's `Config`, or None where they cannot be read with certainty.

    Args:
        script: a Python file.
        root: the tree in which its imports of the repository's own modules are looked up.

    Returns:
        Names as tyro takes them after `--`, with every `-` as `_`: `batch_size`, `mesh.data`, and for booleans also
        `no_log` and `mesh.no_flag`.
    """
    options = _defaults(script, root)
    return None if options is None else frozenset(options)


def _whole_number(script: Path, root: Path, arguments: Sequence[str], name: str) -> int | None:
    """Return the value that `arguments` give to an option, or else its default; None where neither is a whole number."""
    text, value = given(arguments, name), (_defaults(script, root) or {}).get(name)
    if text is None:
        text = ast.unparse(value) if value is not None else ""
    try:
        return int(text)
    except ValueError:
        return None


@functools.cache
def _defaults(script: Path, root: Path) -> dict[str, ast.expr | None] | None:
    """Return the defaults of the script's options by name, None for one that is not written out; or None for all."""
    try:
        module = _Module(script, root)
        return _fields(module, module.classes["Config"], prefix="")
    except (_UnreadableError, KeyError, SyntaxError, OSError, UnicodeDecodeError, RecursionError):
        return None


class _UnreadableError(Exception):
    """The source says something that this reader does not understand."""


class _Module:
    """The top-level classes and imported names of one source file."""

    def __init__(self, path: Path, root: Path) -> None:
        self.root = root
        self.classes: dict[str, ast.ClassDef] = {}
        self.imports: dict[
            str, tuple[str, str | None]
        ] = {}  # local name -> module, name in it (None: the module itself)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                self.classes[node.name] = node
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                self.imports.update({alias.asname or alias.name: (node.module, alias.name) for alias in node.names})
            elif isinstance(node, ast.Import):
                self.imports.update({alias.asname or alias.name: (alias.name, None) for alias in node.names})

    def find_class(self, expression: ast.expr) -> "tuple[_Module, ast.ClassDef] | None":
        """Return the class of this repository that `Name` or `module.Name` stands for, or None for any other thing."""
        if isinstance(expression, ast.Constant) and isinstance(expression.value, str):
            return self.find_class(ast.parse(expression.value, mode="eval").body)
        if isinstance(expression, ast.Name):
            if expression.id in self.classes:
                return self, self.classes[expression.id]
            module, name = self.imports.get(expression.id, (None, None))
            return self._look_up(module, name) if module and name else None
        if isinstance(expression, ast.Attribute):
            module, name = self.imports.get(ast.unparse(expression.value), (None, None))
            return self._look_up(f"{module}.{name}" if name else module, expression.attr) if module else None
        return None

    def _look_up(self, module: str, name: str) -> "tuple[_Module, ast.ClassDef] | None":
        path = self.root.joinpath(*module.split("."))
        file = next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()), None)
        return _Module(file, self.root).find_class(ast.Name(name)) if file else None


def _is_dataclass(cls: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in cls.decorator_list)


def _fields(module: _Module, cls: ast.ClassDef, prefix: str) -> dict[str, ast.expr | None]:
    if not _is_dataclass(cls):
        raise _UnreadableError(f"{cls.name} is no dataclass")
    names: dict[str, ast.expr | None] = {}
    for base in cls.bases:
        found = module.find_class(base)
        if found is None:
            raise _UnreadableError(f"unknown base class {ast.unparse(base)}")
        names |= _fields(*found, prefix)
    for node in cls.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        annotation = ast.unparse(node.annotation)
        if "tyro" in annotation or "Annotated" in annotation:  # may rename or hide the option
            raise _UnreadableError(annotation)
        if "ClassVar" in annotation or (node.value is not None and "init=False" in ast.unparse(node.value)):
            continue
        name = node.target.id
        nested = module.find_class(node.annotation)
        if nested is not None and _is_dataclass(nested[1]):
            inner = _fields(*nested, prefix=f"{prefix}{name}.")
            plain = node.value is None or ast.unparse(node.value).endswith((f"{annotation}()", f"={annotation})"))
            names |= inner if plain else dict.fromkeys(inner)  # a default of its own, which nobody reads here
            continue
        parts = [module.find_class(part) for part in ast.walk(node.annotation) if isinstance(part, ast.expr)]
        if any(part is not None and _is_dataclass(part[1]) for part in parts):
            raise _UnreadableError(f"{annotation}: a choice between dataclasses becomes a subcommand")
        names[prefix + name] = node.value
        if annotation.strip("'") == "bool":
            names[f"{prefix}no_{name}"] = None
    return names
