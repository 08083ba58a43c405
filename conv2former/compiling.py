"""C++ files of this package, compiled where they run.

As with torch.compile and Triton, the compiler is called at the first use, here for some seconds, which a line on
standard error announces. The result is kept in the user's cache folder (`$CONV2FORMER_HOME/compiled`) for the next
time. Where there is no compiler, no x86 processor with AVX2, or CONV2FORMER_COMPILE=0 is set, `library` returns None,
and others do the work in more time.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from .models.installed import store_folder

__all__ = ["library"]

COMPILERS = ("g++", "c++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fno-math-errno", "-Wno-psabi", "-shared", "-fPIC")
# What PyTorch found of the processor, and the instructions that this stands for. Named one by one, and not as "native",
# the result runs on every machine that shares a cache folder and comes to the same name.
INSTRUCTIONS = {
    "AVX2": ("-DLANE_BYTES=32", "-mavx2", "-mfma"),
    "AVX512": ("-DLANE_BYTES=64", "-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
}
MORE_INSTRUCTIONS = {"avx512_bf16": "-mavx512bf16"}  # what processors with AVX-512 may have, and compilers since 2020
PATIENCE, SHORT = 120, 0.5  # seconds for the compiler; so few need no words, a compiler that fails takes less
log = logging.getLogger(__name__)


def library(source: Path, *flags: str) -> ctypes.CDLL | None:
    """Returns the functions of a C++ file, or None where it cannot or shall not be compiled.

    Args:
        source: the file. It finds the bytes of a vector in LANE_BYTES, and takes nothing but the standard library.
        flags: for the compiler, besides those for all files.
    """
    return None if os.environ.get("CONV2FORMER_COMPILE") == "0" else _library(source, flags)


@functools.cache
def _library(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL | None:
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, COMPILERS)), None)
    sets = _instruction_sets()
    if not sets:
        log.info("%s is for x86 processors with AVX2: without it the CPU takes longer", source.name)
        return None
    if compiler is None or os.name != "posix" or sys.byteorder != "little":
        log.info("there is no C++ compiler (g++, clang++) for %s: without it the CPU takes longer", source.name)
        return None
    said = ""
    for instructions in sets:
        try:
            return ctypes.CDLL(str(_compile([*compiler.split(), *FLAGS, *flags, *instructions], source)))
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or str(error)
    log.info("%s cannot compile %s, so the CPU takes longer: %s", compiler, source.name, said)
    return None


def _instruction_sets() -> list[tuple[str, ...]]:
    """Returns the instructions to compile for, those for which a compiler may be too old first."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in INSTRUCTIONS:
        return []
    plain = INSTRUCTIONS[capability]
    if capability != "AVX512" or not hasattr(torch.cpu, "get_capabilities"):
        return [plain]
    found = torch.cpu.get_capabilities()
    more = tuple(flag for name, flag in MORE_INSTRUCTIONS.items() if found.get(name))
    return [plain + more, plain] if more else [plain]


def _compile(command: list[str], source: Path) -> Path:
    """Returns the compiled file, which may have been there already."""
    key = hashlib.sha256(b"\0".join([source.read_bytes(), os.uname().machine.encode(), *map(os.fsencode, command)]))
    path = store_folder() / "compiled" / f"{source.stem}-{key.hexdigest()[:16]}.so"
    if not path.exists():
        path = _folder_to_write(path.parent) / path.name
        with _one_at_a_time(source):
            if not path.exists():  # another process may have made it meanwhile
                _call([*command, str(source)], path)
    return path


def _call(command: list[str], path: Path) -> None:
    notice = threading.Timer(SHORT, _tell, command[-1:])
    notice.start()
    try:
        with tempfile.TemporaryDirectory(prefix="unfinished-", dir=path.parent) as unfinished:
            made = Path(unfinished) / path.name
            subprocess.run([*command, "-o", str(made)], check=True, capture_output=True, text=True, timeout=PATIENCE)
            made.replace(path)  # at once, since other processes may look for it
    finally:
        notice.cancel()
        notice.join()


def _tell(source: str) -> None:
    line = f"compiling {os.path.basename(source)} for this machine, once: some seconds"
    if progress := sys.modules.get("tqdm"):
        progress.tqdm.write(line, file=sys.stderr)  # above a bar
    else:
        print(line, file=sys.stderr, flush=True)


@contextmanager
def _one_at_a_time(source: Path) -> Iterator[None]:
    """Lets one process compile a file while others wait for what it makes, where the file system has locks."""
    import fcntl  # of POSIX only

    with source.open("rb") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _folder_to_write(folder: Path) -> Path:
    """Returns the folder, made if need be, or one that lives as long as this process if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="conv2former-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
