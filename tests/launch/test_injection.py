"""No name, path, argument, variable or setting is ever read as a command: each arrives exactly as it is, or is refused.

The scripts are those that would be submitted, and bash runs them; what they start writes down what it was given.
"""

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from launch.backends import cloud_tpu, slurm
from launch.backends.cloud_tpu import Rented
from launch.cluster_files import load_cluster
from launch.errors import UserError
from launch.pipeline import fill_places
from launch.plan import Plan, make_plan
from launch.request import checked_name, sweep_elements, sweep_values
from launch.snapshot import Code
from launch.text import unfit
from tests.clusters.cloud_tpu import CloudTpu
from tests.clusters.slurm import SlurmCluster as Slurm
from tests.fuzz import tries
from tests.launch.checkouts import Checkout
from tests.launch.slurm_login import end_all_jobs, login

# In the place of CANARY stands a file that must not come to be.
ATTACKS = [
    "$(touch CANARY)", "`touch CANARY`", "; touch CANARY;", "& touch CANARY &", "| touch CANARY", "'; touch CANARY; '",
    '"; touch CANARY; "', "'\"'\"'; touch CANARY #", "\ntouch CANARY\n", "\n#SBATCH --wrap='touch CANARY'\n", "#SBATCH --x",
    "EOF\ntouch CANARY", "${IFS}touch${IFS}CANARY", "$((`touch CANARY`))", "<(touch CANARY)", "$'\\n'touch CANARY",
    "\\\ntouch CANARY", "\\$(touch CANARY)", "--option", "-", "--", "-rf", "~", "~root", "*", "?", "[a-z]", "{a,b}", "!!",
    "!x", "#", "%j %% %A", "a b", " ", "a\tb", "é漢🙂", "\u202etxt", "$HOME", "${PATH}", "=", "a=b", "'", '"', "\\", "\\\\",
    "\\n", "x" * 5000,
]  # fmt: skip
REFUSED = ["\0", "a\0touch CANARY", "\x1b[2J", "\r", "a\rtouch CANARY", "\x7f", "\x9b", "\udcff"]

hostile = st.one_of(
    st.sampled_from(ATTACKS + REFUSED),
    st.lists(st.sampled_from([*ATTACKS, *REFUSED[:2]]), min_size=2, max_size=3).map("".join),
    st.text(alphabet=st.sampled_from("'\"\\`$(){}[];&|<>*?!#~%^=, \t\na-é\u2028"), max_size=12),
)
# A component of a path.
hostile_names = hostile.map(lambda text: text.replace("/", "_")[:60]).filter(lambda text: text not in ("", ".", ".."))

# Writes its arguments and its environment, each ended by a NUL, where it lies.
RECORDER = '#!/bin/bash -p\nprintf "%s\\0" "$@" >"$RECORD.argv"; env -0 >"$RECORD.env"\n'
CODE = Code("0123456789ab", 1, 1, None, None)


@dataclasses.dataclass
class Place:
    """A folder in which scripts run: a recorder in the place of Python, and a canary that no script may make."""

    root: Path

    @property
    def canary(self) -> Path:
        return self.root / "canary"

    def armed(self, value: Any) -> Any:
        """A value with the canary's path in the attacks of its texts."""
        if isinstance(value, str):
            return value.replace("CANARY", str(self.canary))
        if isinstance(value, dict):
            return {self.armed(k): self.armed(v) for k, v in value.items()}
        return [self.armed(part) for part in value] if isinstance(value, list | tuple) else value

    def run(self, script: str, **env: str) -> tuple[list[str], dict[str, str]]:
        """Have bash run a script; return arguments and environment of what it started in the end."""
        path = self.root / "script.sh"
        path.write_text(script)
        environment = {
            "PATH": f"{self.root}/bin:/usr/bin:/bin",
            "HOME": str(self.root),
            "RECORD": str(self.root / "record"),
        }
        done = subprocess.run(
            ["bash", str(path)], cwd=self.root, env=environment | env, capture_output=True, text=True, errors="replace"
        )
        assert done.returncode == 0, done.stderr + script
        assert not self.canary.exists(), script
        argv = (self.root / "record.argv").read_bytes().decode().split("\0")[:-1]
        pairs = (self.root / "record.env").read_bytes().decode().split("\0")[:-1]
        return argv, dict(pair.split("=", 1) for pair in pairs)


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory() as folder:
        made = Place(Path(folder))
        (made.root / "bin").mkdir()
        for name, text in {
            "python": RECORDER,
            # As srun: its own options, then a command.
            "srun": '#!/bin/bash -p\nwhile [[ $1 == -* ]]; do shift; done; exec "$@"\n',
            "scontrol": "#!/bin/sh\n",
        }.items():
            (made.root / "bin" / name).write_text(text)
            (made.root / "bin" / name).chmod(0o755)
        yield made


def plan_for(
    settings: Any, run_dir: Path, cwd: Path, arguments: tuple[str, ...] = (), sweep: str | None = None
) -> Plan:
    return make_plan(
        run_dir=run_dir, job="j", script=Path("/j/train.py"), script_in_code="train.py", arguments=arguments, cwd=cwd,
        cluster="c", settings=settings, code=CODE, first_attempt=1, sweep=sweep,
    )  # fmt: skip


def settings_from(place: Place, values: dict[str, Any]) -> Any:
    """Settings from a cluster file with these values."""
    path = place.root / "cluster.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_cluster(str(path))[1]


def sbatch_options(script: str) -> dict[str, str]:
    """What sbatch reads in a script: the lines before the first command, with quotes as in a shell, but for backslashes."""
    found: dict[str, str] = {}
    for line in script.split("\n"):
        if line.strip() and not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            assert "\\" not in line
            (option,) = shlex.split(line.removeprefix("#SBATCH"))
            name, _, value = option.removeprefix("--").partition("=")
            assert name not in found
            found[name] = value
    return found


def check_refusal(error: UserError, reason: bool = True) -> None:
    """What is refused is so for a reason, and in one line."""
    assert "\n" not in str(error)
    assert reason, f"no reason to refuse it: {error}"


TEXTS = {"partition": "partition", "account": "account", "qos": "qos", "constraint": "constraint", "exclude": "exclude",
         "reservation": "reservation", "memory": "mem", "mail": "mail-user"}  # fmt: skip


@tries(60)
@given(
    st.dictionaries(st.sampled_from(sorted(TEXTS)), hostile.filter(bool), max_size=3),
    hostile_names,
    hostile_names,
    st.booleans(),
)
@example({"partition": "a' --wrap='touch CANARY"}, "it's $(touch CANARY)", "b%j", True)
def test_a_batch_script_starts_the_supervisor_of_its_run_and_nothing_else(
    place: Place, values: dict[str, str], storage: str, folder: str, sweep: bool
) -> None:
    values = place.armed(values)
    run = place.root / place.armed(storage).replace("/", "_") / ("r.3" if sweep else "r")
    cwd = place.root / place.armed(folder).replace("/", "_")
    try:
        settings = settings_from(place, {"backend": "slurm", "python": str(place.root / "bin" / "python"), **values})
        plan = plan_for(settings, run, cwd, sweep="r" if sweep else None)
        script = slurm.batch_script([plan])
    except UserError as error:
        check_refusal(error, any(unfit(text) or "\\" in text for text in [*values.values(), str(run), str(cwd)]))
        return
    options = sbatch_options(script)
    assert {option: options.get(option) for key, option in TEXTS.items() if key in values} == {
        TEXTS[key]: value for key, value in values.items()
    }
    assert options.keys() - set(TEXTS.values()) <= {
        "array", "cpus-per-task", "export", "job-name", "mail-type", "nodes", "ntasks-per-node", "open-mode", "output",
        "requeue", "signal",
    }  # fmt: skip
    argv, _ = place.run(script, SLURM_ARRAY_TASK_ID="3")
    assert argv == [f"{run}/code/{CODE.hash}/launch/backends/slurm_attempt.py", "--run_dir", str(run)]


variables = st.dictionaries(
    st.one_of(
        st.sampled_from(["A", "_B1", "a", "A-B", "A;touch CANARY", "A$(touch CANARY)", "1A", "", "A=B", "A\n"]), hostile
    ),
    hostile,
    max_size=2,
)


@tries(80)
@given(variables, st.lists(hostile, max_size=4), hostile_names, hostile_names)
def test_an_exported_script_gives_the_job_its_arguments_and_variables(
    place: Place, env: dict[str, str], arguments: list[str], storage: str, folder: str
) -> None:
    env, arguments = place.armed(env), place.armed(arguments)
    run = place.root / "runs" / place.armed(storage).replace("/", "_") / "r"
    cwd = place.root / "work" / place.armed(folder).replace("/", "_")
    script_file = cwd / "train it.py"
    try:
        settings = settings_from(place, {"backend": "slurm", "python": str(place.root / "bin" / "python"), "env": env})
        plan = plan_for(settings, run, cwd, tuple(arguments))
        script = slurm.export([plan], place.root / "check out", script_file)
    except UserError as error:
        names_are_wrong = not all(name.isidentifier() and name.isascii() for name in env)
        unfit_texts = any(unfit(text, lines=True) for text in [*env.values(), *arguments])
        check_refusal(
            error, names_are_wrong or unfit_texts or any(unfit(path) or "\\" in path for path in (str(run), str(cwd)))
        )
        return
    cwd.mkdir(parents=True, exist_ok=True)
    argv, seen = place.run(script)
    assert argv == [str(script_file), *arguments]
    assert {name: seen[name] for name in env} == env
    assert (seen["JASMINE_RUN_DIR"], seen["PWD"]) == (str(run), str(cwd))
    assert run.is_dir()
    shutil.rmtree(cwd)
    shutil.rmtree(run)


@tries(60)
@given(
    hostile_names,
    hostile_names,
    st.lists(st.sampled_from(["true", "export SEEN=yes", "# a remark", "false || true"]), max_size=2),
)
def test_the_script_of_a_vm_starts_its_agent_and_nothing_else(
    place: Place, storage: str, vm: str, setup: list[str]
) -> None:
    run = place.root / place.armed(storage).replace("/", "_") / "r"
    vm_dir = place.root / "vm" / place.armed(vm).replace("/", "_")
    values = {"backend": "cloud_tpu", "accelerator_type": "v5litepod-16", "zone": "us-west4-a", "project": "lab",
              "vm_dir": str(vm_dir), "python": str(place.root / "bin" / "python"), "setup": setup}  # fmt: skip
    try:
        settings = settings_from(place, values)
        plan = plan_for(settings, run, place.root)
    except UserError as error:
        check_refusal(error, bool(unfit(str(vm_dir)) or unfit(str(run), lines=True)))
        return
    (vm_dir / "code" / CODE.hash).mkdir(parents=True)
    argv, _ = place.run(cloud_tpu.startup_script(plan, settings, Rented("jasmine-r-1", "us-west4-a", 1, 0.0)))
    assert argv == [
        "launch/backends/cloud_tpu_vm.py", "--run_dir", str(run), "--resource", "jasmine-r-1", "--vm_dir", str(vm_dir)
    ]  # fmt: skip
    shutil.rmtree(vm_dir)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("project", "lab/../other"), ("project", "lab?force=true"), ("project", "a b"), ("zone", "us/../x"),
        ("zone", ["us-west4-a", "x y"]), ("vm_dir", "-rf"), ("vm_dir", "relative"), ("labels", {"a": "b c"}),
        ("secrets", {"A;B": "/x"}), ("setup", ["a\nb"]),
    ],
)  # fmt: skip
def test_what_would_change_a_request_to_the_cloud_is_refused(place: Place, key: str, value: Any) -> None:
    values = {"backend": "cloud_tpu", "accelerator_type": "v5litepod-16", "zone": "us-west4-a", "project": "lab"}
    with pytest.raises(UserError, match=key):
        settings_from(place, values | {key: value})


def test_a_container_is_no_option_and_its_mounts_are_whole(place: Place) -> None:
    python = str(place.root / "bin" / "python")
    with pytest.raises(UserError, match="would be an option"):
        settings_from(place, {"backend": "slurm", "container": "--bind=/etc", "python": python})
    settings = settings_from(place, {"backend": "slurm", "container": "a.sif", "python": python})
    for path in ("/a,/etc:/etc", "/a:b"):
        with pytest.raises(UserError, match="separates"):
            slurm.batch_script([plan_for(settings, Path(path) / "r", place.root)])


@tries(200)
@given(hostile)
def test_names_and_swept_values(text: str) -> None:
    for name in (text, f"a{text}"):
        try:
            assert shlex.quote(checked_name(name)) == name
        except UserError as error:
            check_refusal(error)
    try:
        key, values = sweep_values(f"seed={text}")
    except UserError:
        return
    elements = sweep_elements("s", [(key, values)])
    for value, (_, words) in zip(values, elements, strict=True):
        assert words == (f"--seed={value}",) or (words == ("--seed", value) and not value.startswith("-"))
    assert fill_places("{a}", {"a": text}) == text


def test_what_no_process_can_be_given_is_refused(place: Place) -> None:
    settings = settings_from(place, {"backend": "local"})
    for arguments in [(text,) for text in REFUSED] + [("x" * 200_000,), ("x" * 90_000,) * 12]:
        with pytest.raises(UserError, match="arguments of the job"):
            plan_for(settings, place.root / "r", place.root, arguments)


# --- for real -----------------------------------------------------------------------------------------------------------

SHOW = """\
import json, os, pathlib, sys
number = os.environ.get("JAX_PROCESS_ID") or os.environ.get("JASMINE_HOST") or "0"
seen = {"argv": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd()}
pathlib.Path(os.environ["JASMINE_RUN_DIR"], f"seen-{number}").write_text(json.dumps(seen))
"""


def carried(checkout: Checkout, cluster: dict[str, Any], name: str = "r") -> tuple[dict[str, Any], Place]:
    """Submit a job with every attack as an argument and as a variable, from a folder and to a storage with such names; return
    what it saw."""
    place = Place(checkout.home.parent)
    here = place.armed('it\'s $(touch CANARY); `touch CANARY` "%j" {a,b} é').replace("/", "_")
    checkout.home = checkout.home / here
    checkout.home.mkdir()
    checkout.env["JASMINE_STORAGE"] = str(checkout.home / "runs")
    texts = [place.armed(text) for text in ATTACKS]
    env = {f"ATTACK_{index}": text for index, text in enumerate(texts)}
    (checkout.home / "show it.py").write_text(SHOW)
    (checkout.home / "c.yaml").write_text(yaml.safe_dump({**cluster, "env": env}))
    done = checkout.run("submit", "--cluster", "./c.yaml", "--name", name, "./show it.py", *texts)
    assert done.returncode == 0, done.stderr
    record = checkout.end(name, 90)
    assert record.state == "finished", (record, checkout.directory(name).supervisor_log.read_text())
    seen = json.loads((checkout.directory(name).root / "seen-0").read_text())
    assert seen["argv"] == texts
    assert {name: seen["env"].get(name) for name in env} == env
    for command in (["status", name], ["explain", name], ["list"], ["logs", name]):
        shown = checkout.jobs(*command)
        assert shown.returncode == 0, shown.stderr
    assert not place.canary.exists()
    assert not [path for path in place.root.rglob("*") if path.name == "canary"]
    return seen, place


def test_a_real_job_on_this_machine(checkout: Checkout) -> None:
    seen, _ = carried(checkout, {"backend": "local"})
    assert seen["cwd"] == str(checkout.home)


def test_a_real_job_on_slurm(checkout: Checkout, slurm: Slurm) -> None:
    mail = "a b'c\"d e;`touch CANARY`$(touch CANARY)#--wrap"
    cluster = {"backend": "slurm", "partition": "main", "cpus_per_node": 1, "time_limit": "10", "mail": mail}
    login(checkout, slurm)
    try:
        seen, _ = carried(checkout, cluster)
        assert seen["cwd"] == str(checkout.home)
        job = checkout.directory().slurm_job.read_text().strip()
        assert f"MailUser={mail} MailType" in slurm.command("scontrol", "show", "job", job)
    finally:
        end_all_jobs(slurm)


@pytest.mark.slow
def test_a_real_job_on_cloud_tpu(checkout: Checkout, cloud_tpu: CloudTpu) -> None:
    checkout.env |= cloud_tpu.env | {"JASMINE_WATCH_SECONDS": "0.3"}
    cluster = {"backend": "cloud_tpu", "accelerator_type": "v5litepod-4", "zone": "us-west4-a", "project": "lab",
               "boot_timeout": 60, "vm_dir": "~/it's $(touch CANARY)", "python": sys.executable,
               "silent_timeout": 8}  # fmt: skip
    carried(checkout, cluster)
    assert not list(cloud_tpu.folder.rglob("CANARY"))
