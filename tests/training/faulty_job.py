"""A baseline (FAULT_JOB; the tokenizer) with one fault at an exact step, from the environment: FAULT=name@step[@process].

kill: SIGKILL after that step's metrics line · kill_in_save: SIGKILL once that step's checkpoint is being written ·
full_folder, full_record, full_write, full_commit: the disk is full when that step's checkpoint gets its folder, a small file
beside its arrays, the arrays, or its name ·
raise: an exception after that step · term, usr1: that signal to this process · eio: its checkpoint, restored from, is first
read with an input/output error · mark: it says after every step how far it is
"""

import errno
import importlib
import os
import signal
import sys
import time

import orbax.checkpoint as ocp
from orbax.checkpoint._src.metadata import checkpoint as metadata
from orbax.checkpoint._src.path import atomicity

from jasmine.training import attempt, cli
from jasmine.training.attempt import Attempt
from jasmine.training.checkpoint import Checkpointer
from jasmine.training.runs import baseline_modules

job = os.environ.get("FAULT_JOB", "train_tokenizer_vqvae")
baseline = importlib.import_module(baseline_modules()[job])

name, step, *process = os.environ["FAULT"].split("@")
fault_step = int(step)
if process and os.environ.get("JAX_PROCESS_ID") != process[0]:
    name = "none"

saving = 0
save = Checkpointer.save
create = atomicity.AtomicRenameTemporaryPath.create
update = metadata._MetadataStoreImpl.update
async_save = ocp.StandardCheckpointHandler.async_save
finalize = ocp.StandardCheckpointHandler.finalize
restore_state = ocp.StandardCheckpointHandler.restore
speed = Attempt._speed


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullDisk(ocp.future.NoopFuture):
    def result(self, timeout=None):
        full()


async def create_with_fault(self):
    return full() if name == "full_folder" and f"{step}." in self.get().name else await create(self)


def update_with_fault(self, file_path, **fields):
    return full() if name == "full_record" and f"/{step}." in str(file_path) else update(self, file_path, **fields)


async def async_save_with_fault(self, directory, *args, **kwargs):
    futures = await async_save(self, directory, *args, **kwargs)
    return [*futures, FullDisk()] if name == "full_write" and saving == fault_step else futures


def finalize_with_fault(self, directory):
    return full() if name == "full_commit" and f"{step}." in directory.parent.name else finalize(self, directory)


def save_with_fault(self, step, *args):
    global saving
    saving = step
    begun = save(self, step, *args)
    if step == fault_step and name == "kill_in_save":
        while "://" not in str(self.directory) and not list(self.directory.glob(f"{step}*")):
            time.sleep(0.001)  # a thread makes its folder
        os.kill(os.getpid(), signal.SIGKILL)
    return begun


def speed_with_fault(self, *args):  # called once for each logged step
    if self.step == fault_step:
        if name == "kill":
            self.checkpoints.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "raise":
            raise RuntimeError("injected failure of one process")
        if name in ("term", "usr1"):
            os.kill(os.getpid(), signal.SIGTERM if name == "term" else signal.SIGUSR1)
    return speed(self, *args)


def restore_state_with_fault(self, directory, *args, **kwargs):
    global name
    if name == "eio" and directory.parent.name == step:
        name = "none"
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return restore_state(self, directory, *args, **kwargs)


if name == "mark":
    attempt.MARK_SECONDS = 0.0
Checkpointer.save = save_with_fault
atomicity.AtomicRenameTemporaryPath.create = create_with_fault
metadata._MetadataStoreImpl.update = update_with_fault
ocp.StandardCheckpointHandler.async_save = async_save_with_fault
ocp.StandardCheckpointHandler.finalize = finalize_with_fault
ocp.StandardCheckpointHandler.restore = restore_state_with_fault
Attempt._speed = speed_with_fault

if __name__ == "__main__":
    sys.argv[0] = f"{job}.py"
    cli.run(baseline.main, baseline.Config)
