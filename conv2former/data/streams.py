"""Hugging Face `datasets` read as they come, without storing them first.

A stream has no random access, so its order is a function of more than a folder's: of the seed and the epoch, and of the
number of processes, because each reads its own shards. It is no function of the number of loader workers: a process's
shards are divided into lanes, batch number n comes from lane n % lanes, and a worker serves whole lanes.

An epoch is `data.epoch_images` images from an endless stream that starts anew, in another order, with every epoch, and
again whenever a lane has come to the end of its shards. If that is fewer images than there are, an epoch sees some of
them; if the shards are of different sizes, it may see an image of a small one twice before one of a large one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..errors import DataError, UserError, first_line
from .batch import Item, PixelBatch, collate_augmented, load_image
from .seeding import Stream

__all__ = ["StreamBatches", "StreamImages", "StreamSource"]

Row = tuple[dict[str, Any], str]
_MOST_LANES = 16  # per process; as many workers can be of use


@dataclass(frozen=True)
class StreamSource:
    """One split as a stream.

    Attributes:
        dataset: a Hugging Face IterableDataset of `num_shards` shards, its images not decoded.
        read: makes (PIL image, class index) of a row and the words to name it by.
        class_names: names in index order.
        name: what to call the split in messages.
        num_images: of an epoch in training; 0 for an evaluation, which goes to the end.
        shuffle_images: in the buffer that the order is drawn from, per process.
    """

    dataset: Any
    read: Any
    class_names: list[str]
    name: str
    num_images: int
    shuffle_images: int

    def __len__(self) -> int:
        return self.num_images

    def lanes(self, world_size: int) -> int:
        """Returns how many parts a process's shards are divided into: evenly, if that is not too few."""
        shards = self.dataset.num_shards // world_size
        if shards <= _MOST_LANES:
            return max(1, shards)
        even = [count for count in range(_MOST_LANES, _MOST_LANES // 2 - 1, -1) if shards % count == 0]
        return even[0] if even else _MOST_LANES

    def rows(self, part: int, parts: int, seed: tuple[int, ...] | None = None, buffer: int = 1) -> Iterator[Row]:
        """Yields the rows of one part and what to call them, to its end.

        A part is some of the shards, or every `parts`-th row where the shards are too few.

        Args:
            part, parts: which of how many.
            seed: of the order of the shards, and of the rows in a buffer; None for the order that they have.
            buffer: rows.

        Raises:
            DataError: the data cannot be read.
        """
        count = self.dataset.num_shards
        shards = list(range(part, count, parts)) if count >= parts else list(range(count))
        if seed is not None:  # the same order in all parts, which may have to share the rows
            shards = np.random.default_rng([Stream.ORDER, *seed]).permutation(shards).tolist()
        rows = itertools.chain.from_iterable(self._shard(shard) for shard in shards)
        if count < parts:
            rows = itertools.islice(rows, part, None, parts)  # type: ignore[assignment]
        return rows if seed is None else _shuffled(rows, buffer, np.random.default_rng([Stream.ORDER, *seed, part]))

    def _shard(self, index: int) -> Iterator[Row]:
        number = itertools.count()
        try:
            shard = self.dataset.shard(num_shards=self.dataset.num_shards, index=index)
            # `iter` rather than `__iter__`: that would divide the shards among the loader's workers once more
            for rows in shard.iter(batch_size=16):
                for values in zip(*rows.values(), strict=True):
                    yield dict(zip(rows, values, strict=True)), f"{self.name}, shard {index}, row {next(number)}"
        except UserError:
            raise
        except Exception as e:
            raise DataError(f"{self.name}: reading the stream failed ({type(e).__name__}: {first_line(e)})") from None


def _shuffled(rows: Iterator[Row], size: int, rng: np.random.Generator) -> Iterator[Row]:
    """Yields rows from a buffer of `size` in random order, each replaced by the next that comes."""
    buffer: list[Row] = []
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
            continue
        place = int(rng.integers(size))
        yield buffer[place]
        buffer[place] = row
    yield from (buffer[place] for place in rng.permutation(len(buffer)).tolist())


class StreamBatches(Dataset):
    """Training batches of a stream; a key is (epoch, number of the batch in it).

    Any key gives the same batch at any time. Those of a lane in rising order are read once; others start over.
    """

    def __init__(
        self,
        source: StreamSource,
        transforms: list[Any],
        skip: bool,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        self.source, self.transforms, self.skip, self.batch_size = source, transforms, skip, batch_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.lanes = source.lanes(world_size)
        self._open: dict[int, tuple[tuple[int, int], Iterator[Row]]] = {}  # lane -> next key, and its rows

    def useful_workers(self, wanted: int) -> int:
        """Returns the most workers, at most `wanted`, that divide the lanes evenly; 0 for none."""
        return max((count for count in range(1, wanted + 1) if self.lanes % count == 0), default=0)

    def __getitem__(self, key: tuple[int, int]) -> PixelBatch:
        epoch, number = key
        lane, place = number % self.lanes, number // self.lanes
        at, rows = self._open.get(lane, (None, iter(())))
        if at != (epoch, place):
            rows = self._rows(epoch, lane)
            for _ in range(place * self.batch_size):  # nothing is decoded
                next(rows)
        items: list[Item] = []
        for i in range(self.batch_size):
            row, where = next(rows)
            place_of = (self.seed, epoch, self.rank, number * self.batch_size + i)
            items.append(load_image(partial(self.source.read, row, where), self.transforms[epoch], self.skip, place_of))
        self._open[lane] = ((epoch, place + 1), rows)
        return collate_augmented(items)

    def _rows(self, epoch: int, lane: int) -> Iterator[Row]:
        buffer = max(1, self.source.shuffle_images // self.lanes)
        parts = self.world_size * self.lanes
        for repeat in itertools.count():
            count = 0
            for row in self.source.rows(self.rank * self.lanes + lane, parts, (self.seed, epoch, repeat), buffer):
                yield row
                count += 1
            if not count:
                raise DataError(f"{self.source.name}: a part of the stream has no images")


class StreamImages(IterableDataset):
    """The images of a stream, each on one process, in one worker of it, once."""

    def __init__(self, source: StreamSource, transform: Any, skip: bool, rank: int, world_size: int) -> None:
        self.source, self.transform, self.skip, self.rank, self.world_size = source, transform, skip, rank, world_size

    def useful_workers(self, wanted: int) -> int:
        """Returns how many workers, at most `wanted`, have shards to read."""
        return min(wanted, max(1, self.source.dataset.num_shards // self.world_size))

    def __iter__(self) -> Iterator[Item]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        rows = self.source.rows(self.rank * workers + worker, self.world_size * workers)
        for row, where in rows:
            yield load_image(partial(self.source.read, row, where), self.transform, self.skip, None)
