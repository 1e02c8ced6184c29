"""The losses of RLHF: pure functions, tensors in, (loss, stats) out. No models, no state.

Token losses are means over the tokens of the mask. When one optimiser step is gathered from several micro-batches, weight
each micro-batch's loss by its share of the step's tokens: the sum is then the mean over the whole step, ragged or not.
"""
import torch
import torch.nn.functional as F

from nanorlhf.masked import check_shapes, masked_mean

DPO_LOSS_TYPES = ("sigmoid", "ipo", "hinge", "robust")


def _floats(**tensors):
    """Scalars as a dict of floats, moved off the device in one copy rather than one each; float64 keeps its digits."""
    values = [tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors.values()]
    return dict(zip(tensors, torch.stack(values).tolist()))


def sft_loss(logits, labels, ignore_index=-100):
    """Mean cross-entropy of the labelled tokens: -mean log softmax(logits)[label].

    Args:
        logits: (..., V), any float dtype; computed in float32.
        labels: (...), int64, already aligned: labels[..., t] is the token that logits[..., t] predict (the caller shifts by
            one). `ignore_index` marks prompt and padding tokens, which do not count.
    Returns: loss (scalar; 0 if every label is ignored), {"accuracy", "tokens"}.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)} do not fit labels {tuple(labels.shape)}: want (..., V) and (...)")
    logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = labels != ignore_index  # (N,)
    logits = torch.where(counted[:, None], logits, 0)  # an infinite logit in padding would make the gradient 0 * inf
    losses = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")  # (N,)
    correct = logits.argmax(-1) == labels
    return masked_mean(losses, counted), _floats(accuracy=masked_mean(correct, counted), tokens=counted.sum())


def bradley_terry_loss(chosen_scores, rejected_scores, margin=None, center_coef=0.0):
    """Reward-model loss on preference pairs.

        loss = -mean log sigmoid(s_chosen - s_rejected - margin) + center_coef * mean (s_chosen + s_rejected)^2

    Bradley & Terry 1952; Ouyang et al. 2022, Eq. 1; margin: Touvron et al. 2023 (Llama 2), Eq. 2; centring: Eisenstein et
    al. 2023, "Helping or Herding?", section 2.

    Args:
        chosen_scores, rejected_scores: (B,); gradient flows through both.
        margin: (B,) or None, how much better the chosen one is.
        center_coef: strength of the pull of scores to mean 0; the pair loss alone leaves their level free.
    Returns: loss (scalar), {"accuracy", "margin"}: the share of pairs in the right order (a tie is not) and the mean gap.
    """
    check_shapes(chosen_scores=chosen_scores, rejected_scores=rejected_scores, margin=margin)
    gap = chosen_scores - rejected_scores  # (B,)
    losses = -F.logsigmoid(gap if margin is None else gap - margin)
    loss = losses.mean() + center_coef * ((chosen_scores + rejected_scores) ** 2).mean()
    return loss, _floats(accuracy=(gap > 0).float().mean(), margin=gap.mean())


def rating_loss(scores, ratings):
    """Reward-model loss on ratings: mean (score - rating)^2.

    Args:
        scores: (B,); gradient flows.
        ratings: (B,), already in score units (the caller standardises them).
    Returns: loss (scalar), {"error"}: the mean absolute error.
    """
    check_shapes(scores=scores, ratings=ratings)
    error = scores - ratings
    return (error ** 2).mean(), _floats(error=error.abs().mean())


def ppo_policy_loss(new_logprobs, logprobs, advantages, response_mask, cliprange=0.2, dual_clip=None):
    """PPO's clipped surrogate (Schulman et al. 2017, Eq. 7), negated so that lower is better.

        ratio = exp(new - old)          loss = mean max(-A * ratio, -A * clip(ratio, 1 - c, 1 + c))

    With `dual_clip` = d, tokens of negative advantage cost at most -A * d (Ye et al. 2020, Eq. 5): without it, a ratio
    that has run away makes an unbounded loss there. The log-ratio is clamped to +-20 so that the exponential stays finite.

    Args:
        new_logprobs: (B, R), of the policy in training; gradient flows.
        logprobs: (B, R), of the policy that sampled the tokens.
        advantages, response_mask: (B, R).
        cliprange: c > 0.
        dual_clip: d > 1, or None.
    Returns: loss (scalar), {"clipfrac", "approx_kl", "ratio"}: the share of tokens whose clipped term is the larger, the
        k3 estimate of KL(old || new), and the mean ratio.
    """
    check_shapes(new_logprobs=new_logprobs, logprobs=logprobs, advantages=advantages, response_mask=response_mask)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1, not {dual_clip}")
    mask = response_mask != 0
    log_ratio = torch.where(mask, new_logprobs - logprobs, 0).clamp(-20, 20)  # (B, R)
    advantages = torch.where(mask, advantages, 0)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    losses = torch.max(unclipped, clipped)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.min(losses, -advantages * dual_clip), losses)
    stats = _floats(
        clipfrac=masked_mean(clipped > unclipped, response_mask),
        approx_kl=masked_mean(torch.expm1(log_ratio) - log_ratio, response_mask),
        ratio=masked_mean(ratio, response_mask),
    )
    return masked_mean(losses, response_mask), stats


def ppo_value_loss(new_values, values, returns, response_mask, cliprange_value=0.2):
    """Clipped value loss: the new value may move only cliprange_value from the rollout's before the gradient stops.

        loss = 0.5 * mean max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)

    The original's (OpenAI baselines' ppo2; Ziegler et al. 2019), without vf_coef.

    Args:
        new_values: (B, R), of the value head in training; gradient flows.
        values, returns, response_mask: (B, R), from the rollout.
        cliprange_value: c > 0, or None for no clipping.
    Returns: loss (scalar), {"clipfrac", "error"}: the share of tokens whose clipped term is the larger, and the mean
        absolute error of the new values.
    """
    check_shapes(new_values=new_values, values=values, returns=returns, response_mask=response_mask)
    mask = response_mask != 0
    new_values, values, returns = (torch.where(mask, x, 0) for x in (new_values, values, returns))
    bound = float("inf") if cliprange_value is None else cliprange_value
    clipped_values = torch.max(torch.min(new_values, values + bound), values - bound)  # (B, R)
    unclipped, clipped = (new_values - returns) ** 2, (clipped_values - returns) ** 2
    stats = _floats(
        clipfrac=masked_mean(clipped > unclipped, response_mask),
        error=masked_mean((new_values - returns).abs(), response_mask),
    )
    return 0.5 * masked_mean(torch.max(unclipped, clipped), response_mask), stats


def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1,
             loss_type="sigmoid", label_smoothing=0.0, reference_free=False):
    """Direct preference optimisation and its kin, per pair, with h the gap of the policy's and the reference's log-ratios:

        h = (log pi(chosen) - log pi(rejected)) - (log ref(chosen) - log ref(rejected))

        sigmoid   -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)               e = label_smoothing
                  Rafailov et al. 2023, Eq. 7; with e > 0 the conservative DPO of Mitchell 2023
        robust    (-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2e)  Chowdhury et al. 2024
        ipo       (h - 1 / (2 beta))^2                                                Azar et al. 2023, Eq. 17
        hinge     max(0, 1 - beta h)                                                  Zhao et al. 2023 (SLiC), Liu et al. 2023 (RSO)

    Args:
        policy_*_logps: (B,), sums of token log-probs over the response (for "ipo" per-token means, as its authors advise);
            gradient flows.
        ref_*_logps: (B,), the same of the frozen reference; None will do with `reference_free`.
        beta: strength of the implied KL penalty, > 0.
        label_smoothing: share e of pairs assumed to be labelled the wrong way round, 0 <= e <= 0.5 ("robust": < 0.5);
            for "sigmoid" and "robust" only.
        reference_free: take the reference to be uniform, that is, leave its log-ratio out; of the rewards too, where the
            DPO authors' code keeps it.
    Returns: losses (B,), chosen_rewards (B,), rejected_rewards (B,): the implied rewards beta * (log pi - log ref), detached.
    """
    check_shapes(policy_chosen_logps=policy_chosen_logps, policy_rejected_logps=policy_rejected_logps,
                 ref_chosen_logps=ref_chosen_logps, ref_rejected_logps=ref_rejected_logps)
    if loss_type not in DPO_LOSS_TYPES:
        raise ValueError(f"unknown loss type {loss_type!r}: choose from {', '.join(DPO_LOSS_TYPES)}")
    if label_smoothing and loss_type in ("ipo", "hinge"):
        raise ValueError(f"label_smoothing has no meaning for the {loss_type!r} loss: leave it 0")
    if not 0 <= label_smoothing <= 0.5 or (loss_type == "robust" and label_smoothing == 0.5):
        raise ValueError(f"label_smoothing must be in [0, 0.5], below 0.5 for the robust loss, not {label_smoothing}")
    if reference_free:
        ref_chosen_logps = ref_rejected_logps = torch.zeros_like(policy_chosen_logps)
    chosen_ratios = policy_chosen_logps - ref_chosen_logps  # (B,)
    rejected_ratios = policy_rejected_logps - ref_rejected_logps  # (B,)
    h = chosen_ratios - rejected_ratios
    right = -F.logsigmoid(beta * h)
    wrong = -F.logsigmoid(-beta * h) if label_smoothing else 0  # may be infinite, and 0 * inf is NaN
    if loss_type == "sigmoid":
        losses = (1 - label_smoothing) * right + label_smoothing * wrong
    elif loss_type == "robust":
        losses = ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
    elif loss_type == "ipo":
        losses = (h - 1 / (2 * beta)) ** 2
    else:
        losses = F.relu(1 - beta * h)
    return losses, (beta * chosen_ratios).detach(), (beta * rejected_ratios).detach()
