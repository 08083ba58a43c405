"""Which value of a constant is found to be the fastest, with a clock that follows a formula."""

from __future__ import annotations

import pytest
import torch

from conv2former.errors import UserError
from conv2former.tools.benchmark import tune

from ..ops.interpreter import INTERPRETS

if not INTERPRETS:
    pytest.skip("needs Triton, and its interpreter chosen", allow_module_level=True)

from conv2former.ops.cuda import ahead, mixing
from conv2former.ops.cuda.launch import intercepting


class Clock:
    """A second for every column of the MLP's strips beyond two, two for whatever is cut into one part."""

    def __init__(self, *args) -> None:
        pass

    def repetitions(self, action) -> int:
        return 1

    def read(self, action, repetitions=1) -> float:
        if mixing.MLP_STRIP == 8:
            raise RuntimeError("out of registers\nmore")
        if mixing.BAND_REGISTERS != 128:
            return 9.0
        return 1.0 + (mixing.BAND_PARTS == 1) + abs(mixing.MLP_STRIP - 2) + mixing.PROGRAMS / 512


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    monkeypatch.setattr(tune, "gpu_for", lambda command, dtype: torch.device("cpu"))
    monkeypatch.setattr(tune, "matmul_probe", lambda device, dtype: (None, 1))
    monkeypatch.setattr(tune, "DeviceClock", Clock)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(tune, "STAGES", ((8, 4), (8, 2), (8, 2), (8, 1)))
    compiled = []
    monkeypatch.setattr(ahead, "compile_together", lambda jobs, device: compiled.append(len(jobs)))
    with intercepting(lambda *_: None):  # nothing is run
        lines = list(tune.measure_variants(2, torch.bfloat16, 1))
    assert len(compiled) == sum(map(len, tune.VARIANTS.values()))
    assert min(compiled) > 5
    return lines


def test_the_fastest_value_is_named(measured):
    text = "\n".join(measured)
    assert "set BAND_PARTS = 2 in conv2former/ops/cuda/mixing.py: 20.0% less time than 1" in text
    assert "BAND_REGISTERS = 128 is the fastest, as it is" in text
    assert "set MLP_STRIP = 2 in conv2former/ops/cuda/mixing.py: 40.0% less time than 4" in text
    assert "PROGRAMS = 512 is the fastest, as it is" in text


def test_what_fails_is_a_row(measured):
    (row,) = [line for line in measured if "not measured" in line]
    assert row.split()[:2] == ["MLP_STRIP", "8"]
    assert "out of registers" in row


def test_rows_have_the_milliseconds_of_a_step(measured):
    (row,) = [line.split() for line in measured if line.split()[:2] == ["BAND_PARTS", "2"]]
    assert row[2:] == ["84000.00"] * 4 + ["336000.00"]  # 21 blocks, 1 + 2 + 1 seconds each


def test_constants_are_as_they_were(measured):
    """And the first value to be timed is the one that is there."""
    assert {name: getattr(mixing, name) for name in tune.VARIANTS} == {n: v[0] for n, v in tune.VARIANTS.items()}


def test_nothing_that_could_be_measured():
    failed = [tune.Variant("X", 1, error="not measured: no"), tune.Variant("X", 2, error="not measured: no")]
    assert tune.conclusion("X", failed) == "X: nothing could be measured"
    assert tune.conclusion("X", [failed[0], tune.Variant("X", 2, (1.0,))]) == "X = 2 is the fastest"


def test_without_a_gpu():
    with pytest.raises(UserError, match="benchmark tune: the fused operators need an NVIDIA GPU"):
        list(tune.measure_variants(2, torch.bfloat16, 1))
