"""Prints the table of variants with measured parameters and multiply-accumulates, as in the README.

python scripts/list_models.py
python scripts/list_models.py --installed            # the weights that pretrained=True finds
python scripts/list_models.py --installed --verify   # and whether their files are as they were installed
"""

from __future__ import annotations

from .._store import store_folder
from ..errors import ConfigError
from ..printing import print_lines
from ..tools.arguments import Parser
from ..tools.checkpoints.table import installed_table, variants_table
from ..tools.cli import run_cli


def main() -> None:
    parser = Parser("models", __doc__)
    parser.add_argument("--installed", action="store_true", help="list the installed weights instead")
    parser.add_argument("--verify", action="store_true", help="compare their checksums, which reads the files")
    args = parser.parse_args()
    if args.verify and not args.installed:
        raise ConfigError("--verify: only with --installed")
    if args.installed:
        print_lines(f"in {store_folder()}:", *installed_table(args.verify).split("\n"))
        print_lines("in the package:", *installed_table(args.verify, shipped=True).split("\n"))
    else:
        print_lines(*variants_table().split("\n"))


def run() -> None:
    """Runs the command and exits, errors as one message."""
    run_cli(main)
