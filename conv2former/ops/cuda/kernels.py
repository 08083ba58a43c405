"""The Triton kernels behind `ops/operators.py`; `launch.py` cuts the work and runs them.

All maps are (N, C, H, W) in channels_last memory, so a row of the map is W * C neighbouring numbers. For most kernels
a *lane* is one channel of one strip of S neighbouring columns of one image, and a thread has a lane or two: it keeps
the sums of the strip in registers, a loaded value goes into up to K of them, and neighbouring threads read neighbouring
channels. `band_kernel` uses the tensor cores instead. Sums are in float32 for every type of map. Nothing is added by
atomics: the same input gives the same bits.

docs/performance.md counts bytes and instructions and says why the kernels are cut as they are.
"""

# mypy: ignore-errors
# What stands in a kernel is Triton's language, not Python: its types are those of registers.

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "PLUS_TIMES_SLOPE",
    "TIMES",
    "TIMES_SLOPE",
    "band_kernel",
    "depthwise_kernel",
    "depthwise_weight_kernel",
    "mlp_backward_kernel",
    "mlp_kernel",
]

# What a convolution's kernel does with a finished sum.
TIMES = tl.constexpr(0)  # (sum + bias) * p
TIMES_SLOPE = tl.constexpr(1)  # sum * gelu'(p)
PLUS_TIMES_SLOPE = tl.constexpr(2)  # (sum + p) * gelu'(q)

# A map of another size and another batch run the kernels that are compiled; other channels and types compile new ones.
SIZES = ["N", "H", "W", "strips", "row_blocks", "block_rows", "image_blocks", "chunks", "chunk_rows"]


@triton.jit
def lower_tail(t):
    """The standard normal distribution below -t, for t >= 0.

    2 to the power of a polynomial of t, fitted to log2(erfc(t / sqrt(2)) / 2) on [0, 6]; farther out it falls faster
    than the distribution does. The error is at most 1.6e-7, and 8.4e-5 of the value down to t = 6. That is half the
    instructions of erf, and small values are not the difference of two large ones.
    """
    power = -5.337051e-07
    power = power * t + 9.3745425e-06
    power = power * t - 3.1829386e-05
    power = power * t - 5.359618e-04
    power = power * t + 7.6117398e-03
    power = power * t - 5.2885725e-02
    power = power * t - 4.5908114e-01
    power = power * t - 1.1511189
    power = power * t - 1.0
    return tl.exp2(power)


@triton.jit
def gelu(x):
    """Exact GELU, x * Phi(x), as relu(x) - |x| * Phi(-|x|)."""
    t = tl.abs(x)
    return tl.maximum(x, 0.0) - t * lower_tail(t)


@triton.jit
def gelu_slope(x):
    """The derivative of GELU, Phi(x) + x * phi(x)."""
    tail = lower_tail(tl.abs(x))
    density = 0.3989422804014327 * tl.exp2(-0.7213475204444817 * x * x)
    return tl.where(x < 0.0, tail, 1.0 - tail) + x * density


@triton.jit
def find_lane(block, N, H, W, strips, C: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr):
    """Returns of BLOCK lanes: which exist, image, strip, channel, first column, and where row 0 of the strip begins."""
    lane = block * BLOCK + tl.arange(0, BLOCK)
    channel = lane % C
    strip = lane // C % strips
    image = lane // (strips * C)
    start = image.to(tl.int64) * H * (W * C) + strip * S * C + channel
    return lane < N * strips * C, image, strip, channel, strip * S, start


@triton.jit
def load_column(row_ptr, mask, column, W, AT: tl.constexpr, C: tl.constexpr):
    """Loads the column that is AT columns right of `column`, where `row_ptr` points, or 0 outside the map."""
    inside = mask & (column + AT >= 0) & (column + AT < W)
    return tl.load(row_ptr + AT * C, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_columns(row_ptr, mask, column, W, AT: tl.constexpr, COUNT: tl.constexpr, C: tl.constexpr):
    """Loads COUNT neighbouring columns, the first AT columns right of `column`, as a tuple."""
    values = ()
    for t in tl.static_range(COUNT):
        values += (load_column(row_ptr, mask, column, W, AT + t, C),)
    return values


@triton.jit
def width_of(row, H, W):
    """The columns that a row has: none above and below the map."""
    return tl.where((row >= 0) & (row < H), W, 0)


@triton.jit
def load_gelu(row_ptr, mask, column, width, COUNT: tl.constexpr, C: tl.constexpr):
    """Loads COUNT columns of a row, the first left of `column`, and applies GELU; outside the map they are 0."""
    values = ()
    for t in tl.static_range(COUNT):
        values += (gelu(load_column(row_ptr, mask, column, width, t - 1, C)),)
    return values


@triton.jit
def zeros(COUNT: tl.constexpr, shape: tl.constexpr):
    values = ()
    for _ in tl.static_range(COUNT):
        values += (tl.zeros(shape, tl.float32),)
    return values


@triton.jit(do_not_specialize=SIZES)
def depthwise_kernel(
    x_ptr, weight_ptr, bias_ptr, p_ptr, q_ptr, out_ptr, N, H, W, strips, row_blocks,
    C: tl.constexpr, K: tl.constexpr, S: tl.constexpr, R: tl.constexpr, EPILOGUE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A K x K depthwise convolution of x, for R rows of BLOCK lanes, and what is left to do with the sums.

    The weight is (K + 2 R - 2, K, C), with R - 1 rows of zeros on either side: row i of x meets the R rows of the
    result with R different rows of the weight, of which the first and the last may be none.
    """
    P: tl.constexpr = K // 2
    row_size = W.to(tl.int64) * C
    # Neighbouring programs share rows of x: at the same time, so that the second finds them in the cache.
    first = (tl.program_id(0) % row_blocks) * R
    mask, _, _, channel, column, start = find_lane(tl.program_id(0) // row_blocks, N, H, W, strips, C, S, BLOCK)
    sums = zeros(R * S, (BLOCK,))
    for i in range(tl.maximum(first - P, 0), tl.minimum(first + R + P, H)):
        row_ptr = x_ptr + start + i * row_size
        taps_ptr = weight_ptr + channel + (i - first + P + R - 1) * (K * C)
        window = load_columns(row_ptr, mask, column, W, -P, S - 1, C)
        for dx in tl.static_range(K):
            window += (load_column(row_ptr, mask, column, W, dx + S - 1 - P, C),)
            added = ()
            for r in tl.static_range(R):
                tap = tl.load(taps_ptr + (dx - r * K) * C)
                for s in tl.static_range(S):
                    added += (sums[r * S + s] + window[dx + s] * tap,)
            sums = added

    bias = tl.zeros((BLOCK,), tl.float32)
    if EPILOGUE == TIMES:
        bias = tl.load(bias_ptr + channel).to(tl.float32)
    for r in tl.static_range(R):
        at = start + (first + r) * row_size
        width = width_of(first + r, H, W)
        for s in tl.static_range(S):
            p = load_column(p_ptr + at, mask, column, width, s, C)
            out = sums[r * S + s]
            if EPILOGUE == TIMES:
                out = (out + bias) * p
            elif EPILOGUE == TIMES_SLOPE:
                out = out * gelu_slope(p)
            else:
                out = (out + p) * gelu_slope(load_column(q_ptr + at, mask, column, width, s, C))
            tl.store(out_ptr + at + s * C, out, mask=mask & (column + s < width))


@triton.jit(do_not_specialize=SIZES)
def band_kernel(
    x_ptr, weight_ptr, bias_ptr, p_ptr, out_ptr, N, H, W, strips, image_blocks,
    C: tl.constexpr, K: tl.constexpr, S: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr,
    LEFT: tl.constexpr, EPILOGUE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A K x K depthwise convolution of gelu(x) or x for 16-bit types, as matrix products, and its epilogue.

    For one channel, a row of the weight takes the WINDOW columns of a row of x to COLUMNS columns of the result, S of
    which count: a matrix with a band of K diagonals. A warp has a channel of 16 images. It goes down the rows of x and
    multiplies each, (16, WINDOW), by K bands, to K rows of the result at once, of which one is then complete.
    The weight is (K, K, C) in x's type.
    """
    P: tl.constexpr = K // 2
    row_size = W.to(tl.int64) * C
    block = tl.program_id(0)  # neighbours share cache lines: the channels of the same pixels
    channel = block % (C // CHANNELS) * CHANNELS + tl.arange(0, CHANNELS)[:, None, None]
    image = block // (C // CHANNELS) % image_blocks * 16 + tl.arange(0, 16)[None, :, None]
    first = block // (C // CHANNELS) // image_blocks * S
    start = image.to(tl.int64) * H * row_size + channel
    at = tl.arange(0, WINDOW)
    to = tl.arange(0, COLUMNS)
    dx = at[None, :, None] - to[None, None, :] + (P - LEFT)
    in_band = (dx >= 0) & (dx < K)
    bands = ()
    for dy in tl.static_range(K):
        bands += (tl.load(weight_ptr + (dy * K + dx) * C + channel, mask=in_band, other=0.0),)
    bias = tl.zeros((CHANNELS, 1, 1), tl.float32)
    if EPILOGUE == TIMES:
        bias = tl.load(bias_ptr + channel).to(tl.float32)

    column = first - LEFT + at[None, None, :]
    x_ptr += start + column * C
    x_mask = (image < N) & (column >= 0)
    to_column = first + to[None, None, :]
    to_start = start + to_column * C
    to_mask = (image < N) & (to < S)[None, None, :]
    sums = zeros(K, (CHANNELS, 16, COLUMNS))  # of rows i - P to i + P
    ahead = tl.load(x_ptr, mask=x_mask & (column < width_of(0, H, W)), other=0.0)
    for i in range(0, H + P):
        x = ahead  # read a step before it is used: the products hide the waiting
        ahead = tl.load(x_ptr + (i + 1) * row_size, mask=x_mask & (column < width_of(i + 1, H, W)), other=0.0)
        if EPILOGUE == TIMES:
            x = gelu(x.to(tl.float32)).to(x.dtype)
        row = to_start + (i - P) * row_size
        mask = to_mask & (to_column < width_of(i - P, H, W))
        p = tl.load(p_ptr + row, mask=mask, other=0.0).to(tl.float32)
        out = tl.dot(x, bands[K - 1], sums[0])
        if EPILOGUE == TIMES:
            out = (out + bias) * p
        else:
            out = out * gelu_slope(p)
        tl.store(out_ptr + row, out.to(x.dtype), mask=mask)
        added = ()
        for j in tl.static_range(1, K):
            added += (tl.dot(x, bands[K - 1 - j], sums[j]),)
        added += (tl.zeros((CHANNELS, 16, COLUMNS), tl.float32),)
        sums = added


@triton.jit(do_not_specialize=SIZES)
def depthwise_weight_kernel(
    x_ptr, out_grad_ptr, partial_ptr, N, H, W, strips, chunks, chunk_rows,
    C: tl.constexpr, K: tl.constexpr, S: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Gradients of a depthwise convolution's weight and bias, from `chunk_rows` rows of x among those of all images.

    Group g of the threads has the rows D g to D g + D - 1 of the weight's gradient, K sums for each; all groups read
    the same row of x and neighbouring rows of the other map, each of them from memory once. Here a lane is a channel
    of a strip of any image. Writes (K K + 1, strips, C) sums for each chunk, the bias's last.
    """
    P: tl.constexpr = K // 2
    row_size = W.to(tl.int64) * C
    chunk = tl.program_id(0) % chunks
    lane = (tl.program_id(0) // chunks) * LANES + tl.arange(0, LANES)[None, :]
    dy = tl.arange(0, GROUPS)[:, None] * D
    lane, dy = tl.broadcast(lane, dy)
    column = lane // C * S
    mask = lane < strips * C
    start = column * C + lane % C

    sums = zeros(D * K, (GROUPS, LANES))
    bias_sum = tl.zeros((GROUPS, LANES), tl.float32)  # by the middle row of the weight, which meets every row of x
    for row in range(chunk * chunk_rows, tl.minimum(chunk * chunk_rows + chunk_rows, N * H)):
        grads = ()
        for d in tl.static_range(D):
            shift = P - d - dy
            row_mask = mask & (row % H + shift >= 0) & (row % H + shift < H)
            grads += load_columns(out_grad_ptr + start + (row + shift) * row_size, row_mask, column, W, 0, S, C)
        for s in tl.static_range(S):
            bias_sum += grads[P % D * S + s]
        window = load_columns(x_ptr + start + row * row_size, mask, column, W, -P, S - 1 + K, C)
        added = ()
        for d in tl.static_range(D):
            for dx in tl.static_range(K):
                total = sums[d * K + dx]
                for s in tl.static_range(S):
                    total += grads[d * S + s] * window[dx + s]
                added += (total,)
        sums = added

    partial_ptr += chunk.to(tl.int64) * (K * K + 1) * strips * C + lane
    for d in tl.static_range(D):
        for dx in tl.static_range(K):
            at = ((dy + d) * K + dx) * strips * C
            tl.store(partial_ptr + at, sums[d * K + dx], mask=mask & (dy + d < K))
    tl.store(partial_ptr + K * K * strips * C, bias_sum, mask=mask & (dy == P // D * D))


@triton.jit(do_not_specialize=SIZES)
def mlp_kernel(
    f_ptr, weight_ptr, bias_ptr, out_ptr, N, H, W, strips, row_blocks, block_rows,
    C: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Computes h + gelu(3 x 3 depthwise convolution of h + bias), h = gelu(f), down `block_rows` rows of BLOCK lanes.

    Three rows of h are in registers, one of them new at each step, so that GELU is computed 1 + 2 / S times.
    """
    mask, _, _, channel, column, start = find_lane(tl.program_id(0) // row_blocks, N, H, W, strips, C, S, BLOCK)
    first = (tl.program_id(0) % row_blocks) * block_rows
    row_size = W.to(tl.int64) * C
    taps = ()
    for tap in tl.static_range(9):
        taps += (tl.load(weight_ptr + tap * C + channel),)
    bias = tl.load(bias_ptr + channel).to(tl.float32)
    f_ptr += start
    above = load_gelu(f_ptr + (first - 1) * row_size, mask, column, width_of(first - 1, H, W), S + 2, C)
    here = load_gelu(f_ptr + first * row_size, mask, column, width_of(first, H, W), S + 2, C)
    for i in range(first, tl.minimum(first + block_rows, H)):
        below = load_gelu(f_ptr + (i + 1) * row_size, mask, column, width_of(i + 1, H, W), S + 2, C)
        for s in tl.static_range(S):
            z = bias
            for dx in tl.static_range(3):
                z += above[s + dx] * taps[dx]
                z += here[s + dx] * taps[3 + dx]
                z += below[s + dx] * taps[6 + dx]
            out_row_ptr = out_ptr + start + i * row_size
            tl.store(out_row_ptr + s * C, here[s + 1] + gelu(z), mask=mask & (column + s < W))
        above = here
        here = below


@triton.jit(do_not_specialize=SIZES)
def mlp_backward_kernel(
    f_ptr, out_grad_ptr, weight_ptr, bias_ptr, grad_ptr, partial_ptr, N, H, W, strips, row_blocks, block_rows,
    C: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of what the 3 x 3 convolution in `mlp_kernel` puts out, and the sums that give its weight's.

    Writes (10, C) sums for each strip of each row block, the bias's last.
    """
    mask, image, strip, channel, column, start = find_lane(tl.program_id(0) // row_blocks, N, H, W, strips, C, S, BLOCK)
    block = tl.program_id(0) % row_blocks
    first = block * block_rows
    row_size = W.to(tl.int64) * C
    taps = ()
    for tap in tl.static_range(9):
        taps += (tl.load(weight_ptr + tap * C + channel),)
    bias = tl.load(bias_ptr + channel).to(tl.float32)
    f_ptr += start
    above = load_gelu(f_ptr + (first - 1) * row_size, mask, column, width_of(first - 1, H, W), S + 2, C)
    here = load_gelu(f_ptr + first * row_size, mask, column, width_of(first, H, W), S + 2, C)
    sums = zeros(10, (BLOCK,))
    for i in range(first, tl.minimum(first + block_rows, H)):
        below = load_gelu(f_ptr + (i + 1) * row_size, mask, column, width_of(i + 1, H, W), S + 2, C)
        out_grads = load_columns(out_grad_ptr + start + i * row_size, mask, column, W, 0, S, C)
        for s in tl.static_range(S):
            z = bias
            for dx in tl.static_range(3):
                z += above[s + dx] * taps[dx]
                z += here[s + dx] * taps[3 + dx]
                z += below[s + dx] * taps[6 + dx]
            grad = out_grads[s] * gelu_slope(z)
            tl.store(grad_ptr + start + i * row_size + s * C, grad, mask=mask & (column + s < W))
            added = ()
            for dx in tl.static_range(3):
                added += (sums[dx] + grad * above[s + dx],)
            for dx in tl.static_range(3):
                added += (sums[3 + dx] + grad * here[s + dx],)
            for dx in tl.static_range(3):
                added += (sums[6 + dx] + grad * below[s + dx],)
            added += (sums[9] + grad,)
            sums = added
        above = here
        here = below
    part = ((image * strips + strip) * row_blocks + block).to(tl.int64)
    for tap in tl.static_range(10):
        tl.store(partial_ptr + (part * 10 + tap) * C + channel, sums[tap], mask=mask)
