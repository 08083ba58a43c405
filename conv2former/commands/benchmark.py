r"""Measures speed and memory side by side in one run; ratios are what to compare.

python scripts/benchmark.py models conv2former_t convnext_tiny swin_tiny_patch4_window7_224
python scripts/benchmark.py models conv2former_t convnext_tiny --train --precision fp32 bf16
python scripts/benchmark.py models conv2former_t:fused=false birder/conv2former_t conv2former_t \
    --train --memory-format nchw channels_last --baseline birder/conv2former_t@channels_last
python scripts/benchmark.py models conv2former_t convnext_tiny --device cuda --batch-size 128 --execution eager compile
python scripts/benchmark.py growth --chart docs/growth.png
python scripts/benchmark.py loop --config FILE [key=value ...]
python scripts/benchmark.py input
python scripts/benchmark.py input --cached [FOLDER]
python scripts/benchmark.py kernels --dtype bf16 --stage 1 3
python scripts/benchmark.py launches conv2former_t conv2former_t:fused=false convnext_tiny
python scripts/benchmark.py tune

models:  networks of timm's and birder's: images/s, memory, shares of what the machine can do.
growth:  time and memory of one image from 224 to 1024 pixels.
loop:    the training loop against a bare loop of forward, backward and step on the same synthetic batches.
input:   reading and augmenting JPEGs against timm's loader; with --cached small images with and without data.cache.
kernels: the fused operators against plain PyTorch, on a GPU.
launches: how many operators and kernels a step launches; without a GPU the kernels are an estimate.
tune:    other values of the constants by which the GPU's kernels are cut, and which to set; about two minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from .._configs import configs_folder
from ..errors import ConfigError, counted
from ..tools.arguments import Parser
from ..tools.cli import run_cli
from ..tools.prediction.predict import positive

CONFIG = configs_folder() / "imagenet1k" / "conv2former_t.yaml"
SMALL = ["train.batch_size=16", "data.img_size=160"]  # steps of some seconds on two CPU cores
if TYPE_CHECKING:
    from ..tools.benchmark.progress import Progress
    from ..tools.benchmark.results import Report

T = TypeVar("T")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def size(text: str) -> tuple[int, int]:
    """Reads `224` or `640x480`, width and height.

    Returns:
        Height and width, pixels.
    """
    width, _, height = text.partition("x")
    return positive(height or width), positive(width)


def positive_number(text: str) -> float:
    """Reads a number above 0 from the command line."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, not {text!r}")
    return number


def unique(values: Iterable[T]) -> list[T]:
    """Returns values without those that were given before."""
    return list(dict.fromkeys(values))


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Returns the arguments, and the overrides of `loop`."""
    parser = Parser("benchmark", __doc__)
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    add_models(commands.add_parser("models", help="networks side by side"))
    add_growth(commands.add_parser("growth", help="from 224 to 1024 pixels"))
    loop = commands.add_parser("loop", help="the training loop against a bare one", sections=())
    loop.add_argument("--config", type=Path, metavar="FILE", help="network and training (default: t, small images)")
    loop.add_argument("--steps", type=positive, default=1, metavar="N", help="of one timing (default: 1)")
    loop.add_argument("--rounds", type=positive, default=20, metavar="N", help="timings of each (default: 20)")
    loop.add_argument("--markdown", type=Path, metavar="FILE", help="a page; its section of the same name is replaced")
    images = commands.add_parser("input", help="reading and augmenting images")
    images.add_argument("--images", type=positive, default=128, metavar="N", help="in one timing (default: 128)")
    images.add_argument("--rounds", type=positive, default=10, metavar="N", help="timings of each (default: 10)")
    images.add_argument(
        "--cached", nargs="?", const="", metavar="FOLDER",
        help="data.cache: small images from memory and from files, instead of timm's loader; FOLDER has class folders",
    )  # fmt: skip
    kernels = commands.add_parser("kernels", help="the fused operators, on a GPU")
    kernels.add_argument("--batch-size", type=positive, default=128, metavar="N", help="images (default: 128)")
    kernels.add_argument("--dtype", choices=PRECISIONS, default="bf16", help="(default: bf16)")
    kernels.add_argument(
        "--stage",
        nargs="+",
        type=int,
        choices=range(1, 5),
        default=[1, 2, 3, 4],
        metavar="N",
        help="1 to 4 (default: all)",
    )
    kernels.add_argument("--rounds", type=positive, default=20, metavar="N", help="timings of each (default: 20)")
    kernels.add_argument(
        "--depthwise", action="store_true", help="the depthwise convolution alone, for kernels of 3 to 31"
    )
    tune = commands.add_parser("tune", help="the constants of the GPU's kernels")
    tune.add_argument("--batch-size", type=positive, default=128, metavar="N", help="images (default: 128)")
    tune.add_argument("--dtype", choices=["bf16", "fp16"], default="bf16", help="(default: bf16)")
    tune.add_argument("--rounds", type=positive, default=5, metavar="N", help="timings of each (default: 5)")
    add_launches(commands.add_parser("launches", help="operators and kernels of a step, with a GPU or without"))
    args, overrides = parser.parse_known_args()
    if overrides and args.what != "loop":
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    return args, overrides


def add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "networks", nargs="+", metavar="NAME[:option=value,...]",
        help="timm's name, or birder/NAME; options are the model's, such as conv2former_t:fused=false,kernel_size=7; "
        "fused_attn=false switches timm's fused attention off",
    )  # fmt: skip
    parser.add_argument("--train", action="store_true", help="training steps: forward, loss, backward, AdamW")
    parser.add_argument("--inference", action="store_true", help="inference (the default, unless --train is given)")
    parser.add_argument(
        "--precision", nargs="+", choices=[*PRECISIONS, "native"], default=["fp32"],
        help="bf16, fp16: autocast; native: fp32, and bf16 where the processor has arithmetic for it",
    )  # fmt: skip
    parser.add_argument("--memory-format", nargs="+", choices=["nchw", "channels_last"], default=["nchw"])
    parser.add_argument("--execution", nargs="+", choices=["eager", "compile", "cudagraph"], default=["eager"])
    parser.add_argument("--compile-mode", metavar="MODE", help="torch.compile's, such as max-autotune")
    parser.add_argument("--compile-backend", default="inductor", metavar="NAME", help="torch.compile's")
    parser.add_argument("--size", nargs="+", type=size, default=[(224, 224)], metavar="N|WxH", help="(default: 224)")
    parser.add_argument("--batch-size", nargs="+", type=positive, default=[8], metavar="N", help="(default: 8)")
    parser.add_argument(
        "--held-batch-size", type=positive, default=2, metavar="N",
        help="images of the batch whose kept bytes are counted (default: 2)",
    )  # fmt: skip
    parser.add_argument(
        "--by-execution", action="store_true",
        help="time networks only beside others of the same execution: fewer are in memory at a time",
    )  # fmt: skip
    parser.add_argument("--rounds", type=positive, default=10, metavar="N", help="timings of each (default: 10)")
    parser.add_argument("--steps", type=positive, metavar="N", help="in one timing (default: as many as take 0.2 s)")
    parser.add_argument("--minutes", type=positive_number, metavar="N", help="begin nothing new after so many")
    parser.add_argument(
        "--baseline", metavar="NAME[@FORMAT][@EXECUTION]",
        help="what speeds are relative to (default: the first network, in each row's own format and execution)",
    )  # fmt: skip
    add_machine(parser)


def add_growth(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("networks", nargs="*", metavar="NAME", help="(default: conv2former_t, a Swin and a ViT twice)")
    parser.add_argument("--size", nargs="+", type=size, metavar="N|WxH", help="(default: 224 to 1024, and 640x480)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="bf16, fp16: autocast")
    parser.add_argument("--memory-format", choices=["nchw", "channels_last"], default="nchw")
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="timings of each (default: 3)")
    add_machine(parser)


def add_launches(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("networks", nargs="+", metavar="NAME[:option=value,...]", help="as for models")
    parser.add_argument("--train", action="store_true", help="training steps alone (default: both)")
    parser.add_argument("--inference", action="store_true", help="inference alone (default: both)")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="bf16, fp16: autocast (default: bf16)")
    parser.add_argument("--size", type=size, default=(224, 224), metavar="N|WxH", help="(default: 224)")
    parser.add_argument("--batch-size", type=positive, default=128, metavar="N", help="(default: 128)")
    parser.add_argument("--top", type=positive, default=15, metavar="N", help="names in each list (default: 15)")
    parser.add_argument(
        "--device", choices=["none", "cuda"], help="none: an estimate (default: cuda where there is a GPU)"
    )


def add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=positive, metavar="N", help="of the CPU (default: torch's choice)")
    parser.add_argument("--tf32", action="store_true", help="let fp32 matrix products on a GPU use TF32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all times and counts, and the machine")
    parser.add_argument("--chart", type=Path, metavar="PNG", help="a picture of the results")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="a page; its section of the same name is replaced"
    )


def finish(report: Report) -> None:
    """Ends the script as the measurement ended.

    Raises:
        ConfigError: nothing could be measured.
    """
    if report.interrupted:
        raise KeyboardInterrupt
    if not any(result.seconds for group in report.groups for result in group.results):
        raise ConfigError("nothing could be measured; the reasons are above")


def run_models(args: argparse.Namespace) -> None:
    from ..tools.benchmark.live import LiveOutput, Outputs, View
    from ..tools.benchmark.machine import native_precisions
    from ..tools.benchmark.models import measure
    from ..tools.benchmark.networks import parse_networks
    from ..tools.benchmark.progress import Progress
    from ..tools.benchmark.report import models_figure, models_foot, models_group, models_head, models_markdown
    from ..tools.benchmark.results import Baseline, Plan

    outputs = Outputs(args.json, args.chart, args.markdown)
    outputs.check()
    device = torch.device(args.device)
    native = native_precisions(device)
    plan = Plan(
        networks=parse_networks(args.networks),
        device=device,
        modes=["training"] * args.train + ["inference"] * (args.inference or not args.train),
        precisions=unique(p for name in args.precision for p in (native if name == "native" else [name])),
        memory_formats=unique(args.memory_format),
        executions=unique(args.execution),
        sizes=unique(args.size),
        batch_sizes=unique(args.batch_size),
        rounds=args.rounds,
        steps=args.steps,
        held_batch_size=args.held_batch_size,
        threads=args.threads,
        compile_mode=args.compile_mode,
        compile_backend=args.compile_backend,
        by_execution=args.by_execution,
        minutes=args.minutes,
    )
    baseline = Baseline.parse(args.baseline or args.networks[0], plan)
    plan.check()
    view = View("models", models_head, models_group, models_foot, models_markdown, models_figure)
    with Progress() as progress:
        live = LiveOutput(plan, view, outputs, progress)
        report = measure(plan, baseline, watcher=live)
        live.finish(report)
    finish(report)


def run_growth(args: argparse.Namespace) -> None:
    from ..tools.benchmark import growth
    from ..tools.benchmark.live import LiveOutput, Outputs, View
    from ..tools.benchmark.progress import Progress

    outputs = Outputs(args.json, args.chart, args.markdown)
    outputs.check()
    networks, sizes = args.networks or growth.GROWTH_NETWORKS, unique(args.size or growth.GROWTH_SIZES)
    how = (args.precision, args.memory_format, args.rounds, args.threads)
    plan = growth.growth_plan(networks, sizes, torch.device(args.device), *how)
    plan.check()
    texts = (growth.growth_head, growth.growth_group, growth.growth_foot, growth.growth_markdown)
    view = View("growth", *texts, growth.growth_figure, group_is_result=False)
    with Progress() as progress:
        live = LiveOutput(plan, view, outputs, progress)
        report = growth.measure_growth(plan, live)
        live.finish(report)
    finish(report)


def show(lines: Iterable[str], progress: Progress) -> None:
    """Prints lines as they come."""
    for line in lines:
        progress.print(line)


def run_input(args: argparse.Namespace) -> None:
    from ..tools.benchmark.cached_input import compare_cached
    from ..tools.benchmark.input import compare_input
    from ..tools.benchmark.progress import Progress

    with Progress(ticking=False) as progress:  # a thread, and the forks of workers, would not go together
        if args.cached is not None:
            folder = Path(args.cached) if args.cached else None
            show(compare_cached(folder, args.rounds, progress), progress)
            return
        progress.say(
            f"comparing this package's loader with timm's on {args.images} JPEGs, without and with a worker process, "
            f"{counted(args.rounds, 'round')} each; then where the time goes"
        )
        show(compare_input(args.images, args.rounds, progress), progress)


def run_kernels(args: argparse.Namespace) -> None:
    from ..tools.benchmark.kernels import measure_kernels
    from ..tools.benchmark.progress import Progress

    with Progress() as progress:
        show(
            measure_kernels(
                args.batch_size, PRECISIONS[args.dtype], args.rounds, unique(args.stage), progress, args.depthwise
            ),
            progress,
        )


def run_tune(args: argparse.Namespace) -> None:
    from ..tools.benchmark.progress import Progress
    from ..tools.benchmark.tune import measure_variants

    with Progress() as progress:
        show(measure_variants(args.batch_size, PRECISIONS[args.dtype], args.rounds, progress), progress)


def run_launches(args: argparse.Namespace) -> None:
    from ..tools.benchmark import launches
    from ..tools.benchmark.networks import parse_networks
    from ..tools.benchmark.progress import Progress

    modes = ["training"] * args.train + ["inference"] * args.inference
    plan = launches.LaunchPlan(
        networks=parse_networks(args.networks),
        modes=modes or list(launches.MODES),
        precision=args.precision,
        batch_size=args.batch_size,
        size=args.size,
        estimate=args.device == "none" or (args.device is None and not torch.cuda.is_available()),
    )
    plan.check()
    with Progress() as progress:
        launches.show_launches(plan, args.top, progress)


def run_loop(args: argparse.Namespace, overrides: list[str]) -> None:
    from ..config import load_config
    from ..config.registry import as_classification
    from ..tools.benchmark.loop import compare_loop
    from ..tools.benchmark.progress import Progress
    from ..tools.benchmark.report import check_outputs, loop_markdown, put_section

    overrides = ["data.num_classes=1000", *([] if args.config else SMALL), *overrides]
    config = as_classification(load_config(args.config or CONFIG, overrides))
    if args.markdown:
        check_outputs(None, None, args.markdown)
    lines: list[str] = []
    with Progress() as progress:
        progress.say(f"timing {counted(args.steps, 'step')} of both loops in turns, {counted(args.rounds, 'round')}")
        for line in compare_loop(config, args.steps, args.rounds, progress):
            lines.append(line)
            progress.print(line)
    if args.markdown:
        put_section("loop", loop_markdown(lines), args.markdown)


def main() -> None:
    args, overrides = parse()
    if getattr(args, "tf32", False):
        torch.set_float32_matmul_precision("high")
    if args.what == "models":
        run_models(args)
    elif args.what == "growth":
        run_growth(args)
    elif args.what == "input":
        run_input(args)
    elif args.what == "kernels":
        run_kernels(args)
    elif args.what == "tune":
        run_tune(args)
    elif args.what == "launches":
        run_launches(args)
    else:
        run_loop(args, overrides)


def run() -> None:
    """Runs the command and exits, errors as one message."""
    run_cli(main, interrupted="interrupted")
