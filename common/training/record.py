"""run.json: what a run is, for readers of its folder. Written at every start, beside settings.yaml."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from common.cli import recipe_of
from common.config import settings_of, to_dict
from common.distributed import Run
from common.environment import environment
from common.files import save_bytes
from common.training.settings import BatchPlan, LoopSettings

RUN_FILE = "run.json"


def write_record(
    settings: LoopSettings, run: Run, plan: BatchPlan, method: nn.Module, about: Mapping[str, Any]
) -> None:
    """Write run.json into the folder of the run.

    Args:
        about: what only the program knows, in plain types; common/report shows `title`, `program` and the rest.
    """
    recipe, recipe_values = recipe_of(type(settings)) or (None, None)
    content = {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "about": dict(about),
        "plan": {**vars(plan), "processes": run.world_size, "device": run.device.type},
        "trained_parameters": sum(p.numel() for p in method.parameters() if p.requires_grad),
        "recipe": recipe,
        "settings": described(settings, recipe_values),
        "environment": environment(),
    }
    save_bytes(Path(settings.out_dir) / RUN_FILE, json.dumps(content, indent=1).encode())


def described(settings: Any, recipe: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Return every setting that the run uses.

    Args:
        recipe: the settings that a recipe gives.

    Returns:
        Of each setting `name`, `group` (its heading in --help), `value`, `default` where it has one, and, if there is
        a recipe, `recipe`: the value of a run of the recipe without further settings, where that has one.
    """
    values, rows = to_dict(settings), []
    for name, entry in settings_of(type(settings)).items():
        if all(values[selector] in allowed for selector, allowed in entry.when.items()):
            row = {"name": name, "group": entry.title, "value": values[name]}
            if not entry.required:
                row["default"] = to_dict(entry.default)
            if recipe is not None and (name in recipe or "default" in row):
                row["recipe"] = to_dict(recipe[name]) if name in recipe else row["default"]
            rows.append(row)
    return rows
