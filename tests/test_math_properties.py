"""Properties of the mathematics: what must hold for any numbers. Reductions, invariances, gradients, precision, bad
input."""
import math

import pytest
import torch

from nanorlhf.advantages import AdaptiveKLController, gae, shape_rewards
from nanorlhf.logprobs import exact_kl, kl_estimate, token_logprobs
from nanorlhf.losses import bradley_terry_loss, dpo_loss, ppo_policy_loss, ppo_value_loss, rating_loss, sft_loss
from nanorlhf.masked import masked_mean, masked_var, whiten

INF, NAN = math.inf, math.nan
B, R, V = 4, 6, 11
LENGTHS = (6, 1, 0, 4)  # the longest row, one token, none, and a row with padding
DPO_TYPES = ("sigmoid", "ipo", "hinge", "robust")


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def lengths_mask(lengths=LENGTHS, columns=R):
    return torch.arange(columns) < torch.tensor(lengths).unsqueeze(1)  # (B, R)


def logps(batch=B, seed=0):
    """Four (B,) tensors of sequence log-probs, as the DPO loss wants them."""
    return [numbers(batch, seed=seed + i) * 3 - 10 for i in range(4)]


# Each function of a mask as f(x, y, z, mask) -> tensor: x carries gradient; y and z are further (B, R) inputs.
MASKED = {
    "masked_mean": lambda x, y, z, mask: masked_mean(x, mask),
    "masked_mean_dim": lambda x, y, z, mask: masked_mean(x, mask, dim=1),
    "masked_var": lambda x, y, z, mask: masked_var(x, mask),
    "masked_var_unbiased": lambda x, y, z, mask: masked_var(x, mask, unbiased=True),
    "whiten": lambda x, y, z, mask: whiten(x, mask),
    "whiten_uncentred": lambda x, y, z, mask: whiten(x, mask, center=False),
    "policy": lambda x, y, z, mask: ppo_policy_loss(x, y, z, mask)[0],
    "policy_dual": lambda x, y, z, mask: ppo_policy_loss(x, y, z, mask, dual_clip=2.0)[0],
    "value": lambda x, y, z, mask: ppo_value_loss(x, y, z, mask)[0],
    "value_unclipped": lambda x, y, z, mask: ppo_value_loss(x, y, z, mask, cliprange_value=None)[0],
}
SHAPED = {
    "shape_rewards": lambda x, y, z, mask: shape_rewards(z[:, 0].nan_to_num(), x, mask, 0.1),
    "gae_advantages": lambda x, y, z, mask: gae(x, y, mask, 0.9, 0.8)[0],
    "gae_returns": lambda x, y, z, mask: gae(x, y, mask, 0.9, 0.8)[1],
    "gae_bootstrapped": lambda x, y, z, mask: gae(x, y, mask, 0.9, 0.8, last_values=torch.ones(B))[0],
}
MASK_TYPES = [torch.bool, torch.int64, torch.float32, torch.float64]


# --- padding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [NAN, INF, -INF, 1e30])
@pytest.mark.parametrize("mask_type", MASK_TYPES)
@pytest.mark.parametrize("name", [*MASKED, *SHAPED])
def test_padding_reaches_neither_result_nor_gradient(name, mask_type, poison):
    """Whatever stands in masked places, and whatever type the mask has, result and gradient are as with zeros there."""
    function = (MASKED | SHAPED)[name]
    mask = lengths_mask()
    results, gradients = [], []
    for filler, kind in ((0.0, torch.bool), (poison, mask_type)):
        x, y, z = (numbers(B, R, seed=i).masked_fill(~mask, filler) for i in range(3))
        x.requires_grad_()
        result = function(x, y, z, mask.to(kind))
        if name in MASKED:
            gradients.append(torch.autograd.grad((result * numbers(*result.shape, seed=9)).sum(), x)[0])
        results.append(result.detach())
    torch.testing.assert_close(results[1], results[0])
    assert results[1].isfinite().all()
    if results[1].shape == mask.shape:
        assert (results[1][~mask] == 0).all()
    if gradients:
        assert gradients[0].abs().sum() > 0
        torch.testing.assert_close(gradients[1], gradients[0])
        assert (gradients[1][~mask] == 0).all()


@pytest.mark.parametrize("poisoned", [0, 1, 2])
@pytest.mark.parametrize("name", ["policy", "policy_dual", "value", "value_unclipped"])
def test_padding_of_one_input_alone_reaches_nothing(name, poisoned):
    """NaN in the advantages while the log-probs are finite, and so on: no other input's NaN may hide a missing mask."""
    mask = lengths_mask()
    results, gradients = [], []
    for filler in (0.0, NAN):
        inputs = [numbers(B, R, seed=i) for i in range(3)]
        inputs[poisoned] = inputs[poisoned].masked_fill(~mask, filler)
        x = inputs[0].requires_grad_()
        results.append(MASKED[name](*inputs, mask))
        gradients.append(torch.autograd.grad(results[-1], x)[0])
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("name", ["policy", "value"])
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_padding_does_not_reach_the_statistics(name, poison):
    loss = {"policy": ppo_policy_loss, "value": ppo_value_loss}[name]
    mask = lengths_mask()
    clean, dirty = ([numbers(B, R, seed=i).masked_fill(~mask, filler) for i in range(3)] for filler in (0.0, poison))
    assert loss(*dirty, mask.float())[1] == pytest.approx(loss(*clean, mask)[1])


@pytest.mark.parametrize("name", [*MASKED, *SHAPED])
def test_more_padding_changes_nothing(name):
    function = (MASKED | SHAPED)[name]
    mask = lengths_mask()
    short = function(*(numbers(B, R, seed=i) for i in range(3)), mask)
    padded = [torch.cat([numbers(B, R, seed=i), torch.full((B, 3), 7.0)], 1) for i in range(3)]
    long = function(*padded, torch.cat([mask, torch.zeros(B, 3, dtype=torch.bool)], 1))
    if long.shape == (B, R + 3):
        assert (long[:, R:] == 0).all()
        long = long[:, :R]
    torch.testing.assert_close(long, short)


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_sft_ignored_rows_reach_neither_loss_nor_gradient(poison):
    """A left-padded row may attend to nothing, and its logits be NaN."""
    labels = torch.tensor([3, -100, 5])
    clean, dirty = numbers(3, V), numbers(3, V)
    dirty[1] = poison
    loss, stats = sft_loss(dirty.requires_grad_(), labels)
    expected, expected_stats = sft_loss(clean.requires_grad_(), labels)
    torch.testing.assert_close(loss, expected)
    assert stats == expected_stats
    loss.backward()
    expected.backward()
    assert (dirty.grad[1] == 0).all()
    torch.testing.assert_close(dirty.grad, clean.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 3.0, -700.0])
def test_whitening_one_token_is_zero_in_every_precision(dtype, value):
    """eps = 1e-8 is 0 in float16, where 0 / sqrt(0) would be NaN."""
    x, mask = torch.tensor([[value, 5.0]], dtype=dtype), torch.tensor([[1, 0]])
    whitened = whiten(x, mask)
    assert whitened.tolist() == [[0.0, 0.0]]
    assert whitened.dtype == dtype


# --- masked statistics ------------------------------------------------------------------------------------------------


def test_whiten_gives_mean_0_and_variance_1():
    x, mask = numbers(B, R) * 5 + 3, lengths_mask()
    whitened = whiten(x, mask)
    assert masked_mean(whitened, mask).item() == pytest.approx(0, abs=1e-12)
    assert masked_var(whitened, mask).item() == pytest.approx(1, rel=1e-8)
    assert masked_var(whiten(x, mask, unbiased=True), mask, unbiased=True).item() == pytest.approx(1, rel=1e-8)


def test_whiten_without_centring_keeps_the_mean():
    """The flag is ambiguous elsewhere: here center=False means that only the scale changes."""
    x, mask = numbers(B, R) * 5 + 3, lengths_mask()
    whitened = whiten(x, mask, center=False)
    torch.testing.assert_close(masked_mean(whitened, mask), masked_mean(x, mask))
    torch.testing.assert_close(masked_var(whitened, mask).item(), 1.0, rtol=1e-8, atol=0)


def test_whiten_ignores_shift_and_scale():
    x, mask = numbers(B, R), lengths_mask()
    torch.testing.assert_close(whiten(10 * x - 4, mask, eps=0.0), whiten(x, mask, eps=0.0))


def test_statistics_equal_those_of_the_kept_tokens():
    x, mask = numbers(B, R), lengths_mask()
    torch.testing.assert_close(masked_mean(x, mask), x[mask].mean())
    torch.testing.assert_close(masked_var(x, mask), x[mask].var(unbiased=False))
    torch.testing.assert_close(masked_var(x, mask, unbiased=True), x[mask].var())


# --- log-probs, entropy, KL -------------------------------------------------------------------------------------------


def test_logprobs_are_normalised_and_ignore_a_shift():
    logits = numbers(3, V)
    every = torch.stack([token_logprobs(logits, torch.full((3,), v), 0.7)[0] for v in range(V)])  # (V, 3)
    torch.testing.assert_close(every.exp().sum(0), torch.ones(3, dtype=torch.float64))
    targets = torch.tensor([0, 5, 10])
    for shifted, straight in zip(token_logprobs(logits + 100, targets, 0.7), token_logprobs(logits, targets, 0.7)):
        torch.testing.assert_close(shifted, straight)


def test_temperature_equals_divided_logits():
    logits, ref, targets = numbers(B, R, V), numbers(B, R, V, seed=1), torch.zeros(B, R, dtype=torch.long)
    for tempered, divided in zip(token_logprobs(logits, targets, 0.7), token_logprobs(logits / 0.7, targets)):
        torch.testing.assert_close(tempered, divided)
    torch.testing.assert_close(exact_kl(logits, ref, 0.7), exact_kl(logits / 0.7, ref / 0.7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_float32(dtype):
    """The results equal those of the same numbers in float32, bit for bit; the gradient comes back in the low
    precision."""
    low, low_ref = numbers(B, V).to(dtype).requires_grad_(), numbers(B, V, seed=1).to(dtype)
    targets = torch.arange(B)
    for a, b in zip(token_logprobs(low, targets, 0.7), token_logprobs(low.float(), targets, 0.7)):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
    assert torch.equal(exact_kl(low, low_ref), exact_kl(low.float(), low_ref.float()))
    loss, _ = sft_loss(low, targets)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, sft_loss(low.float(), targets)[0])
    assert torch.autograd.grad(loss, low)[0].dtype == dtype


def test_float64_stays_float64():
    x, mask, scores = numbers(B, R), lengths_mask(), numbers(B)
    logits, targets = numbers(B, R, V), torch.zeros(B, R, dtype=torch.long)
    results = [
        masked_mean(x, mask), masked_var(x, mask), whiten(x, mask), *token_logprobs(logits, targets), kl_estimate(x, x),
        exact_kl(logits, logits), shape_rewards(scores, x, mask, 0.1), *gae(x, x, mask, last_values=scores),
        sft_loss(logits, targets)[0], bradley_terry_loss(scores, -scores)[0], rating_loss(scores, -scores)[0],
        ppo_policy_loss(x, x, x, mask)[0], ppo_value_loss(x, x, x, mask)[0], *dpo_loss(*logps()),
    ]
    assert {result.dtype for result in results} == {torch.float64}
    _, stats = ppo_policy_loss(x, x - 0.1, x, mask)
    assert stats["ratio"] == pytest.approx(math.exp(0.1), abs=1e-14), "float32 would leave 7 digits"
    assert rating_loss(scores, scores - 0.1)[1]["error"] == pytest.approx(0.1, abs=1e-14)


@pytest.mark.parametrize("logits", [
    [1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0.0, -115.0, -116.0], [0.0, -104.0, -88.0], [1e4, 1e4, -INF],
])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_are_exact_and_finite(logits, dtype):
    """+-1e4 as in Habit 14. Near -104 and -115 a float32 probability is subnormal or 0 while its log is neither."""
    z = torch.tensor(logits, dtype=dtype, requires_grad=True)
    exact = torch.tensor(logits, dtype=torch.float64)
    p = torch.softmax(exact, -1)
    logp = torch.log_softmax(exact, -1)
    h = -sum(a * b for a, b in zip(p.tolist(), logp.tolist()) if a > 0)
    for target in range(3):
        logprob, entropy = token_logprobs(z, torch.tensor(target))
        torch.testing.assert_close(logprob.double(), logp[target], rtol=1e-6, atol=1e-6)
        assert entropy.item() == pytest.approx(h, abs=1e-6)
        onehot = torch.nn.functional.one_hot(torch.tensor(target), 3)
        grad, = torch.autograd.grad(logprob, z, retain_graph=True)
        torch.testing.assert_close(grad.double(), onehot - p, rtol=1e-6, atol=1e-6)
        slope = torch.where(p > 0, -p * (logp.nan_to_num(neginf=0) + h), 0)
        torch.testing.assert_close(torch.autograd.grad(entropy, z)[0].double(), slope, rtol=1e-5, atol=1e-6)
    ref = torch.zeros(3, dtype=dtype, requires_grad=True)
    kl = exact_kl(z, ref)
    assert kl.item() == pytest.approx(math.log(3) - h, abs=1e-5)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(kl, (z, ref)))


def test_exact_kl_of_a_distribution_with_itself_is_zero():
    logits = numbers(B, V, dtype=torch.float32)
    assert (exact_kl(logits, logits) == 0).all()
    z, ref = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    for grad in torch.autograd.grad(exact_kl(z, ref).sum(), (z, ref)):
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-6)


def test_kl_is_never_negative():
    assert (exact_kl(numbers(500, V), numbers(500, V, seed=1)) > 0).all()
    d = numbers(100_000, dtype=torch.float32) * 10 ** (3 * numbers(100_000, seed=1, dtype=torch.float32)).clamp(-8, 1)
    for estimator in ("k2", "k3", "abs"):
        assert (kl_estimate(d, torch.zeros_like(d), estimator) >= 0).all()


def test_k3_keeps_its_digits_near_zero():
    """k3 = d^2 / 2 - d^3 / 6 + ...: at d = 1e-3 it is 4.998e-7, of which exp(-d) - 1 + d keeps one digit in float32."""
    d = torch.tensor([1e-3, -1e-3])
    torch.testing.assert_close(kl_estimate(d, torch.zeros(2), "k3"), d ** 2 / 2 - d ** 3 / 6, rtol=2e-4, atol=0)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_estimators_are_unbiased(estimator):
    """Their mean under the policy is the exact KL, here taken as the whole sum rather than from samples."""
    logits, ref = numbers(B, V), numbers(B, V, seed=1)
    logp, logq = torch.log_softmax(logits, -1), torch.log_softmax(ref, -1)
    torch.testing.assert_close((logp.exp() * kl_estimate(logp, logq, estimator)).sum(-1), exact_kl(logits, ref))


def test_which_estimators_are_right_as_a_loss():
    """The expected gradient of k2 is that of the KL. k1's is 0 and k3's is that of the other KL(ref || policy)."""
    logits, ref = numbers(V).requires_grad_(), numbers(V, seed=1)

    def mean_gradient(estimator):
        p = torch.softmax(logits, -1).detach()
        logp = torch.log_softmax(logits, -1)
        return torch.autograd.grad((p * kl_estimate(logp, torch.log_softmax(ref, -1), estimator)).sum(), logits)[0]

    forward, = torch.autograd.grad(exact_kl(logits, ref), logits)
    backward, = torch.autograd.grad(exact_kl(ref, logits), logits)
    torch.testing.assert_close(mean_gradient("k2"), forward)
    torch.testing.assert_close(mean_gradient("k1"), torch.zeros_like(forward))
    torch.testing.assert_close(mean_gradient("k3"), backward)


# --- advantages -------------------------------------------------------------------------------------------------------


def test_score_is_on_the_last_token_wherever_it_is():
    """Padded, cut at the last column, or one token long: without KL the one non-zero reward is the score, on the last
    token."""
    mask = lengths_mask()
    rewards = shape_rewards(torch.arange(1.0, B + 1), torch.zeros(B, R), mask, 0.1)
    for row, length in enumerate(LENGTHS):
        expected = torch.zeros(R)
        if length:
            expected[length - 1] = row + 1
        assert torch.equal(rewards[row], expected)


def test_rewards_add_up_to_score_less_kl():
    scores, kl, mask = numbers(B), numbers(B, R, seed=1), lengths_mask()
    total = shape_rewards(scores, kl, mask, 0.3).sum(1)
    torch.testing.assert_close(total, torch.where(mask.any(1), scores, 0) - 0.3 * (kl * mask).sum(1))


def test_gae_with_lam_1_is_monte_carlo():
    """A_t + V_t = sum_l gamma^l r_{t+l}, the values having no say."""
    rewards, values, mask = numbers(B, R), numbers(B, R, seed=1), lengths_mask()
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            monte_carlo = sum(0.9 ** (s - t) * rewards[row, s] for s in range(t, length))
            torch.testing.assert_close(returns[row, t], monte_carlo)
            torch.testing.assert_close(advantages[row, t], monte_carlo - values[row, t])


def test_gae_with_lam_0_is_the_td_error():
    rewards, values, mask = numbers(B, R), numbers(B, R, seed=1), lengths_mask()
    next_values = torch.cat([(values * mask)[:, 1:], torch.zeros(B, 1, dtype=torch.float64)], 1)
    torch.testing.assert_close(gae(rewards, values, mask, 0.9, 0.0)[0], (rewards + 0.9 * next_values - values) * mask)


def test_gae_with_gamma_0_sees_one_reward():
    rewards, values, mask = numbers(B, R), numbers(B, R, seed=1), lengths_mask()
    advantages, returns = gae(rewards, values, mask, 0.0, 0.95, last_values=numbers(B, seed=2))
    torch.testing.assert_close(advantages, (rewards - values) * mask)
    torch.testing.assert_close(returns, rewards * mask)


def test_gae_with_perfect_values_has_no_advantage():
    """Where the values are the true returns, every delta is 0, at any lam."""
    rewards, mask = numbers(B, R), lengths_mask()
    _, returns = gae(rewards, torch.zeros(B, R, dtype=torch.float64), mask, 0.9, 1.0)
    for lam in (0.0, 0.5, 1.0):
        advantages, _ = gae(rewards, returns, mask, 0.9, lam)
        torch.testing.assert_close(advantages, torch.zeros_like(advantages))


def test_bootstrapping_adds_one_discounted_term():
    """V(s_T) enters the last delta alone, so it adds (gamma lam)^k gamma V(s_T) to the token k before the last. It
    equals a reward of gamma V(s_T) on the last token."""
    rewards, values, last_values, mask = numbers(B, R), numbers(B, R, seed=1), numbers(B, seed=2), lengths_mask()
    plain, bootstrapped = gae(rewards, values, mask, 0.9, 0.8)[0], gae(rewards, values, mask, 0.9, 0.8, last_values)[0]
    for row, length in enumerate(LENGTHS):
        added = [0.72 ** (length - 1 - t) * 0.9 * last_values[row].item() if t < length else 0.0 for t in range(R)]
        assert (bootstrapped - plain)[row].tolist() == pytest.approx(added)
    zero = gae(rewards, values, mask, 0.9, 0.8, torch.zeros(B))[0]
    assert torch.equal(zero, plain)
    lam_0 = gae(rewards, values, mask, 0.9, 0.0, last_values)[0] - gae(rewards, values, mask, 0.9, 0.0)[0]
    all_but_last = lengths_mask(tuple(max(length - 1, 0) for length in LENGTHS))
    assert torch.equal(lam_0 != 0, mask & ~all_but_last)


def test_a_masked_token_amid_the_response_is_passed_over():
    """It gets 0, and the others what they would get without its column; the same for padding on the left."""
    rewards, values = numbers(2, 5), numbers(2, 5, seed=1)
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 1, 1, 1]])
    advantages, returns = gae(rewards, values, mask, 0.9, 0.8)
    assert (advantages[mask == 0] == 0).all() and (returns[mask == 0] == 0).all()
    for row in range(2):
        kept = mask[row] == 1
        dense, _ = gae(rewards[row, kept][None], values[row, kept][None], torch.ones(1, int(kept.sum())), 0.9, 0.8)
        torch.testing.assert_close(advantages[row, kept], dense[0])


def test_rows_do_not_mix():
    rewards, values, mask = numbers(B, R), numbers(B, R, seed=1), lengths_mask()
    together, _ = gae(rewards, values, mask, 0.9, 0.8, numbers(B, seed=2))
    for row in range(B):
        one = slice(row, row + 1)
        alone, _ = gae(rewards[one], values[one], mask[one], 0.9, 0.8, numbers(B, seed=2)[one])
        assert torch.equal(together[one], alone)


def test_advantages_carry_no_gradient():
    x, mask = numbers(B, R).requires_grad_(), lengths_mask()
    scores = numbers(B).requires_grad_()
    assert not shape_rewards(scores, x, mask, 0.1).requires_grad
    assert not any(result.requires_grad for result in gae(x, x, mask, last_values=scores))


def test_adaptive_controller_finds_its_target():
    """A policy whose KL falls as the coefficient rises, kl = 0.6 / coef, settles at the target of 6: coef 0.1, from
    either side."""
    for start in (0.01, 1.0):
        controller = AdaptiveKLController(start, target=6.0, horizon=100)
        for _ in range(400):
            controller.update(0.6 / controller.value, 50)
        assert controller.value == pytest.approx(0.1, rel=1e-3)


# --- losses: gradients ------------------------------------------------------------------------------------------------


def kept(function):
    """The function of x alone, with y, z and the mask fixed. Random numbers stand off every kink, which gradcheck
    needs."""
    return lambda x: function(x, numbers(B, R, seed=1), numbers(B, R, seed=2), lengths_mask())


@pytest.mark.parametrize("name", MASKED)
def test_gradcheck_of_masked_functions(name):
    assert torch.autograd.gradcheck(kept(MASKED[name]), numbers(B, R).requires_grad_())


@pytest.mark.parametrize("name, function", [
    ("logprobs", lambda z: token_logprobs(z, torch.arange(B), 0.7)[0]),
    ("entropy", lambda z: token_logprobs(z, torch.arange(B), 0.7)[1]),
    ("exact_kl", lambda z: exact_kl(z, numbers(B, V, seed=1), 0.7)),
    ("exact_kl_ref", lambda z: exact_kl(numbers(B, V, seed=1), z, 0.7)),
    ("sft", lambda z: sft_loss(z, torch.tensor([3, -100, 0, 10]))[0]),
    ("k1", lambda z: kl_estimate(z, numbers(B, V, seed=1), "k1")),
    ("k2", lambda z: kl_estimate(z, numbers(B, V, seed=1), "k2")),
    ("k3", lambda z: kl_estimate(z, numbers(B, V, seed=1), "k3")),
    ("abs", lambda z: kl_estimate(z, numbers(B, V, seed=1), "abs")),
])
def test_gradcheck_of_functions_of_logits(name, function):
    assert torch.autograd.gradcheck(function, numbers(B, V).requires_grad_())


@pytest.mark.parametrize("loss_type", DPO_TYPES)
@pytest.mark.parametrize("reference_free", [False, True])
def test_gradcheck_of_dpo(loss_type, reference_free):
    chosen, rejected, *reference = logps()
    smoothing = 0.2 if loss_type in ("sigmoid", "robust") else 0.0

    def loss(chosen, rejected):
        return dpo_loss(chosen, rejected, *reference, 0.3, loss_type, smoothing, reference_free)[0]

    assert torch.autograd.gradcheck(loss, (chosen.requires_grad_(), rejected.requires_grad_()))


def test_gradcheck_of_reward_losses():
    scores = numbers(B).requires_grad_(), numbers(B, seed=1).requires_grad_()
    margin = numbers(B, seed=2)
    assert torch.autograd.gradcheck(lambda a, b: bradley_terry_loss(a, b, margin, 0.3)[0], scores)
    assert torch.autograd.gradcheck(lambda a: rating_loss(a, margin)[0], scores[:1])


def test_policy_gradient_is_zero_exactly_in_the_clipped_regions():
    """A token has no gradient if and only if its ratio left the range to the side that its advantage asks for."""
    new, old, advantages = numbers(50, 20).requires_grad_(), numbers(50, 20, seed=1) * 0.7, numbers(50, 20, seed=2)
    mask = torch.ones(50, 20)
    loss, stats = ppo_policy_loss(new, old, advantages, mask)
    loss.backward()
    ratio = (new - old).exp().detach()
    clipped = ((advantages > 0) & (ratio > 1.2)) | ((advantages < 0) & (ratio < 0.8))
    assert torch.equal(new.grad == 0, clipped)
    assert stats["clipfrac"] == pytest.approx(clipped.double().mean().item())
    torch.testing.assert_close(new.grad, torch.where(clipped, 0, -advantages * ratio) / 1000)


def test_dual_clip_only_lowers_what_runs_away():
    new, old, advantages = numbers(50, 20) * 2, numbers(50, 20, seed=1), numbers(50, 20, seed=2)
    for i in range(0, 50, 5):
        for j in range(0, 20, 5):
            token = [t[i:i + 1, j:j + 1] for t in (new, old, advantages, torch.ones(50, 20))]
            plain, dual = ppo_policy_loss(*token)[0].item(), ppo_policy_loss(*token, dual_clip=2.0)[0].item()
            runs_away = advantages[i, j] < 0 and (new - old)[i, j].exp() > 2
            assert dual == pytest.approx(-2 * advantages[i, j].item() if runs_away else plain)


def test_policy_loss_is_never_below_the_unclipped_one():
    new, old, advantages, mask = numbers(B, R), numbers(B, R, seed=1), numbers(B, R, seed=2), lengths_mask()
    unclipped = masked_mean(-advantages * (new - old).exp(), mask)
    assert ppo_policy_loss(new, old, advantages, mask)[0] > unclipped
    torch.testing.assert_close(ppo_policy_loss(new, old, advantages, mask, cliprange=1e9)[0], unclipped)


def test_value_loss_is_never_below_the_unclipped_one():
    new, old, returns, mask = numbers(B, R), numbers(B, R, seed=1), numbers(B, R, seed=2), lengths_mask()
    unclipped = 0.5 * masked_mean((new - returns) ** 2, mask)
    assert ppo_value_loss(new, old, returns, mask)[0] > unclipped
    for cliprange_value in (1e9, None):
        torch.testing.assert_close(ppo_value_loss(new, old, returns, mask, cliprange_value)[0], unclipped)


def test_rollout_tensors_receive_no_gradient_they_did_not_ask_for():
    """Statistics are plain floats, cut from the graph."""
    new, mask = numbers(B, R).requires_grad_(), lengths_mask()
    old = new.detach()
    for _, stats in (ppo_policy_loss(new, old, old, mask), ppo_value_loss(new, old, old, mask),
                     bradley_terry_loss(new[:, 0], new[:, 1]), rating_loss(new[:, 0], new[:, 1].detach()),
                     sft_loss(new, torch.arange(B))):
        assert all(type(value) is float for value in stats.values())


# --- losses: accumulation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [(1, 2, 1), (3, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("name", ["policy", "policy_dual", "value", "value_unclipped", "masked_mean"])
def test_ragged_micro_batches_add_up_to_one_batch(name, cuts):
    """Weighted by its share of the step's tokens, each micro-batch (cut to its own longest row) gives its part of loss
    and gradient.
    One of them has no tokens at all."""
    mask = lengths_mask()
    x = numbers(B, R).requires_grad_()
    y, z = numbers(B, R, seed=1), numbers(B, R, seed=2)
    whole = MASKED[name](x, y, z, mask)
    expected, = torch.autograd.grad(whole, x)
    pieces = []
    for rows in torch.arange(B).split(list(cuts)):
        width = max(int(mask[rows].sum(1).max()), 1)
        piece = MASKED[name](x[rows, :width], y[rows, :width], z[rows, :width], mask[rows, :width])
        pieces.append(piece * mask[rows].sum() / mask.sum())
    torch.testing.assert_close(sum(pieces), whole)
    torch.testing.assert_close(torch.autograd.grad(sum(pieces), x)[0], expected)


def test_ragged_sft_micro_batches_add_up_to_one_batch():
    logits, labels = numbers(B, R, V).requires_grad_(), torch.arange(B * R).view(B, R) % V
    labels[~lengths_mask()] = -100
    whole, stats = sft_loss(logits, labels)
    parts = [sft_loss(logits[rows], labels[rows]) for rows in torch.arange(B).split(2)]
    total = sum(loss * part["tokens"] / stats["tokens"] for loss, part in parts)
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (total, whole)))


# --- losses: preferences ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type, limit", [("sigmoid", math.log(2)), ("robust", math.log(2)), ("hinge", 1.0)])
def test_dpo_at_beta_0(loss_type, limit):
    torch.testing.assert_close(dpo_loss(*logps(), 1e-12, loss_type)[0], torch.full((B,), limit, dtype=torch.float64))


@pytest.mark.parametrize("loss_type", DPO_TYPES)
def test_dpo_of_the_reference_itself(loss_type):
    """policy = reference: h = 0 and the implied rewards are 0."""
    chosen, rejected, *_ = logps()
    losses, *rewards = dpo_loss(chosen, rejected, chosen, rejected, 0.1, loss_type)
    expected = {"sigmoid": math.log(2), "robust": math.log(2), "hinge": 1.0, "ipo": 25.0}[loss_type]
    torch.testing.assert_close(losses, torch.full((B,), expected, dtype=torch.float64))
    assert all((reward == 0).all() for reward in rewards)


def test_dpo_is_bradley_terry_on_the_implied_rewards():
    losses, chosen, rejected = dpo_loss(*logps(), beta=0.3)
    torch.testing.assert_close(losses.mean(), bradley_terry_loss(chosen, rejected)[0])


@pytest.mark.parametrize("loss_type", DPO_TYPES)
def test_dpo_depends_on_the_reference_through_its_gap_alone(loss_type):
    chosen, rejected, ref_chosen, ref_rejected = logps()
    straight = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.3, loss_type)[0]
    shifted = dpo_loss(chosen, rejected, ref_chosen + 5, ref_rejected + 5, 0.3, loss_type)[0]
    torch.testing.assert_close(shifted, straight)
    zeros = torch.zeros_like(ref_chosen)
    for reference in ((ref_chosen, ref_rejected), (None, None)):
        free = dpo_loss(chosen, rejected, *reference, 0.3, loss_type, reference_free=True)
        torch.testing.assert_close(free, dpo_loss(chosen, rejected, zeros, zeros, 0.3, loss_type))


def test_smoothing_is_an_expectation_over_flipped_labels_and_robust_undoes_it():
    """sigmoid with e: (1 - e) L(h) + e L(-h). robust is the estimator whose expectation over labels flipped with e is
    L(h)."""
    args = logps()
    flipped = [args[1], args[0], args[3], args[2]]
    right, wrong = dpo_loss(*args, 0.3)[0], dpo_loss(*flipped, 0.3)[0]
    torch.testing.assert_close(dpo_loss(*args, 0.3, label_smoothing=0.2)[0], 0.8 * right + 0.2 * wrong)
    robust, robust_flipped = (dpo_loss(*x, 0.3, "robust", 0.2)[0] for x in (args, flipped))
    torch.testing.assert_close(0.8 * robust + 0.2 * robust_flipped, right)
    torch.testing.assert_close(dpo_loss(*args, 0.3, "robust")[0], right)


@pytest.mark.parametrize("loss_type", DPO_TYPES)
def test_dpo_far_out_is_finite(loss_type):
    """h = +-2e4: value and gradient stay finite, also in float32."""
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    zeros = torch.zeros(2)
    losses, *_ = dpo_loss(chosen, -chosen.detach(), zeros, zeros, 1.0, loss_type)
    assert losses.isfinite().all()
    assert torch.autograd.grad(losses.sum(), chosen)[0].isfinite().all()
    assert losses[1] > 1e4


@pytest.mark.parametrize("loss_type, expected", [("sigmoid", 0.0), ("robust", 0.0), ("hinge", 0.0)])
def test_dpo_of_an_impossible_rejected_response(loss_type, expected):
    """log pi(rejected) = -inf is the pair fully won: loss 0, not 0 * inf = NaN from a label-smoothing term of weight
    0."""
    minus_1, impossible = torch.tensor([-1.0]), torch.tensor([-INF])
    assert dpo_loss(minus_1, impossible, minus_1, minus_1, loss_type=loss_type)[0].tolist() == [expected]


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [
    lambda: masked_mean(torch.ones(2, 3), torch.ones(2, 1)),
    lambda: masked_mean(torch.ones(2, 3), torch.ones(3)),
    lambda: masked_var(torch.ones(2, 3), torch.ones(3, 2)),
    lambda: whiten(torch.ones(2, 3), torch.ones(1, 3)),
    lambda: token_logprobs(torch.ones(2, 3, 5), torch.zeros(2, 1, dtype=torch.long)),
    lambda: token_logprobs(torch.ones(2, 3, 5), torch.zeros(2, 3, 5, dtype=torch.long)),
    lambda: kl_estimate(torch.ones(2, 3), torch.ones(2, 1)),
    lambda: exact_kl(torch.ones(2, 5), torch.ones(5)),
    lambda: shape_rewards(torch.ones(3), torch.ones(2, 3), torch.ones(2, 3), 0.1),
    lambda: shape_rewards(torch.ones(2, 1), torch.ones(2, 3), torch.ones(2, 3), 0.1),
    lambda: shape_rewards(torch.ones(2), torch.ones(2, 1), torch.ones(2, 3), 0.1),
    lambda: gae(torch.ones(2, 1), torch.ones(2, 3), torch.ones(2, 3)),
    lambda: gae(torch.ones(2, 3), torch.ones(2, 4), torch.ones(2, 3)),
    lambda: gae(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 1)),
    lambda: gae(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3), last_values=torch.ones(3)),
    lambda: gae(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3), last_values=torch.ones(1)),
    lambda: gae(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3), last_values=torch.ones(2, 1)),
    lambda: sft_loss(torch.ones(2, 3, 5), torch.zeros(2, 2, dtype=torch.long)),
    lambda: bradley_terry_loss(torch.ones(2), torch.ones(2, 1)),
    lambda: bradley_terry_loss(torch.ones(2), torch.ones(2), margin=torch.ones(1)),
    lambda: rating_loss(torch.ones(2, 1), torch.ones(2)),
    *(lambda i=i: ppo_policy_loss(*(torch.ones(2, 1 if j == i else 3) for j in range(4))) for i in range(4)),
    *(lambda i=i: ppo_value_loss(*(torch.ones(2, 1 if j == i else 3) for j in range(4))) for i in range(4)),
    *(lambda i=i: dpo_loss(*(torch.ones(1 if j == i else 3) for j in range(4))) for i in range(4)),
])
def test_shapes_that_would_broadcast_are_a_value_error(call):
    """(B, 1) against (B,) silently makes (B, B): the classic reward-model fault."""
    with pytest.raises(ValueError):
        call()


@pytest.mark.parametrize("call, named", [
    (lambda: kl_estimate(torch.ones(2), torch.ones(2), "k4"), "k4"),
    (lambda: kl_estimate(torch.ones(2), torch.ones(2), ""), "k1"),
    (lambda: dpo_loss(*logps(), loss_type="sigmiod"), "sigmiod"),
    (lambda: dpo_loss(*logps(), loss_type="kto"), "hinge"),
    (lambda: dpo_loss(*logps(), loss_type="ipo", label_smoothing=0.1), "label_smoothing"),
    (lambda: dpo_loss(*logps(), loss_type="hinge", label_smoothing=0.1), "label_smoothing"),
    (lambda: dpo_loss(*logps(), loss_type="robust", label_smoothing=0.5), "label_smoothing"),
    (lambda: dpo_loss(*logps(), label_smoothing=-0.1), "label_smoothing"),
    (lambda: dpo_loss(*logps(), label_smoothing=0.6), "label_smoothing"),
    (lambda: dpo_loss(*logps(), label_smoothing=NAN), "label_smoothing"),
    (lambda: ppo_policy_loss(*(torch.ones(1, 1),) * 4, dual_clip=1.0), "dual_clip"),
    (lambda: ppo_policy_loss(*(torch.ones(1, 1),) * 4, dual_clip=0.5), "dual_clip"),
    (lambda: token_logprobs(torch.ones(2), torch.tensor(0), 0.0), "temperature"),
    (lambda: token_logprobs(torch.ones(2), torch.tensor(0), -1.0), "temperature"),
    (lambda: exact_kl(torch.ones(2), torch.ones(2), 0.0), "temperature"),
    (lambda: AdaptiveKLController(0.1, 0.0, 100), "target"),
    (lambda: AdaptiveKLController(0.1, 6.0, 0), "horizon"),
])
def test_unknown_names_and_values_out_of_range_are_a_value_error_that_names_them(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def test_shape_errors_name_the_tensors():
    with pytest.raises(ValueError, match=r"values \(2, 4\)"):
        gae(torch.ones(2, 3), torch.ones(2, 4), torch.ones(2, 3))


# --- purity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [
    lambda x, y, z, m, s, t: [masked_mean(x, m), masked_var(x, m, True), whiten(x, m), whiten(x, m, center=False)],
    lambda x, y, z, m, s, t: [token_logprobs(x, s.long() % R, 0.7), exact_kl(x, y, 0.7)],
    lambda x, y, z, m, s, t: [kl_estimate(x, y, estimator) for estimator in ("k1", "k2", "k3", "abs")],
    lambda x, y, z, m, s, t: [shape_rewards(s, x, m, 1.0), shape_rewards(s, x, m.double(), 0.0)],
    lambda x, y, z, m, s, t: [gae(x, y, m, last_values=s), gae(x, y, m.double(), 0.9)],
    lambda x, y, z, m, s, t: [ppo_policy_loss(x, y, z, m, dual_clip=2.0), ppo_value_loss(x, y, z, m)],
    lambda x, y, z, m, s, t: [sft_loss(x, torch.where(m[:, 1], 2, -100))],
    lambda x, y, z, m, s, t: [rating_loss(s, t), bradley_terry_loss(s, t, s, 0.1)],
    lambda x, y, z, m, s, t: [dpo_loss(s, t, t, s, 0.1, kind) for kind in DPO_TYPES],
    lambda x, y, z, m, s, t: [dpo_loss(s, t, t, s, 0.1, kind, reference_free=True) for kind in DPO_TYPES],
])
def test_inputs_are_not_modified(function):
    """Not the tensors, nor the ones they are views of: a rollout is used again in every PPO epoch."""
    base = numbers(3, B, R)
    base[:, 1, 3:] = NAN
    inputs = [*base, lengths_mask((6, 3, 1, 4)), numbers(B, seed=5), numbers(B, seed=6)]
    copies = [tensor.clone() for tensor in inputs]
    function(*inputs)
    for tensor, copy in zip(inputs, copies):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)
