"""The agent of a TPU VM: starts the VM's process of each attempt, and tells the others that the VM lives.

All that the VMs of a run tell each other goes through the run directory, because nothing else is common to them:

- `cloud_tpu/<resource>/vm-<i>.json`: VM i lives. It holds the agent's start (a VM that was rebooted has a new one) and
  whether the VM is going down; it changes every few seconds.
- `attempts/<k>/go.json`: start attempt k, written by the supervisor, which is a process of its own beside the agent of VM 0
  (`launch.backends.cloud_tpu_supervisor`). It names the starts that it is for, so that a VM that has been rebooted in the
  meantime does not join an attempt that has lost it already.
- `cloud_tpu/<resource>/over.json`: there is nothing more to do for these VMs.

VMs without work cost as much as those with it, so no agent ends before its VM does. Once all is over, that of VM 0 deletes
the resource; as long as it can ask for that, the resource is not gone. If VM 0 stays silent, the first VM that lives deletes
it, and where an agent dies, the startup script does (`cloud_tpu_startup.sh`).
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from base64 import b64decode
from pathlib import Path

if __name__ == "__main__":
    # As a script, Python puts this file's directory first; what it imports starts two levels up.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from launch.backends.cloud_tpu_api import NoAnswerError, Tpus
from launch.config import CloudTpuCluster
from launch.objects import be_patient, is_object
from launch.plan import Plan
from launch.record import read_record
from launch.run_dir import RunDir, read_json, write_atomically
from launch.shipping import log_here
from launch.watchdog import Silence
from launch.worker import LEAVE_SIGNALS

POLL_SECONDS, BEAT_SECONDS = 0.5, 2.0
# In Cloud Storage, where every look and every beat is paid for.
OBJECT_POLL_SECONDS, OBJECT_BEAT_SECONDS = 2.0, 5.0
# A supervisor that ends is started again, but not more often than this.
SUPERVISOR_SECONDS = 5.0
# One that has lived for so long does supervise. Where none does for half an hour (the run's directory has been deleted, or
# what is in it cannot be read), the TPU is of no use.
SETTLED_SECONDS, UNSUPERVISED_SECONDS = 60.0, 1800.0
# How often the API is asked to take the TPU back, until it has.
GIVE_BACK_SECONDS = 5.0
METADATA_SECONDS = 300.0
# How many times `silent_timeout` VM 0 may say nothing before another VM gives the TPU back.
ORPHAN_FACTOR = 5
SECRETS = "https://secretmanager.googleapis.com"


def main() -> int:
    """Serve until this VM is switched off; return 1 if the TPU is to be given back."""
    signal.pthread_sigmask(signal.SIG_BLOCK, LEAVE_SIGNALS | {signal.SIGCHLD})
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run_dir", type=RunDir.at, required=True)
    parser.add_argument("--resource", required=True, help="the id of the queued resource that this VM belongs to")
    parser.add_argument("--vm_dir", type=Path, required=True)
    options = parser.parse_args()
    be_patient()
    run: RunDir = options.run_dir
    record = read_record(run)
    if record is None or not record.submissions:
        print(f"{run.root}: no submission is recorded here any more", flush=True)
        return 1
    return _Agent(run, record.submissions[-1].plan, options.resource, options.vm_dir).serve()


class _Agent:
    def __init__(self, run: RunDir, plan: Plan, resource: str, vm_dir: Path) -> None:
        self.run, self.plan, self.resource, self.vm_dir = run, plan, resource, vm_dir
        self.settings = CloudTpuCluster.model_validate(plan.settings)
        self.index = vm_number(self.settings)
        self.start = uuid.uuid4().hex
        self.going_down = False
        on_disk = not is_object(run.root)
        self.poll_seconds = POLL_SECONDS if on_disk else OBJECT_POLL_SECONDS
        self.beat_seconds = BEAT_SECONDS if on_disk else OBJECT_BEAT_SECONDS
        self.done = 0  # the newest attempt that this agent has taken part in
        self.worker: subprocess.Popen[bytes] | None = None
        self.supervisor: subprocess.Popen[bytes] | None = None
        self.over = False
        self._beat_at = self._give_back_at = 0.0
        self._supervisor_at = -SUPERVISOR_SECONDS  # when the last one was started
        self._supervised_at = time.monotonic()
        self._vm0 = Silence()

    def serve(self) -> int:
        run_file = self.run.tpu_vm(self.resource, self.index)
        run_file.parent.mkdir(parents=True, exist_ok=True)
        while not (self.over and self.going_down):  # then it only delays the end of its VM
            going_down = self._wait()
            try:
                self._look(going_down)
            except OSError as error:  # storage that is away for a while: this VM is still there
                print(f"{time.strftime('%H:%M:%S')} {error}", flush=True)
        return 1

    def _look(self, going_down: bool) -> None:
        """Do what there is to do now."""
        if going_down and not self.going_down:
            self.going_down = True
            self._beat_at = 0.0
            if self.worker is not None:
                self.worker.send_signal(signal.SIGTERM)
        self._beat()
        if self.worker is not None and self.worker.poll() is not None:
            self.worker = None
        if not self.over:
            self._serve_the_run()
        if self.over and self.index == 0 and time.monotonic() > self._give_back_at:
            self._give_back()
        elif self.index > 0:
            self._give_back_if_orphaned()

    def _serve_the_run(self) -> None:
        if self.supervisor is not None and self.supervisor.poll() == 0:
            self.over = True  # whatever the worker does: it may not be possible to kill it
        elif self.worker is None:
            self.over = self.run.tpu_over(self.resource).exists() or self._is_replaced()
        if self.over:
            return
        if self.worker is None and not self.going_down:
            self._start_if_asked()
        if self.index == 0:
            self._keep_supervisor()

    def _is_replaced(self) -> bool:
        """Return whether the run goes on on another resource."""
        resource = read_json(self.run.tpu_resource)
        return resource is not None and resource.get("id", self.resource) != self.resource

    def _beat(self) -> None:
        if time.monotonic() < self._beat_at:
            return
        self._beat_at = time.monotonic() + self.beat_seconds
        beat = {"start": self.start, "time": time.time(), "going_down": self.going_down, "host": os.uname().nodename}
        with contextlib.suppress(OSError):  # storage that is away for a moment
            write_atomically(self.run.tpu_vm(self.resource, self.index), json.dumps(beat))

    def _wait(self) -> bool:
        """Wait for a child's end, or a moment; return whether this VM is going down."""
        received = signal.sigtimedwait(LEAVE_SIGNALS | {signal.SIGCHLD}, self.poll_seconds)
        if received is not None and received.si_signo != signal.SIGCHLD:
            return True
        return self.settings.provisioning == "spot" and metadata("preempted", "FALSE", timeout=0.5) == "TRUE"

    def _start_if_asked(self) -> None:
        newest = self.run.newest_attempt()
        go = read_json(self.run.go_file(newest)) if newest > self.done else None
        if go is None or go["resource"] != self.resource:
            return
        self.done = newest
        if go["starts"].get(str(self.index)) == self.start:
            self.worker = self._start_worker(newest)

    def _start_worker(self, attempt: int) -> "subprocess.Popen[bytes]":
        """Start this VM's process of an attempt. The plan's code directory is in the run directory; here it is a copy."""
        here = self.vm_dir / "code" / self.plan.code.hash
        plan = self.plan.with_code_in(here)
        environment = dict(plan.env)
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [environment["PYTHONPATH"], os.environ.get("PYTHONPATH")])
        )
        environment["JASMINE_COMPILATION_CACHE_DIR"] = os.path.expanduser(environment["JASMINE_COMPILATION_CACHE_DIR"])
        options = ["--host", str(self.index), "--cwd", str(here), "--parent_pid", str(os.getpid())]
        options += ["--grace_seconds", str(self.settings.grace_seconds)]
        return subprocess.Popen(
            [sys.executable, f"{here}/launch/worker.py", *options, "--", sys.executable, *plan.argv[1:]],
            env={
                **os.environ,  # nothing but the VM's own: no other job started this
                **environment,
                **self._secrets(),
                "JASMINE_ATTEMPT": str(attempt),
                "JASMINE_HOST": str(self.index),
            },
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _secrets(self) -> dict[str, str]:
        """Return the values of the run's secrets; one that cannot be had is left out, and the job says what it misses."""
        values = {}
        for name, source in self.settings.secrets.items():
            try:
                values[name] = Path(source).read_text().strip() if source.startswith("/") else read_secret(source)
            except (OSError, urllib.error.URLError, ValueError) as error:
                print(f"secrets: {name}: {source}: {error}", flush=True)
        return values

    def _keep_supervisor(self) -> None:
        now = time.monotonic()
        lives = self.supervisor is not None and self.supervisor.poll() is None
        if lives and now - self._supervisor_at > SETTLED_SECONDS:
            self._supervised_at = now
        if now - self._supervised_at > UNSUPERVISED_SECONDS:
            sys.exit(f"no supervisor stays alive, see {self.run.supervisor_log}: giving the TPU back")
        if not lives and now - self._supervisor_at > SUPERVISOR_SECONDS:
            self._supervisor_at = now
            script = Path(__file__).with_name("cloud_tpu_supervisor.py")
            command = [sys.executable, str(script), "--run_dir", str(self.run.root), "--resource", self.resource]
            with log_here(self.run.supervisor_log).open("ab") as log:
                self.supervisor = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _give_back_if_orphaned(self) -> None:
        beat = self.run.tpu_vm(self.resource, 0)
        seen = beat.read_text() if beat.exists() else None
        patience = (ORPHAN_FACTOR + self.index) * self.settings.silent_timeout  # not all of them at once
        if seen is None:  # it has yet to boot
            patience += self.settings.boot_timeout
        if self._vm0.seconds(seen) > patience:
            print(f"VM 0 has been silent for {patience} s: giving the TPU back", flush=True)
            self._vm0 = Silence()
            self._give_back()

    def _give_back(self) -> None:
        """Ask for the resource to be deleted, and with it this VM."""
        try:
            # In a zone that is not the right one, or none, there would be no such resource.
            if zone := metadata("zone", "").rpartition("/")[2]:
                Tpus(self.settings.project).delete(zone, self.resource)
        except NoAnswerError as error:
            print(f"cannot give the TPU back: {error}; trying again", flush=True)
        self._give_back_at = time.monotonic() + GIVE_BACK_SECONDS


def vm_number(settings: CloudTpuCluster) -> int:
    """Return which of the run's VMs this is, from 0, in the order of jax's processes.

    Raises:
        OSError: the metadata server does not say.
    """
    deadline = time.monotonic() + METADATA_SECONDS
    while not (number := metadata("attributes/agent-worker-number", "")):  # a guess could make two VMs supervise
        if time.monotonic() > deadline:
            raise OSError(f"the metadata server has not told this VM's number for {METADATA_SECONDS:.0f} s")
        time.sleep(1)
    worker, slice_id = int(number), 0
    for line in metadata("attributes/tpu-env", "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "MEGASCALE_SLICE_ID":
            slice_id = int(value.strip().strip("'"))
    return slice_id * settings.tpu.hosts + worker


def metadata(path: str, default: str, timeout: float = 5.0) -> str:
    """Return what the metadata server says of this VM; `default` where it does not."""
    server = os.environ.get("GCE_METADATA_IP") or os.environ.get("GCE_METADATA_HOST") or "metadata.google.internal"
    url = f"http://{server}/computeMetadata/v1/instance/{path}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return str(answer.read().decode())
    except (OSError, ValueError):
        return default


def read_secret(name: str) -> str:
    """Return the value of a secret, `projects/P/secrets/NAME` with or without `/versions/V`, from Secret Manager."""
    token = json.loads(metadata("service-accounts/default/token", "{}")).get("access_token", "")
    version = name if "/versions/" in name else f"{name}/versions/latest"
    endpoint = os.environ.get("JASMINE_SECRET_MANAGER_ENDPOINT", SECRETS)
    request = urllib.request.Request(f"{endpoint}/v1/{version}:access", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return b64decode(json.load(answer)["payload"]["data"]).decode()


if __name__ == "__main__":
    sys.exit(main())
