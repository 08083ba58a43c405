"""Averages weight files of one network into one: a model soup.

python scripts/average.py runs/*/checkpoints/best.pt --output soup.pt
python scripts/average.py runs/*/checkpoints/best.pt --output soup.pt --greedy data.root=photos

Uniform: the mean of all. Greedy: the files are sorted by their accuracy on the validation split, and from the best on
each is added if the accuracy of the mean does not fall; the split must not be the one that a result is reported on. The
data is that of the files' own configuration unless data.root=... says otherwise. The result is a weight file like
another, for validate.py, convert.py, and model.checkpoint=soup.pt.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError
from ..tools.arguments import Parser
from ..tools.checkpoints.average import average, greedy
from ..tools.cli import run_cli


def main() -> None:
    parser = Parser("average", __doc__, ("data", "train"))
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="weight files of one network")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="the file to write, soup.pt")
    parser.add_argument("--greedy", action="store_true", help="leave out what lowers the accuracy on validation data")
    parser.add_argument("--raw", action="store_true", help="the raw weights although a file has averaged ones")
    args, rest = parser.parse_known_args()
    words = args.checkpoints + rest
    overrides = [word for word in words if "=" in word and not Path(word).exists()]
    checkpoints = [word for word in words if word not in overrides]
    if args.greedy:
        greedy(checkpoints, args.output, overrides, not args.raw)
    elif overrides:
        raise ConfigError(f"{overrides[0]}: no effect without --greedy, which alone looks at data")
    else:
        average(checkpoints, args.output, not args.raw)


def run() -> None:
    """Runs the command and exits, errors as one message."""
    run_cli(main)
