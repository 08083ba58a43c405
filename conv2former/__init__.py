"""Conv2Former for timm: importing this package registers every variant.

import conv2former, timm
model = timm.create_model("conv2former_t")
"""

from . import _clock  # noqa: F401 - first: it notes the time
from .errors import CheckpointError, ConfigError, DataError, UserError
from .inference import capture
from .models import (
    CheckpointInfo,
    Conv2Former,
    Conv2FormerBlock,
    ConvMlp,
    ConvMod,
    InstalledModel,
    Preprocessing,
    Variant,
    inspect_checkpoint,
    list_installed,
    list_variants,
    load_model,
    load_weights,
    register_variant,
    variant,
)

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "CheckpointInfo",
    "ConfigError",
    "Conv2Former",
    "Conv2FormerBlock",
    "ConvMlp",
    "ConvMod",
    "DataError",
    "InstalledModel",
    "Preprocessing",
    "UserError",
    "Variant",
    "capture",
    "inspect_checkpoint",
    "list_installed",
    "list_variants",
    "load_model",
    "load_weights",
    "register_variant",
    "variant",
]
