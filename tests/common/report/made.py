"""Folders of runs as the programs write them, made without training."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from common.report.__main__ import write_page

# as a file name may be, with everything that HTML could mistake for markup
NASTY = "<script>alert(1)</script>&\"quoted'"
LONG = "case_" + "0123456789" * 12
ENVIRONMENT = {"code": "0123abcd", "torch": "2.14.1", "processor": "A Processor", "cores": 2}


def page_of(folder: Path) -> str:
    """Return the page of a run."""
    write_page(folder, folder / "report.html")
    return (folder / "report.html").read_text()


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_png(path: Path, width: int = 640, height: int = 480) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, 255, width).astype(np.uint8)
    Image.fromarray(np.broadcast_to(ramp[None, :, None], (height, width, 3)).copy()).save(path)


def settings_rows(values: dict, defaults: dict) -> list[dict]:
    rows = [{"name": name, "group": "Settings", "value": value} for name, value in values.items()]
    return [row | ({"default": defaults[row["name"]]} if row["name"] in defaults else {}) for row in rows]


def write_run(folder: Path, about: dict, values: dict, defaults: dict, log: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.yaml").write_text(yaml.safe_dump(values))
    write_lines(folder / "log.jsonl", log)
    record = {
        "started": "2026-11-25 10:00:00 UTC",
        "about": about,
        "plan": {"batch": 4, "steps_per_epoch": 10, "processes": 1, "device": "cpu"},
        "trained_parameters": 3_210_000,
        "settings": settings_rows(values, defaults),
        "environment": ENVIRONMENT,
    }
    write_json(folder / "run.json", record)
    return folder


def speed(epoch: int) -> dict:
    line = {"epoch": epoch, "step": 10 * (epoch + 1), "lr": 1e-3}
    return line | {"seconds": 2.5, "volumes_per_second": 16.0 + epoch % 3, "data_wait": 0.01}


def pretraining(folder: Path, epochs: int = 12, held_out: int = 3) -> Path:
    """Write a run of GL-MAE with a warning in its last epoch, skipped updates and two pictures."""
    log = []
    for epoch in range(epochs):
        loss = 0.5 + 0.5 * math.exp(-epoch / 4)
        line = speed(epoch) | {"data_wait": 0.31, "rec_global": loss, "rec_local": loss + 0.02, "global_local": 4.0}
        line |= {"grad_norm": 2.0, "skipped": 0.0, "monitor/entropy": 0.9, "monitor/kl": 0.02}
        line |= {"health/rec_global": loss + 0.1, "health/global/over_mean": epoch / 8, "health/global/psnr": 20.0}
        line |= {f"health/block0{block}/content": 0.3 - block / 20 for block in range(3)}
        log.append(line)
    about = {"program": "pretraining", "title": "GL-MAE pretraining", "method": "glmae", "training_volumes": 60}
    about |= {"held_out_volumes": held_out, "health_volumes": 3, "health_checked_from_update": 100}
    values = {"out_dir": str(folder), "method": "glmae", "model": "tiny", "lr": 3e-4, "epochs": epochs, "seed": 0}
    write_run(folder, about, values, {"method": "glmae", "model": "base", "lr": None, "epochs": 100, "seed": 0}, log)
    warnings = [{"epoch": epoch, "kind": "growth", "text": "the stream grows"} for epoch in range(epochs - 2, epochs)]
    write_lines(folder / "warnings.jsonl", warnings)
    write_lines(folder / "anomalies.jsonl", [{"step": 3, "rollbacks": 0, "files": ["a"]}])
    for epoch in (3, epochs - 1):
        write_png(folder / f"reconstruction-{epoch}.png")
    return folder


def score_card(folder: Path, cases: tuple[str, ...] = ("case_a", NASTY, LONG), checkpoint: str = "") -> Path:
    """Write a card of two classes; the last of the cases is the worst."""
    names, rows = ("liver", "spleen"), []
    for index, case in enumerate(cases):
        rows += [[case, name, "missed" if index == 2 else "scored", 0.9 - 0.3 * index, 0.9, 3.0] for name in names]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "scores.csv", "w", newline="") as file:
        csv.writer(file).writerows([["case", "name", "status", "dice", "nsd", "hd95"], *rows])
    counts = {"present": 3, "missed": 1, "false_positives": 0, "absent": 0}
    values = {"dice": 0.6, "nsd": 0.9, "hd95": 3.0} | counts
    card = {
        "protocol": {"preset": "MSD04", "roi": [64, 64, 16], "checkpoints": [{"checkpoint": checkpoint, "fold": 0}]},
        "notes": ["REFERENCE LABELS: a model"],
        "rules": ["background excluded"],
        "cases": len(cases),
        "mean": {name: {"mean": values[name], "ci95": [0.5, 0.7]} for name in ("dice", "nsd", "hd95")},
        "counts": counts,
        "classes": dict.fromkeys(names, values),
    }
    write_json(folder / "scores.json", card)
    write_png(folder / "worst/1-case_c.png", 420, 700)
    return folder


def finetuning(folder: Path, epochs: int = 6, seed: int = 0) -> Path:
    """Write a run of fine-tuning with validations and a score card beside its checkpoints."""
    log = [speed(epoch) | {"dice": 1 / (epoch + 1), "ce": 2 / (epoch + 1)} for epoch in range(epochs)]
    for line in log[1::2]:
        line |= {"val/dice": 0.1 * line["epoch"], "val/dice liver": 0.12 * line["epoch"]}
    about = {"program": "fine-tuning", "title": "MSD04, fold 0", "network": "unetr", "initial_weights": "scratch"}
    about |= {"training_cases": 160, "validation_cases": 40, "leak": ""}
    values = {"out_dir": str(folder), "preset": "MSD04", "data": f"/data/{LONG}", "epochs": epochs, "roi": [64, 64, 16]}
    write_run(folder, about, values | {"seed": seed}, {"epochs": 3000, "roi": None, "seed": 0}, log)
    score_card(folder / "scores")
    return folder


def classification(folder: Path) -> Path:
    """Write a run of a classification with two right cases and a wrong one, its scores among its files."""
    finetuning(folder)
    shutil.rmtree(folder / "scores")
    rows = [("a", "healthy", "healthy"), ("b", "ill", "ill"), (NASTY, "ill", "healthy")]
    with open(folder / "classification.csv", "w", newline="") as file:
        csv.writer(file).writerows([("case", "class", "predicted"), *rows])
    scores = {"accuracy": 2 / 3, "auc": 0.75}
    write_json(folder / "classification.json", {"preset": "CC", "scores": scores, "accuracy_ci95": [0.2, 1.0]})
    return folder


def sweep(folder: Path) -> Path:
    """Write a sweep of two initialisations at two numbers of labels, with one run that failed."""
    rows = []
    for init, gain in (("scratch", 0.0), ("glmae", 0.05)):
        for count in (4, 16):
            score = 0.5 + count / 100 + gain
            row = {"model": "unetr", "init": init, "count": count, "score": score, "ci95": [score - 0.05, score + 0.05]}
            row |= {"seeds": {"0": score, "1": score}, "missing": 0, "pretraining_seeds": 1, "chosen": None}
            rows.append(row | {"minus_scratch": {"difference": gain, "ci95": [0.0, 0.1], "seeds": 2} if gain else {}})
    content = {"preset": "MSD04", "fold": 0, "score": "mean Dice", "updates": 400, "seeds": [0, 1], "rows": rows}
    content |= {"settings": {"batch_size": 4}, "failed": {"unetr-4-2": "out of memory"}, "test_cases": ["a", "b"]}
    write_json(folder / "sweep.json", content)
    for seed in (0, 1):
        finetuning(folder / f"runs/unetr-4-{seed}/training", seed=seed)
    score_card(folder / "runs/unetr-4-0/scores", checkpoint=str(folder / "runs/unetr-4-0/training/checkpoint-last.pth"))
    return folder
