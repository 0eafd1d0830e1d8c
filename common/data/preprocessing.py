"""Settings of the preprocessing, which are part of the key of a cached volume."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from common.config import setting
from common.errors import InputError

if TYPE_CHECKING:
    from monai.data import MetaTensor


@dataclass(frozen=True)
class Preprocessing:
    """From a volume as scanned to the input of a network: resample, scale intensities, crop to the foreground.

    The default values of `foreground_threshold` and `margin` are our choice. The order of the steps is fixed.
    """

    spacing: tuple[float, float, float] | None = setting(None, "mm per voxel (D H W, or one for all); none: as scanned")
    intensity: Literal["window", "percentiles", "zscore"] = setting(
        "window", "window, percentiles: low..high HU or per cent become 0..1; zscore: of non-zero voxels, per channel"
    )
    low: float = setting(-1000.0, "HU or percentile that becomes 0")
    high: float = setting(1000.0, "HU or percentile that becomes 1")
    foreground_threshold: float | None = setting(0.05, "crop to voxels above this, of the [0,1] scale; none: no crop")
    margin: int = setting(8, "voxels kept around the foreground", least=0)
    channels: int = setting(1, "channels of a volume; more than one: 4D NIfTI, channels last", least=1, most=1024)
    modality: Literal["CT", "any"] = setting("CT", "DICOM series that a window in HU accepts; any: MR and PET as well")
    dtype: Literal["int16", "uint8"] = setting("int16", "int16 keeps whole HU; uint8: half the bytes, 255 steps")

    def __post_init__(self):
        # 250 and 250.0 are one setting, and one key
        for name in ("low", "high", "foreground_threshold"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else float(value))
        if self.spacing is not None:
            object.__setattr__(self, "spacing", tuple(map(float, self.spacing)))
        if self.spacing is not None and not all(0 < mm < 1000 for mm in self.spacing):
            raise InputError(f"spacing: found {self.spacing}, expected three positive numbers of mm")
        if self.intensity == "window" and not self.low < self.high:
            raise InputError(f"low, high: found {self.low:g} and {self.high:g}, expected low < high")
        if self.intensity == "percentiles" and not 0 <= self.low < self.high <= 100:
            raise InputError(f"low, high: found {self.low:g} and {self.high:g}, expected 0 <= low < high <= 100")

    def key(self) -> dict[str, Any]:
        """Return the settings that the key of a cached volume depends on."""
        values = asdict(self)
        # the same volume as before the setting existed, unless the setting may have let it pass
        if self.modality == "CT" or self.intensity != "window":
            del values["modality"]
        return values

    def apply(
        self, image: "MetaTensor", label: "MetaTensor | None" = None, overwrite: bool = False
    ) -> "tuple[MetaTensor, MetaTensor | None]":
        """Return `image` (C, D, H, W) and `label` (1, D, H, W) preprocessed: `common.data.transforms.preprocess`."""
        # slow to import, and not needed for --help
        from common.data.transforms import preprocess

        return preprocess(image, label, self, overwrite)


def is_hounsfield(low: float, high: float) -> bool:
    """Return whether a window, in the units of the image, is in HU: it is at least 100 wide. Our choice."""
    return high - low >= 100
