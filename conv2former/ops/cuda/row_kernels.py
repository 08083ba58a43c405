"""The Triton kernels that go over the pixels of a map: layer norm, the residual sum, and what is summed over pixels.

Maps are rows of C neighbouring numbers, one for each pixel; a program takes ROWS of them at a time, BLOCK numbers of
each, a power of two that is at least C:

    pixels      | ROWS | ROWS | ...              a program each, where nothing is summed over pixels
                | chunk           | chunk | ...  a program each, where there are sums: ROWS pixels at a time, and as
                                                 many sums in registers, added over the rows at the end
    in memory   c0 c1 ... C | c0 c1 ... C | ...  a thread has neighbouring channels; a norm's sums are over a row

Statistics and sums are in float32 for every type of map. Sums over all pixels come as partial sums, one of each
program, which a second kernel adds in a fixed order: the same input gives the same bits.
"""

# mypy: ignore-errors
# What stands in a kernel is Triton's language, not Python: its types are those of registers.

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "branch_grad_kernel",
    "layer_norm_backward_kernel",
    "layer_norm_kernel",
    "out_grads_kernel",
    "residual_kernel",
    "residual_norm_kernel",
    "sum_partials_kernel",
]

# A map of another size and another batch run the kernels that are compiled; other channels and types compile new ones.
SIZES = ["pixels", "image_pixels", "chunk", "parts", "strips", "programs", "other_parts"]


@triton.jit
def find_rows(first, limit, ROWS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """Returns ROWS pixels from `first` on, below `limit`, the channels, where the numbers are, and which exist."""
    pixel = (first + tl.arange(0, ROWS))[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    return pixel, channel, pixel.to(tl.int64) * C + channel, (pixel < limit) & (channel < C)


@triton.jit
def load_channels(ptr, channel, C: tl.constexpr):
    return tl.load(ptr + channel, mask=channel < C, other=0.0).to(tl.float32)


@triton.jit
def store_norm(
    x, weight_ptr, bias_ptr, h_ptr, mean_ptr, rstd_ptr, pixel, channel, at, mask, pixels,
    EPS: tl.constexpr, SAVES: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Computes a layer norm over the channels, stores it, and where SAVES mean and reciprocal deviation."""
    mean = tl.sum(x, axis=1, keep_dims=True) / C
    centred = tl.where(mask, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / C + EPS)
    h = centred * rstd * load_channels(weight_ptr, channel, C) + load_channels(bias_ptr, channel, C)
    tl.store(h_ptr + at, h, mask=mask)
    if SAVES:
        tl.store(mean_ptr + pixel, mean, mask=pixel < pixels)
        tl.store(rstd_ptr + pixel, rstd, mask=pixel < pixels)


@triton.jit
def add_branch(
    x_ptr, y_ptr, gamma_ptr, mask_ptr, pixel, channel, at, mask, pixels, image_pixels,
    HAS_GAMMA: tl.constexpr, HAS_MASK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Returns ``x + y * gamma * mask``, gamma (C,) and a number of the mask for each image, where there are such."""
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_GAMMA:  # for each pixel: with one row for all of them Triton 3.8 gives each thread all pixels of a program
        y *= tl.load(gamma_ptr + channel + tl.zeros_like(pixel), mask=mask, other=0.0).to(tl.float32)
    if HAS_MASK:
        y *= tl.load(mask_ptr + pixel // image_pixels, mask=pixel < pixels, other=0.0).to(tl.float32)
    return x + y


@triton.jit
def store_branch_grad(
    grad, gamma_ptr, mask_ptr, branch_grad_ptr, scaled_ptr, pixel, channel, at, mask, limit, image_pixels,
    HAS_MASK: tl.constexpr, WRITES: tl.constexpr, SCALES: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Returns ``grad * mask``, and stores it if it WRITES that, and its product with gamma if it SCALES."""
    if HAS_MASK:
        grad *= tl.load(mask_ptr + pixel // image_pixels, mask=pixel < limit, other=0.0).to(tl.float32)
    if WRITES:
        tl.store(branch_grad_ptr + at, grad, mask=mask)
    if SCALES:
        tl.store(scaled_ptr + at, grad * load_channels(gamma_ptr, channel, C), mask=mask)
    return grad


@triton.jit
def store_scaled_weight(gamma_ptr, weight_ptr, scaled_weight_ptr, C: tl.constexpr, D: tl.constexpr):
    """Multiplies a weight (C, D) by gamma, all programs between them: it would be a kernel of its own otherwise."""
    for start in range(tl.program_id(0) * 1024, C * D, tl.num_programs(0) * 1024):
        at = start + tl.arange(0, 1024)
        gamma = tl.load(gamma_ptr + at // D, mask=at < C * D, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + at, mask=at < C * D, other=0.0).to(tl.float32)
        tl.store(scaled_weight_ptr + at, weight * gamma, mask=at < C * D)


@triton.jit(do_not_specialize=SIZES)
def layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, h_ptr, mean_ptr, rstd_ptr, pixels,
    EPS: tl.constexpr, SAVES: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Layer norm over the channels; each pixel's mean and reciprocal deviation too where SAVES."""
    pixel, channel, at, mask = find_rows(tl.program_id(0) * ROWS, pixels, ROWS, C, BLOCK)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    store_norm(x, weight_ptr, bias_ptr, h_ptr, mean_ptr, rstd_ptr, pixel, channel, at, mask, pixels, EPS, SAVES, C)


@triton.jit(do_not_specialize=SIZES)
def layer_norm_backward_kernel(
    grad_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, residual_ptr, other_ptr, x_grad_ptr, h_ptr, partial_ptr,
    gamma_ptr, mask_ptr, sum_weight_ptr, branch_grad_ptr, scaled_ptr, scaled_weight_ptr, sum_partial_ptr,
    pixels, image_pixels, chunk,
    HAS_RESIDUAL: tl.constexpr, WRITES_H: tl.constexpr, RESTS: tl.constexpr, HAS_SUM: tl.constexpr,
    HAS_MASK: tl.constexpr, WRITES: tl.constexpr, SCALES: tl.constexpr, SCALES_WEIGHT: tl.constexpr, D: tl.constexpr,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient of a layer norm's input plus `residual`, for `chunk` pixels, and the norm's result again.

    The latter is written where WRITES_H: x is at hand here. Partial sums are (2 + RESTS, C) for each program: the
    weight's gradient, the bias's, and the sums of another map, of RESTS C channels, whose pixels are visited as well.
    Where x HAS_SUM that it is the result of, what `branch_grad_kernel` computes of the gradient is written, too.
    """
    first = tl.program_id(0) * chunk
    limit = tl.minimum(first + chunk, pixels)
    weight_sums = tl.zeros((ROWS, BLOCK), tl.float32)
    bias_sums = tl.zeros((ROWS, BLOCK), tl.float32)
    branch_sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(first, limit, ROWS):
        pixel, channel, at, mask = find_rows(start, limit, ROWS, C, BLOCK)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + pixel, mask=pixel < limit, other=0.0)
        rstd = tl.load(rstd_ptr + pixel, mask=pixel < limit, other=0.0)
        weight = load_channels(weight_ptr, channel, C)
        normed = tl.where(mask, (x - mean) * rstd, 0.0)
        weight_sums += grad * normed
        bias_sums += grad
        scaled = grad * weight
        mean_scaled = tl.sum(scaled, axis=1, keep_dims=True) / C
        mean_product = tl.sum(scaled * normed, axis=1, keep_dims=True) / C
        x_grad = (scaled - mean_scaled - normed * mean_product) * rstd
        if HAS_RESIDUAL:
            x_grad += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x_grad = x_grad.to(x_grad_ptr.dtype.element_ty)
        tl.store(x_grad_ptr + at, x_grad, mask=mask)
        if HAS_SUM:
            branch_sums += store_branch_grad(
                x_grad.to(tl.float32), gamma_ptr, mask_ptr, branch_grad_ptr, scaled_ptr,
                pixel, channel, at, mask, limit, image_pixels, HAS_MASK, WRITES, SCALES, C,
            )  # fmt: skip
        if WRITES_H:
            tl.store(h_ptr + at, normed * weight + load_channels(bias_ptr, channel, C), mask=mask)
    channel = tl.arange(0, BLOCK)
    partial_ptr += tl.program_id(0) * ((2 + RESTS) * C) + channel
    tl.store(partial_ptr, tl.sum(weight_sums, axis=0), mask=channel < C)
    tl.store(partial_ptr + C, tl.sum(bias_sums, axis=0), mask=channel < C)
    if HAS_SUM:
        tl.store(sum_partial_ptr + tl.program_id(0) * C + channel, tl.sum(branch_sums, axis=0), mask=channel < C)
        if SCALES_WEIGHT:
            store_scaled_weight(gamma_ptr, sum_weight_ptr, scaled_weight_ptr, C, D)
    for rest in tl.static_range(RESTS):
        sums = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(first, limit, ROWS):
            pixel, column, _, mask = find_rows(start, limit, ROWS, C, BLOCK)
            at = pixel.to(tl.int64) * (RESTS * C) + rest * C + column
            sums += tl.load(other_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(partial_ptr + (2 + rest) * C, tl.sum(sums, axis=0), mask=channel < C)


@triton.jit(do_not_specialize=SIZES)
def residual_kernel(
    x_ptr, y_ptr, gamma_ptr, mask_ptr, out_ptr, pixels, image_pixels,
    HAS_GAMMA: tl.constexpr, HAS_MASK: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A residual sum: see `add_branch`."""
    pixel, channel, at, mask = find_rows(tl.program_id(0) * ROWS, pixels, ROWS, C, BLOCK)
    out = add_branch(
        x_ptr, y_ptr, gamma_ptr, mask_ptr, pixel, channel, at, mask, pixels, image_pixels, HAS_GAMMA, HAS_MASK, C
    )
    tl.store(out_ptr + at, out, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def residual_norm_kernel(
    x_ptr, y_ptr, gamma_ptr, mask_ptr, out_ptr, weight_ptr, bias_ptr, h_ptr, mean_ptr, rstd_ptr, pixels, image_pixels,
    EPS: tl.constexpr, SAVES: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_MASK: tl.constexpr,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A residual sum, and the next branch's layer norm of it, as it is stored."""
    pixel, channel, at, mask = find_rows(tl.program_id(0) * ROWS, pixels, ROWS, C, BLOCK)
    out = add_branch(
        x_ptr, y_ptr, gamma_ptr, mask_ptr, pixel, channel, at, mask, pixels, image_pixels, HAS_GAMMA, HAS_MASK, C
    ).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, out, mask=mask)
    x = out.to(tl.float32)
    store_norm(x, weight_ptr, bias_ptr, h_ptr, mean_ptr, rstd_ptr, pixel, channel, at, mask, pixels, EPS, SAVES, C)


@triton.jit(do_not_specialize=SIZES)
def branch_grad_kernel(
    grad_ptr, gamma_ptr, mask_ptr, weight_ptr, branch_grad_ptr, scaled_ptr, scaled_weight_ptr, partial_ptr,
    pixels, image_pixels, chunk,
    HAS_MASK: tl.constexpr, WRITES: tl.constexpr, SCALES: tl.constexpr, SCALES_WEIGHT: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``grad * mask`` for `chunk` pixels, if it WRITES that, its product with gamma if it SCALES, and the sums of it.

    Partial sums are (C,) for each program. Where SCALES_WEIGHT, the weight (C, D) is multiplied by gamma.
    """
    first = tl.program_id(0) * chunk
    limit = tl.minimum(first + chunk, pixels)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(first, limit, ROWS):
        pixel, channel, at, mask = find_rows(start, limit, ROWS, C, BLOCK)
        sums += store_branch_grad(
            tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32), gamma_ptr, mask_ptr, branch_grad_ptr,
            scaled_ptr, pixel, channel, at, mask, limit, image_pixels, HAS_MASK, WRITES, SCALES, C,
        )  # fmt: skip
    if SCALES_WEIGHT:
        store_scaled_weight(gamma_ptr, weight_ptr, scaled_weight_ptr, C, D)
    channel = tl.arange(0, BLOCK)
    tl.store(partial_ptr + tl.program_id(0) * C + channel, tl.sum(sums, axis=0), mask=channel < C)


@triton.jit(do_not_specialize=SIZES)
def out_grads_kernel(
    product_ptr, weight_ptr, bias_ptr, gamma_ptr, partial_ptr, weight_grad_ptr, bias_grad_ptr, gamma_grad_ptr, parts,
    HAS_GAMMA: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of a layer scale and of the 1x1 convolution before it, for one of its C results.

    `product` (C, D) is the gradient of gamma times the weight, and the `parts` partial sums (C,) are that of gamma
    times the bias; gamma's own follows from both, without the convolution's result.
    """
    c = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, parts, BLOCK):
        sums += tl.load(partial_ptr + (first + at) * C + c, mask=first + at < parts, other=0.0)
    bias_grad = tl.sum(sums, axis=0)
    gamma = 1.0
    if HAS_GAMMA:
        gamma = tl.load(gamma_ptr + c).to(tl.float32)
    products = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, D, BLOCK):
        d = first + at
        product = tl.load(product_ptr + c * D + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(weight_grad_ptr + c * D + d, product * gamma, mask=d < D)
        if HAS_GAMMA:
            products += product * tl.load(weight_ptr + c * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(bias_grad_ptr + c, bias_grad * gamma)
    if HAS_GAMMA:
        gamma_grad = tl.sum(products, axis=0) + bias_grad * tl.load(bias_ptr + c).to(tl.float32)
        tl.store(gamma_grad_ptr + c, gamma_grad)


@triton.jit
def sum_partials(
    program, partial_ptr, weight_grad_ptr, bias_grad_ptr, rest_ptr, parts, strips,
    C: tl.constexpr, TAPS: tl.constexpr, RESTS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Adds partial sums (parts, TAPS + 1 + RESTS, strips, C) to gradients (C, TAPS) and (C,), and the rest (RESTS, C).

    A program has BLOCK results and adds PARTS numbers of each at a time.
    """
    result = program * BLOCK + tl.arange(0, BLOCK)
    tap = result // C
    channel = result % C
    exists = result < (TAPS + 1 + RESTS) * C
    sums = tl.zeros((PARTS, BLOCK), tl.float32)
    for first in range(0, parts * strips, PARTS):
        part = (first + tl.arange(0, PARTS))[:, None]
        at = (part // strips).to(tl.int64) * ((TAPS + 1 + RESTS) * strips * C) + part % strips * C
        at += (tap * (strips * C) + channel)[None, :]
        sums += tl.load(partial_ptr + at, mask=(part < parts * strips) & exists[None, :], other=0.0)
    total = tl.sum(sums, axis=0)
    tl.store(weight_grad_ptr + channel * TAPS + tap, total, mask=exists & (tap < TAPS))
    tl.store(bias_grad_ptr + channel, total, mask=exists & (tap == TAPS))
    if RESTS:
        tl.store(rest_ptr + (result - (TAPS + 1) * C), total, mask=exists & (tap > TAPS))


@triton.jit(do_not_specialize=SIZES)
def sum_partials_kernel(
    partial_ptr, weight_grad_ptr, bias_grad_ptr, rest_ptr, parts, strips, programs,
    other_partial_ptr, other_weight_grad_ptr, other_bias_grad_ptr, other_rest_ptr, other_parts,
    C: tl.constexpr, TAPS: tl.constexpr, RESTS: tl.constexpr, OTHER_C: tl.constexpr, OTHER_RESTS: tl.constexpr,
    BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Runs `sum_partials` in the first `programs` programs, and in the others for others, with a tap and a strip."""
    program = tl.program_id(0)
    if program < programs:
        sum_partials(
            program, partial_ptr, weight_grad_ptr, bias_grad_ptr, rest_ptr, parts, strips,
            C, TAPS, RESTS, BLOCK, PARTS,
        )  # fmt: skip
    else:
        sum_partials(
            program - programs, other_partial_ptr, other_weight_grad_ptr, other_bias_grad_ptr, other_rest_ptr,
            other_parts, 1, OTHER_C, 1, OTHER_RESTS, BLOCK, PARTS,
        )  # fmt: skip
