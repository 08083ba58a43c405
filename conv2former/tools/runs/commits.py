"""The same training by two commits, each checked out in a git worktree of its own that is removed afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ...errors import ConfigError, TrainingError

__all__ = ["train_commits"]

WORKING_TREE = "."
ALWAYS = ("log.every_steps=1", "log.tensorboard=false")
QUICKSTART = ("schedule.epochs=1", "schedule.warmup_epochs=0")  # 30 steps
TAIL = 15  # lines of the output of a training that failed
# Starts scripts/train.py of a tree with the package of that tree, however another one is installed.
START = """
import importlib.util, pathlib, runpy, sys
tree, script = sys.argv[1:3]
sys.path[0], sys.argv = tree, sys.argv[2:]
found = importlib.util.find_spec("conv2former")
if found is None or not pathlib.Path(found.origin).resolve().is_relative_to(pathlib.Path(tree).resolve()):
    sys.exit(f"error: Python takes {found and found.origin} in place of the package in {tree}")
runpy.run_path(script, run_name="__main__")
"""


def train_commits(
    commits: Sequence[str], config: str, overrides: Sequence[str], folder: Path, say: Callable[[str], None]
) -> tuple[tuple[str, str], tuple[Path, Path]]:
    """Trains the same with two commits, one after the other, in one process each with this Python.

    Args:
        commits: two names of commits of the repository that holds the working directory; '.' is its working tree.
        config: a recipe's name, which each commit has its own file for, or a file.
        overrides: `key=value` words.
        folder: for the runs `a` and `b`, and what they print.
        say: takes a line when a training begins.

    Returns:
        What to call the two, and their run folders.

    Raises:
        ConfigError: there is no such commit, or a training did not take its configuration.
        TrainingError: a training failed.
    """
    repository = Path(_git(Path(), "rev-parse", "--show-toplevel").strip())
    if not (repository / "scripts" / "train.py").is_file():
        raise ConfigError(f"{repository} is not a clone of this project: it has no scripts/train.py")
    names = [_describe(repository, commit) for commit in commits]
    folder.mkdir(parents=True, exist_ok=True)
    for letter, commit, name in zip("ab", commits, names, strict=True):
        say(f"training {letter.upper()}: {name}")
        with _tree_of(repository, commit) as tree:
            _train(tree, name, config, overrides, folder / letter)
    return (names[0], names[1]), (folder / "a", folder / "b")


def _git(folder: Path, *words: str) -> str:
    """Runs git in a folder and returns what it prints.

    Raises:
        ConfigError: it fails, or is not installed.
    """
    command = ["git", "-C", str(folder), "-c", f"core.hooksPath={os.devnull}", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except FileNotFoundError:
        raise ConfigError("git is not installed; it is needed to check out commits") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ConfigError(f"git {words[0]} failed in {folder.resolve()}: {reason}")
    return done.stdout


def _describe(repository: Path, commit: str) -> str:
    """Returns a commit's short hash and first line.

    Raises:
        ConfigError: there is no such commit.
    """
    if commit == WORKING_TREE:
        return f"the working tree {repository}"
    try:
        return _git(repository, "log", "-1", "--format=%h %s", "--end-of-options", commit, "--").strip()
    except ConfigError:
        text = f"{commit}: no such commit in {repository}; give a hash, a branch, or '.' for the working tree"
        raise ConfigError(text) from None


@contextlib.contextmanager
def _tree_of(repository: Path, commit: str) -> Iterator[Path]:
    """Gives a folder with the files of a commit, which is removed whatever happens."""
    if commit == WORKING_TREE:
        yield repository
        return
    with tempfile.TemporaryDirectory(prefix="compare-runs-") as folder:
        tree = Path(folder) / "tree"
        try:
            _git(repository, "worktree", "add", "--quiet", "--detach", str(tree), commit)
            yield tree
        finally:
            with _uninterrupted(), contextlib.suppress(ConfigError):  # it may not have been made
                _git(repository, "worktree", "remove", "--force", str(tree))


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Lets Ctrl-C, pressed once more, not stop what is inside, nor the programs that it starts."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _train(tree: Path, name: str, config: str, overrides: Sequence[str], run: Path) -> None:
    own = tree / "configs" / f"{config.removesuffix('.yaml')}.yaml"
    is_own = own.is_file() and not Path(config).is_file()
    short = [*QUICKSTART, f"data.root={run.with_name(f'{run.name}-digits')}"] if config == "quickstart" else []
    options = ["--config", str(own) if is_own else config, "--output", str(run), "--resume", "never"]
    words = [str(tree), str(tree / "scripts" / "train.py"), *options, *ALWAYS, *short, *overrides]
    printed = run.with_name(f"{run.name}.txt")
    with printed.open("w") as file:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(tree), os.getenv("PYTHONPATH"))))}
        command = [sys.executable, "-c", START, *words]
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        tail = printed.read_text(errors="replace").splitlines()[-TAIL:]
        kind = ConfigError if code == ConfigError.exit_code else TrainingError
        raise kind(f"the training of {name} ended with exit code {code}; the end of its output:", *tail)
