"""Values and bytes that nobody means well."""

from __future__ import annotations

import json
import random
from typing import Any

import torch

TERMINAL = "\x1b]0;title\x07\x1b[31m\nerror: forged\r"
TEXTS = ["", " ", "a", "Größe 💥", "\0", "../../etc/passwd", "=1+1", "x" * 100_000, TERMINAL, "9" * 5000, "nan"]
NUMBERS = [0, 1, -1, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, float("inf"), float("nan")]
LINES = [
    b"",
    b"5",
    b"{}",
    b"[" * 100_000,
    b'{"step": "x"}',
    b'{"step": -1}',
    b"\xff\xfe\0",
    b"null",
    b'{"step": 1e999}',
]


def plain(random: random.Random, depth: int = 2) -> Any:
    """Returns a value of built-in types."""
    kind = random.randrange(8 if depth else 5)
    if kind < 2:
        return random.choice(NUMBERS)
    if kind == 2:
        return random.choice(TEXTS)
    if kind < 5:
        return random.choice([None, True, False])
    if kind == 5:
        return {
            random.choice(["a", "0", TERMINAL, 5, None]): plain(random, depth - 1) for _ in range(random.randrange(3))
        }
    inner = [plain(random, depth - 1) for _ in range(random.randrange(4))]
    return inner if kind == 6 else tuple(inner)


def tensor(random: random.Random) -> torch.Tensor:
    """Returns a small tensor that is not what one expects."""
    shape = [random.choice([0, 1, 2, 7]) for _ in range(random.randrange(5))]
    made = torch.zeros(
        shape, dtype=random.choice([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64])
    )
    value = random.choice([0, 1, float("nan"), float("inf"), 1e30])
    if made.dtype == torch.float16 and value == 1e30:
        value = 6e4
    return made if made.dtype in (torch.int64, torch.bool) else made.fill_(value)


def anything(random: random.Random) -> Any:
    """Returns a plain value or a tensor."""
    return tensor(random) if random.random() < 0.3 else plain(random)


def damaged(random: random.Random, content: bytes) -> bytes:
    """Returns bytes cut, flipped, repeated, overwritten or replaced."""
    data, place = bytearray(content), random.randrange(len(content) + 1)
    kind = random.randrange(6)
    if kind == 0:
        return bytes(data[:place])
    if kind == 1:
        for _ in range(random.choice([1, 1, 3, 30])):
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    elif kind == 2:
        data[place:place] = data[place : place + random.choice([1, 100, 10_000])]
    elif kind == 3:
        length = random.choice([1, 4, 8, 512])
        data[place : place + length] = random.choice([b"\0", b"\xff", b"9"]) * length
    elif kind == 4:
        del data[place : place + random.choice([1, 4, 512])]
    else:
        return random.choice(
            [b"", b"\0" * 10_000, random.randbytes(2000), b"PK\x03\x04" + random.randbytes(500), b"\x80\x02."]
        )
    return bytes(data)


def text_lines(random: random.Random, lines: list[bytes]) -> bytes:
    """Returns lines with some replaced, cut or doubled."""
    lines = list(lines)
    for _ in range(random.choice([1, 1, 2, 5])):
        place = random.randrange(len(lines) + 1)
        lines.insert(
            place, random.choice([*LINES, json.dumps(plain(random), default=str).encode(), random.randbytes(30)])
        )
    return b"\n".join(lines) + random.choice([b"", b"\n", b"\r\n"])
