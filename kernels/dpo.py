"""The DPO loss straight from the logits of the two responses.

    h = (log pi(chosen) - log pi(rejected)) - (log ref(chosen) - log ref(rejected))          loss = mean of l(h)

with l as in nanorlhf.losses.dpo_loss and log pi of a response the sum of its tokens' log-probs ("ipo": their mean).

**Traffic.** Unlike PPO's, a token's gradient hangs on all tokens of both responses, dloss/dlogprob = +-l'(h) / B. So
two launches read the logits, the first of `logprobs.py` for the log-probs, then, when h is known, the second for the
gradient, which alone writes: 6 bytes a bfloat16 logit. The upstream gradient goes into l'(h) and costs nothing.
Between the two, a launch of one program a pair sums the tokens and computes l and l'. Masked tokens are neither read
nor computed with.
"""
import torch
import triton
import triton.language as tl

from kernels.logprobs import backward, forward
from kernels.rows import as_rows, check, flat

LOSS_TYPES = ("sigmoid", "ipo", "hinge", "robust")
BLOCK = 1024  # tokens of a response that are summed at once
STATISTICS = ("accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logps", "rejected_logps")


@triton.jit
def softplus(x):
    """log(1 + e^x), without overflow, and exact where e^x is small."""
    small = tl.exp(-tl.abs(x))
    one_more = 1 + small  # log1p(s) = log(u) s / (u - 1) with u = 1 + s as rounded (Kahan)
    log1p = tl.where(one_more == 1, small, tl.log(one_more) * small / tl.where(one_more == 1, 1.0, one_more - 1))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def pair_loss(h, beta, e, LOSS: tl.constexpr):
    """(loss, dloss/dh) of a pair."""
    right, d_right = softplus(-beta * h), -beta * tl.sigmoid(-beta * h)  # -log sigmoid(beta h)
    wrong, d_wrong = softplus(beta * h), beta * tl.sigmoid(beta * h)
    wrong = tl.where(e == 0, 0.0, wrong)  # it may be infinite, and 0 * inf is NaN
    if LOSS == "sigmoid":
        loss, slope = (1 - e) * right + e * wrong, (1 - e) * d_right + e * d_wrong
    elif LOSS == "robust":
        loss, slope = ((1 - e) * right - e * wrong) / (1 - 2 * e), ((1 - e) * d_right - e * d_wrong) / (1 - 2 * e)
    elif LOSS == "ipo":
        loss, slope = (h - 0.5 / beta) * (h - 0.5 / beta), 2 * (h - 0.5 / beta)
    else:
        loss, slope = tl.maximum(1 - beta * h, 0.0), tl.where(beta * h < 1, -beta, 0.0)
    return loss, slope


@triton.jit
def response_logp(LOGPROBS, WEIGHTS, row, length, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """(sum of the response's log-probs, or their mean; what one more token's log-prob adds to it)."""
    total, count = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in range(0, length, BLOCK):
        t = first + tl.arange(0, BLOCK)
        weight = tl.load(WEIGHTS + row * length + t, mask=t < length, other=0)
        total += weight * tl.load(LOGPROBS + row * length + t, mask=t < length, other=0)
        count += weight
    unit = 1.0
    if MEAN:
        unit = 1 / tl.maximum(tl.sum(count, 0), 1.0)
    return tl.sum(total, 0) * unit, unit


@triton.jit
def pair_kernel(CHOSEN, REJECTED, CHOSEN_WEIGHTS, REJECTED_WEIGHTS, REF_CHOSEN, REF_REJECTED, OUT, pairs, chosen_length,
                rejected_length, beta, label_smoothing, LOSS: tl.constexpr, BLOCK: tl.constexpr):
    """One pair, from its tokens' log-probs: OUT (7, pairs) is loss, two rewards, two log-probs, two slopes in them."""
    pair = tl.program_id(0)
    chosen, chosen_unit = response_logp(CHOSEN, CHOSEN_WEIGHTS, pair, chosen_length, LOSS == "ipo", BLOCK)
    rejected, rejected_unit = response_logp(REJECTED, REJECTED_WEIGHTS, pair, rejected_length, LOSS == "ipo", BLOCK)
    chosen_ratio = chosen - tl.load(REF_CHOSEN + pair).to(tl.float32)
    rejected_ratio = rejected - tl.load(REF_REJECTED + pair).to(tl.float32)
    loss, slope = pair_loss(chosen_ratio - rejected_ratio, beta, label_smoothing, LOSS)
    tl.store(OUT + pair, loss)
    tl.store(OUT + pairs + pair, beta * chosen_ratio)
    tl.store(OUT + 2 * pairs + pair, beta * rejected_ratio)
    tl.store(OUT + 3 * pairs + pair, chosen)
    tl.store(OUT + 4 * pairs + pair, rejected)
    tl.store(OUT + 5 * pairs + pair, slope * chosen_unit)
    tl.store(OUT + 6 * pairs + pair, -slope * rejected_unit)


class FusedDPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chosen_logits, rejected_logits, sides, ref_logps, beta, loss_type, label_smoothing):
        """The loss and its statistics from logits (B, T, V) of both sides; keeps per row what the gradient needs, O(B T)."""
        logits, kept = (chosen_logits, rejected_logits), []
        for x, (targets, weights) in zip(logits, sides):
            kept.append(forward(as_rows(x), flat(targets), 1.0, flat(weights)))
        pairs = len(chosen_logits)
        out = torch.empty((7, pairs), dtype=torch.float32, device=chosen_logits.device)
        with torch.cuda.device_of(chosen_logits):
            pair_kernel[(pairs,)](
                kept[0][0], kept[1][0], sides[0][1], sides[1][1], *ref_logps, out, pairs, sides[0][1].shape[1],
                sides[1][1].shape[1], float(beta), float(label_smoothing), loss_type, BLOCK=BLOCK)
        ctx.save_for_backward(*logits, *kept, out)
        ctx.sides = sides
        ctx.mark_non_differentiable(out)
        return out[0].mean(), out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, _):
        *logits, kept_chosen, kept_rejected, out = ctx.saved_tensors
        gradients = []
        for x, kept, slope, (targets, weights) in zip(logits, (kept_chosen, kept_rejected), out[5:], ctx.sides):
            g = torch.where(weights != 0, weights * (slope * upstream / len(slope))[:, None], 0)  # (B, T)
            gradients.append(backward(as_rows(x), flat(targets), kept, 1.0, flat(g)).view(x.shape))
        return *gradients, None, None, None, None, None


def check_pairs(chosen_logits, rejected_logits, ref_chosen_logps, ref_rejected_logps):
    if chosen_logits.dim() != 3 or rejected_logits.dim() != 3 or len(chosen_logits) != len(rejected_logits):
        raise ValueError(f"chosen_logits {tuple(chosen_logits.shape)} and rejected_logits "
                         f"{tuple(rejected_logits.shape)} must be (B, T, V) with one B")
    for name, logps in (("ref_chosen_logps", ref_chosen_logps), ("ref_rejected_logps", ref_rejected_logps)):
        if logps.shape != chosen_logits.shape[:1]:
            raise ValueError(f"{name} {tuple(logps.shape)} do not fit {len(chosen_logits)} pairs: want (B,)")


def check_loss(loss_type, label_smoothing):
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"unknown loss type {loss_type!r}: choose from {', '.join(LOSS_TYPES)}")
    if label_smoothing and loss_type in ("ipo", "hinge"):
        raise ValueError(f"label_smoothing has no meaning for the {loss_type!r} loss: leave it 0")
    if not 0 <= label_smoothing <= 0.5 or (loss_type == "robust" and label_smoothing == 0.5):
        raise ValueError(f"label_smoothing must be in [0, 0.5], below 0.5 for the robust loss, not {label_smoothing}")


def fused_dpo_loss(chosen_logits, rejected_logits, chosen_targets, rejected_targets, chosen_mask, rejected_mask,
                   ref_chosen_logps, ref_rejected_logps, beta=0.1, loss_type="sigmoid", label_smoothing=0.0):
    """Mean DPO loss of B pairs: nanorlhf.losses.dpo_loss of masked sums of nanorlhf.logprobs.token_logprobs.

    Args:
        chosen_logits, rejected_logits: (B, T, V), T may differ between the two; float32, bfloat16 or float16; gradient
            flows through both.
        chosen_targets, rejected_targets, chosen_mask, rejected_mask: (B, T), the targets aligned with the logits.
        ref_chosen_logps, ref_rejected_logps: (B,), of the frozen reference: sums over the response, for "ipo" means.
        beta, loss_type, label_smoothing: as in dpo_loss.
    Returns: loss (scalar), and means over the pairs {"accuracy", "margin", "chosen_reward", "rejected_reward",
        "chosen_logps", "rejected_logps"}.
    """
    check(chosen_logits, chosen_targets=chosen_targets, chosen_mask=chosen_mask)
    check(rejected_logits, rejected_targets=rejected_targets, rejected_mask=rejected_mask)
    check_pairs(chosen_logits, rejected_logits, ref_chosen_logps, ref_rejected_logps)
    check_loss(loss_type, label_smoothing)
    sides = (chosen_targets, chosen_mask.float().contiguous()), (rejected_targets, rejected_mask.float().contiguous())
    ref_logps = [logps.detach().contiguous() for logps in (ref_chosen_logps, ref_rejected_logps)]
    loss, out = FusedDPOLoss.apply(chosen_logits, rejected_logits, sides, ref_logps, beta, loss_type, label_smoothing)
    margins = out[1] - out[2]
    values = torch.stack([(margins > 0).float().mean(), margins.mean(), *out[1:5].mean(1)]).tolist()
    return loss, dict(zip(STATISTICS, values))
