"""Cloud TPU for XManager: `CloudTpu` runs the jobs of an `xm.Experiment`, each work unit a run like any other.

    from xmanager import xm
    from launch.xm import CloudTpu, create_experiment

    with create_experiment("tokenizers") as experiment:
        tpu = CloudTpu("tpu-v5-256", settings={"provisioning": "spot"})
        [executable] = experiment.package(
            [xm.python_container(tpu.Spec(), path=".", entrypoint=xm.ModuleName("jasmine.baselines.train_lam"))]
        )
        for seed in range(2):
            experiment.add(xm.Job(executable, tpu, args={"seed": seed, "data_dir": "/data/coinrun"}))

XManager's own executors know no TPU later than v3, and `xm_local` asks for absl flags, a database and docker. This uses
XManager's public API alone. `path` is snapshot as it is (there is no container: the VMs install `requirements.lock`); the
runs are called `<title>.<work unit>`, and `jobs.py` works on them. `launch/submit.py` launches through the same classes.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attr
from absl import logging as absl_logging
from xmanager import xm
from xmanager.xm import async_packager

from launch.backends import cloud_tpu
from launch.cluster_files import change_settings, load_cluster
from launch.config import CloudTpuCluster
from launch.errors import UserError
from launch.options import Job, check_options
from launch.paths import expand_path
from launch.plan import Plan
from launch.record import ACTIVE
from launch.request import Request, checked_name, checked_plan, with_batch, with_data
from launch.run_dir import RunDir
from launch.snapshot import Snapshot, take_snapshot
from launch.standing import read_standing
from launch.submission import recorded
from launch.topology import tpu_types

POLL_SECONDS = 2.0

# XManager logs these around errors that it raises, and asks asyncio, which logs them as well, for nothing more than raising.
_REPEATED = ("Stopping experiment unit", "Multiple exceptions occurred", "Future exception was never retrieved")
for _logger in (absl_logging.get_absl_logger(), logging.getLogger("asyncio")):
    _logger.addFilter(lambda line: not line.getMessage().startswith(_REPEATED))

# What XManager calls the generations of TPU, and the Cloud TPU API theirs.
_PREFIXES = {"TPU_V4": "v4", "TPU_V5E": "v5litepod", "TPU_V5P": "v5p", "TPU_V6E": "v6e"}


@attr.s(auto_attribs=True)
class CloudTpuSpec(xm.ExecutorSpec):
    """Where packaged code goes: into a tarball beside each run."""


@attr.s(auto_attribs=True)
class CloudTpu(xm.Executor):
    """A Cloud TPU rented as a queued resource.

    Attributes:
        cluster: a file in `cluster_configs/` by its stem, or the path of one.
        settings: keys of that file to override, as `--set` does.
        requirements: alternatively to `accelerator_type`, as in `xm.JobRequirements(tpu_v5e="16x16")`. XManager refuses more
            than one slice of TPUs there: `settings={"slices": 2}`.
    """

    cluster: str
    settings: Mapping[str, Any] = attr.Factory(dict)
    requirements: xm.JobRequirements = attr.Factory(xm.JobRequirements)

    Spec = CloudTpuSpec

    def load(self) -> tuple[str, CloudTpuCluster]:
        """Return the cluster's name and settings.

        Raises:
            UserError: there is no such cluster, it is no Cloud TPU, or a setting is wrong.
        """
        overrides = [f"{key}={_yaml(value)}" for key, value in self.settings.items()]
        if self.requirements.accelerator is not None:
            overrides.append(f"accelerator_type={self._accelerator_type()}")
        name, settings = load_cluster(self.cluster, overrides)
        if not isinstance(settings, CloudTpuCluster):
            raise UserError(f"CloudTpu: {name} is a cluster of the backend {settings.backend}, not of cloud_tpu")
        return name, settings

    def _accelerator_type(self) -> str:
        kind = self.requirements.accelerator
        prefix = _PREFIXES.get(kind.name)
        if prefix is None:
            raise UserError(f"CloudTpu: requirements: {kind.name} is no TPU of the Cloud TPU API (v4, v5e, v5p, v6e)")
        shape = self.requirements.topology.name
        for name, tpu in tpu_types().items():
            if tpu.generation.prefix == prefix and tpu.shape == shape:
                return name
        raise UserError(f"CloudTpu: requirements: there is no {prefix} with the topology {shape}")


def _yaml(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("...").strip()


@attr.s(auto_attribs=True)
class _Code(xm.Executable):
    """A script with the tree around it, and the arguments that it was packaged with."""

    name: str
    job: Job
    snapshot: Snapshot
    args: xm.SequentialArgs
    env_vars: Mapping[str, str]


@attr.s(auto_attribs=True)
class _Planned(xm.Executable):
    """A run that `launch/submit.py` has planned, recorded and packed."""

    name: str
    plan: Plan


def _package(packageables: Sequence[xm.Packageable]) -> list[xm.Executable]:
    return [_package_one(one) for one in packageables]


def _package_one(packageable: xm.Packageable) -> xm.Executable:
    spec = packageable.executable_spec
    if isinstance(spec, xm.PythonContainer) and isinstance(spec.entrypoint, xm.ModuleName):
        root = Path(spec.path)
        script = root.joinpath(*spec.entrypoint.module_name.split(".")).with_suffix(".py")
    elif isinstance(spec, xm.Binary) and spec.path.endswith(".py"):
        script = Path(spec.path).absolute()
        root = script.parent
    else:
        raise UserError(
            f"CloudTpu runs Python without a container: package xm.python_container(entrypoint=xm.ModuleName(…)) or "
            f"xm.binary(path='….py'), not {type(spec).__name__}"
        )
    if not script.is_file():
        raise UserError(f"{spec.name}: there is no file {script}")
    job = Job(script.stem, script)
    return _Code(spec.name, job, take_snapshot(root, script), packageable.args, packageable.env_vars)


class TpuWorkUnit(xm.WorkUnit):
    """One run. `run` is its directory, once it has been launched."""

    def __init__(self, experiment: "TpuExperiment", number: int, *rest: Any) -> None:
        super().__init__(experiment, *rest)
        self._number = number
        self._title = experiment.title
        self.run: RunDir | None = None

    @property
    def work_unit_id(self) -> int:
        return self._number

    @property
    def experiment_unit_name(self) -> str:
        return self.run.name if self.run else f"{self._title}.{self._number}"

    async def _launch_job_group(self, job_group: xm.JobGroup, args_view: Mapping[str, Any], identity: str) -> None:
        jobs = list(job_group.jobs.values())
        if len(jobs) != 1 or not isinstance(jobs[0], xm.Job):
            raise UserError("a work unit on Cloud TPU is one job: add the others as work units of their own")
        await asyncio.to_thread(self._launch, jobs[0])

    def _launch(self, job: xm.Job) -> None:
        if not isinstance(job.executor, CloudTpu):
            raise UserError(f"this experiment runs jobs on CloudTpu, not on {type(job.executor).__name__}")
        if isinstance(job.executable, _Planned):
            cloud_tpu.start(job.executable.plan)
            self.run = RunDir.at(job.executable.plan.run_dir)
            return
        request = self._request(job, job.executable)
        checked_plan(request)
        with recorded([request]) as ((plan,), _):
            cloud_tpu.pack_code(plan)
            try:
                cloud_tpu.start(plan)
            except (OSError, UserError):
                cloud_tpu.give_back([plan])  # while the run directory still says what that is
                raise
        self.run = request.run

    def _request(self, job: xm.Job, code: _Code) -> Request:
        cluster, settings = job.executor.load()
        environment = {k: str(v) for k, v in {**code.env_vars, **job.env_vars}.items()}
        values = {**settings.model_dump(), "env": {**settings.env, **environment}}
        settings = change_settings(values, (), origin=f"{cluster} with env_vars")
        words = xm.merge_args(code.args, job.args).to_list(xm.utils.ARGV_ESCAPER)
        check_options(code.job, words)
        cwd = Path.cwd()
        run = RunDir(expand_path(settings.storage, "storage", cwd) / checked_name(self.experiment_unit_name))
        arguments = with_batch(run, code.job, with_data(code.job, tuple(words), settings), settings)
        return Request(
            run, code.job, arguments, cwd, cluster, settings, code.snapshot.code, code.snapshot.script, code.snapshot
        )

    async def _wait_until_complete(self) -> None:
        while self.get_status().is_active:
            await asyncio.sleep(POLL_SECONDS)
        status = self.get_status()
        if not status.is_completed:
            raise xm.ExperimentUnitFailedError(status.message, work_unit=self)

    def get_status(self) -> "TpuStatus":
        if self.run is None:
            return TpuStatus("submitted", "")
        standing = read_standing(self.run)
        state = standing.record.state
        if state not in ACTIVE and standing.live:
            state = "running"
        return TpuStatus(state, standing.record.reason or standing.seen.detail)

    def stop(
        self, *, mark_as_failed: bool = False, mark_as_completed: bool = False, message: str | None = None
    ) -> None:
        if self.run is not None and self.run.record.exists() and (standing := read_standing(self.run)).live:
            cloud_tpu.cancel(self.run, standing.record)


class TpuStatus(xm.ExperimentUnitStatus):
    """The state of a run, in XManager's terms."""

    def __init__(self, state: str, message: str) -> None:
        self.state, self._message = state, message

    @property
    def is_active(self) -> bool:
        return self.state in ACTIVE

    @property
    def is_completed(self) -> bool:
        return self.state == "finished"

    @property
    def is_failed(self) -> bool:
        return not self.is_active and not self.is_completed

    @property
    def message(self) -> str:
        return f"{self.state}: {self._message}" if self._message else self.state


class TpuExperiment(xm.Experiment):
    """An experiment whose work units are runs on Cloud TPU. It has no server: what is known of it is in the runs."""

    _async_packager = async_packager.AsyncPackager(_package)

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = checked_name(title)
        self._id = int(1000 * time.time())
        self._numbers = itertools.count(1)
        self._units: dict[int, TpuWorkUnit] = {}

    @property
    def experiment_id(self) -> int:
        return self._id

    @property
    def work_unit_count(self) -> int:
        return len(self._units)

    @property
    def work_units(self) -> Mapping[int, TpuWorkUnit]:
        return self._units

    def _create_experiment_unit(
        self, args: Mapping[str, Any] | None, role: xm.ExperimentUnitRole, identity: str
    ) -> Awaitable[TpuWorkUnit]:
        if not isinstance(role, xm.WorkUnitRole):
            raise UserError("an experiment on Cloud TPU has work units only")
        unit = TpuWorkUnit(self, next(self._numbers), self._create_task, args, role, identity)
        self._units[unit.work_unit_id] = unit
        future = self._event_loop.create_future()
        self._event_loop.call_soon_threadsafe(future.set_result, unit)
        return future

    def _get_experiment_unit(
        self, experiment_id: int, identity: str, role: xm.ExperimentUnitRole, args: Mapping[str, Any] | None = None
    ) -> Awaitable[TpuWorkUnit]:
        raise UserError("an experiment on Cloud TPU cannot be reloaded: its runs are continued with `jobs.py resume`")

    def _should_reload_experiment_unit(self, role: xm.ExperimentUnitRole) -> bool:
        return False


def create_experiment(experiment_title: str) -> TpuExperiment:
    """Return a new experiment, to be entered with `with`; the title begins the names of its runs.

    Raises:
        UserError: the title would not do as a run's name.
    """
    return TpuExperiment(experiment_title)


def launch_planned(plans: Sequence[Plan]) -> None:
    """Launch runs that are planned, recorded and packed, as one experiment; if one cannot be, give back what the others got.

    Raises:
        UserError: the API refuses one, or does not answer.
    """
    try:
        with create_experiment(plans[0].sweep or plans[0].run) as experiment:
            for plan in plans:
                experiment.add(xm.Job(_Planned(plan.run, plan), CloudTpu(plan.cluster), name="job"))
    except (OSError, UserError):
        cloud_tpu.give_back(plans)
        raise
