"""A real two-node Slurm cluster on this machine, without systemd: its own keys, ports and folder.

Each daemon runs in mount, host-name and process-id namespaces of its own. So each node has its own
name, killing a node's recorded process takes the whole node down, as a power cut would, and no
process is left when the one that started the cluster ends, in whatever way. Needs root. Each node
has two fake GPUs.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged", "mungekey", "unshare", "setpriv")
NODES = ("node1", "node2")
GPUS = 2
CPUS = 3  # one more than GPUs, for a job beside those of a test

# A daemon in namespaces of its own, which die when the process that started them dies.
CAGE = (
    *("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--uts"),
    *("--pid", "--fork", "--kill-child", "--mount-proc"),
)

CONFIGURATION = """\
ClusterName=i3dist-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/completed.txt
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
KillWait=5
ReturnToService=1
JobRequeue=1
SlurmdTimeout=10
GresTypes=gpu
"""
NODE = (
    "NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} "
    "CPUs={cpus} RealMemory=4000 Gres=gpu:{gpus}\n"
)
PARTITION = "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"


def missing() -> str | None:
    """Why a cluster cannot be started here, or None where it can."""
    if os.geteuid() != 0:
        return "a Slurm cluster needs root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (apt-get install slurmctld slurmd munge)"
    if subprocess.run([*CAGE, "true"], capture_output=True).returncode:
        return "this machine does not let root make namespaces"
    return None


class Cluster:
    """A running cluster: submit jobs to it, wait for them, ask for their state."""

    def __init__(self, folder: Path, nodes: Mapping[str, subprocess.Popen[bytes]]) -> None:
        self.folder = folder
        self.nodes = nodes

    def command(self, *words: object, cwd: Path | None = None, seconds: float = 60) -> str:
        """Run one of Slurm's commands against this cluster and return what it printed."""
        result = subprocess.run(
            [str(word) for word in words],
            cwd=cwd,
            env=environment(self.folder),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        assert result.returncode == 0, f"{words}: {result.stderr}{result.stdout}"
        return result.stdout

    def submit(self, *words: object, cwd: Path | None = None) -> str:
        """Submit a batch job; returns its id."""
        return self.command("sbatch", "--parsable", *words, cwd=cwd).strip()

    def wait(self, job: str, seconds: float) -> str:
        """Wait until a job has ended and return its state, such as COMPLETED; else cancel it."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            state = self.state(job)
            if state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
                return state
            time.sleep(0.2)
        self.command("scancel", job)
        raise TimeoutError(f"job {job} was still {state} after {seconds} s")

    def kill_node(self, name: str) -> None:
        """Take a node down with all its processes, as a power cut would."""
        _end(self.nodes[name])

    def state(self, job: str) -> str:
        """The state that the controller reports for a job."""
        match = re.search(r"JobState=(\w+)", self.command("scontrol", "show", "job", job))
        assert match is not None
        return match[1]


def environment(folder: Path) -> dict[str, str]:
    """This process's environment for the cluster's commands, without any other Slurm's words."""
    foreign = ("SLURM", "SBATCH", "SRUN", "CUDA_VISIBLE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    # Jobs inherit this: python3 is then the one that runs the tests.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return kept | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path}


@contextmanager
def running_cluster(names: Sequence[str] = NODES) -> Iterator[Cluster]:
    """Start a cluster, hand it over when all nodes are idle, and leave no process behind."""
    with ExitStack() as stack:
        # Short, because a socket's path may have 107 characters at most.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="i3-slurm-")))
        folder.chmod(0o755)
        _configure(folder, names)
        stack.enter_context(_daemon(folder, "munged", _munged(folder)))
        _wait_for((folder / "munge.socket").exists, "munged's socket")
        controller = ["slurmctld", "-D", "-f", str(folder / "slurm.conf")]
        stack.enter_context(_daemon(folder, "slurmctld", controller))
        nodes = {
            name: stack.enter_context(_daemon(folder, name, _node(folder, name))) for name in names
        }
        cluster = Cluster(folder, nodes)
        _wait_for(lambda: _idle_nodes(folder) == len(names), "idle nodes")
        yield cluster


def _configure(folder: Path, nodes: Sequence[str]) -> None:
    controller, *ports = free_ports(1 + len(nodes))
    text = CONFIGURATION.format(folder=folder, host=_short_host_name(), controller=controller)
    for name, port in zip(nodes, ports, strict=True):
        text += NODE.format(name=name, port=port, cpus=CPUS, gpus=GPUS)
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(text + PARTITION)
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
    for gpu in range(GPUS):
        # A character device like /dev/null stands for a GPU: Slurm only counts and hands out.
        os.mknod(folder / f"gpu{gpu}", 0o020666, os.makedev(1, 3))
    (folder / "state").mkdir()
    names = " ".join(("localhost", *nodes, _short_host_name()))
    (folder / "hosts").write_text(f"127.0.0.1 {names}\n")
    subprocess.run(["mungekey", "-c", "-k", str(folder / "munge.key")], check=True)


def _munged(folder: Path) -> list[str]:
    files = {"key": "key", "socket": "socket", "pid": "pid", "log": "log", "seed": "seed"}
    options = {f"--{name}-file": folder / f"munge.{end}" for name, end in files.items()}
    options["--socket"] = options.pop("--socket-file")
    return ["munged", "--foreground", *(f"{name}={path}" for name, path in options.items())]


def _node(folder: Path, name: str) -> list[str]:
    script = (
        f"mount --bind {folder}/hosts /etc/hosts && hostname {name} && "
        f"exec slurmd -D -N {name} -f {folder}/slurm.conf"
    )
    return ["sh", "-c", script]


@contextmanager
def _daemon(folder: Path, name: str, words: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a daemon in the foreground inside its cage, and end it with all that it started."""
    with (folder / f"{name}.out").open("wb") as output:
        process = subprocess.Popen(
            [*CAGE, *words],
            env=environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a daemon's whole process-id namespace through its first process, which unshare reaps."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    for child in children.read_text().split() if process.poll() is None else ():
        os.kill(int(child), signal.SIGKILL)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _idle_nodes(folder: Path) -> int:
    words = ["sinfo", "--noheader", "--Node", "--format=%T"]
    result = subprocess.run(words, env=environment(folder), capture_output=True, text=True)
    return result.stdout.split().count("idle")


def _wait_for(ready: Callable[[], bool], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"no {what} after {seconds} s"
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listened on just now."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _short_host_name() -> str:
    return socket.gethostname().split(".")[0]
