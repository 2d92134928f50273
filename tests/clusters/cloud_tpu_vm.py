"""The VMs of the fake Cloud TPU: each is a tree of real processes, a disk, and a metadata server at an address of its own.

A VM's first process adopts the orphans of everything below it, so that what a startup script leaves behind, in other
sessions too, belongs to the VM and dies with it. It is told to switch off by the end of its standard input: whoever
holds the other end may be killed in any way, and no process stays behind.

What makes a process in a VM believe that it is on a TPU is in the VM's environment, and nothing else is: the address of
the metadata server, a file where libtpu would be, and a `sitecustomize` that shows TPU chips where Python looks for PCI
devices. A script that replaces PYTHONPATH loses the chips. What no environment can show is that a device belongs to a
slice: JAX's CPU backend says 0 for all, and only process indices tell slices apart.

This file is also the program of the first process. It needs the standard library only.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SET_CHILD_SUBREAPER = 36  # of prctl(2)

_SITECUSTOMIZE = """\
import glob, os
_glob, _chips = glob.glob, os.path.join(os.path.dirname(os.path.abspath(__file__)), "pci", "")
def _see_chips(pathname, *args, **kwargs):
    if isinstance(pathname, str) and pathname.startswith("/sys/bus/pci/devices/"):
        pathname = _chips + pathname.removeprefix("/sys/bus/pci/devices/")
    return _glob(pathname, *args, **kwargs)
glob.glob = _see_chips
"""


class Vm:
    """A machine with `chips` TPU chips.

    `metadata` is what its metadata server shows, as nested dicts; who changes it changes what the VM reads. The folder
    holds `disk` (home directory, kept over reboots), `machine` (what the VM finds as hardware) and `console.log` (the
    output of the startup script, of all boots).
    """

    def __init__(
        self,
        folder: Path,
        address: tuple[str, int],
        chips: int,
        pci_id: str,
        metadata: dict[str, Any],
        env: Mapping[str, str],
        bin_dir: Path | None,
    ) -> None:
        self.folder, self.disk, self.console = folder, folder / "disk", folder / "console.log"
        self.address, self.metadata, self.boots = address[0], metadata, 0
        machine = folder / "machine"
        (self.disk / "tmp").mkdir(parents=True)
        for chip in range(chips):
            device = machine / "pci" / f"0000:00:{chip + 4:02x}.0"
            device.mkdir(parents=True)
            (device / "vendor").write_text("0x1ae0\n")
            (device / "device").write_text(f"{pci_id}\n")
        (machine / "sitecustomize.py").write_text(_SITECUSTOMIZE)
        (machine / "libtpu.so").touch()
        server = f"{address[0]}:{address[1]}"
        self._env = {
            "PATH": f"{bin_dir}:{SYSTEM_PATH}" if bin_dir else SYSTEM_PATH,
            "HOME": str(self.disk),
            "TMPDIR": str(self.disk / "tmp"),
            "GCE_METADATA_HOST": server,
            "GCE_METADATA_IP": server,
            "TPU_LIBRARY_PATH": str(machine / "libtpu.so"),
            "PYTHONPATH": str(machine),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(chips),
            **env,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._server = _MetadataServer(address, _MetadataHandler)
        self._server.metadata = metadata
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def boot(self) -> None:
        """Switch the VM on: its startup script runs, as it stands in the metadata now."""
        script = self.folder / "machine" / "startup-script"
        script.write_text(self.metadata["instance"]["attributes"].get("startup-script", ""))
        self.boots += 1
        with self.console.open("ab") as console:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, str(script)],
                stdin=subprocess.PIPE, stdout=console, stderr=console,
                cwd=self.disk, env=self._env, start_new_session=True,
            )  # fmt: skip

    def press_power_button(self) -> None:
        """Send what ACPI sends before a shutdown: SIGTERM to every process of the VM."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)

    def power_off(self) -> None:
        """End all processes at once, and wait until they are gone. The disk stays."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()
            self._process = None

    def remove(self) -> None:
        """Switch the VM off for good. Its folder stays, for those who want to know what it did."""
        self.power_off()
        self._server.shutdown()
        self._server.server_close()

    def is_on(self) -> bool:
        """Return whether the VM is switched on."""
        return self._process is not None and self._process.poll() is None

    def processes(self) -> list[int]:
        """Return the ids of the processes that run in the VM."""
        return [] if self._process is None else descendants(self._process.pid)


def descendants(root: int) -> list[int]:
    """Return the ids of all living processes below `root`."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(stat.parent.name))
    found, rest = [], [root]
    while rest:
        below = children.get(rest.pop(), [])
        found += below
        rest += below
    return found


class _MetadataServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    metadata: dict[str, Any]


class _MetadataHandler(BaseHTTPRequestHandler):
    """What Compute Engine's metadata server answers, as far as google-auth, JAX and curl ask."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _MetadataServer

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        if self.headers.get("Metadata-Flavor") != "Google":
            return self._answer(403, "Missing Metadata-Flavor:Google header.\n")
        path = urllib.parse.unquote(url.path).strip("/")
        if not path:
            return self._answer(200, "computeMetadata/\n")
        value = self._find(path)
        if query.get("wait_for_change") == "true":
            deadline = time.monotonic() + float(query.get("timeout_sec", 3600))
            while self._find(path) == value and time.monotonic() < deadline:
                time.sleep(0.05)
            value = self._find(path)
        if value is None:
            return self._answer(404, "not found\n")
        if isinstance(value, dict) and query.get("recursive") == "true":
            return self._answer(200, json.dumps(_camel_case(value)), "application/json")
        if isinstance(value, dict) and "access_token" in value:
            return self._answer(200, json.dumps(value), "application/json")
        if isinstance(value, dict):
            listing = (f"{key}/\n" if isinstance(below, dict) else f"{key}\n" for key, below in value.items())
            return self._answer(200, "".join(listing))
        return self._answer(200, "\n".join(value) if isinstance(value, list) else value)

    def _find(self, path: str) -> Any:
        value: Any = {"computeMetadata": {"v1": self.server.metadata}}
        for part in path.split("/"):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def _answer(self, status: int, text: str, kind: str = "application/text") -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Metadata-Flavor", "Google")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def _camel_case(value: Any) -> Any:
    """Return metadata as a recursive query shows it: without tokens, and only names that users give keep their dashes."""
    if not isinstance(value, dict):
        return value
    return {
        key if "@" in key else re.sub("-([a-z])", lambda match: match[1].upper(), key): (
            below if key == "attributes" else _camel_case(below)
        )
        for key, below in value.items()
        if key != "token"
    }


# --- the first process of a VM ---------------------------------------------------------------------------------------


def _kill(pids: Callable[[], list[int]], signum: signal.Signals) -> None:
    for pid in pids():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


def _reap() -> None:
    """Collect the ended until no process is left below this one; then there is nothing that could start another."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def _first_process(script: str) -> None:
    """Run a startup script, adopt what it leaves behind, and end everything when standard input ends."""

    def below() -> list[int]:
        return descendants(os.getpid())

    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: _kill(below, signal.SIGTERM))
    nothing = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
    os.posix_spawnp("bash", ["bash", script], os.environ, file_actions=nothing, setsid=True)
    threading.Thread(target=_reap, daemon=True).start()
    sys.stdin.buffer.read()
    while below():
        _kill(below, signal.SIGKILL)
        time.sleep(0.005)


if __name__ == "__main__":
    _first_process(sys.argv[1])
