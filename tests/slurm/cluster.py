"""A real Slurm of two nodes on this machine: munge, slurmctld and two slurmd from Debian's packages, without systemd.

Every node has its own host name and process tree, the second one also its own network, so that a template which takes
`localhost` for the master or another node's processes for its own fails here as on a true cluster. The nodes share the
file system. All files lie in one directory and all processes end with the cluster; /etc is not changed.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.paths import ROOT
from tests.ports import free_port

T = TypeVar("T")

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip")
PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client", "iproute2")
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}

# {cpus} and {memory} are what a node claims to have: nothing is bound or limited. cred_expire: a requeued job waits for it.
CONFIGURATION = """
ClusterName=dstrain
SlurmctldHost={controller}({address})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
KillWait=15
MinJobAge=86400
ReturnToService=2
NodeName=node1 NodeAddr={address} Port={node_port} CPUs={cpus} RealMemory={memory}
NodeName=node2 NodeAddr={peer} Port={node_port} CPUs={cpus} RealMemory={memory}
PartitionName=main Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""

NAMESPACES = ("unshare", "--fork", "--pid", "--kill-child", "--mount-proc", "--mount", "--uts")

# $1 directory, $2 node; for a node with its own network also $3 the machine's network, $4 its end of the cable, $5 its address
START_NODE = """
set -e
mount --bind "$1/hosts" /etc/hosts
mount --bind "$1/nsswitch.conf" /etc/nsswitch.conf
hostname "$2"
if [ -n "${3:-}" ]; then
  nsenter --net="$3" ip link set "$4" netns 1
  ip address add "$5/30" dev "$4"
  ip link set "$4" up
  ip link set lo up
fi
slurmd -D -N "$2" &
wait
"""


class ClusterError(Exception):
    """Slurm did not do what a test needs; the message holds what it said."""


@dataclass(frozen=True)
class Cluster:
    """A running cluster; `directory` holds its configuration and the daemons' logs."""

    directory: Path
    environment: dict[str, str]

    def run(self, *words: str | Path, **variables: str) -> str:
        """The standard output of a Slurm command called in the checkout; ClusterError where it fails."""
        settings = {"env": self.environment | variables, "cwd": ROOT, "stdin": subprocess.DEVNULL, "timeout": 60}
        done = subprocess.run(words, capture_output=True, text=True, **settings)
        if done.returncode != 0:
            raise ClusterError(f"{' '.join(map(str, words))}: {done.stderr}")
        return done.stdout

    def submit(self, *words: str | Path, **variables: str) -> int:
        """`sbatch` with these words and environment variables -> the job's id."""
        return int(self.run("sbatch", "--parsable", *words, **variables))

    def job(self, job: int | str) -> dict[str, str]:
        """The fields of `scontrol show job`, such as JobState, Restarts and ExitCode. job: its id, or JOB_TASK of an array."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", str(job))))

    def wait(self, job: int | str, timeout: float) -> dict[str, str]:
        """The job's fields once it is over for good: a job that goes back into the queue is not."""
        return wait_for(lambda: fields if (fields := self.job(job))["JobState"] in OVER else None, timeout, f"end of job {job}")


def wait_for(probe: Callable[[], T | None], timeout: float, what: str) -> T:
    """The first true answer of `probe`; ClusterError after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not (answer := probe()):
        if time.monotonic() > end:
            raise ClusterError(f"waited {timeout:.0f} s in vain for: {what}")
        time.sleep(0.1)
    return answer


def obstacle() -> str | None:
    """Why no cluster can be started here; None if one can. Installs the packages where that is all that is missing."""
    if os.geteuid() != 0:
        return "a private Slurm needs root"
    if not all(map(shutil.which, PROGRAMS)):
        if not shutil.which("apt-get"):
            return f"Slurm is not installed, and there is no apt-get to install {' '.join(PACKAGES)}"
        if error := _install():
            return f"Slurm cannot be installed: {error}"
    probe = subprocess.run([*NAMESPACES, "--net", "ip", "link", "add", "type", "veth"], capture_output=True, text=True)
    return f"this machine does not allow namespaces: {probe.stderr.strip()}" if probe.returncode else None


def _install() -> str | None:
    """Install PACKAGES without starting their system daemons; returns the error, if any."""
    policy = Path("/usr/sbin/policy-rc.d")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=120", *PACKAGES]
    with ExitStack() as undo:
        if not policy.exists():
            policy.write_text("#!/bin/sh\nexit 101\n")
            policy.chmod(0o755)
            undo.callback(policy.unlink)
        for command in (install, ["apt-get", "update", "-qq"], install):
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if command is install and done.returncode == 0:
                return None
    return done.stderr.strip()


@contextmanager
def start(directory: Path) -> Iterator[Cluster]:
    """A cluster with its two nodes up. `directory` has a short path, because the paths of Unix sockets are."""
    subnet = f"198.18.{os.getpid() % 256}"  # of the range that is set aside for tests of networks
    address, peer = f"{subnet}.1", f"{subnet}.2"
    cable = (f"dst{os.getpid()}a", f"dst{os.getpid()}b")
    _configure(directory, address, peer)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    cluster = Cluster(directory, environment | {"SLURM_CONF": str(directory / "slurm.conf")})
    with ExitStack() as undo:
        network = undo.enter_context(Path("/proc/self/ns/net").open())
        _lay(cable, address, undo)
        _daemon(cluster, "munged", _munge(directory), undo)
        wait_for((directory / "munge.socket").exists, 10, f"munge, see {directory}/munged.log")
        _daemon(cluster, "slurmctld", ["slurmctld", "-D"], undo)
        node = ("sh", "-c", START_NODE, "sh", str(directory))
        own_network = (f"/proc/self/fd/{network.fileno()}", cable[1], peer)
        _daemon(cluster, "node1", [*NAMESPACES, *node, "node1"], undo)
        _daemon(cluster, "node2", [*NAMESPACES, "--net", *node, "node2", *own_network], undo, keep=network.fileno())
        wait_for(lambda: _idle_nodes(cluster) == 2, 30, f"two nodes, see {directory}/*.log")
        undo.callback(_cancel_all, cluster)
        yield cluster


def _configure(directory: Path, address: str, peer: str) -> None:
    values = {"directory": directory, "controller": socket.gethostname(), "address": address, "peer": peer}
    sizes = {"port": free_port(), "node_port": free_port(), "cpus": 4, "memory": 16000}
    (directory / "slurm.conf").write_text(CONFIGURATION.format(**values, **sizes))
    (directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # loaded though unused; this one needs no systemd
    (directory / "hosts").write_text(f"127.0.0.1 localhost\n{address} node1\n{peer} node2\n")
    (directory / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")  # never waits for a name server


def _lay(cable: tuple[str, str], address: str, undo: ExitStack) -> None:
    """A network cable from this machine, here with `address`, to node2; both ends vanish together."""
    near, far = cable
    subprocess.run(["ip", "link", "add", near, "type", "veth", "peer", "name", far], check=True)
    undo.callback(subprocess.run, ["ip", "link", "delete", near], stderr=subprocess.DEVNULL)
    subprocess.run(["ip", "address", "add", f"{address}/30", "dev", near], check=True)
    subprocess.run(["ip", "link", "set", near, "up"], check=True)


def _munge(directory: Path) -> list[str]:
    key = directory / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    files = {"key-file": "munge.key", "seed-file": "munge.seed", "socket": "munge.socket", "pid-file": "munged.pid"}
    log = f"--log-file={directory}/munge.log"
    return ["munged", "--foreground", "--force", log, *(f"--{option}={directory}/{name}" for option, name in files.items())]


def _daemon(cluster: Cluster, name: str, command: list[str], undo: ExitStack, keep: int | None = None) -> None:
    """Start `command` with its output in NAME.log; it and the whole process tree of a node end with `undo`."""
    environment = {"PATH": os.environ["PATH"], "SLURM_CONF": cluster.environment["SLURM_CONF"]}
    log = undo.enter_context((cluster.directory / f"{name}.log").open("w"))
    streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, env=environment, pass_fds=[] if keep is None else [keep], **streams)
    undo.callback(_stop, process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """At once: there is nothing to save, and `unshare` takes its node along."""
    process.kill()
    process.wait()


def _idle_nodes(cluster: Cluster) -> int:
    with suppress(ClusterError):
        return cluster.run("sinfo", "-hN", "-o%T").split().count("idle")
    return 0


def _cancel_all(cluster: Cluster) -> None:
    with suppress(ClusterError):
        if jobs := cluster.run("squeue", "-ho%A").split():
            cluster.run("scancel", *jobs)
        wait_for(lambda: not cluster.run("squeue", "-h"), 20, "the jobs' end")
