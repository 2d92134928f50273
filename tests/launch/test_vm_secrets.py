"""A VM reads a secret from Secret Manager with its own token, at the address and in the format of that API."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from launch.backends.cloud_tpu_vm import read_secret

ANSWERS = {
    "/computeMetadata/v1/instance/service-accounts/default/token": {"access_token": "t0ken", "expires_in": 3000},
    "/v1/projects/lab/secrets/wandb/versions/latest:access": {
        "payload": {"data": base64.b64encode(b"hunter2").decode()}
    },
    "/v1/projects/lab/secrets/wandb/versions/3:access": {"payload": {"data": base64.b64encode(b"hunter3").decode()}},
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        allowed = self.headers["Metadata-Flavor"] == "Google" or self.headers["Authorization"] == "Bearer t0ken"
        self.send_response(200 if allowed and self.path in ANSWERS else 403)
        self.end_headers()
        self.wfile.write(json.dumps(ANSWERS.get(self.path, {})).encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        monkeypatch.setenv("JASMINE_SECRET_MANAGER_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield
        server.shutdown()


def test_the_newest_version_is_read_unless_one_is_named(google: None) -> None:
    assert read_secret("projects/lab/secrets/wandb") == "hunter2"
    assert read_secret("projects/lab/secrets/wandb/versions/3") == "hunter3"
    with pytest.raises(OSError, match="403"):
        read_secret("projects/lab/secrets/other")
