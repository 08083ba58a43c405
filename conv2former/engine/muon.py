"""timm's Muon, faster where many matrices have one shape, as in a network of equal blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.optim import Muon
from timm.optim.muon import muon
from torch import Tensor

from .._private import copy_all

__all__ = ["GroupedMuon"]

LARGEST = 2**22  # elements that are orthogonalised together: more is no faster, and takes memory


class GroupedMuon(Muon):
    """timm's Muon with its values, which orthogonalises the matrices of one shape together.

    For each matrix timm starts some twenty operations, which on a small network take longer than their arithmetic. The
    state is timm's, so a checkpoint of one goes on with the other.
    """

    @classmethod
    def of(cls, optimizer: Muon) -> GroupedMuon:
        """Returns an optimizer of the same parameters, groups and arguments; `optimizer` has not made a step."""
        return cls(optimizer.param_groups, **optimizer.defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes a step; see `torch.optim.Optimizer`.

        The first one is timm's, which decides what is a matrix for Muon, and so is whatever has no other of its shape.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        done = [parameter for group in self.param_groups for parameter in self._step_together(group)]
        gradients = [parameter.grad for parameter in done]
        for parameter in done:
            parameter.grad = None  # which tells timm to leave it as it is
        super().step()
        for parameter, gradient in zip(done, gradients, strict=True):
            parameter.grad = gradient
        return loss

    def _step_together(self, group: dict[str, Any]) -> list[Tensor]:
        """Makes the step of a group's matrices that are not the only ones of their shape, and returns them."""
        by_kind: dict[Any, list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is None or "momentum_buffer" not in self.state.get(parameter, {}):
                continue
            if group["algo"] == "muon" and (parameter.ndim == 2 or group["conv_mode"] == "flatten"):
                kind = (parameter.shape[0], parameter[0].numel(), parameter.dtype, parameter.device)
                by_kind.setdefault(kind, []).append(parameter)
        done = []
        for (rows, columns, *_), parameters in by_kind.items():
            size = max(1, LARGEST // (rows * columns))
            for start in range(0, len(parameters), size):
                together = parameters[start : start + size]
                if len(together) > 1:
                    self._step_one_shape(group, together)
                    done += together
        return done

    def _step_one_shape(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Makes the step of matrices of one shape, (rows, columns), by one call of timm's function.

        That takes them as one weight, (rows, columns, matrices), as if they were the places of a convolution's kernel.
        """
        momenta = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        gradients: list[Any] = [parameter.grad for parameter in parameters]
        weights, grads, buffers = (
            torch.stack([tensor.flatten(1) for tensor in tensors]) for tensors in (parameters, gradients, momenta)
        )
        shared = ("lr", "weight_decay", "momentum", "nesterov", "ns_steps", "ns_coefficients", "eps", "safety_factor")
        muon(
            [weights.permute(1, 2, 0)],
            [grads.permute(1, 2, 0)],
            [buffers.permute(1, 2, 0)],
            **{name: group[name] for name in (*shared, "adjust_lr_fn", "scale_eps", "capturable")},
            conv_mode="batched",
            normalize_spatial=False,
        )
        for targets, results in ((parameters, weights), (momenta, buffers)):
            shaped = [result.view(target.shape) for target, result in zip(targets, results, strict=True)]
            copy_all(targets, shaped)
