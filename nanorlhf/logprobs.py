"""From logits to log-probabilities, entropy and Kullback-Leibler divergence: the definitions.

Everything is computed in float32 whatever the logits' precision (float64 stays float64), and at the sampling temperature:
the policy that is trained is softmax(logits / temperature), the distribution the tokens were drawn from.
`kernels/` holds faster twins of these functions; tests hold the twins against this file.
"""
import torch

from nanorlhf.masked import check_shapes

KL_ESTIMATORS = ("k1", "k2", "k3", "abs")


def log_softmax(logits, temperature=1.0):
    """log softmax(logits / temperature) in at least float32, (..., V) -> (..., V)."""
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=-1)


def expectation(p, x):
    """sum_v p_v x_v over the last dimension, where a zero probability outweighs an infinite x.

    A logit of -inf has p = 0 and log p = -inf, whose product is NaN although its limit is 0. Filling x before the product
    keeps the gradient finite too.
    """
    return (p * x.masked_fill(p == 0, 0)).sum(-1)


def token_logprobs(logits, targets, temperature=1.0):
    """Log-probability of each target token and entropy of each distribution.

        logprobs = log softmax(logits / T)[target]        entropy = - sum_v p_v log p_v,  p = softmax(logits / T)

    Args:
        logits: (..., V), any float dtype; gradient flows from both results. The caller aligns them with the targets: logits
            at position t predict token t + 1.
        targets: (...), int64 in [0, V).
        temperature: the sampling temperature T > 0.
    Returns: logprobs (...), entropy (...), float32, in nats.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"logits {tuple(logits.shape)} do not fit targets {tuple(targets.shape)}: want (..., V) and (...)")
    logp = log_softmax(logits, temperature)  # (..., V)
    logprobs = logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return logprobs, -expectation(logp.exp(), logp)


def kl_estimate(logprobs, ref_logprobs, estimator="k1"):
    """Per-token estimate of KL(policy || reference) from tokens drawn from the policy, with d = logprobs - ref_logprobs.

        k1 = d                       unbiased, any sign; what belongs in the reward
        k2 = d^2 / 2                 biased, low variance; its gradient as a loss is that of the KL
        k3 = exp(-d) - 1 + d         unbiased, never negative; good for logging, its gradient as a loss is biased
        abs = |d|

    Source: J. Schulman, "Approximating KL divergence", 2020, joschu.net/blog/kl-approx.html.

    Args:
        logprobs, ref_logprobs: (...), log-probs of the same sampled tokens.
        estimator: one of "k1", "k2", "k3", "abs"; anything else is a ValueError.
    Returns: (...), same shape, in nats.
    """
    check_shapes(logprobs=logprobs, ref_logprobs=ref_logprobs)
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d ** 2
    if estimator == "k3":
        return torch.expm1(-d) + d  # expm1 keeps the digits that exp(-d) - 1 loses near d = 0
    if estimator == "abs":
        return d.abs()
    raise ValueError(f"unknown KL estimator {estimator!r}: choose from {', '.join(KL_ESTIMATORS)}")


def exact_kl(logits, ref_logits, temperature=1.0):
    """KL(policy || reference) of whole distributions: sum_v p_v (log p_v - log q_v), both at the temperature.

    Args:
        logits, ref_logits: (..., V), any float dtype; gradient flows through both.
    Returns: (...), float32, in nats; infinite where the reference forbids a token the policy allows.
    """
    check_shapes(logits=logits, ref_logits=ref_logits)
    logp, logq = log_softmax(logits, temperature), log_softmax(ref_logits, temperature)  # (..., V) each
    p = logp.exp()
    return expectation(p, logp - logq)  # the difference first: two expectations would cancel where the two are alike
