"""C++ files compiled at the first use, and what happens where they cannot be."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch

from conv2former import compiling
from conv2former.tools.killing import ForkedProcesses

SOURCE = """
extern "C" int answer() { return LANE_BYTES; }
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


def compiled(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "store" / "compiled").iterdir())


def test_a_function(compiler, source):
    library = compiling.library(source)
    assert library is not None
    assert library.answer() == {"AVX2": 32, "AVX512": 64}[torch.backends.cpu.get_cpu_capability()]


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

    processes = ForkedProcesses(ask, 3, tmp_path / "log.txt")
    assert processes.wait(60)
    assert set(processes.pids.values()) == {0}, (tmp_path / "log.txt").read_text()
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
