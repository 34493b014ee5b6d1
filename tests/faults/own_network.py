"""A network of a job's own, of one host, whose link a test takes away.

    unshare --net python tests/faults/own_network.py COMMAND...

becomes the command, with the loopback interface up.
"""

import fcntl
import os
import socket
import struct
import sys
from pathlib import Path

SET_FLAGS, UP = 0x8914, 1  # SIOCSIFFLAGS and IFF_UP of netdevice(7)
MARK = "OWN_NETWORK"  # names the network, in the environment of what runs there


def network(process: int | str = "self") -> str:
    """What tells a process's network from others."""
    return str(Path(f"/proc/{process}/ns/net").readlink())


def set_link(up: bool) -> None:
    """Bring loopback up or down, but never the machine's own."""
    assert os.environ.get(MARK) == network(), "start this with unshare --net, as above"
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SET_FLAGS, struct.pack("16sh22x", b"lo", UP if up else 0))


if __name__ == "__main__":
    assert network() != network(os.getppid()), "this process has no network of its own"
    os.environ[MARK] = network()
    set_link(up=True)
    os.execvp(sys.argv[1], sys.argv[1:])
