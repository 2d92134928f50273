"""Checks the machines of an attempt before it trains: `JASMINE_PREFLIGHT` is the seconds it may take; unset, no check.

Every process reports what it sees (devices, clock, code, storage) through jax's coordination service, which needs no
device, so one that is missing or different is named before any collective could hang on it. Then an all-reduce over all
devices has to give the right number within the time; its bandwidth goes into each process's log. The process at fault
is left in `attempts/<k>/blame.json` for the launcher, which keeps the next attempt away from its machine.
"""

import json
import os
import statistics
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jasmine.errors import EXIT_FAILED, ClusterError
from jasmine.training import distributed, run_files

CLOCK_SECONDS = 30.0
_KEY = "jasmine/preflight"


def preflight(run_dir: epath.Path) -> None:
    """Checks all processes; call it on each of them after they have met.

    Raises:
        ClusterError: something is wrong with a machine; names the process and its node.
    """
    limit = float(os.environ.get("JASMINE_PREFLIGHT", "0"))
    if limit <= 0:
        return
    deadline = time.monotonic() + limit
    mine = _report(run_dir)
    reports = _exchange(run_dir, mine, deadline)
    if problem := _worst(reports):
        _fail(run_dir, *problem, reports)
    slow = threading.Timer(max(1.0, deadline - time.monotonic()), _too_slow, (run_dir, limit, mine))
    slow.daemon = True
    slow.start()
    size, seconds, right = _all_reduce()
    slow.cancel()
    if not right:
        _fail(run_dir, jax.process_index(), "an all-reduce over all devices gave a wrong number", reports)
    count = jax.device_count()
    moved = 2 * (count - 1) / count * size / seconds if count > 1 else 0.0
    speed = f", {moved / 1e9:,.2f} GB/s" if moved else ""
    print(
        f"preflight passed on {mine['node']}: {mine['devices']} device(s), all-reduce of {size / 2**20:.0f} MiB over "
        f"{count} devices in {1000 * seconds:.1f} ms{speed}",
        flush=True,
    )
    if jax.process_index() == 0:
        fields = {"processes": len(reports), "all_reduce_seconds": seconds, "bytes": size, "bytes_per_second": moved}
        run_files.log_event(run_dir, "preflight", **fields)


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
    except OSError as error:
        problem = f"cannot write to {run_dir}: {error.strerror or error}"
    node = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
    code = Path(__file__).resolve().parents[2].name
    return {"node": node, "devices": found, "code": code, "problem": problem}


def _exchange(run_dir: epath.Path, mine: dict[str, Any], deadline: float) -> list[dict[str, Any]]:
    """The reports of all processes, with their clocks read at about the same moment."""
    if jax.process_count() == 1:
        return [mine | {"clock": 0.0}]
    client = distributed.coordination_client()
    index, count = jax.process_index(), jax.process_count()
    client.key_value_set(f"{_KEY}/here/{index}", mine["node"], allow_overwrite=True)
    nodes = []
    for process in range(count):
        try:
            nodes.append(client.blocking_key_value_get(f"{_KEY}/here/{process}", _milliseconds(deadline)))
        except Exception as error:
            _raise_unless_late(error)
            _fail(run_dir, process, "has joined the job but did not report in time", [{"node": "?"}] * count, error)
    client.key_value_set(f"{_KEY}/{index}", json.dumps(mine | {"clock": time.time()}), allow_overwrite=True)
    reports = []
    for process in range(count):
        try:
            reports.append(json.loads(client.blocking_key_value_get(f"{_KEY}/{process}", _milliseconds(deadline))))
        except Exception as error:
            _raise_unless_late(error)
            _fail(run_dir, process, "did not report in time", [{"node": node} for node in nodes], error)
    return reports


def _raise_unless_late(error: Exception) -> None:
    """A peer that has found something wrong leaves, and takes the service with it: that is no news about anybody else."""
    if "DEADLINE_EXCEEDED" not in str(error):
        raise ClusterError("preflight: another process has given up; its log says why") from error


def _milliseconds(deadline: float) -> int:
    return max(1, int(1000 * (deadline - time.monotonic())))


def _worst(reports: list[dict[str, Any]]) -> tuple[int, str] | None:
    """The first process that is wrong or differs from most, and how; None if all are well."""
    for process, report in enumerate(reports):
        if report["problem"]:
            return process, str(report["problem"])
    codes = [str(report["code"]) for report in reports]
    usual = statistics.mode(codes)
    for process, code in enumerate(codes):
        if code != usual:
            return process, f"runs the code {code}, the others {usual}"
    middle = statistics.median(float(report["clock"]) for report in reports)
    for process, report in enumerate(reports):
        if (ahead := float(report["clock"]) - middle) > CLOCK_SECONDS or ahead < -CLOCK_SECONDS:
            return process, f"has a clock that is {abs(ahead):.0f} s {'ahead' if ahead > 0 else 'behind'}"
    return None


def _fail(
    run_dir: epath.Path, process: int, problem: str, reports: list[dict[str, Any]], cause: Exception | None = None
) -> None:
    node = reports[process]["node"]
    blame = {"host": process, "node": None if node == "?" else node, "reason": f"preflight: {problem}"}
    if jax.process_index() in (0, process) and "JASMINE_ATTEMPT" in os.environ and "://" not in str(run_dir):
        directory = run_dir / "attempts" / str(run_files.attempt())
        if directory.exists() and not (directory / "blame.json").exists():
            run_files.write_atomically(directory / "blame.json", json.dumps(blame).encode())
    if jax.process_index() == 0:
        run_files.log_event(run_dir, "preflight_failed", blamed=process, node=node, reason=problem)
    raise ClusterError(f"preflight failed: process {process} on {node} {problem}") from cause


def _too_slow(run_dir: epath.Path, limit: float, mine: dict[str, Any]) -> None:
    print(
        f"error: preflight failed: no all-reduce over all devices within {limit:.0f} s (on {mine['node']})", flush=True
    )
    if jax.process_index() == 0:
        run_files.log_event(run_dir, "preflight_failed", blamed=None, node=None, reason="the all-reduce hangs")
    os._exit(EXIT_FAILED)


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
    total = jax.jit(lambda x: x.sum(0), in_shardings=spread, out_shardings=everywhere)
    times = []
    for _ in range(4):  # the first compiles
        begin = time.perf_counter()
        result = jax.block_until_ready(total(parts))
        times.append(time.perf_counter() - begin)
    here = jnp.asarray(result.addressable_data(0))
    right = bool((here == devices.size * (devices.size + 1) / 2).all())
    return 4 * length, min(times[1:]), right
