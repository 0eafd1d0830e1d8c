"""The README.md of an exported folder: a model card of the Hugging Face hub."""

from typing import Any

from common.config import shown

HEADER = """---
library_name: pytorch
tags:
- medical
- 3d
- masked-autoencoder
- feature-extraction{licence}
---
"""
USE = """## Use

```python
from {module} import {architecture}

encoder = {architecture}.from_pretrained("PATH OF THIS FOLDER")
{call}
```

`python -m Finetune.main_finetune --init PATH ...` fine-tunes it, `python -m Finetune.embed --checkpoint PATH ...`
writes features of whole volumes.
"""
CALLS = {
    "VisionTransformer3D": "features = encoder(volume, return_features=True)  # volume: (B, {channels}, D, H, W)",
    "ConvViT3D": "tokens = encoder(volume)  # volume: (B, {channels}, D, H, W)",
}
OTHER = """## Use

These weights have the names of `{architecture}`. `config.json` has its arguments.

```python
from safetensors.torch import load_file
network.load_state_dict(load_file("model.safetensors"){strict})
```

Finetune/converters.py in the repository they come from says what differs (`match_norm_eps`).
"""
NNUNET = """## Use

`adaptation_plan.json` describes `checkpoint_final.pth`, whose `network_weights` are also in `model.safetensors`.
"""


def readme(card: dict[str, Any]) -> str:
    """Return the model card of an exported folder, from its config.json."""
    stated = card["licence"] != "not stated"
    title = f"# {card['architecture']}, {describe_method(card['training'])}\n"
    parts = [HEADER.format(licence=f"\nlicense: {card['licence']}" if stated else ""), title, use(card)]
    if notes := card.get("notes"):
        parts.append("## Notes\n\n" + "\n".join(f"* {note[0].upper()}{note[1:]}." for note in notes) + "\n")
    parts += [preprocessing_text(card["preprocessing"]), training_text(card)]
    return "\n".join(parts)


def describe_method(training: dict[str, Any]) -> str:
    return f"trained with {training['method']}" if training["method"] else "of unknown training"


def use(card: dict[str, Any]) -> str:
    architecture = card["architecture"]
    if card["format"] == "nnunet":
        return NNUNET
    if architecture not in CALLS:
        return OTHER.format(architecture=architecture, strict=", strict=False" * architecture.endswith("UNETR"))
    module = "models_3dvit" if architecture == "VisionTransformer3D" else "models_convvit3d"
    call = CALLS[architecture].format(channels=card["in_chans"])
    return USE.format(module=module, architecture=architecture, call=call)


def preprocessing_text(contract: dict[str, Any] | None) -> str:
    if contract is None:
        return "## Input\n\nThe checkpoint does not record how its volumes were preprocessed.\n"
    rows = "\n".join(f"| {name} | {shown(value)} |" for name, value in contract.items())
    return f"## Input\n\n| | |\n|---|---|\n{rows}\n\nmean and std: of the training voxels after this preprocessing.\n"


def training_text(card: dict[str, Any]) -> str:
    training = {name.replace("_", " "): value for name, value in card["training"].items()}
    rows = {**training, "licence": card["licence"], "source file": card["source"]["file"]}
    rows |= {"source SHA-256": card["source"]["sha256"], "exported at commit": card["exported_at_commit"]}
    lines = "\n".join(
        f"| {name} | {'not recorded' if value is None else shown(value)} |" for name, value in rows.items()
    )
    return f"## Training\n\n| | |\n|---|---|\n{lines}\n"
