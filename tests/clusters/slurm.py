"""A real Slurm cluster on this machine: munged, slurmctld and one slurmd for each node, from Debian's packages.

Everything is in one directory of its own and on free ports of loopback addresses, so that several clusters, and one that
the machine itself belongs to, do not meet. Nodes are called by their addresses (127.0.0.11 …), which every process
resolves without a hosts file. GPUs are entries of gres.conf that point to /dev/null: Slurm allots them and sets
CUDA_VISIBLE_DEVICES as it would for real ones.

Daemons are children in the foreground, ended by their process ids.

A job that is put back into the queue waits for munge's `cred_expire` before it starts again: five seconds, the least that
Slurm accepts (anything less stands for its default of two minutes).

With `own_networks` every node has a network namespace of its own, joined by a bridge, so that a cable can be pulled.
"""

import contextlib
import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
PACKAGES = "slurm-wlm munge"
ACCOUNT_PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db", "my_print_defaults", "sacct", "sacctmgr")
ACCOUNT_PACKAGES = "slurmdbd mariadb-server-core mariadb-client"

_ACCOUNTS_CONF = """\
AuthType=auth/munge
AuthInfo=socket={root}/run/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser={user}
LogFile={root}/log/slurmdbd.log
PidFile={root}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser={user}
StorageLoc=slurm
"""

_CONF = """\
ClusterName={name}
SlurmctldHost={hostname}({address})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/run/munge.socket,cred_expire=5
{binding}StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/{accounts}
JobCompType=jobcomp/none
MailProg={root}/mail
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
OverTimeLimit=0
GresTypes=gpu
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=5
MinJobAge={min_job_age}
SlurmdTimeout={slurmd_timeout}
MessageTimeout={message_timeout}
JobRequeue=1
PropagateResourceLimits=NONE
FirstJobId={first_job}
"""


def missing_programs(programs: Sequence[str] = PROGRAMS) -> list[str]:
    """Return those of `programs` that this machine lacks."""
    folders = os.environ["PATH"].split(os.pathsep)
    daemons = [folder for folder in ("/usr/sbin", "/sbin") if folder not in folders]  # where Debian keeps them
    os.environ["PATH"] = os.pathsep.join([*folders, *daemons])
    return [program for program in programs if shutil.which(program) is None]


class SlurmCluster:
    """A running cluster. `env` is what a shell on its login node has set.

    Partitions: `main` (default), `high`, whose jobs preempt those of `main` after `grace` seconds, and `short`, with
    a time limit of one minute.
    """

    def __init__(
        self,
        nodes: int = 4,
        gpus: int = 8,
        grace: int = 30,
        slurmd_timeout: int = 30,
        message_timeout: int = 10,
        own_networks: bool = False,
        accounts: bool = False,
    ) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="slurm-"))
        self._subnet = random.choice(_free_subnets()) if own_networks else None
        prefix = "127.0.0" if self._subnet is None else f"10.213.{self._subnet}"
        self.address = f"{prefix}.1"
        self.nodes = [f"{prefix}.{11 + index}" for index in range(nodes)]
        self.conf = self.root / "slurm.conf"
        self.mails = self.root / "log" / "mails"  # a line for each: its subject and to whom
        self.env = {"SLURM_CONF": str(self.conf)}
        self._settings = {"slurmd_timeout": slurmd_timeout, "message_timeout": message_timeout}
        self._gpus, self._grace, self._accounts = gpus, grace, accounts
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    # --- life --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Bring the cluster up and wait until all nodes are idle."""
        for folder in ("run", "log", "state", "spool", "dev"):
            (self.root / folder).mkdir()
        self.root.chmod(0o755)
        self._configure()
        mail = self.root / "mail"
        mail.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {self.mails}\n')
        mail.chmod(0o755)
        munge = self.root / "run"
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self._spawn(
            "munged", "-F", "--force", f"--key-file={key}", f"--socket={munge}/munge.socket",
            f"--pid-file={munge}/munged.pid", f"--log-file={self.root}/log/munged.log",
            f"--seed-file={munge}/munged.seed",
        )  # fmt: skip
        self._wait(lambda: (munge / "munge.socket").exists(), 10, "munged has no socket")
        self._make_networks()
        if self._accounts:
            self._start_accounts()
        self.start_controller()
        for node in self.nodes:
            self.start_node(node)
        self._wait(lambda: self.states() == ["idle"] * len(self.nodes), 30, "nodes are not idle")

    def stop(self) -> None:
        """End all jobs and daemons and remove the cluster's directory."""
        with contextlib.suppress(subprocess.SubprocessError, OSError, AssertionError):
            for node in self.nodes if self._subnet is not None else []:
                self.plug_cable(node)  # what the node still runs has to hear that it is over
            self.start_controller()
            self.command("scancel", "-f", "-u", getpass.getuser(), check=False)
            self._wait(lambda: not self.command("squeue", "-h").strip(), 20, "jobs do not end")
        for name in sorted(self._daemons, key=_last_to_stop):
            self._end(name, signal.SIGTERM)
        self._remove_networks()
        shutil.rmtree(self.root, ignore_errors=True)

    def start_controller(self) -> None:
        """Start slurmctld where it does not run, and wait until it answers."""
        if "slurmctld" in self._daemons:
            return
        self._spawn("slurmctld", "-D", "-f", str(self.conf))
        self._wait(lambda: "UP" in self.command("scontrol", "ping", check=False), 20, "slurmctld does not answer")

    def stop_controller(self) -> None:
        """End slurmctld; jobs go on."""
        self._end("slurmctld", signal.SIGTERM)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        (self.root / "spool" / node).mkdir(exist_ok=True)
        inside: list[str] = []
        if self._subnet is not None:
            # With a host name of its own, by which its processes find the address that others reach them at.
            hosts = self.root / "hosts"
            names = {address: f"node-{address.rpartition('.')[2]}" for address in self.nodes}
            hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for ip, name in names.items()))
            alone = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
            inside = ["ip", "netns", "exec", self._network(node), "unshare", "--uts", "--mount"]
            inside += ["sh", "-c", alone, names[node], str(hosts)]
        self._spawn(*inside, "slurmd", "-D", "-f", str(self.conf), "-N", node, name=node)

    def kill_node(self, node: str) -> None:
        """Kill a node's slurmd; what it had started lives on, as after a crash of the daemon."""
        self._end(node, signal.SIGKILL)

    def pull_cable(self, node: str) -> None:
        """Cut a node with a network of its own off from all others; its processes live on."""
        _ip("link", "set", self._cable(node), "down")

    def plug_cable(self, node: str) -> None:
        """Undo `pull_cable`."""
        _ip("link", "set", self._cable(node), "up")

    def bring_back(self, nodes: Sequence[str]) -> None:
        """Undo `pull_cable`, and return once Slurm uses the nodes again."""
        for node in nodes:
            self.plug_cable(node)
        self._wait(lambda: not self._unused(nodes), 120, "nodes do not come back")

    def _unused(self, nodes: Sequence[str]) -> list[str]:
        """Return those of some nodes that Slurm does not use, after asking it to use them again."""
        lines = [line.split() for line in self.command("sinfo", "-h", "-N", "-o", "%N %T").splitlines()]
        unused = sorted({node for node, state in lines if state not in ("idle", "allocated", "mixed")} & {*nodes})
        for node in unused:
            self.command("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
        return unused

    # --- what a user does --------------------------------------------------------------------------------------

    def command(self, *argv: str, check: bool = True) -> str:
        """Run one of Slurm's commands and return what it printed."""
        done = subprocess.run(argv, env=os.environ | self.env, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{argv}: {done.stderr}"
        return done.stdout

    def states(self) -> list[str]:
        """Return the states of the nodes."""
        return [line.strip("*~#") for line in self.command("sinfo", "-h", "-N", "-p", "main", "-o", "%t").splitlines()]

    def job_state(self, job: str) -> str:
        """Return a job's state in Slurm's words, `""` where it is not known any more."""
        words = self.command("scontrol", "-o", "show", "job", job, check=False).split()
        return next((word.partition("=")[2] for word in words if word.startswith("JobState=")), "")

    def _start_accounts(self) -> None:
        """Start MariaDB, without any port, and slurmdbd on top of it."""
        data, socket_path, user = self.root / "db", self.root / "run" / "db.socket", getpass.getuser()
        install = ["mariadb-install-db", "--no-defaults", f"--datadir={data}", f"--user={user}", "--skip-test-db"]
        subprocess.run([*install, f"--auth-root-socket-user={user}"], check=True, capture_output=True)
        self._spawn(
            "mariadbd", "--no-defaults", f"--datadir={data}", f"--socket={socket_path}", "--skip-networking",
            f"--user={user}", f"--pid-file={self.root}/run/db.pid", "--innodb-buffer-pool-size=32M",
        )  # fmt: skip
        self._wait(socket_path.exists, 90, "mariadbd has no socket")
        conf = self.root / "slurmdbd.conf"
        (port,) = _free_ports(1)
        conf.write_text(_ACCOUNTS_CONF.format(root=self.root, port=port, user=user))
        conf.chmod(0o600)
        with self.conf.open("a") as file:
            file.write(
                f"AccountingStorageHost=127.0.0.1\nAccountingStoragePort={port}\n"
                f"AccountingStoragePass={self.root}/run/munge.socket\nAccountingStorageEnforce=associations,qos\n"
            )
        # slurmdbd takes the database's socket from the environment only.
        self._spawn("slurmdbd", "-D", MYSQL_UNIX_PORT=str(socket_path), MARIADB_UNIX_PORT=str(socket_path))
        cluster = self.conf.read_text().partition("ClusterName=")[2].split()[0]

        def known() -> bool:
            self.command("sacctmgr", "-i", "add", "cluster", cluster, check=False)
            return cluster in self.command("sacctmgr", "-n", "list", "cluster", check=False)

        self._wait(known, 120, "slurmdbd does not know the cluster")
        self.command("sacctmgr", "-i", "add", "account", "lab")
        self.command("sacctmgr", "-i", "add", "qos", "hurry")
        self.command("sacctmgr", "-i", "add", "user", user, "account=lab", "qos=normal,hurry", "defaultqos=normal")

    def _network(self, node: str) -> str:
        return f"jasmine-{self._subnet}-{node.rpartition('.')[2]}"

    def _cable(self, node: str) -> str:
        return f"jas{self._subnet}-{node.rpartition('.')[2]}"

    def _make_networks(self) -> None:
        if self._subnet is None:
            return
        bridge = f"jas{self._subnet}"
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{self.address}/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for node in self.nodes:
            network, cable = self._network(node), self._cable(node)
            _ip("netns", "add", network)
            _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", network)
            _ip("link", "set", cable, "master", bridge, "up")
            _ip("-n", network, "addr", "add", f"{node}/24", "dev", "eth0")
            _ip("-n", network, "link", "set", "eth0", "up")
            _ip("-n", network, "link", "set", "lo", "up")

    def _remove_networks(self) -> None:
        if self._subnet is None:
            return
        for node in self.nodes:
            # A step's daemon that was cut off from its controller keeps trying to reach it.
            left = subprocess.run(["ip", "netns", "pids", self._network(node)], capture_output=True, text=True).stdout
            for pid in left.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _ip("link", "del", self._cable(node), check=False)
            _ip("netns", "del", self._network(node), check=False)
        _ip("link", "del", f"jas{self._subnet}", check=False)

    # --- inside ------------------------------------------------------------------------------------------------

    def _configure(self) -> None:
        ports = _free_ports(1 + len(self.nodes))
        text = _CONF.format(
            name=f"lab{ports[0]}",
            hostname=socket.gethostname(),
            address=self.address,
            binding="CommunicationParameters=NoCtldInAddrAny\n" if self._subnet is None else "",
            port=ports[0],
            user=getpass.getuser(),
            root=self.root,
            first_job=random.randrange(1000, 2**25),
            accounts="slurmdbd" if self._accounts else "none",
            min_job_age=2 if self._accounts else 3600,
            **self._settings,
        )
        gres = ""
        for node, port in zip(self.nodes, ports[1:], strict=True):
            text += (
                f"NodeName={node} NodeHostname=localhost NodeAddr={node} Port={port} CPUs=16 RealMemory=16000 "
                f"Gres=gpu:h100:{self._gpus} State=UNKNOWN\n"
            )
            gres += f"NodeName={node} Name=gpu Type=h100 File={self.root}/dev/gpu[0-{self._gpus - 1}]\n"
        partitions = {
            "main": f"Default=YES DefaultTime=30 MaxTime=INFINITE PriorityTier=1 GraceTime={self._grace}",
            "short": f"DefaultTime=1 MaxTime=2 PriorityTier=1 GraceTime={self._grace}",
            "high": "MaxTime=INFINITE PriorityTier=10",
        }
        for partition, options in partitions.items():
            text += f"PartitionName={partition} Nodes=ALL State=UP {options}\n"
        self.conf.write_text(text)
        (self.root / "gres.conf").write_text(gres)
        (self.root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for index in range(self._gpus):
            (self.root / "dev" / f"gpu{index}").symlink_to("/dev/null")

    def _spawn(self, *argv: str, name: str | None = None, **variables: str) -> None:
        log = (self.root / "log" / f"{name or argv[0]}.out").open("ab")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | self.env | variables
        with log:
            self._daemons[name or argv[0]] = subprocess.Popen(
                argv, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _end(self, name: str, signum: signal.Signals) -> None:
        daemon = self._daemons.pop(name, None)
        if daemon is None:
            return
        daemon.send_signal(signum)
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def _wait(self, condition: Callable[[], bool], seconds: float, complaint: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            logs = "\n".join(path.read_text()[-2000:] for path in (self.root / "log").iterdir())
            assert not ended, f"{ended} ended:\n{logs}"
            assert time.monotonic() < deadline, f"{complaint}:\n{logs}"
            time.sleep(0.05)


def _last_to_stop(daemon: str) -> int:
    order = ["slurmctld", "slurmdbd", "mariadbd", "munged"]
    return order.index(daemon) if daemon in order else -1


@contextlib.contextmanager
def running_cluster(**options: Any) -> Iterator[SlurmCluster]:
    """A cluster that is up inside the `with` block, and gone after it."""
    cluster = SlurmCluster(**options)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def networks_allowed() -> bool:
    """Return whether this machine lets us make network namespaces and bridges."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    name = f"jasmine-try-{os.getpid()}"
    try:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "add", "try0", "type", "bridge")
    except (AssertionError, OSError):
        return False
    finally:
        _ip("netns", "del", name, check=False)
    return True


def _ip(*arguments: str, check: bool = True) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert not check or done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


def _free_subnets() -> list[int]:
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    return [subnet for subnet in range(256) if f" jas{subnet}:" not in links]


def _free_ports(count: int) -> Sequence[int]:
    """Return ports nothing listens on, below those that the kernel gives to outgoing connections."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.choice([port for port in range(20000, 32000) if port not in ports])
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            ports.append(port)
    return ports
