"""Finds out where this process runs and joins its peers: Slurm, Cloud TPU, GKE, an explicit coordinator, or alone.

Nothing here needs the launcher: a plain `srun python …`, `torchrun`-like variables or a bare `python …` work. After
`initialize()` jax knows all devices of the job, and `topology()` says what was found.
"""

import contextlib
import dataclasses
import importlib.util
import logging
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import logging as absl_logging
from jax.experimental import multihost_utils

from jasmine.errors import (
    EXIT_FAILED,
    EXIT_SAVED,
    EXIT_USER_ERROR,
    EXIT_WOULD_REPEAT,
    ChangedDataError,
    ClusterError,
    NotFiniteError,
    UserError,
)
from jasmine.training import objects

logger = logging.getLogger(__name__)

# Cold starts on large pods are uneven: pulling an environment over a network disk can take one host many minutes.
INIT_TIMEOUT_SECONDS = 1800
# How long a host may be silent before its peers give up. Training blocks no heartbeat: it has a thread of its own.
HEARTBEAT_SECONDS = 60
SHUTDOWN_SECONDS = 60
# A name that is not known now may be in a minute, on a machine that has just booted; later it is a mistake.
RESOLVE_SECONDS = 60
# How long a process waits for others that are to end as it does.
LEAVE_SECONDS = 10
# What a process that fails waits at most for storage to take its last lines.
LAST_LINES_SECONDS = 10


@dataclasses.dataclass(frozen=True)
class Rendezvous:
    """Where the processes of a job meet. `source` is how it was found; fields that are None are jax's to detect."""

    source: str
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] | None = None


def find_rendezvous(env: Mapping[str, str]) -> Rendezvous | None:
    """Reads the environment; None means one process.

    Raises:
        UserError: variables that contradict each other or are incomplete.
    """
    if "JAX_COORDINATOR_ADDRESS" in env and ("JAX_NUM_PROCESSES" in env or "JAX_PROCESS_ID" in env):
        names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        return _explicit("explicit coordinator", env, *names)
    if "RANK" in env and "WORLD_SIZE" in env and _integer(env, "WORLD_SIZE") > 1:
        if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
            raise UserError("RANK and WORLD_SIZE are set but MASTER_ADDR or MASTER_PORT is not: set all four, or none")
        shared = _integer(env, "LOCAL_WORLD_SIZE", 1) > 1 and "LOCAL_RANK" in env
        local = (_integer(env, "LOCAL_RANK"),) if shared else None
        address = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
        return Rendezvous("torchrun variables", address, _integer(env, "WORLD_SIZE"), _integer(env, "RANK"), local)
    # Of a step, as srun starts it: the batch script around it has SLURM_PROCID and SLURM_NTASKS as well, but is alone.
    if "SLURM_PROCID" in env and _integer(env, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return Rendezvous("Slurm step", local_device_ids=_slurm_gpus(env))
    return _tpu_pod(env)


def _integer(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = env.get(name, str(default))
    try:
        return int(value)
    except ValueError:
        raise UserError(f"the environment has {name}={value!r}; expected a whole number") from None


def _explicit(source: str, env: Mapping[str, str], address: str, count: str, index: str) -> Rendezvous:
    missing = [name for name in (address, count, index) if name not in env]
    if missing:
        raise UserError(f"{', '.join(missing)} not set although {address} is: set all of {address}, {count}, {index}")
    return Rendezvous(source, env[address], _integer(env, count), _integer(env, index))


def _slurm_gpus(env: Mapping[str, str]) -> tuple[int, ...] | None:
    """The GPUs of this task, as indices into those that it sees. Left to itself, jax would take GPU number SLURM_LOCALID
    and no other: one task with eight GPUs would train on the first. None without GPUs, or where the user has chosen."""
    if "JAX_LOCAL_DEVICE_IDS" in env:
        return None
    if "CUDA_VISIBLE_DEVICES" in env:
        seen = len([device for device in env["CUDA_VISIBLE_DEVICES"].split(",") if device])
    else:
        seen = _integer(env, "SLURM_GPUS_ON_NODE", 0)
    tasks = _tasks_on_this_node(env)
    if not seen:
        return None
    if seen == 1 or tasks == 1 or seen % tasks:
        return tuple(range(seen))  # bound to this task by Slurm, or all its own
    share = seen // tasks
    first = _integer(env, "SLURM_LOCALID", 0) * share
    return tuple(range(first, first + share))


def _tasks_on_this_node(env: Mapping[str, str]) -> int:
    """From the compressed list of tasks per node, as in `4(x2),3`."""
    counts: list[int] = []
    for count, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", "1")):
        counts += [int(count)] * int(repeats or 1)
    node = _integer(env, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else 1


def _tpu_pod(env: Mapping[str, str]) -> Rendezvous | None:
    if "cpu" in env.get("JAX_PLATFORMS", "") and "GCE_METADATA_IP" not in env:
        return None
    from jax._src.clusters import cloud_tpu_cluster  # no public name: jax keeps detection to itself

    for source, name in (("Cloud TPU", "GceTpuCluster"), ("GKE TPU", "GkeTpuCluster")):
        cluster = getattr(cloud_tpu_cluster, name)
        try:
            if cluster.is_env_present() and int(cluster.get_process_count()) > 1:
                return Rendezvous(source)
        except Exception as error:  # the metadata server of a VM that is not a TPU answers in many ways
            logger.debug("no %s here: %r", source, error)
    return None


def initialize() -> None:
    """Joins the job's other processes, if there are any. Call it once, before anything touches a device.

    Timeouts come from `JASMINE_INIT_TIMEOUT` and `JASMINE_HEARTBEAT_TIMEOUT` (seconds) where set.

    Raises:
        UserError: the environment describes no usable job.
        ClusterError: the coordinator or a peer did not answer in time.
    """
    _leave_out_absent_tpus()
    _quiet_libraries()
    _enable_compilation_cache()
    # Our own agreement on a stopping step listens to three signals; jax's would take SIGTERM away from it.
    jax.config.update("jax_enable_preemption_service", False)
    found = find_rendezvous(os.environ)
    if found is None:
        return
    init_timeout = int(os.environ.get("JASMINE_INIT_TIMEOUT", INIT_TIMEOUT_SECONDS))
    heartbeat = int(os.environ.get("JASMINE_HEARTBEAT_TIMEOUT", HEARTBEAT_SECONDS))
    host = (found.coordinator or "").rpartition(":")[0]
    loopback = host in ("localhost", "127.0.0.1")
    if found.coordinator and found.process_id:
        _wait_for_coordinator(found, init_timeout)
    try:
        jax.distributed.initialize(
            coordinator_address=found.coordinator,
            num_processes=found.num_processes,
            process_id=found.process_id,
            local_device_ids=found.local_device_ids,
            # What was given is complete; detection would only narrow the devices to one by a cluster's variables.
            cluster_detection_method="deactivate" if found.coordinator else None,
            initialization_timeout=init_timeout,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            # A job on this machine alone has no business listening on its other addresses.
            coordinator_bind_address=found.coordinator if loopback and found.process_id == 0 else None,
        )
    except Exception as error:
        first_line = str(error).strip().splitlines()[0]
        raise ClusterError(
            f"could not join the job ({found.source}, coordinator {found.coordinator or 'detected by jax'}) "
            f"within {init_timeout} s: {first_line}"
        ) from error


def _wait_for_coordinator(found: Rendezvous, timeout: float) -> None:
    """Waits until somebody listens at the coordinator's address. Jax would wait as well, but end by aborting."""
    host, _, port = str(found.coordinator).rpartition(":")
    begin = time.monotonic()
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            waited = time.monotonic() - begin
            # Under the launcher all nodes are there. Elsewhere a name may begin to exist with its process, however late.
            patience = RESOLVE_SECONDS if "JASMINE_ATTEMPT" in os.environ else timeout
            if isinstance(error, socket.gaierror) and waited > min(timeout, patience):
                raise ClusterError(
                    f"could not join the job: {socket.gethostname()} cannot resolve the name {host} of the node of process 0 "
                    f"({found.source}): {error.strerror}"
                ) from error
            if waited > timeout:
                raise ClusterError(
                    f"could not join the job: nobody answers at {found.coordinator} ({found.source}) within {timeout:.0f} s: "
                    f"{error.strerror or error}; is process 0 running, and its port reachable from this host?"
                ) from error
        except ValueError:
            raise UserError(f"the coordinator's address is {found.coordinator!r}; expected HOST:PORT") from None
        time.sleep(0.2)


def topology() -> str:
    """One line on what was found, for the log: processes, devices and their kind."""
    device = jax.devices()[0]
    kind = device.device_kind if device.platform != "cpu" else "CPU"
    found = find_rendezvous(os.environ)
    return (
        f"{jax.process_count()} process(es) × {jax.local_device_count()} {kind} device(s) = {jax.device_count()} devices; "
        f"this is process {jax.process_index()} on {socket.gethostname()} ({found.source if found else 'single process'})"
    )


def say(*lines: str) -> None:
    """Prints lines once for the whole job: on process 0."""
    if jax.process_index() == 0:
        for line in lines:
            print(line, flush=True)


def coordination_client():  # type: ignore[no-untyped-def]  # the type is jaxlib's own
    """The client of jax's coordination service, or None in a job of one process."""
    from jax._src import distributed  # the service has no public name

    return distributed.global_state.client


def place() -> tuple[int, int]:
    """This process's number and how many there are. Unlike jax's own functions it looks for no devices, which would wait
    for all processes to do so."""
    from jax._src import distributed

    return distributed.global_state.process_id, distributed.global_state.num_processes


def largest(mine: int) -> int:
    """The largest of all processes' numbers; every process calls it."""
    if jax.process_count() == 1:
        return mine
    return int(multihost_utils.process_allgather(np.asarray(mine)).max())


def of_first(numbers: Sequence[int]) -> tuple[int, ...]:
    """The numbers, below 2**31, that process 0 has; every process calls it."""
    if jax.process_count() == 1:
        return tuple(numbers)
    count = int(multihost_utils.broadcast_one_to_all(np.asarray(len(numbers))))
    mine = np.zeros(count, np.int32)
    if jax.process_index() == 0:
        mine[:] = numbers
    return tuple(int(number) for number in multihost_utils.broadcast_one_to_all(mine)) if count else ()


@contextlib.contextmanager
def exit_with_job() -> Iterator[None]:
    """Around a process's whole work: any error ends this process at once, after its message is out.

    In a job of many processes, leaving normally would wait in jax's exit barrier for peers that are themselves waiting
    in a collective for this one (five minutes by default). A user's mistake is one line and exit code 2, a loss that is
    not finite or data that were replaced one line and 65, storage that is full or away one line and 1; a bug of ours or a
    lost peer keeps its traceback and exit code 1.
    Leaving with 0 or 75 is orderly, with the barrier.
    """
    try:
        yield
    except ChangedDataError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = EXIT_WOULD_REPEAT
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = EXIT_USER_ERROR
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = EXIT_FAILED
    except NotFiniteError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = EXIT_WOULD_REPEAT
        _let_others_leave()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(bool(leaving.code))
        if code in (0, EXIT_SAVED) or coordination_client() is None:
            raise  # every process leaves like this, so the exit barrier lets all go
    except KeyboardInterrupt:
        print("interrupted; run the same command to go on from the newest checkpoint", file=sys.stderr, flush=True)
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
        code = EXIT_FAILED
    else:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    objects.flush(LAST_LINES_SECONDS)
    os._exit(code)


def _let_others_leave() -> None:
    """Waits where all processes come to the same end: when process 0 goes, jax aborts those that have not yet said why."""
    client = coordination_client()
    if client is None:
        return
    objects.flush(LAST_LINES_SECONDS)
    with contextlib.suppress(Exception):  # one that does not come is not waited for long
        client.wait_at_barrier("jasmine/leave", 1000 * LEAVE_SECONDS)
        if place()[0] == 0:
            time.sleep(2)


def _enable_compilation_cache() -> None:
    """Compiled steps are kept from run to run, so that a resumed job starts at once. Empty variable: no cache."""
    chosen = os.environ.get("JASMINE_COMPILATION_CACHE_DIR", os.environ.get("JAX_COMPILATION_CACHE_DIR"))
    if chosen is None:
        cache_home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        chosen = str(Path(cache_home) / "jasmine" / "xla")
    if not chosen:
        return
    if "://" not in chosen:
        try:
            Path(chosen).expanduser().mkdir(parents=True, exist_ok=True)
        except OSError as error:
            logger.warning("no compilation cache: %s", error)
            return
        chosen = str(Path(chosen).expanduser())
    jax.config.update("jax_compilation_cache_dir", chosen)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _leave_out_absent_tpus() -> None:
    """libtpu may be here to compile for TPUs elsewhere (`jasmine.compile`). As a backend it would look for one on this
    machine and complain at length that there is none; jax has looked before it, and has noted that there is no chip."""
    absent = os.environ.get("TPU_SKIP_MDS_QUERY") == "1"
    plugins = importlib.util.find_spec("jax_plugins") is not None  # of GPUs: whether those work is for jax to find out
    if absent and not plugins and jax.config.jax_platforms is None:  # type: ignore[attr-defined]
        jax.config.update("jax_platforms", "cpu")


def _quiet_libraries() -> None:
    # Orbax logs a failed save as a dozen tracebacks from its threads; `Checkpointer` says it once, in one line.
    absl_logging.set_verbosity(absl_logging.FATAL)
    # gcsfs logs tracebacks of requests that fail, which are tried again or raised, and said once by whoever needed them.
    for name in ("asyncio", "gcsfs", "fsspec"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    default_hook = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        # What tensorstore's callbacks raise, to nobody, when a save has failed and its event loop is gone.
        if str(unraisable.exc_value) != "Event loop is closed":
            default_hook(unraisable)

    sys.unraisablehook = hook
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
