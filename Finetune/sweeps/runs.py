"""One run of a sweep: the programs that train, predict and score it, and its scores."""

import csv
import os
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import check_writable, lock_folder
from Finetune.evaluation.classification import CLASSES_CSV, CLASSES_JSON
from Finetune.evaluation.formats import write_json
from Finetune.evaluation.metrics import case_means
from Finetune.evaluation.protocol import labels_by
from Finetune.evaluation.report import CSV, JSON, read_card
from Finetune.presets import Preset
from Finetune.sweeps.plan import Plan, SweepRun, SweepSettings

TRAIN, PREDICT, EVALUATE = "Finetune.main_finetune", "Finetune.predict", "Finetune.evaluate"


@dataclass(frozen=True)
class Program:
    """A program to run. `log` and `lock` are descriptors of files that it inherits."""

    module: str
    flags: tuple[str, ...]
    log: int
    lock: int


def is_done(run: SweepRun, preset: Preset) -> bool:
    """Return whether the run has its scores."""
    if preset.task == "classification":
        return (run.folder / "training" / CLASSES_JSON).is_file()
    return all((run.folder / "scores" / name).is_file() for name in (JSON, CSV))


def case_scores(run: SweepRun, preset: Preset) -> dict[str, float | None]:
    """Return held-out case -> score of a run that is done.

    The score is the mean Dice over the classes of the case (None where no class has one), or 1 for the right class and
    0 for a wrong one.
    """
    if preset.task == "classification":
        with open(run.folder / "training" / CLASSES_CSV, newline="") as file:
            return {row["case"]: float(row["class"] == row["predicted"]) for row in csv.DictReader(file)}
    return case_means(read_card(run.folder / "scores")[0], "dice")


def execute(config: SweepSettings, plan: Plan, run: SweepRun) -> Generator[Program, int, str | None]:
    """Train, predict and score in the folder of the run: yield each program to run, and be sent its exit code.

    The output of the programs is appended to log.txt. Returns None if the run is done, else the reason in one line.
    """
    check_writable(run.folder)
    # the programs inherit the lock, which holds until the last of them has ended
    with lock_folder(run.folder) as lock:
        if lock is None:
            return "another process is working on it (left by an interrupted sweep?)"
        if plan.preset.task == "segmentation":
            write_json(run.folder / "cases.json", case_list(config, plan))
        log = run.folder / "log.txt"
        for module, *flags in programs(config, plan.preset, run):
            with open(log, "a") as file:
                code = yield Program(module, tuple(flags), file.fileno(), lock)
            if code:
                return f"{module} ended with code {code}: {last_error(log)}"
    return None


def case_list(config: SweepSettings, plan: Plan) -> dict[str, Any]:
    """Return the held-out cases as a Decathlon JSON of absolute paths."""
    cases = [
        {"name": case.name, "image": os.path.realpath(case.image), "label": os.path.realpath(case.label)}
        for case in plan.held_out
    ]
    return {"labels_by": labels_by(config.data, plan.preset), "training": cases}


def programs(config: SweepSettings, preset: Preset, run: SweepRun) -> list[list[str]]:
    """Return module and flags of the programs of one run, with absolute paths, since they run in the project's root."""
    folder = run.folder.resolve()
    name = str(Path(config.preset).resolve()) if config.preset.endswith((".yaml", ".yml")) else config.preset
    train = {"config": config.settings, "data": config.data, "data_root": config.data_root}
    train |= {"cache_dir": config.cache_dir, "out_dir": folder / "training"}
    commands = [[TRAIN, "--preset", name, *_paths(train), "--fold", str(config.fold), *run.flags]]
    if preset.task == "segmentation":
        predict = {"checkpoint": folder / "training", "images": folder / "cases.json", "out": folder / "predictions"}
        score = {"predictions": folder / "predictions", "labels": folder / "cases.json", "out": folder / "scores"}
        commands.append([PREDICT, *_paths(predict), "--no-overlays"])
        commands.append([EVALUATE, "--preset", name, *_paths(score), "--worst", "1"])
    return commands


def _paths(flags: dict[str, Path | None]) -> list[str]:
    return [word for name, path in flags.items() if path for word in (f"--{name}", str(path.resolve()))]


def last_error(log: Path) -> str:
    """Return the last line of a log that is an error, else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:") or "Error" in line]
    return (errors or lines or ["no output"])[-1][:300]
