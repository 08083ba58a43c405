"""Images that cannot be read, with `data.on_error: skip`: which they are, over all processes, and how many may be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..config.base import BaseDataConfig
from ..data import Skipped
from ..errors import DataError, shorten
from .distributed import World

__all__ = ["SkippedImages"]


class SkippedImages:
    """The unreadable images of each split. With `data.on_error: raise` there are none, and nothing is exchanged.

    Args:
        data: what is done about them, `on_error`, and how many of a split they may be, `max_skipped`.
        world: the processes.
        splits: what the splits are called in messages; '' for the only one.

    Attributes:
        reasons: of each split, why an image cannot be read, by its name; of all processes as of the last exchange.
    """

    def __init__(self, data: BaseDataConfig, world: World, splits: Iterable[str]) -> None:
        self.data, self.world = data, world
        self.reasons: dict[str, dict[str, str]] = {split: {} for split in splits}
        self._noted: dict[str, dict[str, str]] = {split: {} for split in self.reasons}  # here, since the last exchange

    def __len__(self) -> int:
        return sum(map(len, self.reasons.values()))

    def restore(self, reasons: Mapping[str, dict[str, str]]) -> None:
        """Takes the reasons that an earlier attempt has found."""
        self.reasons |= reasons

    def note(self, split: str, skipped: Iterable[Skipped]) -> None:
        """Notes what this process could not read; an image that is known already counts once."""
        known = self.reasons[split]
        self._noted[split] |= {item.name: item.reason for item in skipped if item.name not in known}

    def exchange(self) -> list[str]:
        """Tells all processes what each has noted, and returns the reasons that are new; every one must call it."""
        if self.data.on_error != "skip":
            return []
        new = []
        for noted in self.world.gather(self._noted):
            for split, reasons in noted.items():
                known = self.reasons[split]
                new += [reason for name, reason in reasons.items() if name not in known]
                known |= {name: reason for name, reason in reasons.items() if name not in known}
        self._noted = {split: {} for split in self.reasons}
        return new

    def check(self, split: str, total: int) -> None:
        """Checks the limit after an exchange.

        Args:
            split: the split.
            total: its images, with those that cannot be read.

        Raises:
            DataError: more than the configured share of them cannot be read; the same on every process.
        """
        names, share = self.reasons[split], self.data.max_skipped
        if self.data.on_error == "skip" and len(names) > share * total:
            what = f"{split} images" if split else "images"
            error = DataError(
                f"{len(names)} of {total} {what} cannot be read, more than data.max_skipped = {share:g} allows: "
                f"{shorten(names, 5)}"
            )
            error.scope = "run"
            raise error
