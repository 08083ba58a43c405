"""Converts a weight file to timm's hub layout, and installs it where `pretrained=True` finds it.

python scripts/convert.py conv2former_t.pth.tar --install                     # for timm's "conv2former_t"
python scripts/convert.py conv2former_s.pth.tar --install conv2former_s.hvision_in1k
python scripts/convert.py runs/photos/checkpoints/best.pt --install conv2former_t.photos    # a tag of one's own
python scripts/convert.py conv2former_t.pth.tar --output folder               # for timm's "local-dir:folder"
python scripts/convert.py --uninstall conv2former_t.photos

A file in any layout that this project reads becomes model.safetensors, config.json and a model card, which notes the
source, checksums, metric, recipe and preprocessing. What the file does not note of the images can be given:
data.img_size=384, data.mean=[0.5,0.5,0.5], and so on. What is installed is kept in $CONV2FORMER_HOME, or in
conv2former in the user's cache folder.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..errors import ConfigError
from ..printing import print_lines
from ..tools.arguments import Parser
from ..tools.checkpoints.convert import convert, summary
from ..tools.checkpoints.publish import check_folder, check_hub, check_install, install, push, uninstall, write_folder
from ..tools.cli import run_cli
from ..weights.installed import say_if_unverified


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = Parser("convert", __doc__, ("data",))
    parser.add_argument(
        "checkpoint", nargs="?", metavar="CHECKPOINT", help="a weight file, or a folder in timm's layout"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write it there")
    parser.add_argument(
        "--install",
        nargs="?",
        const="",
        metavar="NAME.TAG",
        help="install it; without a name, if only one can be meant",
    )
    parser.add_argument("--uninstall", metavar="NAME.TAG", help="remove installed weights")
    parser.add_argument("--push-to-hub", metavar="USER/NAME", help="send it to the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="make the repository on the hub a private one")
    parser.add_argument("--name", default="", metavar="NAME.TAG", help="what the card calls it, without installing it")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--ema", action="store_true", help="the averaged weights; an error if the file has none")
    weights.add_argument("--raw", action="store_true", help="the raw weights although the file has averaged ones")
    parser.add_argument("--preprocessing", choices=("imagenet", "inception"), help="instead of what the file notes")
    parser.add_argument("--class-names", type=Path, metavar="FILE", help="a class name in each line, in index order")
    parser.add_argument("--half", action="store_true", help="weights in float16, for half the size")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    args, overrides = parser.parse_known_args()
    if args.checkpoint is None and args.install and os.path.exists(args.install):  # --install FILE
        args.checkpoint, args.install = args.install, ""
    return args, overrides


def main() -> None:
    args, overrides = parse()
    if args.uninstall:
        print_lines(f"removed {uninstall(args.uninstall)}")
        return
    if args.checkpoint is None or (args.output is None and args.install is None and not args.push_to_hub):
        raise ConfigError("give a weight file, and --output FOLDER, --install or --push-to-hub USER/NAME: see --help")
    if args.name and args.install and args.name != args.install:
        raise ConfigError(f"--name {args.name} and --install {args.install}: give the name once")
    if args.private and not args.push_to_hub:
        raise ConfigError("--private: only with --push-to-hub")
    if args.output:
        check_folder(args.output, args.force)
    if args.push_to_hub:
        check_hub(args.push_to_hub)
    export = convert(
        args.checkpoint,
        args.install or args.name,
        False if args.raw else True if args.ema else None,
        args.preprocessing,
        overrides,
        _class_list(args.class_names) if args.class_names else None,
        needs_tag=args.install is not None,
        half=args.half,
    )
    print_lines(*summary(export).split("\n"))
    if args.install is not None:
        check_install(export, args.force)
    if args.output:
        write_folder(export, args.output, args.force)
        print_lines(f'written to {args.output}: timm.create_model("local-dir:{args.output}", pretrained=True)')
    if args.install is not None:
        folder, is_new = install(export, args.force)
        print_lines(f"{'installed in' if is_new else 'nothing to do, installed already in'} {folder}")
        print_lines(f'use it: timm.create_model("{export.name}", pretrained=True)')
        say_if_unverified(export.name)
    if args.push_to_hub:
        print_lines(f"sent: {push(export, args.push_to_hub, args.private)}")


def _class_list(path: Path) -> list[str]:
    from ..data.tables import read_class_list  # needs pydantic, which a conversion as such does not

    return read_class_list(path)


def run() -> None:
    """Runs the command and exits, errors as one message."""
    run_cli(main)
