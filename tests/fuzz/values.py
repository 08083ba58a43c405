"""Values and bytes that nobody means well."""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TERMINAL = "\x1b]0;title\x07\x1b[31m\nerror: forged\r"
TEXTS = ["", " ", "a", "Größe 💥", "\0", "../../etc/passwd", "=1+1", "x" * 100_000, TERMINAL, "9" * 5000, "nan"]
LABELS = ["-1", "-2", "1e400", "NaN", "true", "null", "[0]", "9223372036854775808", "²", "٣", "+1", "0x10", "1_000"]
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


def name(random: random.Random) -> str:
    """Returns a name of a file or folder, of letters that terminals obey, that hide others, or that nobody knows."""
    kinds: list[Callable[[], str]] = [
        lambda: chr(random.randrange(1, 0x20)),
        lambda: chr(random.randrange(0x7F, 0x500)),
        lambda: chr(random.choice([0x200B, 0x200D, 0x200E, 0x202E, 0x2028, 0x2029, 0x2066, 0xFEFF, 0xE0041, 0x1F468])),
        lambda: chr(random.randrange(0x500, 0xD800)),
        lambda: random.choice(
            ["\n", "\r", "=", "+", "-", "@", "$", "'", '"', "\\", "{", "%s", "`", ",", ";", "error: "]
        ),
        lambda: random.choice("abc 019"),
    ]
    made = random.choice(["", "", "=", "@", "\nerror: forged", "$'", "$\\frac{"])
    while len(made) < random.choice([1, 4, 12, 50]):
        made += random.choice(kinds)()
    return made.encode()[:200].decode(errors="ignore").replace("/", "_")


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


def paths(base: Path) -> list[str]:
    """Returns paths and addresses that lead out of a data set, or nowhere."""
    inside = ["https://localhost:9/x.png", "file:///etc/passwd", "hf://datasets/a/b/x.png", "memory://x", "~/x.png"]
    archives = ["zip://x::http://localhost:9/a.zip", "zip://x.png::/etc/a.zip", "simplecache::file:///etc/passwd"]
    return [
        *inside,
        *archives,
        "../x.png",
        "/etc/passwd",
        "/dev/zero",
        "C:\\x.png",
        "..\\x.png",
        f"{base}/run",
        "",
        ".",
    ]


def odd_png(random: random.Random, content: bytes) -> bytes:
    """Returns a PNG that claims another size, or has a chunk of text that unpacks to much."""
    if random.random() < 0.5:
        head = struct.pack(">II", random.choice([0, 1, 60_000, 2**31 - 1]), random.choice([0, 1, 60_000, 2**31 - 1]))
        changed = b"IHDR" + head + content[24:29]
        return content[:12] + changed + struct.pack(">I", zlib.crc32(changed)) + content[33:]
    text = b"zTXt" + b"a\0\0" + zlib.compress(bytes(random.choice([10, 2 << 20, 300 << 20])))
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    return content[:33] + chunk + content[33:]
