"""Sweep fine-tuning over heads x initialisations x numbers of labels x seeds: one table, one plot.

    python -m Finetune.sweep --preset BTCV --data DIR --updates 10000 --inits scratch,mae=a.pth:b.pth,glmae=c.pth
    --label_counts 3,6,12,24 --seeds 0,1,2 --tune lr=1e-4,3e-4,1e-3 --settings recipe.yaml --out DIR

Every run has the same number of updates. With --tune each group (a head, an initialisation, a number of labels) tries
the whole grid with the first seed, and the setting with the best score on the development cases is used for its other
seeds; results are of the test cases. A run from scratch is the twin of the first checkpoint that fits the head: same
architecture, schedule, seeds and labels, random weights.

Each run has a folder in OUT/runs. The same command resumes the sweep: finished runs are skipped, an interrupted one
continues from its last checkpoint. A run that fails is reported, and the others continue. On SIGTERM or SIGUSR1 the
sweep ends when the current runs have saved. On a SLURM cluster, --slurm writes an array script with one task per group;
the same command without it then collects the results.
"""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.cli import parse, run_program
from common.errors import InputError
from common.files import check_writable, save_bytes
from common.programs import Programs
from common.runlog import print_main
from Finetune.evaluation.formats import write_json
from Finetune.evaluation.sweep_report import draw_curves, summary, sweep_table
from Finetune.sweeps.inits import SCRATCH
from Finetune.sweeps.plan import Group, Plan, SweepSettings, make_plan
from Finetune.sweeps.runs import EVALUATE, PREDICT, TRAIN, case_scores, is_done
from Finetune.sweeps.schedule import Schedule, chosen, development_scores

ROOT = Path(__file__).resolve().parents[1]
DYNUNET = "dynunet"
PROGRAMS = (TRAIN, PREDICT, EVALUATE, "torch.utils.tensorboard")


def main(argv: list[str] | None = None) -> None:
    config = parse(SweepSettings, argv, description=__doc__)
    plan = make_plan(config)
    check_writable(config.out)
    if config.slurm:
        write_array(config, plan, sys.argv[1:] if argv is None else argv)
        return
    if config.only is not None and config.only >= len(plan.groups):
        raise InputError(f"--only {config.only}: must be less than {len(plan.groups)}, the number of groups of runs")
    groups = plan.groups if config.only is None else [plan.groups[config.only]]
    with Programs(PROGRAMS) as programs:
        schedule = Schedule(config, plan, groups, programs)
        schedule.run()
    if config.only is None:
        print_main(collect(config, plan, schedule.failures))
    if schedule.failures:
        raise InputError(f"{len(schedule.failures)} of {schedule.total} runs failed; see log.txt in their folders")


def write_array(config: SweepSettings, plan: Plan, argv: Sequence[str]) -> None:
    """Write OUT/array.sbatch: one task per group, requeued after a time limit, as in scripts/slurm/sweep.sbatch."""
    arguments = shlex.join(word for word in argv if word not in ("--slurm", "--no-slurm"))
    options = "\n".join(f"#SBATCH {option}" for option in config.slurm_options.split())
    out = config.out.resolve()
    script = f"""#!/usr/bin/env bash
#SBATCH --job-name=sweep
#SBATCH --array=0-{len(plan.groups) - 1}
#SBATCH --output={out}/array-%a.txt
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
#SBATCH --requeue
{options}
# One group of runs (a head, an initialisation, a number of labels) per task. An interrupted task is requeued and
# resumes. When all tasks are done, the same command without --slurm collects the results.
set -euo pipefail
cd {shlex.quote(str(Path.cwd()))}
export PYTHONPATH={shlex.quote(str(ROOT))}
source {shlex.quote(str(ROOT / "scripts/slurm/requeue.sh"))}
run_or_requeue {shlex.quote(str(out))} \\
  srun {shlex.quote(sys.executable)} -m Finetune.sweep {arguments} --no-slurm --only "$SLURM_ARRAY_TASK_ID"
"""
    save_bytes(config.out / "array.sbatch", script.encode())
    print_main(f"{plan.number_of_runs} runs in {len(plan.groups)} tasks: sbatch {config.out / 'array.sbatch'}")


# ---------------------------------------------------------------- results


def collect(config: SweepSettings, plan: Plan, failures: Mapping[str, str]) -> str:
    """Write sweep.json, sweep.txt and sweep.png from the runs that are done. Return the table."""
    scores = {(group.model, group.init, group.count): seed_scores(group, plan) for group in plan.groups}
    models = {group.model for group in plan.groups}
    rows = []
    for group in plan.groups:
        key = group.model, group.init, group.count
        scratch = scores.get((group.model, SCRATCH, group.count), {}) if group.init != SCRATCH else {}
        bar = scores.get((DYNUNET, SCRATCH, group.count), {}) if group.model != DYNUNET else {}
        own = describe(group, plan) | {"missing": len(plan.seeds) - len(scores[key]), "scores": scores[key]}
        results = summary(scores[key], plan.test, {"scratch": scratch, DYNUNET: bar})
        rows.append(own | results)
    result = {
        "preset": plan.preset.name,
        "fold": config.fold,
        "score": "accuracy" if plan.preset.task == "classification" else "mean Dice",
        "updates": plan.recipe.updates,
        "warmup": plan.recipe.warmup,
        "settings": dict(plan.recipe.settings),
        "seeds": list(plan.seeds),
        "vary": config.vary,
        "tuned": len(plan.candidates) > 1,
        "with_dynunet": DYNUNET in models and len(models) > 1,
        "development_cases": list(plan.development),
        "test_cases": list(plan.test),
        "rows": rows,
        "failed": dict(failures),
    }
    table = sweep_table(result)
    write_json(config.out / "sweep.json", result)
    save_bytes(config.out / "sweep.txt", table.encode())
    draw_curves(config.out / "sweep.png", rows, result["score"])
    return table


def seed_scores(group: Group, plan: Plan) -> dict[int, dict[str, float | None]]:
    """Return seed -> held-out case -> score, of the seeds that are done with the chosen candidate."""
    best = chosen(group, plan)
    runs = {} if best is None else {seed: group.runs[best, seed] for seed in plan.seeds}
    return {seed: case_scores(run, plan.preset) for seed, run in runs.items() if is_done(run, plan.preset)}


def describe(group: Group, plan: Plan) -> dict[str, Any]:
    """Return what the runs of a group have in common: for each candidate its settings and its development score."""
    best = chosen(group, plan)
    tried = zip(plan.candidates, development_scores(group, plan))
    return {
        "model": group.model,
        "init": group.init,
        "count": group.count,
        "pretraining_seeds": group.pretraining_seeds,
        "candidates": [{"settings": dict(candidate), "development": score} for candidate, score in tried],
        "chosen": None if best is None else dict(plan.candidates[best]),
    }


if __name__ == "__main__":
    sys.exit(run_program(main))
