"""When this package began to be imported: before torch and timm, whose imports take seconds."""

from __future__ import annotations

import time

START = time.perf_counter()
