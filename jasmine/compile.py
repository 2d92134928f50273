"""Compiles a baseline's real training step for devices that this machine does not have, and says what it would need.

    python -m jasmine.compile --topology v5e:16x16 [--slices 2] [--chips_per_host 4] SCRIPT -- ARGS…   # for a Cloud TPU
    python -m jasmine.compile --devices 8 SCRIPT -- ARGS…                # for as many virtual CPU devices

`ARGS` are the job's own. The program is the one that the training loop would run there: same task, mesh, shardings and
update. Nothing is allocated and no device is touched; of the data and of trained parts only what describes them is read,
and where that is not on this machine, a stand-in is taken and said so. The last line is one JSON object, `Report`.
"""

import argparse
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from etils import epath
from jax.experimental import topologies
from jax.sharding import Mesh

from jasmine.command_line import Parser
from jasmine.data.bucket import is_bucket_url
from jasmine.data.tokens import TokenDataset, open_training_data
from jasmine.errors import ClusterError, UserError
from jasmine.training import cli, hlo
from jasmine.training.config import TrainConfig
from jasmine.training.data_feed import abstract_batch
from jasmine.training.distributed import exit_with_job
from jasmine.training.flops import step_flops
from jasmine.training.mesh import check_batch, make_mesh
from jasmine.training.optimizer import make_optimizer
from jasmine.training.runs import TrainedRun, baseline_modules, find_run, load_run
from jasmine.training.sharding import ShardingRules, tree_shardings
from jasmine.training.state import ModelDefinition, abstract_state
from jasmine.training.step import make_update
from jasmine.training.task import BaseTask, DataInfo

FRAME_SHAPE = (64, 64, 3)
"""Of data that is not on this machine; what our makers and the published data sets have."""
NUM_ACTIONS = 15
"""Of data that is not on this machine, where the job conditions on true actions: CoinRun's."""
LARGE_BYTES = 2**20
"""An array from this size on should be split."""
_HOSTS = {1: [1, 1, 1], 4: [2, 2, 1], 8: [2, 4, 1]}
"""How the chips of a VM lie, by their number."""
_OUT_OF_MEMORY = (
    re.compile(r"Used ([\d.]+)([KMG]?) of ([\d.]+)([KMG]?) hbm", re.IGNORECASE),
    re.compile(r"\(([\d.]+)([KMG]?)\) exceeds available HBM \(([\d.]+)([KMG]?)\)", re.IGNORECASE),
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device. `needed` is all that has to be there at once; `limit` what the compiler allows, if it says so.
    The parts are None of a program that does not fit, of which the compiler tells no more than the sum."""

    needed: int
    limit: int | None = None
    arguments: int | None = None
    outputs: int | None = None
    temporaries: int | None = None
    aliased: int | None = None


@dataclasses.dataclass(frozen=True)
class Stored:
    """Parameters, or the optimizer's state: `count` numbers, `bytes` in all and `bytes_per_device` after sharding."""

    count: int
    bytes: int
    bytes_per_device: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What a step on these devices takes. FLOPs, bytes and memory are of one device, but for `model_flops`.

    Attributes:
        fits: whether the compiler could place the program; None where it does not know the memory (CPU devices).
        accumulation: parts that each device's share of the batch is worked through in.
        model_flops: of one update over all devices, as MFU counts them.
        flops: those that the compiled program does, recomputation and padding included; None if it does not fit.
        bytes_accessed: between the memory and the cores, likewise.
        collectives: sent to other devices, likewise.
        unsplit: arrays of `LARGE_BYTES` and more that every device holds whole though parameters are to be split, with bytes.
        assumed: what was not found on this machine, and what was taken instead.
    """

    job: str
    platform: str
    device_kind: str
    devices: int
    slices: int
    mesh: dict[str, int]
    batch_size: int
    batch_shards: int
    accumulation: int
    fits: bool | None
    memory: Memory
    model_flops: float
    flops: float | None
    bytes_accessed: float | None
    collectives: tuple[hlo.Collective, ...]
    parameters: Stored
    frozen_parameters: Stored
    optimizer_state: Stored
    average: Stored
    unsplit: dict[str, int]
    assumed: tuple[str, ...]
    compile_seconds: float
    versions: dict[str, str]


# --- where to ---------------------------------------------------------------------------------------------------


def tpu_devices(topology: str, slices: int = 1, chips_per_host: int = 4) -> list[jax.Device]:
    """Devices to compile for, which cannot run anything.

    Args:
        topology: as libtpu names it, such as `v5e:16x16`.
        slices: how many of it.
        chips_per_host: 1, 4 or 8.

    Raises:
        UserError: libtpu is not installed, or does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu is not installed here, and it is what compiles for TPUs: uv pip install libtpu")
    # It locks out other processes, as if it were to use a TPU; to compile, any number may load it.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    more: dict[str, Any] = {"chips_per_host_bounds": _HOSTS[chips_per_host]}
    if slices > 1:
        more["num_slices"] = slices
    if topology.startswith("v4:"):
        more["chip_config_name"] = "megacore"  # the two cores of a chip are one device, as they are on the VMs
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **more).devices
    except Exception as error:
        raise UserError(f"--topology {topology}: libtpu cannot compile for it: {str(error).splitlines()[0]}") from error


def cpu_devices(count: int) -> list[jax.Device]:
    """Virtual CPU devices; before anything else in this process asks jax for devices."""
    jax.config.update("jax_num_cpu_devices", count)
    return jax.devices("cpu")


# --- what -------------------------------------------------------------------------------------------------------


def load_script(script: Path) -> ModuleType:
    """The baseline, or the script that is made like one.

    Raises:
        UserError: it does not define `Config` and `Task`.
    """
    named = {find_path(name): name for name in baseline_modules().values()}
    if script.resolve() in named:
        return importlib.import_module(named[script.resolve()])
    sys.path.insert(0, str(script.resolve().parent))  # as when it runs
    spec = importlib.util.spec_from_file_location(f"_compiled_{script.stem}", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    if not hasattr(module, "Config") or not hasattr(module, "Task"):
        raise UserError(f"{script} defines no Config and Task as the baselines do, so its training step is not known")
    return module


def find_path(module: str) -> Path | None:
    """The file of a module that is not imported for it."""
    spec = importlib.util.find_spec(module)
    return Path(spec.origin).resolve() if spec and spec.origin else None


def describe_data(config: TrainConfig, parts: Mapping[str, TrainedRun]) -> tuple[DataInfo, list[str]]:
    """What `--data_dir` holds, or, where it cannot be read from this machine, what it is taken to hold; and what was assumed.

    Raises:
        UserError: it is here, but not a dataset.
    """
    missing = f"--data_dir {config.data_dir} is not on this machine"
    if is_bucket_url(config.data_dir) or os.path.exists(config.data_dir):
        try:
            dataset = open_training_data(config.data_dir, "train", frame_shape=_given_shape(config))
        except (UserError, ClusterError) as error:
            if not is_bucket_url(config.data_dir):
                raise
            missing = str(error)  # the cluster may be allowed to read what this machine is not
        else:
            if isinstance(dataset, TokenDataset):
                dataset.check_seq_len(config.seq_len)
            return DataInfo.of(dataset), []
    source, trained_on = next(((name, part.data) for name, part in parts.items() if part.path.is_dir()), ("", None))
    shape = _given_shape(config) or (trained_on.frame_shape if trained_on else FRAME_SHAPE)
    num_actions = None
    if getattr(config, "use_gt_actions", False):
        known = getattr(config, "num_actions", None) or (trained_on and trained_on.num_actions)
        num_actions = known or NUM_ACTIONS
    frames = f"frames of {'×'.join(map(str, shape))}{f' with {num_actions} actions' if num_actions else ''}"
    like = f" as the {source} was trained on" if trained_on and not _given_shape(config) else ""
    return DataInfo(shape, num_actions), [f"{missing}: taken for {frames}{like}"]


def _given_shape(config: TrainConfig) -> tuple[int, int, int] | None:
    height, width, channels = config.image_height, config.image_width, config.image_channels
    return (height, width, channels) if height and width and channels else None


def describe_parts(config: TrainConfig) -> tuple[dict[str, TrainedRun], list[str]]:
    """The frozen parts by their runs' configs alone; one whose run is not on this machine with the defaults of its job.

    Raises:
        UserError: a run is here, but of another kind, or damaged.
    """
    parts: dict[str, TrainedRun] = {}
    assumed = []
    for name, source in config.frozen_runs().items():
        if not source.run:
            raise UserError(f"{source.option} is not set: name a run of {' or '.join(source.jobs)}")
        try:
            path = find_run(source.run, source.option)
        except Exception as error:
            if not isinstance(error, UserError | OSError) and "://" not in source.run:
                raise  # of a bucket: whatever a client says that has no credentials on this machine
            parts[name] = untrained(source.jobs[0], describe_data(config, {})[0])
            assumed.append(
                f"{source.option} {source.run} is not on this machine: taken for the defaults of {source.jobs[0]}"
            )
        else:
            parts[name] = load_run(str(path), option=source.option, jobs=source.jobs, weights=False)
    return parts, assumed


def untrained(job: str, data: DataInfo) -> TrainedRun:
    """A model of a baseline's defaults, without weights."""
    module = importlib.import_module(baseline_modules()[job])
    config = module.Config()
    data = DataInfo(data.frame_shape)
    return TrainedRun(epath.Path("untrained"), job, config, data, (), module.Task(config, data))


# --- compilation ------------------------------------------------------------------------------------------------


def compile_step(task: BaseTask, job: str, devices: Sequence[jax.Device], assumed: Sequence[str] = ()) -> Report:
    """Compiles the update of `task` for `devices`. The program itself is dropped.

    Raises:
        UserError: the mesh or the batch does not fit the number of devices, or the options do not fit each other.
    """
    config = task.config
    task.check()
    mesh, rules = make_mesh(config.mesh, devices), ShardingRules()
    check_batch(config.batch_size, mesh, config.grad_accumulation_steps)
    definition, optimizer = ModelDefinition(task), make_optimizer(config)
    state = abstract_state(definition, optimizer, mesh, rules, config.ema_decay > 0)
    frozen = {name: _abstract_params(part.definition, mesh, rules) for name, part in task.frozen.items()}
    batch: Any = abstract_batch(task.data, config, mesh, rules)
    # A program of CPU devices is never run: its machine code may be as slow as it likes.
    options = {"xla_backend_optimization_level": 0} if devices[0].platform == "cpu" else None
    began = time.perf_counter()
    with jax.default_matmul_precision("highest" if config.dtype == "float32" else "default"):
        update = make_update(task, definition, optimizer, mesh, rules, state)
        lowered = update.lower(state, frozen, batch)
        try:
            compiled, problem = lowered.compile(compiler_options=options), ""
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            compiled, problem = None, str(error)
    device = devices[0]
    slices = len({getattr(one, "slice_index", 0) or 0 for one in devices})
    arguments = _stored((state, frozen, batch)).bytes_per_device
    memory = _memory_of_error(problem, arguments) if compiled is None else _memory(compiled)
    cost = None
    if compiled is not None:
        cost = hlo.cost(compiled.as_text(), slices)
    unsplit = {}
    if mesh.shape["fsdp"] > 1:
        trees = {"params": state.params, "frozen": frozen}
        for path, leaf in jax.tree_util.tree_flatten_with_path(trees)[0]:
            if _bytes(leaf) >= LARGE_BYTES and leaf.sharding.is_fully_replicated:
                unsplit[jax.tree_util.keystr(path, simple=True, separator=".")] = _bytes(leaf)
    return Report(
        job=job,
        platform=device.platform,
        device_kind=device.device_kind,
        devices=mesh.size,
        slices=slices,
        mesh=dict(mesh.shape),
        batch_size=config.batch_size,
        batch_shards=mesh.shape["data"] * mesh.shape["fsdp"],
        accumulation=config.grad_accumulation_steps,
        fits=None if device.platform == "cpu" else compiled is not None,
        memory=memory,
        model_flops=step_flops(task, definition, frozen, batch),
        flops=cost.flops if cost else None,
        bytes_accessed=cost.bytes if cost else None,
        collectives=cost.collectives if cost else (),
        parameters=_stored(state.params),
        frozen_parameters=_stored(frozen),
        optimizer_state=_stored(state.opt_state),
        average=_stored(state.ema),
        unsplit=unsplit,
        assumed=tuple(assumed),
        compile_seconds=time.perf_counter() - began,
        versions=versions(),
    )


def _abstract_params(definition: ModelDefinition, mesh: Mesh, rules: ShardingRules) -> Any:
    shardings = tree_shardings(definition.shapes, definition.logical, mesh, rules)
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        definition.shapes,
        shardings,
    )


def _memory(compiled: Any) -> Memory:
    found = compiled.memory_analysis()
    parts = {kind: int(getattr(found, f"{kind}_size_in_bytes")) for kind in ("argument", "output", "temp", "alias")}
    needed = parts["argument"] + parts["output"] + parts["temp"] - parts["alias"]
    return Memory(needed, None, parts["argument"], parts["output"], parts["temp"], parts["alias"])


def _memory_of_error(problem: str, arguments: int) -> Memory:
    """Of what the compiler says when it gives up: either of its two sentences, or at least the arguments."""
    found = next((match for pattern in _OUT_OF_MEMORY if (match := pattern.search(problem))), None)
    if found is None:
        return Memory(arguments)
    used, limit = (float(found[index]) * _UNITS[found[index + 1].upper()] for index in (1, 3))
    return Memory(max(int(used), arguments), int(limit))


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _stored(tree: Any) -> Stored:
    leaves = jax.tree.leaves(tree)
    on_one = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    return Stored(sum(math.prod(leaf.shape) for leaf in leaves), sum(map(_bytes, leaves)), on_one)


def versions() -> dict[str, str]:
    """Of the packages that decide what the compiled program is."""
    found = {}
    for name in ("jax", "jaxlib", "libtpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def compile_job(script: Path, arguments: Sequence[str], devices: Sequence[jax.Device]) -> Report:
    """Compiles what `script` would run with these options on `devices`.

    Raises:
        UserError: the job would refuse them too, or the script is none that trains.
    """
    module = load_script(script)
    config = cli.parse(module.Config, arguments)
    config.check()
    parts, assumed = describe_parts(config)
    data, more = describe_data(config, parts)
    return compile_step(module.Task(config, data, parts), script.stem, devices, [*assumed, *more])


# --- main -------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> None:
    parser = Parser(
        prog="python -m jasmine.compile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--topology", help="as libtpu names it, such as v5e:4x4")
    where.add_argument("--devices", type=int, help="virtual CPU devices instead of a TPU")
    parser.add_argument("--slices", type=int, default=1, help="how many of the topology")
    parser.add_argument("--chips_per_host", type=int, default=4, choices=_HOSTS, help="of a TPU's VM")
    parser.add_argument("script", type=Path, metavar="SCRIPT")
    parser.add_argument("job_arguments", nargs="*", metavar="ARGS", help="the job's options, after --")
    with exit_with_job():
        options = parser.parse_args(arguments)
        # What compiles here never runs: no accelerator of this machine is opened, no cache of programs is written, and libtpu
        # need not ask a metadata server which TPU this is.
        os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "none", "TPU_WORKER_HOSTNAMES": "localhost"}
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_compilation_cache", False)
        if options.topology:
            devices = tpu_devices(options.topology, options.slices, options.chips_per_host)
        else:
            devices = cpu_devices(options.devices)
        report = compile_job(options.script, options.job_arguments, devices)
        print(json.dumps(dataclasses.asdict(report)))


if __name__ == "__main__":
    main(sys.argv[1:])
