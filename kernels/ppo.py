"""PPO's loss and its gradient into the logits in one launch.

With new = log softmax(x / T)[target], ratio = exp(new - old) and H the entropy, the loss is the mean over the mask of

    max(-A ratio, -A clip(ratio, 1 - c, 1 + c)) + kl_coef KL(new, ref) - entropy_coef H

Nothing in it couples two rows but the number of tokens, which is known beforehand. So as soon as a row's log-prob is
known, so is its share of the loss, and so are the two numbers that make its gradient, g = dloss/dnew and
b = entropy_coef / tokens:

    dloss/dx_v = (g ([v = target] - p_v) + b p_v (log p_v + H)) / T

**Traffic.** The least is one read and one write of each logit. A row of 50257 16-bit logits, 100 KB, fits into the
256 KB of registers of one multiprocessor: one program a row reads it once, reduces it, and writes the gradient from
the registers. Longer rows, and float32 ones, are read a second time, last tile first, while their end is in the cache.

**Tiling.** 8 warps, because a thread may have 255 registers in 8 warps but only 128 in 16: of 25 tiles a thread holds
4 registers each, 8 logits, and the rest computes. A power-of-two tile for the whole row would be 65536 wide and spill.

**Masked rows** are neither read nor computed with: their gradient is 0 whatever they hold, NaN included.

**The target's column** is written last, from float32, with 1 - p = -expm1(new): as 1 minus a rounded p it would be 0
for every confident token.
"""
import torch
import triton
import triton.language as tl

from kernels.rows import (LN2, LOG2E, as_rows, check, check_temperature, cut, edges, expm1, finish, flat,
                          gradient_at_target, gradient_of, like_rows, row_at, scaled, start, strides, tile_at, tiling,
                          update)

ESTIMATORS = ("k1", "k2", "k3", "abs")
STATISTICS = ("policy_loss", "clipfrac", "approx_kl", "ratio", "entropy", "kl")
RESIDENT = 26 * 8 * 32 * 8  # the widest row that 8 warps hold: 26 tiles of 8 logits a thread, 104 of its 255 registers


@triton.jit
def surrogate(new, old, advantage, low, high, dual, DUAL: tl.constexpr):
    """(loss, dloss/dnew, clipped, log_ratio, ratio) of one token."""
    raw = new - old
    log_ratio = tl.minimum(tl.maximum(raw, -20.0), 20.0)
    ratio = tl.exp(log_ratio)
    unclipped = -advantage * ratio
    clipped = -advantage * tl.minimum(tl.maximum(ratio, low), high)
    loss = tl.maximum(unclipped, clipped)
    level = (clipped > unclipped) | (tl.abs(raw) > 20)  # where the loss does not move with new
    if DUAL:
        bound = -advantage * dual
        level = level | ((advantage < 0) & (loss > bound))
        loss = tl.where(advantage < 0, tl.minimum(loss, bound), loss)
    return loss, tl.where(level, 0.0, unclipped), clipped > unclipped, log_ratio, ratio  # d(-A ratio)/dnew = -A ratio


@triton.jit
def kl_term(d, KL: tl.constexpr):
    """(estimate, its derivative) at d = new - ref."""
    if KL == "k1":
        value, slope = d, d * 0 + 1
    elif KL == "k2":
        value, slope = 0.5 * d * d, d
    elif KL == "k3":
        value, slope = expm1(-d) + d, -expm1(-d)
    else:
        value, slope = tl.abs(d), tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
    return value, slope


@triton.jit
def ppo_kernel(X, GRADIENT, TARGETS, OLD, REF, ADVANTAGES, WEIGHTS, FACTOR, PER_TOKEN,
               tokens, count, outer, inner, out_outer, out_inner, width,
               temperature_inv, low, high, dual, kl_coef, entropy_coef,
               KL: tl.constexpr, DUAL: tl.constexpr, BONUS: tl.constexpr, WITH_GRADIENT: tl.constexpr,
               RESIDENT: tl.constexpr, TILES: tl.constexpr, GROUPS: tl.constexpr, UNIT: tl.constexpr):
    """One row: 1 read it, 2 its token's loss, statistics (PER_TOKEN) and slope, 3 write the logits' gradient."""
    row = tl.program_id(0)
    weight = tl.load(WEIGHTS + row)
    live = weight != 0
    scale = temperature_inv * LOG2E
    x = row_at(X, row, count, outer, inner)
    head, groups = cut(x, width, UNIT)
    column, exists = edges(head, groups, width, UNIT)

    # 1. Read the row; of a masked one, nothing.
    wanted, shown = tl.where(live, groups, 0), exists & (column < tl.where(live, width, 0))
    target = tl.load(TARGETS + row).to(tl.int64)
    valid = live & (target >= 0) & (target < width)
    at_target = tl.load(x + target, mask=valid, other=float("nan")).to(tl.float32)
    edge = tl.load(x + column, mask=shown, other=-float("inf")).to(tl.float32)
    top, mass, tilt = start(edge, scale, GROUPS)
    if RESIDENT:
        tiles = ()
        for t in tl.static_range(TILES):
            at, group = tile_at(x, head, t, GROUPS, UNIT)
            tiles = tiles + (tl.load(at, mask=group < wanted, other=-float("inf")),)
        for t in tl.static_range(TILES):
            top, mass, tilt = update(tiles[t].to(tl.float32), top, mass, tilt, scale)
    else:
        for t in range(tl.cdiv(groups, GROUPS)):
            at, group = tile_at(x, head, t, GROUPS, UNIT)
            logits = tl.load(at, mask=group < wanted, other=-float("inf")).to(tl.float32)
            top, mass, tilt = update(logits, top, mass, tilt, scale)
    top, log_mass, entropy = finish(top, mass, tilt, scale)

    # 2. The token's loss and statistics, and its slope dloss/dnew.
    new = (at_target - top) * temperature_inv - log_mass * LN2
    old, advantage = tl.load(OLD + row).to(tl.float32), tl.load(ADVANTAGES + row).to(tl.float32)
    loss, slope, clipped, log_ratio, ratio = surrogate(new, old, advantage, low, high, dual, DUAL)
    total = loss - entropy_coef * entropy
    if KL != "none":
        kl, kl_slope = kl_term(new - tl.load(REF + row).to(tl.float32), KL)
        total += tl.where(kl_coef == 0, 0.0, kl_coef * kl)
        slope += tl.where(kl_coef == 0, 0.0, kl_coef * kl_slope)
        tl.store(PER_TOKEN + 6 * tokens + row, tl.where(live, weight * kl, 0.0))
    tl.store(PER_TOKEN + row, tl.where(live, weight * total, 0.0))
    tl.store(PER_TOKEN + tokens + row, tl.where(live, weight * loss, 0.0))
    tl.store(PER_TOKEN + 2 * tokens + row, tl.where(live & clipped, weight, 0.0))
    tl.store(PER_TOKEN + 3 * tokens + row, tl.where(live, weight * (expm1(log_ratio) - log_ratio), 0.0))
    tl.store(PER_TOKEN + 4 * tokens + row, tl.where(live, weight * ratio, 0.0))
    tl.store(PER_TOKEN + 5 * tokens + row, tl.where(live, weight * entropy, 0.0))

    # 3. Write the gradient. A masked row has x = -inf and coefficients 0: the same lines write exact zeros.
    if WITH_GRADIENT:
        factor = weight * temperature_inv * tl.load(FACTOR)
        g, bonus = slope * factor, tl.where(live, entropy_coef * factor, 0.0)
        level = tl.where(live, bonus * entropy - g, 0.0)
        top, log_mass = tl.where(live, top, 0.0), tl.where(live, log_mass, 0.0)
        out = row_at(GRADIENT, row, count, out_outer, out_inner)
        if RESIDENT:
            for t in tl.static_range(TILES):
                at, group = tile_at(out, head, t, GROUPS, UNIT)
                gradient = gradient_of(tiles[t].to(tl.float32), top, log_mass, scale, level, bonus * LN2, BONUS)
                tl.store(at, gradient.to(GRADIENT.dtype.element_ty), mask=group < groups)
        else:
            last = tl.cdiv(groups, GROUPS) - 1
            for t in range(last + 1):  # backwards: what was read last is still in the cache
                at, group = tile_at(x, head, last - t, GROUPS, UNIT)
                logits = tl.load(at, mask=group < wanted, other=-float("inf")).to(tl.float32)
                gradient = gradient_of(logits, top, log_mass, scale, level, bonus * LN2, BONUS)
                at, group = tile_at(out, head, last - t, GROUPS, UNIT)
                tl.store(at, gradient.to(GRADIENT.dtype.element_ty), mask=group < groups)
        gradient = gradient_of(edge, top, log_mass, scale, level, bonus * LN2, BONUS)
        tl.store(out + column, gradient.to(GRADIENT.dtype.element_ty), mask=exists)
        gradient = gradient_at_target(new, entropy, g, -bonus)
        tl.debug_barrier()  # another thread has just written the target's column: this write comes after
        tl.store(out + target, gradient.to(GRADIENT.dtype.element_ty), mask=valid)


def shape(width, dtype):
    """How ppo_kernel is launched on rows of this width and precision."""
    resident = dtype.itemsize == 2 and width <= RESIDENT
    form = tiling(width, dtype, elements=8 if resident else 32)
    tiles = triton.cdiv(width // form["UNIT"], form["GROUPS"]) if resident else 0
    return {**form, "RESIDENT": resident, "TILES": tiles}


def launch(logits, gradient, tokens, factor, settings):
    """One launch: float32 (7, N) of each token's weighted loss and statistics; the gradient, if it is given a place.

    tokens: targets, old log-probs, reference log-probs or None, advantages, weights, (N,) each.
    factor: scalar on the device, what the sum of the losses is multiplied by.
    """
    rows = as_rows(logits)  # (B, R, V)
    out = rows if gradient is None else as_rows(gradient)
    targets, old, ref, advantages, weights = tokens
    n = weights.numel()
    per_token = torch.empty((6 if ref is None else 7, n), dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        ppo_kernel[(n,)](
            rows, out, targets, old, old if ref is None else ref, advantages, weights, factor, per_token, n,
            *strides(rows), *strides(out)[1:], rows.shape[2], **settings, WITH_GRADIENT=gradient is not None,
            **shape(rows.shape[2], rows.dtype))
    return per_token


def place(logits, inplace):
    """Where the gradient is written: over the logits, or in new memory of the same shape."""
    if not inplace:
        return like_rows(as_rows(logits)).view(logits.shape)
    torch.autograd.graph.increment_version(logits)  # if anyone saved these logits for a backward, it now raises
    return logits.detach()


class FusedPPOLoss(torch.autograd.Function):
    """The gradient is made with the loss, for an upstream gradient of 1; the backward multiplies it by any other.

    In float16, 1/N of a small probability would be rounded to 0 before a loss scale could save it: there the gradient
    is made by a second launch in the backward, which knows the scale.
    """

    @staticmethod
    def forward(ctx, logits, tokens, factor, settings, inplace):
        ctx.rest = tokens, factor, settings, inplace
        ctx.deferred = logits.dtype == torch.float16
        gradient = None if ctx.deferred else place(logits, inplace)
        per_token = launch(logits, gradient, tokens, factor, settings)
        ctx.save_for_backward(logits if ctx.deferred else gradient)
        ctx.mark_non_differentiable(per_token)
        return per_token[0].sum() * factor, per_token

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, _):
        saved, = ctx.saved_tensors
        if not ctx.deferred:
            return scaled(saved, upstream), None, None, None, None
        tokens, factor, settings, inplace = ctx.rest
        gradient = place(saved, inplace)
        launch(saved, gradient, tokens, factor * upstream, settings)
        return gradient, None, None, None, None


def check_settings(logits, temperature, dual_clip, ref_logprobs, kl_coef, kl_estimator, inplace):
    """ValueError for settings that make no loss, before any kernel is started."""
    check_temperature(temperature)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1, not {dual_clip}")
    if kl_estimator not in ESTIMATORS:
        raise ValueError(f"unknown KL estimator {kl_estimator!r}: choose from {', '.join(ESTIMATORS)}")
    if kl_coef and ref_logprobs is None:
        raise ValueError("kl_coef needs ref_logprobs, the reference's log-probs of the targets")
    if inplace and as_rows(logits).data_ptr() != logits.data_ptr():
        raise ValueError("inplace=True needs logits whose rows can be addressed where they are: make them contiguous")


def fused_ppo_loss(logits, targets, logprobs, advantages, mask, temperature=1.0, cliprange=0.2, dual_clip=None,
                   ref_logprobs=None, kl_coef=0.0, kl_estimator="k3", entropy_coef=0.0, inplace=False,
                   denominator=None):
    """PPO's policy loss with KL penalty and entropy bonus, straight from the logits: see the head of this file.

        ppo_policy_loss(new, logprobs, advantages, mask, cliprange, dual_clip)
          + kl_coef * masked_mean(kl_estimate(new, ref_logprobs, kl_estimator), mask)
          - entropy_coef * masked_mean(entropy, mask)

    Args:
        logits: (..., V), float32, bfloat16 or float16, rows any stride apart; the only argument that gradient flows to.
        targets, logprobs, advantages, mask: (...), as in `token_logprobs` and `ppo_policy_loss`; the mask bool, or a
            weight a token.
        ref_logprobs: (...) or None, of the reference; without them there is no KL term.
        inplace: write the gradient over the logits, which saves memory of their size; they must not be needed again.
        denominator: what the loss is divided by, a number or a scalar tensor, instead of the mask's sum. With the
            tokens of the whole optimiser step here, the losses of its micro-batches add up to the step's, and every
            backward costs nothing.
    Returns: loss (scalar), and means over the mask: {"clipfrac", "approx_kl", "ratio"} of `ppo_policy_loss`,
        {"policy_loss", "entropy"}, and "kl" where there is a reference.
    """
    check(logits, targets=targets, logprobs=logprobs, advantages=advantages, mask=mask, ref_logprobs=ref_logprobs)
    check_settings(logits, temperature, dual_clip, ref_logprobs, kl_coef, kl_estimator, inplace)
    tokens = [None if x is None else flat(x.detach()) for x in (targets, logprobs, ref_logprobs, advantages)]
    tokens.append(flat(mask).float())
    count = tokens[-1].sum()
    total = count if denominator is None else torch.as_tensor(denominator, dtype=torch.float32, device=logits.device)
    factor = 1 / torch.where(total == 0, 1, total)
    settings = {"temperature_inv": 1 / temperature, "low": float(1 - cliprange), "high": float(1 + cliprange),
                "dual": float(dual_clip or 0), "kl_coef": float(kl_coef), "entropy_coef": float(entropy_coef),
                "KL": "none" if ref_logprobs is None else kl_estimator, "DUAL": dual_clip is not None,
                "BONUS": entropy_coef != 0}
    if torch.is_grad_enabled() and logits.requires_grad:
        loss, per_token = FusedPPOLoss.apply(logits, tokens, factor, settings, inplace)
    else:
        per_token = launch(logits, None, tokens, factor, settings)
        loss = per_token[0].sum() * factor
    means = (per_token[1:].sum(1) / torch.where(count == 0, 1, count)).tolist()
    return loss, dict(zip(STATISTICS, means))
