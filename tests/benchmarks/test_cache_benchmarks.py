"""The benchmarks of the cache run. They check themselves that all formats and loaders give the same voxels."""

from benchmarks import cache_formats, cache_peers
from scripts.synthetic_ct import affine_of, phantom
from tests.common.made import nifti


def run(module, monkeypatch, capsys, *flags):
    monkeypatch.setattr("sys.argv", ["benchmark", *map(str, flags)])
    module.main()
    return capsys.readouterr().out


def test_formats(monkeypatch, capsys):
    printed = run(cache_formats, monkeypatch, capsys, "--shape", 70, 60, 50, "--sizes", 24, "--repeats", 2)
    assert "numpy memory map" in printed and "blosc2 lz4hc" in printed


def test_peers(tmp_path, monkeypatch, capsys):
    small = (cache_peers.ViewSpec(1, (24, 24, 24), (0.5, 1.0)), cache_peers.ViewSpec(2, (16, 16, 16), (0.3, 0.5)))
    monkeypatch.setattr(cache_peers, "GLMAE", small)
    scan = nifti(tmp_path / "scan.nii", phantom((72, 64, 56))[0], affine_of((72, 64, 56), (4.0, 4.0, 4.0)))
    printed = run(cache_peers, monkeypatch, capsys, "--volumes", scan, "--crop", 32, "--visits", 1)
    assert "sets of GL-MAE views per second" in printed and "MB on disk" in printed
