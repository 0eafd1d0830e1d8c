"""A fine-tuning run prints and stores which of its validation cases were seen in pretraining."""

import torch

from common.cache import hashing
from common.checkpoint import load
from common.data.volume_io import read_image
from Finetune.presets import load_preset
from tests.Finetune.made import make_dataset
from tests.Finetune.test_main_finetune import run, vit_file


def test_leaks_are_found_by_content_and_reported(tmp_path, capsys):
    data = make_dataset(load_preset("BTCV"), tmp_path / "btcv")
    hashes = [hashing.content_hash(read_image(path)) for path in sorted(data.glob("img/*.nii.gz"))]
    for seen, text in ((hashes, "1 of 1 validation cases were seen in pretraining: img0001"), (["another"], "")):
        vit_file(tmp_path / "pretrained.pth")
        state = torch.load(tmp_path / "pretrained.pth", weights_only=True)
        state["args"]["data"] = seen
        torch.save(state, tmp_path / "pretrained.pth")
        flags = ("--fold", 1, "--init", tmp_path / "pretrained.pth", "--resume", "none", "--lr", 0)
        leak = load(run(tmp_path, "BTCV", data, *flags))["args"]["leak"]
        assert leak == text
        assert ("cases were seen in pretraining" in capsys.readouterr().out) == bool(text)
