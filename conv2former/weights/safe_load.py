"""Reads weight files that anybody may have made: no code from them runs, and a small file cannot eat the machine.

`torch.load(weights_only=True)` keeps code out. It trusts the rest: it allocates what a file claims, inflates what is
compressed, and ignores the checksums in the file. So a file is looked at before it is loaded, and what came out of it
once more.
"""

from __future__ import annotations

import argparse
import os
import pickle
import pickletools
import re
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from ..errors import CheckpointError, is_out_of_memory, shorten

__all__ = ["load_tensors"]

MAX_NAME = 1000  # letters of a class's or function's name in a pickle
MAX_OPERATIONS = 4_000_000  # of a pickle; a training checkpoint of the largest variant has 200,000
# Bytes of all tensors: they may share memory, so this many times those of the file, or as many as a whole network has
MAX_REPEATS, MAX_SHARED = 8, 1 << 30
BLOCK = 1 << 22
ALLOWED: list[Any] = [argparse.Namespace]  # the recipe in the authors' and timm's checkpoints
# what torch writes of a state dict in either format, so that it is not named beside what stands in the way
HARMLESS = re.compile(
    r"torch\.(\w+Storage|Size|Tensor|device|dtype|bool|(b?float|u?int|complex)\d+)"
    r"|torch\._utils\._rebuild_\w+|torch\.storage\.\w+|torch\.nn\.parameter\.Parameter|torch\.serialization\._get_layout"
    r"|collections\.(OrderedDict|Counter)|argparse\.Namespace|_codecs\.encode"
)
LEGACY_PICKLES = 5  # magic number, protocol, system, content and storage keys, before the storages


def load_tensors(path: Path) -> dict[str, Any]:
    """Reads a `.safetensors` or `torch.save` file to the CPU.

    Of the classes that a pickle may hold, only tensors, built-in types and `argparse.Namespace` are allowed.

    Returns:
        What the file holds.

    Raises:
        CheckpointError: it is not a regular file, damaged, refused, or no dictionary.
    """
    try:
        size = _regular_size(path)
        content = _load_safetensors(path) if path.suffix == ".safetensors" else _load_torch(path)
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict or a checkpoint")
        _check_tensors(path, content, size)
    except CheckpointError:
        raise
    except Exception as e:  # whatever the readers of three formats raise, of bytes that are wrong
        if is_out_of_memory(e):
            raise CheckpointError(
                f"{path} claims more memory than this machine has: it is damaged or made to harm, or this machine is "
                "too small for it"
            ) from None
        raise CheckpointError(f"{path} is truncated or not a checkpoint that torch can read{_reason(e)}") from None
    return content


def _regular_size(path: Path) -> int:
    """Returns the bytes of a file.

    Raises:
        CheckpointError: it is something else than a regular file, such as a pipe, which nobody may ever write to.
        OSError: it cannot be looked at.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path}: not a file")
    return found.st_size


def _load_safetensors(path: Path) -> dict[str, Any]:
    import safetensors.torch  # a dependency of timm, slow to import

    try:
        return dict(safetensors.torch.load_file(path))
    except (safetensors.SafetensorError, OSError, ValueError) as e:
        raise CheckpointError(f"{path} is not a complete .safetensors file ({e})") from None


def _load_torch(path: Path) -> Any:
    names: list[str] = []  # of classes and functions
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"  # by which torch tells its two formats apart
            (_check_zip if is_zip else _check_legacy)(path, file, names)
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as e:  # torch has one for code in a file, and others for what it comes upon before
        if code := _code_in(path, names):
            raise CheckpointError(_refusal(path, names, code)) from None
        if not isinstance(e, pickle.UnpicklingError):
            raise
        raise CheckpointError(f"{path} is not a checkpoint that torch can read") from None


def _check_zip(path: Path, file: IO[bytes], names: list[str]) -> None:
    """Checks the entries of a zip archive, and adds the names that its pickle refers to.

    Raises:
        CheckpointError: they are compressed, larger than the archive, or do not match their checksums.
        zipfile.BadZipFile: it is not whole.
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise CheckpointError(f"{path} is an exported network (TorchScript); give the weight file that it is of")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise CheckpointError(f"{path} is refused: it is compressed, which torch.save never does; unpack it first")
        if sum(entry.file_size for entry in entries) > os.fstat(file.fileno()).st_size:
            raise CheckpointError(f"{path} is refused: its parts claim more bytes than the file has")
        for entry in entries:
            if entry.filename.endswith("data.pkl"):
                with archive.open(entry) as part:
                    _add_names(path, part, names)
            try:
                with archive.open(entry) as part:
                    while part.read(BLOCK):
                        pass  # zipfile compares the checksum at the end
            except zipfile.BadZipFile:
                raise CheckpointError(
                    f"{path} is damaged: {entry.filename!r} in it does not match its checksum; copy or download it anew"
                ) from None


def _has_tar_members(path: Path) -> bool:
    """Returns whether a file is a tar archive; one of zeros is none, although it has the look of an empty one."""
    try:
        with tarfile.open(path) as archive:
            return archive.next() is not None
    except (tarfile.TarError, OSError, EOFError):
        return False


def _check_legacy(path: Path, file: IO[bytes], names: list[str]) -> None:
    """Adds the names that the pickles at the start of a file of torch before 1.6 refer to.

    Raises:
        CheckpointError: it is of torch before 0.2, or its pickles are longer than any checkpoint's.
    """
    if _has_tar_members(path):
        raise CheckpointError(
            f"{path} is refused: it is a tar archive, as torch wrote before 0.2: reading one runs code that it refers "
            f"to. {_saved_anew(path, '')}"
        )
    file.seek(0)
    for _ in range(LEGACY_PICKLES):
        try:
            _add_names(path, file, names)
        except CheckpointError:
            raise
        except Exception:  # no pickle, or no more: what it is, torch says
            break


def _add_names(path: Path, file: IO[bytes], names: list[str]) -> None:
    """Adds the classes and functions, `module.name`, that a pickle refers to, without running it.

    Those before a place where it is damaged are there, too.

    Raises:
        CheckpointError: it is longer than any checkpoint's.
    """
    texts: list[str | None] = []  # the last two that were pushed
    memo: dict[int, str | None] = {}
    for number, (operation, argument, _) in enumerate(pickletools.genops(file)):
        if number == MAX_OPERATIONS:
            raise CheckpointError(f"{path} is refused: more than {MAX_OPERATIONS:,} entries besides its tensors")
        kind = operation.name
        if kind in ("GLOBAL", "INST"):
            names.append(str(argument).replace(" ", "."))
            texts = []
        elif kind == "STACK_GLOBAL":
            names.append(".".join(text or "?" for text in texts))
            texts = []
        elif kind.endswith("PUT") or kind == "MEMOIZE":
            memo[len(memo) if kind == "MEMOIZE" else int(argument or 0)] = texts[-1] if texts else None
        elif kind.endswith("GET"):
            texts = [*texts[-1:], memo.get(int(argument or 0))]
        else:
            texts = [*texts[-1:], argument if isinstance(argument, str) else None]
        if names and len(names[-1]) > MAX_NAME:  # over which torch's own message takes hours
            raise CheckpointError(_refusal(path, names, names[-1:]))


def _code_in(path: Path, names: list[str]) -> list[str]:
    """Returns what of the names in a file is code that would have to run to open it. It is for the message alone."""
    try:
        with torch.serialization.safe_globals(ALLOWED):
            found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # it knows zip archives alone, and only their usual operations
        found = []
    return sorted({*found} or {name for name in names if not HARMLESS.fullmatch(name)})


def _refusal(path: Path, names: list[str], code: list[str]) -> str:
    """Returns why a file is not opened, and how its weights can be saved without the code in it."""
    is_module = any(name.startswith(("torch.nn.modules.", "conv2former.")) for name in names)
    what = "it is a whole network as an object, not its state dict" if is_module else "not weights alone"
    also = "" if is_module else ", with the key under which it has them"
    anew = _saved_anew(path, ".state_dict()" if is_module else '["state_dict"]')
    return f"{path} is refused: it refers to code, {shorten(code, 5)}, which is not run; {what}. {anew}{also}"


def _saved_anew(path: Path, weights: str) -> str:
    return (
        f'If you trust its source, save the weights alone where it can be opened: torch.save(torch.load("{path.name}", '
        f'weights_only=False){weights}, "weights.pt")'
    )


def _reason(error: Exception) -> str:
    text = str(error).strip().split("\n")[0].split(". ")[0][:200]
    return f" ({text})" if " " in text else ""  # the text of a bare EOFError or KeyError tells nobody anything


def _check_tensors(path: Path, content: dict[Any, Any], size: int) -> None:
    """Checks that tensors are ordinary ones, and no larger than their file can be.

    Raises:
        CheckpointError: one is not, such as a view of petabytes of a single number.
    """
    total = 0
    for tensor in _tensors_in(content):
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_nested:
            continue  # refused by its name where weights are expected; claims no memory before
        total += tensor.nbytes
    if total > max(MAX_REPEATS * size, MAX_SHARED):
        raise CheckpointError(f"{path} is refused: {size:,} bytes claim {total:,} bytes of tensors")


def _tensors_in(content: Any) -> Iterator[torch.Tensor]:
    """Returns all tensors in nested dictionaries and sequences, each container once."""
    todo, seen = [content], set()
    while todo:
        value = todo.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple, set, argparse.Namespace)) and id(value) not in seen:
            seen.add(id(value))
            value = vars(value) if isinstance(value, argparse.Namespace) else value
            todo += value.values() if isinstance(value, dict) else value
