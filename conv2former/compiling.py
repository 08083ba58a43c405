"""C++ files of this package, compiled where they run.

As with torch.compile and Triton, the compiler is called at the first use, here for some seconds, which a line on
standard error announces. The result is kept in the user's cache folder (`$CONV2FORMER_HOME/compiled`) for the next
time. Where there is no compiler, no x86 processor with AVX2, or CONV2FORMER_COMPILE=0 is set, `library` returns None,
and others do the work in more time.

A library runs with all rights of the process, so nothing is loaded that somebody else could have written or that was
damaged: the folder is the user's and closed to others (0700), a library in it is a regular file of the user's that no
other can write, and its SHA-256 stands beside it. What fails a check is compiled again; where the folder itself fails,
a temporary one takes its place.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch

from ._store import store_folder, to_disk
from .text import printable

__all__ = ["describe", "library", "private_folder", "remove_temporary_folder"]

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
MOST_SAID = 500  # characters of what a compiler says
MARK = "compiled_to_the_end"  # a function that the last line of every source defines
log = logging.getLogger(__name__)


def library(source: Path, *flags: str) -> ctypes.CDLL | None:
    """Returns the functions of a C++ file, or None where it cannot or shall not be compiled.

    Args:
        source: the file. It finds the bytes of a vector in LANE_BYTES, and takes nothing but the standard library.
        flags: for the compiler, besides those for all files.
    """
    return None if os.environ.get("CONV2FORMER_COMPILE") == "0" else _library(source, flags)


def describe(source: Path, *flags: str) -> str | None:
    """Returns for which processors `library` has compiled a file, and its checksum; None where it has not."""
    found = library(source, *flags)
    if found is None:
        return None
    return (
        f"{source.name} compiled for {torch.backends.cpu.get_cpu_capability()} (SHA-256 {vars(found)['sha256'][:12]})"
    )


def private_folder(name: str) -> Path:
    """Returns a folder for what other compilers keep, in the store: the user's, closed to others, and writable.

    Where that cannot be had it is one for this process alone, which is logged as a warning.
    """
    folder = _cache_folder(store_folder() / name)
    return folder if _is_writable(folder) else _temporary_folder()


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
            return _load([*compiler.split(), *FLAGS, *flags, *instructions], source)
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or str(error)
    _warn(f"{compiler} cannot compile {source.name}, so the CPU takes longer: {said.strip()[:MOST_SAID]}")
    return None


def _warn(text: str) -> None:
    """Logs a warning, once on each machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        log.warning("%s", "\n".join(map(printable, text.split("\n"))))


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


def _load(command: list[str], source: Path) -> ctypes.CDLL:
    """Returns the library of a source, from the cache if it is there and can be trusted, else compiled now.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be compiled, or what was compiled cannot be loaded.
    """
    key = hashlib.sha256(b"\0".join([source.read_bytes(), os.uname().machine.encode(), *map(os.fsencode, command)]))
    path = _cache_folder(store_folder() / "compiled") / f"{source.stem}-{key.hexdigest()[:16]}.so"
    if library := _from_cache(path):
        return library
    with _one_at_a_time(path.parent):  # another process may have made it meanwhile
        return _from_cache(path, warn=True) or _compile(command, source, path)


def _from_cache(path: Path, warn: bool = False) -> ctypes.CDLL | None:
    """Returns the library of that path, or None where there is none to be trusted."""
    said = f"{path} is damaged, or somebody else could have written it"
    if _is_intact(path):
        try:
            return _open(path)
        except OSError as error:  # such as a C++ runtime that has gone
            said = f"{path} cannot be loaded ({error})"
    if warn and os.path.lexists(path):
        _warn(f"{said}; it is compiled again")
    return None


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Lets one process compile while others wait for what it makes, where the file system has locks."""
    import fcntl  # of POSIX only

    with ExitStack() as stack:
        with suppress(OSError):  # in the user's own folder: a lock on a file of all users anybody could keep
            file = stack.enter_context((folder / "lock").open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _call(command: list[str]) -> None:
    """Calls the compiler, and says so if it takes a while."""
    notice = threading.Timer(SHORT, _tell, command[-3:-2])
    notice.start()
    try:
        subprocess.run(
            command, check=True, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=PATIENCE
        )
    finally:
        notice.cancel()
        notice.join()


def _tell(source: str) -> None:
    line = f"compiling {os.path.basename(source)} for this machine, once: some seconds"
    if progress := sys.modules.get("tqdm"):
        progress.tqdm.write(line, file=sys.stderr)  # above a bar
    else:
        print(line, file=sys.stderr, flush=True)


def _open(path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    if not hasattr(found, MARK):
        raise OSError(f"{path.name} lacks functions of its source")
    vars(found)["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _compile(command: list[str], source: Path, path: Path) -> ctypes.CDLL:
    """Compiles `source` to `path`, or to a temporary folder where that cannot be written, and loads it.

    Raises:
        OSError, subprocess.SubprocessError: the compiler failed, or its result cannot be loaded.
    """
    folder = path.parent if _is_writable(path.parent) else _temporary_folder()
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=folder) as unfinished:
        made, checksum = Path(unfinished) / path.name, Path(unfinished) / "checksum"
        _call([*command, str(source), "-o", str(made)])
        # loaded by this name: under its later one the system would give back what was loaded from there before
        library = _open(made)
        checksum.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
        # the checksum first: a process that finds a library finds its checksum
        for file, target in ((checksum, _checksum_of(folder / path.name)), (made, folder / path.name)):
            file.chmod(0o600)
            to_disk(file)  # before the rename, or a power cut leaves the name of an empty file
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            file.replace(target)  # at once, since other processes may be at it too
    return library


def _checksum_of(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _is_intact(path: Path) -> bool:
    """Returns whether a library and its checksum are the user's own files, and belong together."""
    try:
        return hashlib.sha256(_read_own(path)).hexdigest().encode() == _read_own(_checksum_of(path))
    except OSError:
        return False


def _read_own(path: Path) -> bytes:
    """Reads a regular file that belongs to the user and that nobody else can write.

    Raises:
        OSError: it is something else.
    """
    # neither through a link, nor waiting for somebody to write to a pipe
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise OSError(f"{path} is not a file that only its owner, this user, can write")
        return file.read()


@functools.cache
def _cache_folder(folder: Path) -> Path:
    """Returns `folder`, made the user's and closed to others; a temporary one if that cannot be had."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid != os.geteuid():
            raise OSError("it belongs to another user")
        if stat.S_IMODE(found.st_mode) != 0o700:
            folder.chmod(0o700)
        os.listdir(folder)
    except OSError as error:
        temporary = _temporary_folder()
        _warn(f"{folder} cannot keep compiled functions ({error.strerror or error}): compiled for this process alone")
        return temporary
    return folder


def _is_writable(folder: Path) -> bool:
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


@functools.cache
def _temporary_folder() -> Path:
    """Returns a folder that lives as long as this process, the user's and closed to others."""
    folder = Path(tempfile.mkdtemp(prefix="conv2former-"))
    atexit.register(remove_temporary_folder)
    return folder


def remove_temporary_folder() -> None:
    """Removes the folder of this process alone, if there is one, as is done at its exit."""
    if _temporary_folder.cache_info().currsize:
        shutil.rmtree(_temporary_folder(), ignore_errors=True)
