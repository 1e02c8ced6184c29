"""From scores to advantages: KL-shaped rewards, generalised advantage estimation, and the control of the KL coefficient.

All tensors here are (B, R), response tokens only, right-padded, with `response_mask` 1 on sampled tokens (EOS included).
Nothing here carries gradient.
"""
import torch

from nanorlhf.masked import check_shapes, keep, widen


@torch.no_grad()
def shape_rewards(scores, kl, response_mask, kl_coef):
    """Per-token rewards: a KL penalty on each token, the score on the last.

        r_t = -kl_coef * kl_t + [t is the last response token] * score

    The last response token is EOS, or the token at which the response was cut: never the slot after it.
    Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", Eq. 2.

    Args:
        scores: (B,), one score a response.
        kl: (B, R), per-token estimate of KL(policy || reference), see `kl_estimate`.
        response_mask: (B, R), bool or float, ones then zeros.
        kl_coef: the penalty's coefficient, >= 0.
    Returns: rewards (B, R), 0 where the mask is 0.
    """
    check_shapes(kl=kl, response_mask=response_mask)
    check_shapes(scores=scores, rows=response_mask.sum(1))
    mask = response_mask != 0
    rewards = -kl_coef * keep(kl, mask)  # (B, R)
    rows = torch.nonzero(mask.any(1)).squeeze(1)  # an empty response has no token to carry its score
    if len(rows):
        last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)  # (B,) index of the last response token
        rewards[rows, last[rows]] += scores[rows].to(rewards.dtype)
    return rewards


@torch.no_grad()
def gae(rewards, values, response_mask, gamma=1.0, lam=0.95, last_values=None):
    """Generalised advantage estimation (Schulman et al. 2016, "High-Dimensional Continuous Control Using GAE", Eq. 16).

        delta_t = r_t + gamma * V_{t+1} - V_t           A_t = delta_t + gamma * lam * A_{t+1}           returns_t = A_t + V_t

    After the last response token the value is 0, or `last_values` where a cut response is to be bootstrapped. lam = 1 gives
    the Monte Carlo return minus the value, lam = 0 the one-step TD error.

    Args:
        rewards, values: (B, R). values[:, t] is the value of the state before response token t is sampled.
        response_mask: (B, R), bool or float, ones then zeros.
        last_values: (B,) value of the state after the last token; None means 0 (the episode ended).
    Returns: advantages (B, R), returns (B, R), in the values' precision (half precision is summed in float32); 0 where the mask is 0.
    """
    check_shapes(rewards=rewards, values=values, response_mask=response_mask)
    check_shapes(last_values=last_values, rows=response_mask.sum(1))
    mask = response_mask != 0
    dtype = keep(values, mask).dtype  # that of the values; whole numbers become floats
    rewards, values = keep(widen(rewards), mask), keep(widen(values), mask)
    next_value = values.new_zeros(len(values)) if last_values is None else last_values.to(values.dtype)  # (B,)
    advantage = torch.zeros_like(next_value)  # (B,) A_{t+1}
    advantages = torch.zeros_like(values)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # Padding on the right is passed over: it leaves A_{t+1} = 0 and V_{t+1} = last_values for the token before it.
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = keep(advantage, mask[:, t])
    return advantages.to(dtype), (advantages + values).to(dtype)


class FixedKLController:
    """A KL coefficient that stays as it is."""

    def __init__(self, kl_coef):
        self.value = kl_coef

    def update(self, kl, n_steps):
        """Nothing to do: the coefficient is fixed."""


class AdaptiveKLController:
    """A KL coefficient steered so that the KL to the reference stays near a target (Ziegler et al. 2019, section 2.2).

        e = clip((kl - target) / target, -0.2, 0.2)             value <- value * (1 + e * n_steps / horizon)

    Args:
        kl_coef: the initial coefficient.
        target: the wanted KL of a whole response, in nats.
        horizon: over so many samples the coefficient changes by at most about a fifth; the original uses 10,000.
    """

    def __init__(self, kl_coef, target, horizon):
        if not (target > 0 and horizon > 0):
            raise ValueError(f"target and horizon must be above 0, not {target} and {horizon}")
        self.value, self.target, self.horizon = kl_coef, target, horizon

    def update(self, kl, n_steps):
        """Steer by the mean KL of a response (sum over its tokens), in nats, measured on n_steps samples."""
        error = min(max((float(kl) - self.target) / self.target, -0.2), 0.2)
        self.value *= 1 + error * n_steps / self.horizon
