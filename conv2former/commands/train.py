"""Trains a Conv2Former from a configuration: on a CPU, on one GPU, or on many under torchrun.

python scripts/train.py --config configs/quickstart.yaml
torchrun --nproc-per-node=8 scripts/train.py --config configs/imagenet1k/conv2former_t.yaml data.root=/data/imagenet

Every key of the configuration can be set on the command line: optim.base_lr=1e-3 or --optim.base_lr 1e-3.
"""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path

from .._clock import START
from .._configs import find_config
from .._yaml import dump_yaml
from ..config import load_config
from ..engine import dry_run, train
from ..errors import counted
from ..printing import print_lines
from ..tasks.registry import task_named
from ..tools.arguments import Parser, command_line
from ..tools.cli import run_cli
from ..tools.recipes import run_name
from ..weights.description import weights_text


def main() -> None:
    parser = Parser("train", __doc__, sections=())
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="YAML file, or the name of a recipe: quickstart"
    )
    parser.add_argument("--output", metavar="FOLDER", help="run folder (default: runs/NAME_OF_CONFIG)")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto: go on where the run folder stopped (default); never: refuse a folder with a run; or a checkpoint",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="build everything, train on one synthetic batch and stop"
    )
    args, overrides = parser.parse_known_args()

    config = load_config(args.config, overrides)
    if args.print_config:
        print(dump_yaml(config.to_dict()), end="")
        return
    if args.dry_run:
        lines = [
            *dry_run(config),
            f"{time.perf_counter() - START:.1f} s from the start of this program to the first step",
        ]
    else:
        output = Path(args.output or Path("runs") / run_name(find_config(args.config)))
        lines = summary(train(config, output, args.resume), output)
    if os.environ.get("RANK", "0") == "0":
        print_lines(*lines)


def summary(report: dict, output: Path) -> list[str]:
    """Returns what a person wants to know at the end of a run."""
    if not report:  # not the main process
        return []
    minutes, seconds = divmod(round(report["seconds"]), 60)
    task = task_named(report["task"])
    result, about_result = task.summarise(report)
    last = task.last_text(report)
    epoch = f"epoch {report['epoch']} of {report['epochs']}"
    if not report["epoch"]:
        epoch = "a linear probe of the starting weights; nothing that was trained was better"
    early = f", stopped early after {report['epochs_done']}" if report["stopped_early"] else ""
    return [
        "",
        f"{result} ({weights_text(report['weights'])}, {epoch}{early}), trained in {minutes} min {seconds} s",
        *about_result,
        *([f"  skipped      {counted(report['skipped'], 'unreadable image')}"] if report["skipped"] else []),
        f"  checkpoint   {report['checkpoint']}",
        f"  last epoch   {report['last_checkpoint']}{f' ({last})' if last else ''}",
        f"  TensorBoard  {report['tensorboard'] or 'off'}",
        f"  curves       {report['curves']}",
        *(f"  {label:<12} {report[key]}" for key, label in task.pictures.items() if report[key]),
        f"  report       {output / 'report.json'}",
        f"next: {command_line('validate')} --checkpoint {shlex.quote(str(report['checkpoint']))}",
    ]


def run() -> None:
    """Runs the command and exits, errors as one message."""
    run_cli(
        main,
        "interrupted; the same command goes on from the last checkpoint",
        "lower train.batch_size (and raise train.accum_steps by the same factor) or data.img_size (of a detection "
        "augment.short_sides and data.long_side), set model.grad_checkpointing, or lower data.workers; in an "
        "evaluation lower train.eval_batch_size, of a segmentation also data.short_side",
    )
