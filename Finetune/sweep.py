"""Sweep fine-tuning over initialisations x numbers of labels x seeds: one table, one plot.

    python -m Finetune.sweep --preset BTCV --data DIR --inits scratch,glmae.pth,mae.pth --label_counts 3,6,12,24
    --seeds 0,1,2 --out DIR

The programs train, predict and score each run in a folder in OUT/runs, one run after another. The same command resumes
the sweep: finished runs are skipped, an interrupted one continues from its last checkpoint. A run that fails is
reported, and the others continue. On SIGTERM or SIGUSR1 the sweep ends when the current run has saved. On a SLURM
cluster, --slurm writes an array script with one task per run; the same command without it then collects the results.

A run from scratch is the twin of the first checkpoint: same architecture, schedule, seed and labels, random weights.
"""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from common.cli import parse, run_program
from common.config import convert, from_dict, load_mapping, setting, settings_of, to_dict
from common.data.datalist import Case
from common.errors import InputError
from common.files import check_writable, digest, file_sha256, lock_folder, save_bytes
from common.runlog import print_main
from common.signals import run_child
from Finetune.cases import few_labels, find_cases, split
from Finetune.evaluation.formats import write_json
from Finetune.evaluation.metrics import case_means
from Finetune.evaluation.protocol import labels_by
from Finetune.evaluation.report import CSV, JSON, read_card
from Finetune.evaluation.statistics import grouped
from Finetune.evaluation.sweep_report import draw_curves, short_name, summary, sweep_table
from Finetune.main_finetune import CaseSettings, DataSettings, FinetuneSettings, StartSettings
from Finetune.presets import Preset, load_preset

ROOT = Path(__file__).resolve().parents[1]
# settings of main_finetune that the sweep sets
OWN = {"out_dir", "seed", *settings_of(CaseSettings), *settings_of(StartSettings)}


@dataclass(kw_only=True)
class SweepSettings(DataSettings):
    """Settings of a sweep."""

    out: Path = setting(help="folder for runs/, sweep.json, sweep.txt, sweep.png")
    inits: str = setting("scratch", "initialisations, separated by commas: scratch, or checkpoints")
    label_counts: str = setting("all", "numbers of training cases, separated by commas; all: every training case")
    seeds: str = setting("0", "seeds, separated by commas; a seed also draws the training cases")
    settings: Path | None = setting(None, "YAML with settings of main_finetune (epochs, ...) for all runs")
    slurm: bool = setting(False, "write OUT/array.sbatch instead of running")
    slurm_options: str = setting("--gpus=1 --cpus-per-task=8 --time=24:00:00", "options of the array's tasks")
    only: int | None = setting(None, "number of the only run to do, as in a task of the array", least=0)


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep. `flags` are those of main_finetune that differ between runs."""

    init: str
    count: int
    seed: int
    flags: tuple[str, ...]
    folder: Path
    validation: tuple[Case, ...]

    @property
    def title(self) -> str:
        return f"{short_name(self.init)}, {self.count} labels, seed {self.seed}"

    @property
    def done(self) -> bool:
        return all((self.folder / "scores" / name).is_file() for name in (JSON, CSV))


def main(argv: list[str] | None = None) -> None:
    config = parse(SweepSettings, argv, description=__doc__)
    preset = load_preset(config.preset)
    runs = plan(config, preset)
    check_writable(config.out)
    if config.slurm:
        write_array(config, len(runs), sys.argv[1:] if argv is None else argv)
        return
    if config.only is not None and config.only >= len(runs):
        raise InputError(f"--only {config.only}: must be less than {len(runs)}, the number of runs")
    chosen = runs if config.only is None else [runs[config.only]]
    failures = execute_all(config, preset, chosen)
    if config.only is None:
        print_main(collect(config, runs, failures))
    if failures:
        raise InputError(f"{len(failures)} of {len(chosen)} runs failed; see log.txt in their folders")


# ---------------------------------------------------------------- planning


def plan(config: SweepSettings, preset: Preset) -> list[SweepRun]:
    """Return the runs in order. Raise InputError for what can be found wrong before the first one starts."""
    if preset.task != "segmentation":
        raise InputError(f"--preset {preset.name}: is for {preset.task}, expected segmentation")
    inits, common = initialisations(config), common_settings(config)
    training, validation = split(find_cases(preset, config.data, config.data_root), preset, config.fold)
    for case in [*training, *validation]:
        if case.problem:
            raise InputError(case.problem)
    # without duplicates: "all" may be a number that is also given
    words = _values(config.label_counts, Literal["all"] | int, "label_counts")
    counts = dict.fromkeys(len(training) if word == "all" else word for word in words)
    for count in counts:
        few_labels(training, preset, count)
    seeds = dict.fromkeys(_values(config.seeds, int, "seeds"))
    cases = [[case.name for case in part] for part in (training, validation)]
    shared = [to_dict(preset), common, config.fold, cases]
    runs = []
    for (init, (start, content)), count, seed in product(inits.items(), counts, seeds):
        flags = [*start, "--label_count", str(count), "--label_seed", str(seed), "--seed", str(seed)]
        key = digest([json.dumps([*shared, content, count, seed], sort_keys=True)])[:8]
        folder = config.out / "runs" / f"{short_name(init)}-{count}-seed{seed}-{key}"
        runs.append(SweepRun(init, count, seed, tuple(flags), folder, tuple(validation)))
    return runs


def initialisations(config: SweepSettings) -> dict[str, tuple[list[str], list[str]]]:
    """Return initialisation -> (flags of main_finetune, what identifies its content)."""
    inits = _values(config.inits, str, "inits")
    for init in inits:
        if init != "scratch" and not Path(init).is_file():
            raise InputError(f"--inits: found '{init}', expected scratch or an existing checkpoint")
    names = [short_name(init) for init in inits]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(f"--inits: found two that are called {repeated[0]}, expected different folders or files")
    first = next((init for init in inits if init != "scratch"), None)
    found = {}
    for init in inits:
        file = first if init == "scratch" else init
        twin = ["--scratch_twin"] if init == "scratch" else []
        start = ["--init", str(Path(file).resolve()), *twin] if file else []
        found[init] = start, [*twin, *([file_sha256(file)] if file else [])]
    return found


def common_settings(config: SweepSettings) -> dict[str, Any]:
    """Return the settings that all runs share. InputError if one is not of main_finetune, or is set by the sweep."""
    if config.settings is None:
        return {}
    common = load_mapping(config.settings)
    if taken := sorted(OWN & common.keys()):
        raise InputError(f"{config.settings}: found '{taken[0]}', which the sweep sets")
    required = {"preset": config.preset, "data": str(config.data), "out_dir": str(config.out)}
    from_dict(required | common, FinetuneSettings, str(config.settings))
    return common


def _values(text: str, kind: Any, name: str) -> list[Any]:
    """Return the values in `text`, which are separated by commas."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    return list(convert(words or [text], tuple[kind, ...], f"--{name}"))


# ---------------------------------------------------------------- running


def execute_all(config: SweepSettings, preset: Preset, runs: Sequence[SweepRun]) -> dict[str, str]:
    """Do the runs that are not done. Return run -> reason for those that failed."""
    failures = {}
    for number, run in enumerate(runs, start=1):
        place = f"run {number}/{len(runs)}: {run.title}"
        if run.done:
            print_main(f"{place}: already done")
            continue
        print_main(f"{place} -> {run.folder}")
        if reason := execute(config, preset, run):
            failures[run.title] = reason
            print_main(f"{place}: FAILED: {reason}")
    return failures


def execute(config: SweepSettings, preset: Preset, run: SweepRun) -> str | None:
    """Train, predict and score in the folder of the run. Return None if done, else the reason in one line.

    The output of the programs is appended to log.txt.
    """
    check_writable(run.folder)
    # the programs inherit the lock, which holds until the last of them has ended
    with lock_folder(run.folder) as lock:
        if lock is None:
            return "another process is working on it (left by an interrupted sweep?)"
        write_json(run.folder / "cases.json", case_list(config, preset, run))
        log = run.folder / "log.txt"
        options = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "pass_fds": (lock,)}
        for module, *flags in programs(config, run):
            with open(log, "a") as file:
                code = run_child([sys.executable, "-m", module, *flags], stdout=file, stderr=file, **options)
            if code:
                return f"{module} ended with code {code}: {last_error(log)}"
    return None


def case_list(config: SweepSettings, preset: Preset, run: SweepRun) -> dict[str, Any]:
    """Return the validation cases as a Decathlon JSON of absolute paths."""
    cases = [
        {"name": case.name, "image": os.path.realpath(case.image), "label": os.path.realpath(case.label)}
        for case in run.validation
    ]
    return {"labels_by": labels_by(config.data, preset), "training": cases}


def programs(config: SweepSettings, run: SweepRun) -> list[list[str]]:
    """Return module and flags of the programs of one run, with absolute paths, since they run in the project's root."""
    folder = run.folder.resolve()
    preset = str(Path(config.preset).resolve()) if config.preset.endswith((".yaml", ".yml")) else config.preset
    train = {"config": config.settings, "data": config.data, "data_root": config.data_root}
    train |= {"cache_dir": config.cache_dir, "out_dir": folder / "training"}
    predict = {"checkpoint": folder / "training", "images": folder / "cases.json", "out": folder / "predictions"}
    score = {"predictions": folder / "predictions", "labels": folder / "cases.json", "out": folder / "scores"}
    return [
        ["Finetune.main_finetune", "--preset", preset, *_paths(train), "--fold", str(config.fold), *run.flags],
        ["Finetune.predict", *_paths(predict), "--no-overlays"],
        ["Finetune.evaluate", "--preset", preset, *_paths(score), "--worst", "1"],
    ]


def _paths(flags: dict[str, Path | None]) -> list[str]:
    return [word for name, path in flags.items() if path for word in (f"--{name}", str(path.resolve()))]


def last_error(log: Path) -> str:
    """Return the last line of a log that is an error, else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:") or "Error" in line]
    return (errors or lines or ["no output"])[-1][:300]


def write_array(config: SweepSettings, count: int, argv: Sequence[str]) -> None:
    """Write OUT/array.sbatch: one task per run, requeued after a time limit, as in scripts/slurm/sweep.sbatch."""
    arguments = shlex.join(word for word in argv if word not in ("--slurm", "--no-slurm"))
    options = "\n".join(f"#SBATCH {option}" for option in config.slurm_options.split())
    out = config.out.resolve()
    script = f"""#!/usr/bin/env bash
#SBATCH --job-name=sweep
#SBATCH --array=0-{count - 1}
#SBATCH --output={out}/array-%a.txt
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
#SBATCH --requeue
{options}
# One run of the sweep per task. An interrupted task is requeued and resumes.
# When all tasks are done, the same command without --slurm collects the results.
set -euo pipefail
cd {shlex.quote(str(Path.cwd()))}
export PYTHONPATH={shlex.quote(str(ROOT))}
source {shlex.quote(str(ROOT / "scripts/slurm/requeue.sh"))}
run_or_requeue {shlex.quote(str(out))} \\
  srun {shlex.quote(sys.executable)} -m Finetune.sweep {arguments} --no-slurm --only "$SLURM_ARRAY_TASK_ID"
"""
    save_bytes(config.out / "array.sbatch", script.encode())
    print_main(f"{count} runs: sbatch {config.out / 'array.sbatch'}")


# ---------------------------------------------------------------- results


def collect(config: SweepSettings, runs: Sequence[SweepRun], failures: dict[str, str]) -> str:
    """Write sweep.json, sweep.txt and sweep.png from the runs that are done. Return the table."""
    planned = grouped(runs, lambda run: (run.init, run.count))
    scores = {
        key: {run.seed: case_means(read_card(run.folder / "scores")[0], "dice") for run in group if run.done}
        for key, group in planned.items()
    }
    rows = []
    for (init, count), group in planned.items():
        scratch = {} if init == "scratch" else scores.get(("scratch", count), {})
        rows.append(summary(init, count, len(group), scores[init, count], scratch))
    result = {"preset": config.preset, "fold": config.fold, "rows": rows, "failed": failures}
    table = sweep_table(result)
    write_json(config.out / "sweep.json", result)
    save_bytes(config.out / "sweep.txt", table.encode())
    draw_curves(config.out / "sweep.png", rows)
    return table


if __name__ == "__main__":
    sys.exit(run_program(main))
