"""Google Cloud Storage on this machine, for unmodified clients: gcsfs and epath, google-cloud-storage, tensorstore.

The storage is a process of its own, so that it can be killed and come back; it is told to misbehave at an admin URL, so that
any process can tell it. It ends when whoever started it ends in any way.

`python -m tests.clusters.gcs --folder FOLDER` prints the URL and serves until it is interrupted.
"""

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_REPOSITORY = Path(__file__).resolve().parents[2]
BUCKET = "bucket"


class Gcs:
    """A storage that answers at `url`, with the empty bucket `BUCKET`. `env` is what points every client at it; what every
    process of ours sets for itself is not in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._server: subprocess.Popen[bytes] | None = None
        self.url = ""
        self.start()
        self.env = {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "FSSPEC_GCS_TOKEN": "anon",
            "NO_GCE_CHECK": "true",
        }

    @property
    def root(self) -> str:
        """The URL of the bucket."""
        return f"gs://{BUCKET}"

    def start(self) -> None:
        """Serve; after `kill` with the objects and at the port of before."""
        port = self.url.rpartition(":")[2] or "0"
        command = [sys.executable, "-m", "tests.clusters.gcs", "--folder", str(self.folder), "--port", port]
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / "server.log"
        with log.open("ab") as errors:
            self._server = subprocess.Popen(
                [*command, "--until-stdin-ends"],
                cwd=_REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        assert self._server.stdout is not None
        self.url = self._server.stdout.readline().decode().strip()
        assert self.url, f"the fake Cloud Storage does not start: {log.read_text()}"

    def kill(self) -> None:
        """Kill the server. What it had acknowledged is kept; uploads that were under way are not."""
        assert self._server is not None
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.kill()
        self._server.wait()
        self._server.stdin.close()
        self._server.stdout.close()
        self._server = None

    def stop(self) -> None:
        """End the server, if it runs."""
        if self._server is not None:
            self.kill()

    # --- what there is ---------------------------------------------------------------------------------------------

    def objects(self, prefix: str = "") -> dict[str, int]:
        """Return the sizes of the bucket's objects whose names begin with `prefix`."""
        found = {name.removeprefix(f"{BUCKET}/"): size for name, size in self._admin("objects").items()}
        return {name: size for name, size in found.items() if name.startswith(prefix)}

    @property
    def requests(self) -> list[dict[str, Any]]:
        """All requests since the last start: method, path, query and the status of the answer."""
        return self._admin("requests")

    # --- what goes wrong -------------------------------------------------------------------------------------------

    def fail_next(self, status: int, count: int = 1, method: str | None = None, contains: str = "") -> None:
        """Answer the next requests (of a method, to URLs that have `contains` in them) with an error, and do nothing."""
        self._admin("fault", kind="status", value=status, count=count, method=method, contains=contains)

    def lose_next(self, count: int = 1, method: str | None = None, contains: str = "") -> None:
        """Do what the next requests ask, and close the connection without an answer."""
        self._admin("fault", kind="lose", count=count, method=method, contains=contains)

    def break_bodies(self, count: int = 1, contains: str = "") -> None:
        """Close the connection in the middle of the next contents that are read."""
        self._admin("fault", kind="break", count=count, contains=contains)

    def slow_bodies(self, bytes_per_second: int, count: int = 1, contains: str = "") -> None:
        """Send the next contents that are read slowly."""
        self._admin("fault", kind="slow", value=bytes_per_second, count=count, contains=contains)

    def latency(self, seconds: float) -> None:
        """Let every answer take that much longer."""
        self._admin("latency", seconds=seconds)

    def limit_writes(self, seconds: float) -> None:
        """Answer 429 to whoever writes to one object a second time within so many seconds."""
        self._admin("write_seconds", seconds=seconds)

    def soft_delete(self, seconds: int) -> None:
        """Let the bucket say that it keeps for so long what is deleted or overwritten (0: that it does not)."""
        self._admin("soft_delete", seconds=seconds)

    def heal(self) -> None:
        """Let nothing go wrong any more."""
        self._admin("heal")

    def _admin(self, verb: str, **arguments: Any) -> Any:
        request = urllib.request.Request(f"{self.url}/admin/{verb}", json.dumps(arguments).encode())
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["result"]


@contextlib.contextmanager
def running_gcs(folder: Path) -> Iterator[Gcs]:
    """A storage inside the `with` block, whose objects lie in `folder`."""
    storage = Gcs(folder)
    try:
        yield storage
    finally:
        storage.stop()


def main() -> None:
    """Serve until interrupted, or until standard input ends."""
    parser = argparse.ArgumentParser(description="A fake Google Cloud Storage.")
    parser.add_argument("--folder", type=Path, required=True, help="where the objects are")
    parser.add_argument("--port", type=int, default=0, help="0 means any free one")
    parser.add_argument("--until-stdin-ends", action="store_true", help="end with standard input")
    arguments = parser.parse_args()

    from tests.clusters.gcs_server import serving  # here, because those who only ask do without

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with serving(arguments.folder.resolve() / "objects", arguments.port, [BUCKET]) as url:
        print(url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            if arguments.until_stdin_ends:
                sys.stdin.buffer.read()
            else:
                signal.pause()


if __name__ == "__main__":
    main()
