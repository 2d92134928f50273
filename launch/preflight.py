"""What a job would take on its cluster, before anyone pays: its real training step, compiled on this machine for those chips.

`python -m jasmine.compile` does it, in a process of its own with the job's Python; nothing here imports jax. Its answers are
kept under `~/.cache/jasmine/preflight` (`JASMINE_PREFLIGHT_CACHE_DIR`; empty: nowhere) by everything that they depend on, so
that asking twice is instant. For Cloud TPUs the compiler is the chips' own, and what it refuses would have failed there. For
all else the program is that of as many CPU devices: an estimate, by which only what cannot be otherwise is refused.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.cache import prune, used
from launch.config import AnyCluster, CloudTpuCluster, LocalCluster, SlurmCluster
from launch.errors import EXIT_USER_ERROR, UserError
from launch.options import Job
from launch.paths import REPOSITORY
from launch.plan import scrubbed
from launch.request import Request, checked_plan
from launch.topology import DCN_BANDWIDTH, find_gpu, find_tpu

# Options that leave the compiled program as it is, or change a constant in it, each with the values that every job takes for
# it; None are flags. Another value counts as another program: the job is asked again, and refuses it if it is wrong. Whether
# several of them go together only the job knows, and says when it compiles or starts.
_COUNT, _POSITIVE, _TEXT = r"\d{1,15}", r"0*[1-9]\d{0,14}", r".+"
_NUMBER = r"(\d+\.?\d*|\.\d+)(e[+-]?\d{1,2})?"
_IRRELEVANT: dict[str, str | None] = {
    "restore_ckpt": None, "log": None, "tensorboard": None, "eval_full_frame": None,
    "num_workers": _COUNT, "seed": _COUNT, "stop_at_step": _COUNT, "warmup_steps": _COUNT, "wsd_decay_steps": _COUNT,
    "log_checkpoint_keep_period": _COUNT, "keep_best": _COUNT, "replay_step": _COUNT,
    "num_steps": _POSITIVE, "log_interval": _POSITIVE, "log_checkpoint_interval": _POSITIVE, "keep_checkpoints": _POSITIVE,
    "val_interval": _POSITIVE, "val_steps": _POSITIVE, "max_skipped": _POSITIVE, "max_rollbacks": _POSITIVE,
    "init_lr": _NUMBER, "max_lr": _NUMBER, "decay_end": _NUMBER, "adam_b1": _NUMBER, "adam_b2": _NUMBER,
    "weight_decay": _NUMBER, "save_every_minutes": _NUMBER,
    "lr_schedule": "wsd|cos", "best_mode": "min|max", "profile_steps": r"\d+:\d+",
    "ckpt_dir": _TEXT, "val_data_dir": _TEXT, "name": _TEXT, "project": _TEXT, "entity": _TEXT, "tags": _TEXT,
    "best_metric": _TEXT,
}  # fmt: skip
# Of the shell or the cluster file: what would make another program of it, or another device.
_NOT_HERE = {"JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "JAX_COMPILATION_CACHE_DIR"}
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_OF_COMPILERS = ("JAX_", "XLA_", "LIBTPU_")
KEPT = 500  # answers, of a few KiB each
_ROOM = 0.95  # of the memory: what a prediction may fill before it is worth compiling


@dataclass(frozen=True)
class Chip:
    """What one accelerator can do: bytes of memory, FLOP/s, and bytes/s of its memory and of its links, both directions."""

    memory_bytes: int
    peak_flops: float
    bandwidth: float
    link_bandwidth: float


@dataclass(frozen=True)
class Target:
    """What to compile for.

    Attributes:
        arguments: of `jasmine.compile`.
        description: for people.
        chips: in all slices.
        chips_per_slice: which may split parameters among them.
        chips_per_host: which share a host's network.
        chip: None where it is not known.
        estimate: whether the compiler is not the chip's own.
    """

    arguments: tuple[str, ...]
    description: str
    chips: int
    chips_per_slice: int
    chips_per_host: int
    chip: Chip | None
    estimate: bool

    @property
    def unit(self) -> str:
        """What one of `chips` is called."""
        return "device" if self.estimate else "chip"


def tpu_target(accelerator_type: str, slices: int = 1) -> Target:
    """Return what a Cloud TPU type is to the compiler.

    Raises:
        UserError: there is no such type.
    """
    tpu = find_tpu(accelerator_type)
    kind = tpu.generation
    return Target(
        ("--topology", tpu.compiler_name, "--slices", str(slices), "--chips_per_host", str(tpu.chips_per_host)),
        f"{f'{slices} × ' if slices > 1 else ''}{tpu.name}, {'each ' if slices > 1 else ''}{tpu.description}",
        slices * tpu.chips,
        tpu.chips,
        tpu.chips_per_host,
        Chip(kind.hbm_bytes, kind.peak_flops, kind.hbm_bandwidth, kind.ici_bandwidth),
        estimate=False,
    )


def target_of(settings: AnyCluster) -> Target:
    """Return what to compile for, for a cluster."""
    if isinstance(settings, LocalCluster):
        each = 1 if settings.devices_per_process == "auto" else settings.devices_per_process
        count = settings.processes * each
        return Target(
            ("--devices", str(count)), f"{_count(count, 'device')} of this machine", count, count, each, None, True
        )
    if isinstance(settings, SlurmCluster):
        on_a_node = settings.gpus_per_node or settings.processes_on_a_node
        count = settings.nodes * on_a_node
        gpu = find_gpu(settings.gpu_type) if settings.gpu_type else None
        chip = Chip(gpu.memory_bytes, gpu.peak_flops, gpu.bandwidth, gpu.link_bandwidth) if gpu else None
        what = f"{settings.gpu_type or ''} GPU".strip() if settings.gpus_per_node else "CPU device"
        description = f"{_count(count, what)} on {_count(settings.nodes, 'node')}"
        return Target(("--devices", str(count)), description, count, count, on_a_node, chip, True)
    return tpu_target(settings.accelerator_type, settings.slices)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


# --- the answer, compiled or remembered -------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiler:
    """Asks `jasmine.compile` about one job on one target."""

    job: Job
    cwd: Path
    target: Target
    python: str
    storage: str
    env: Mapping[str, str]

    def ask(self, arguments: Sequence[str], announce: str) -> tuple[dict[str, Any], bool]:
        """Return the report of these arguments, and whether it was remembered; `announce` is said before a compilation.

        Raises:
            UserError: the job would refuse its arguments there, for the same reason; or the compilation failed.
        """
        path = self._remembered(arguments)
        if path is not None:
            try:
                report = json.loads(path.read_text())
                used(path)
                return report, True
            except (OSError, ValueError):
                pass
        print(announce, file=sys.stderr, flush=True)
        report = self._compile(arguments)
        if path is not None:
            _write(path, json.dumps(report))
            prune(path.parent, keep=KEPT)
        return report, False

    def _compile(self, arguments: Sequence[str]) -> dict[str, Any]:
        command = [self.python, "-m", "jasmine.compile", *self.target.arguments, str(self.job.script), "--", *arguments]
        done = subprocess.run(command, cwd=self.cwd, env=self._environment(), capture_output=True, text=True)
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        said = done.stderr.strip().splitlines() or ["no message"]
        error = next((line.removeprefix("error: ") for line in reversed(said) if line.startswith("error: ")), None)
        if done.returncode == EXIT_USER_ERROR and error:
            raise UserError(error)
        if done.returncode == EXIT_USER_ERROR:  # the job's own parser, which explains itself
            raise UserError(f"{self.job.name} does not take these options:\n" + "\n".join(said))
        raise UserError(
            f"preflight: {' '.join(command[1:4])} failed with exit code {done.returncode}; submit without --preflight to go "
            f"on, and report this:\n" + "\n".join(said[-20:])
        )

    def _environment(self) -> dict[str, str]:
        env = {name: value for name, value in scrubbed(os.environ).items() if name not in _FLAGS}
        env = {name: value for name, value in (env | dict(self.env)).items() if name not in _NOT_HERE}
        env |= {"PYTHONPATH": str(REPOSITORY), "NO_GCE_CHECK": "true"}
        return env if "://" in self.storage else env | {"JASMINE_STORAGE": self.storage}

    def _remembered(self, arguments: Sequence[str]) -> Path | None:
        chosen = os.environ.get("JASMINE_PREFLIGHT_CACHE_DIR", "~/.cache/jasmine/preflight")
        if not chosen:
            return None
        digest = hashlib.sha256()
        for file in [self.job.script, *sorted((REPOSITORY / "jasmine").rglob("*.py"))]:
            digest.update(file.read_bytes())
        facts = {
            "job": self.job.name,
            "arguments": [_with_stamp(group, self.cwd, self.storage) for group in relevant(arguments)],
            "target": self.target.arguments,
            # All of the cluster file's: a job may read any. Of the shell's, what the compilers read.
            "environment": {
                name: value
                for name, value in self._environment().items()
                if name in self.env or name.startswith(_OF_COMPILERS)
            },
            "versions": _versions(self.python),
        }
        digest.update(json.dumps(facts, sort_keys=True).encode())
        return Path(chosen).expanduser() / f"{digest.hexdigest()[:24]}.json"


def relevant(arguments: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the options that the program depends on, each with its values, in order of their names; of one that is given
    several times, or once as `--no_…`, the last counts."""
    groups: list[list[str]] = [[""]]  # words that belong to no option
    for word in arguments:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            groups.append([name.replace("-", "_"), *([value] if equals else [])])
        else:
            groups[-1].append(word)
    last = {re.sub(r"(^|\.)no_", r"\1", name): (name, *values) for name, *values in groups}
    return sorted(group for option, group in last.items() if not _leaves_it(option, group[1:]) and group != ("",))


def _leaves_it(option: str, values: tuple[str, ...]) -> bool:
    """Whether the program is the same without this, and the job takes it."""
    if option not in _IRRELEVANT:
        return False
    pattern = _IRRELEVANT[option]
    if pattern is None:
        return not values
    return (len(values) == 1 or option == "tags") and all(re.fullmatch(pattern, value, re.I) for value in values)


def _with_stamp(group: tuple[str, ...], cwd: Path, storage: str) -> list[Any]:
    """The option, and of a data set or a run that it names what would tell that it is another one by now."""
    stamps: list[Any] = []
    for value in group[1:]:
        for place in (cwd / value, Path(storage) / value):
            for file in ("index.json", "train/index.json", "config.json"):
                try:
                    stamps.append((str(place / file), (place / file).stat().st_mtime_ns))
                except (OSError, ValueError):
                    continue
            with contextlib.suppress(OSError, ValueError):
                stamps += [str(place)] if place.is_dir() else []
    return [*group, stamps]


def _versions(python: str) -> dict[str, str]:
    """Of the packages that compile, in the environment of an interpreter; that of another one is asked for."""
    if python != sys.executable:
        ask = "import importlib.metadata as m; print(sorted(f'{d.name} {d.version}' for d in m.distributions()))"
        return {python: subprocess.run([python, "-c", ask], capture_output=True, text=True).stdout}
    found = {}
    for name in ("jax", "jaxlib", "libtpu", "flax", "optax"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _write(path: Path, text: str) -> None:
    """Keep an answer; where that cannot be, it is asked for again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(text)
        partial.rename(path)
    except OSError:
        return


# --- what follows from it ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """The least that a step can take, in seconds, by each thing that it needs."""

    compute: float
    memory: float
    links: float
    between_slices: float

    @property
    def step(self) -> float:
        """All of them at once, perfectly overlapped."""
        return max(dataclasses.astuple(self))


def bound(report: Mapping[str, Any], target: Target) -> Bound | None:
    """Return the roofline of a compiled step, or None where the chip or the program is not known."""
    if target.chip is None or report["flops"] is None:
        return None
    # What a chip sends, it also receives; bandwidths are of both directions together.
    links = sum(2 * one["bytes"] for one in report["collectives"] if not one["between_slices"])
    slow = sum(one["bytes"] for one in report["collectives"] if one["between_slices"])
    # A program of CPU devices multiplies in float32 and moves arrays of another size; the model's own FLOPs are certain.
    flops = report["model_flops"] / report["devices"] if target.estimate else report["flops"]
    return Bound(
        flops / target.chip.peak_flops,
        0.0 if target.estimate else report["bytes_accessed"] / target.chip.bandwidth,
        links / target.chip.link_bandwidth,
        slow * target.chips_per_host / DCN_BANDWIDTH,
    )


def fits(report: Mapping[str, Any], target: Target) -> bool:
    """Return whether the step can be there. An estimate counts what is certain: parameters and the optimizer's state."""
    if report["fits"] is not None:
        return report["fits"]
    return target.chip is None or state_bytes(report) <= target.chip.memory_bytes


def _certain_bytes(report: Mapping[str, Any]) -> int:
    """Return the bytes that `fits` goes by."""
    return report["memory"]["needed"] if report["fits"] is not None else state_bytes(report)


def state_bytes(report: Mapping[str, Any]) -> int:
    """Return the bytes of parameters and optimizer state on each device."""
    return sum(
        report[part]["bytes_per_device"] for part in ("parameters", "frozen_parameters", "optimizer_state", "average")
    )


def memory_limit(report: Mapping[str, Any], target: Target) -> int | None:
    """Return the bytes that there are on each device, as far as known; the compiler knows best."""
    return report["memory"]["limit"] or (target.chip.memory_bytes if target.chip else None)


Change = tuple[str, ...]


def nearest(
    arguments: Sequence[str],
    report: Mapping[str, Any],
    target: Target,
    ask: Callable[[Change], Mapping[str, Any] | None],
) -> tuple[Change, Mapping[str, Any] | None]:
    """Look for settings with which a step fits that does not: parameters split further, activations computed again, and at
    last a smaller batch. What a change saves is guessed; whether it is enough, the compiler says.

    Args:
        arguments: the job's.
        report: of the step with these.
        ask: compiles with some options more, which takes a minute; None where the job refuses them.

    Returns:
        The options, and their report; or the last ones that did not do (`()`: there are none worth trying), and None.
    """
    limit = memory_limit(report, target)
    assert limit is not None
    state, fsdp, tensor = state_bytes(report), report["mesh"]["fsdp"], report["mesh"]["tensor"]
    rest = _certain_bytes(report) - state
    most = target.chips_per_slice // tensor
    wider = [fsdp * 2**power for power in range(1, 20) if fsdp * 2**power <= most and most % (fsdp * 2**power) == 0]
    possible = [size for size in wider if state * fsdp / size <= limit]
    enough = [size for size in possible if state * fsdp / size + rest <= _ROOM * limit]
    given = {name: values for name, *values in relevant(arguments)}
    freed: Change = ("--mesh.data=-1",) if given.get("mesh.data", ["-1"]) != ["-1"] else ()
    freed += (f"--mesh.tensor={tensor}",) if given.get("mesh.tensor") == ["-1"] else ()

    best: Change = ()  # of those that do not do
    for size in dict.fromkeys([*enough[:1], *possible[-1:]]):
        change = (f"--mesh.fsdp={size}", *freed)
        if (found := ask(change)) is not None:
            if fits(found, target):
                return change, found
            best, report = change, found
    if target.estimate or state_bytes(report) > limit:  # nothing else makes that less
        return best, None
    again = ("--remat=full",)
    for change in dict.fromkeys([*([again] if state <= limit else []), (*best, *again)]):
        if (found := ask(change)) is not None:
            if fits(found, target):
                return change, found
            best, report = change, found
    return _smaller_batch(best, report, limit, target, ask)


def _smaller_batch(
    best: Change,
    report: Mapping[str, Any],
    limit: int,
    target: Target,
    ask: Callable[[Change], Mapping[str, Any] | None],
) -> tuple[Change, Mapping[str, Any] | None]:
    """Try what should fit by a line through what is known, twice, and then one clip to each device, in each of its parts."""
    unit = report["batch_shards"] * report["accumulation"]
    batch, needed, fixed = report["batch_size"], report["memory"]["needed"], float(state_bytes(report))
    halves = [batch // 2**power // unit * unit for power in range(1, 30)]
    sizes = [size for size in dict.fromkeys([*halves, unit]) if 0 < size < batch]
    each, change = (needed - fixed) / batch, best
    for tries_left in (2, 1, 0):
        if not sizes:
            break
        likely = [size for size in sizes if fixed + each * size <= _ROOM * limit] if tries_left else []
        size = (likely or sizes[-1:])[0]
        sizes = [smaller for smaller in sizes if smaller < size]
        change = (*best, f"--batch_size={size}")
        found = ask(change)
        if found is None:
            continue
        if fits(found, target):
            return change, found
        if (slope := (needed - found["memory"]["needed"]) / (batch - size)) > 0:
            each, fixed = slope, found["memory"]["needed"] - slope * size
        batch, needed = size, found["memory"]["needed"]
    return change, None


def warnings(report: Mapping[str, Any], target: Target, least: Bound | None) -> list[str]:
    """Return what should make a person think twice, one line each."""
    said = list(report["assumed"])
    if report["unsplit"]:
        total = sum(report["unsplit"].values())
        name = max(report["unsplit"], key=report["unsplit"].get)
        said.append(
            f"fsdp is {report['mesh']['fsdp']}, but every {target.unit} has {_count(len(report['unsplit']), 'large array')} "
            f"whole ({_size(total)}); the largest is {name}"
        )
    state, chip = state_bytes(report), target.chip
    if report["mesh"]["fsdp"] == 1 and target.chips > 1 and chip and state > chip.memory_bytes / 4:
        said.append(
            f"every {target.unit} holds all {_size(state)} of parameters and optimizer state; --mesh.fsdp=N splits them"
        )
    if least is not None and max(least.links, least.between_slices) > max(least.compute, least.memory):
        said.append(
            f"exchange between {target.unit}s takes longer than their own work: a larger batch, or fewer of them, costs less"
        )
    if least is not None and least.compute < 1e-3:
        said.append(
            f"a step is {_time(least.compute)} of arithmetic for each {target.unit}, too little to keep it busy: use fewer, "
            "or a larger batch"
        )
    return said


# --- telling ----------------------------------------------------------------------------------------------------


def show(job: str, report: Mapping[str, Any], target: Target, remembered: bool) -> str:
    """Return the report for people."""
    unit = target.unit
    memory, parameters, optimizer = report["memory"], report["parameters"], report["optimizer_state"]
    limit = memory_limit(report, target)
    how = "an estimate from a program of CPU devices" if target.estimate else "compiled for it"
    mesh = " × ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    needed = f"{_size(memory['needed'])}{f' of {_size(limit)}' if limit else ''} on each {unit}"
    if memory["temporaries"] is not None:
        needed += f": arguments {_size(memory['arguments'])}, temporaries {_size(memory['temporaries'])}"
    shards = report["batch_shards"]
    lines = [
        f"{job}: preflight for {target.description} ({how})",
        f"  memory     {needed}",
        f"  batch      {report['batch_size']} clips, {report['batch_size'] // shards} to each of {shards} parts; mesh {mesh}",
        f"  model      {parameters['count'] / 1e6:,.1f} M parameters: {_shares(parameters)}; optimizer: {_shares(optimizer)}",
    ]
    flops = f"  FLOPs      {_number(report['model_flops'])} a step by the model"
    if report["flops"] is not None:
        per = report["model_flops"] / report["devices"]
        flops += f", {_number(per)} for each {unit}"
        if not target.estimate:
            flops += f", which does {_number(report['flops'])} and moves {_size(report['bytes_accessed'])}"
    lines.append(flops)
    for one in report["collectives"]:
        over = " between slices" if one["between_slices"] else ""
        lines.append(f"  exchange   {one['count']} × {one['kind']}{over}: each {unit} sends {_size(one['bytes'])}")
    least = bound(report, target)
    if least is not None and target.chip is not None:
        usage = report["model_flops"] / (target.chips * target.chip.peak_flops * least.step)
        terms = [("arithmetic", least.compute), ("memory", least.memory), ("links", least.links)]
        terms += [("between slices", least.between_slices)] if report["slices"] > 1 else []
        parts = ", ".join(f"{name} {_time(seconds)}" for name, seconds in terms if seconds)
        lines.append(f"  step       at least {_time(least.step)} ({parts}); MFU at most {usage:.0%}")
    packages = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if name != "jaxlib")
    lines.append(
        f"  compiled   in {report['compile_seconds']:.0f} s{', before' if remembered else ''}, with {packages}"
    )
    return "\n".join([*lines, *(f"  warning    {line}" for line in warnings(report, target, least))])


def preflight(requests: Sequence[Request]) -> None:
    """Print what each request would take on its cluster; those that take the same, once.

    Raises:
        UserError: one does not fit, with the nearest settings that do; or the job would refuse its options there.
    """
    for request in requests:
        checked_plan(request, only_shown=True)  # what would be refused anyway is, before minutes are spent on it
    told = set()
    for request in requests:
        target = target_of(request.settings)
        key = (request.job, target, tuple(relevant(request.arguments)), tuple(sorted(request.settings.env.items())))
        if key in told:
            continue
        told.add(key)
        check(request.job, request.arguments, target, _compiler(request, target))


def check(job: Job, arguments: Sequence[str], target: Target, compiler: Compiler) -> dict[str, Any]:
    """Print and return the report of one job on one target; `preflight` for what it raises."""
    began = f"{job.name}: compiling its step for {target.description}; a minute or more, and then remembered"
    report, remembered = compiler.ask(arguments, announce=began)
    print(show(job.name, report, target, remembered), flush=True)
    if fits(report, target):
        return report
    limit = memory_limit(report, target)
    assert limit is not None
    needed = _size(_certain_bytes(report))
    problem = f"{job.name} does not fit {target.description}: {needed} of {_size(limit)} on each {target.unit}"
    known = {tuple(relevant(arguments)): report}

    def ask(change: Change) -> Mapping[str, Any] | None:
        all_of_them = [*arguments, *change]
        key = tuple(relevant(all_of_them))
        if key not in known:
            try:
                known[key], _ = compiler.ask(all_of_them, announce=f"{job.name}: does {' '.join(change)} fit?")
            except UserError:  # of a suggestion, not of what the user asked
                return None
        return known[key]

    change, found = nearest(arguments, report, target, ask)
    if found is not None:
        raise UserError(f"{problem}; with {' '.join(change)} it does, in {_size(_certain_bytes(found))}")
    tried = f"neither does it with {' '.join(change)}" if change else "no other setting makes it fit"
    raise UserError(f"{problem}, and {tried}; take chips with more memory, or a smaller model")


def _compiler(request: Request, target: Target) -> Compiler:
    # On a Cloud TPU it is a path on the VMs, whatever may be there on this machine.
    chosen = None if isinstance(request.settings, CloudTpuCluster) else request.settings.python
    python = chosen and os.path.expanduser(os.path.expandvars(chosen))
    return Compiler(
        request.job,
        request.cwd,
        target,
        python if python and os.access(python, os.X_OK) else sys.executable,
        str(request.run.root.parent),
        request.settings.env,
    )


def _shares(stored: Mapping[str, Any]) -> str:
    return f"{_size(stored['bytes'])}, {_size(stored['bytes_per_device'])} on each"


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:,.2f} GiB"


def _number(number: float) -> str:
    for prefix in ("", "k", "M", "G", "T", "P"):
        if number < 1000:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:,.1f} E"


def _time(seconds: float) -> str:
    return (
        f"{seconds:.2f} s"
        if seconds >= 1
        else f"{seconds * 1e3:.2g} ms"
        if seconds < 0.1
        else f"{seconds * 1e3:.0f} ms"
    )
