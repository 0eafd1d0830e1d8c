"""Which runs of a sweep are next, and doing several at once."""

import os
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from common.programs import Programs
from common.resources import duration
from common.runlog import print_main
from common.signals import SIGNALS, Requeue, forward_signals, is_stop, stop_requested
from Finetune.evaluation.statistics import mean
from Finetune.sweeps.plan import Group, Plan, SweepRun, SweepSettings
from Finetune.sweeps.runs import Program, case_scores, execute, is_done


def development_scores(group: Group, plan: Plan) -> list[float | None]:
    """Return the mean score on the development cases of each candidate; None for one that is not done."""
    scores: list[float | None] = []
    for number in range(len(plan.candidates)):
        run = group.runs[number, plan.seeds[0]]
        of_cases = case_scores(run, plan.preset) if is_done(run, plan.preset) else {}
        scores.append(mean(of_cases.get(name) for name in plan.development))
    return scores


def chosen(group: Group, plan: Plan) -> int | None:
    """Return the number of the candidate with the best development score, the first of equals.

    None while a candidate is not done: with a part of the grid a group would be at a disadvantage. The only candidate
    is chosen without a score.
    """
    runs = [group.runs[number, plan.seeds[0]] for number in range(len(plan.candidates))]
    if len(runs) == 1:
        return 0
    if not all(is_done(run, plan.preset) for run in runs):
        return None
    scores = development_scores(group, plan)
    # no score: no development case holds a class
    return max(range(len(runs)), key=lambda number: scores[number] if scores[number] is not None else -1.0)


def next_runs(group: Group, plan: Plan) -> list[SweepRun]:
    """Return the runs of a group that can be done now and are not: its candidates, then the seeds of the chosen one."""
    best = chosen(group, plan)
    first = [group.runs[number, plan.seeds[0]] for number in range(len(plan.candidates))]
    others = [] if best is None else [group.runs[best, seed] for seed in plan.seeds[1:]]
    return [run for run in first + others if not is_done(run, plan.preset)]


# ---------------------------------------------------------------- running


@dataclass
class Job:
    """A run that is being done. `steps` yields its programs (see `execute`)."""

    run: SweepRun
    steps: Generator[Program, int, str | None]
    slot: int
    began: float = field(default_factory=time.monotonic)


class Schedule:
    """Does the runs of some groups of a plan, `config.jobs` at once.

    `failures` has run -> reason for those that failed; the others go on.
    """

    def __init__(self, config: SweepSettings, plan: Plan, groups: Sequence[Group], programs: Programs):
        self.config, self.plan, self.groups, self.programs = config, plan, groups, programs
        self.failures: dict[str, str] = {}
        self.tried: set[str] = set()
        self.running: dict[str, Job] = {}
        self.slots = deque(range(config.jobs))
        self.devices = cuda_devices() if config.jobs > 1 else []
        self.threads = max(1, torch.get_num_threads() // config.jobs)
        self.total = len(groups) * (len(plan.candidates) + len(plan.seeds) - 1)
        self.stopped = False
        self.began, self.finished = time.monotonic(), 0

    def run(self) -> None:
        """Do all runs that are not done.

        Raises:
            Requeue: after the current runs have saved, if this process or a program was asked to stop.
        """
        if done := self.number_done():
            print_main(f"{done} of {self.total} runs are done already")
        with forward_signals(self.programs.send_signal):
            self.start_runs()
            while self.running:
                key, code = self.programs.wait()
                self.proceed(self.running[key], code)
                self.start_runs()
            self.stopped = self.stopped or stop_requested()
        if self.stopped:
            raise Requeue

    def start_runs(self) -> None:
        """Start runs until `jobs` are running or none is left for now."""
        for run in self.waiting():
            if not self.slots or self.stopped or stop_requested():
                return
            print_main(f"{run.title} -> {run.folder}")
            self.tried.add(run.title)
            job = Job(run, execute(self.config, self.plan, run), self.slots.popleft())
            self.running[run.title] = job
            self.proceed(job, None)

    def waiting(self) -> Iterator[SweepRun]:
        for group in self.groups:
            yield from (run for run in next_runs(group, self.plan) if run.title not in self.tried)

    def proceed(self, job: Job, code: int | None) -> None:
        """Start the next program of a run, whose last one ended with `code` (None: it has had none)."""
        if code is not None and is_stop(code) and not self.stopped:
            self.stopped = True
            # the other runs save, too
            self.programs.send_signal(SIGNALS[0])
        if code is not None and (self.stopped or stop_requested()):
            job.steps.close()
            self.end(job)
            return
        try:
            program = job.steps.send(code)
        except StopIteration as end:
            self.end(job)
            self.report(job, end.value)
            return
        environment = {}
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices[job.slot % len(self.devices)]
        key, threads = job.run.title, self.threads
        self.programs.start(key, program.module, program.flags, program.log, program.lock, threads, environment)

    def end(self, job: Job) -> None:
        del self.running[job.run.title]
        self.slots.append(job.slot)

    def report(self, job: Job, reason: str | None) -> None:
        """Print how a run ended, and about how long the others will take."""
        if reason:
            self.failures[job.run.title] = reason
            print_main(f"{job.run.title}: FAILED: {reason}")
            return
        self.finished += 1
        done, now = self.number_done(), time.monotonic()
        left = (now - self.began) / self.finished * (self.total - done)
        line = f"{job.run.title}: done in {now - job.began:.0f} s; {done} of {self.total} runs are done"
        print_main(f"{line}, about {duration(left)} left" if done < self.total else line)

    def number_done(self) -> int:
        """Return how many runs of the sweep are done: those of candidates, and of the seeds of the chosen ones."""
        return self.total - sum(self.number_left(group) for group in self.groups)

    def number_left(self, group: Group) -> int:
        unknown = len(self.plan.seeds) - 1 if chosen(group, self.plan) is None else 0
        return len(next_runs(group, self.plan)) + unknown


def cuda_devices() -> list[str]:
    """Return the CUDA devices as they are named in CUDA_VISIBLE_DEVICES."""
    count = torch.cuda.device_count()
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return names[:count] or list(map(str, range(count)))
