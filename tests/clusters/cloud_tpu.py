"""A Cloud TPU on this machine: the API that the `google-cloud-tpu` client speaks, and VMs that are real processes.

The cloud is a process of its own, so that it outlives launchers that a test kills, and is told to misbehave at an admin
URL, so that any process can tell it. It ends, and leaves no process behind, when whoever started it ends in any way.

`python -m tests.clusters.cloud_tpu --folder FOLDER` prints the endpoint and serves until it is interrupted;
`curl -d '{"name": "my-run"}' ENDPOINT/admin/preempt` then preempts a resource: the verbs are the methods of `CloudTpu`.
"""

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Vm:
    """A VM of a resource: its address, its home directory, its startup script's output, how often it booted, is it on."""

    address: str
    disk: Path
    console: Path
    boots: int
    on: bool


class CloudTpu:
    """A cloud that answers at `api_endpoint`. `env` is what a launcher's shell has set.

    Resources go by their ids or full names; an id that exists in several zones means the latest. Workers are counted
    from 0 over all slices. Every resource goes through CREATING, ACCEPTED, WAITING_FOR_RESOURCES and PROVISIONING.
    """

    def __init__(self, api_endpoint: str, folder: Path) -> None:
        self.api_endpoint, self.folder = api_endpoint, folder
        self.env = {"JASMINE_CLOUD_TPU_ENDPOINT": api_endpoint}

    # --- what there is ---------------------------------------------------------------------------------------------

    def resources(self) -> dict[str, str]:
        """Return the states of all queued resources by their full names."""
        return self._admin("resources")

    def state(self, name: str) -> str | None:
        """Return a resource's state, None where there is none."""
        states = [state for full, state in self.resources().items() if name in (full, full.rpartition("/")[2])]
        return states[-1] if states else None

    def wait(self, name: str, *states: str | None, seconds: float = 120) -> None:
        """Wait until a resource is in one of `states`; None means that it is gone."""
        what = f"{name} to be {' or '.join(map(str, states))}"
        self.wait_until(lambda: self.state(name) in states, what, seconds)

    def wait_until(self, condition: Callable[[], object], what: str, seconds: float = 120) -> None:
        """Wait until `condition` holds; the complaint shows what all VMs printed."""
        deadline = time.monotonic() + seconds
        while not condition():
            consoles = {str(path): path.read_text()[-2000:] for path in self.folder.glob("vms/*/console.log")}
            logs = "\n".join(f"{path}:\n{text}" for path, text in consoles.items())
            assert time.monotonic() < deadline, f"waited for {what} in vain; there is {self.resources()}\n{logs}"
            time.sleep(0.05)

    def history(self, name: str) -> list[str]:
        """Return the states that a resource has been in, the present one last."""
        return self._admin("history", name=name)

    def vms(self, name: str) -> list[Vm]:
        """Return the VMs of a resource, [] where it has none. Their folders outlive them."""
        found = self._admin("vms", name=name)
        return [Vm(vm["address"], Path(vm["disk"]), Path(vm["console"]), vm["boots"], vm["on"]) for vm in found]

    def processes(self, name: str) -> list[int]:
        """Return the ids of all processes in a resource's VMs."""
        return self._admin("processes", name=name)

    @property
    def requests(self) -> list[dict[str, Any]]:
        """All requests to the API: method, path, query, body (text) and the status of the answer."""
        return self._admin("requests")

    # --- what goes wrong -------------------------------------------------------------------------------------------

    def no_capacity(self, zone: str, on: bool = True) -> None:
        """Keep the resources of a zone WAITING_FOR_RESOURCES until told otherwise."""
        self._admin("no_capacity", zone=zone, on=on)

    def hold(self, state: str, on: bool = True) -> None:
        """Keep all resources in a state before ACTIVE, or in DELETING, once they get there, until told otherwise."""
        self._admin("hold", state=state, on=on)

    def fail_provisioning(self, message: str, code: int = 8, count: int = 1) -> None:
        """Let the next resources FAIL instead of becoming ACTIVE, with this error; `code` is gRPC's."""
        self._admin("fail_provisioning", message=message, code=code, count=count)

    def preempt(self, name: str, grace: float | None = None) -> None:
        """Suspend an ACTIVE resource: its processes get SIGTERM, and SIGKILL after `grace` seconds (the cloud's if None).

        With a `grace` of 0 they are killed without notice.
        """
        self._admin("preempt", name=name, grace=grace)

    def reboot(self, name: str, worker: int) -> None:
        """Kill all processes of a VM and run its startup script again, on the same disk."""
        self._admin("reboot", name=name, worker=worker)

    def kill_vm(self, name: str, worker: int) -> None:
        """Switch a VM off for good; the resource stays ACTIVE, and its node is not healthy any more."""
        self._admin("kill_vm", name=name, worker=worker)

    def fail_next(self, status: int, count: int = 1, method: str | None = None) -> None:
        """Answer the next requests (those of an HTTP method, where it is named) with an error, and do nothing."""
        self._admin("fail_next", status=status, count=count, method=method)

    def lose_next_create(self, count: int = 1) -> None:
        """Do what the next creations ask, and close the connection without an answer."""
        self._admin("lose_next_create", count=count)

    def latency(self, seconds: float) -> None:
        """Let every answer of the API take that much longer."""
        self._admin("latency", seconds=seconds)

    def _admin(self, verb: str, **arguments: Any) -> Any:
        request = urllib.request.Request(f"{self.api_endpoint}/admin/{verb}", json.dumps(arguments).encode())
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)["result"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["error"]["message"]) from None


@contextlib.contextmanager
def running_cloud_tpu(
    folder: Path,
    bin_dir: Path | None = None,
    vm_env: Mapping[str, str] | None = None,
    seconds: float = 0.1,
    grace: float = 2.0,
) -> Iterator[CloudTpu]:
    """A cloud inside the `with` block; it and all its processes are gone after it.

    `bin_dir` comes first in the PATH of the VMs, and `vm_env` is added to their environments. A resource is `seconds`
    in every state that passes; a VM that is to shut down has `grace` seconds.
    """
    command = [sys.executable, "-m", "tests.clusters.cloud_tpu", "--folder", str(folder), "--until-stdin-ends"]
    command += ["--seconds", str(seconds), "--grace", str(grace), *(["--bin-dir", str(bin_dir)] if bin_dir else [])]
    for name, value in (vm_env or {}).items():
        command += ["--vm-env", f"{name}={value}"]
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "server.log"
    with log.open("ab") as errors:
        server = subprocess.Popen(
            command,
            cwd=_REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
    with server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            endpoint = server.stdout.readline().decode().strip()
            assert endpoint, f"the fake Cloud TPU does not start: {log.read_text()}"
            yield CloudTpu(endpoint, folder)
        finally:
            server.stdin.close()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
                raise
    assert server.returncode == 0, log.read_text()


def main() -> None:
    """Serve until interrupted, or until standard input ends."""
    parser = argparse.ArgumentParser(description="A fake Cloud TPU whose VMs are processes.")
    parser.add_argument("--folder", type=Path, required=True, help="where the disks of the VMs are")
    parser.add_argument("--port", type=int, default=0, help="0 means any free one")
    parser.add_argument("--bin-dir", type=Path, help="what comes first in the PATH of the VMs")
    parser.add_argument("--vm-env", action="append", default=[], metavar="NAME=VALUE", help="for the VMs' environments")
    parser.add_argument("--seconds", type=float, default=0.1, help="how long a resource is in a state that passes")
    parser.add_argument("--grace", type=float, default=2.0, help="seconds from SIGTERM to SIGKILL in a VM")
    parser.add_argument("--until-stdin-ends", action="store_true", help="end with standard input")
    arguments = parser.parse_args()

    # Here, because it loads the client library, which those who only ask do without.
    from tests.clusters.cloud_tpu_server import serving

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    vm_env = dict(pair.split("=", 1) for pair in arguments.vm_env)
    options = {name: getattr(arguments, name) for name in ("bin_dir", "seconds", "grace")}
    with serving(arguments.folder.resolve(), arguments.port, vm_env=vm_env, **options) as endpoint:
        print(endpoint, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            if arguments.until_stdin_ends:
                sys.stdin.buffer.read()
            else:
                signal.pause()


if __name__ == "__main__":
    main()
