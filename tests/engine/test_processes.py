"""Several processes in one run, forked, because something must be broken inside; torchrun is in test_scripts.py."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from conv2former.config import Config, check_config
from conv2former.engine import distributed, prepare, train, trainer
from conv2former.engine.logging import read_metrics
from conv2former.engine.saved import first_not_finite
from conv2former.errors import RunStopped
from conv2former.tasks.classification import task as classification
from conv2former.tools.cli import run_cli
from conv2former.tools.runs.comparing import differing_runs, metrics_of
from conv2former.tools.runs.killing import RunProcesses, kill_and_compare

from ..conftest import ROOT
from .conftest import configure
from .test_trainer import final

pytestmark = pytest.mark.slow

PLAIN = {
    "model__drop_path_rate": 0.0,
    "model__drop_rate": 0.0,
    "augment__mixup": 0.0,
    "augment__cutmix": 0.0,
}


def run(action, count: int, folder) -> tuple[list[int], str]:
    """Returns the exit codes and all that was printed."""
    log = folder / "output.txt"
    processes = RunProcesses(lambda: run_cli(action), count, log)
    ended = processes.wait(120)
    if not ended:
        processes.kill()
    assert ended, log.read_text()
    return processes.exit_codes, log.read_text()


def test_the_same_global_batches_train_the_same_network(raw_config, tmp_path):
    """1 process x 8, 2 x 4, and 4 accumulation steps of 2: equal but for the order of additions.

    That is said of where images do not meet: no mixup, and BatchNorm, which is in the stem, frozen. In float32 the
    weights after 20 steps then agree to 1e-5 of their size.
    """
    frozen = {**PLAIN, "model__freeze": "stem", "optim__opt": "sgd", "optim__base_lr": 1e-2, "optim__layer_decay": None}
    for name, count, batch_size, accum_steps in (("one", 1, 8, 1), ("two", 2, 4, 1), ("four", 1, 2, 4)):
        config = configure(raw_config, **frozen, train__batch_size=batch_size, train__accum_steps=accum_steps)
        codes, output = run(lambda config=config, name=name: train(config, tmp_path / name), count, tmp_path)
        assert "Warning" not in output
        assert set(codes) == {0}, output
    one = final(tmp_path / "one")["model"]
    start = classification.build_model(configure(raw_config, **frozen), 3).state_dict()
    moved = max((one[key] - start[key]).abs().max() for key in one if one[key].is_floating_point())
    assert moved > 1e-2  # there is something to compare
    for key, value in one.items():  # after evaluations too
        assert torch.equal(value, start[key]) or not key.startswith("stem."), key
    for name in ("two", "four"):
        other = final(tmp_path / name)["model"]
        for key, value in one.items():
            assert torch.allclose(other[key], value, rtol=1e-5, atol=1e-6), (name, key)
        losses = [[row["loss"] for row in read_metrics(tmp_path / n / "metrics.jsonl")] for n in ("one", name)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(("count", "kills", "start"), [(1, 1, "forkserver"), (2, 5, "fork")])
def test_killed_at_random(raw_config, tmp_path, count, kills, start):
    """With SIGKILL, at any moment, several times: the run ends bit for bit as the one that was left alone.

    Accumulation, mixup, drop path, dropout, averaging and BatchNorm are on; the number of loader workers changes from
    start to start.
    """
    short = {"schedule__epochs": 1, "schedule__warmup_epochs": 0, "schedule__cooldown_epochs": 0} if count == 1 else {}
    config = configure(raw_config, checkpoint__every_steps=2, log__every_steps=1, **short)
    lines: list[str] = []
    different = kill_and_compare(config, tmp_path / "runs", kills, count, [0, 2], count, lines.append, start)
    print("\n".join(lines))
    assert different == 0
    assert re.fullmatch(rf"{kills} kills, \d+ finished runs, 0 different", lines[-1])


def test_runs_start_where_no_gpu_has_been_touched(tmp_path):
    """CUDA cannot be used in a fork of a process that has; the imports of a run's processes must not be the first."""
    processes = RunProcesses(partial(print, "began"), 2, tmp_path / "log.txt", "forkserver")
    assert processes.wait(60)
    assert processes.exit_codes == [0, 0]
    assert (tmp_path / "log.txt").read_text() == "began\n" * 2
    touches = (
        "torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = torch._C._cuda_getDeviceCount"
    )
    program = f"import sys, torch; {touches} = lambda *_: sys.exit('touched'); import conv2former.engine"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_a_difference_would_be_found(raw_config, tmp_path, monkeypatch):
    """With a run that begins with other weights whenever it is started anew."""
    real = classification.build_model

    def other_start(*args):
        model = real(*args)
        model.head.fc.bias.data += len(list(tmp_path.glob("runs/*"))) * 1e-6
        return model

    monkeypatch.setattr(classification, "build_model", other_start)
    lines: list[str] = []
    different = kill_and_compare(configure(raw_config), tmp_path / "runs", 1, 1, [0], 0, lines.append, "fork")
    # on a machine of changing speed a run may end before it is killed
    assert lines[-1] == f"1 kills, {different} finished runs, {different} different"
    assert different > 0
    assert "DIFFERENT in metrics.jsonl: step " in lines[-2]
    assert "best.pt: model." in lines[-2]


@pytest.mark.parametrize(("precision", "accum_steps"), [("fp32", 1), ("bf16", 2)])
def test_not_a_number_on_one_process_stops_all(raw_config, tmp_path, monkeypatch, precision, accum_steps):
    real = trainer.train_step

    def poisoned(run, batches, step, check):
        if run.world.rank == 1 and step == 7:
            batches[-1].images[0, 0, 0, 0] = float("nan")
        return real(run, batches, step, check)

    changes = {"train__precision": precision, "train__accum_steps": accum_steps, "train__batch_size": 4 // accum_steps}
    config = configure(raw_config, **changes, checkpoint__every_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", poisoned)
        codes, output = run(lambda: train(config, tmp_path / "run"), 2, tmp_path)
    assert codes == [3, 3], output
    assert output.count("error") == 1, output
    assert "not finite at step 7 (loss nan on rank 1, gradient norm nan, learning rate" in output
    saved = final(tmp_path / "run")
    assert saved["step"] == 7
    assert not first_not_finite(saved)
    codes, output = run(lambda: train(config, tmp_path / "run"), 2, tmp_path)
    assert codes == [0, 0], output


def test_a_full_disk_stops_all(raw_config, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("conv2former.engine.checkpoint._write_whole", full)
    codes, output = run(lambda: train(configure(raw_config, train__accum_steps=1), tmp_path / "run"), 2, tmp_path)
    assert codes == [2, 2], output
    assert output.count("error: ") == 1, output
    assert "step_00000005.pt cannot be written ([Errno 28] No space left on device)" in output
    assert "Traceback" not in output


def test_mistakes_are_found_before_the_processes_meet(raw_config, tmp_path, monkeypatch):
    def meet(*args, **kwargs):
        raise AssertionError("they met")

    monkeypatch.setattr(distributed.dist, "init_process_group", meet)
    monkeypatch.setattr(distributed.dist, "rendezvous", meet)
    for change, expected in (
        ({"data__root": "/none"}, "error: /none: "),
        ({"data__label_key": "none"}, "no column 'none'"),
        ({"train__batch_size": 500}, "fewer than one global batch"),
        ({"model__checkpoint": "/none.pt"}, "error: /none.pt: no such file"),
        ({"optim__opt": "none"}, "no optimizer 'none'"),
    ):
        folder = tmp_path / next(iter(change))
        folder.mkdir()
        config = configure(raw_config, **change)
        codes, output = run(lambda config=config, folder=folder: train(config, folder / "run"), 3, folder)
        assert codes == [2, 2, 2], output
        assert output.count("error") == 1, output
        assert expected in output
        assert not (folder / "run").exists()


def test_processes_with_other_data_are_named(raw_config, tmp_path, monkeypatch):
    opened = classification.open_train_and_val

    def fewer(data):
        source, val = opened(data)
        if os.environ["RANK"] == "1":
            val.images.__dict__["dataset"] = val.images.dataset.select(range(5))
        return source, val

    monkeypatch.setattr(classification, "open_train_and_val", fewer)
    codes, output = run(lambda: train(configure(raw_config), tmp_path / "run"), 2, tmp_path)
    assert codes == [2, 2], output
    assert "rank 1 has found something else than rank 0:\n  - validation images: 7 -> 5" in output


def test_a_checkpoint_that_came_late(raw_config, tmp_path, monkeypatch):
    """A process that looked before the last one of a killed run was written looks again."""
    config = configure(raw_config, train__accum_steps=1, checkpoint__every_steps=1, checkpoint__keep=50)
    assert run(lambda: train(config, tmp_path / "whole"), 2, tmp_path)[0] == [0, 0]
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    files = sorted((tmp_path / "parts" / "checkpoints").glob("step_*.pt"))
    for path in files[9:]:
        path.unlink()
    real = prepare.latest_checkpoint

    def early(folder):
        found = real(folder)
        if os.environ["RANK"] == "1":
            found = (files[4], torch.load(files[4]), [])
        return found

    monkeypatch.setattr(prepare, "latest_checkpoint", early)
    codes, output = run(lambda: train(config, tmp_path / "parts"), 2, tmp_path)
    assert codes == [0, 0], output
    assert not differing_runs(tmp_path / "whole", tmp_path / "parts")


def test_a_process_that_hangs_is_named(raw_config, tmp_path, monkeypatch):
    """One that loops outside, and one that is stopped altogether, which cannot even say where it is."""
    real = trainer.train_step

    def hanging(run, batches, step, check):
        if run.world.rank == 1 and step == 3:
            if stopped:
                os.kill(os.getpid(), signal.SIGSTOP)
            signal.pause()
        return real(run, batches, step, check)

    monkeypatch.setattr(trainer, "train_step", hanging)
    config = configure(raw_config, train__accum_steps=1, train__timeout_minutes=0.05)
    for stopped in (False, True):
        folder = tmp_path / str(stopped)
        folder.mkdir()
        processes = RunProcesses(lambda: run_cli(lambda: train(config, tmp_path / "run")), 2, folder / "output.txt")
        assert not processes.wait(1.0)
        while processes.exit_codes[0] is None:
            processes.wait(0.2)
        processes.kill()
        output = (folder / "output.txt").read_text()
        assert processes.exit_codes[0] == 3, output
        assert output.count("error: ") == 1, output
        assert "error: the processes do not come together: rank 1 (" in output
        assert ("is silent; it was last at " if stopped else ") is at step 3. Rank 0 has") in output
        assert "Rank 0 has waited for 3 s at the forward pass of step 3" in output


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Returns the folder of a run that is left alone; the same run is made once."""
    folders: dict[tuple[str, int], Path] = {}

    def folder_of(config: Config, count: int) -> Path:
        key = repr(config), count
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("undisturbed")
            assert set(run(lambda: train(config, folders[key] / "run"), count, folders[key])[0]) == {0}
        return folders[key] / "run"

    return folder_of


@pytest.mark.parametrize(("number", "count"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 2)])
def test_a_signal_saves_and_stops(raw_config, tmp_path, monkeypatch, undisturbed, number, count):
    """To one process only; the other learns of it. The run then ends as if it had never been stopped."""
    config = configure(raw_config, train__accum_steps=1, data__workers=1)
    whole = undisturbed(config, count)
    real = trainer.train_step

    def signalled(run, batches, step, check):
        if run.world.rank == count - 1 and step == 7:
            # from outside, and to its loader's workers too, as a scheduler does
            kill = ["kill", f"-{int(number)}", "--", f"-{os.getpgid(0)}"]
            subprocess.run(kill, check=True, start_new_session=True)
        return real(run, batches, step, check)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", signalled)
        codes, output = run(lambda: train(config, tmp_path / "parts"), count, tmp_path)
    assert codes == [75] * count, output
    step = 8 if count == 1 else 9  # two processes agree at the step after
    assert output.count(f"stopped by {number.name} after step {step} of ") == 1, output
    assert "error" not in output
    assert final(tmp_path / "parts")["step"] == step
    assert set(run(lambda: train(config, tmp_path / "parts"), count, tmp_path)[0]) == {0}
    assert not differing_runs(whole, tmp_path / "parts")


def test_a_signal_during_an_evaluation(raw_config, tmp_path, monkeypatch):
    """To one of two processes. The evaluation is given up and made up for when the run goes on."""
    count = 2
    config = configure(raw_config, train__accum_steps=1, train__eval_batch_size=1)
    assert set(run(lambda: train(config, tmp_path / "whole"), count, tmp_path)[0]) == {0}
    real = trainer.evaluate

    def signalled(model, loader, world, *args):
        if world.rank == 0 and not (tmp_path / "sent").exists():
            (tmp_path / "sent").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return real(model, loader, world, *args)

    monkeypatch.setattr(trainer, "evaluate", signalled)
    codes, output = run(lambda: train(config, tmp_path / "parts"), count, tmp_path)
    assert codes == [75] * count, output
    assert final(tmp_path / "parts")["metric"] is None
    assert not [row for row in metrics_of(tmp_path / "parts") if row["kind"] == "eval"]
    assert set(run(lambda: train(config, tmp_path / "parts"), count, tmp_path)[0]) == {0}
    assert not differing_runs(tmp_path / "whole", tmp_path / "parts")


def test_signals_have_their_usual_effect_afterwards(raw_config, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    real = trainer.train_step

    def signalled(run, batches, step, check):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(run, batches, step, check)

    monkeypatch.setattr(trainer, "train_step", signalled)
    with pytest.raises(RunStopped, match="stopped by SIGTERM after step 1 of 20, and saved"):
        train(configure(raw_config), tmp_path / "run")
    assert signal.getsignal(signal.SIGTERM) == before


WORKER = """
import multiprocessing, os, signal, subprocess, sys, time
from conv2former.engine.signals import ignore_stop_signals

def work(ready):
    ignore_stop_signals(0)
    ready.set()
    time.sleep(60)

if __name__ == "__main__":
    multiprocessing.set_forkserver_preload(["conv2former.engine"])
    context = multiprocessing.get_context(sys.argv[1])
    ready = context.Event()
    worker = context.Process(target=work, args=(ready,), daemon=True)
    worker.start()
    ready.wait()
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    worker.join(0.5)
    survives = worker.is_alive()
    worker.terminate()
    worker.join(20)
    print(survives, worker.is_alive())
    worker.kill()
"""


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "forkserver"])
def test_a_worker_obeys_its_owner_alone(start, tmp_path):
    """Its owner would wait for it without end, also where a fork server is its parent."""
    (tmp_path / "main.py").write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, tmp_path / "main.py", start]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.stdout == "True False\n", result.stderr


def test_unreadable_images_of_all_processes_are_counted(raw_config, tmp_path):
    from PIL import Image

    for split, count in (("train", 12), ("val", 5)):
        for name in ("a", "b"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), (i * 9, 0, 0)).save(tmp_path / "data" / split / name / f"{i}.png")
    for bad in ("train/a/3.png", "train/b/5.png", "train/b/6.png", "val/b/2.png"):
        (tmp_path / "data" / bad).write_bytes(b"no picture")
    raw_config["data"] = {"root": str(tmp_path / "data"), "img_size": 32, "workers": 1, "on_error": "skip"}
    few = configure(raw_config, data__max_skipped=0.2, train__accum_steps=1)
    codes, output = run(lambda: train(few, tmp_path / "run"), 2, tmp_path)
    assert codes == [0, 0], output
    for bad in ("train/a/3.png", "train/b/5.png", "train/b/6.png", "val/b/2.png"):
        assert output.count(f"skipped: {tmp_path}/data/{bad}") == 1, output
    evals = [row for row in metrics_of(tmp_path / "run") if row["kind"] == "eval"]
    assert {row["n"] for row in evals} == {9}
    assert {split: len(names) for split, names in final(tmp_path / "run")["skipped"].items()} == {
        "training": 3,
        "validation": 1,
    }
    many = configure(raw_config, data__max_skipped=0.05, train__accum_steps=1)
    (tmp_path / "many").mkdir()
    codes, output = run(lambda: train(many, tmp_path / "run2"), 2, tmp_path / "many")
    assert codes == [2, 2], output
    assert output.count("error: ") == 1
    assert " of 24 training images cannot be read, more than data.max_skipped = 0.05 allows: " in output


def test_two_runs_in_one_folder_are_refused(raw_config, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare._lock, "__defaults__", (0.5,))
    (tmp_path / "run").mkdir()
    lock = prepare._lock(tmp_path / "run")
    codes, output = run(lambda: train(configure(raw_config), tmp_path / "run"), 1, tmp_path)
    assert codes == [2]
    assert "another process is training into this folder" in output
    lock.close()
    assert run(lambda: train(configure(raw_config), tmp_path / "run"), 1, tmp_path)[0] == [0]


def test_a_stream_goes_on_where_it_was(raw_config, tmp_path, monkeypatch):
    raw_config["data"] |= {"streaming": True, "epoch_images": 40, "shuffle_images": 8}
    config = configure(raw_config, train__accum_steps=1, checkpoint__every_steps=2)
    assert set(run(lambda: train(config, tmp_path / "whole"), 2, tmp_path)[0]) == {0}
    real = trainer.train_step

    def dying(run, batches, step, check):
        if step == 8 and run.world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(run, batches, step, check)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", dying)
        codes, output = run(lambda: train(config, tmp_path / "parts"), 2, tmp_path)
    assert codes == [3, -9], output
    assert "error: another process has ended" in output or "error on rank 0: another process has ended" in output
    more = check_config({**config.to_dict(), "data": {**config.to_dict()["data"], "workers": 2}}, "test")
    codes, output = run(lambda: train(more, tmp_path / "parts"), 2, tmp_path)
    assert set(codes) == {0}, output
    assert not differing_runs(tmp_path / "whole", tmp_path / "parts")
