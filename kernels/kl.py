"""KL divergence between whole distributions, KL(p || q) = sum_v p_v (log p_v - log q_v), and its gradient.

    p, q = softmax of x / T, y / T          dKL/dx_v = p_v (log p_v - log q_v - KL) / T          dKL/dy_v = (q_v - p_v) / T

**Traffic.** Forward: each logit of both is read once; five floats a row are kept. Backward: each is read once more and
each gradient that is wanted is written once, with no reduction left to do.

**One pass.** Both rows keep a running maximum and sum as in `rows.py`; beside them runs `gap` = sum 2^z (z - u), z and
u the two scaled logits below their own maxima. When the maxima move, every z - u moves by the same amount, and gap by
that times the sum. Differences come before products: two expectations would cancel where the two are alike. Then
KL = ln 2 (gap / mass - log2(mass / ref_mass)).

**Tiling.** As in `logprobs.py`, with half as many logits a thread of each row, since there are two.
"""
import torch
import triton
import triton.language as tl

from kernels.rows import (FLOOR, LN2, LOG2E, LOWEST, as_rows, check, check_temperature, cut, edges, flat, like_rows,
                          phase, row_at, strides, tile_at, tiling)


@triton.jit
def weighted(p, difference):
    """p * difference, 0 where p is: a token that the policy forbids outweighs an infinite difference."""
    return tl.where(p == 0, 0.0, p * difference)


@triton.jit
def moved(mass, gap, top, new_top, ref_mass, ref_top, new_ref_top, scale):
    """(mass, gap, ref_mass) after the two maxima have moved."""
    drop, ref_drop = (top - new_top) * scale, (ref_top - new_ref_top) * scale
    mass = tl.exp2(tl.maximum(drop, FLOOR)) * mass
    gap = tl.where(mass == 0, 0.0, tl.exp2(tl.maximum(drop, FLOOR)) * gap + mass * (drop - ref_drop))
    return mass, gap, tl.exp2(tl.maximum(ref_drop, FLOOR)) * ref_mass


@triton.jit
def update_pair(x, y, top, mass, gap, ref_top, ref_mass, scale):
    """The five sums after a tile of logits x, y (GROUPS, UNIT): as `rows.update`, for two rows at once."""
    new_top, new_ref_top = tl.maximum(top, tl.max(x, 1)), tl.maximum(ref_top, tl.max(y, 1))
    mass, gap, ref_mass = moved(mass, gap, top, new_top, ref_mass, ref_top, new_ref_top, scale)
    z, u = (x - new_top[:, None]) * scale, (y - new_ref_top[:, None]) * scale
    p = tl.exp2(z)
    gap += tl.sum(weighted(p, z - u), 1)
    return new_top, mass + tl.sum(p, 1), gap, new_ref_top, ref_mass + tl.sum(tl.exp2(u), 1)


@triton.jit
def meet(top, mass, gap, ref_top, ref_mass, scale):
    """The five sums of all threads, scalars."""
    peak, ref_peak = tl.max(top, 0), tl.max(ref_top, 0)
    mass, gap, ref_mass = moved(mass, gap, top, peak, ref_mass, ref_top, ref_peak, scale)
    return peak, tl.sum(mass, 0), tl.sum(gap, 0), ref_peak, tl.sum(ref_mass, 0)


@triton.jit
def kl_forward_kernel(X, Y, KL, TOP, LOG_MASS, REF_TOP, REF_LOG_MASS,
                      count, x_outer, x_inner, y_outer, y_inner, width, scale,
                      GROUPS: tl.constexpr, UNIT: tl.constexpr):
    """One row pair's KL in nats, and what the backward needs: maximum and log of the sum of either row."""
    row = tl.program_id(0)
    x, y = row_at(X, row, count, x_outer, x_inner), row_at(Y, row, count, y_outer, y_inner)
    head, groups = cut(x, width, UNIT)  # the host laid y out like x: one cut serves both

    # The edges first, a column a thread; their sums become the first group's, and the other groups start empty.
    column, exists = edges(head, groups, width, UNIT)
    x_edge = tl.load(x + column, mask=exists, other=-float("inf")).to(tl.float32)
    y_edge = tl.load(y + column, mask=exists, other=-float("inf")).to(tl.float32)
    nothing = tl.zeros((2 * UNIT,), tl.float32)
    top, mass, gap, ref_top, ref_mass = update_pair(
        x_edge[:, None], y_edge[:, None], nothing + LOWEST, nothing, nothing, nothing + LOWEST, nothing, scale)
    top, mass, gap, ref_top, ref_mass = meet(top, mass, gap, ref_top, ref_mass, scale)
    first = tl.arange(0, GROUPS) == 0
    top, ref_top = tl.where(first, top, LOWEST), tl.where(first, ref_top, LOWEST)
    mass, gap, ref_mass = tl.where(first, mass, 0.0), tl.where(first, gap, 0.0), tl.where(first, ref_mass, 0.0)

    for tile in range(tl.cdiv(groups, GROUPS)):
        x_at, group = tile_at(x, head, tile, GROUPS, UNIT)
        y_at, group = tile_at(y, head, tile, GROUPS, UNIT)
        logits = tl.load(x_at, mask=group < groups, other=-float("inf")).to(tl.float32)
        ref_logits = tl.load(y_at, mask=group < groups, other=-float("inf")).to(tl.float32)
        top, mass, gap, ref_top, ref_mass = update_pair(logits, ref_logits, top, mass, gap, ref_top, ref_mass, scale)
    top, mass, gap, ref_top, ref_mass = meet(top, mass, gap, ref_top, ref_mass, scale)

    tl.store(KL + row, (gap / mass - tl.log2(mass / ref_mass)) * LN2)
    tl.store(TOP + row, top)
    tl.store(LOG_MASS + row, tl.log2(mass))
    tl.store(REF_TOP + row, ref_top)
    tl.store(REF_LOG_MASS + row, tl.log2(ref_mass))


@triton.jit
def kl_gradients(x, y, top, log_mass, ref_top, ref_log_mass, kl, g, scale):
    """(dKL/dx, dKL/dy), times g, of any columns."""
    z, u = (x - top) * scale - log_mass, (y - ref_top) * scale - ref_log_mass
    p = tl.exp2(z)
    return g * weighted(p, (z - u) * LN2 - kl), g * (tl.exp2(u) - p)


@triton.jit
def kl_backward_kernel(X, Y, DX, DY, G, KL, TOP, LOG_MASS, REF_TOP, REF_LOG_MASS,
                       count, x_outer, x_inner, y_outer, y_inner, d_outer, d_inner, width, temperature_inv,
                       WITH_DX: tl.constexpr, WITH_DY: tl.constexpr, GROUPS: tl.constexpr, UNIT: tl.constexpr):
    """One row pair's gradients into the policy's logits (DX) and the reference's (DY), for the upstream gradient G."""
    row = tl.program_id(0)
    g, kl = tl.load(G + row).to(tl.float32) * temperature_inv, tl.load(KL + row)
    live = g != 0
    scale = temperature_inv * LOG2E
    # A row without upstream gradient is not read: with -inf everywhere, p = q = 0, and so are the gradients.
    kl = tl.where(live, kl, 0.0)
    top, ref_top = tl.where(live, tl.load(TOP + row), 0.0), tl.where(live, tl.load(REF_TOP + row), 0.0)
    log_mass = tl.where(live, tl.load(LOG_MASS + row), 0.0)
    ref_log_mass = tl.where(live, tl.load(REF_LOG_MASS + row), 0.0)
    x, y = row_at(X, row, count, x_outer, x_inner), row_at(Y, row, count, y_outer, y_inner)
    dx, dy = row_at(DX, row, count, d_outer, d_inner), row_at(DY, row, count, d_outer, d_inner)
    head, groups = cut(x, width, UNIT)
    wanted = tl.where(live, groups, 0)
    for tile in range(tl.cdiv(groups, GROUPS)):
        x_at, group = tile_at(x, head, tile, GROUPS, UNIT)
        y_at, group = tile_at(y, head, tile, GROUPS, UNIT)
        logits = tl.load(x_at, mask=group < wanted, other=-float("inf")).to(tl.float32)
        ref_logits = tl.load(y_at, mask=group < wanted, other=-float("inf")).to(tl.float32)
        gx, gy = kl_gradients(logits, ref_logits, top, log_mass, ref_top, ref_log_mass, kl, g, scale)
        if WITH_DX:
            at, group = tile_at(dx, head, tile, GROUPS, UNIT)
            tl.store(at, gx.to(DX.dtype.element_ty), mask=group < groups)
        if WITH_DY:
            at, group = tile_at(dy, head, tile, GROUPS, UNIT)
            tl.store(at, gy.to(DY.dtype.element_ty), mask=group < groups)
    column, exists = edges(head, groups, width, UNIT)
    shown = exists & (column < tl.where(live, width, 0))
    logits = tl.load(x + column, mask=shown, other=-float("inf")).to(tl.float32)
    ref_logits = tl.load(y + column, mask=shown, other=-float("inf")).to(tl.float32)
    gx, gy = kl_gradients(logits, ref_logits, top, log_mass, ref_top, ref_log_mass, kl, g, scale)
    if WITH_DX:
        tl.store(dx + column, gx.to(DX.dtype.element_ty), mask=exists)
    if WITH_DY:
        tl.store(dy + column, gy.to(DY.dtype.element_ty), mask=exists)


class ExactKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ref_logits, temperature):
        """KL (...) float32 from two logits (..., V); keeps five numbers a row for the gradient."""
        rows, ref_rows = as_rows(logits), as_rows(ref_logits)
        if phase(rows) != phase(ref_rows):  # slices of two tensors may start at different places within 16 bytes
            ref_rows = like_rows(rows).copy_(ref_rows)
        n = rows.shape[0] * rows.shape[1]
        kept = torch.empty((5, n), dtype=torch.float32, device=logits.device)
        with torch.cuda.device_of(logits):
            kl_forward_kernel[(n,)](
                rows, ref_rows, *kept, *strides(rows), *strides(ref_rows)[1:], rows.shape[2],
                LOG2E.value / temperature, **tiling(rows.shape[2], rows.dtype, elements=16))
        ctx.save_for_backward(rows, ref_rows, kept)
        ctx.temperature, ctx.shape = temperature, logits.shape
        return kept[0].reshape(logits.shape[:-1]).clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        """The gradient of either logits, (..., V), each only where it is wanted. g: (...)."""
        rows, ref_rows, kept = ctx.saved_tensors
        dx, dy = (like_rows(rows) if wanted else None for wanted in ctx.needs_input_grad[:2])
        one = dy if dx is None else dx  # a pointer for the kernel's other argument, which it then leaves alone
        with torch.cuda.device_of(rows):
            kl_backward_kernel[(g.numel(),)](
                rows, ref_rows, one if dx is None else dx, one if dy is None else dy, flat(g), *kept, *strides(rows),
                *strides(ref_rows)[1:], *strides(one)[1:], rows.shape[2], 1 / ctx.temperature, dx is not None,
                dy is not None, **tiling(rows.shape[2], rows.dtype, elements=16))
        return *(None if d is None else d.view(ctx.shape) for d in (dx, dy)), None


def exact_kl(logits, ref_logits, temperature=1.0):
    """KL(policy || reference) of each row: the twin of nanorlhf.logprobs.exact_kl.

    Args:
        logits, ref_logits: (..., V), float32, bfloat16 or float16 (two precisions are brought to the wider); gradient
            flows through both.
        temperature: T > 0.
    Returns: (...), float32, in nats; infinite where the reference forbids a token that the policy allows.
    """
    if logits.shape != ref_logits.shape or logits.device != ref_logits.device:
        raise ValueError(f"logits {tuple(logits.shape)} on {logits.device} do not fit ref_logits "
                         f"{tuple(ref_logits.shape)} on {ref_logits.device}: want one shape, one device")
    check_temperature(temperature)
    dtype = torch.promote_types(logits.dtype, ref_logits.dtype)
    logits, ref_logits = logits.to(dtype), ref_logits.to(dtype)
    check(logits)
    return ExactKL.apply(logits, ref_logits, temperature)
