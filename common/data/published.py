"""What the YAML of a data set states about its download. scripts/prepare.py checks a folder against it."""

from dataclasses import dataclass

from common.config import setting


@dataclass(frozen=True)
class Published:
    """A data set as it is published. What could not be verified is left out, or named in `unverified`."""

    where: str = setting(help="address, and how to get access")
    licence: str = setting(help="as far as known; the source decides")
    contents: str = setting(help="what is used of the download: archives, folders, names")
    cases: tuple[int, ...] = setting((), "number of cases for each pattern of images; (): not verified", least=1)
    prefix: str = setting("", "start of the name of every case, in any case of letters; no other data set has it")
    ids: tuple[str, ...] = setting((), "all numbers of the cases, single or as a range such as 0001-0010")
    folders: tuple[str, ...] = setting((), "folders to link as they are, for a download without volumes")
    convert: str = setting("", "command that makes volumes of the linked folders; {out} is the folder of the links")
    unverified: str = setting("", "what could not be verified")

    def all_ids(self) -> list[str]:
        """Return `ids` with every range written out, in the same number of digits."""
        found = []
        for word in self.ids:
            first, _, last = word.partition("-")
            found += [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
        return found
