"""What runs on the GPU: the deployment step of many tensors in Triton, two passes and a reduction.

A program takes a chunk of one tensor, tile by tile, several parameters to a thread. All that a parameter needs, its
hidden state and features included, is a tuple of tiles that stays in registers; the meta-parameters are scalars that
come from the cache, each loaded once a tile and used for every parameter of it. Sums over a chunk go to a row of their
own and are added up in order: results do not depend on how programs are scheduled.

The module can be imported where there is no Triton; `triton.py`, which launches these functions, says so.

Legend: `T` tensors, `B` chunks of all tensors, `R` readouts, `S` timescales, `H0` param hidden size, `F` features.
"""

# Triton's language has no unpacking, and tuples there change their type as they grow.
# ruff: noqa: RUF005, SIM108, SIM300
# mypy: disable-error-code=assignment

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:
    triton = tl = None

    def jit(function: Any = None, **_: Any) -> Any:
        """Leave a function alone that will not be called."""
        return function or jit


__all__ = ["apply", "measure", "reduce", "tl", "triton"]


# ------------------------------------------------------------------ arithmetic of one tile


# Powers of two and inverse roots are single instructions; exponentials and quotients are not.


@jit
def sigmoid(x: tl.tensor) -> tl.tensor:
    """Return the logistic function, within 5e-7."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


@jit
def decay_of(logit: tl.tensor, LARGEST: tl.constexpr) -> tl.tensor:
    """Return the logistic function to the last bit: near one, the rest to one is what matters."""
    return tl.div_rn(1.0, 1.0 + tl.exp2(tl.minimum(logit, LARGEST) * -1.4426950408889634))


@jit
def tanh(x: tl.tensor) -> tl.tensor:
    """Return the hyperbolic tangent, within 1e-6."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -2.8853900817779268))
    return 2.0 * root * root - 1.0


@jit
def asinh(x: tl.tensor) -> tl.tensor:
    """Return the inverse hyperbolic sine, within 2e-6 of its value: a series near zero, where the logarithm cancels."""
    size = tl.abs(x)
    square = x * x
    series = 0.022372159 * square - 0.030381944
    series = series * square + 0.044642857
    series = series * square - 0.075
    series = series * square + 0.16666667
    near = size - size * square * series
    far = tl.log2(size + tl.sqrt(square + 1.0)) * 0.6931471805599453
    value = tl.where(size < 0.25, near, far)
    return tl.where(x < 0, -value, value)


@jit
def affine(weights: tl.tensor, bias: tl.tensor, inputs: tl.tuple) -> tl.tensor:
    """Return `bias + sum_k weights[k] inputs[k]`."""
    total = bias
    for k in tl.static_range(len(inputs)):
        total += tl.load(weights + k) * inputs[k]
    return total


@jit
def scramble(x: tl.tensor) -> tl.tensor:
    """Mix the bits of unsigned 32-bit numbers: the finaliser of a multiplicative hash."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@jit
def mixed(key: tl.tensor, value: tl.tensor) -> tl.tensor:
    """Mix a float into a 32-bit key."""
    key = (key ^ value.to(tl.uint32, bitcast=True)) * 16777619
    return key ^ (key >> 15)


# ------------------------------------------------------------------ memory


@jit
def load_rows(start: tl.tensor, count: tl.tensor, lane: tl.tensor, inside: tl.tensor, ROWS: tl.constexpr) -> tl.tuple:
    """Load a tile of each row of a state `[ROWS, n]`; `start` is the tile's place in the first."""
    rows = ()
    for i in tl.static_range(ROWS):
        rows = rows + (tl.load((start + i * count) + lane, mask=inside, other=0.0).to(tl.float32),)
    return rows


@jit
def store_rows(
    start: tl.tensor,
    rows: tl.tuple,
    count: tl.tensor,
    lane: tl.tensor,
    inside: tl.tensor,
    seed: tl.tensor,
    STATE: tl.constexpr,
) -> None:
    """Store a tile of each row of a state; in bfloat16 with stochastic rounding.

    As many random bits are added as will be cut off, so a value is rounded up as often as it lies near the upper one.
    """
    random = seed
    for i in tl.static_range(len(rows)):
        value = rows[i]
        if STATE == tl.bfloat16:
            if i % 2 == 0:
                random = scramble(seed + (i * 0x05EBCA6B))
            else:
                random = random >> 16
            raised = (value.to(tl.uint32, bitcast=True) + (random & 0xFFFF)) >> 16
            tl.store((start + i * count) + lane, raised.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
        else:
            tl.store((start + i * count) + lane, value, mask=inside)


@jit
def places(start: tl.tensor, row: tl.tensor, first: tl.tensor, lane: tl.tensor, STRIDES: tl.constexpr) -> tl.tensor:
    """Return where the elements of a tensor lie that has up to three dimensions of any strides.

    Three columns from `STRIDES` on hold the strides.
    """
    at = (start + first) + lane
    inner_size = tl.load(row + 9).to(tl.int32)
    if inner_size > 0:
        middle_size = tl.load(row + 8).to(tl.int32)
        index = first.to(tl.int32) + lane
        rest = index // inner_size
        outer = (rest // middle_size) * tl.load(row + STRIDES)
        middle = (rest % middle_size) * tl.load(row + STRIDES + 1)
        at = start + (outer + middle + (index % inner_size) * tl.load(row + STRIDES + 2))
    return at


@jit
def pointer(row: tl.tensor, COLUMN: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """Return the address in a column of the table."""
    return tl.load(row + COLUMN).to(tl.pointer_type(DTYPE))


# ------------------------------------------------------------------ the rule


@jit
def features(average: tl.tuple, square: tl.tuple, relative_rate: tl.tensor, S: tl.constexpr) -> tl.tuple:
    """Return the inputs of the param RNN, in the order of `FEATURES`; the first `S` are the scaled gradients."""
    inputs = ()
    logs = ()
    mean = 0.0
    for s in tl.static_range(S):
        inputs = inputs + (asinh(average[s] * tl.rsqrt(square[s])),)
        log = tl.log2(square[s]) * 0.6931471805599453
        logs = logs + (log,)
        mean += log
    mean = mean * (1.0 / S)
    for s in tl.static_range(S - 1):
        inputs = inputs + (inputs[s] * inputs[s + 1],)
    for s in tl.static_range(S):
        inputs = inputs + (logs[s] - mean,)
    return inputs + (relative_rate,)


@jit
def gru(
    meta: tl.tensor,
    bias: tl.tensor,
    bias_stride: tl.tensor,
    x: tl.tuple,
    hidden: tl.tuple,
    F: tl.constexpr,
    H0: tl.constexpr,
) -> tl.tuple:
    """Return the next hidden state; `meta` holds the rows of reset gate, update gate and candidate."""
    WIDE: tl.constexpr = F + H0
    both = x + hidden
    gated = ()
    for j in tl.static_range(H0):
        reset = sigmoid(affine(meta + j * WIDE, tl.load(bias + j * bias_stride), both))
        gated = gated + (reset * hidden[j],)
    both_gated = x + gated
    after = ()
    for j in tl.static_range(H0):
        keep = sigmoid(affine(meta + (H0 + j) * WIDE, tl.load(bias + (H0 + j) * bias_stride), both))
        candidate = tanh(affine(meta + (2 * H0 + j) * WIDE, tl.load(bias + (2 * H0 + j) * bias_stride), both_gated))
        after = after + (keep * hidden[j] + (1.0 - keep) * candidate,)
    return after


@jit
def summed(sums: tl.tensor, first: tl.constexpr, rows: tl.tuple, inside: tl.tensor, WIDTH: tl.constexpr) -> tl.tensor:
    """Add the sums of rows to a vector, from a place on."""
    lane = tl.arange(0, WIDTH)
    for i in tl.static_range(len(rows)):
        total = tl.sum(tl.where(inside, rows[i], 0.0), 0)
        sums += tl.where(lane == first + i, total, 0.0)
    return sums


@jit
def measure_tile(
    row: tl.tensor,
    first: tl.tensor,
    sums: tl.tensor,
    steps: tl.tensor,
    meta: tl.tensor,
    bias: tl.tensor,
    bias_stride: tl.tensor,
    relative_rate: tl.tensor,
    remembers: tl.tensor,
    long_decay: tl.tensor,
    long_power: tl.tensor,
    key: tl.tensor,
    GRAD_LIMIT: tl.constexpr,
    SQUARE_FLOOR: tl.constexpr,
    MAX_LOGIT: tl.constexpr,
    BOUND: tl.constexpr,
    H0: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    LONG: tl.constexpr,
    WIDTH: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """Take the step of one tile; add to the sums."""
    F: tl.constexpr = 3 * S
    DECAY: tl.constexpr = 3 * H0 * (F + H0)  # where each part of the meta-parameters begins
    MOMENTARY: tl.constexpr = DECAY + 2 * H0
    READOUT: tl.constexpr = MOMENTARY + H0
    DECAY_BIAS: tl.constexpr = READOUT + R * S * H0 + 3 * H0
    SHORTCUT: tl.constexpr = DECAY_BIAS + 3
    count = tl.load(row + 7)
    lane = tl.arange(0, TILE)
    inside = lane < tl.minimum(count - first, TILE).to(tl.int32)
    grad = tl.load(places(pointer(row, 1, GRAD), row, first, lane, 13), mask=inside, other=0.0).to(tl.float32)
    param = tl.load(places(pointer(row, 0, PARAM), row, first, lane, 10), mask=inside, other=0.0).to(tl.float32)
    sums = summed(sums, H0 + F + R, (param * param,), inside, WIDTH)
    spot = first.to(tl.uint32) + lane.to(tl.uint32)
    seed = scramble((spot * 0x1E3779B9 + key) ^ grad.to(tl.uint32, bitcast=True))
    grad = tl.minimum(tl.maximum(grad, -GRAD_LIMIT), GRAD_LIMIT)
    hidden_at = pointer(row, 2, STATE) + first
    average_at = pointer(row, 3, STATE) + first
    square_at = pointer(row, 4, STATE) + first
    hidden = load_rows(hidden_at, count, lane, inside, H0)
    average = load_rows(average_at, count, lane, inside, S)
    square = load_rows(square_at, count, lane, inside, S + LONG)

    decay = decay_of(affine(meta + DECAY, tl.load(meta + DECAY_BIAS), hidden), MAX_LOGIT)
    scale_logit = affine(meta + DECAY + H0, tl.load(meta + DECAY_BIAS + 1), hidden)
    scale_decay = remembers * decay_of(scale_logit, MAX_LOGIT)
    next_average = ()
    next_square = ()
    for s in tl.static_range(S):
        kept = remembers * decay
        mean = kept * average[s] + (1.0 - kept) * grad
        next_average = next_average + (mean,)
        next_square = next_square + (scale_decay * square[s] + (1.0 - scale_decay) * (mean * mean + SQUARE_FLOOR),)
        decay = tl.sqrt_rn(decay)
    long_scale = 1.0
    if LONG:
        first_square = next_square[0]  # type: ignore[misc]
        long = long_decay * square[S] + (1.0 - long_decay) * first_square
        long_scale = tl.exp2(0.5 * long_power * (tl.log2(first_square) - tl.log2(long)))
        next_square = next_square + (long,)
    store_rows(average_at, next_average, count, lane, inside, seed ^ 0x68E31DA4, STATE)
    store_rows(square_at, next_square, count, lane, inside, seed ^ 0x35297A4D, STATE)

    x = features(next_average, next_square, relative_rate, S)
    after = gru(meta, bias, bias_stride, x, hidden, F, H0)
    store_rows(hidden_at, after, count, lane, inside, seed, STATE)
    sums = summed(sums, 0, after, inside, WIDTH)
    sums = summed(sums, H0, x, inside, WIDTH)

    raw = affine(meta + MOMENTARY, tl.load(meta + DECAY_BIAS + 2), after)
    factor = tl.exp2(1.4426950408889634 * BOUND * tanh(raw * (1.0 / BOUND)))
    steps += tl.load(row + 6) + first
    squares = ()
    for r in tl.static_range(R):
        direction = tl.zeros_like(grad)
        for s in tl.static_range(S):
            weights = meta + READOUT + (r * S + s) * H0
            direction += affine(weights, tl.load(meta + SHORTCUT + r * S + s), after) * x[s]
        direction *= long_scale
        tl.store((steps + r * count) + lane, direction * factor, mask=inside)
        squares = squares + (direction * direction,)
    return summed(sums, H0 + F, squares, inside, WIDTH)


# ------------------------------------------------------------------ the launches
#
# `tensors` `[T, 18]` says of each tensor where it is and what is its. Its columns:
#
# 0-5    addresses of parameter, gradient, hidden state, averages, squares and lookahead
# 6      place of its steps in `steps`
# 7      number of parameters
# 8, 9   sizes of the middle and the inner dimension, 0 where parameter and gradient are contiguous
# 10-12  strides of the parameter
# 13-15  strides of the gradient
# 16, 17 its first chunk, and how many it has


@jit(
    do_not_specialize=["tensor_count", "first_chunk"],
    do_not_specialize_on_alignment=[
        "bias",
        "log_rate",
        "mean_log_rate",
        "remembers",
        "long_decay",
        "long_power",
        "proceed",
    ],
)
def measure(
    tensors: tl.tensor,  # [T, 18] int64
    chunks: tl.tensor,  # [B, 2] int32: tensor, number of the chunk in it
    partial: tl.tensor,  # [B, WIDTH]
    steps: tl.tensor,  # [R, n] of each tensor, end to end
    meta: tl.tensor,  # as `packed` lays them out
    bias: tl.tensor,  # [3 H0, T] of the gates, the rule's own added
    log_rate: tl.tensor,  # [T]
    mean_log_rate: tl.tensor,  # [T]
    remembers: tl.tensor,  # [T]
    long_decay: tl.tensor,  # [T] where there is a long average, else anything
    long_power: tl.tensor,  # [T]
    proceed: tl.tensor,  # [] 1, or 0 to leave all as it is
    tensor_count: int,  # T
    first_chunk: int,
    GRAD_LIMIT: tl.constexpr,
    SQUARE_FLOOR: tl.constexpr,
    MAX_LOGIT: tl.constexpr,
    BOUND: tl.constexpr,
    H0: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    LONG: tl.constexpr,
    WIDTH: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Step the states of a chunk; write its steps and its sums of hidden states, inputs and squares."""
    chunk = first_chunk + tl.program_id(0)
    tensor = tl.load(chunks + 2 * chunk)
    begin = tl.load(chunks + 2 * chunk + 1).to(tl.int64) * CHUNK
    row = tensors + tensor * 18
    end = tl.minimum(begin + CHUNK, tl.load(row + 7) * tl.load(proceed))
    rate = tl.load(log_rate + tensor)
    relative_rate = rate - tl.load(mean_log_rate + tensor)
    key = tl.full((), 0x011C9DC5, tl.uint32)
    if STATE == tl.bfloat16:  # what changes from step to step makes the randomness: no counter to keep
        for i in tl.static_range(3 * H0):
            key = mixed(key, tl.load(bias + i * tensor_count + tensor))
        key = mixed(mixed(key, relative_rate), rate)
    sums = tl.zeros((WIDTH,), tl.float32)
    for tile in range(tl.cdiv(end - begin, TILE)):
        sums = measure_tile(
            row,
            begin + tile * TILE,
            sums,
            steps,
            meta,
            bias + tensor,
            tensor_count,
            relative_rate,
            tl.load(remembers + tensor),
            tl.load(long_decay + tensor),
            tl.load(long_power + tensor),
            key,
            GRAD_LIMIT,
            SQUARE_FLOOR,
            MAX_LOGIT,
            BOUND,
            H0,
            S,
            R,
            LONG,
            WIDTH,
            PARAM,
            GRAD,
            STATE,
            TILE,
        )
    tl.store(partial + chunk * WIDTH + tl.arange(0, WIDTH), sums)


@jit(do_not_specialize=["tensor_count"])
def reduce(
    tensors: tl.tensor,  # [T, 18] int64
    partial: tl.tensor,  # [B, WIDTH]
    sums: tl.tensor,  # [ROWS, T]
    tensor_count: int,  # T
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Add up the sums of the chunks of one tensor, in double precision and in one order."""
    tensor = tl.program_id(0)
    first = tl.load(tensors + tensor * 18 + 16)
    count = tl.load(tensors + tensor * 18 + 17)
    lane = tl.arange(0, WIDTH)
    total = tl.zeros((TILE, WIDTH), tl.float64)
    for start in range(0, count, TILE):
        chunk = start + tl.arange(0, TILE)
        at = (first + chunk)[:, None] * WIDTH + lane[None, :]
        total += tl.load(partial + at, mask=(chunk < count)[:, None], other=0.0)
    tl.store(sums + lane * tensor_count + tensor, tl.sum(total, 0).to(tl.float32), mask=lane < ROWS)


@jit(
    do_not_specialize=["tensor_count", "first_chunk"],
    do_not_specialize_on_alignment=["inverse_rms", "limits", "log_rate", "proceed"],
)
def apply(
    tensors: tl.tensor,  # [T, 18] int64
    chunks: tl.tensor,  # [B, 2] int32
    steps: tl.tensor,  # [R, n] of each tensor, end to end
    inverse_rms: tl.tensor,  # [R, T]
    limits: tl.tensor,  # [R, T] how far a parameter may move, before the multiplier of the rate
    log_rate: tl.tensor,  # [T]
    scales: tl.tensor,  # [2, T] multiplier of the rate, weight decay
    proceed: tl.tensor,  # [] 1, or 0 to leave all as it is
    tensor_count: int,  # T
    first_chunk: int,
    R: tl.constexpr,
    PARAM: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Move a chunk of the parameters, and their lookaheads."""
    chunk = first_chunk + tl.program_id(0)
    tensor = tl.load(chunks + 2 * chunk)
    begin = tl.load(chunks + 2 * chunk + 1).to(tl.int64) * CHUNK
    row = tensors + tensor * 18
    count = tl.load(row + 7)
    multiplier = tl.load(scales + tensor)
    rate = tl.exp(tl.load(log_rate + tensor)) * multiplier
    limit = tl.load(limits + tensor) * multiplier
    decay = rate * tl.load(scales + tensor_count + tensor)
    WIDE: tl.constexpr = tl.float64 if PARAM == tl.float64 else tl.float32
    lane = tl.arange(0, TILE)
    end = tl.minimum(begin + CHUNK, count * tl.load(proceed))
    for tile in range(tl.cdiv(end - begin, TILE)):
        first = begin + tile * TILE
        inside = lane < tl.minimum(count - first, TILE).to(tl.int32)
        step_at = steps + (tl.load(row + 6) + first)
        step = tl.load(step_at + lane, mask=inside, other=0.0).to(WIDE) * (tl.load(inverse_rms + tensor) * rate)
        step = tl.minimum(tl.maximum(step, -limit), limit)
        at = places(pointer(row, 0, PARAM), row, first, lane, 10)
        param = tl.load(at, mask=inside, other=0.0).to(WIDE)
        tl.store(at, (param - (step + param * decay)).to(PARAM), mask=inside)
        if R == 2:
            ahead = tl.load((step_at + count) + lane, mask=inside, other=0.0)
            ahead = ahead * (tl.load(inverse_rms + tensor_count + tensor) * rate)
            furthest = tl.load(limits + tensor_count + tensor) * multiplier
            ahead = tl.minimum(tl.maximum(ahead, -furthest), furthest)
            tl.store((pointer(row, 5, PARAM) + first) + lane, ahead.to(PARAM), mask=inside)
