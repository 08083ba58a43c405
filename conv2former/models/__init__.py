"""The networks: block, backbone, variants and weights. Needs torch, timm, safetensors and PyYAML only."""

from .backbone import Conv2Former
from .block import Conv2FormerBlock, ConvMlp, ConvMod
from .installed import InstalledModel, list_installed
from .preprocessing import Preprocessing
from .restore import load_model
from .variants import Variant, list_variants, variant
from .weights import CheckpointInfo, inspect_checkpoint, load_weights
from .zoo import register_variant

__all__ = [
    "CheckpointInfo",
    "Conv2Former",
    "Conv2FormerBlock",
    "ConvMlp",
    "ConvMod",
    "InstalledModel",
    "Preprocessing",
    "Variant",
    "inspect_checkpoint",
    "list_installed",
    "list_variants",
    "load_model",
    "load_weights",
    "register_variant",
    "variant",
]
