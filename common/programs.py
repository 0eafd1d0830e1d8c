"""Run this repository's programs as processes that spend no time on imports.

A server process imports the modules once and computes nothing, so that it can be forked safely. For each program it
forks a process, which runs the module's `main`. Signals reach the programs through the server. It asks them to stop
when the process that started it has ended, whichever way. Linux only.
"""

import contextlib
import ctypes
import importlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from common.cli import run_program
from common.errors import InputError
from common.signals import SIGNALS, install_handlers

ROOT = Path(__file__).resolve().parents[1]
# bytes of a message, more than the flags of any program
LARGEST = 1 << 17
PR_SET_PDEATHSIG = 1


class Programs:
    """A server of programs, to be used in a `with` block. At its end all programs are asked to stop and waited for.

    Args:
        modules: names of the modules of the programs, each with a `main()` that reads `sys.argv`.
    """

    def __init__(self, modules: Sequence[str]):
        # each message arrives complete, also when a signal handler sends one
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        # imports start neither threads nor CUDA, which do not survive a fork
        alone = {"OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        environment = os.environ | {"PYTHONPATH": path} | alone
        command = [sys.executable, "-m", "common.programs", str(theirs.fileno()), *modules]
        with theirs:
            self._server = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=(theirs.fileno(),))

    def __enter__(self) -> "Programs":
        return self

    def __exit__(self, *error: object) -> None:
        self._channel.close()
        self._server.wait()

    def start(
        self,
        key: str,
        module: str,
        flags: Sequence[str],
        log: int,
        lock: int,
        threads: int,
        environment: Mapping[str, str],
    ) -> None:
        """Start a program.

        Args:
            key: what `wait` calls it.
            log: descriptor of an open file for its output.
            lock: another descriptor that it holds until it has ended.
            threads: of torch.
            environment: variables to set.
        """
        request = {"key": key, "module": module, "flags": list(flags), "threads": threads}
        request["environment"] = dict(environment)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self._channel, [json.dumps(request).encode()], [log, lock])

    def wait(self) -> tuple[str, int]:
        """Wait until a program has ended. Return its key and its exit code, -N if signal N has ended it.

        Raises:
            InputError: the server has ended.
        """
        try:
            answer = self._channel.recv(LARGEST)
        except ConnectionResetError:
            answer = b""
        if not answer:
            raise InputError(f"the process that starts the programs has ended with code {self._server.wait()}")
        key, code = json.loads(answer)
        return key, code

    def send_signal(self, number: int) -> None:
        """Send a signal to all programs that run."""
        with contextlib.suppress(OSError):
            self._channel.send(json.dumps({"signal": number}).encode())


# ---------------------------------------------------------------- the server


def serve(channel: socket.socket, modules: Sequence[str]) -> None:
    """Start the programs that are asked for through `channel` until it is closed, then stop those that run."""
    # what a terminal or Slurm sends to the process group; a program unblocks them when it can handle them
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for module in modules:
        importlib.import_module(module)
    running: dict[str, BaseProcess] = {}
    is_open = True
    while is_open or running:
        ready = wait([*([channel] if is_open else []), *(process.sentinel for process in running.values())])
        for key in [key for key, process in running.items() if process.sentinel in ready]:
            process = running.pop(key)
            process.join()
            with contextlib.suppress(OSError):
                channel.send(json.dumps([key, process.exitcode]).encode())
        if channel in ready:
            is_open = _answer(channel, running)


def _answer(channel: socket.socket, running: dict[str, BaseProcess]) -> bool:
    """Do what the next message asks for. Return False if the channel is closed."""
    try:
        message, descriptors, _, _ = socket.recv_fds(channel, LARGEST, 2)
    except ConnectionResetError:
        message = b""
    request = json.loads(message) if message else {"signal": signal.SIGTERM}
    if "signal" in request:
        for process in running.values():
            if process.exitcode is None:
                os.kill(process.pid, request["signal"])
        return bool(message)
    process = multiprocessing.get_context("fork").Process(target=_run, args=(channel, request, *descriptors))
    process.start()
    running[request["key"]] = process
    for descriptor in descriptors:
        os.close(descriptor)
    return True


def _run(channel: socket.socket, request: Mapping[str, Any], log: int, lock: int) -> None:
    """Run a program in this process, which has just been forked. The inherited `lock` stays open."""
    channel.close()
    for stream in (1, 2):
        os.dup2(log, stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    install_handlers()
    # the server may be killed
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    os.environ["OMP_NUM_THREADS"] = str(request["threads"])
    os.environ.update(request["environment"])
    torch.set_num_threads(request["threads"])
    sys.argv = [request["module"], *request["flags"]]
    raise SystemExit(run_program(importlib.import_module(request["module"]).main))


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
