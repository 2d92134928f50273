"""Checks the machines of an attempt before it trains, where `JASMINE_PREFLIGHT` is set.

First all processes call out to each other through jax's coordination service, before any of them touches a device: to look
for devices is already to wait for everybody. Then each reports what it sees (devices, clock, code, storage), so one that
is different is named before a collective could hang on it. It also says how long its device takes for the same arithmetic;
one that is slow is no reason to give up, but is named by whoever looks at the run (`launch.stragglers`). An all-reduce over
all devices has to give the right number, and its bandwidth goes into each process's log. Before the reports and from them on
there are as many seconds as the variable says. Each process leaves word of how far it is, so one that holds up the others is
named as well. What is wrong is left in `attempts/<k>/blame.json` for the launcher, with the process at fault, whose machine
the next attempt is kept away from; for a problem that all of several have, such as storage that is away, nobody is.
"""

import contextlib
import hashlib
import json
import os
import statistics
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jasmine.errors import EXIT_FAILED, ClusterError
from jasmine.training import distributed, objects, run_files

CLOCK_SECONDS = 30.0
# When the time is up, it is for all of them within moments; one that does not say so by then is not running.
AWAKE_SECONDS = 3.0
_KEY = "jasmine/preflight"
_PACKAGE = Path(__file__).resolve().parents[1]


def preflight(run_dir: epath.Path) -> None:
    """Checks all processes; call it on each of them after they have met.

    Raises:
        ClusterError: something is wrong with a machine; names the process and its node.
    """
    limit = float(os.environ.get("JASMINE_PREFLIGHT", "0"))
    if limit <= 0:
        return
    nodes = _roll_call(run_dir, limit)
    slow = threading.Timer(limit, _give_up, (run_dir, nodes))
    slow.daemon = True
    slow.start()
    mine = _report(run_dir)
    reports = _exchange(mine)
    if problem := _worst(reports):
        _fail(run_dir, *problem, nodes)
    size, seconds, right = _all_reduce()
    wrong = [
        process for process, word in enumerate(_tell_all("through", "right" if right else "wrong")) if word == "wrong"
    ]
    slow.cancel()
    if wrong:
        culprit = None if _is_everywhere(len(wrong), len(reports)) else wrong[0]
        _fail(run_dir, culprit, "got a wrong number from an all-reduce over all devices", nodes)
    count = jax.device_count()
    moved = 2 * (count - 1) / count * size / seconds if count > 1 else 0.0
    speed = f", {moved / 1e9:,.2f} GB/s" if moved else ""
    print(
        f"preflight passed on {_node()}: {mine['devices']} device(s), all-reduce of {size / 2**20:.0f} MiB over "
        f"{count} devices in {1000 * seconds:.1f} ms{speed}",
        flush=True,
    )
    if distributed.place()[0] == 0:
        fields = {"processes": len(reports), "all_reduce_seconds": seconds, "bytes": size, "bytes_per_second": moved}
        run_files.log_event(
            run_dir, "preflight", **fields, compute_seconds=[report["compute_seconds"] for report in reports]
        )


def _report(run_dir: epath.Path) -> dict[str, Any]:
    """What this process sees."""
    problem = ""
    expected = os.environ.get("JASMINE_LOCAL_DEVICES")
    found = jax.local_device_count()
    if expected is not None and int(expected) != found:
        problem = f"sees {found} {jax.local_devices()[0].platform} device(s) instead of {expected}"
    probe = run_dir / f".preflight-{uuid.uuid4().hex}"
    try:
        probe.write_text("")
        probe.unlink()
    except objects.errors(run_dir) as error:
        problem = f"cannot write to {run_dir}: {objects.reason(error)}"
    return {"devices": found, "code": _code(), "compute_seconds": _compute_seconds(), "problem": problem}


def _code(package: Path = _PACKAGE) -> str:
    """A checksum of the files of the code: a host may have an old copy of it, or one that a disk has damaged."""
    digest = hashlib.sha256()
    sources = {str(path.relative_to(package)): path for path in package.rglob("*.py")}
    if script := getattr(sys.modules["__main__"], "__file__", None):
        sources[""] = Path(script)
    for name in sorted(sources):
        with contextlib.suppress(OSError):  # one that is not there differs from one that is
            content = sources[name].read_bytes()
            digest.update(f"{name}\n{len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def _compute_seconds() -> float:
    """The fastest of five products of two matrices on this process's first device, which nobody else has a part in."""
    device = jax.local_devices()[0]
    size, dtype = (512, jnp.float32) if device.platform == "cpu" else (8192, jnp.bfloat16)
    matrix = jax.device_put(jnp.ones((size, size), dtype), device)
    product = jax.jit(lambda x: x @ x).lower(matrix).compile()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        jax.block_until_ready(product(matrix))
        times.append(time.perf_counter() - begin)
    return round(min(times), 6)


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def _roll_call(run_dir: epath.Path, limit: float) -> list[str]:
    """The nodes of all processes, when all are here."""
    client = distributed.coordination_client()
    if client is None:
        return [_node()]
    deadline = time.monotonic() + limit
    _say("here", _node())
    nodes: list[str] = []
    for process in range(distributed.place()[1]):
        left = max(1, int(1000 * (deadline - time.monotonic())))
        try:
            nodes.append(client.blocking_key_value_get(f"{_KEY}/here/{process}", left))
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise _given_up() from error
            _fail(run_dir, process, f"has joined the job but did not report within {limit:.0f} s", None)
    return nodes


def _exchange(mine: dict[str, Any]) -> list[dict[str, Any]]:
    """The reports of all processes, with their clocks read at about the same moment."""
    _tell_all("ready", "")
    return [json.loads(report) for report in _tell_all("reported", json.dumps(mine | {"clock": time.time()}))]


def _say(what: str, word: str) -> None:
    """Leave word for the others."""
    if (client := distributed.coordination_client()) is not None:
        client.key_value_set(f"{_KEY}/{what}/{distributed.place()[0]}", word, allow_overwrite=True)


def _tell_all(what: str, word: str) -> list[str]:
    """Leave word, and return that of every process once it is there."""
    client = distributed.coordination_client()
    if client is None:
        return [word]
    _say(what, word)
    try:  # `_give_up` ends the process before this waits too long
        return [client.blocking_key_value_get(f"{_KEY}/{what}/{one}", 10**9) for one in range(distributed.place()[1])]
    except Exception as error:
        raise _given_up() from error


def _given_up() -> ClusterError:
    """A peer that has found something wrong leaves, and takes the service with it: that is no news about anybody else."""
    return ClusterError("preflight: another process has given up; its log says why")


def _is_everywhere(count: int, processes: int) -> bool:
    """Whether so many of the processes have a problem that it is due to what they share, such as storage, or to anybody."""
    return count == processes > 1


def _worst(reports: list[dict[str, Any]]) -> tuple[int | None, str] | None:
    """The first process that is wrong or differs from most, and how; None if all are well, and for one that all share."""
    problems = [(process, str(report["problem"])) for process, report in enumerate(reports) if report["problem"]]
    if problems:
        process, problem = problems[0]
        return None if _is_everywhere(len(problems), len(reports)) else process, problem
    codes = [str(report["code"]) for report in reports]
    usual = statistics.mode(codes)
    for process, code in enumerate(codes):
        if code != usual:
            return process, f"runs other code than the others (checksums of the files: {code}, {usual})"
    middle = statistics.median(float(report["clock"]) for report in reports)
    for process, report in enumerate(reports):
        if (ahead := float(report["clock"]) - middle) > CLOCK_SECONDS or ahead < -CLOCK_SECONDS:
            return process, f"has a clock that is {abs(ahead):.0f} s {'ahead' if ahead > 0 else 'behind'}"
    return None


def _fail(run_dir: epath.Path, process: int | None, problem: str, nodes: list[str] | None) -> NoReturn:
    """Leave word of a problem, and of the process at fault if it is that of one, and end."""
    node = nodes[process] if process is not None and nodes is not None else None
    _note_blame(run_dir, process, node, problem)
    who = "each process" if process is None else f"process {process}{f' on {node}' if node else ''}"
    raise ClusterError(f"preflight failed: {who} {problem}")


def _note_blame(run_dir: epath.Path, process: int | None, node: str | None, problem: str) -> None:
    """Leave word of what is wrong: process 0 does, and the one at fault, or process 1 where that is process 0 or nobody.

    Whoever is first also writes the event: when process 0 leaves, jax ends the others, who may not come to it any more.
    """
    me, count = distributed.place()
    if me not in ((0, process) if process else (0, 1)):
        return
    reason = problem if process is not None else f"each process {problem}"
    first = me == (1 if process == 0 and count > 1 else 0)
    if "JASMINE_ATTEMPT" in os.environ:
        with contextlib.suppress(Exception):  # storage may be what is wrong, and must not hide what was found
            directory = run_dir / "attempts" / str(run_files.attempt())
            first = not (directory / "blame.json").exists()
            if directory.exists() and first:
                blame = {"host": process, "node": node, "reason": f"preflight: {reason}"}
                run_files.write_atomically(directory / "blame.json", json.dumps(blame).encode())
    if first:
        at_fault = {} if process is None else {"blamed": process, "node": node}
        _log_failure(run_dir, **at_fault, reason=reason)
    elif me == 0:
        time.sleep(1)  # the other one has its event still to write


def _log_failure(run_dir: epath.Path, **fields: Any) -> None:
    with contextlib.suppress(Exception):
        run_files.log_event(run_dir, "preflight_failed", **fields)
        objects.flush(10)


def _give_up(run_dir: epath.Path, nodes: list[str]) -> None:
    """End this process, after saying which one holds up the others: nothing else gets it out of a collective that hangs."""
    try:
        found = _culprit(len(nodes))
        if found is None:
            print("error: preflight failed: it hangs, and no process stands out", flush=True)
        else:
            process, problem = found
            print(f"error: preflight failed: process {process} on {nodes[process]} {problem}", flush=True)
            _note_blame(run_dir, process, nodes[process], problem)
    finally:
        os._exit(EXIT_FAILED)


def _culprit(count: int) -> tuple[int, str] | None:
    """The first process that is not as far as others, and how."""
    client = distributed.coordination_client()
    if client is None:
        return 0, "does not come through its preflight"
    _say("awake", "")
    time.sleep(AWAKE_SECONDS)

    def missing(what: str) -> set[int]:
        said = {int(key.rpartition("/")[2]) for key, _ in client.key_value_dir_get(f"{_KEY}/{what}")}
        return set(range(count)) - said

    for suspects, problem in (
        (missing("awake"), "is stopped, or cut off from the others"),
        (missing("ready"), "has not reported what it sees"),
        (missing("arrived"), "has not come to the all-reduce"),
        (missing("through"), "does not come out of the all-reduce"),
    ):
        if suspects and len(suspects) < count:
            return min(suspects), problem
    return None


def _all_reduce() -> tuple[int, float, bool]:
    """Bytes of each device's part, seconds of the fastest of three, and whether the sum is right."""
    devices = np.asarray(jax.devices())
    on_cpu = devices[0].platform == "cpu"
    length = 2**18 if on_cpu else 2**24
    mesh = Mesh(devices, ("all",))
    spread, everywhere = NamedSharding(mesh, PartitionSpec("all")), NamedSharding(mesh, PartitionSpec())
    shape = (devices.size, length)
    rows = np.arange(1, devices.size + 1, dtype=np.float32)[:, None]
    parts = jax.make_array_from_callback(shape, spread, lambda index: np.broadcast_to(rows, shape)[index])
    total = jax.jit(lambda x: x.sum(0), in_shardings=spread, out_shardings=everywhere).lower(parts).compile()
    _say("arrived", "")
    times = []
    for _ in range(4):  # the first makes the connections
        begin = time.perf_counter()
        result = jax.block_until_ready(total(parts))
        times.append(time.perf_counter() - begin)
    here = jnp.asarray(result.addressable_data(0))
    right = bool((here == devices.size * (devices.size + 1) / 2).all())
    return 4 * length, min(times[1:]), right
