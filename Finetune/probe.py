"""Probes: how good the frozen features of an encoder are, without fine-tuning it.

    python -m Finetune.probe --preset BTCV --data DIR --inits mae=mae.pth,glmae=a.pth:b.pth@teacher --out DIR

Each NAME=FILE of --inits is a pretrained encoder; FILE:FILE are pretrainings with other seeds, @KEY is where the
weights are in the files. Each is compared with `random`: an encoder of the same architecture with random weights,
initialised as in pretraining for the intensities of the training volumes. The probes are described in
Finetune/evaluation/probes.py.

A seed draws the random encoder, the training cases and the weights of the probes; the pretrained encoder of seed number
i is file number i (modulo their number). Half of the held-out cases of the fold chooses the learning rate, the test
scores are of the other half. Segmentations are scored in the preprocessed space, without overlap of the crops.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.cache.build import build_cache
from common.cache.statistics import input_statistics
from common.cli import parse, run_program
from common.config import to_dict
from common.data.datalist import Case
from common.distributed import setup
from common.files import check_writable, file_sha256, save_bytes
from common.runlog import print_main
from Finetune.cases import check_classes, with_mapped_labels
from Finetune.data import Volumes
from Finetune.evaluation.features import Features, extract
from Finetune.evaluation.formats import fixed, write_json
from Finetune.evaluation.probe_report import probe_table, summaries
from Finetune.evaluation.probes import HeldOut, Outcome, ProbeTask, run_probe
from Finetune.evaluation.statistics import grouped, mean
from Finetune.leakage import leak_of
from Finetune.presets import Preset, load_preset
from Finetune.probe_plan import Init, ProbePlan, ProbeSettings, build_encoder, make_plan


def main(argv: list[str] | None = None) -> None:
    config = parse(ProbeSettings, argv, description=__doc__)
    preset = load_preset(config.preset)
    plan = make_plan(config, preset)
    device = setup(config.device).device
    check_writable(config.out)
    # before the work, as a file may be replaced meanwhile
    inits = [describe(init) for init in plan.inits]
    run = load_volumes(config, preset, plan, device)
    notes = leaks(config, preset, plan, run.held_out)
    for note in notes:
        print_main(f"warning: {note}")
    rows = run.rows()
    result = {
        "preset": preset.name,
        "fold": config.fold,
        "config": to_dict(config),
        "inits": inits,
        "development_cases": [case.name for case in plan.cases.development],
        "test_cases": [case.name for case in plan.cases.test],
        "notes": notes + rate_notes(rows, plan.rates),
        "summaries": summaries(rows, plan.baselines),
        "rows": rows,
    }
    write_json(config.out / "probe.json", result)
    table = probe_table(result)
    save_bytes(config.out / "probe.txt", table.encode())
    print_main(table)


def describe(init: Init) -> dict[str, Any]:
    """Return what probe.json says about an initialisation."""
    files = [{"file": str(path), "sha256": file_sha256(path)} for path in init.files]
    return {"name": init.name, "key": init.key, "files": files, "architecture": to_dict(init.architecture)}


# ---------------------------------------------------------------- running


@dataclass
class ProbeRun:
    """The volumes of a run, and how its encoders are probed.

    Attributes:
        held_out: volumes of the development cases, then those of the test cases.
        labels: label map (D, H, W) of each held-out case, uint8; {} in classification.
    """

    config: ProbeSettings
    preset: Preset
    plan: ProbePlan
    device: torch.device
    training: Volumes
    held_out: Volumes
    labels: dict[str, Tensor]

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of probe.json."""
        statistics, rows = input_statistics(self.training), []
        for init in self.plan.inits:
            for number, seeds in encoders_of(init, self.plan.seeds).items():
                encoder = build_encoder(init, number, seeds[0], statistics)
                rows += self.rows_of(init, encoder, seeds)
        return rows

    def rows_of(self, init: Init, encoder: nn.Module, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """Return the rows of one encoder. Its features are computed once, for all of its seeds."""
        cases = self.plan.cases
        chosen = {name for (_, seed), names in cases.subsets.items() if seed in seeds for name in names}
        of_training = self.features(init, encoder, [v for v in self.training if v.name in chosen], training=True)
        of_held_out = self.features(init, encoder, self.held_out, training=False)
        parts = [self.part(of_held_out, names) for names in (cases.development, cases.test)]
        rows = []
        for (count, seed), names in cases.subsets.items():
            if seed not in seeds:
                continue
            train, task = of_training.of(names), self.task(init, seed)
            for probe in self.plan.probes:
                outcomes = run_probe(probe, train, *parts, task)
                new = [row for outcome in outcomes for row in to_rows(outcome, init.name, count, seed)]
                for row in new:
                    label = f"{init.name}, {count} labels, seed {seed}, {row['probe']}"
                    print_main(f"{label}: {row['metric']} {fixed(row['test'])}")
                rows += new
        return rows

    def features(self, init: Init, encoder: nn.Module, volumes: Volumes, training: bool) -> Features:
        """Return the features of volumes; training volumes also have the random crops."""
        config = self.config
        extra = config.crops_per_volume if training else 0
        options = {"extra": extra, "batch": config.sw_batch_size, "amp": config.amp}
        return extract(encoder, volumes, self.preset, init.architecture.roi, self.device, **options)

    def part(self, features: Features, cases: Sequence[Case]) -> HeldOut:
        """Return the features and label maps of these held-out cases."""
        names = [case.name for case in cases]
        return HeldOut(features.of(names), {name: self.labels[name] for name in names if name in self.labels})

    def task(self, init: Init, seed: int) -> ProbeTask:
        """Return the task of a seed."""
        config, rates = self.config, self.plan.rates
        sizes = (config.updates, config.batch_size, config.neighbours)
        return ProbeTask(self.preset, init.architecture, rates, *sizes, seed)


def load_volumes(config: ProbeSettings, preset: Preset, plan: ProbePlan, device: torch.device) -> ProbeRun:
    """Return the run with its cached volumes. Missing ones are added to the cache."""
    cases = plan.cases
    listed = with_mapped_labels([*cases.training, *cases.development, *cases.test], preset, config.cache_dir / "labels")
    volumes = build_cache(listed, preset.preprocessing, config.cache_dir, workers=config.workers)
    check_classes(volumes, preset)
    training, held_out = volumes[: len(cases.training)], volumes[len(cases.training) :]
    labels = {}
    if preset.task == "segmentation":
        labels = {volume.name: volume.read_label((0, 0, 0), volume.shape)[0] for volume in held_out}
    return ProbeRun(config, preset, plan, device, training, held_out, labels)


def encoders_of(init: Init, seeds: Sequence[int]) -> dict[int, list[int]]:
    """Return number of the encoder -> its seeds: a random encoder per seed, else the files in turn."""
    numbers = [position % len(init.files) if init.files else position for position in range(len(seeds))]
    pairs = grouped(zip(numbers, seeds), lambda pair: pair[0])
    return {number: [seed for _, seed in pair] for number, pair in pairs.items()}


def to_rows(outcome: Outcome, init: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield a row of probe.json for each metric of an outcome."""
    for metric, of_test in outcome.test.items():
        of_development = outcome.development[metric]
        yield {
            "probe": outcome.probe,
            "metric": metric,
            "init": init,
            "labels": count,
            "seed": seed,
            "learning_rate": outcome.rate,
            "development": mean(of_development.values()),
            "test": mean(of_test.values()),
            "development_by_learning_rate": {f"{rate:g}": value for rate, value in outcome.by_rate.items()},
            "development_cases": of_development,
            "test_cases": of_test,
        }


def rate_notes(rows: Sequence[dict[str, Any]], rates: Sequence[float]) -> list[str]:
    """Return a note for each learning rate that is the lowest or highest of several: a better one may lie beyond."""
    ends = {max(rates): "highest", min(rates): "lowest"} if len(rates) > 1 else {}
    return [
        *dict.fromkeys(
            f"{row['probe']}, {row['init']}, {row['labels']} labels: {row['learning_rate']:g} is the "
            f"{ends[row['learning_rate']]} of --learning_rates"
            for row in rows
            if row["learning_rate"] in ends
        )
    ]


def leaks(config: ProbeSettings, preset: Preset, plan: ProbePlan, held_out: Volumes) -> list[str]:
    """Return a note for each checkpoint whose pretraining has seen held-out cases, or may have."""
    found = {}
    for init in plan.inits:
        for path in init.files:
            if leak := leak_of(config.fold, preset, path, held_out):
                found[f"{init.name}: {leak}"] = None
    return [*found]


if __name__ == "__main__":
    sys.exit(run_program(main))
