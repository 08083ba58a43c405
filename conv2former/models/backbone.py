"""The Conv2Former backbone with timm's whole model contract.

`Conv2Former: A Simple Transformer-Style ConvNet for Visual Recognition` - https://arxiv.org/abs/2211.11943
Architecture after the authors' code, github.com/HVision-NKU/Conv2Former (Apache-2.0).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from timm.layers import (
    ClassifierHead,
    calculate_drop_path_rates,
    get_device_dtype,
    to_ntuple,
    trunc_normal_,
)
from timm.models import checkpoint_seq, named_apply, register_notrace_module
from torch import nn

from ..variants import STEM_STRIDES
from ..weights.architecture import CLASSIFIER
from ..weights.contents import native_state_dict
from ..weights.fit import adapt_head, check_fit, lacking_head
from . import fusion, stem_fusion
from .ablations import FUSIONS
from .block import Conv2FormerBlock, RenamesForeignKeys, make_norm

__all__ = ["Conv2Former"]


def _take_indices(count: int, indices: int | list[int] | tuple[int, ...] | None) -> tuple[list[int], int]:
    """Returns which of `count` stages are meant, counted from the start, and the last of them.

    Args:
        count: how many there are.
        indices: the last n if int, all if None, the given ones otherwise; negative ones count from the end.
    """
    last = count if indices is None else indices
    if isinstance(last, int):
        assert 0 < last <= count, f"last-n ({last}) is out of range (1 to {count})"
    wanted = range(count - last, count) if isinstance(last, int) else last
    for i in wanted:
        assert -count <= i < count, f"feature index {i} is out of range ({-count} to {count - 1})"
    taken = [i % count for i in wanted]
    return taken, max(taken)


# Modules that `ops` computes where it can are leaves to timm's fx tracer, which would take them apart into operators
# that round otherwise: so a trace computes bit for bit what the network does. Of a Stage the blocks are the leaves.
@register_notrace_module
class Stem(nn.Module):
    """Three convolutions without bias, (N, in_chans, H, W) to (N, dim, H / stride, W / stride).

    BatchNorm comes after GELU. The stride is 4, or 2 for small images: then the first convolution keeps the size.
    """

    fused: bool = True  # for pickles that have no such attribute

    def __init__(self, in_chans: int, dim: int, stride: int = 4, fused: bool = True, **dd: Any) -> None:
        super().__init__()
        mid = dim // 2
        self.conv1 = nn.Conv2d(in_chans, mid, 3, stride=stride // 2, padding=1, bias=False, **dd)
        self.act1 = nn.GELU()
        self.norm1 = nn.BatchNorm2d(mid, **dd)
        self.conv2 = nn.Conv2d(mid, mid, 3, padding=1, bias=False, **dd)
        self.act2 = nn.GELU()
        self.norm2 = nn.BatchNorm2d(mid, **dd)
        self.conv3 = nn.Conv2d(mid, dim, 2, stride=2, bias=False, **dd)
        self.fused = fused

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript leaves out only what stands below this alone
            if self.fused:
                if stem_fusion.is_fusable_stem(self, x):
                    return stem_fusion.forward_stem(self, x)
                x = stem_fusion.channels_last(x)
        x = self.norm1(self.act1(self.conv1(x)))
        x = self.norm2(self.act2(self.conv2(x)))
        return self.conv3(x)


class Convolves(nn.Module):
    """What has a convolution `conv` outside of the blocks, which is computed in a type that the processor has."""

    fused: bool = True  # for pickles that have no such attribute
    if TYPE_CHECKING:  # TorchScript would take it for an attribute that is no module
        conv: nn.Conv2d

    def _convolve(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript leaves out only what stands below this alone
            if self.fused:
                return stem_fusion.convolve(self.conv, x)
        return self.conv(x)


@register_notrace_module
class Downsample(Convolves):
    """A norm and a 2x2 convolution, stride 2, (N, C, H, W) to (N, dim, H // 2, W // 2).

    With `dilation` the stride is 1 and the kernel dilated, for a network with a smaller output stride. The padding is
    then at the end only, which keeps the kernel on the pixels that it would see with stride 2.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        dilation: int | None = None,
        fused: bool = True,
        norm_layer: str = "layernorm2d",
        **dd: Any,
    ) -> None:
        super().__init__()
        self.fused = fused
        self.pad = dilation or 0
        self.norm = make_norm(norm_layer, in_dim, **dd)
        self.conv = nn.Conv2d(in_dim, dim, 2, stride=1 if dilation else 2, dilation=dilation or 1, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._convolve(self._pad(self._norm(x)))

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript leaves out only what stands below this alone
            if self.fused and stem_fusion.is_fusable_norm(self, x):
                return stem_fusion.forward_norm(self, x)
        return self.norm(x)

    def _pad(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (0, self.pad, 0, self.pad)) if self.pad > 0 else x


class Stage(nn.Module):
    """A downsampling, except in the first stage, and a row of blocks."""

    def __init__(self, downsample: nn.Module, blocks: list[Conv2FormerBlock]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        if not torch.jit.is_scripting():
            if self.grad_checkpointing:
                return checkpoint_seq(self.blocks, x)
            if fusion.is_fusable_row(self.blocks, x):
                return fusion.forward(self.blocks, x)
        return self.blocks(x)


@register_notrace_module
class HeadConv(Convolves):
    """What comes before the pooling: a 1x1 convolution, GELU and a norm, (N, C, H, W) to (N, dim, H, W)."""

    def __init__(self, in_dim: int, dim: int, fused: bool = True, norm_layer: str = "layernorm2d", **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 1, **dd)
        self.act = nn.GELU()
        self.norm = make_norm(norm_layer, dim, **dd)
        self.fused = fused

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.act(self._convolve(x)))


def _init_weights(module: nn.Module, name: str, head_init_scale: float = 1.0) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)) and not module.weight.is_meta:  # which has no values, but takes time
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
        if name == "head.fc" and head_init_scale != 1.0:
            with torch.no_grad():
                module.weight.mul_(head_init_scale)


class Conv2Former(RenamesForeignKeys):
    """Conv2Former: a ConvNet of four stages whose blocks replace self-attention by convolutional modulation.

    State dicts in the authors' and birder's layouts load as they are, through `load_state_dict` and every timm route. A
    classifier for another number of classes is replaced with a warning; anything else that differs is a
    `CheckpointError`.

    Args:
        in_chans: channels of the input image.
        num_classes: size of the classifier, 0 for none.
        global_pool: timm's pooling name; '' for none, which makes the classifier a 1x1 convolution over the map.
        output_stride: largest stride of the last stage, 8, 16 or 32; where four stages would have more, the last ones
            are dilated instead of strided.
        dims: channels of the four stages, even.
        depths: blocks of the four stages.
        kernel_size: side of the modulation's depthwise kernels, odd; one for all stages or one for each.
        mlp_ratio: hidden channels of the MLPs as a multiple of the stage's channels.
        ls_init_value: initial layer scale; None for no layer scale.
        stem_stride: pixels of an image from one pixel of the first stage to the next: 4, or 2 for small images.
        head_hidden_size: channels of the 1x1 convolution between the last stage and the pooling.
        fusion: how the modulation joins context and values: 'product', or an ablation in `FUSIONS`.
        norm_layer: the normalisation before the branches of a block, in the downsampling and in the head:
            'layernorm2d', which is the paper's and is what `fused` is for, or 'batchnorm2d'.
        head_init_scale: factor on the classifier's initial weights, below 1 for fine-tuning.
        drop_rate: dropout before the classifier.
        drop_path_rate: drop path of the last block; it grows linearly from 0 over all blocks of the network.
        fused: let `ops` compute blocks and stem, in less time and memory, wherever it computes the same; False for the
            modules alone.
        recompute: there, compute cheap maps again in the backward pass instead of saving them.
        device, dtype: where and how to create the parameters.

    Raises:
        ValueError: a shape is impossible: not four stages, an even kernel, an odd or non-positive width, ...
    """

    pretrained_cfg: dict[str, Any]  # set by timm's builder
    default_cfg: dict[str, Any]  # the same, under its older name

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        dims: tuple[int, ...] = (72, 144, 288, 576),
        depths: tuple[int, ...] = (3, 3, 12, 3),
        kernel_size: int | tuple[int, ...] = 11,
        mlp_ratio: float = 4.0,
        ls_init_value: float | None = 1e-6,
        head_hidden_size: int = 1280,
        stem_stride: int = 4,
        fusion: str = "product",
        norm_layer: str = "layernorm2d",
        head_init_scale: float = 1.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        fused: bool = True,
        recompute: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        kernel_sizes = to_ntuple(4)(kernel_size)
        if not len(dims) == len(depths) == len(kernel_sizes) == 4:
            raise ValueError(f"expected 4 stages: dims {dims}, depths {depths}, kernel_size {kernel_size}")
        if min(dims) < 2 or any(dim % 2 for dim in dims) or min(depths) < 1:
            raise ValueError(f"dims must be positive and even, depths positive: dims {dims}, depths {depths}")
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride must be 8, 16 or 32: {output_stride}")
        if stem_stride not in STEM_STRIDES:
            raise ValueError(f"stem_stride must be 2 or 4: {stem_stride}")
        if fusion not in FUSIONS:
            raise ValueError(f"fusion must be one of {', '.join(FUSIONS)}: {fusion!r}")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.fusion = fusion
        self.norm_layer = norm_layer
        self.stem_stride = stem_stride
        self.feature_info: list[dict[str, Any]] = []

        self.stem = Stem(in_chans, dims[0], stem_stride, fused, **dd)
        # linear over all blocks of the network, then split by stage
        rates = cast("list[list[float]]", calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        stages = []
        stride, dilation = stem_stride, 1
        for i in range(4):
            downsample: nn.Module = nn.Identity()
            if i > 0 and stride < output_stride:
                downsample = Downsample(dims[i - 1], dims[i], None, fused, norm_layer, **dd)
                stride *= 2
            elif i > 0:
                downsample = Downsample(dims[i - 1], dims[i], dilation, fused, norm_layer, **dd)
                dilation *= 2
            blocks = [
                Conv2FormerBlock(
                    dims[i],
                    kernel_sizes[i],
                    mlp_ratio,
                    rate,
                    ls_init_value,
                    dilation,
                    FUSIONS[fusion],
                    fused,
                    recompute,
                    norm_layer,
                    **dd,
                )
                for rate in rates[i]
            ]
            stages.append(Stage(downsample, blocks))
            self.feature_info.append({"num_chs": dims[i], "reduction": stride, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.num_features = dims[-1]

        self.head_conv: nn.Module = HeadConv(dims[-1], head_hidden_size, fused, norm_layer, **dd)
        self.head = ClassifierHead(
            head_hidden_size, num_classes, pool_type=global_pool, drop_rate=drop_rate, use_conv=not global_pool, **dd
        )
        self.head_hidden_size = self.head.num_features
        named_apply(lambda module, name: _init_weights(module, name, head_init_scale), self)

    def _stages(self) -> list[Stage]:
        return cast("list[Stage]", list(self.stages))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Returns parameters to exclude from weight decay beyond those of one dimension: none."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns timm's patterns for layer groups, from the stem to the classifier, for layer-wise rate decay.

        The groups are those of ConvNeXt's fine-tuning recipe, carried over to any depth: a stage is one group with the
        downsampling before it; a stage of more than four blocks is divided into up to nine. That gives about 12 groups
        for every variant, so one decay factor means the same for all of them. The 1x1 convolution of the head goes
        with the last stage: the classifier alone is new in fine-tuning.

        Args:
            coarse: one group per stage.
        """
        if coarse:
            blocks: list[tuple[str, tuple[int, ...] | None]] = [(r"^stages\.(\d+)", None)]
        else:
            blocks = [(r"^stages\.(\d+)\.downsample", (0,))]
            for s, stage in enumerate(self._stages()):
                depth = len(stage.blocks)
                parts = min(depth, 9) if depth > 4 else 1
                blocks += [(rf"^stages\.({s})\.blocks\.{b}\.", (b * parts // depth,)) for b in range(depth)]
        return {"stem": r"^stem", "blocks": [*blocks, (r"^head_conv", (99999,))]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block in the backward pass instead of keeping its activations, or stops doing so."""
        for stage in self._stages():
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Returns the classifier layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """Replaces the classifier by a fresh one, and the pooling if a name is given.

        Args:
            num_classes: size of the new classifier, 0 for none.
            global_pool: timm's pooling name, '' for none, None for the present one.
            reset_other: remove the head's 1x1 convolution and norm as well; pooling then sees the last stage.
        """
        self.num_classes = num_classes
        if reset_other:
            self.head_conv = nn.Identity()
        if global_pool is not None:
            self.head.use_conv = not global_pool
        in_features = self.num_features if reset_other else self.head.in_features
        self.head.reset(num_classes, global_pool, in_features=in_features, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features
        _init_weights(self.head.fc, "head.fc")

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Returns the outputs of the chosen stages, and the final features with them.

        Args:
            x: images, (N, in_chans, H, W).
            indices: the last n stages if int, all if None, the given ones if a list; negative ones count from the end.
            norm: part of timm's signature; there is no norm after the last stage to apply.
            stop_early: leave out the stages after the last one asked for.
            output_fmt: only 'NCHW'.
            intermediates_only: leave out the final features.

        Returns:
            The list of stage outputs, (N, dims[i], H / s, W / s) for strides s of 4, 8, 16, 32, or what `feature_info`
            says; unless `intermediates_only`, a pair of the final features and that list.
        """
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        take_indices, max_index = _take_indices(len(self.stages), indices)
        stages = self.stages if torch.jit.is_scripting() or not stop_early else self.stages[: max_index + 1]
        x = self.stem(x)
        intermediates = []
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the stages after the last one asked for, and the head.

        Args:
            indices: stages to keep, as in `forward_intermediates`.
            prune_norm: part of timm's signature; there is no norm after the last stage to remove.
            prune_head: remove the head even if the last stage stays.

        Returns:
            The indices asked for, counted from the start.
        """
        take_indices, max_index = _take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        self.num_features = cast(int, self.feature_info[max_index]["num_chs"])
        if prune_head or prune_end:
            self.reset_classifier(0, "", reset_other=True)
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Maps images, (N, in_chans, H, W), to the last stage's features, (N, dims[-1], H / s, W / s), s mostly 32."""
        return self.stages(self.stem(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Maps features, (N, dims[-1], H, W), to logits, (N, num_classes); `pre_logits`: to (N, head_hidden_size)."""
        x = self.head_conv(x)
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps images, (N, in_chans, H, W), to logits, (N, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads a state dict, or a checkpoint with one inside, in this project's, the authors' or birder's layout.

        As `torch.nn.Module.load_state_dict`, with two differences while `strict`: a classifier for another number of
        classes is left out, and a head that the weights lack stays as it is, both with a warning; and what differs
        otherwise is explained before any weight is changed.

        Raises:
            CheckpointError: `strict`, and the networks differ in more than the head.
        """
        state_dict = native_state_dict(state_dict, path="the state dict")
        if strict:
            check_fit(self, state_dict, ignore=[*CLASSIFIER, *lacking_head(self, state_dict)])
            adapt_head(self, state_dict)
            check_fit(self, state_dict)
        return super().load_state_dict(state_dict, strict, assign)
