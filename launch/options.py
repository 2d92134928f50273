"""Finds the script that a JOB names, and refuses options it does not have — before anything is submitted.

A baseline parses its options with tyro, from the fields of its `Config` dataclass; but importing a baseline imports
jax, which takes longer than a whole submission may. So the fields are read from the source text instead, following base
classes and nested dataclasses through the imports of this repository. What this reader cannot be sure of (a script
without a `Config`, a class from elsewhere, tyro markers) is not checked at all: the job itself has the last word.
"""

import ast
import dataclasses
import functools
import itertools
import math
import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.errors import UserError, did_you_mean
from launch.paths import REPOSITORY
from launch.text import shown, told

DEFAULT_JOB = "train_tokenizer_vqvae"
# The variable, of the shell or of a cluster's `env:`, that names the data of jobs whose command does not.
DATA_DIR = "JASMINE_DATA_DIR"

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
        arguments: the job's arguments; the values of its options are checked where it is a baseline, and parses them as
            baselines do.
        reserved: options of the command the user typed, for the message about one that came too late.
        root: the tree that `job.script` imports `jasmine` from.

    Raises:
        UserError: an option is unknown, its value is missing or of another type, or help is asked for.
    """
    options = _options(job.script, root)
    if options is None:
        return
    for argument in arguments:
        if not _is_option(argument):
            continue
        if argument in ("-h", "--help"):
            raise UserError(
                f"{job.name}: its options are listed by `python {job.script} --help`; nothing was submitted"
            )
        typed = argument.partition("=")[0]
        if _name(argument) in options:
            continue
        if typed in reserved:
            raise UserError(f"{typed} is an option of the launcher: put it before {job.name}, not after")
        choices = [f"--{option}" for option in sorted(options)]
        hint = did_you_mean(f"--{typed.lstrip('-').replace('-', '_')}", choices)
        raise UserError(f"{job.name} has no option {typed}{hint or '; it has: ' + ', '.join(choices)}")
    if job.name in baselines():
        _check_values(job, arguments, options)


def _is_option(word: str) -> bool:
    return word.startswith("-") and word.lstrip("-")[:1].isalpha()


def _name(argument: str) -> str:
    return argument.partition("=")[0].removeprefix("--").replace("-", "_")


def _check_values(job: Job, arguments: Sequence[str], options: "Mapping[str, _Option]") -> None:
    """Refuse what the job's parser would: each option takes one value, a boolean none, and nothing stands alone."""
    words = deque(arguments)
    if not job.name.startswith("train_"):
        if not words or _is_option(words[0]):
            raise UserError(f"{job.name} needs the run to sample from: {job.name} RUN")
        words.popleft()
    while words:
        argument = words.popleft()
        if not _is_option(argument):
            raise UserError(f"{job.name}: unexpected {shown(argument)}: options are given as --name value")
        typed, equals, value = argument.partition("=")
        kind = options[_name(argument)].kind
        if kind is None or kind.name == "bool":
            if kind is not None and equals:
                raise UserError(f"{job.name}: {typed} takes no value, but has {shown(value)}: leave that out")
            while kind is None and words and not _is_option(words[0]):
                words.popleft()
            continue
        if not equals:
            if not words or _is_option(words[0]):
                raise UserError(f"{job.name}: {typed}: its value is missing; expected {kind.expected}")
            value = words.popleft()
        if not kind.fits(value):
            hint = did_you_mean(value[:99], kind.choices)
            raise UserError(f"{job.name}: {typed}={told(value)}: expected {kind.expected}{hint}")


def check_required(job: Job, arguments: Sequence[str], root: Path = REPOSITORY) -> None:
    """Refuse a baseline without an option that it does nothing without: those that its `Config` names in `REQUIRED`.

    Raises:
        UserError: one is not given.
    """
    if missing := missing_options(job, arguments, root):
        default = f", or export {DATA_DIR}" if missing[0] == "data_dir" else ""
        raise UserError(f"{job.name} needs --{missing[0]}: give it after {job.name}{default}")


def missing_options(job: Job, arguments: Sequence[str], root: Path = REPOSITORY) -> list[str]:
    """Return the options that a baseline does nothing without, and that are not given."""
    if job.name not in baselines():
        return []
    there = {_name(argument) for argument in arguments if _is_option(argument)}
    return [name for name in _required(job.script, root) if name not in there]


def check_batch(job: Job, arguments: Sequence[str], devices: int, root: Path = REPOSITORY) -> None:
    """Refuse a mesh or batch that does not fit the cluster's devices, as the job itself would once it runs there.

    Passes when a default cannot be read, or when the script is no baseline: its options may mean something else.

    Args:
        devices: of all processes of the job.

    Raises:
        UserError: the mesh is not of so many devices, or the batch does not split over its data-parallel ones.
    """
    values = _batch_values(job, arguments, root)
    if values is None:
        return
    batch, accumulation, *sizes = values
    unit = _unit(accumulation, sizes, devices)
    if unit is None:
        mesh = " ".join(f"--{name}={size}" for name, size in zip(_BATCH_OPTIONS[2:], sizes, strict=True))
        twice = sizes.count(-1) > 1
        hint = "only one size can be -1, which takes what the others leave" if twice else "leave --mesh.data at -1"
        raise UserError(f"mesh {mesh} does not make the {devices} devices of this cluster; {hint}")
    if batch < 1 or batch % unit:
        below, above = batch // unit * unit, (batch // unit + 1) * unit
        times = f" × {accumulation} accumulation steps" if accumulation > 1 else ""
        raise UserError(
            f"--batch_size={batch} does not split over the {unit // accumulation} data-parallel devices of this "
            f"cluster{times}; the nearest that does: {f'{below} or ' if below > 0 else ''}{above}"
        )


def splitting_batch(
    job: Job, several: Sequence[Sequence[str]], devices: int, root: Path = REPOSITORY
) -> tuple[int, int] | None:
    """Return the script's own batch size, where some arguments leave it at that and it does not split over the cluster's
    data-parallel devices, and the smallest one above that does for all of them; None where there is nothing to choose, or
    nothing known.

    Args:
        several: the arguments of a job, or of each run of a sweep.
        devices: of all processes of the job.
    """
    found = [_batch_values(job, arguments, root) for arguments in several if given(arguments, "batch_size") is None]
    units = [_unit(one[1], one[2:], devices) for one in found if one is not None]
    if not units or None in units:
        return None
    batch = next(one[0] for one in found if one is not None)
    unit = math.lcm(*(unit for unit in units if unit is not None))
    return None if batch % unit == 0 else (batch, (batch // unit + 1) * unit)


def _batch_values(job: Job, arguments: Sequence[str], root: Path) -> list[int] | None:
    """Return the values of `_BATCH_OPTIONS`; None where one cannot be read, or the script is no baseline."""
    values = [_whole_number(job.script, root, arguments, name) for name in _BATCH_OPTIONS]
    known = [value for value in values if value is not None]
    return known if job.name in baselines() and len(known) == len(values) else None


def _unit(accumulation: int, sizes: Sequence[int], devices: int) -> int | None:
    """Return what a batch has to be a multiple of on a mesh of these sizes (data, fsdp, tensor; -1: what the others leave);
    None where they do not make so many devices. As `jasmine.training.mesh.mesh_shape` has it."""
    fixed = math.prod(size for size in sizes if size != -1)
    if accumulation < 1 or any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1 or devices % fixed:
        return None
    if -1 not in sizes and fixed != devices:
        return None
    data, fsdp, _ = (devices // fixed if size == -1 else size for size in sizes)
    return data * fsdp * accumulation


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
    options = _options(script, root)
    return None if options is None else frozenset(options)


def _whole_number(script: Path, root: Path, arguments: Sequence[str], name: str) -> int | None:
    """Return the value that `arguments` give to an option, or else its default; None where neither is a whole number."""
    text = given(arguments, name)
    if text is None:
        option = (_options(script, root) or {}).get(name)
        text = ast.unparse(option.default) if option is not None and option.default is not None else ""
    try:
        return int(text)
    except ValueError:
        return None


@dataclass(frozen=True)
class _Kind:
    """The type of an option: `int`, `float`, `str`, `bool`, or `choice` for one of `choices`."""

    name: str
    choices: tuple[str, ...] = ()
    optional: bool = False

    @property
    def expected(self) -> str:
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        return {"int": "a whole number", "float": "a number"}.get(self.name, "a text")

    def fits(self, value: str) -> bool:
        if self.optional and value == "None":
            return True
        if self.choices:
            return value in self.choices
        try:
            _ = int(value) if self.name == "int" else float(value) if self.name == "float" else value
        except ValueError:
            return False
        return True


@dataclass(frozen=True)
class _Option:
    """An option as it stands in the source; None for a default or a type that cannot be read there."""

    default: ast.expr | None
    kind: _Kind | None


@functools.cache
def _options(script: Path, root: Path) -> dict[str, _Option] | None:
    """Return the script's options by name; None where they cannot be read with certainty."""
    try:
        module = _Module(script, root)
        return _fields(module, module.classes["Config"], prefix="")
    except (_UnreadableError, KeyError, SyntaxError, OSError, UnicodeDecodeError, RecursionError):
        return None


@functools.cache
def _required(script: Path, root: Path) -> tuple[str, ...]:
    """Return what the nearest `REQUIRED` of the script's `Config` and its base classes names; none where it has none."""
    if _options(script, root) is None:
        return ()
    module = _Module(script, root)
    todo = deque([(module, module.classes["Config"])])
    while todo:
        module, cls = todo.popleft()
        for node in cls.body:
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "REQUIRED" and node.value is not None:
                return tuple(ast.literal_eval(node.value))
        todo += filter(None, map(module.find_class, cls.bases))
    return ()


class _UnreadableError(Exception):
    """The source says something that this reader does not understand."""


class _Module:
    """The top-level classes, other names and imported names of one source file."""

    def __init__(self, path: Path, root: Path) -> None:
        self.root = root
        self.classes: dict[str, ast.ClassDef] = {}
        self.values: dict[str, ast.expr] = {}
        self.imports: dict[
            str, tuple[str, str | None]
        ] = {}  # local name -> module, name in it (None: the module itself)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                self.classes[node.name] = node
            elif isinstance(node, ast.Assign):
                self.values.update({ast.unparse(target): node.value for target in node.targets})
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

    def find_value(self, name: str) -> "tuple[_Module, ast.expr] | None":
        """Return what is assigned to a name, here or in the module of this repository that it is imported from."""
        if name in self.values:
            return self, self.values[name]
        module, original = self.imports.get(name, (None, None))
        other = self._other(module) if module else None
        return other.find_value(original) if other and original else None

    def _look_up(self, module: str, name: str) -> "tuple[_Module, ast.ClassDef] | None":
        other = self._other(module)
        return other.find_class(ast.Name(name)) if other else None

    def _other(self, module: str) -> "_Module | None":
        path = self.root.joinpath(*module.split("."))
        file = next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()), None)
        return _Module(file, self.root) if file else None


def _is_dataclass(cls: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in cls.decorator_list)


def _kind(module: _Module, annotation: ast.expr) -> _Kind | None:
    """Return the type that an annotation stands for, None for one that is not among `_Kind`'s."""
    match annotation:
        case ast.Constant(value=str(text)):
            return _kind(module, ast.parse(text, mode="eval").body)
        case ast.Name(id="int" | "float" | "str" | "bool" as name):
            return _Kind(name)
        case ast.Name(id=name):
            found = module.find_value(name)
            return _kind(*found) if found else None
        case ast.BinOp(left=left, op=ast.BitOr(), right=ast.Constant(value=None)):
            inner = _kind(module, left)
            return dataclasses.replace(inner, optional=True) if inner and inner.name != "bool" else None
        case ast.Subscript(value=ast.Name(id="Literal"), slice=ast.Tuple(elts=parts)):
            texts = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            return _Kind("choice", tuple(texts)) if len(texts) == len(parts) else None
    return None


def _fields(module: _Module, cls: ast.ClassDef, prefix: str) -> dict[str, _Option]:
    if not _is_dataclass(cls):
        raise _UnreadableError(f"{cls.name} is no dataclass")
    names: dict[str, _Option] = {}
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
            # else a default of its own, which nobody reads here
            names |= inner if plain else {key: dataclasses.replace(one, default=None) for key, one in inner.items()}
            continue
        parts = [module.find_class(part) for part in ast.walk(node.annotation) if isinstance(part, ast.expr)]
        if any(part is not None and _is_dataclass(part[1]) for part in parts):
            raise _UnreadableError(f"{annotation}: a choice between dataclasses becomes a subcommand")
        names[prefix + name] = _Option(node.value, kind := _kind(module, node.annotation))
        if kind is not None and kind.name == "bool":
            names[f"{prefix}no_{name}"] = _Option(None, kind)
    return names
