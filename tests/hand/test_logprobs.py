"""logprobs.py by hand: each docstring does the arithmetic, and the test states its result."""
import math

import pytest
import torch

from nanorlhf.logprobs import exact_kl, kl_estimate, token_logprobs

INF = math.inf
LN2, LN3, LN5 = math.log(2), math.log(3), math.log(5)


def close(tensor, expected):
    torch.testing.assert_close(tensor, torch.tensor(expected, dtype=tensor.dtype), rtol=1e-6, atol=1e-6)


def test_logprobs_and_entropy():
    """Logits ln 1, ln 2, ln 5 sum to 8 in odds: p = 1/8, 2/8, 5/8. H = 1/8 * 3 ln 2 + 1/4 * 2 ln 2 + 5/8 (3 ln 2 - ln
    5) = 2.75 ln 2 - 0.625 ln 5. The same logits + 7 have the same p."""
    logits = torch.tensor([[0.0, LN2, LN5], [7.0, LN2 + 7, LN5 + 7]])
    logprobs, entropy = token_logprobs(logits, torch.tensor([2, 0]))
    close(logprobs, [math.log(5 / 8), math.log(1 / 8)])
    close(entropy, [2.75 * LN2 - 0.625 * LN5] * 2)


def test_uniform_entropy():
    """Four equal logits: log-prob -ln 4 and entropy ln 4 at any temperature."""
    for temperature in (0.1, 1.0, 10.0):
        logprobs, entropy = token_logprobs(torch.full((4,), 3.0), torch.tensor(1), temperature)
        close(logprobs, -2 * LN2)
        close(entropy, 2 * LN2)


def test_temperature_divides_the_logits():
    """Logits 0 and 2 ln 3 at T = 2 are 0 and ln 3: p = 1/4, 3/4 and H = 1/4 * 2 ln 2 + 3/4 (2 ln 2 - ln 3) = 2 ln 2 -
    3/4 ln 3.
    (At T = 1 they would be 1/10, 9/10.)"""
    logprobs, entropy = token_logprobs(torch.tensor([0.0, 2 * LN3]), torch.tensor(1), temperature=2.0)
    close(logprobs, math.log(3 / 4))
    close(entropy, 2 * LN2 - 0.75 * LN3)


def test_logprob_gradient():
    """d log p_1 / d z = (onehot - p) / T: for p = 1/4, 3/4 and T = 2 it is (-1/4, 1/4) / 2 = (-1/8, 1/8)."""
    logits = torch.tensor([0.0, 2 * LN3], requires_grad=True)
    token_logprobs(logits, torch.tensor(1), temperature=2.0)[0].backward()
    close(logits.grad, [-1 / 8, 1 / 8])


def test_entropy_gradient():
    """dH/dz_j = -p_j (log p_j + H) / T. For p = 1/4, 3/4: log p_0 + H = -2 ln 2 + 2 ln 2 - 3/4 ln 3 = -3/4 ln 3, times
    -1/4 gives 3/16 ln 3; the other is its negative; T = 2 halves both."""
    logits = torch.tensor([0.0, 2 * LN3], requires_grad=True)
    token_logprobs(logits, torch.tensor(1), temperature=2.0)[1].backward()
    close(logits.grad, [3 / 32 * LN3, -3 / 32 * LN3])


def test_forbidden_token():
    """Logits 0, ln 3, -inf: p = 1/4, 3/4, 0. The third term of the entropy is 0 * -inf, whose limit is 0, so H is as
    for two tokens; the gradients are those of two tokens, and 0 for the forbidden one. Its own log-prob is -inf."""
    logits = torch.tensor([0.0, LN3, -INF], requires_grad=True)
    logprobs, entropy = token_logprobs(logits, torch.tensor(1))
    close(logprobs, math.log(3 / 4))
    close(entropy, 2 * LN2 - 0.75 * LN3)
    close(torch.autograd.grad(logprobs, logits, retain_graph=True)[0], [-1 / 4, 1 / 4, 0.0])
    close(torch.autograd.grad(entropy, logits)[0], [3 / 16 * LN3, -3 / 16 * LN3, 0.0])
    assert token_logprobs(logits, torch.tensor(2))[0].item() == -INF


@pytest.mark.parametrize("ref, sign", [(0.25, 1), (1.0, -1)])
def test_kl_estimators(ref, sign):
    """p = 1/2. Against 1/4, d = ln 2: k1 = ln 2, k2 = ln^2 2 / 2, k3 = e^-d - 1 + d = 1/2 - 1 + ln 2, abs = ln 2.
    Against 1, d = -ln 2: k1 = -ln 2, k2 the same, k3 = 2 - 1 - ln 2, abs = ln 2."""
    logprobs, ref_logprobs = torch.tensor([math.log(0.5)]), torch.tensor([math.log(ref)])
    close(kl_estimate(logprobs, ref_logprobs), [sign * LN2])  # k1 is the default
    close(kl_estimate(logprobs, ref_logprobs, "k1"), [sign * LN2])
    close(kl_estimate(logprobs, ref_logprobs, "k2"), [LN2 ** 2 / 2])
    close(kl_estimate(logprobs, ref_logprobs, "k3"), [LN2 - 0.5] if sign > 0 else [1 - LN2])
    close(kl_estimate(logprobs, ref_logprobs, "abs"), [LN2])


@pytest.mark.parametrize("estimator, slope", [("k1", 1.0), ("k2", LN2), ("k3", 0.5), ("abs", 1.0)])
def test_kl_estimator_gradients(estimator, slope):
    """At d = ln 2: dk1/dd = 1, dk2/dd = d = ln 2, dk3/dd = 1 - e^-d = 1/2, d|d|/dd = 1; the reference gets the
    negative."""
    logprobs = torch.tensor([math.log(0.5)], requires_grad=True)
    ref_logprobs = torch.tensor([math.log(0.25)], requires_grad=True)
    kl_estimate(logprobs, ref_logprobs, estimator).backward()
    close(logprobs.grad, [slope])
    close(ref_logprobs.grad, [-slope])


def test_exact_kl_both_ways():
    """p = 1/4, 3/4 and q = 1/2, 1/2. KL(p || q) = 1/4 ln 1/2 + 3/4 ln 3/2 = 3/4 ln 3 - ln 2 = 0.1308;
    KL(q || p) = 1/2 ln 2 + 1/2 ln 2/3 = ln 2 - 1/2 ln 3 = 0.1438. The first argument is the policy."""
    p, q = torch.tensor([0.0, LN3]), torch.tensor([5.0, 5.0])
    close(exact_kl(p, q), 0.75 * LN3 - LN2)
    close(exact_kl(q, p), LN2 - 0.5 * LN3)


def test_exact_kl_temperature():
    """Logits 0, 2 ln 3 and 2 ln 3, 0 at T = 2 are p = 1/4, 3/4 and q = 3/4, 1/4:
    KL = 1/4 ln 1/3 + 3/4 ln 3 = 1/2 ln 3. Dividing only one of the two would show."""
    close(exact_kl(torch.tensor([[0.0, 2 * LN3]]), torch.tensor([[2 * LN3, 0.0]]), temperature=2.0), [0.5 * LN3])


def test_exact_kl_gradients():
    """dKL/dz_j = p_j (log p_j / q_j - KL): 1/4 (-ln 2 - 3/4 ln 3 + ln 2) = -3/16 ln 3, the other its negative.
    dKL/dw_j = q_j - p_j for the reference: 1/4, -1/4."""
    p, q = torch.tensor([0.0, LN3], requires_grad=True), torch.tensor([5.0, 5.0], requires_grad=True)
    exact_kl(p, q).backward()
    close(p.grad, [-3 / 16 * LN3, 3 / 16 * LN3])
    close(q.grad, [1 / 4, -1 / 4])


def test_exact_kl_with_forbidden_tokens():
    """p = 1/2, 1/2, 0 against q = 1/4, 1/4, 1/2: 2 * 1/2 ln 2 + 0 = ln 2. With the third token forbidden by both: q =
    1/2, 1/2, 0 and KL = 0. The other way round the reference forbids what the policy allows: infinite."""
    p, q = torch.tensor([0.0, 0.0, -INF]), torch.tensor([0.0, 0.0, LN2])
    close(exact_kl(p, q), LN2)
    close(exact_kl(p, torch.tensor([3.0, 3.0, -INF])), 0.0)
    assert exact_kl(q, p).item() == INF


def test_exact_kl_is_the_mean_of_the_estimators():
    """Under p = 1/4, 3/4 against 1/2, 1/2: E[k1] = 1/4 (-ln 2) + 3/4 ln 3/2 is the KL itself; so is E[k3], as E[e^-d] =
    1/4 * 2 + 3/4 * 2/3 = 1. E[k2] = 1/8 ln^2 2 + 3/8 ln^2 3/2 is not: 0.1217 against 0.1308."""
    p = torch.tensor([1 / 4, 3 / 4])
    logp, logq = p.log(), torch.full((2,), 0.5).log()
    kl = exact_kl(logp, logq)
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((p * kl_estimate(logp, logq, estimator)).sum(), kl)
    close((p * kl_estimate(logp, logq, "k2")).sum(), LN2 ** 2 / 8 + 3 / 8 * math.log(1.5) ** 2)
    close(kl, 0.75 * LN3 - LN2)
