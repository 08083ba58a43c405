"""The networks: block, backbone, and their registration. Needs torch, timm, safetensors and PyYAML only."""

from ..variants import Variant, list_variants, variant
from ..weights.description import CheckpointInfo, inspect_checkpoint
from ..weights.installed import InstalledModel, list_installed
from ..weights.preprocessing import Preprocessing
from .backbone import Conv2Former
from .block import Conv2FormerBlock, ConvMlp, ConvMod
from .restore import load_model, load_weights
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
