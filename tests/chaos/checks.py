"""What has to be true of a run after everything that was done to it."""

import json
import math
import os
from pathlib import Path
from typing import Any

from etils import epath

from jasmine.errors import UserError
from jasmine.inspect import open_checkpoint
from launch.events import problem
from launch.record import read_record
from launch.run_dir import read_json_lines
from tests import jobs
from tests.chaos.backends import OPTIONS, REPO, Backend
from tests.chaos.campaign import Campaign
from tests.chaos.processes import wait_for_end

# Of losses after the topology has changed: other sums of floats, carried on through every step since.
TOLERANCE = 1e-3


def uninterrupted(backend: Backend, last_step: int, env: dict[str, str]) -> Path:
    """Train to `last_step` without a launcher, a fault or a stop, in the first topology; return the run directory."""
    run_dir = backend.root / "uninterrupted"
    topology = backend.topologies[0]
    (backend.root / "calm").mkdir()
    jobs.run(
        [*OPTIONS, "--data_dir", str(backend.root / "data"), "--ckpt_dir", str(run_dir), *topology.options,
         "--stop_at_step", str(last_step), "--log_checkpoint_interval", "1000000"],
        script=REPO / "tests" / "chaos" / "job.py",
        processes=topology.processes,
        devices=topology.devices,
        env={**jobs.QUICK_COMPILE, "CHAOS_DIR": str(backend.root / "calm"), **env},
        timeout=3600,
    )  # fmt: skip
    return run_dir


def curves(campaign: Campaign, straight: Path) -> tuple[list[str], dict[str, Any]]:
    """Compare the run with the uninterrupted one; return what is wrong, and by how much losses differ."""
    problems: list[str] = []
    lines = read_json_lines(campaign.run.metrics)
    steps = [line["step"] for line in lines]
    if steps != list(range(1, campaign.last_step + 1)):
        missing = sorted(set(range(1, campaign.last_step + 1)) - set(steps))
        doubled = sorted({step for step in steps if steps.count(step) > 1})
        problems.append(f"metrics.jsonl: steps missing {missing[:10]}, doubled {doubled[:10]}, of {len(steps)} lines")
    expected = {line["step"]: line for line in read_json_lines(straight / "metrics.jsonl")}
    again = read_json_lines(campaign.run.root / "metrics.superseded.jsonl")
    for name, some in (("metrics.jsonl", lines), ("metrics.superseded.jsonl", again)):
        pairs = [(line, expected.get(line["step"], line)) for line in some]
        wrong = [line["step"] for line, right in pairs if line["batch_checksum"] != right["batch_checksum"]]
        if wrong:
            problems.append(f"{name}: other batches at steps {wrong[:10]}")
    last_there = math.inf if campaign.stayed_until is None else campaign.stayed_until
    stayed = [line for line in lines if line["attempt"] <= last_there]
    different = [line["step"] for line in stayed if line["loss"] != expected[line["step"]]["loss"]]
    if different:
        problems.append(f"losses are not those of the uninterrupted run bit for bit, from step {different[0]} on")
    errors = [
        abs(line["loss"] - expected[line["step"]]["loss"]) / abs(expected[line["step"]]["loss"])
        for line in lines
        if line["step"] in expected
    ]
    worst = max(errors, default=math.nan)
    if not worst <= TOLERANCE:
        first = next((line["step"] for line, error in zip(lines, errors, strict=False) if not error <= TOLERANCE), None)
        problems.append(f"losses differ by up to {worst:.2g} (allowed: {TOLERANCE}), from step {first} on")
    return problems, {"steps": campaign.last_step, "steps_bit_identical": len(stayed), "worst_relative_loss": worst}


def readable(campaign: Campaign) -> list[str]:
    """Return what cannot be read of the run, by the project's own readers."""
    problems = []
    record = read_record(campaign.run)
    if record is None or record.state != "finished":
        problems.append(f"run.json: {record and record.state}")
    torn = sum(one.name in ("tear_events", "disk_full") for one in campaign.injected)
    lines = (campaign.run.root / "events.jsonl").read_text().splitlines()
    bad = [line for line in lines if not _is_json(line)]
    if len(bad) > torn:
        problems.append(f"events.jsonl: {len(bad)} lines cannot be read, {torn} were torn: {bad[:3]}")
    glued = [line for line in bad if line.count('{"time"') > 1]
    if glued:
        problems.append(f"events.jsonl: events were lost behind a torn line: {glued[:2]}")
    events = [json.loads(line) for line in lines if _is_json(line)]
    wrong = [(found, event) for event in events if (found := problem(event)) is not None]
    if wrong:
        problems.append(f"events.jsonl: {len(wrong)} events are not as the schema says: {wrong[:3]}")
    begun = [event["attempt"] for event in events if event.get("event") == "attempt_started"]
    if doubled := sorted({attempt for attempt in begun if begun.count(attempt) > 1}):
        problems.append(f"events.jsonl: attempts that began twice: {doubled}")
    for step in campaign.checkpoints():
        try:
            open_checkpoint(epath.Path(str(campaign.run.root)), step, weights=True)
        except UserError as error:
            problems.append(str(error))
    page = ["--out", str(campaign.backend.root / "report.html")]
    for words in (["list"], ["status"], ["explain"], ["logs"], ["report", *page]):
        arguments = words if words == ["list"] else [words[0], campaign.backend.run_name, *words[1:]]
        done = campaign.backend.command("jobs", *arguments)
        if done.returncode or "Traceback" in done.stderr:
            problems.append(f"jobs.py {words[0]}: code {done.returncode}: {done.stderr[-500:]}")
    return problems


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def nothing_left(campaign: Campaign) -> list[str]:
    """Return what still lives of a run that has ended, or is held for it."""
    alive = wait_for_end(str(campaign.run.root), 60)
    problems = [f"process {one.pid} still lives: {one.command[:200]}" for one in alive]
    problems += [f"the cluster still holds {what}" for what in campaign.backend.leaks(90)]
    own = [process for process in os.listdir("/proc") if process.isdigit() and _is_stray(process, campaign)]
    return problems + [f"process {pid} was left behind" for pid in own]


def _is_stray(pid: str, campaign: Campaign) -> bool:
    """Whether a process holds a file of the campaign's job open or works in its folder, though nothing names the run."""
    try:
        where = os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return False
    return int(pid) != os.getpid() and where.startswith(
        (str(campaign.backend.disk), str(campaign.backend.root / "home"))
    )
