"""Two hosts on one machine: network namespaces that a veth pair joins, as a cable joins two machines.

The hosts share the file system and the processor. Needs root, or the right to create network namespaces, and `ip` of
iproute2. The names and addresses inside the namespaces are not visible outside of them.
"""

import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ADDRESSES = ("10.213.77.1", "10.213.77.2")
INTERFACE = "eth0"
_numbers = itertools.count()


def why_unavailable() -> str:
    """Return why this machine cannot make two hosts, "" if it can."""
    if shutil.which("ip") is None:
        return "no `ip` (package iproute2)"
    try:
        with TwoHosts():
            return ""
    except subprocess.CalledProcessError as error:
        return f"no network namespaces: `{' '.join(error.cmd)}` failed: {error.stderr.strip()}"


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class TwoHosts:
    """Hosts 0 and 1. At the end of the block their processes are killed and the hosts are removed."""

    def __init__(self) -> None:
        number = next(_numbers)
        self.names = [f"mask-volumes-{os.getpid()}-{number}-host{host}" for host in range(2)]

    def __enter__(self) -> "TwoHosts":
        try:
            for name in self.names:
                _ip("netns", "add", name)
            first, second = self.names
            _ip("link", "add", INTERFACE, "netns", first, "type", "veth", "peer", "name", INTERFACE, "netns", second)
            for name, address in zip(self.names, ADDRESSES):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", name, "link", "set", INTERFACE, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for host, name in enumerate(self.names):
            if name in _ip("netns", "list").split():
                self.signal(host, signal.SIGKILL)
                _ip("netns", "delete", name)

    def start(
        self, host: int, command: Sequence[str], output: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen:
        """Start a command on a host, with its output in a file."""
        with open(output, "a") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[host], *command],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | (environment or {}),
                start_new_session=True,
            )

    def processes(self, host: int) -> set[int]:
        """Return the ids of the processes on a host."""
        found = {int(pid) for pid in _ip("netns", "pids", self.names[host]).split()}
        return {pid for pid in found if not _is_zombie(pid)}

    def signal(self, host: int, number: int) -> None:
        """Send a signal to every process of a host. They are suspended meanwhile, so that none can react to another."""
        for sent in (signal.SIGSTOP, number):
            for pid in self.processes(host):
                try:
                    os.kill(pid, sent)
                except ProcessLookupError:
                    pass

    def cut_cable(self) -> None:
        """Disconnect the hosts: what they send is lost, and connections stay open."""
        _ip("-n", self.names[1], "link", "set", INTERFACE, "down")

    def join_cable(self) -> None:
        """Connect the hosts again."""
        _ip("-n", self.names[1], "link", "set", INTERFACE, "up")


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
