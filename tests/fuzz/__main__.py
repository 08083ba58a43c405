"""Makes hostile files from a seed, reads each in a process of its own, and tells what did not end as it should.

python -m tests.fuzz --seed 1 --minutes 5
python -m tests.fuzz --seed 1 --minutes 1 --target weights
python -m tests.fuzz --seed 1 --case weights:17     # one case again, its traceback in full

A case is right if it ends, within 30 s and 4 GB, without an error or with one that a script prints as a message, and if
no name is raw in what it says and writes: no control character, no line of its own. Exit code 1 if any is not.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from conv2former.errors import RunStopped, TrainingError, UserError

from ..hostile import faults_of
from .targets import TARGETS, prepare

SECONDS, MEMORY = 30, 4 << 30


def run_case(name: str, seed: int, number: int, base: Path) -> str:
    """Runs a case in a child process and returns what is wrong with it, or an empty text."""
    read, write = os.pipe()
    with tempfile.TemporaryDirectory(prefix="case-", dir=base) as folder:
        child = os.fork()
        if child == 0:
            os.close(read)
            _be_child(name, f"{name}-{seed}-{number}", Path(folder), base, write)
        os.close(write)
        said, status, usage = _wait(child, read)
    if status is None:
        return f"no end within {SECONDS} s"
    if usage.ru_maxrss * 1024 > MEMORY:
        return f"{usage.ru_maxrss / 2**20:.1f} GB of memory"
    return said if said or status == 0 else f"ended by signal {status & 127}, exit code {status >> 8}"


def _be_child(name: str, seed: str, folder: Path, base: Path, write: int) -> None:
    said = ""
    try:
        devnull = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(devnull, descriptor)
        draw = random.Random(seed)
        call = TARGETS[name](draw, folder, base)
        said = call() or ""
    except (UserError, TrainingError, RunStopped) as e:
        said = f"a name is raw in: {e!r:.300}" if faults_of(str(e)) else ""
    except BaseException:
        said = traceback.format_exc(limit=-6)
    finally:
        os.write(write, said.encode(errors="backslashreplace")[-60_000:])
        os._exit(0)


def _wait(child: int, read: int) -> tuple[str, int | None, resource.struct_rusage]:
    """Returns what a child wrote, its status (None if it had to be killed) and what it used."""
    end = time.monotonic() + SECONDS
    os.set_blocking(read, False)
    said = b""
    while True:
        with open(os.dup(read), "rb") as pipe:
            said += pipe.read() or b""
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            with open(read, "rb") as pipe:
                said += pipe.read() or b""
            return said.decode(errors="replace"), status, usage
        if time.monotonic() > end:
            os.kill(child, 9)
            os.wait4(child, 0)
            os.close(read)
            return "", None, usage
        time.sleep(0.003)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long to go on (default: 1)")
    parser.add_argument("--target", choices=list(TARGETS), action="append", help="can be repeated (default: all)")
    parser.add_argument("--case", metavar="TARGET:NUMBER", help="only this one")
    args = parser.parse_args()
    finds, cases = Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        base = Path(folder)
        prepare(base)
        if args.case:
            name, _, number = args.case.partition(":")
            said = run_case(name, args.seed, int(number), base)
            print(said or "right")
            sys.exit(1 if said else 0)
        number, end = 0, time.monotonic() + 60 * args.minutes
        while time.monotonic() < end:
            for name in args.target or TARGETS:
                cases[name] += 1
                if said := run_case(name, args.seed, number, base):
                    finds[said.strip().splitlines()[-1][:100]] += 1
                    print(f"{name}:{number}  {said.strip()[-1500:]}\n", flush=True)
            number += 1
    print(f"{sum(cases.values())} cases ({', '.join(f'{n} {k}' for k, n in cases.items())})")
    print("\n".join(f"{count:5} x {text}" for text, count in finds.most_common()) or "no finds")
    sys.exit(1 if finds else 0)


if __name__ == "__main__":
    main()
