"""Log-probability and entropy of each row of logits, and the gradient of both.

    logprobs = log softmax(x / T)[target]          H = -sum_v p_v log p_v

    dx_v = (g ([v = target] - p_v) - h p_v (log p_v + H)) / T           g, h: upstream gradients of log-prob and entropy

**Traffic.** Forward: each logit is read once, and two floats a row are kept for the backward, the row's maximum and
the log of its sum. Backward: each logit is read once and its gradient written once, with no reduction left to do. A
row whose upstream gradients are both 0, such as padding, is not read: its gradient is 0 whatever it holds, NaN
included.

**Tiling.** One program a row, the softmax as in `rows.py`. A tile is four loads of 16 bytes a thread, none of which
waits for another: 8 warps keep 16 KB in flight, and the few registers they need leave room for several programs on a
multiprocessor, which fill the memory's pipeline together.
"""
import torch
import triton
import triton.language as tl

from kernels.rows import (LN2, LOG2E, as_rows, check, check_temperature, cut, edges, finish, flat, gradient_at_target,
                          gradient_of, like_rows, row_at, start, strides, tile_at, tiling, update)


@triton.jit
def forward_kernel(X, TARGETS, WEIGHTS, LOGPROBS, ENTROPY, TOP, LOG_MASS, count, outer, inner, width, temperature_inv,
                   WEIGHTED: tl.constexpr, GROUPS: tl.constexpr, UNIT: tl.constexpr):
    """One row: its log-prob and entropy, and `top` and `log_mass` for the backward. WEIGHTS of 0: 0 and 0, unread."""
    row = tl.program_id(0)
    live = tl.load(WEIGHTS + row) != 0 if WEIGHTED else True
    width = tl.where(live, width, 0)  # of a masked row nothing is read
    scale = temperature_inv * LOG2E
    x = row_at(X, row, count, outer, inner)
    head, groups = cut(x, width, UNIT)
    column, exists = edges(head, groups, width, UNIT)
    target = tl.load(TARGETS + row).to(tl.int64)
    at_target = tl.load(x + target, mask=(target >= 0) & (target < width), other=float("nan")).to(tl.float32)

    top, mass, tilt = start(tl.load(x + column, mask=exists, other=-float("inf")).to(tl.float32), scale, GROUPS)
    for tile in range(tl.cdiv(groups, GROUPS)):
        at, group = tile_at(x, head, tile, GROUPS, UNIT)
        logits = tl.load(at, mask=group < groups, other=-float("inf")).to(tl.float32)
        top, mass, tilt = update(logits, top, mass, tilt, scale)
    top, log_mass, entropy = finish(top, mass, tilt, scale)

    # Not from z: one rounding where a product with log2(e) and one with ln 2 would be three.
    logprob = (at_target - top) * temperature_inv - log_mass * LN2
    tl.store(LOGPROBS + row, tl.where(live, logprob, 0.0))
    tl.store(ENTROPY + row, tl.where(live, entropy, 0.0))
    tl.store(TOP + row, top)
    tl.store(LOG_MASS + row, log_mass)


@triton.jit
def backward_kernel(X, GRADIENT, TARGETS, G, H, LOGPROBS, ENTROPY, TOP, LOG_MASS,
                    count, outer, inner, out_outer, out_inner, width, temperature_inv,
                    SLOPED: tl.constexpr, GROUPS: tl.constexpr, UNIT: tl.constexpr):
    """One row's gradient, from what the forward kept and the upstream gradients G and H; SLOPED: there is an H."""
    row = tl.program_id(0)
    g = tl.load(G + row).to(tl.float32) * temperature_inv
    h = tl.load(H + row).to(tl.float32) * temperature_inv if SLOPED else 0.0
    live = (g != 0) | (h != 0)
    scale = temperature_inv * LOG2E
    logprob, entropy = tl.load(LOGPROBS + row), tl.load(ENTROPY + row)
    # A row without upstream gradient is not read: with x = -inf and coefficients 0 the same lines write exact zeros.
    top, log_mass = tl.where(live, tl.load(TOP + row), 0.0), tl.where(live, tl.load(LOG_MASS + row), 0.0)
    level, slope = tl.where(live, -g - h * entropy, 0.0), -h * LN2

    x, out = row_at(X, row, count, outer, inner), row_at(GRADIENT, row, count, out_outer, out_inner)
    head, groups = cut(x, width, UNIT)
    wanted = tl.where(live, groups, 0)
    for tile in range(tl.cdiv(groups, GROUPS)):
        at, group = tile_at(x, head, tile, GROUPS, UNIT)
        logits = tl.load(at, mask=group < wanted, other=-float("inf")).to(tl.float32)
        gradient = gradient_of(logits, top, log_mass, scale, level, slope, SLOPED)
        at, group = tile_at(out, head, tile, GROUPS, UNIT)
        tl.store(at, gradient.to(GRADIENT.dtype.element_ty), mask=group < groups)
    column, exists = edges(head, groups, width, UNIT)
    shown = exists & (column < tl.where(live, width, 0))
    logits = tl.load(x + column, mask=shown, other=-float("inf")).to(tl.float32)
    gradient = gradient_of(logits, top, log_mass, scale, level, slope, SLOPED)
    tl.store(out + column, gradient.to(GRADIENT.dtype.element_ty), mask=exists)

    target = tl.load(TARGETS + row).to(tl.int64)
    gradient = gradient_at_target(logprob, entropy, g, h)
    tl.debug_barrier()  # another thread has just written the target's column: this write comes after
    tl.store(out + target, gradient.to(GRADIENT.dtype.element_ty), mask=live & (target >= 0) & (target < width))


def forward(rows, targets, temperature, weights=None):
    """Launch on rows (B, R, V), targets (N,): log-prob, entropy, top, log mass (4, N); 0, 0 where a weight is 0."""
    kept = torch.empty((4, targets.numel()), dtype=torch.float32, device=rows.device)
    with torch.cuda.device_of(rows):
        forward_kernel[(targets.numel(),)](
            rows, targets, targets if weights is None else weights, *kept, *strides(rows), rows.shape[2],
            1 / temperature, weights is not None, **tiling(rows.shape[2], rows.dtype))
    return kept


def backward(rows, targets, kept, temperature, g, h=None):
    """Launch on what `forward` took and gave, and g, h (N,), the gradients of its results: that of rows (B, R, V)."""
    gradient = like_rows(rows)
    with torch.cuda.device_of(rows):
        backward_kernel[(targets.numel(),)](
            rows, gradient, targets, g, g if h is None else h, *kept, *strides(rows), *strides(gradient)[1:],
            rows.shape[2], 1 / temperature, h is not None, **tiling(rows.shape[2], rows.dtype))
    return gradient


class TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, temperature):
        kept = forward(as_rows(logits), flat(targets), temperature)
        ctx.save_for_backward(logits, targets, kept)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # None for a result that the loss does not use
        return kept[0].reshape(targets.shape).clone(), kept[1].reshape(targets.shape).clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, h):
        logits, targets, kept = ctx.saved_tensors
        if g is None and h is None:
            return None, None, None
        g = torch.zeros_like(h) if g is None else g
        gradient = backward(as_rows(logits), flat(targets), kept, ctx.temperature, flat(g),
                            None if h is None else flat(h))
        return gradient.view(logits.shape), None, None


def token_logprobs(logits, targets, temperature=1.0):
    """Log-probability of each target token and entropy of each row: the twin of nanorlhf.logprobs.token_logprobs.

    Args:
        logits: (..., V), float32, bfloat16 or float16, rows any stride apart; gradient flows from both results.
        targets: (...), integers in [0, V). One outside gives NaN: a kernel cannot raise an error.
        temperature: T > 0.
    Returns: logprobs (...), entropy (...), float32, in nats.
    """
    check(logits, targets=targets)
    check_temperature(temperature)
    return TokenLogprobs.apply(logits, targets, temperature)
