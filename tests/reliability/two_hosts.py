"""Training and filling a cache on two hosts (hosts.py): the cable is cut, a host is killed, suspended or asked to stop.

    python -m tests.reliability.two_hosts --table table.md        about 4 minutes on two cores

Every run is started by torchrun on both hosts. After a fault the other host must end within 60 s and print a reason,
and the run, started again, must end as the undisturbed one, bit for bit. Otherwise the exit code is 1; it is 3 where
the machine permits no network namespaces.
"""

import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import ROOT, ct, write_nifti, write_scans
from tests.reliability.difference import difference
from tests.reliability.hosts import ADDRESSES, INTERFACE, TwoHosts, why_unavailable
from tests.reliability.report import options, report
from tests.reliability.scenarios import GLMAE

EXIT_UNAVAILABLE = 3
SLOTS = 3
LIMIT = 60.0
EPOCHS, PER_EPOCH = 10, 16
FLAGS = (
    f"{GLMAE} --batch_size 4 --samples_per_epoch {4 * PER_EPOCH} --epochs {EPOCHS} --warmup_epochs 1 --save_every 4 "
    "--save_minutes none --log_every 5 --lr 1e-3 --workers 1 --device cpu"
)
REASON = re.compile(
    r"error: .*|stopped by a signal: .*|Connection (?:closed|reset) by peer|The connection to the C10d store has failed"
)
VOLUMES, PROCESSES, DIES = 24, 4, 2


@dataclass(frozen=True)
class Lab:
    """A folder that both hosts share, with scans and the undisturbed run."""

    folder: Path

    @property
    def reference(self) -> Path:
        return self.folder / "undisturbed"

    def torchrun(self, host: int, out: Path) -> list[str]:
        """Return the command that starts the run on a host."""
        launcher = f"--nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d --rdzv_endpoint={ADDRESSES[0]}:29400"
        # Both hosts have the name of this machine, so torchrun cannot find out which of them hosts the rendezvous.
        launcher += f" --rdzv_id=1 --rdzv_conf=is_host={1 - host} --local_addr={ADDRESSES[host]}"
        data = f"--datalist {self.folder / 'scans'} --cache_dir {self.folder / 'cache'} --out_dir {out}"
        words = f"-m torch.distributed.run {launcher} -m Pretrain.main_pretrain {FLAGS} {data}"
        return [sys.executable, *words.split()]

    def start(self, hosts: TwoHosts, out: Path) -> list[subprocess.Popen]:
        """Start the run on both hosts."""
        out.mkdir(exist_ok=True)
        return [start(hosts, host, self.torchrun(host, out), output(out, host)) for host in range(2)]

    def finish(self, out: Path) -> None:
        """Start or resume the run, and wait for its end."""
        with TwoHosts() as hosts:
            check_success(self.start(hosts, out), out)


def start(hosts: TwoHosts, host: int, command: list[str], printed: Path) -> subprocess.Popen:
    environment = {"GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return hosts.start(host, command, printed, environment)


def output(out: Path, host: int) -> Path:
    """Return the file with what a host printed."""
    return out / f"output-host{host}.txt"


def check_success(programs: list[subprocess.Popen], out: Path) -> None:
    codes = [program.wait(timeout=300) for program in programs]
    assert not any(codes), f"exit codes {codes}:\n{output(out, 0).read_text(errors='replace')[-3000:]}"


def wait_for_epoch(out: Path, epochs: int) -> None:
    """Wait until so many epochs are logged."""
    end, log = time.monotonic() + 120, out / "log.jsonl"
    while not log.exists() or log.read_text().count("\n") < epochs:
        assert time.monotonic() < end, f"did not start:\n{output(out, 0).read_text(errors='replace')[-3000:]}"
        time.sleep(0.05)


def seconds_until_ended(hosts: TwoHosts, host: int) -> float:
    """Wait until no process is left on a host, and return the seconds."""
    began = time.monotonic()
    while hosts.processes(host):
        assert time.monotonic() - began < LIMIT, f"host {host} has not ended after {LIMIT:.0f} s"
        time.sleep(0.1)
    return time.monotonic() - began


def reason(out: Path, host: int) -> str:
    """Return the first reason that a host printed."""
    found = REASON.search(output(out, host).read_text(errors="replace"))
    assert found, f"host {host} printed no reason:\n{output(out, host).read_text(errors='replace')[-3000:]}"
    return found[0].removeprefix("error: ").partition(";")[0]


# ---------------------------------------------------------------- faults in training


def ends(
    fault: Callable[[TwoHosts, list[subprocess.Popen]], None],
    others: tuple[int, ...],
    then: Callable[[TwoHosts], None] | None = None,
) -> Callable[[Lab, Path, int], str]:
    """Return a trial in which a fault ends the run.

    Args:
        others: hosts that must end by themselves and print a reason.
        then: called when they have ended; after it the remaining host must end too.
    """

    def trial(lab: Lab, out: Path, number: int) -> str:
        with TwoHosts() as hosts:
            programs = lab.start(hosts, out)
            wait_for_epoch(out, random.Random(number).randint(2, 5))
            fault(hosts, programs)
            with ThreadPoolExecutor() as threads:
                seconds = list(threads.map(lambda host: seconds_until_ended(hosts, host), others))
            if then:
                then(hosts)
                for host in {0, 1}.difference(others):
                    seconds_until_ended(hosts, host)
        notes = [f"host {host} after {took:.0f} s: {reason(out, host)}" for host, took in zip(others, seconds)]
        lab.finish(out)
        return "; ".join(notes)

    return trial


def continues(
    fault: Callable[[TwoHosts], None], seconds: float, then: Callable[[TwoHosts], None]
) -> Callable[[Lab, Path, int], str]:
    """Return a trial in which a fault lasts for so many seconds, and the run continues."""

    def trial(lab: Lab, out: Path, number: int) -> str:
        with TwoHosts() as hosts:
            programs = lab.start(hosts, out)
            wait_for_epoch(out, random.Random(number).randint(2, 5))
            fault(hosts)
            time.sleep(seconds)
            then(hosts)
            check_success(programs, out)
        return "the run continued"

    return trial


def signals(host: int, number: int) -> Callable:
    return lambda hosts, programs=(): hosts.signal(host, number)


def cut(hosts: TwoHosts, programs: object = ()) -> None:
    hosts.cut_cable()


def ask_to_stop(hosts: TwoHosts, programs: list[subprocess.Popen]) -> None:
    programs[1].terminate()


# ---------------------------------------------------------------- the cache


def fill(folder: str, number: str) -> None:
    """Fill the cache in one of the processes. Process DIES is killed while it writes its third volume."""
    import generate_cache_files
    from common.cache import build, storage
    from common.cli import run_program

    write_volume, write_image, started = build._write_volume, storage.write_image, []

    def recorded(case, *args):
        started.append(case)
        note(folder, "start", case.name)
        write_volume(case, *args)
        note(folder, "end", case.name)

    def killed(*args):
        result = write_image(*args)
        if int(number) == DIES and len(started) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    build._write_volume, storage.write_image = recorded, killed
    note(folder, "ready", number)
    while len(notes(folder, "ready")) < PROCESSES:
        time.sleep(0.01)
    sys.argv = ["generate_cache_files.py", "--datalist", f"{folder}/scans", "--cache_dir", f"{folder}/cache"]
    sys.exit(run_program(generate_cache_files.main))


def note(folder: str | Path, event: str, name: str) -> None:
    with open(f"{folder}/events.txt", "a") as file:
        file.write(f"{event} {name}\n")


def notes(folder: str | Path, event: str) -> list[str]:
    """Return the names of the events of one kind so far."""
    lines = [line.split(maxsplit=1) for line in Path(f"{folder}/events.txt").read_text().splitlines()]
    return [name for kind, name in lines if kind == event]


def cache_filled(lab: Lab, out: Path, number: int) -> str:
    """Fill a cache by two processes on each host, of which one is killed."""
    for scan in range(VOLUMES):
        write_nifti(out / f"scans/scan{scan:02}.nii.gz", ct((64, 64, 64), seed=scan))
    with TwoHosts() as hosts:
        programs = []
        for process in range(PROCESSES):
            code = f"from tests.reliability.two_hosts import fill; fill({str(out)!r}, '{process}')"
            programs.append(start(hosts, process % 2, [sys.executable, "-c", code], output(out, process)))
        codes = [program.wait(timeout=300) for program in programs]
    assert codes == [-signal.SIGKILL if process == DIES else 0 for process in range(PROCESSES)], codes
    ended, started = Counter(notes(out, "end")), Counter(notes(out, "start"))
    assert len(ended) == VOLUMES and set(ended.values()) == {1}, ended
    again = [name for name, times in started.items() if times > 1]
    assert len(again) == 1 and started.total() == VOLUMES + 1, started
    check = [sys.executable, "generate_cache_files.py", "--verify", "--cache_dir", str(out / "cache")]
    verified = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert f"verify: {VOLUMES} volumes, all complete" in verified.stdout, verified.stdout + verified.stderr
    return (
        f"{VOLUMES} volumes complete, each built once; the one that the killed process was writing by another process"
    )


# ---------------------------------------------------------------- the program

CONTINUE_0, CONTINUE_1 = (signals(host, signal.SIGCONT) for host in range(2))
TRIALS = {
    "cable cut": ends(cut, (0, 1)),
    "host 0 suspended, continued after the other has ended": ends(signals(0, signal.SIGSTOP), (1,), CONTINUE_0),
    "host 1 suspended, continued after the other has ended": ends(signals(1, signal.SIGSTOP), (0,), CONTINUE_1),
    "host 0 killed": ends(signals(0, signal.SIGKILL), (1,)),
    "host 1 killed": ends(signals(1, signal.SIGKILL), (0,)),
    "SIGTERM to torchrun on host 1": ends(ask_to_stop, (0,)),
    "cable cut for 5 s": continues(cut, 5.0, TwoHosts.join_cable),
    "host 0 suspended for 8 s": continues(signals(0, signal.SIGSTOP), 8.0, CONTINUE_0),
    "host 1 suspended for 8 s": continues(signals(1, signal.SIGSTOP), 8.0, CONTINUE_1),
}
CACHE_TRIAL = "cache filled by four processes, one of them killed"


def run_one(lab: Lab, number: int, name: str) -> tuple[str, bool, str]:
    """Run a trial, and return its name, whether it passed, and what was observed."""
    out = lab.folder / f"trial-{number}"
    try:
        if name == CACHE_TRIAL:
            return name, True, cache_filled(lab, out, number)
        observed = TRIALS[name](lab, out, number)
        found = difference(out, lab.reference)
        return name, not found, found or observed
    except Exception as error:
        traceback.print_exc()
        return name, False, f"{type(error).__name__}: {error}".splitlines()[0]


def run_all(folder: Path, only: str) -> list[tuple[str, bool, str]]:
    """Run the trials whose name contains `only`, `SLOTS` at a time."""
    lab = Lab(folder)
    write_scans(folder / "scans")
    lab.finish(lab.reference)
    names = [name for name in (*TRIALS, CACHE_TRIAL) if only in name]
    with ThreadPoolExecutor(SLOTS) as threads:
        return list(threads.map(lambda item: run_one(lab, *item), enumerate(names)))


def table(results: list[tuple[str, bool, str]]) -> str:
    """Return a Markdown table with one row per trial."""
    rows = [f"| {name} | {'yes' if passed else 'NO'} | {note} |" for name, passed, note in results]
    return "\n".join(["| fault | ended as undisturbed | observed |", "|---|---|---|", *rows])


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--only", default="", help="run the trials whose name contains this text")
    given = parser.parse_args()
    if missing := why_unavailable():
        print(f"two hosts: not tested here: {missing}", file=sys.stderr)
        return EXIT_UNAVAILABLE
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        results = run_all(given.keep or Path(scratch), given.only)
    report(table(results), "", began, given.table)
    return 0 if all(passed for _, passed, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
