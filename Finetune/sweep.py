"""A grid of fine-tuning runs: {initialisations} x {label counts} x {seeds}, one table, one curve.

    python -m Finetune.sweep --preset BTCV --data DIR --inits scratch,glmae.pth,mae.pth --label_counts 3,6,12,24
    --seeds 0,1,2 --out DIR

Every cell is trained, predicted and scored in a folder of its own by the ordinary programs, one after another. Start
the command again at any point: what is done is skipped, what was interrupted goes on from its last checkpoint. A cell
that fails is reported and the rest goes on. Asked to stop (SIGTERM, SIGUSR1) it waits until its cell has saved. On a
SLURM cluster, --slurm writes an array script with one task per cell; the same command without it collects the results.

A scratch cell is the twin of the first checkpoint: its architecture, its schedule, its seed, its labels, random
weights.
"""

import hashlib
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.cli import parse, run_program
from common.config import from_dict, load_yaml, setting, to_dict
from common.data.datalist import DATA_ROOT_HELP, Case
from common.errors import InputError
from common.files import check_writable, file_sha256, lock_folder, save_bytes
from common.runlog import print_main
from common.signals import run_child
from Finetune.cases import few_labels, find_cases, split
from Finetune.evaluate import labels_by
from Finetune.evaluation.metrics import case_means
from Finetune.evaluation.report import CSV, JSON, read_scores
from Finetune.evaluation.sweep_report import as_table, draw, short_name, summary, versus
from Finetune.main_finetune import FinetuneSettings
from Finetune.presets import Preset, load_preset

ROOT = Path(__file__).resolve().parents[1]
OURS = (
    "preset",
    "data",
    "data_root",
    "init",
    "checkpoint",
    "scratch_twin",
    "label_count",
    "label_fraction",
    "label_seed",
    "seed",
    "fold",
)


@dataclass(kw_only=True)
class SweepSettings:
    """Settings of a comparison."""

    preset: str = setting(help="data set: a name of Finetune/datasets/, or the path of a YAML of one's own")
    data: Path = setting(help="its folder in the published layout, or a Decathlon JSON")
    data_root: Path | None = setting(None, DATA_ROOT_HELP)
    out: Path = setting(help="folder for cells/, compare.json, compare.txt, compare.png")
    inits: str = setting("scratch", "initialisations, separated by commas: scratch, or checkpoints")
    label_counts: str = setting("all", "numbers of training cases, separated by commas; all is every one")
    seeds: str = setting("0", "seeds, separated by commas; a seed also draws which cases are taken")
    fold: int = setting(0, "this fold is scored")
    settings: Path | None = setting(
        None, "YAML of Finetune.main_finetune's settings (epochs, model, ...), the same for every cell"
    )
    cache_dir: Path = setting(Path("cache"), "where preprocessed volumes are kept")
    slurm: bool = setting(False, "write OUT/array.sbatch instead of running")
    slurm_options: str = setting("--gpus=1 --cpus-per-task=8 --time=24:00:00", "options of the array's tasks")
    only: int | None = setting(None, "run this cell alone (its number), as a task of the array does")


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    init: str
    count: int
    seed: int
    flags: tuple[str, ...]
    folder: Path
    validation: tuple[Case, ...]  # is predicted and scored

    @property
    def title(self) -> str:
        return f"{Path(self.init).name if self.init != 'scratch' else 'scratch'}, {self.count} labels, seed {self.seed}"

    @property
    def done(self) -> bool:
        return (self.folder / "scores" / JSON).is_file() and (self.folder / "scores" / CSV).is_file()


def main(argv: list[str] | None = None) -> None:
    config = parse(SweepSettings, argv, description=__doc__)
    preset = load_preset(config.preset)
    cells = plan(config, preset)
    check_writable(config.out)
    if config.slurm:
        write_array(config, len(cells), sys.argv[1:] if argv is None else argv)
        return
    if config.only is not None and not 0 <= config.only < len(cells):
        raise InputError(f"only: found {config.only}, there are the cells 0..{len(cells) - 1}")
    chosen = cells if config.only is None else [cells[config.only]]
    failures = {}
    for number, cell in enumerate(chosen, start=1):
        if cell.done:
            print_main(f"cell {number}/{len(chosen)}: {cell.title}: done before")
            continue
        print_main(f"cell {number}/{len(chosen)}: {cell.title} -> {cell.folder}")
        reason = run_cell(config, preset, cell)
        if reason:
            failures[cell.title] = reason
            print_main(f"cell {number}/{len(chosen)}: FAILED: {reason}")
    if config.only is None:
        table = collect(config, cells, failures)
        print_main(table)
    if failures:
        raise InputError(f"{len(failures)} of {len(chosen)} cells failed; the log of each is in its folder")


# ---------------------------------------------------------------- the grid


def plan(config: SweepSettings, preset: Preset) -> list[Cell]:
    """The cells in order. InputError for what can be seen to be wrong before the first run."""
    if preset.task != "segmentation":
        raise InputError(f"preset {preset.name}: is for {preset.task}, a grid compares segmentations")
    inits = _items(config.inits, "inits")
    for init in inits:
        if init != "scratch" and not Path(init).is_file():
            raise InputError(f"inits: found '{init}', needs scratch or an existing checkpoint")
    names = [short_name(init) for init in inits]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise InputError(f"inits: found two that would be called {double}, which is the name of folder and file")
    common = load_yaml(config.settings) or {} if config.settings else {}
    needed = {"preset": preset.name, "data": str(config.data), "out_dir": str(config.out)}
    from_dict(needed | common if isinstance(common, dict) else common, FinetuneSettings, str(config.settings))
    taken = sorted(set(common) & {*OURS, "out_dir", "cache_dir"})
    if taken:
        raise InputError(f"{config.settings}: found '{taken[0]}', which the grid sets itself")
    training, validation = split(find_cases(preset, config.data, config.data_root), preset, config.fold)
    problem = next((case.problem for case in [*training, *validation] if case.problem), None)
    if problem:
        raise InputError(problem)
    cases = [[case.name for case in part] for part in (training, validation)]
    first = next((init for init in inits if init != "scratch"), None)
    cells = []
    for init in inits:
        texts = _items(config.label_counts, "label_counts")
        counts = [len(training) if text == "all" else _number(text, "label_counts") for text in texts]
        for count in dict.fromkeys(counts):  # all may be a number that is named as well
            few_labels(training, preset, count)
            for seed in dict.fromkeys(_number(text, "seeds") for text in _items(config.seeds, "seeds")):
                start = ["--init", init] if init != "scratch" or not first else ["--init", first, "--scratch_twin"]
                flags = [*start, "--label_count", str(count), "--label_seed", str(seed), "--seed", str(seed)]
                what = [to_dict(preset), common, config.fold, cases, _hash_of(init, first), count, seed]
                key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]
                folder = config.out / "cells" / f"{short_name(init)}-{count}-seed{seed}-{key}"
                cells.append(Cell(init, count, seed, tuple(flags), folder, tuple(validation)))
    return cells


def _hash_of(init: str, first: str | None) -> list[str | None]:
    """What a cell starts from: content, not path. A scratch cell depends on the checkpoint whose twin it is."""
    return ["scratch", file_sha256(first) if first else None] if init == "scratch" else [file_sha256(init)]


def _items(text: str, name: str) -> list[str]:
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise InputError(f"{name}: found '{text}', needs at least one value")
    return items


def _number(text: str, name: str) -> int:
    if not text.isdecimal():
        raise InputError(f"{name}: found '{text}', needs whole numbers separated by commas")
    return int(text)


# ---------------------------------------------------------------- one cell


def run_cell(config: SweepSettings, preset: Preset, cell: Cell) -> str | None:
    """Train, predict, score in `cell.folder`; None when done, else the reason in one line. The output goes to log.txt
    there."""
    check_writable(cell.folder)
    with lock_folder(cell.folder) as lock:  # the programs inherit it, so it holds as long as one of them goes on
        if lock is None:
            return "another process is at it (its start was interrupted, its training goes on?)"
        return _run_programs(config, preset, cell, lock)


def _run_programs(config: SweepSettings, preset: Preset, cell: Cell, lock: int) -> str | None:
    entries = [
        {"name": case.name, "image": str(case.image.resolve()), "label": str(case.label.resolve())}
        for case in cell.validation
    ]
    listing = {"labels_by": labels_by(config.data, preset), "training": entries}
    cases = (cell.folder / "cases.json").resolve()
    save_bytes(cases, json.dumps(listing, indent=1).encode())
    run, predictions = (cell.folder / "run").resolve(), (cell.folder / "predictions").resolve()
    train = ["Finetune.main_finetune", *(["--config", str(config.settings.resolve())] if config.settings else [])]
    train += ["--preset", _preset(config), "--data", str(config.data.resolve()), "--fold", str(config.fold)]
    if config.data_root:
        train += ["--data_root", str(config.data_root.resolve())]
    train += ["--cache_dir", str(config.cache_dir.resolve()), "--out_dir", str(run), *_absolute(cell.flags)]
    predict = ["Finetune.predict", "--checkpoint", str(run), "--images", str(cases)]
    predict += ["--out", str(predictions), "--no-overlays"]
    score = ["Finetune.evaluate", "--predictions", str(predictions), "--labels", str(cases)]
    score += ["--preset", _preset(config), "--out", str((cell.folder / "scores").resolve()), "--worst", "1"]
    for command in (train, predict, score):
        with open(cell.folder / "log.txt", "a") as log:
            code = run_child(
                [sys.executable, "-m", *command],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                pass_fds=(lock,),
            )
        if code:
            return f"{command[0]} ended with code {code}: {_last_line(cell.folder / 'log.txt')}"
    return None


def _preset(config: SweepSettings) -> str:
    return str(Path(config.preset).resolve()) if config.preset.endswith((".yaml", ".yml")) else config.preset


def _absolute(flags: Sequence[str]) -> list[str]:
    """Flags with the checkpoint's path made absolute: a cell runs from the project's root."""
    return [
        str(Path(f).resolve()) if previous == "--init" and f != "scratch" else f
        for previous, f in zip(["", *flags], flags)
    ]


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").replace("\r", "\n").split("\n")
    wanted = [line for line in lines if line.startswith("error:") or "Error" in line]
    return (wanted or [line for line in lines if line.strip()] or ["no output"])[-1].strip()[:300]


def write_array(config: SweepSettings, count: int, argv: Sequence[str]) -> None:
    """OUT/array.sbatch: one task per cell, which goes on by itself after a time limit, as scripts/slurm/compare.sbatch
    does."""
    arguments = shlex.join(word for word in argv if word not in ("--slurm", "--no-slurm"))
    options = "\n".join(f"#SBATCH {option}" for option in config.slurm_options.split())
    out = config.out.resolve()
    script = f"""#!/usr/bin/env bash
#SBATCH --job-name=compare
#SBATCH --array=0-{count - 1}
#SBATCH --output={out}/array-%a.txt
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
#SBATCH --requeue
{options}
# One cell of the grid per task. Interrupted, it goes back into the queue, and goes on where it was.
# When all are done, the same command without --slurm collects.
set -euo pipefail
cd {shlex.quote(str(Path.cwd()))}
export PYTHONPATH={shlex.quote(str(ROOT))}
source {shlex.quote(str(ROOT / "scripts/slurm/requeue.sh"))}
run_or_requeue {shlex.quote(str(out))} \\
  srun {shlex.quote(sys.executable)} -m Finetune.sweep {arguments} --no-slurm --only "$SLURM_ARRAY_TASK_ID"
"""
    save_bytes(config.out / "array.sbatch", script.encode())
    print_main(f"{count} cells: sbatch {config.out / 'array.sbatch'}")


# ---------------------------------------------------------------- the table


def collect(config: SweepSettings, cells: Sequence[Cell], failures: dict[str, str]) -> str:
    """compare.json, compare.txt and compare.png from the cells that are done; returns the table."""
    rows = []
    for init, count in dict.fromkeys((cell.init, cell.count) for cell in cells):
        group = [cell for cell in cells if (cell.init, cell.count) == (init, count)]
        done = {cell.seed: case_means(read_scores(cell.folder / "scores")[0], "dice") for cell in group if cell.done}
        rows.append(summary(init, count, len(group), done))
    by_key = {(row["init"], row["count"]): row for row in rows}
    for row in rows:
        row["minus_scratch"] = versus(row, by_key.get(("scratch", row["count"]))) if row["init"] != "scratch" else None
    for row in rows:
        del row["cases"]
    result = {"preset": config.preset, "fold": config.fold, "rows": rows, "failed": failures}
    table = as_table(result)
    save_bytes(config.out / "compare.json", json.dumps(result, indent=2).encode())
    save_bytes(config.out / "compare.txt", table.encode())
    draw(config.out / "compare.png", rows)
    return table


if __name__ == "__main__":
    sys.exit(run_program(main))
