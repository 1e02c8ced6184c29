"""Log-probability and entropy straight from hidden states: the (N, V) logits exist only as tiles inside a kernel.

    logits = hidden weight^T                                       hidden (N, C), weight (V, C)
    logprobs = log softmax(logits / T)[target]     entropy = -sum_v p_v log p_v,  p = softmax(logits / T)

**Forward.** A program owns BLOCK_N rows and a run of vocabulary tiles. For each tile it multiplies (BLOCK_N, C) by
(C, BLOCK_V) on the tensor cores and folds the float32 result, while it is still in registers, into four numbers per
row:

    top = max_v logits_v     mass = sum_v 2^z_v     tilt = sum_v 2^z_v z_v     the target's logit

with z = (logits - top) log2(e) / T, because the hardware's exponential has base 2. When a tile raises top, the sums
move with it, as in rows.py. A row's vocabulary is cut into several runs (*splits*) so that few rows still fill the
GPU; a second, tiny kernel merges the splits by the same rule and finishes

    logprobs = (logit_target - top) / T - ln 2 log2 mass        entropy = ln 2 (log2 mass - tilt / mass)

Measuring everything from the maximum is what keeps digits: z is exact to its own size even where the logits are
+-1e4, and a target whose p is close to 1 is the maximum itself, so that its log p is no difference of roundings.

**Backward.** With g and h the upstream gradients of a row's log-prob and entropy,

    T dlogits_v = g (1[v = target] - p_v) - h p_v (log p_v + entropy)

and dhidden = dlogits weight, dweight = dlogits^T hidden need them all. They are computed again from hidden and
weight, one wave of rows by one chunk of columns at a time, into a buffer that two matrix products use up before the
next block overwrites it. Both products sum in float32: bfloat16 has 8 bits, and a sum of many small terms in it stops
growing.

    matrix work  4 products of N x V x C: logits twice, dhidden, dweight. (Keeping bfloat16 logits would save one, and
                 cost N x V entries and the rounding of what the log-probs were computed from.)
    read         forward: hidden once per vocabulary tile and weight once per row block, mostly from the L2 cache;
                 backward: the same once more, and the buffer twice
    written      forward: 4 floats per row and split; backward: each block of dlogits once, dhidden, dweight
    kept         hidden, weight, targets and 4 floats per row
    peak, extra  the buffer, about BUFFER entries of the input's type (44 MiB in bfloat16) and at most about a quarter
                 of (N, V); dhidden (N, C) and one chunk of dweight in float32. Nothing of N x V.

Why tiles of 128 x 256: for each of C columns a tile reads 384 numbers and multiplies 128 x 256 pairs, the best ratio
whose float32 result still fits the registers (128 a thread in 8 warps). From Hopper on, 16-bit tiles come through
tensor descriptors; float32 and older GPUs load through pointers with masks. Both want rows of whole 16-byte groups:
hidden and weight of a width C that is no multiple of 16 are copied, with zeros at the end of each row.

Deviations from the definition in nanorlhf/logprobs.py: logits are never rounded to the input's precision, so that
bfloat16 results are closer to the exact ones than those of token_logprobs(hidden @ weight.T, ...); logits of -inf are
not foreseen (no finite weight makes one); a target outside [0, V) gives NaN instead of an error, which would have to
wait for the GPU.
"""
import functools

import torch
import triton
import triton.language as tl

from kernels.rows import (DTYPES, FLOOR, INTERPRETED, LN2, LOG2E, LOWEST, check_device, check_temperature,
                          gradient_at_target)

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # an old Triton: every GPU takes the way through pointers
    TensorDescriptor = None

WAVE = 4096                # rows of the backward's buffer
BUFFER = 4096 * 22 * 256   # its entries: 22 tiles of 256 columns, or more of them where there are fewer rows
MAX_SPLITS = 256           # runs that the vocabulary of one row block is cut into, at most
FLOAT32_SUMS = "dtype_out" in torch.ops.aten.addmm.overloads()  # torch >= 2.8: 16-bit factors with a float32 sum


# --- on the device ----------------------------------------------------------------------------------------------------


@triton.jit
def logits_tile(HIDDEN, WEIGHT, row, column, N, V, C, stride_hidden, stride_weight,
                BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
                DESCRIPTORS: tl.constexpr, INTERPRET: tl.constexpr):
    """hidden[row : row + BLOCK_N] weight[column : column + BLOCK_V]^T in float32; beyond N or V the entries are 0."""
    tile = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for k in range(0, C, BLOCK_C):
        if DESCRIPTORS:
            hidden = HIDDEN.load([row, k])
            weight = WEIGHT.load([column, k])
        else:
            rows = row + tl.arange(0, BLOCK_N)
            columns = column + tl.arange(0, BLOCK_V)
            ks = k + tl.arange(0, BLOCK_C)
            hidden = tl.load(HIDDEN + rows.to(tl.int64)[:, None] * stride_hidden + ks[None, :],  # 64-bit: N C > 2^31
                             mask=(rows < N)[:, None] & (ks < C)[None, :], other=0.0)
            weight = tl.load(WEIGHT + columns.to(tl.int64)[:, None] * stride_weight + ks[None, :],
                             mask=(columns < V)[:, None] & (ks < C)[None, :], other=0.0)
        if INTERPRET:  # the interpreter cannot multiply bfloat16
            hidden, weight = hidden.to(tl.float32), weight.to(tl.float32)
        tile = tl.dot(hidden, tl.trans(weight), tile, input_precision="ieee")  # of float32: no rounding to TF32
    return tile


@triton.jit(do_not_specialize=["N", "V", "tiles_per_split"])
def statistics_kernel(HIDDEN, WEIGHT, N, V, C, stride_hidden, stride_weight, TARGETS, STATISTICS,
                      temperature_inv, tiles_per_split,
                      BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
                      DESCRIPTORS: tl.constexpr, INTERPRET: tl.constexpr):
    """top, mass, tilt and target logit of BLOCK_N rows over one split of the vocabulary: STATISTICS (4, splits, N)."""
    scale = temperature_inv * LOG2E
    row = tl.program_id(0) * BLOCK_N  # programs that run together differ in this: they share the weight's tiles
    split = tl.program_id(1)
    rows = row + tl.arange(0, BLOCK_N)
    target = tl.load(TARGETS + rows, mask=rows < N, other=-1).to(tl.int32)  # compared with every entry: keep it short
    top = tl.full([BLOCK_N], LOWEST, tl.float32)
    mass = tl.zeros([BLOCK_N], tl.float32)
    tilt = tl.zeros([BLOCK_N], tl.float32)
    target_logit = tl.zeros([BLOCK_N], tl.float32)
    first = split * tiles_per_split
    for i in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(V, BLOCK_V))):
        tile = logits_tile(HIDDEN, WEIGHT, row, i * BLOCK_V, N, V, C, stride_hidden, stride_weight,
                           BLOCK_N, BLOCK_V, BLOCK_C, DESCRIPTORS, INTERPRET)
        columns = i * BLOCK_V + tl.arange(0, BLOCK_V)
        if (i + 1) * BLOCK_V > V:  # only the last tile pays for a mask; its filler is finite, so that 0 * z is 0
            tile = tl.where((columns < V)[None, :], tile, -1e30)
        old = top
        top = tl.maximum(old, tl.max(tile, 1))
        drop = tl.maximum((old - top) * scale, FLOOR)
        z = (tile - top[:, None]) * scale  # not tile * scale - top * scale, whose rounding would outweigh a small z
        p = tl.exp2(z)
        fade = tl.exp2(drop)
        tilt = fade * (tilt + drop * mass) + tl.sum(p * z, 1)
        mass = fade * mass + tl.sum(p, 1)
        target_logit += tl.sum(tl.where(columns[None, :] == target[:, None], tile, 0.0), 1)
    out = STATISTICS + split.to(tl.int64) * N + rows
    plane = tl.num_programs(1).to(tl.int64) * N
    tl.store(out, top, mask=rows < N)
    tl.store(out + plane, mass, mask=rows < N)
    tl.store(out + 2 * plane, tilt, mask=rows < N)
    tl.store(out + 3 * plane, target_logit, mask=rows < N)


@triton.jit(do_not_specialize=["N", "V", "splits"])
def merge_kernel(STATISTICS, TARGETS, LOGPROBS, ENTROPY, TOP, MASS, N, V, splits, temperature_inv,
                 BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """Merge the splits of BLOCK_N rows, BLOCK_S >= splits: (4, splits, N) -> log-prob, entropy, top, mass (N,)."""
    scale = temperature_inv * LOG2E
    split = tl.arange(0, BLOCK_S)[:, None]
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = rows < N
    at = STATISTICS + split.to(tl.int64) * N + rows[None, :]
    plane = splits.to(tl.int64) * N
    there = (split < splits) & valid[None, :]
    tops = tl.load(at, mask=there, other=LOWEST)  # (BLOCK_S, BLOCK_N)
    masses = tl.load(at + plane, mask=there, other=0.0)
    tilts = tl.load(at + 2 * plane, mask=there, other=0.0)
    target_logit = tl.sum(tl.load(at + 3 * plane, mask=there, other=0.0), 0)  # 0 in every split but the target's
    top = tl.max(tops, 0)
    drop = tl.maximum((tops - top[None, :]) * scale, FLOOR)
    fade = tl.exp2(drop)
    mass = tl.sum(fade * masses, 0)
    tilt = tl.sum(fade * (tilts + drop * masses), 0)
    log_mass = tl.log2(mass)
    logprob = (target_logit - top) * temperature_inv - log_mass * LN2
    target = tl.load(TARGETS + rows, mask=valid, other=0)
    tl.store(LOGPROBS + rows, tl.where((target >= 0) & (target < V), logprob, float("nan")), mask=valid)
    tl.store(ENTROPY + rows, (log_mass - tilt / mass) * LN2, mask=valid)
    tl.store(TOP + rows, top, mask=valid)
    tl.store(MASS + rows, mass, mask=valid)


@triton.jit(do_not_specialize=["N", "V", "first_column", "tiles_per_split"])
def dlogits_kernel(HIDDEN, WEIGHT, N, V, C, stride_hidden, stride_weight, TARGETS, LOGPROBS, ENTROPY, TOP, MASS,
                   GRAD_LOGPROBS, GRAD_ENTROPY, DLOGITS, stride_dlogits, temperature_inv, first_column,
                   tiles_per_split,
                   BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
                   DESCRIPTORS: tl.constexpr, INTERPRET: tl.constexpr):
    """Gradient in the logits of one wave of N rows and one chunk of V columns, the first of which is first_column.

    With p = 2^z / mass and log p = ln 2 (z - log2 mass), every entry but the target's is 2^z (slope z + level), where
    slope and level belong to the row.
    """
    scale = temperature_inv * LOG2E
    row = tl.program_id(0) * BLOCK_N
    rows = row + tl.arange(0, BLOCK_N)
    valid = rows < N
    top = tl.load(TOP + rows, mask=valid, other=0.0)
    mass = tl.load(MASS + rows, mask=valid, other=1.0)
    logprob = tl.load(LOGPROBS + rows, mask=valid, other=0.0)
    entropy = tl.load(ENTROPY + rows, mask=valid, other=0.0)
    target = tl.load(TARGETS + rows, mask=valid, other=-1).to(tl.int32) - first_column
    g = tl.load(GRAD_LOGPROBS + rows, mask=valid, other=0.0) * temperature_inv
    h = tl.load(GRAD_ENTROPY + rows, mask=valid, other=0.0) * temperature_inv
    slope = -h * LN2 / mass
    level = -(g + h * (entropy - tl.log(mass))) / mass
    at_target = gradient_at_target(logprob, entropy, g, h)
    first = tl.program_id(1) * tiles_per_split
    for i in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(V, BLOCK_V))):
        tile = logits_tile(HIDDEN, WEIGHT, row, i * BLOCK_V, N, V, C, stride_hidden, stride_weight,
                           BLOCK_N, BLOCK_V, BLOCK_C, DESCRIPTORS, INTERPRET)
        columns = i * BLOCK_V + tl.arange(0, BLOCK_V)
        z = (tile - top[:, None]) * scale
        dlogits = tl.exp2(z) * (slope[:, None] * z + level[:, None])
        dlogits = tl.where(columns[None, :] == target[:, None], at_target[:, None], dlogits)
        if DESCRIPTORS:
            DLOGITS.store([row, i * BLOCK_V], dlogits.to(DLOGITS.dtype))  # clipped at N and V
        else:
            at = DLOGITS + rows.to(tl.int64)[:, None] * stride_dlogits + columns[None, :]
            tl.store(at, dlogits.to(DLOGITS.dtype.element_ty), mask=valid[:, None])  # wide stores: no mask of V


# --- on the host ------------------------------------------------------------------------------------------------------


def tiling(dtype, capability):
    """Block sizes and launch options of the two matrix kernels, of which none spills; capability: the major number."""
    if INTERPRETED:
        blocks = 32, 128, 64, 4, 1
    elif dtype == torch.float32:
        blocks = 64, 128, 16, 8, 2
    elif capability in (9, 10):  # the data-centre GPUs from Hopper on; 12 has less shared memory
        blocks = 128, 256, 64, 8, 3
    else:
        blocks = 128, 128, 32, 8, 3
    return dict(zip(("BLOCK_N", "BLOCK_V", "BLOCK_C", "num_warps", "num_stages"), blocks))


@functools.lru_cache(maxsize=1024)
def split_length(row_blocks, tiles, processors):
    """Tiles per split such that row_blocks x splits programs, one a processor at a time, finish soonest."""
    def time(splits):
        return triton.cdiv(row_blocks * splits, processors) * triton.cdiv(tiles, splits)
    return triton.cdiv(tiles, min(range(1, min(tiles, MAX_SPLITS) + 1), key=time))  # of equals, the fewest splits


def buffer_shape(N, V, block):
    """(rows, columns) of the backward's buffer: at most about BUFFER entries and a quarter of V, in whole blocks."""
    rows = min(N, WAVE)
    columns = min(BUFFER // rows, triton.cdiv(V, 4))
    return rows, triton.cdiv(columns, block) * block


def gpu(device):
    """(compute capability, major number; processors) of a device. The interpreter plays a small Hopper."""
    if INTERPRETED:
        return 9, 4
    return torch.cuda.get_device_capability(device)[0], torch.cuda.get_device_properties(device).multi_processor_count


def in_groups(x):
    """x (n, C), or a copy with zeros after each row, whose rows are whole groups of 16 entries at aligned addresses."""
    missing = -x.shape[1] % 16
    return torch.nn.functional.pad(x, (0, missing)) if missing or x.data_ptr() % 16 else x


def product(hidden, weight):
    """How to run a kernel over all tiles of hidden weight^T: grid, tiles per split, its first arguments, options."""
    hidden, weight = in_groups(hidden), in_groups(weight)
    (N, C), V = hidden.shape, weight.shape[0]
    capability, processors = gpu(hidden.device)
    options = tiling(hidden.dtype, capability)
    block_n, block_v, block_c = options["BLOCK_N"], options["BLOCK_V"], options["BLOCK_C"]
    row_blocks, tiles = triton.cdiv(N, block_n), triton.cdiv(V, block_v)
    length = split_length(row_blocks, tiles, processors)
    # Not in float32, which feeds no tensor core: there they compile with spills.
    described = capability >= 9 and TensorDescriptor is not None and hidden.element_size() == 2
    factors = hidden, weight
    if described:
        factors = (TensorDescriptor.from_tensor(hidden, [block_n, block_c]),
                   TensorDescriptor.from_tensor(weight, [block_v, block_c]))
    options |= {"DESCRIPTORS": described, "INTERPRET": INTERPRETED}
    return (row_blocks, triton.cdiv(tiles, length)), length, (*factors, N, V, C, C, C), options


def statistics(hidden, weight, targets, temperature):
    """log-prob, entropy, top and mass of every row, (N,) float32 each."""
    N, V, temperature_inv = len(hidden), len(weight), 1 / temperature
    grid, length, factors, options = product(hidden, weight)
    splits = grid[1]
    partial = hidden.new_empty(4, splits, N, dtype=torch.float32)
    statistics_kernel[grid](*factors, targets, partial, temperature_inv, length, **options)
    rows = [hidden.new_empty(N, dtype=torch.float32) for _ in range(4)]
    block_s = triton.next_power_of_2(splits)
    block_n = max(1, 1024 // block_s)
    merge_kernel[(triton.cdiv(N, block_n),)](partial, targets, *rows, N, V, splits, temperature_inv,
                                             BLOCK_N=block_n, BLOCK_S=block_s)
    return rows


def write_dlogits(dlogits, hidden, weight, rows, temperature, first_column):
    """Fill a block (n, v) of the gradient in the logits, of a wave (n, C) and a chunk (v, C); `rows` are (n,) each.

    Without descriptors, also the columns from v on to the end of the last tile, which the buffer has.
    """
    grid, length, factors, options = product(hidden, weight)
    out = dlogits
    if options["DESCRIPTORS"]:
        out = TensorDescriptor.from_tensor(dlogits, [options["BLOCK_N"], options["BLOCK_V"]])
    dlogits_kernel[grid](*factors, *rows, out, dlogits.stride(0), 1 / temperature, first_column, length,
                         **options)


def add_product(total, a, b):
    """total += a @ b where total is float32 and so is the sum inside, whatever the type of a and b."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda and FLOAT32_SUMS:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:  # torch 2.6 and 2.7 can only round the product to 16 bits: pay for float32 factors instead
        total.addmm_(a.float(), b.float())


def gradients(hidden, weight, rows, temperature):
    """dhidden (N, C) and dweight (V, C), in the inputs' type. `rows`: dlogits_kernel's (N,) arguments, in its order."""
    (N, C), V = hidden.shape, len(weight)
    n, v = buffer_shape(N, V, tiling(hidden.dtype, gpu(hidden.device)[0])["BLOCK_V"])
    buffer = hidden.new_empty(n, v)
    dhidden = hidden.new_zeros(N, C, dtype=torch.float32)
    dweight = torch.empty_like(weight)
    for first in range(0, V, v):
        chunk = weight[first:first + v]  # (v, C)
        dchunk = torch.zeros_like(chunk, dtype=torch.float32)
        for wave in (slice(i, i + n) for i in range(0, N, n)):
            dlogits = buffer[:len(hidden[wave]), :len(chunk)]
            write_dlogits(dlogits, hidden[wave], chunk, [x[wave] for x in rows], temperature, first)
            add_product(dhidden[wave], dlogits, chunk)
            add_product(dchunk, dlogits.T, hidden[wave])
        dweight[first:first + v] = dchunk
    return dhidden.to(hidden.dtype), dweight


class LinearTokenLogprobs(torch.autograd.Function):
    """hidden (N, C), weight (V, C), both contiguous, targets (N,) -> logprobs, entropy (N,)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        with torch.cuda.device_of(hidden):
            logprobs, entropy, top, mass = statistics(hidden, weight, targets, temperature)
        ctx.save_for_backward(hidden, weight, targets, logprobs, entropy, top, mass)
        ctx.temperature = temperature
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, *rows = ctx.saved_tensors
        with torch.cuda.device_of(hidden):
            rows += [grad_logprobs.contiguous(), grad_entropy.contiguous()]
            return *gradients(hidden, weight, rows, ctx.temperature), None, None


def check(hidden, weight, targets):
    """Raise a ValueError unless hidden (..., C), weight (V, C) and targets (...) fit each other and the kernels."""
    if weight.dim() != 2 or hidden.shape[-1:] != weight.shape[1:] or hidden.shape[:-1] != targets.shape:
        raise ValueError(f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets "
                         f"{tuple(targets.shape)} do not fit: want (..., C), (V, C) and (...)")
    if 0 in weight.shape:
        raise ValueError(f"weight {tuple(weight.shape)} is empty: want at least one token and one column")
    if hidden.dtype != weight.dtype or hidden.dtype not in DTYPES:
        raise ValueError(f"hidden is {hidden.dtype}, weight {weight.dtype}: want both float32, bfloat16 or float16")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype}: want int64")
    if not hidden.device == weight.device == targets.device:
        raise ValueError(f"hidden is on {hidden.device}, weight on {weight.device}, targets on {targets.device}: "
                         "move them together")
    check_device(hidden)


def linear_token_logprobs(hidden, weight, targets, temperature=1.0):
    """token_logprobs(hidden @ weight.T, targets, temperature) of nanorlhf/logprobs.py, never holding the (N, V) logits.

    Under autocast the two factors are cast to its type first, as those of hidden @ weight.T would be.

    Args:
        hidden: (..., C), float32, bfloat16 or float16; gradient flows, from both results.
        weight: (V, C), of the same type; gradient flows. GPT-2's tied head: no bias.
        targets: (...), int64 in [0, V); a target outside gives NaN.
        temperature: T > 0.
    Returns: logprobs (...), entropy (...), float32, in nats; gradients are summed in float32 and have the inputs' type.
    Raises: ValueError if shapes, types or devices do not fit, or without a GPU (unless TRITON_INTERPRET=1).
    """
    check_temperature(temperature)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden, weight = (x.to(torch.get_autocast_dtype(device)) for x in (hidden, weight))
    check(hidden, weight, targets)
    if targets.numel() == 0:  # nothing to launch; the product keeps the graph, with gradients of zero
        nothing = (hidden.sum(-1) + weight.sum()).float() * 0
        return nothing, nothing.clone()
    flat = hidden.reshape(-1, hidden.shape[-1]).contiguous()  # (N, C)
    targets_flat = targets.reshape(-1).contiguous()  # reshape alone keeps the stride of a slice of one dimension
    logprobs, entropy = LinearTokenLogprobs.apply(flat, weight.contiguous(), targets_flat, temperature)
    return logprobs.view(targets.shape), entropy.view(targets.shape)
