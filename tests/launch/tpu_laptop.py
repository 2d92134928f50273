"""A laptop from which tests submit to the fake Cloud TPU, and what they ask of the runs there."""

import contextlib
import json
import os
import signal
from collections.abc import Iterator

import pytest

from launch.backends.cloud_tpu import read_resource, watched_by
from tests.clusters.cloud_tpu import CloudTpu
from tests.launch.checkouts import Checkout, wait_until
from tests.launch.tpus import CLUSTER


@contextlib.contextmanager
def laptop(checkout: Checkout, cloud_tpu: CloudTpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make a checkout one in which `tpu.yaml` is the cluster, and whose shell reaches the API; end its runs in the end."""
    (checkout.home / "tpu.yaml").write_text(CLUSTER)
    for name, value in (cloud_tpu.env | {"JASMINE_WATCH_SECONDS": "0.3"}).items():
        checkout.env[name] = value
        monkeypatch.setenv(name, value)
    yield
    for directory in (checkout.home / "runs").glob("*"):
        run = checkout.directory(directory.name)
        run.cancel_request.touch()
        wait_until(lambda run=run: watched_by(run) is None, 180)  # type: ignore[misc]


def submit(here: Checkout, *arguments: str, name: str = "r") -> str:
    """Submit to the TPU, and return what the command printed."""
    return here.submit(*arguments, name=name, cluster="tpu.yaml").stdout


def resource(here: Checkout, name: str = "r") -> str:
    rented = read_resource(here.directory(name))
    assert rented is not None
    return rented.id


def creations(cloud: CloudTpu) -> list[str]:
    """The ids of all resources whose creation was asked for, refused or not."""
    posts = [one for one in cloud.requests if one["method"] == "POST" and one["path"].endswith("/queuedResources")]
    return [one["query"]["queuedResourceId"] for one in posts]


def end_watcher(here: Checkout, name: str = "r") -> None:
    """Kill the run's watcher, as when a laptop is closed."""
    run = here.directory(name)
    wait_until(lambda: watched_by(run) is not None)
    watcher = watched_by(run)
    assert watcher is not None
    os.kill(watcher["pid"], signal.SIGKILL)
    wait_until(lambda: watched_by(run) is None)


def events(here: Checkout) -> list[str]:
    """The run's events, without what becomes of single processes; "replaced": it goes on on another TPU."""
    found = [event for event in here.directory().events() if event["event"] not in ("host_exited", "killed")]
    return ["replaced" if one["event"] == "restarted" and "resource" in one else one["event"] for one in found]


def at_step(here: Checkout, step: int, *, attempt: int = 1, host: int = 0, name: str = "r") -> None:
    log = here.directory(name).log(attempt, host)
    wait_until(lambda: log.exists() and f"step {step}\n" in log.read_text(), 180)


def steps_in(here: Checkout, attempt: int, host: int = 0) -> None:
    """Wait until a process has finished a step in an attempt, whatever its number."""
    log = here.directory().log(attempt, host)
    wait_until(lambda: log.exists() and "\nstep " in log.read_text(), 180)


def steps(here: Checkout, name: str = "r") -> list[int]:
    return [json.loads(line)["step"] for line in here.directory(name).metrics.read_text().splitlines()]
