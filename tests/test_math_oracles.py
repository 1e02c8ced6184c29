"""The mathematics against peers: TRL 1.16's real trainer methods on stub objects, torch.distributions, and slow float64
loops."""
import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanorlhf.advantages import AdaptiveKLController, gae, shape_rewards
from nanorlhf.logprobs import exact_kl, kl_estimate, token_logprobs
from nanorlhf.losses import bradley_terry_loss, dpo_loss, ppo_policy_loss, ppo_value_loss, rating_loss, sft_loss
from nanorlhf.masked import masked_mean, masked_var, whiten

B, R, V = 5, 7, 13
LENGTHS = (7, 1, 4, 3, 6)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lengths_mask():
    return torch.arange(R) < torch.tensor(LENGTHS).unsqueeze(1)  # (B, R)


def same(ours, theirs, tolerance=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, check_dtype=False)


class Alone:
    """An accelerator of one process: gathering and reducing give back what they got."""

    device, num_processes = torch.device("cpu"), 1

    def gather(self, x):
        return x

    gather_for_metrics = gather

    def reduce(self, x, reduction):
        return x


def trainer(**settings):
    """What a trainer's loss method reads of its trainer, with everything optional turned off."""
    common = dict(accelerator=Alone(), model=SimpleNamespace(training=False), aux_loss_enabled=False,
                  _total_train_tokens=0, _tp_size=1, _metrics={"eval": defaultdict(list)})
    return SimpleNamespace(**common | settings)


# --- TRL: DPO ---------------------------------------------------------------------------------------------------------


def trl_dpo(policy, reference, mask, beta, loss_type, label_smoothing=0.0):
    """TRL's DPOTrainer._compute_loss on given per-token log-probs (2B, R), chosen rows first. Returns its loss and its
    metrics."""
    from trl.trainer.dpo_trainer import DPOTrainer

    def model(**_):
        zeros = torch.zeros_like(policy)
        return SimpleNamespace(log_probs=policy * mask, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    stub = trainer(beta=beta, loss_types=[loss_type], loss_weights=[1.0], label_smoothing=label_smoothing,
                   f_divergence_type="reverse_kl", ld_alpha=None, precompute_ref_logps=True, use_weighting=False)
    ref_chosen, ref_rejected = (reference * mask).sum(1).chunk(2)
    prompt = torch.zeros(len(mask), 1, dtype=torch.long)  # one prompt token, which TRL shifts away
    completion_mask = torch.cat([prompt, mask.long()], 1)
    inputs = dict(input_ids=torch.ones_like(completion_mask), attention_mask=completion_mask,
                  completion_mask=completion_mask, ref_chosen_logps=ref_chosen, ref_rejected_logps=ref_rejected)
    loss = DPOTrainer._compute_loss(stub, model, inputs, False)
    return loss, {key: value[0] for key, value in stub._metrics["eval"].items()}


def pairs(seed=0):
    """Per-token log-probs of 2B responses under policy and reference, and their mask."""
    policy, reference = (-numbers(2 * B, R, seed=seed + i).abs() * 2 for i in range(2))
    return policy.requires_grad_(), reference, torch.cat([lengths_mask(), lengths_mask().flip(0)])


def ours_dpo(policy, reference, mask, beta, loss_type, label_smoothing=0.0):
    """Our loss of the same per-token log-probs: sums, or per-token means for IPO."""
    mean = loss_type == "ipo"
    sums = [(logprobs * mask).sum(1) / (mask.sum(1) if mean else 1) for logprobs in (policy, reference)]
    (chosen, rejected), (ref_chosen, ref_rejected) = (logps.chunk(2) for logps in sums)
    return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, loss_type, label_smoothing)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge", "robust"])
@pytest.mark.parametrize("beta", [0.05, 0.1, 0.5])
def test_dpo_equals_trl(loss_type, beta):
    """Loss, gradient to each token's log-prob, and the logged rewards. Robust with a smoothing of 0.2."""
    policy, reference, mask = pairs()
    smoothing = 0.2 if loss_type == "robust" else 0.0
    theirs, metrics = trl_dpo(policy, reference, mask, beta, loss_type, smoothing)
    losses, chosen, rejected = ours_dpo(policy, reference, mask, beta, loss_type, smoothing)
    same(losses.mean(), theirs)
    same(*(torch.autograd.grad(loss, policy)[0] for loss in (losses.mean(), theirs)))
    if loss_type != "ipo":  # TRL logs sums for IPO too, though its loss takes means
        assert chosen.mean().item() == pytest.approx(metrics["rewards/chosen"], rel=1e-12)
        assert rejected.mean().item() == pytest.approx(metrics["rewards/rejected"], rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_smoothed_dpo_equals_trl_pair_by_pair(smoothing):
    """TRL's "sigmoid" ignores label_smoothing; its "aot" honours it and, for a single pair, has nothing to sort: then
    it is cDPO."""
    policy, reference, mask = pairs()
    losses = ours_dpo(policy, reference, mask, 0.3, "sigmoid", smoothing)[0]
    for i in range(B):
        rows = [i, i + B]
        theirs, _ = trl_dpo(policy[rows], reference[rows], mask[rows], 0.3, "aot", smoothing)
        same(losses[i], theirs)
        same(*(torch.autograd.grad(loss, policy, retain_graph=True)[0] for loss in (losses[i], theirs)))


# --- TRL: reward model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_margin", [False, True])
@pytest.mark.parametrize("center_coef", [0.0, 0.3])
def test_bradley_terry_equals_trl(with_margin, center_coef):
    from trl.trainer.reward_trainer import RewardTrainer

    scores = (numbers(2 * B) * 2).requires_grad_()
    margin = numbers(B, seed=1).abs() if with_margin else None
    stub = trainer(args=SimpleNamespace(center_rewards_coefficient=center_coef or None))
    inputs = {"attention_mask": torch.ones(1)} | ({"margin": margin} if with_margin else {})
    theirs = RewardTrainer.compute_loss(stub, lambda **_: SimpleNamespace(logits=scores.unsqueeze(1)), inputs)
    ours, stats = bradley_terry_loss(*scores.chunk(2), margin, center_coef)
    same(ours, theirs)
    same(*(torch.autograd.grad(loss, scores)[0] for loss in (ours, theirs)))
    assert stats["accuracy"] == pytest.approx(stub._metrics["eval"]["accuracy"][0])
    assert stats["margin"] == pytest.approx(stub._metrics["eval"]["margin"][0])


# --- TRL: the clipped surrogate and k3, in its GRPO trainer -----------------------------------------------------------


def trl_policy(new, old, ref, advantages, mask, cliprange, dual_clip, beta):
    """TRL's GRPOTrainer._compute_loss with the token-mean ("bnpo") denominator, which is PPO's clipped surrogate."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    stub = trainer(_get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(new), None),
                   args=SimpleNamespace(delta=dual_clip, use_bias_correction_kl=False), beta=beta, loss_type="bnpo",
                   epsilon_low=cliprange, epsilon_high=cliprange, importance_sampling_level="token", use_vllm=False,
                   top_entropy_quantile=1.0, off_policy_mask_threshold=None, _entropy_bonus_enabled=False)
    ids = torch.ones(B, R, dtype=torch.long)
    inputs = dict(prompt_ids=ids[:, :1], prompt_mask=ids[:, :1], completion_ids=ids, completion_mask=mask.double(),
                  advantages=advantages, old_per_token_logps=old, ref_per_token_logps=ref)
    loss = GRPOTrainer._compute_loss(stub, None, inputs)
    return loss, {key: value[0] for key, value in stub._metrics["eval"].items()}


@pytest.mark.parametrize("cliprange", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("dual_clip", [None, 2.0])
def test_policy_loss_equals_trl(cliprange, dual_clip):
    """TRL's `delta` caps the ratio at d, which for d > 1 + cliprange is the dual clip."""
    new, old, advantages = (numbers(B, R, seed=i) for i in range(3))
    new.requires_grad_()
    mask = lengths_mask()
    ours, stats = ppo_policy_loss(new, old, advantages, mask, cliprange, dual_clip)
    theirs, metrics = trl_policy(new, old, None, advantages, mask, cliprange, dual_clip, beta=0.0)
    same(ours, theirs)
    same(*(torch.autograd.grad(loss, new)[0] for loss in (ours, theirs)))
    assert stats["clipfrac"] == pytest.approx(metrics["clip_ratio/region_mean"])


def test_k3_equals_trl():
    """Its GRPO penalty is k3 of the policy against the reference; the logged metric is its mean over tokens."""
    new, ref, advantages = (numbers(B, R, seed=i) for i in range(3))
    new.requires_grad_()
    mask = lengths_mask()
    theirs, metrics = trl_policy(new, new.detach(), ref, advantages, mask, 0.2, None, beta=0.4)
    k3 = masked_mean(kl_estimate(new, ref, "k3"), mask)
    ours = ppo_policy_loss(new, new.detach(), advantages, mask)[0] + 0.4 * k3
    same(ours, theirs)
    same(*(torch.autograd.grad(loss, new)[0] for loss in (ours, theirs)))
    assert k3.item() == pytest.approx(metrics["kl"], rel=1e-12)


# --- TRL, transformers and torch: log-probs, entropy, KL, cross-entropy -----------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_logprobs_and_entropy_equal_trl_and_torch(temperature):
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    logits, targets = (numbers(B, R, V) * 3).requires_grad_(), torch.arange(B * R).view(B, R) % V
    ours = token_logprobs(logits, targets, temperature)
    distribution = torch.distributions.Categorical(logits=logits / temperature)
    trl = selective_log_softmax(logits, targets, temperature), entropy_from_logits(logits / temperature)
    for theirs in (trl, (distribution.log_prob(targets), distribution.entropy())):
        for a, b in zip(ours, theirs):
            same(a, b)
            same(*(torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (a, b)))


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_exact_kl_equals_torch(temperature):
    logits, ref = (numbers(B, R, V) * 3).requires_grad_(), (numbers(B, R, V, seed=1) * 3).requires_grad_()
    p, q = (torch.distributions.Categorical(logits=z / temperature) for z in (logits, ref))
    ours, theirs = exact_kl(logits, ref, temperature), torch.distributions.kl_divergence(p, q)
    same(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours.sum(), (logits, ref)), torch.autograd.grad(theirs.sum(), (logits, ref))):
        same(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float32_against_float64_at_gpt2s_vocabulary(dtype):
    """50,257 logits, rounded to the dtype first; what remains is float32's error. A log-prob off by 1e-5 moves a ratio
    by 1e-5, nothing against a cliprange of 0.2; entropy and KL are held to the same share of themselves."""
    logits, ref = ((numbers(4, 50257, seed=i) * 3).to(dtype) for i in range(2))
    targets = torch.tensor([0, 1, 40000, 50256])
    (logprobs, entropy), kl = token_logprobs(logits, targets), exact_kl(logits, ref)
    exact_logprobs, exact_entropy = token_logprobs(logits.double(), targets)
    torch.testing.assert_close(logprobs.double(), exact_logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.double(), exact_entropy, rtol=1e-5, atol=0)
    torch.testing.assert_close(kl.double(), exact_kl(logits.double(), ref.double()), rtol=1e-5, atol=0)


def test_exact_kl_of_close_distributions():
    """A policy a hundredth of a nat from its reference: the sum over 50,257 tokens keeps three digits in float32."""
    logits = numbers(8, 50257).float()
    ref = logits + 0.15 * numbers(8, 50257, seed=1).float()
    expected = exact_kl(logits.double(), ref.double())
    assert 0.005 < expected.min() and expected.max() < 0.02
    torch.testing.assert_close(exact_kl(logits, ref).double(), expected, rtol=1e-3, atol=0)


def test_sft_equals_transformers():
    """Its causal-LM loss shifts inside; given aligned labels and the number of items it is the same mean."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits = (numbers(B, R, V) * 3).float().requires_grad_()
    labels = torch.where(lengths_mask(), torch.arange(B * R).view(B, R) % V, -100)
    ours, stats = sft_loss(logits, labels)
    theirs = ForCausalLMLoss(logits, None, V, num_items_in_batch=lengths_mask().sum(), shift_labels=labels)
    same(ours, theirs, 1e-6)
    same(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)), 1e-6)
    assert stats["tokens"] == sum(LENGTHS)
    assert stats["accuracy"] == pytest.approx((logits.argmax(-1) == labels)[lengths_mask()].double().mean().item())


def test_rating_loss_equals_torch():
    scores, ratings = numbers(B), numbers(B, seed=1)
    loss, stats = rating_loss(scores, ratings)
    same(loss, torch.nn.functional.mse_loss(scores, ratings))
    assert stats["error"] == pytest.approx(torch.nn.functional.l1_loss(scores, ratings).item())


# --- slow loops, written from the definitions -------------------------------------------------------------------------


def slow_gae(rewards, values, lengths, gamma, lam, last_values):
    """A_t = sum_l (gamma lam)^l delta_{t+l}: Eq. 16 of the paper as a sum, with no recursion."""
    advantages = np.zeros_like(rewards)
    for b, length in enumerate(lengths):
        v = [*values[b, :length], last_values[b]]
        delta = [rewards[b, t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            advantages[b, t] = sum((gamma * lam) ** l * delta[t + l] for l in range(length - t))
    return advantages


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.99, 0.9), (0.9, 1.0), (1.0, 0.0), (0.5, 0.3)])
@pytest.mark.parametrize("bootstrap", [False, True])
def test_gae_equals_the_sum_over_deltas(gamma, lam, bootstrap):
    rewards, values, last_values = numbers(B, R), numbers(B, R, seed=1), numbers(B, seed=2)
    after = last_values if bootstrap else torch.zeros(B)
    expected = slow_gae(rewards.numpy(), values.numpy(), LENGTHS, gamma, lam, after.numpy())
    advantages, returns = gae(rewards, values, lengths_mask(), gamma, lam, last_values if bootstrap else None)
    same(advantages, torch.from_numpy(expected))
    same(returns, torch.from_numpy(expected) + values * lengths_mask())


def test_gae_is_the_weighted_mean_of_k_step_advantages():
    """The paper's other form of the estimator: (1 - lam) sum_k lam^{k-1} A^(k), the last step taking all the weight
    that is left."""
    rewards, values = numbers(R), numbers(R, seed=1)
    gamma, lam = 0.9, 0.7
    v = [*values.tolist(), 0.0]
    for t in range(R):
        horizon = R - t
        steps = [sum(gamma ** i * rewards[t + i].item() for i in range(k)) + gamma ** k * v[t + k] - v[t]
                 for k in range(1, horizon + 1)]
        weights = [(1 - lam) * lam ** (k - 1) for k in range(1, horizon)] + [lam ** (horizon - 1)]
        expected = sum(w * a for w, a in zip(weights, steps))
        advantages, _ = gae(rewards[None], values[None], torch.ones(1, R), gamma, lam)
        assert advantages[0, t].item() == pytest.approx(expected, rel=1e-10)


def test_shaped_rewards_equal_a_loop():
    scores, kl = numbers(B), numbers(B, R, seed=1)
    expected = np.zeros((B, R))
    for b, length in enumerate(LENGTHS):
        for t in range(length):
            expected[b, t] = -0.15 * kl[b, t].item() + (scores[b].item() if t == length - 1 else 0.0)
    same(shape_rewards(scores, kl, lengths_mask(), 0.15), torch.from_numpy(expected))


def test_ppo_losses_equal_a_loop():
    """The two losses token by token in plain Python, from the case analysis rather than from max and clamp."""
    new, old, target, mask = numbers(B, R), numbers(B, R, seed=1), numbers(B, R, seed=2), lengths_mask()
    policy = value = policy_clipped = value_clipped = kl = 0.0
    for b, length in enumerate(LENGTHS):
        for t in range(length):
            n, o, a = new[b, t].item(), old[b, t].item(), target[b, t].item()
            ratio = math.exp(n - o)
            kl += ratio - 1 - (n - o)
            limit = 1.2 if a > 0 else 0.8
            beyond = ratio > limit if a > 0 else ratio < limit
            policy += -a * (limit if beyond else ratio)
            policy_clipped += beyond
            near = o + 0.2 if n > o + 0.2 else o - 0.2 if n < o - 0.2 else n
            value += 0.5 * max((n - a) ** 2, (near - a) ** 2)
            value_clipped += (near - a) ** 2 > (n - a) ** 2
    tokens = sum(LENGTHS)
    loss, stats = ppo_policy_loss(new, old, target, mask)
    assert loss.item() == pytest.approx(policy / tokens, rel=1e-12)
    assert stats["clipfrac"] == pytest.approx(policy_clipped / tokens)
    assert stats["approx_kl"] == pytest.approx(kl / tokens, rel=1e-6)
    loss, stats = ppo_value_loss(new, old, target, mask)
    assert loss.item() == pytest.approx(value / tokens, rel=1e-12)
    assert stats["clipfrac"] == pytest.approx(value_clipped / tokens)


@pytest.mark.parametrize("unbiased", [False, True])
def test_whitening_equals_numpy(unbiased):
    x, mask = numbers(B, R) * 4 - 2, lengths_mask()
    tokens = x.numpy()[mask.numpy()]
    mean, variance = tokens.mean(), tokens.var(ddof=int(unbiased))
    assert masked_mean(x, mask).item() == pytest.approx(mean, rel=1e-12)
    assert masked_var(x, mask, unbiased).item() == pytest.approx(variance, rel=1e-12)
    expected = np.where(mask.numpy(), (x.numpy() - mean) / np.sqrt(variance + 1e-8), 0)
    same(whiten(x, mask, unbiased=unbiased), torch.from_numpy(expected))
    same(whiten(x, mask, center=False, unbiased=unbiased), torch.from_numpy(np.where(mask.numpy(), expected + mean, 0)))


def test_adaptive_controller_equals_numpy():
    """A random walk of KLs through e = clip((kl - target) / target, -0.2, 0.2), value *= 1 + e n / horizon."""
    controller, value = AdaptiveKLController(0.15, 6.0, 10_000), 0.15
    for kl, n in zip(np.abs(numbers(100).numpy()) * 8, np.arange(100) % 7 * 64):
        controller.update(kl, int(n))
        value *= 1 + np.clip((kl - 6.0) / 6.0, -0.2, 0.2) * n / 10_000
        assert controller.value == pytest.approx(value, rel=1e-12)
