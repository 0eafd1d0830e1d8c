"""The benchmark of views runs, on a small volume, and its rows hold what they say."""

import torch

from benchmarks import views
from Pretrain.views import ViewSpec


def test_rows_of_the_views(monkeypatch, tmp_path):
    specs = {"global": ViewSpec(2, (24,) * 3, (0.5, 1.0)), "local": ViewSpec(3, (12,) * 3, (0.2, 0.5))}
    monkeypatch.setattr(views, "SPECS", specs)
    monkeypatch.setattr(views, "SHAPE", (48, 40, 64))
    monkeypatch.setenv("BENCH_DIR", str(tmp_path))
    rows = {row["name"]: row for row in views.measure(quick=True, device=torch.device("cpu"))}
    assert len(rows) == 8 and not list(tmp_path.iterdir())
    for row in rows.values():
        assert row["ours"] > 0 and row["ratio"] == row["theirs"] / row["ours"]
    sent = {dtype: rows[f"bytes from loader to device per set, {dtype}"] for dtype in ("int16", "uint8", "resident")}
    assert sent["int16"]["theirs"] == 4 * (2 * 24**3 + 3 * 12**3)
    # the key, 8 bytes, is all that is sent of resident volumes
    assert sent["resident"]["ours"] == 8 and 1.8 < sent["int16"]["ours"] / sent["uint8"]["ours"] < 2.2
