"""Tests that need an NVIDIA GPU: `make test-gpu`, minutes on one. All other tests hide GPUs, these are skipped there.

CONV2FORMER_TESTS_GPU=cpu rehearses them without a GPU: it runs what of their code can run there, which is most.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from conv2former.config import Config, load_config
from conv2former.tools.runs.killing import EVERYTHING_ON

from ..conftest import ROOT

HERE = Path(__file__).parent
REHEARSES = os.environ.get("CONV2FORMER_TESTS_GPU") == "cpu"
DEVICE = torch.device("cpu") if REHEARSES else torch.device("cuda", 0)

# In a run of a few seconds.
SHORT = ["augment.auto_augment=null", "train.batch_size=96", "checkpoint.every_steps=5", "log.tensorboard=false"]


def why_not() -> str:
    """Returns why tests of a GPU cannot run here, '' if they can."""
    if not os.environ.get("CONV2FORMER_TESTS_GPU"):
        return "tests of a GPU are started by: make test-gpu"
    if not REHEARSES and not torch.cuda.is_available():
        return "torch sees no GPU here"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if reason := why_not():
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """A folder for the quickstart's data set, which writes itself there."""
    return tmp_path_factory.mktemp("data") / "digits"


@pytest.fixture
def configure(digits):
    """Returns the quickstart's configuration with everything on, and changes such as `train.seed=1`."""

    def make(*changes: str) -> Config:
        return load_config(
            ROOT / "configs" / "quickstart.yaml", [f"data.root={digits}", *EVERYTHING_ON, *SHORT, *changes]
        )

    return make


needs_gpu = pytest.mark.skipif(REHEARSES, reason="cannot be rehearsed without a GPU")
