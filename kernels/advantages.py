"""Generalised advantage estimation as one parallel scan, and the sums that whitening needs from the same launch.

    delta_t = r_t + gamma V_{t+1} - V_t          A_t = delta_t + gamma lam A_{t+1}

Step t takes the pair (A, V) of the step after it to its own by an affine map,

    [A_t]   [r_t - V_t]   [gamma lam   gamma] [A_{t+1}]
    [V_t] = [   V_t   ] + [    0         0  ] [V_{t+1}]

and a padded step is the identity. Affine maps compose to affine maps, and composition is associative, so a row of R
steps takes log2 R rounds of a scan from its end rather than R launches. Below the diagonal there is always 0: a map is
five numbers.

**Traffic.** Rewards, values and mask are read once, advantages and returns written once. A row longer than BLOCK is
taken in blocks from its end; the pair at the block's start is carried over.
"""
import torch
import triton
import triton.language as tl

from kernels.rows import check_device

BLOCK = 1024  # steps that one scan takes


@triton.jit
def compose(a1, b1, c1, v1, e1, a2, b2, c2, v2, e2):
    """Map 2 after map 1, where a map is A -> a + b A + c V, V -> v + e V."""
    return a2 + b2 * a1 + c2 * v1, b2 * b1, b2 * c1 + c2 * e1, v2 + e2 * v1, e2 * e1


@triton.jit
def gae_kernel(REWARDS, VALUES, MASK, LAST_VALUES, ADVANTAGES, RETURNS, COUNT, MEAN, SQUARES, length, gamma, lam,
               BOOTSTRAP: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """One sequence, last block first: advantages, returns, and the sums over its mask that whitening needs."""
    row = tl.program_id(0).to(tl.int64)
    advantage_after, value_after = tl.zeros((), PRECISION), tl.zeros((), PRECISION)
    if BOOTSTRAP:
        value_after += tl.load(LAST_VALUES + row).to(PRECISION)
    count, mean, squares = tl.zeros((), PRECISION), tl.zeros((), PRECISION), tl.zeros((), PRECISION)
    step = tl.arange(0, BLOCK)
    blocks = tl.cdiv(length, BLOCK)
    for i in range(blocks):
        t = (blocks - 1 - i) * BLOCK + step
        inside = t < length
        weight = tl.load(MASK + row * length + t, mask=inside, other=0).to(PRECISION)
        live = weight != 0
        value = tl.where(live, tl.load(VALUES + row * length + t, mask=inside, other=0).to(PRECISION), 0.0)
        reward = tl.where(live, tl.load(REWARDS + row * length + t, mask=inside, other=0).to(PRECISION), 0.0)
        zero = tl.zeros((BLOCK,), PRECISION)
        a, b, c, v, e = tl.associative_scan((
            reward - value, tl.where(live, zero + gamma * lam, zero + 1), tl.where(live, zero + gamma, zero),
            value, tl.where(live, zero, zero + 1)), 0, compose, reverse=True)
        advantage = a + b * advantage_after + c * value_after
        first = step == 0
        advantage_after = tl.sum(tl.where(first, advantage, 0.0), 0)
        value_after = tl.sum(tl.where(first, v + e * value_after, 0.0), 0)

        advantage = tl.where(live, advantage, 0.0)
        tl.store(ADVANTAGES + row * length + t, advantage.to(ADVANTAGES.dtype.element_ty), mask=inside)
        tl.store(RETURNS + row * length + t, (advantage + value).to(RETURNS.dtype.element_ty), mask=inside)

        # Count, mean and squared deviations of the row so far, merged with the block's (Chan, Golub & LeVeque 1979).
        block_count = tl.sum(weight, 0)
        block_mean = tl.sum(weight * advantage, 0) / tl.where(block_count == 0, 1.0, block_count)
        off = tl.where(live, advantage - block_mean, 0.0)
        total = count + block_count
        share = block_count / tl.where(total == 0, 1.0, total)
        squares += tl.sum(weight * off * off, 0) + (block_mean - mean) * (block_mean - mean) * count * share
        mean += (block_mean - mean) * share
        count = total
    tl.store(COUNT + row, count)
    tl.store(MEAN + row, mean)
    tl.store(SQUARES + row, squares)


@torch.no_grad()
def gae_moments(rewards, values, response_mask, gamma=1.0, lam=0.95, last_values=None):
    """`gae`, and the (count, mean, biased variance) of the advantages over the mask: scalars, from the same launch."""
    if not rewards.shape == values.shape == response_mask.shape or values.dim() != 2:
        raise ValueError(f"rewards {tuple(rewards.shape)}, values {tuple(values.shape)} and response_mask "
                         f"{tuple(response_mask.shape)} must have one shape, (B, R)")
    if last_values is not None and last_values.shape != values.shape[:1]:
        raise ValueError(f"last_values {tuple(last_values.shape)} do not fit values {tuple(values.shape)}: want (B,)")
    check_device(values)
    batch, length = values.shape
    dtype = torch.promote_types(rewards.dtype, values.dtype)
    precision = torch.promote_types(dtype, torch.float32)
    mask = response_mask.to(torch.uint8) if response_mask.dtype == torch.bool else response_mask
    advantages, returns = torch.empty((2, batch, length), dtype=values.dtype, device=values.device)
    moments = torch.empty((3, batch), dtype=precision, device=values.device)
    block = min(BLOCK, triton.next_power_of_2(max(length, 1)))
    with torch.cuda.device_of(values):
        gae_kernel[(batch,)](
            rewards.contiguous(), values.contiguous(), mask.contiguous(),
            moments if last_values is None else last_values.contiguous(), advantages, returns, *moments, length,
            float(gamma), float(lam), last_values is not None, block,
            tl.float64 if precision == torch.float64 else tl.float32, num_warps=max(1, min(4, block // 128)))
    counts, means, squares = moments
    count = counts.sum()
    divisor = torch.where(count == 0, 1, count)
    mean = (counts * means).sum() / divisor
    return advantages, returns, (count, mean, (squares + counts * (means - mean) ** 2).sum() / divisor)


def gae(rewards, values, response_mask, gamma=1.0, lam=0.95, last_values=None):
    """Advantages and returns (B, R): the twin of nanorlhf.advantages.gae. Nothing here carries gradient.

    Args:
        rewards, values, response_mask: (B, R); the mask bool or float.
        last_values: (B,) value of the state after the last token; None means 0.
    Returns: advantages (B, R), returns (B, R), in the values' precision; 0 where the mask is 0.
    """
    return gae_moments(rewards, values, response_mask, gamma, lam, last_values)[:2]


@torch.no_grad()
def gae_whitened(rewards, values, response_mask, gamma=1.0, lam=0.95, last_values=None, eps=1e-8):
    """`gae` with whitened advantages, (A - mean) / sqrt(var + eps), which are not read again for their sums."""
    advantages, returns, (_, mean, variance) = gae_moments(rewards, values, response_mask, gamma, lam, last_values)
    whitened = (advantages - mean) * torch.rsqrt(variance + eps)
    return torch.where(response_mask != 0, whitened, 0).to(values.dtype), returns
