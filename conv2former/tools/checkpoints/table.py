"""The table of variants, measured."""

from __future__ import annotations

from collections.abc import Sequence

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from ...models import InstalledModel, list_installed, list_variants, variant
from ...text import printable
from ...variants import is_builtin
from ...weights.description import noted_kind
from ...weights.installed import list_shipped
from ..output import text_table

__all__ = ["installed_table", "measure", "variants_table"]

UNVERIFIED = "unverified: taken for the published file by its shape alone; scripts/validate.py --confirm measures it"


def measure(name: str, size: int) -> tuple[int, float]:
    """Counts a timm model on the meta device, which computes nothing.

    Args:
        name: in timm's registry.
        size: height and width of the image, pixels.

    Returns:
        Parameters with 1,000 classes, and multiply-accumulates of the convolutions and matrix products, in 1e9.
    """
    model = timm.create_model(name, device="meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, size, size, device="meta"))
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() / 2e9


def variants_table(names: Sequence[str] | None = None) -> str:
    """Returns a Markdown table of variants: shape, measured size, published accuracy.

    Args:
        names: of the variants; None for all that are known, without those that are no more than weights of the package.
    """
    rows = [
        "| model | channels | blocks | kernel | parameters | GMACs 224 / 384 | published top-1, ImageNet-1k |",
        "|---|---|---|---|---|---|---|",
    ]
    shipped = {model.variant for model in list_shipped()}
    for name in names or [name for name in list_variants() if is_builtin(name) or name not in shipped]:
        known = variant(name)
        parameters, gmacs_224 = measure(name, 224)
        _, gmacs_384 = measure(name, 384)
        # a file whose network has another kernel is in the row of the variant that has it
        tags = [tag for tag in known.pretrained if tag.kernel_size in (None, known.kernel_size)]
        published = [f"{tag.top1} (`{tag.tag}`)" for tag in tags]
        shape = [" ".join(map(str, values)) for values in (known.dims, known.depths)]
        rows.append(
            f"| `{name}` | {shape[0]} | {shape[1]} | {known.kernel_size} | {parameters:,} | "
            f"{gmacs_224:.2f} / {gmacs_384:.2f} | {', '.join(published)} |"
        )
    return "\n".join(rows)


def installed_table(verify: bool = False, shipped: bool = False) -> str:
    """Returns a table of installed weights for a terminal, and what is wrong with those that cannot be used.

    Args:
        verify: also compare the checksums of the weight files.
        shipped: those that are part of the package, instead of those in the store.
    """
    found = list_shipped(verify) if shipped else list_installed(verify)
    header = ["name", "classes", "metric", "source", "sha256", "state", "weights", "accuracy"]
    rows = [
        [
            model.name,
            f"{model.num_classes:,}" if model.config else "-",
            "-" if model.metric is None else f"{model.metric:g}",
            model.source or "-",
            model.sha256[:12] or "-",
            "damaged" if model.problem else "verified" if verify and model.sha256 else "ok",
            noted_kind(model.weights_word),
            _accuracy(model),
        ]
        for model in found
    ]
    problems = [f"{model.name}: {model.problem}" for model in found if model.problem]
    notes = [UNVERIFIED] if any(row[-1] == "unverified" for row in rows) else []
    return "\n".join([text_table(header, rows), *map(printable, problems), *notes]) if rows else "nothing is installed"


def _accuracy(model: InstalledModel) -> str:
    """Returns the accuracy that was measured to be the published one, if it was; '-' where none is published."""
    if model.published is None or model.problem:
        return "-"
    if model.confirmation is None:
        return "unverified"
    return f"{model.confirmation['top1']:.2f} % of {model.confirmation['n']:,}"
