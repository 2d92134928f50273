"""Opens what another run has trained: its model's architecture from its own config.json, its weights from its newest
checkpoint that can be read and holds what was saved. Read-only: nothing here writes to the run that is opened.

Nobody repeats a model's options: `--tokenizer_checkpoint RUN` is all there is to say. A run that uses frozen parts keeps
their weights in `frozen/<name>/` of its own directory, in the layout of a run, from its first step on: what it computes
then depends on nothing outside, and goes on exactly though the other run is trained further, moved or deleted.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import logging
import os
import pkgutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from pydantic import TypeAdapter, ValidationError

from jasmine.errors import ClusterError, UserError
from jasmine.training import checksums, distributed, objects, run_files
from jasmine.training.config import TrainConfig
from jasmine.training.sharding import ShardingRules, tree_shardings
from jasmine.training.state import ModelDefinition, Params
from jasmine.training.task import BaseTask, DataInfo

CONFIG_NAME = "config.json"


def find_run(run: str, option: str) -> epath.Path:
    """The directory of a run.

    Args:
        run: a directory, or the name of a run under the storage root: `JASMINE_STORAGE`, or where this job's own run
            directory lies, or `runs`.
        option: what to call it in an error.

    Raises:
        UserError: there is none.
    """
    if not run:
        raise UserError(f"{option} is not set: name a run directory, or a run under the storage root")
    roots = [os.environ.get("JASMINE_STORAGE", ""), os.path.dirname(os.environ.get("JASMINE_RUN_DIR", "")), "runs"]
    tried = [epath.Path(run).expanduser()]
    if "/" not in run:
        tried += [epath.Path(root) / run for root in roots if root]
    for path in tried:
        if path.is_dir():
            return path if "://" in str(path) else epath.Path(os.path.abspath(path))
    raise UserError(f"{option}={run}: there is no such run (looked for {', '.join(map(str, dict.fromkeys(tried)))})")


@functools.cache
def baseline_modules() -> dict[str, str]:
    """Job name -> module of every baseline that trains something."""
    import jasmine.baselines

    found = pkgutil.walk_packages(jasmine.baselines.__path__, "jasmine.baselines.")
    names = [module.name for module in found if not module.ispkg]
    return {name.rpartition(".")[2]: name for name in names if name.rpartition(".")[2].startswith("train_")}


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A model that a run has trained.

    Attributes:
        path: the run directory.
        job: the baseline's name.
        config: its options, an instance of that baseline's `Config`.
        data: what it was trained on.
        steps: of its finished checkpoints, newest first; none where only the architecture is known, without weights.
        task: the baseline's `Task`.
    """

    path: epath.Path
    job: str
    config: Any
    data: DataInfo
    steps: tuple[int, ...]
    task: BaseTask

    @functools.cached_property
    def definition(self) -> ModelDefinition:
        """The model without its weights."""
        return ModelDefinition(self.task)

    @functools.cached_property
    def _loaded(self) -> tuple[int, Params]:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return self.load(jax.tree.map(lambda _: device, self.definition.shapes))

    @property
    def params(self) -> Params:
        """Its weights, moving averages where the run keeps them, on the first local device."""
        return self._loaded[1]

    @property
    def step(self) -> int:
        """Of the checkpoint that `params` are from; 0 where there is none."""
        return self._loaded[0] if self.steps else 0

    def load(self, shardings: Any) -> tuple[int, Params]:
        """The weights in the given shardings, from the newest checkpoint that is not damaged, and its step. Every process
        calls it where the shardings are those of several.

        Raises:
            UserError: all checkpoints are damaged, or one does not fit the config beside it.
            ClusterError: one cannot be read now.
        """
        folder = self.path / "checkpoints"
        shared = not all(sharding.is_fully_addressable for sharding in jax.tree.leaves(shardings))
        damaged: list[str] = []
        # A run that goes on meanwhile has newer ones by the time that the last process looks.
        for step in distributed.of_first(self.steps) if shared else self.steps:
            problem: Exception | None = None
            try:
                params, saved = self._read(folder / str(step), shardings)
            except UserError:
                raise
            except Exception as error:
                problem = error
            verdict = 0 if problem is None else 2 if objects.may_pass(problem) else 1
            verdict = distributed.largest(verdict) if shared else verdict
            why = objects.reason(problem) if problem is not None else "on another process"
            if verdict == 2:
                raise ClusterError(f"the checkpoint {folder / str(step)} cannot be read now: {why}") from problem
            if verdict == 0:
                found = checksums.checksums(params) if shared else checksums.checksums_on_host(params)
                if not checksums.agree(found, saved):
                    verdict, why = 1, "its contents are not those that were saved"
            if verdict == 0:
                if damaged:
                    print(
                        f"warning: step {step} is the newest in {folder} that can be read ({'; '.join(damaged)})",
                        file=sys.stderr,
                        flush=True,
                    )
                return step, next(iter(params.values()))
            damaged.append(f"step {step}: {why}")
        raise UserError(f"no checkpoint in {folder} can be read ({'; '.join(damaged)})")

    def _read(self, path: epath.Path, shardings: Any) -> tuple[dict[str, Params], Mapping[str, Any]]:
        """The weights of a checkpoint under the name of the part that they are, and what was written beside them. Orbax's
        checkpointer would have processes that could read it wait for those that could not."""
        handler = ocp.PyTreeCheckpointHandler()
        with _quiet():
            saved = handler.metadata(path / "state").tree
        name = "ema" if saved.get("ema") else "params"
        have, want = _shapes(saved[name]), _shapes(self.definition.shapes)
        if have != want:
            different = sorted(key for key in have.keys() | want.keys() if have.get(key) != want.get(key))[0]
            raise UserError(
                f"the checkpoint {path} does not fit {self.path / CONFIG_NAME}: {different} is {have.get(different)} in the "
                f"one and {want.get(different)} by the other"
            )
        abstract = {
            name: jax.tree.map(
                lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
                self.definition.shapes,
                shardings,
            )
        }
        arguments = ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
        )
        return handler.restore(path / "state", args=arguments), checksums.read(path)

    def module(self) -> nnx.Module:
        """The live model."""
        return self.definition.module(self.params)

    def frozen(self) -> dict[str, nnx.Module]:
        """The live models that this one was trained with, from the run's own copy of them."""
        return {name: part.module() for name, part in self.task.frozen.items()}

    def fingerprint(self) -> str:
        """Hash of what the model computes: its job, architecture and weights."""
        digest = hashlib.sha256(self.job.encode())
        for path, leaf in jax.tree_util.tree_flatten_with_path(self.params)[0]:
            digest.update(f"{jax.tree_util.keystr(path)}{leaf.shape}{leaf.dtype}".encode())
            digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
        return digest.hexdigest()[:16]


def load_run(run: str, *, option: str, jobs: Sequence[str] | None = None, weights: bool = True) -> TrainedRun:
    """Opens a run; weights are read when they are asked for.

    Args:
        run: a directory, or a run's name under the storage root.
        option: what to call it in an error.
        jobs: the baselines that may have trained it; None for any.
        weights: False opens its config alone, whether or not it has a checkpoint.

    Raises:
        UserError: there is no such run, it has no checkpoint, or another kind of job made it.
    """
    path = find_run(run, option)
    if not (path / CONFIG_NAME).exists():
        raise UserError(
            f"{option}={run}: {path} has no {CONFIG_NAME}, so it is not the directory of a run that has trained"
        )
    try:
        record = json.loads((path / CONFIG_NAME).read_text())
        job, options, data = record["job"], record["config"], record["data"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / CONFIG_NAME} is damaged or of an old version: {objects.reason(error)}") from error
    if jobs is not None and job not in jobs:
        raise UserError(f"{option}={run} was made by {job}; expected {' or '.join(jobs)}")
    if job not in baseline_modules():
        raise UserError(f"{option}={run} was made by {job}, which is none of {', '.join(sorted(baseline_modules()))}")
    steps = _checkpoints(path / "checkpoints") if weights else ()
    if weights and not steps:
        raise UserError(f"{option}={run}: {path / 'checkpoints'} holds no finished checkpoint")
    module = importlib.import_module(baseline_modules()[job])
    try:
        config = TypeAdapter(module.Config).validate_python(options)
        info = TypeAdapter(DataInfo).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{path / CONFIG_NAME}: {where}: {first['msg']}; was the run made by another version?"
        ) from error
    parts = frozen_parts(config, path, weights=weights)
    return TrainedRun(path, job, config, info, steps, module.Task(config, info, parts))


def _checkpoints(path: epath.Path) -> tuple[int, ...]:
    steps = ocp.utils.checkpoint_steps(path) if path.is_dir() else []
    # Where a deletion was cut short in Cloud Storage, the mark of a finished checkpoint is left, and nothing else.
    return tuple(sorted((step for step in steps if (path / str(step) / "state").is_dir()), reverse=True))


def frozen_parts(config: TrainConfig, run_dir: epath.Path, *, weights: bool = True) -> dict[str, TrainedRun]:
    """The frozen parts of the run in `run_dir`: its own copies, or where there are none yet, the runs to take them from.
    `weights`: as for `load_run`."""
    parts = {}
    for name, source in config.frozen_runs().items():
        copy = run_dir / "frozen" / name
        run = str(copy) if (copy / CONFIG_NAME).exists() else source.run
        parts[name] = load_run(run, option=source.option, jobs=source.jobs, weights=weights)
    return parts


def pin(run_dir: epath.Path, name: str, source: TrainedRun, mesh: Mesh, rules: ShardingRules) -> Params:
    """Loads a frozen part onto the mesh, and keeps a copy in `run_dir` unless there is one. Called by every process."""
    definition = source.definition
    step, params = source.load(tree_shardings(definition.shapes, definition.logical, mesh, rules))
    distributed.say(f"{name}: step {step} of {source.path} ({source.job})")
    target = run_dir / "frozen" / name
    if source.path != target:
        checkpoints = target / "checkpoints"
        if jax.process_index() == 0 and checkpoints.exists():
            checkpoints.rmtree()  # of an attempt that ended before it was whole
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"pin {name}")
        parts = {"params": params}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(parts),
            meta=ocp.args.JsonSave({checksums.KEY: checksums.checksums(parts)}),
        )
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(checkpoints / str(step), items)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"pinned {name}")
        if jax.process_index() == 0:
            record = json.loads((source.path / CONFIG_NAME).read_text()) | {"pinned_from": str(source.path)}
            run_files.write_atomically(target / CONFIG_NAME, (json.dumps(record, indent=2) + "\n").encode())
    return params


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Orbax's warning that a part of a checkpoint has no metadata file of its own; the checkpoint has it."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}
