"""The SLURM script with stand-ins for SLURM's own programs, which start the tasks and note the requeueing."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from .conftest import ROOT
from .engine.conftest import small_data  # noqa: F401 - a fixture
from .engine.test_trainer import final
from .test_scripts import checkpoints, config_file  # noqa: F401 - a fixture

pytestmark = pytest.mark.slow

# Two tasks of one node; the first that fails ends the others, and the worst exit code is srun's, as in SLURM.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids[$i]=$!; done
code=0
for pid in "${pids[@]}"; do wait $pid || code=$?; done
exit $code
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo localhost; else echo "$@" >> "$REQUEUED"; fi
"""


def test_out_of_time_and_on_again(config_file, tmp_path):  # noqa: F811
    programs = tmp_path / "bin"
    programs.mkdir()
    python = f'#!/bin/bash\nexec {sys.executable} "$@"\n'
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", python)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{programs}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1]",
        "SLURM_NTASKS": "2",
        "REQUEUED": str(tmp_path / "requeued.txt"),
    }
    job = ["bash", "scripts/slurm/train.sbatch", "--config", str(config_file), "--output", str(tmp_path / "run")]
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(job, cwd=ROOT, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while not checkpoints(tmp_path / "run") and time.monotonic() < deadline:
            time.sleep(0.01)
        subprocess.run(
            ["pkill", "-USR1", "-f", f"^{sys.executable} scripts/train.py.*--output {tmp_path}/run"], check=True
        )
        code = process.wait(60)
    output = (tmp_path / "log.txt").read_text()
    assert code == 75, output
    assert output.count("stopped by SIGUSR1 after step ") == 1
    assert (tmp_path / "requeued.txt").read_text() == f"requeue {os.getpid()}\n"
    again = subprocess.run(job, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "going on from " in again.stdout
    assert final(tmp_path / "run")["step"] == 12
