"""Two hosts on this machine, each with its own name, network and sshd, joined by a cable.

A host is a set of namespaces. What runs in it is gone when the process that started it ends, in
whatever way. Needs root.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

PROGRAMS = ("sshd", "ssh", "pdsh", "ip", "nsenter", "unshare", "setpriv")
ADDRESSES = {"host1": "10.77.0.1", "host2": "10.77.0.2"}

# Namespaces that end with the process that started them.
CAGE = (
    *("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--uts", "--net"),
    *("--pid", "--fork", "--kill-child", "--mount-proc"),
)
INSIDE = ("--mount", "--uts", "--net", "--pid")
CLIENT = """\
IdentityFile /etc/ssh/key
UserKnownHostsFile /dev/null
StrictHostKeyChecking no
LogLevel ERROR
"""
SERVER = """\
HostKey /etc/ssh/key
AuthorizedKeysFile /etc/ssh/key.pub
PermitRootLogin yes
UsePAM no
"""


def missing() -> str | None:
    """Why hosts cannot be made here, or None where they can."""
    if os.geteuid() != 0:
        return "hosts of their own need root"
    if absent := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"not installed: {', '.join(absent)} (apt-get install openssh-server pdsh iproute2)"
    if subprocess.run([*CAGE, "ip", "link", "set", "lo", "up"], capture_output=True).returncode:
        return "this machine does not let root make network namespaces"
    return None


class Host:
    """A running host."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        _wait_for(lambda: children.read_text().split() != [], "the host's first process")
        self.pid = int(children.read_text().split()[0])

    def start(
        self,
        *words: object,
        folder: Path = Path("/"),
        environ: Mapping[str, str] | None = None,
        output: Path | None = None,
    ) -> subprocess.Popen[str]:
        """Start a program on this host, in `folder`; all that it says goes to `output`."""
        enter = ["nsenter", f"--target={self.pid}", *INSIDE, f"--wdns={folder}"]
        with ExitStack() as stack:
            file = None if output is None else stack.enter_context(output.open("w"))
            return subprocess.Popen(
                [*enter, *map(str, words)],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=None if file is None else subprocess.STDOUT,
                text=True,
            )

    def run(self, *words: object) -> None:
        """Run a program on this host, which has to succeed."""
        assert self.start(*words).wait(30) == 0, words

    def end(self) -> None:
        """End all that runs on this host."""
        os.kill(self.pid, signal.SIGKILL)
        self._process.wait(10)


@contextmanager
def two_hosts() -> Iterator[Sequence[Host]]:
    """Start both hosts; they are there when sshd answers."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="i3-hosts-")))
        _write_keys(folder)
        hosts = []
        for name in ADDRESSES:
            host = Host(subprocess.Popen([*CAGE, "sh", "-c", _host_script(folder, name)]))
            stack.callback(host.end)
            hosts.append(host)
        for name in ADDRESSES:
            _wait_for((folder / name).exists, f"{name}")
        _connect(hosts)
        for name in ADDRESSES:
            words = ["ssh", "-o", "ConnectTimeout=1", name, "true"]
            _wait_for(partial(_succeeds, hosts[0], words), f"sshd of {name}")
        yield hosts


def _succeeds(host: Host, words: Sequence[str]) -> bool:
    return host.start(*words).wait(30) == 0


def _write_keys(folder: Path) -> None:
    """Make what both hosts have as /etc/ssh and /etc/hosts."""
    (folder / "ssh").mkdir()
    key = folder / "ssh" / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    (folder / "ssh" / "ssh_config").write_text(CLIENT)
    (folder / "ssh" / "sshd_config").write_text(SERVER)
    names = [f"{address} {name}\n" for name, address in ADDRESSES.items()]
    (folder / "hosts").write_text("".join(["127.0.0.1 localhost\n", *names]))


def _host_script(folder: Path, name: str) -> str:
    return (
        f"mount --bind {folder}/hosts /etc/hosts && mount --bind {folder}/ssh /etc/ssh && "
        f"mount -t tmpfs none /run && mkdir /run/sshd && hostname {name} && "
        f"ip link set lo up && touch {folder}/{name} && exec {shutil.which('sshd')} -D"
    )


def _connect(hosts: Sequence[Host]) -> None:
    """Lay a cable between the hosts."""
    first, second = hosts
    # A host does not know the number of the other's process, so no host may do this.
    network = ["nsenter", f"--target={first.pid}", "--net", "ip", "link", "add", "cable"]
    peer = ["type", "veth", "peer", "name", "cable", "netns", str(second.pid)]
    subprocess.run([*network, *peer], check=True)
    for host, address in zip(hosts, ADDRESSES.values(), strict=True):
        host.run("ip", "address", "add", f"{address}/24", "dev", "cable")
        host.run("ip", "link", "set", "cable", "up")


def _wait_for(ready: Callable[[], bool], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"no {what} after {seconds} s"
        time.sleep(0.05)
