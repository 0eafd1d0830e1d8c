"""Which volumes, and how they are preprocessed: the settings that the cache's writer and its readers share."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from common.config import InputError, setting

if TYPE_CHECKING:
    from common.datalist import Case
    from common.volumes import Preprocessing


@dataclass(kw_only=True)
class DataSettings:
    """Settings of the data. All from `spacing` on are part of the cache's key. Defaults are those of pretraining."""

    datasets: tuple[str, ...] = setting((), "pretraining data sets or lists of Pretrain/datasets/, e.g. 1k, 10k, BTCV")
    datalist: tuple[Path, ...] = setting((), "Decathlon JSONs, folders of NIfTI or DICOM series, text files of paths")
    data_root: Path | None = setting(
        None,
        "folder of the data sets; what a list's paths are relative to and may not leave, none: the list's folder; "
        "/ lets them lead anywhere, relative ones from the list's folder",
    )
    section: str = setting("training", "the section of a JSON list to read")
    cache_dir: Path = setting(Path("cache"), "the cache; a program adds what is missing at its start")
    allow_failures: bool = setting(False, "go on without the volumes that cannot be used, with a table of the reasons")

    spacing: tuple[float, float, float] | None = setting(None, "mm per voxel (D H W, or one for all); none: as scanned")
    intensity: Literal["window", "percentiles", "zscore"] = setting(
        "window", "window: low..high HU; percentiles: low..high of each case; zscore: per channel"
    )
    low: float = setting(-1000.0, "HU or percentile that becomes 0")
    high: float = setting(1000.0, "HU or percentile that becomes 1")
    foreground_threshold: float | None = setting(0.05, "crop to voxels above this, of the [0,1] scale; none: no crop")
    margin: int = setting(8, "voxels kept around the foreground")
    channels: int = setting(1, "channels of a volume; more than one: 4D NIfTI, channels last")
    dtype: Literal["int16", "uint8"] = setting("int16", "int16 keeps whole HU; uint8: half the bytes, 255 steps")

    def preprocessing(self) -> "Preprocessing":
        from common.volumes import Preprocessing  # slow to import: --help does not wait for it

        names = ("spacing", "intensity", "low", "high", "foreground_threshold", "margin", "channels", "dtype")
        return Preprocessing(**{name: getattr(self, name) for name in names})

    def cases(self, labels: bool = False) -> "list[Case]":
        """The volumes of all data sets and lists, without labels unless asked for. InputError where none is named."""
        from common.datalist import read_cases
        from common.sources import read_datasets, unlabelled

        cases = read_datasets(self.datasets, self.data_root) if self.datasets else []
        for datalist in self.datalist:
            found = read_cases(datalist, self.data_root, self.section)
            cases += found if labels else unlabelled(found)
        if not cases:
            raise InputError("no data: give --datasets or --datalist")
        return cases
