"""What the kernels share: reading a row of V logits in full-width pieces, and its softmax in one pass.

**Full width.** A GPU moves 16 bytes a thread at a time only from addresses that are multiples of 16. GPT-2's 50257 is
odd: in 16-bit precision its rows start at any even address, and a compiler that cannot prove more reads two bytes at
a time, eight times as many loads. So a row is cut in three, by the address where it really starts:

    | head: 0-7 elements | groups of 8 elements, each 16 bytes and aligned | tail: 0-7 elements |

The groups move at full width; head and tail, the row's *edges*, together at most 14 elements, move one by one. Nothing
outside the row is ever read or written, no padding is asked for, and in float32 a group is 4 elements.

**One pass.** softmax needs the row's maximum before its sum. Each thread keeps its own running maximum `top`, sum
`mass` = sum 2^z and `tilt` = sum 2^z z of the groups it has seen, z = (x - top) log2(e) / T, and mends both sums when
the maximum moves: one exponential more for a group. Threads meet once, at the end of the row. Then

    log2 p_v = z_v - log2 mass                     H = ln 2 (log2 mass - tilt / mass)

`top` starts at the lowest finite number, not at -inf (whose difference with a logit of -inf is NaN) and not at 0
(GPT-2's logits are near -115, where e^-115 is 0 in float32). z is formed from the difference x - top, which is exact
near the maximum, so logits of 1e4 lose nothing. Base 2, because the hardware's exponential is 2^z.
"""
import torch
import triton
import triton.language as tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # float32's lowest finite number
FLOOR = tl.constexpr(-300.0)  # 2^-300 is 0 in float32: a z below changes nothing, but 0 * -inf would be NaN


# --- on the device ----------------------------------------------------------------------------------------------------


@triton.jit
def row_at(pointer, row, count, outer, inner):
    """Where row number `row` of a (B, count, V) tensor starts. 64-bit: 8192 rows of 262144 are 2^31 elements."""
    return pointer + (row // count).to(tl.int64) * outer + (row % count).to(tl.int64) * inner


@triton.jit
def cut(row, width, UNIT: tl.constexpr):
    """(head, groups): elements before the first 16-byte boundary, and whole groups of UNIT elements after it."""
    size: tl.constexpr = 16 // UNIT
    head = ((16 - row.to(tl.int64) % 16) % 16 // size).to(tl.int32)
    head = tl.minimum(head, width)
    return head, (width - head) // UNIT


@triton.jit
def tile_at(row, head, tile, GROUPS: tl.constexpr, UNIT: tl.constexpr):
    """Pointers (GROUPS, UNIT) to a tile of groups, and the numbers of its groups (GROUPS, 1)."""
    group = tl.arange(0, GROUPS)[:, None]
    first = row + head + tile * (GROUPS * UNIT)  # the tile moves this scalar: the lanes need one address for all tiles
    at = first + (group * UNIT + tl.arange(0, UNIT)[None, :])
    # In bytes, along each dimension: `cut` made it true, but the compiler cannot see that.
    return tl.multiple_of(at, [16, 16]), tile * GROUPS + group


@triton.jit
def edges(head, groups, width, UNIT: tl.constexpr):
    """Columns (2 * UNIT,) of the row's head and tail, and which of them exist."""
    lane = tl.arange(0, 2 * UNIT)
    column = tl.where(lane < UNIT, lane, head + groups * UNIT + lane - UNIT)
    return column, ((lane < head) | (lane >= UNIT)) & (column < width)


@triton.jit
def start(x, scale, GROUPS: tl.constexpr):
    """(top, mass, tilt), (GROUPS,) each, of the edges' logits x (2 * UNIT,), which count as the first group's."""
    top = tl.maximum(tl.max(x, 0), LOWEST)
    z = (x - top) * scale
    p = tl.exp2(z)
    first = tl.arange(0, GROUPS) == 0
    mass = tl.where(first, tl.sum(p, 0), 0.0)
    tilt = tl.where(first, tl.sum(p * tl.maximum(z, FLOOR), 0), 0.0)
    return tl.zeros((GROUPS,), tl.float32) + top, mass, tilt


@triton.jit
def update(x, top, mass, tilt, scale):
    """(top, mass, tilt) after a tile of logits x (GROUPS, UNIT). A group is one thread's own: nothing is exchanged."""
    old = top
    top = tl.maximum(old, tl.max(x, 1))
    drop = tl.maximum((old - top) * scale, FLOOR)
    z = (x - top[:, None]) * scale
    p = tl.exp2(z)
    fade = tl.exp2(drop)
    tilt = fade * (tilt + drop * mass) + tl.sum(p * tl.maximum(z, FLOOR), 1)
    return top, fade * mass + tl.sum(p, 1), tilt


@triton.jit
def finish(top, mass, tilt, scale):
    """Scalars (top, log2 of mass, entropy in nats) of the row: the only place where threads meet."""
    peak = tl.max(top, 0)
    drop = tl.maximum((top - peak) * scale, FLOOR)
    fade = tl.exp2(drop)
    tilt = tl.sum(fade * (tilt + drop * mass), 0)
    mass = tl.sum(fade * mass, 0)
    log_mass = tl.log2(mass)
    return peak, log_mass, (log_mass - tilt / mass) * LN2


@triton.jit
def gradient_of(x, top, log_mass, scale, level, slope, SLOPED: tl.constexpr):
    """p (level + slope z), z = log2 p: every gradient here but at the target's column. SLOPED: slope is not 0."""
    z = (x - top) * scale - log_mass
    if SLOPED:
        return tl.exp2(z) * (level + slope * tl.maximum(z, FLOOR))
    else:
        return tl.exp2(z) * level


@triton.jit
def gradient_at_target(logprob, entropy, g, h):
    """g (1 - p) - h p (log p + H), for the gradients g and h of log-prob and entropy: as exact as the log-prob."""
    return -g * expm1(logprob) - h * tl.exp(logprob) * (tl.maximum(logprob, -200.0) + entropy)


@triton.jit
def expm1(x):
    """e^x - 1 without the cancellation near 0, where its Taylor series is summed instead."""
    series = 1 + x / 9
    for n in tl.static_range(8, 1, -1):
        series = 1 + x / n * series
    return tl.where(tl.abs(x) < 0.35, x * series, tl.exp(x) - 1)


@triton.jit
def scale_kernel(X, FACTOR, count, outer, inner, width, GROUPS: tl.constexpr, UNIT: tl.constexpr):
    """X *= FACTOR, a scalar on the device; nothing is read or written if it is 1."""
    factor = tl.load(FACTOR)
    if factor != 1:
        x = row_at(X, tl.program_id(0), count, outer, inner)
        head, groups = cut(x, width, UNIT)
        for tile in range(tl.cdiv(groups, GROUPS)):
            at, group = tile_at(x, head, tile, GROUPS, UNIT)
            value = tl.load(at, mask=group < groups, other=0).to(tl.float32) * factor
            tl.store(at, value.to(X.dtype.element_ty), mask=group < groups)
        column, exists = edges(head, groups, width, UNIT)
        value = tl.load(x + column, mask=exists, other=0).to(tl.float32) * factor
        tl.store(x + column, value.to(X.dtype.element_ty), mask=exists)


# --- on the host ------------------------------------------------------------------------------------------------------

INTERPRETED = not isinstance(scale_kernel, triton.runtime.JITFunction)  # TRITON_INTERPRET=1, set before the import
# Does the running backward keep its graph? Not public; without it, take it that the gradient may be asked for again.
keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def check(logits, **rows):
    """Raise a ValueError unless the kernels can run on logits (..., V) and each named tensor is (...), beside them."""
    if logits.dtype not in DTYPES:
        raise ValueError(f"the kernels take float32, bfloat16 or float16 logits, not {logits.dtype}: "
                         "use the torch definitions")
    check_device(logits)
    for name, tensor in rows.items():
        if tensor is not None and tensor.shape != logits.shape[:-1]:
            raise ValueError(f"logits {tuple(logits.shape)} do not fit {name} {tuple(tensor.shape)}: "
                             "want (..., V) and (...)")
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(f"logits are on {logits.device}, {name} on {tensor.device}: move them together")


def check_device(tensor):
    if not (tensor.is_cuda or INTERPRETED):
        raise ValueError(f"the kernels take CUDA tensors, not {tensor.device} ones, "
                         "unless TRITON_INTERPRET=1 is set before they are imported")


def check_temperature(temperature):
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")


def as_rows(logits):
    """(..., V) as (B, R, V) with adjacent columns: a view wherever strides allow, so that slices cost no copy."""
    if logits.dim() < 3:
        logits = logits.reshape(1, -1, logits.shape[-1])
    elif logits.dim() > 3:
        logits = logits.flatten(0, -3)
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def flat(x):
    """(...) as adjacent (N,), as a kernel reads it; an expanded tensor, such as the gradient of a sum, is copied."""
    return x.reshape(-1).contiguous()


def strides(rows):
    """(count, outer stride, inner stride) of rows (B, count, V), as `row_at` takes them."""
    return rows.shape[1], rows.stride(0), rows.stride(1)


def phase(rows):
    """Where rows start within 16 bytes, in elements: (the first, the step from one of B to the next, of R)."""
    unit = 16 // rows.element_size()
    steps = [rows.stride(d) % unit if rows.shape[d] > 1 else 0 for d in (0, 1)]
    return rows.data_ptr() // rows.element_size() % unit, *steps


def like_rows(rows):
    """An empty tensor for the gradient of rows (B, R, V), each row at the same place within 16 bytes as the original.

    So one cut into head, groups and tail serves both. It is contiguous if `rows` are.
    """
    batch, count, width = rows.shape
    unit = 16 // rows.element_size()
    first, outer, inner = phase(rows)
    inner = width + (inner - width) % unit if count > 1 else width
    outer = count * inner + (outer - count * inner) % unit if batch > 1 else count * inner
    return rows.new_empty(first + batch * outer).as_strided((batch, count, width), (outer, inner, 1), first)


def tiling(width, dtype, elements=32, warps=8):
    """Launch shape for rows of `width`: tiles of GROUPS groups of UNIT logits, `elements` a thread; small rows less."""
    unit = 16 // dtype.itemsize
    groups = min(triton.next_power_of_2(triton.cdiv(width, unit)), warps * 32 * elements // unit)
    return {"GROUPS": groups, "UNIT": unit, "num_warps": max(1, min(warps, groups * unit // (32 * elements)))}


def scaled(gradient, upstream):
    """gradient * upstream, for the backward of a loss whose gradient was made in the forward.

    An upstream gradient of 1, the usual one, costs nothing: each program finds that out on the device and stops, so
    the host waits for nothing. Otherwise the product takes the gradient's place, unless the graph is kept for a second
    backward.
    """
    if keeps_graph():
        return gradient * upstream.to(gradient.dtype)
    rows = as_rows(gradient)  # a view: `like_rows` laid it out
    with torch.cuda.device_of(rows):
        scale_kernel[(rows.shape[0] * rows.shape[1],)](
            rows, upstream.float(), *strides(rows), rows.shape[2], **tiling(rows.shape[2], rows.dtype))
    return gradient
