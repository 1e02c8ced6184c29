"""losses.py by hand: each docstring does the arithmetic, and the test states its result."""
import math

import pytest
import torch

from nanorlhf.losses import bradley_terry_loss, dpo_loss, ppo_policy_loss, ppo_value_loss, rating_loss, sft_loss

NAN, E = math.nan, math.e
LN2, LN3 = math.log(2), math.log(3)
MASK_TYPES = [torch.bool, torch.int64, torch.float32]


def close(tensor, expected):
    torch.testing.assert_close(tensor, torch.tensor(expected, dtype=tensor.dtype), rtol=1e-5, atol=1e-6)


def leaf(*values):
    return torch.tensor(values, requires_grad=True)


# --- SFT --------------------------------------------------------------------------------------------------------------


def test_sft():
    """Row 0: p = 1/4, 3/4, label 1: ln 4/3, and right. Row 1: p = 3/4, 1/4, label 1: ln 4, and wrong. Row 2 is ignored.
    Mean over 2 tokens: (ln 4/3 + ln 4) / 2 = ln 4 - ln 3 / 2; accuracy 1/2."""
    logits = torch.tensor([[[0.0, LN3], [LN3, 0.0], [50.0, -50.0]]])
    loss, stats = sft_loss(logits, torch.tensor([[1, 1, -100]]))
    close(loss, 2 * LN2 - LN3 / 2)
    assert stats == {"accuracy": 0.5, "tokens": 2.0}


def test_sft_gradient():
    """(p - onehot) / tokens: row 0 (1/4, 3/4 - 1) / 2 = (1/8, -1/8), row 1 (3/4, 1/4 - 1) / 2 = (3/8, -3/8), ignored:
    0."""
    logits = leaf([0.0, LN3], [LN3, 0.0], [50.0, -50.0])
    sft_loss(logits, torch.tensor([1, 1, -100]))[0].backward()
    close(logits.grad, [[1 / 8, -1 / 8], [3 / 8, -3 / 8], [0.0, 0.0]])


def test_sft_own_ignore_index():
    """With ignore_index = 0 the second row (label 0) does not count: ln 4/3 alone."""
    loss, stats = sft_loss(torch.tensor([[0.0, LN3], [LN3, 0.0]]), torch.tensor([1, 0]), ignore_index=0)
    close(loss, math.log(4 / 3))
    assert stats["tokens"] == 1.0


def test_sft_with_nothing_to_learn():
    """Every label ignored: 0 tokens, loss 0, gradient 0."""
    logits = leaf([1.0, 2.0])
    loss, stats = sft_loss(logits, torch.tensor([-100]))
    loss.backward()
    assert (loss.item(), stats["accuracy"], stats["tokens"]) == (0.0, 0.0, 0.0)
    assert logits.grad.tolist() == [[0.0, 0.0]]


# --- reward model -----------------------------------------------------------------------------------------------------


def test_bradley_terry():
    """Gaps ln 3 and -ln 3: -log 3/4 = ln 4/3 and -log 1/4 = ln 4; mean (ln 4/3 + ln 4) / 2. One of two pairs is in
    order."""
    loss, stats = bradley_terry_loss(torch.tensor([LN3 + 1, 0.0]), torch.tensor([1.0, LN3]))
    close(loss, 2 * LN2 - LN3 / 2)
    assert stats["accuracy"] == 0.5
    assert stats["margin"] == pytest.approx(0.0, abs=1e-6)


def test_bradley_terry_stats():
    """Gaps 2, 0 and 1: mean 1; a tie is not in order: 2/3."""
    _, stats = bradley_terry_loss(torch.tensor([3.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 0.0]))
    assert stats == pytest.approx({"accuracy": 2 / 3, "margin": 1.0})


def test_bradley_terry_margin():
    """Gap ln 3 less a margin of ln 3 is 0: ln 2. A margin of -ln 3 makes it 2 ln 3 = ln 9: -log 9/10. The accuracy is
    that of the gap, not of the gap less the margin."""
    scores = torch.tensor([LN3]), torch.tensor([0.0])
    loss, stats = bradley_terry_loss(*scores, margin=torch.tensor([LN3]))
    close(loss, LN2)
    assert stats["accuracy"] == 1.0
    close(bradley_terry_loss(*scores, margin=torch.tensor([-LN3]))[0], math.log(10 / 9))


def test_bradley_terry_centring():
    """Scores 1, 1 and 3, -1: pair losses ln 2 and log(1 + e^-4); sums 2 and 2, squares 4 and 4, mean 4, times 0.25 is
    1."""
    scores = torch.tensor([1.0, 3.0]), torch.tensor([1.0, -1.0])
    close(bradley_terry_loss(*scores, center_coef=0.25)[0], (LN2 + math.log1p(math.exp(-4))) / 2 + 1)


def test_bradley_terry_gradient():
    """-sigmoid(-gap) for the chosen score: gap ln 3 gives -1/4, the rejected gets 1/4. Centring with 0.5 adds
    2 * 0.5 * (ln 3 + 0) = ln 3 to each."""
    chosen, rejected = leaf(LN3), leaf(0.0)
    bradley_terry_loss(chosen, rejected)[0].backward()
    close(chosen.grad, [-0.25])
    close(rejected.grad, [0.25])
    chosen.grad = rejected.grad = None
    bradley_terry_loss(chosen, rejected, center_coef=0.5)[0].backward()
    close(chosen.grad, [LN3 - 0.25])
    close(rejected.grad, [LN3 + 0.25])


@pytest.mark.parametrize("gap, expected, slope", [
    (100.0, 0.0, 0.0), (-100.0, 100.0, -1.0), (1e4, 0.0, 0.0), (-1e4, 1e4, -1.0),
])
def test_bradley_terry_far_out(gap, expected, slope):
    """log(1 + e^-gap) is e^-100 = 0 at 100 and 100 at -100, where the naive form overflows; the slope -sigmoid(-gap) is
    0 or -1."""
    chosen = leaf(gap)
    loss, _ = bradley_terry_loss(chosen, torch.tensor([0.0]))
    loss.backward()
    close(loss, expected)
    close(chosen.grad, [slope])


def test_rating():
    """Errors 1 and -3: mean square (1 + 9) / 2 = 5, mean absolute error 2; gradient 2 * error / 2 = 1, -3."""
    scores = leaf(2.0, 1.0)
    loss, stats = rating_loss(scores, torch.tensor([1.0, 4.0]))
    loss.backward()
    assert loss.item() == 5.0
    assert stats == {"error": 2.0}
    assert scores.grad.tolist() == [1.0, -3.0]


# --- PPO policy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", MASK_TYPES)
def test_ppo_policy(dtype):
    """Log-ratios 1, 1, -1, -1 and advantages 1, -1, 1, -1, cliprange 0.2:
    A = 1, ratio e:    max(-e, -1.2) = -1.2, clipped.          A = -1, ratio e:   max(e, 1.2) = e.
    A = 1, ratio 1/e:  max(-1/e, -0.8) = -1/e.                 A = -1, ratio 1/e: max(1/e, 0.8) = 0.8, clipped.
    Loss (-1.2 + e - 1/e + 0.8) / 4; clipfrac 2/4; k3 of old against new r - 1 - log r: e - 2 twice and 1/e twice, mean
    (e - 2 + 1/e) / 2; mean ratio (e + 1/e) / 2. The fifth token is padding."""
    old = torch.tensor([[-2.0, -3.0, -1.0, -2.5, NAN]])
    new = old + torch.tensor([[1.0, 1.0, -1.0, -1.0, NAN]])
    advantages, mask = torch.tensor([[1.0, -1.0, 1.0, -1.0, NAN]]), torch.tensor([[1, 1, 1, 1, 0]]).to(dtype)
    loss, stats = ppo_policy_loss(new, old, advantages, mask)
    close(loss, (-1.2 + E - 1 / E + 0.8) / 4)
    assert stats["clipfrac"] == 0.5
    assert stats["approx_kl"] == pytest.approx((E - 2 + 1 / E) / 2, rel=1e-6)
    assert stats["ratio"] == pytest.approx((E + 1 / E) / 2, rel=1e-6)


def test_ppo_cliprange():
    """Ratio e, A = 1: cliprange 0.5 clips at 1.5, 0.01 at 1.01, and 2 not at all."""
    for cliprange, expected in [(0.5, -1.5), (0.01, -1.01), (2.0, -E)]:
        loss, _ = ppo_policy_loss(torch.ones(1, 1), torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1), cliprange)
        close(loss, expected)


@pytest.mark.parametrize("advantage, log_ratio, slope", [
    (2.0, 0.0, -2.0), (-2.0, 0.0, 2.0), (2.0, 0.1, -2.0 * math.exp(0.1)), (-2.0, -0.1, 2.0 * math.exp(-0.1)),
    (2.0, 1.0, 0.0), (-2.0, 1.0, 2.0 * E), (2.0, -1.0, -2.0 / E), (-2.0, -1.0, 0.0), (0.0, 1.0, 0.0),
])
def test_ppo_policy_gradient(advantage, log_ratio, slope):
    """d(-A ratio)/d new = -A ratio. It is cut to 0 where the step went far enough the right way: above 1.2 with A > 0,
    below 0.8 with A < 0; a step the wrong way keeps its gradient however far it went."""
    new = leaf([log_ratio])
    ppo_policy_loss(new, torch.zeros(1, 1), torch.full((1, 1), advantage), torch.ones(1, 1))[0].backward()
    close(new.grad, [[slope]])


def test_dual_clip():
    """A = -1: ratio e costs e; with d = 2 at most 2, with d = 3 still e. A = 1 at ratio e: -1.2 with or without; at
    ratio 1/e: -1/e. A = -1 at ratio 1/e: 0.8 is below the cap."""
    new, old = torch.tensor([[1.0, 1.0, -1.0, -1.0]]), torch.zeros(1, 4)
    advantages, mask = torch.tensor([[-1.0, 1.0, 1.0, -1.0]]), torch.ones(1, 4)
    rest = -1.2 - 1 / E + 0.8
    close(ppo_policy_loss(new, old, advantages, mask, dual_clip=2.0)[0], (2 + rest) / 4)
    close(ppo_policy_loss(new, old, advantages, mask, dual_clip=3.0)[0], (E + rest) / 4)


def test_dual_clip_gradient():
    """A = -1 at ratio e: the capped cost is constant, gradient 0; under the cap of 3 it is e."""
    for dual_clip, slope in [(2.0, 0.0), (3.0, E), (None, E)]:
        new = leaf([1.0])
        ppo_policy_loss(new, torch.zeros(1, 1), -torch.ones(1, 1), torch.ones(1, 1), dual_clip=dual_clip)[0].backward()
        close(new.grad, [[slope]])


@pytest.mark.parametrize("log_ratio, clamped", [(1000.0, 20.0), (-1000.0, -20.0), (19.0, 19.0), (-19.0, -19.0)])
def test_log_ratio_is_clamped(log_ratio, clamped):
    """exp(1000) overflows, exp(20) = 4.9e8 does not. A = -1 takes the larger of ratio and its clip: exp(20), and 0.8
    below. k3 is e^x - 1 - x at the clamped x: 4.9e8 - 21 and 19."""
    loss, stats = ppo_policy_loss(torch.full((1, 1), log_ratio), torch.zeros(1, 1), -torch.ones(1, 1), torch.ones(1, 1))
    close(loss, max(math.exp(clamped), 0.8))
    assert stats["approx_kl"] == pytest.approx(math.exp(clamped) - 1 - clamped, rel=1e-6)


def test_first_minibatch_of_the_first_epoch():
    """new = old: ratio 1, approx_kl 0, clipfrac 0, and the loss is -mean(A) = -(3 - 1) / 2 = -1."""
    logprobs = torch.tensor([[-1.0, -2.0, NAN]])
    loss, stats = ppo_policy_loss(logprobs, logprobs, torch.tensor([[3.0, -1.0, 50.0]]), torch.tensor([[1, 1, 0]]))
    assert loss.item() == -1.0
    assert stats == {"clipfrac": 0.0, "approx_kl": 0.0, "ratio": 1.0}


# --- PPO value --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", MASK_TYPES)
def test_ppo_value(dtype):
    """c = 0.2. V = 1 from 0, R = 0.5: max(0.25, (0.2 - 0.5)^2 = 0.09) = 0.25. V = 1 from 0, R = 2: max(1, (0.2 - 2)^2 =
    3.24) = 3.24, clipped. V = -1 from 0, R = -2: by symmetry 3.24, clipped. V = 0.1 from 0, R = 1: inside, 0.81.
    Loss 0.5 * (0.25 + 3.24 + 3.24 + 0.81) / 4 = 0.9425; clipfrac 2/4; mean |V - R| (0.5 + 1 + 1 + 0.9) / 4 = 0.85."""
    new, old = torch.tensor([[1.0, 1.0, -1.0, 0.1, NAN]]), torch.tensor([[0.0, 0.0, 0.0, 0.0, NAN]])
    returns, mask = torch.tensor([[0.5, 2.0, -2.0, 1.0, NAN]]), torch.tensor([[1, 1, 1, 1, 0]]).to(dtype)
    loss, stats = ppo_value_loss(new, old, returns, mask)
    close(loss, 0.9425)
    assert stats == pytest.approx({"clipfrac": 0.5, "error": 0.85})


def test_ppo_value_clips_around_the_old_value():
    """V = 7 from V_old = 5, c = 0.5, R = 8: clip to 5.5, max(1, 6.25) = 6.25, halved 3.125. Around 0 it would clip to
    0.5."""
    args = [torch.tensor([[x]]) for x in (7.0, 5.0, 8.0, 1.0)]
    close(ppo_value_loss(*args, cliprange_value=0.5)[0], 3.125)


def test_ppo_value_without_clipping():
    """c = None: V = 1 from 0, R = 2 costs 0.5 * 1."""
    args = [torch.tensor([[x]]) for x in (1.0, 0.0, 2.0, 1.0)]
    loss, stats = ppo_value_loss(*args, cliprange_value=None)
    assert (loss.item(), stats["clipfrac"]) == (0.5, 0.0)


@pytest.mark.parametrize("value, target, slope", [
    (1.0, 0.5, 0.5), (1.0, 2.0, 0.0), (-1.0, -2.0, 0.0), (0.1, 1.0, -0.9), (-1.0, 2.0, -3.0), (1.0, -2.0, 3.0),
])
def test_ppo_value_gradient(value, target, slope):
    """V - R, from V_old = 0 with c = 0.2; cut to 0 where V has already moved by more than c towards a return beyond
    it."""
    new = leaf([value])
    ppo_value_loss(new, torch.zeros(1, 1), torch.full((1, 1), target), torch.ones(1, 1))[0].backward()
    close(new.grad, [[slope]])


def test_ppo_of_one_token_and_of_none():
    """One token among padding is its own mean, and no token at all is loss 0 with gradient 0."""
    new, x = leaf([NAN, 3.0]), torch.tensor([[NAN, 1.0]])
    close(ppo_value_loss(new, x, x, torch.tensor([[0, 1]]))[0], 2.0)
    close(ppo_policy_loss(new, x, x, torch.tensor([[0, 1]]))[0], -1.2)
    for loss, stats in (ppo_value_loss(new, x, x, torch.zeros(1, 2)), ppo_policy_loss(new, x, x, torch.zeros(1, 2))):
        assert torch.autograd.grad(loss, new)[0].tolist() == [[0.0, 0.0]]
        assert loss.item() == 0.0 and set(stats.values()) == {0.0}


# --- DPO --------------------------------------------------------------------------------------------------------------

# log pi: chosen -1, rejected -4; log ref: -2 and -3. Log-ratios 1 and -1, so h = 2.
LOGPS = tuple(torch.tensor([x]) for x in (-1.0, -4.0, -2.0, -3.0))
BETA = LN3 / 2  # beta h = ln 3: sigmoid is 3/4


@pytest.mark.parametrize("arguments, expected", [
    (dict(beta=BETA), math.log(4 / 3)),
    (dict(beta=BETA, label_smoothing=0.25), 0.75 * math.log(4 / 3) + 0.25 * math.log(4)),
    (dict(beta=BETA, label_smoothing=0.5), 0.5 * math.log(4 / 3) + 0.5 * math.log(4)),
    (dict(beta=BETA, loss_type="robust"), math.log(4 / 3)),
    (dict(beta=BETA, loss_type="robust", label_smoothing=0.25), (0.75 * math.log(4 / 3) - 0.25 * math.log(4)) / 0.5),
    (dict(beta=0.1, loss_type="ipo"), 9.0),
    (dict(beta=0.5, loss_type="ipo"), 1.0),
    (dict(beta=0.1, loss_type="hinge"), 0.8),
    (dict(beta=1.0, loss_type="hinge"), 0.0),
    (dict(beta=BETA, reference_free=True), math.log1p(math.exp(-1.5 * LN3))),
    (dict(loss_type="ipo", beta=0.5, reference_free=True), 4.0),
    ({}, math.log1p(math.exp(-0.2))),
])
def test_dpo(arguments, expected):
    """h = (-1 + 4) - (-2 + 3) = 2; beta h = ln 3: -log 3/4 = ln 4/3, and the flipped label costs -log 1/4 = ln 4.
    Smoothed by 1/4: 3/4 ln 4/3 + 1/4 ln 4; robust: (3/4 ln 4/3 - 1/4 ln 4) / (1 - 1/2).
    IPO: (2 - 1 / 0.2)^2 = 9, (2 - 1)^2 = 1. Hinge: 1 - 0.2 = 0.8, and 1 - 2 below 0. Without a reference h = 3.
    The defaults are the sigmoid loss at beta = 0.1."""
    close(dpo_loss(*LOGPS, **arguments)[0], [expected])


def test_dpo_rewards():
    """beta (log pi - log ref): 0.1 * 1 and 0.1 * -1, per pair and without gradient."""
    _, chosen, rejected = dpo_loss(leaf(-1.0), leaf(-4.0), *LOGPS[2:], beta=0.1)
    close(chosen, [0.1])
    close(rejected, [-0.1])
    assert not chosen.requires_grad and not rejected.requires_grad


@pytest.mark.parametrize("arguments, slope", [
    (dict(beta=BETA), -BETA / 4),
    (dict(beta=BETA, label_smoothing=0.25), -BETA * (0.75 / 4 - 0.25 * 3 / 4)),
    (dict(beta=BETA, label_smoothing=0.125), -BETA * (0.875 / 4 - 0.125 * 3 / 4)),
    (dict(beta=BETA, loss_type="robust", label_smoothing=0.25), -BETA * (0.75 / 4 + 0.25 * 3 / 4) / 0.5),
    (dict(beta=0.1, loss_type="ipo"), -6.0),
    (dict(beta=0.5, loss_type="ipo"), 2.0),
    (dict(beta=0.1, loss_type="hinge"), -0.1),
    (dict(beta=1.0, loss_type="hinge"), 0.0),
])
def test_dpo_gradient(arguments, slope):
    """Sigmoid: -beta sigmoid(-beta h) = -beta / 4 for the chosen, the negative for the rejected. The flipped label adds
    +e beta sigmoid(beta h) = e beta 3/4: with e = 1/4 the two cancel, as 3/4 is where a smoothed label is met exactly;
    robust subtracts it and divides by 1 - 2e. IPO: 2 (h - 1 / (2 beta)) = 2 (2 - 5) = -6, and 2 (2 - 1) = 2. Hinge:
    -beta, or 0 past 1."""
    chosen, rejected = leaf(-1.0), leaf(-4.0)
    dpo_loss(chosen, rejected, *LOGPS[2:], **arguments)[0].sum().backward()
    close(chosen.grad, [slope])
    close(rejected.grad, [-slope])
