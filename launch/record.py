"""`run.json`: what was submitted under a run's name, and how it went.

The launcher writes it at submission; from then on only the supervisor does, until the run's lock is free again. Stored
records are read leniently (unknown keys are ignored), because runs outlive the code that wrote them.
"""

import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from launch.config import check_stored
from launch.errors import UserError
from launch.plan import Plan
from launch.run_dir import RunDir, write_atomically

SCHEMA_VERSION = 1

State = Literal["submitted", "running", "finished", "failed", "preempted", "cancelled", "lost"]
ACTIVE: tuple[State, ...] = ("submitted", "running")


class _Stored(BaseModel):
    model_config = ConfigDict(extra="ignore")


class HostExit(_Stored):
    """How one process of an attempt ended.

    Attributes:
        code: its exit code; 128 + the signal's number if it died of one.
        signal: the name of that signal.
        forwarded: names of the signals it had been sent through the launcher; dying of one of those is a stop, not a
            failure.
        node: the machine, as its cluster calls it.
        started, ended: Unix seconds.
    """

    host: int
    code: int
    signal: str | None = None
    forwarded: list[str] = Field(default_factory=list)
    node: str | None = None
    started: float | None = None
    ended: float


class Blame(_Stored):
    """A machine at which an attempt failed; `node` as the cluster calls it, `reason` one line.

    `certain` is set where the machine itself was tested and found wrong, `lost` where the scheduler has lost it.
    """

    node: str
    reason: str
    time: float
    certain: bool = False
    lost: bool = False


class Attempt(_Stored):
    """One start of all processes. `outcome` is None while they run; `first_failed` is the host that failed first.

    `devices` describes what each process has where that is not a number of CPU devices; `nodes` are the machines, in the
    order of the processes; `cause` is one line on why it ended, where that is not in the exits.
    """

    number: int
    processes: int
    devices_per_process: int | Literal["auto"]
    devices: str | None = None
    nodes: list[str] = Field(default_factory=list)
    cause: str | None = None
    code: str
    started: float
    ended: float | None = None
    outcome: Literal["finished", "preempted", "failed"] | None = None
    first_failed: int | None = None
    exits: list[HostExit] = Field(default_factory=list)


class Submission(_Stored):
    """One submission under the run's name; the plan's secrets are masked."""

    time: float
    plan: Plan


class Supervisor(_Stored):
    """The process that watches over the run; SIGTERM tells it that its machine is going down."""

    host: str
    pid: int


class RunRecord(_Stored):
    """The contents of `run.json`.

    Attributes:
        state: as last written; see `launch.standing` for a supervisor that died without writing.
        changed: when `state` was written, in Unix seconds.
        reason: one line about the state, where there is more to say than its name.
        exit_code: what `--wait` returns; None until the run has ended.
    """

    schema_version: int = SCHEMA_VERSION
    name: str
    job: str
    state: State
    changed: float
    reason: str | None = None
    exit_code: int | None = None
    supervisor: Supervisor | None = None
    submissions: list[Submission] = Field(default_factory=list)
    attempts: list[Attempt] = Field(default_factory=list)
    blames: list[Blame] = Field(default_factory=list)


def read_record(run: RunDir) -> RunRecord | None:
    """Return what `run.json` says, or None where there is none.

    Raises:
        UserError: the file is damaged, or from a newer version of the launcher.
    """
    try:
        text = run.record.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{run.record}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{run.record}: damaged: byte {error.start} is not UTF-8") from error
    try:
        version = json.loads(text).get("schema_version", 0)
        if version > SCHEMA_VERSION:
            raise UserError(f"{run.record}: written by a newer launcher (schema {version}); update this checkout")
        record = RunRecord.model_validate_json(text)
        for submission in record.submissions:
            check_stored(submission.plan.settings)
        return record
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{run.record}: damaged: {str(error).splitlines()[0][:200]}") from error


def write_record(run: RunDir, record: RunRecord) -> None:
    """Replace `run.json`."""
    write_atomically(run.record, record.model_dump_json(indent=1))
