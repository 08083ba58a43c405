"""C++ files compiled at the first use, and what happens where they cannot be."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

from conv2former import compiling
from conv2former.tools.runs.killing import RunProcesses

SOURCE = """
extern "C" int answer() { return LANE_BYTES; }
extern "C" void compiled_to_the_end() {}
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    return path


@pytest.fixture(autouse=True)
def anew(monkeypatch, tmp_path):
    """The compiler is looked for again, with an empty store."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CONV2FORMER_COMPILE", raising=False)
    monkeypatch.setenv("CONV2FORMER_HOME", str(tmp_path / "store"))


@pytest.fixture
def compiler(source):
    if compiling.library(source) is None:
        pytest.skip("no C++ compiler")
    compiling._library.cache_clear()
    compiling._cache_folder.cache_clear()


def compiled(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "store" / "compiled").glob("*.so"))


def test_a_function(compiler, source):
    library = compiling.library(source)
    assert library is not None
    assert library.answer() == {"AVX2": 32, "AVX512": 64}[torch.backends.cpu.get_cpu_capability()]


def test_what_is_compiled_has_a_name(compiler, source, monkeypatch, tmp_path):
    said = compiling.describe(source)
    (made,) = compiled(tmp_path)
    assert f"(SHA-256 {hashlib.sha256(made.read_bytes()).hexdigest()[:12]})" in said
    compiling._library.cache_clear()
    assert compiling.describe(source) == said  # from the cache, too
    monkeypatch.setenv("CONV2FORMER_COMPILE", "0")
    assert compiling.describe(source) is None


def test_without_a_compiler(source, monkeypatch, caplog):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    with caplog.at_level(logging.INFO):
        assert compiling.library(source) is None
    assert "no C++ compiler (g++, clang++) for answer.cpp" in caplog.text


def test_another_processor(source, monkeypatch, caplog):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with caplog.at_level(logging.INFO):
        assert compiling.library(source) is None
    assert "AVX2" in caplog.text


@pytest.mark.parametrize("compiler", ["false", "/nowhere/c++", "echo 'unfinished"])
def test_a_compiler_that_fails(compiler, source, monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.INFO):
        assert compiling.library(source) is None
    assert "cannot compile answer.cpp" in caplog.text
    assert compiled(tmp_path) == []


def test_a_compiler_that_does_not_know_the_latest_instructions(compiler, source, monkeypatch, tmp_path):
    used = {compiling._instruction_sets()[0]}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setattr(compiling, "MORE_INSTRUCTIONS", {"avx512_bf16": "-mfrom-the-future"})
    used.add(compiling._instruction_sets()[-1])
    assert compiling.library(source) is not None
    compiling._library.cache_clear()
    monkeypatch.setattr(compiling, "MORE_INSTRUCTIONS", {"avx512_bf16": "-DMORE"})
    assert compiling.library(source) is not None
    used.add(compiling._instruction_sets()[0])
    assert len(used) > 1 or torch.backends.cpu.get_cpu_capability() != "AVX512"
    assert len(compiled(tmp_path)) == len(used)


def test_switched_off(source, monkeypatch, tmp_path):
    monkeypatch.setenv("CONV2FORMER_COMPILE", "0")
    assert compiling.library(source) is None
    assert not (tmp_path / "store").exists()


def test_compiled_once(compiler, source, monkeypatch, tmp_path):
    (path,) = compiled(tmp_path)
    written = path.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(compiling.subprocess, "run", None)  # not called again
        assert compiling.library(source) is not None
    assert path.stat().st_mtime_ns == written
    assert compiling.library(source, "-DOTHER") is not None
    assert len(compiled(tmp_path)) == 2
    compiling._library.cache_clear()
    source.write_text(SOURCE.replace("LANE_BYTES", "2 * LANE_BYTES"))
    assert compiling.library(source) is not None
    assert len(compiled(tmp_path)) == 3


def test_what_takes_a_while_is_said_before_and_once(compiler, source, monkeypatch, tmp_path, capfd):
    """Of several processes that begin at the same time one compiles and says so; later ones say nothing."""
    monkeypatch.setattr(compiling, "SHORT", 0)
    monkeypatch.setenv("CONV2FORMER_HOME", str(tmp_path / "new"))

    def ask() -> None:
        assert compiling.library(source) is not None

    processes = RunProcesses(ask, 3, tmp_path / "log.txt")
    assert processes.wait(60)
    assert set(processes.exit_codes) == {0}, (tmp_path / "log.txt").read_text()
    said = (tmp_path / "log.txt").read_text() + capfd.readouterr().err
    assert said == "compiling answer.cpp for this machine, once: some seconds\n"


def test_a_compiler_that_fails_at_once_is_not_announced(source, monkeypatch, capfd):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setenv("CXX", "false")
    assert compiling.library(source) is None
    assert capfd.readouterr().err == ""


def test_a_store_that_cannot_be_written(compiler, source, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CONV2FORMER_HOME", str(tmp_path / "file"))
    library = compiling.library(source)
    assert library is not None
    assert library.answer()


def test_the_store_with_compiled_functions_lists_no_model(tmp_path):
    from conv2former import list_installed

    os.makedirs(tmp_path / "store" / "compiled")
    assert list_installed() == []


@pytest.fixture
def planted(compiler, source, tmp_path) -> Path:
    """The library that an earlier process left."""
    (path,) = compiled(tmp_path)
    copy = path.with_name("copy")
    shutil.copyfile(path, copy)  # this process has loaded the other file, which must stay as it is
    copy.chmod(0o600)
    copy.replace(path)
    return path


def assert_compiled_again(path: Path, source: Path, caplog, said: str) -> None:
    library = compiling.library(source)
    assert library is not None
    assert library.answer() in (32, 64)
    assert caplog.text.count(said) == 1
    assert compiling._is_intact(path)  # so that the next process takes it


def make_foreign(path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give files away")
    os.chown(path, 12345, -1)


DOUBTS = {
    "truncated": lambda path: os.truncate(path, 1000),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(os.urandom(5000)),
    "a flipped bit": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\1"),
    "writable by others": lambda path: path.chmod(0o666),
    "another user's": make_foreign,
    "a link": lambda path: (path.rename(path.with_name("real")), path.symlink_to("real")),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "without a checksum": lambda path: path.with_name(path.name + ".sha256").unlink(),
    "another user's checksum": lambda path: make_foreign(path.with_name(path.name + ".sha256")),
}


@pytest.mark.parametrize("doubt", DOUBTS)
def test_a_library_that_cannot_be_trusted_is_compiled_again(planted, source, caplog, doubt):
    DOUBTS[doubt](planted)
    assert_compiled_again(planted, source, caplog, f"{planted} is damaged, or somebody else could have written it")


def test_a_library_without_the_functions_is_compiled_again(planted, source, caplog):
    empty = planted.with_name("empty.cpp")
    empty.write_text("")
    compiling.subprocess.run(["c++", "-shared", "-fPIC", empty, "-o", planted], check=True)
    planted.with_name(planted.name + ".sha256").write_text(compiling.hashlib.sha256(planted.read_bytes()).hexdigest())
    assert_compiled_again(planted, source, caplog, "cannot be loaded")


def test_a_compiler_that_leaves_functions_out_is_not_believed(compiler, source, caplog):
    source.write_text("int other;")
    assert compiling.library(source) is None
    assert caplog.text.count("lacks functions") == 1


def test_a_folder_that_others_can_write_is_closed(planted, source, caplog):
    planted.parent.chmod(0o777)
    assert compiling.library(source) is not None
    assert planted.parent.stat().st_mode & 0o777 == 0o700
    assert planted.stat().st_mode & 0o777 == 0o600
    assert not caplog.text


def test_the_folder_of_another_user_is_not_used(planted, source, caplog):
    make_foreign(planted.parent)
    library = compiling.library(source)
    assert library is not None
    assert not Path(library._name).is_relative_to(planted.parent)
    assert caplog.text.count("belongs to another user") == 1


def test_a_compiler_whose_output_is_no_text(compiler, source, monkeypatch, caplog, tmp_path):
    odd = tmp_path / "odd"
    odd.write_bytes(b"#!/bin/sh\nprintf '\\377\\376 no' >&2\nexit 1\n")
    odd.chmod(0o755)
    monkeypatch.setenv("CXX", str(odd))
    assert compiling.library(source) is None
    assert caplog.text.count("cannot compile answer.cpp") == 1
