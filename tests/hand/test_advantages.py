"""advantages.py by hand: each docstring does the arithmetic, and the test states its result."""
import pytest
import torch

from nanorlhf.advantages import AdaptiveKLController, FixedKLController, gae, shape_rewards

NAN = float("nan")
MASK_TYPES = [torch.bool, torch.int64, torch.float32]


def close(tensor, expected):
    torch.testing.assert_close(tensor, torch.tensor(expected, dtype=tensor.dtype), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", MASK_TYPES)
def test_shaped_rewards(dtype):
    """kl_coef 0.5. Row 0 runs to the last column: -0.05, -0.1, -0.15 + 1 = 0.85. Row 1 ends after one token: -0.2 - 2 =
    -2.2 and zeros. Row 2 ends after two, with a negative KL that pays: -0.1, 0.5 * 0.6 + 3 = 3.3, 0."""
    kl = torch.tensor([[0.1, 0.2, 0.3], [0.4, NAN, NAN], [0.2, -0.6, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).to(dtype)
    rewards = shape_rewards(torch.tensor([1.0, -2.0, 3.0]), kl, mask, kl_coef=0.5)
    close(rewards, [[-0.05, -0.1, 0.85], [-2.2, 0.0, 0.0], [-0.1, 3.3, 0.0]])


def test_shaped_rewards_of_an_empty_response():
    """No token, no reward: not even the score, which must not wrap round to the last column."""
    rewards = shape_rewards(torch.tensor([5.0, 1.0]), torch.zeros(2, 2), torch.tensor([[0, 0], [1, 0]]), 0.1)
    close(rewards, [[0.0, 0.0], [1.0, 0.0]])


@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (0, 0)])
def test_shaped_rewards_of_nothing(shape):
    """No columns or no rows: rewards of that shape, as gae has it. No columns used to be an IndexError."""
    nothing = torch.zeros(shape)
    assert shape_rewards(torch.zeros(shape[0]), nothing, nothing != 0, 0.1).shape == shape
    assert gae(nothing, nothing, nothing != 0)[0].shape == shape


@pytest.mark.parametrize("dtype", MASK_TYPES)
def test_gae(dtype):
    """r = 1, 2, 3 and V = 0.5, 1, 1.5 with gamma = lam = 0.5, so gamma lam = 0.25.
    delta_2 = 3 - 1.5 = 1.5; delta_1 = 2 + 0.75 - 1 = 1.75; delta_0 = 1 + 0.5 - 0.5 = 1.
    A_2 = 1.5; A_1 = 1.75 + 0.25 * 1.5 = 2.125; A_0 = 1 + 0.25 * 2.125 = 1.53125. Returns A + V: 2.03125, 3.125, 3."""
    mask = torch.tensor([[1, 1, 1, 0]]).to(dtype)
    rewards, values = torch.tensor([[1.0, 2.0, 3.0, NAN]]), torch.tensor([[0.5, 1.0, 1.5, NAN]])
    advantages, returns = gae(rewards, values, mask, 0.5, 0.5)
    assert advantages.tolist() == [[1.53125, 2.125, 1.5, 0.0]]
    assert returns.tolist() == [[2.03125, 3.125, 3.0, 0.0]]


def test_gae_discounts_with_gamma_and_smooths_with_lam():
    """Unequal gamma = 0.5 and lam = 0.2, V = 1 throughout, r = 0, 1: delta_1 = 1 - 1 = 0, delta_0 = 0 + 0.5 - 1 = -0.5,
    A = -0.5, 0.
    With r = 0, 2: A_1 = 1, A_0 = -0.5 + 0.1 * 1 = -0.4. Swapping the two would give -0.8 + 0.1."""
    advantages, _ = gae(torch.tensor([[0.0, 1.0], [0.0, 2.0]]), torch.ones(2, 2), torch.ones(2, 2), gamma=0.5, lam=0.2)
    close(advantages, [[-0.5, 0.0], [-0.4, 1.0]])


def test_gae_default_gamma_and_lam():
    """gamma = 1, lam = 0.95, V = 0, score 1 at the end of three tokens: 0.95^2 = 0.9025, 0.95, 1."""
    advantages, returns = gae(torch.tensor([[0.0, 0.0, 1.0]]), torch.zeros(1, 3), torch.ones(1, 3))
    close(advantages, [[0.9025, 0.95, 1.0]])
    close(returns, [[0.9025, 0.95, 1.0]])


def test_gae_bootstraps_a_cut_response():
    """r = 1, 1 and V = 0, 0, then V(s_T) = 4, gamma = lam = 0.5: delta_1 = 1 + 0.5 * 4 = 3, delta_0 = 1, A_0 = 1 + 0.25
    * 3 = 1.75.
    The third column is padding: its garbage is not what is bootstrapped. The second row ended by itself: V(s_T) = 0."""
    rewards = torch.tensor([[1.0, 1.0, NAN], [1.0, 1.0, 7.0]])
    values = torch.tensor([[0.0, 0.0, 100.0], [0.0, 0.0, NAN]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    advantages, returns = gae(rewards, values, mask, 0.5, 0.5, last_values=torch.tensor([4.0, 0.0]))
    assert advantages.tolist() == [[1.75, 3.0, 0.0], [1.25, 1.0, 0.0]]
    assert returns.tolist() == [[1.75, 3.0, 0.0], [1.25, 1.0, 0.0]]


def test_gae_of_one_token_and_of_none():
    """One token: A = r - V = 2 - 0.5 = 1.5 and the return is r = 2. No token: zeros, whatever stands there."""
    rewards, values = torch.tensor([[2.0, NAN], [NAN, NAN]]), torch.tensor([[0.5, NAN], [NAN, NAN]])
    advantages, returns = gae(rewards, values, torch.tensor([[1, 0], [0, 0]]))
    assert advantages.tolist() == [[1.5, 0.0], [0.0, 0.0]]
    assert returns.tolist() == [[2.0, 0.0], [0.0, 0.0]]


def test_gae_of_whole_numbers():
    """Rewards 0, 1 (passed) and values 0 as integers: 0.95 and 1, and not the 0 that 0.95 would be cut to."""
    rewards = torch.tensor([[0, 1]])
    advantages, _ = gae(rewards, torch.zeros_like(rewards), torch.ones(1, 2))
    assert advantages[0].tolist() == pytest.approx([0.95, 1.0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gae_in_half_precision_is_summed_in_float32(dtype):
    """300 rewards of 1, V = 0, gamma = lam = 1: A_0 = 300. Summed in bfloat16 it would stop growing at 256, where 256 + 1 = 256.
    Of 3000 in float16, A_0 = 3000; there 2048 + 1 = 2048."""
    steps = 300 if dtype == torch.bfloat16 else 3000
    ones = torch.ones(1, steps, dtype=dtype)
    advantages, returns = gae(ones, torch.zeros_like(ones), ones != 0, lam=1.0)
    assert advantages[0, 0].item() == returns[0, 0].item() == steps and advantages.dtype == returns.dtype == dtype


@pytest.mark.parametrize("padding", [0, 1, 3])
def test_the_score_used_to_land_on_pad(padding):
    """A well-known PPO trainer put the score one slot after EOS wherever a slot followed: with V = 0, lam = 0.95 and
    score 1 the advantage at EOS was 0.95 in a padded row and 1.0 in the longest one, so equal responses were taught
    unequal things.
    Here the score is on EOS itself: 1.0 there and 0.95 on the token before, however much padding follows."""
    mask = torch.tensor([[1] * 3 + [0] * padding])
    rewards = shape_rewards(torch.tensor([1.0]), torch.zeros(1, 3 + padding), mask, kl_coef=0.1)
    close(rewards, [[0.0, 0.0, 1.0] + [0.0] * padding])
    advantages, _ = gae(rewards, torch.zeros(1, 3 + padding), mask, gamma=1.0, lam=0.95)
    close(advantages, [[0.9025, 0.95, 1.0] + [0.0] * padding])


def test_fixed_controller():
    """It stays at 0.15 whatever the KL."""
    controller = FixedKLController(0.15)
    for kl in (0.0, 6.0, 1000.0):
        controller.update(kl, 512)
    assert controller.value == 0.15


def test_adaptive_controller():
    """Start 0.1, target 6, horizon 100, 50 samples an update.
    KL 6.6: e = 0.6 / 6 = 0.1, value 0.1 * (1 + 0.1 * 50 / 100) = 0.105. KL 60: e = 9, clipped to 0.2: 0.105 * 1.1 =
    0.1155.
    KL 0: e = -1, clipped to -0.2: 0.1155 * 0.9 = 0.10395. KL 6: e = 0, no change. KL 5.4: e = -0.1, times 0.95 =
    0.0987525."""
    controller = AdaptiveKLController(0.1, target=6.0, horizon=100)
    assert controller.value == 0.1
    for kl, expected in [(6.6, 0.105), (60.0, 0.1155), (0.0, 0.10395), (6.0, 0.10395), (5.4, 0.0987525)]:
        controller.update(kl, 50)
        assert controller.value == pytest.approx(expected, rel=1e-9)


def test_adaptive_controller_counts_samples():
    """The original's horizon of 10,000 and batch of 512. KL 100: e = 0.2, 1 + 0.2 * 512 / 10,000 = 1.01024. KL 6.6: e =
    0.1, 1 + 0.1 * 0.0512 = 1.00512. The KL may be a tensor, of which none stays behind in the coefficient."""
    controller = AdaptiveKLController(0.15, 6.0, 10_000)
    for kl, expected in [(100.0, 0.15 * 1.01024), (6.6, 0.15 * 1.01024 * 1.00512)]:
        controller.update(torch.tensor(kl), 512)
        assert controller.value == pytest.approx(expected, rel=1e-7)
        assert isinstance(controller.value, float)


def test_adaptive_controller_with_a_small_target_and_horizon():
    """Target 0.5 nats, horizon 1, one sample, KL 0.55: e = 0.05 / 0.5 = 0.1, value 0.2 * (1 + 0.1 * 1 / 1) = 0.22."""
    controller = AdaptiveKLController(0.2, 0.5, 1)
    controller.update(0.55, 1)
    assert controller.value == pytest.approx(0.22)
