"""Says whether two runs are the same: all logged losses and metrics, and the final weights, bit for bit.

python scripts/compare_runs.py runs/before runs/after
python scripts/compare_runs.py --commits main .                       # the working tree against a branch
python scripts/compare_runs.py --commits v0.1.0 HEAD train.seed=3
python scripts/compare_runs.py --commits HEAD~1 HEAD --config my.yaml schedule.epochs=2

Compared are metrics.jsonl, without speeds and memory, and the newest checkpoint, last.pt and best.pt: the weights,
their average and the optimizer's state. --commits checks two commits out, each for itself, trains the same with both
and compares the runs; with the quickstart one epoch of 30 steps. A recipe's name means each commit's own file.

Exit code: 0 if the runs are identical, 1 if not, 2 after a mistake, 3 if a training failed.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

from ..errors import ConfigError
from ..tools.arguments import Parser
from ..tools.cli import run_cli
from ..tools.runs.commits import train_commits
from ..tools.runs.comparing import compare_runs, comparison_text


def main() -> None:
    parser = Parser("compare-runs", __doc__, ())
    parser.add_argument("runs", nargs="*", metavar="RUN", help="two run folders; key=value words with --commits")
    parser.add_argument("--commits", nargs=2, metavar=("A", "B"), help="train with these; '.' is the working tree")
    parser.add_argument("--config", default=None, metavar="FILE", help="with --commits (default: quickstart)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="with --commits: keep the two runs there")
    args, rest = parser.parse_known_args()
    words = args.runs + rest
    if args.commits:
        code = _compare_commits(args.commits, args.config or "quickstart", words, args.output)
    else:
        if args.config or args.output:
            raise ConfigError(f"{'--config' if args.config else '--output'}: no effect without --commits A B")
        if len(words) != 2:
            raise ConfigError(f"give two run folders, or --commits A B; these are {len(words)}: {', '.join(words)}")
        code = _compare((words[0], words[1]), (Path(words[0]), Path(words[1])))
    sys.exit(code)


def _compare_commits(commits: list[str], config: str, overrides: list[str], output: Path | None) -> int:
    with tempfile.TemporaryDirectory(prefix="compare-runs-") as temporary:
        names, runs = train_commits(commits, config, overrides, output or Path(temporary), partial(print, flush=True))
        return _compare(names, runs)


def _compare(names: tuple[str, str], runs: tuple[Path, Path]) -> int:
    parts = compare_runs(*runs)
    print(comparison_text(names, parts))
    return int(any(part.different for part in parts))


def run() -> None:
    """Runs the command and exits, errors as one message."""
    run_cli(main, "interrupted; the commits' folders are removed")
