"""Tables of images, as spreadsheets save them, and class lists. Every mistake is named by file and line."""

from __future__ import annotations

import csv
import io
import os
import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from ..config.schema import NO_SPLIT, DataConfig
from ..errors import DataError, closest, counted, shorten
from ..text import from_table_cell, table_cell
from .classes import in_class_order
from .files import RealFiles
from .images import open_rgb
from .places import leads_out
from .split import (
    Choice,
    DataSource,
    UnlabelledSplit,
    check_single_label,
    choose_split,
    is_no_label,
    match_listed,
)

__all__ = [
    "TABLE_ENDINGS",
    "Row",
    "TableImages",
    "TableSplits",
    "find_tables",
    "read_class_list",
    "read_table",
    "write_table",
]

TABLE_ENDINGS = (".csv", ".tsv")
_SEPARATORS = ",;\t|"  # Excel writes semicolons where the comma is the decimal mark


@dataclass(frozen=True)
class Row:
    """A line of a table: `image` as it stands there, `split` None where the table has no such column."""

    line: int
    image: str
    label: str
    split: str | None


@dataclass(frozen=True)
class TableImages:
    """Images that a table names.

    Attributes:
        root: the folder that paths are relative to.
        paths: as in the table.
        labels: (images,) int64, class indices.
        value_range, max_pixels: see `open_rgb`.
    """

    root: str
    paths: list[str]
    labels: np.ndarray
    value_range: tuple[float, float] | None = None
    max_pixels: int | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        name = self.name(index)
        return open_rgb(name, name, self.value_range, self.max_pixels), int(self.labels[index])

    def name(self, index: int) -> str:
        return os.path.join(self.root, self.paths[index])


def _read_lines(path: Path) -> list[str]:
    """Returns the lines of a text file, with their ends but without a byte order mark.

    Raises:
        DataError: there is no such file, or it is no text in UTF-8; says which line is not.
    """
    try:
        content = path.read_bytes()
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror})") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = content[: e.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8; save it as UTF-8 (in Excel: 'CSV UTF-8')") from None
    if "\0" in text:
        raise DataError(f"{path}: holds a zero byte, so it is no text file; save it as UTF-8")
    return io.StringIO(text, newline=None).readlines()  # as the csv module counts lines, unlike str.splitlines


def read_class_list(path: Path) -> list[str]:
    """Reads class names, one a line, in index order. Empty lines at the end do not count.

    Raises:
        DataError: the file is missing, empty or no text, or a line is empty or there twice; says which line.
    """
    names = [line.strip() for line in _read_lines(path)]
    while names and not names[-1]:
        names.pop()
    if not names:
        raise DataError(f"{path}: empty; each line must name one class")
    seen: dict[str, int] = {}
    for line, name in enumerate(names, 1):
        if not name:
            raise DataError(f"{path}, line {line}: empty; each line must name one class")
        if name in seen:
            raise DataError(f"{path}, line {line}: '{name}' is there twice, first in line {seen[name]}")
        seen[name] = line
    return names


def read_table(path: Path, image_key: str, label_key: str, split_key: str) -> list[Row]:
    """Reads a table: `.txt` as lines `path label`, anything else with a header and the best fitting separator.

    A value `$'...'` is what `table_cell` made it of.

    Args:
        path: the file.
        image_key, label_key: columns that it must have.
        split_key: a column that it may have.

    Returns:
        Its rows, never none. Rows without anything in them are left out. Labels may be empty, because a split without
        labels may be beside others.

    Raises:
        DataError: says what is wrong in which line.
    """
    lines = _read_lines(path)
    rows = list(
        _plain(path, lines) if path.suffix.lower() == ".txt" else _columns(path, lines, image_key, label_key, split_key)
    )
    if not rows:
        raise DataError(f"{path}: has no rows")
    seen: dict[str, int] = {}
    for row in rows:
        for what, value in ((image_key, row.image), (split_key, row.split)):
            if value == "":
                raise DataError(f"{path}, line {row.line}: the {what} is empty")
        image = posixpath.normpath(row.image)
        if image in seen:
            raise DataError(f"{path}, line {row.line}: {row.image} is there twice, first in line {seen[image]}")
        seen[image] = row.line
    return rows


def _plain(path: Path, lines: Sequence[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        words = line.rsplit(maxsplit=1)  # a path may hold blanks
        if len(words) == 1:
            raise DataError(f"{path}, line {number}: '{words[0]}': expected a path, a blank and a label")
        if words:
            yield Row(number, words[0].strip(), words[1], None)


def _columns(path: Path, lines: Sequence[str], image_key: str, label_key: str, split_key: str) -> Iterator[Row]:
    first = next((i for i, line in enumerate(lines) if line.strip()), 0)
    separator = _separator(lines[first] if lines else "", (image_key, label_key))
    reader = csv.reader(lines[first:], delimiter=separator, strict=True)
    header: list[str] = []
    keys = (image_key, label_key, split_key)
    places: dict[str, int] = {}
    while True:
        line = first + reader.line_num + 1  # where the next row begins
        try:
            fields = [from_table_cell(field.strip()) for field in next(reader)]
        except StopIteration:
            return
        except csv.Error as e:
            raise DataError(f"{path}, line {line}: {e}; check the quotation marks") from None
        if not any(fields):
            continue
        if first + reader.line_num > line:
            raise DataError(f"{path}, line {line}: a field goes over more than one line; check the quotation marks")
        if not header:
            # a spreadsheet's Image, where nothing is called image
            header = [
                next((k for k in keys if k.lower() == field.lower() and k not in fields), field) for field in fields
            ]
            places = _places(path, line, header, image_key, label_key)
            continue
        if len(fields) != len(header):
            have = counted(len(fields), "field")
            raise DataError(
                f"{path}, line {line}: {have}, the header has {len(header)}; a '{separator}' in a value needs \"...\""
            )
        split = fields[header.index(split_key)] if split_key in header else None
        yield Row(line, fields[places[image_key]], fields[places[label_key]], split)


def _separator(header: str, keys: Sequence[str]) -> str:
    """Returns the separator by which a header has the most of the wanted columns, then the most columns."""

    def fields(separator: str) -> list[str]:
        return [field.strip().strip('"') for field in header.strip().split(separator)]

    return max(_SEPARATORS, key=lambda s: (sum(key in fields(s) for key in keys), len(fields(s))))


def _places(path: Path, line: int, header: list[str], image_key: str, label_key: str) -> dict[str, int]:
    for which, key in (("image_key", image_key), ("label_key", label_key)):
        if key not in header:
            raise (UnlabelledSplit if key == label_key else DataError)(
                f"{path}, line {line}: no column '{key}' (data.{which}){closest(key, header)}: the header has "
                f"{shorten(header)}"
            )
        if header.count(key) > 1:
            raise DataError(f"{path}, line {line}: {header.count(key)} columns are called '{key}'; rename the others")
    return {key: header.index(key) for key in (image_key, label_key)}


def write_table(path: Path, rows: Sequence[tuple[str, str, str]]) -> None:
    """Writes (image, label, split) as a table that `read_table` reads, of `table_cell`s, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("image", "label", "split"))
            writer.writerows(map(table_cell, row) for row in rows)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class TableSplits:
    """The splits of a folder of tables, or of one table; see `Splits`.

    Attributes:
        where: the folder or the table.
        names: of the splits; of a table without a column of splits those that may be given for all of it.
        read: returns the table that has a split, and the split's rows.
        is_whole: whether it is a table without a column of splits.
    """

    config: DataConfig
    where: Path
    names: list[str]
    read: Callable[[str], tuple[Path, list[Row]]]
    is_whole: bool = False

    def choose(self, wanted: str | None) -> Choice:
        if not self.is_whole or wanted == NO_SPLIT:
            return choose_split(wanted, self.names, self.where)
        column = f"column '{self.config.split_key}' (data.split_key)"
        if wanted is None:
            return Choice(None, f"{self.where} has no validation split: no {column}, so the table is one split")
        if wanted not in self.names:
            raise DataError(f"{self.where} has no split '{wanted}': no {column}, so the table is one split")
        return Choice(wanted)

    def others(self, train: str) -> list[str]:
        return [] if self.is_whole else [name for name in self.names if name != train]

    def open(self, name: str, class_names: list[str] | None) -> DataSource:
        path, rows = self.read(name)
        return _open_table(self.config, path, rows, class_names)


def find_tables(config: DataConfig) -> TableSplits:
    """Finds the splits of the tables in `config.root`, or of the table `config.csv`, which is read.

    Raises:
        DataError: there is no table, or it has mistakes.
        OSError: the folder cannot be read.
    """
    root = Path(config.root)
    keys = (config.image_key, config.label_key, config.split_key)
    if config.csv is None:
        tables = {file.stem: file for file in sorted(root.iterdir()) if file.suffix.lower() in TABLE_ENDINGS}
        if not tables:
            raise DataError(f"{root} has no tables; expected {root}/train.csv, or another file as data.csv")
        return TableSplits(config, root, list(tables), lambda name: (tables[name], read_table(tables[name], *keys)))
    path = Path(config.csv)
    if not path.is_file() and (root / path).is_file():
        raise DataError(f"{path}: no such file (data.csv); it is not relative to data.root: give {root / path}")
    rows = read_table(path, *keys)
    if rows[0].split is None:
        return TableSplits(config, path, [".", DataConfig().train_split], lambda name: (path, rows), is_whole=True)
    names = [str(name) for name in dict.fromkeys(row.split for row in rows)]
    return TableSplits(config, path, names, lambda name: (path, [row for row in rows if row.split == name]))


def _open_table(config: DataConfig, path: Path, rows: list[Row], class_names: list[str] | None) -> DataSource:
    unlabelled = next((row for row in rows if is_no_label(row.label, class_names or ())), None)
    if unlabelled:
        what = "-1, which stands for no label" if unlabelled.label else "empty"
        raise UnlabelledSplit(f"{path}, line {unlabelled.line}: the {config.label_key} is {what}")
    rows = _with_slashes(rows, config.root)
    real_files = _check_files(config, path, rows)
    rows, note = _each_once(config, path, rows, real_files)
    line_of: dict[str, int] = {}
    for row in rows:
        line_of.setdefault(row.label, row.line)
    for label, line in line_of.items():
        check_single_label(label, line_of, class_names or (), f"{path}, line {line}")
    found = in_class_order(line_of)
    names = class_names or found
    unknown = [label for label in line_of if label not in names]
    where = f"{path}, line {line_of[unknown[0]]}" if unknown else path
    index = dict(zip(found, match_listed(config, found, names, where), strict=True))
    labels = np.array([index[row.label] for row in rows], dtype=np.int64)
    paths = [os.path.normpath(row.image) for row in rows]
    images = TableImages(str(Path(config.root)), paths, labels, config.value_range, config.max_image_pixels)
    name = f"{path} ({rows[0].split})" if rows[0].split is not None else str(path)
    files = [_path_of(config, row) for row in rows]
    return DataSource(images, names, name, note, files=files, real_files=real_files)


def _path_of(config: DataConfig, row: Row) -> str:
    return os.path.join(str(Path(config.root)), os.path.normpath(row.image))


def _with_slashes(rows: Sequence[Row], root: str) -> list[Row]:
    """Returns rows whose paths have slashes where Windows' separators lead to no file."""
    return [
        replace(row, image=row.image.replace("\\", "/"))
        if "\\" in row.image and not os.path.isfile(os.path.join(root, row.image))
        else row
        for row in rows
    ]


def _check_files(config: DataConfig, path: Path, rows: Sequence[Row]) -> RealFiles:
    """Returns where the files that a table names really lie.

    Raises:
        DataError: one is not there, or a relative path leads out of the folder.
    """
    outside = next((row for row in rows if leads_out(row.image)), None)
    if outside:
        raise DataError(
            f"{path}, line {outside.line}: {outside.image} leads out of data.root by '..'; make data.root a folder "
            "above all images, or write absolute paths"
        )
    real_files = RealFiles()
    missing = [row for row in rows if not real_files.add(_path_of(config, row))]
    if missing:
        first = missing[0]
        some = f"{len(missing):,} of {len(rows):,} are missing; " if len(missing) > 1 else ""
        raise DataError(
            f"{path}, line {first.line}: no such file: {os.path.join(config.root, first.image)}; {some}paths are "
            "relative to data.root"
        )
    return real_files


def _each_once(config: DataConfig, path: Path, rows: list[Row], real_files: RealFiles) -> tuple[list[Row], str]:
    """Returns the rows without those that name an image of another row by a link, and words about these.

    Raises:
        DataError: the two have different labels.
    """
    if not real_files.links and len(set(real_files.folders.values())) == len(real_files.folders):
        return rows, ""  # as `read_table` has found no path twice
    first: dict[str, Row] = {}
    for row in rows:
        before = first.setdefault(real_files(_path_of(config, row)), row)
        if before.label != row.label:
            raise DataError(
                f"{path}, line {row.line}: {row.image} is by a link the image of line {before.line}, {before.image}, "
                f"which has another label, '{before.label}'"
            )
    left_out = len(rows) - len(first)
    note = f"left out of {path}: {counted(left_out, 'row')} whose image is by a link that of another row"
    return list(first.values()), note if left_out else ""
