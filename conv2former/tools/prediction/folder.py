"""The folder of results of a prediction, which appears whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ...errors import OutputError
from ..output import replacing
from .inputs import ImageFile

__all__ = ["JSON_LINES", "AnyResults", "check_results_folder", "common_folder", "writing_folder"]

JSON_LINES = "predictions.jsonl"
# what a folder of results holds beside its folders of pictures
OWN_FILE = re.compile(
    r"predictions\.jsonl|detections\.json|sheet(_\d+)?\.png|legend\.png|explanations|masks|overlays|annotated|crops"
)
# keys of a line, and of the detections in it, that name a file, each with its folder
OF_LINES = {"mask": "masks", "overlay": "overlays", "annotated": "annotated"}
OF_DETECTIONS = {"crop": "crops"}
FOLDERS = [*OF_LINES.values(), *OF_DETECTIONS.values()]


class AnyResults(Protocol):
    """Results being written into a folder; as text, what there is in it.

    Attributes:
        count: images in it.
    """

    count: int

    def add(self, prediction: Any) -> dict[str, Any]:
        """Adds an image; returns the object of its JSON line."""

    def finish(self) -> None:
        """Writes what is still to be written."""


R = TypeVar("R", bound=AnyResults)


def common_folder(images: Sequence[ImageFile]) -> str:
    """Returns the path of the deepest folder that all images are below, with a slash; '' where there is none."""
    folders = {os.path.dirname(image.name) for image in images}
    if len({os.path.isabs(folder) for folder in folders}) > 1:
        return ""
    common = os.path.commonpath(folders)
    return os.path.join(common, "") if common else ""


@contextmanager
def writing_folder(folder: Path, images: Sequence[ImageFile], make: Callable[[Path], R]) -> Iterator[R]:
    """Lets results be written into a folder that appears whole, or not at all: after an error, or without any result.

    A folder that holds nothing but earlier results is replaced.

    Args:
        folder: where.
        images: all that are predicted.
        make: the results, of a folder that exists and is empty.

    Raises:
        OutputError: it cannot be written, or holds something else.
    """
    folder = Path(os.path.realpath(folder))  # a link stays one
    check_results_folder(folder, images)
    with replacing(folder) as temporary:
        temporary.mkdir()
        results = make(temporary)
        yield results
        results.finish()
        if not results.count:
            shutil.rmtree(temporary)
        elif folder.exists():
            check_results_folder(folder, images)  # again: it may have been used in the meantime
            os.replace(folder, temporary.with_name("replaced"))  # goes with the temporary folder


def check_results_folder(folder: Path, images: Sequence[ImageFile] = ()) -> None:
    """Raises OutputError if there is something at `folder` that is not results of an earlier call, or of `images`."""
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return
    except OSError as e:
        raise OutputError(f"{folder} cannot be written ({e.strerror}); give the name of a folder") from None
    own = str(folder.resolve())
    inputs = [image.name for image in images if isinstance(image.file, str)]
    if names and any(os.path.realpath(name).startswith(os.path.join(own, "")) for name in inputs):
        raise OutputError(f"{folder} holds images to predict; give another folder")
    foreign = [name for name in names if not OWN_FILE.fullmatch(name)]
    if names and JSON_LINES not in names:
        foreign = foreign or names
    if "explanations" in names:
        inside = os.listdir(folder / "explanations") if (folder / "explanations").is_dir() else ["explanations"]
        foreign += [name for name in inside if not re.fullmatch(r"\d+_.*\.png", name, re.DOTALL)]
    if any(name in names for name in FOLDERS):
        foreign += _foreign_pictures(folder)
    if foreign:
        raise OutputError(f"{folder} holds something else than predictions ({foreign[0]}); give another folder")


def _foreign_pictures(folder: Path) -> list[str]:
    """Returns files in the folders of pictures that the lines of the predictions do not name."""
    own: set[str] = set()
    with suppress(OSError, ValueError, TypeError), (folder / JSON_LINES).open(encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            own |= {str(record[key]) for key in OF_LINES if isinstance(record, dict) and key in record}
            found = record.get("detections", ()) if isinstance(record, dict) else ()
            own |= {str(one[key]) for one in found for key in OF_DETECTIONS if isinstance(one, dict) and key in one}
    there = [path for name in FOLDERS for path in sorted((folder / name).rglob("*")) if not path.is_dir()]
    return [name for path in there if (name := path.relative_to(folder).as_posix()) not in own]
