"""masked.py by hand: each docstring does the arithmetic, and the test states its result."""
import math

import pytest
import torch

from nanorlhf.masked import masked_mean, masked_var, whiten

NAN = float("nan")
MASK_TYPES = [torch.bool, torch.int64, torch.float32]


@pytest.mark.parametrize("dtype", MASK_TYPES)
def test_mean_over_all_rows_and_columns(dtype):
    """Tokens 1, 2 and 4 count: (1 + 2 + 4) / 3 = 7/3, over rows (1 + 2) / 2 = 1.5 and 4, over columns 2.5, 2 and, with
    no token, 0. The 5, the NaN and the 3 are padding."""
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, NAN]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).to(dtype)
    assert masked_mean(x, mask).item() == pytest.approx(7 / 3)
    assert masked_mean(x, mask, dim=1).tolist() == [1.5, 4.0]
    assert masked_mean(x, mask, dim=-1).tolist() == [1.5, 4.0]
    assert masked_mean(x, mask, dim=0).tolist() == [2.5, 2.0, 0.0]
    assert masked_mean(x, mask, dim=(0, 1)).item() == pytest.approx(7 / 3)


def test_mean_with_weights():
    """A float mask is a weight: (0.5 * 2 + 1.5 * 4) / (0.5 + 1.5) = 7 / 2. Weights below 1 in sum do not shrink the
    mean:
    (0.25 * 1 + 0.25 * 3) / 0.5 = 2."""
    assert masked_mean(torch.tensor([2.0, 4.0]), torch.tensor([0.5, 1.5])).item() == 3.5
    assert masked_mean(torch.tensor([1.0, 3.0]), torch.tensor([0.25, 0.25])).item() == 2.0


def test_mean_of_booleans_is_a_share():
    """Two of the four counted tokens are true: 0.5."""
    x = torch.tensor([[True, False, True], [True, False, True]])
    assert masked_mean(x, torch.tensor([[1, 1, 0], [1, 1, 0]])).item() == 0.5


def test_mean_gradient():
    """d mean / d x = mask / count = 1/2 for each of the two tokens, 0 for padding."""
    x = torch.tensor([1.0, 2.0, NAN], requires_grad=True)
    masked_mean(x, torch.tensor([1, 1, 0])).backward()
    assert x.grad.tolist() == [0.5, 0.5, 0.0]


@pytest.mark.parametrize("dtype", MASK_TYPES)
def test_variance_biased_and_unbiased(dtype):
    """1, 2, 6 have mean 3 and deviations -2, -1, 3, squares 4 + 1 + 9 = 14: biased 14 / 3, unbiased 14 / 2 = 7."""
    x, mask = torch.tensor([[1.0, 2.0], [NAN, 6.0]]), torch.tensor([[1, 1], [0, 1]]).to(dtype)
    assert masked_var(x, mask).item() == pytest.approx(14 / 3)
    assert masked_var(x, mask, unbiased=True).item() == pytest.approx(7.0)


def test_variance_with_weights():
    """0 with weight 1 and 4 with weight 3: mean 12 / 4 = 3, deviations -3 and 1, variance (1 * 9 + 3 * 1) / 4 = 3."""
    assert masked_var(torch.tensor([0.0, 4.0]), torch.tensor([1.0, 3.0])).item() == 3.0


def test_variance_of_two_tokens():
    """2 and 4: mean 3, squares 1 + 1 = 2; biased 2 / 2 = 1, unbiased 2 / 1 = 2."""
    x, mask = torch.tensor([2.0, 4.0]), torch.ones(2)
    assert (masked_var(x, mask).item(), masked_var(x, mask, unbiased=True).item()) == (1.0, 2.0)


def test_variance_gradient():
    """d var / d x_i = 2 (x_i - mean) / n: for 2 and 4 it is 2 * -1 / 2 = -1 and 1; the infinite padding gets 0."""
    x = torch.tensor([2.0, 4.0, math.inf], requires_grad=True)
    masked_var(x, torch.tensor([True, True, False])).backward()
    assert x.grad.tolist() == [-1.0, 1.0, 0.0]


@pytest.mark.parametrize("dtype", MASK_TYPES)
def test_whiten(dtype):
    """2 and 4: mean 3, variance 1. With eps = 3 the divisor is sqrt(1 + 3) = 2: -0.5 and 0.5; the mean added back: 2.5,
    3.5.
    Unbiased variance 2 with eps = 2 has the same divisor. Padding gives 0 in each case."""
    x, mask = torch.tensor([[2.0, 9.0], [NAN, 4.0]]), torch.tensor([[1, 0], [0, 1]]).to(dtype)
    assert whiten(x, mask, eps=3.0).tolist() == [[-0.5, 0.0], [0.0, 0.5]]
    assert whiten(x, mask, center=False, eps=3.0).tolist() == [[2.5, 0.0], [0.0, 3.5]]
    assert whiten(x, mask, unbiased=True, eps=2.0).tolist() == [[-0.5, 0.0], [0.0, 0.5]]


def test_whiten_default_is_biased_and_centred():
    """2 and 4: biased variance 1 gives -1 and 1; the unbiased one would give -+0.707."""
    assert whiten(torch.tensor([[2.0, 4.0]]), torch.ones(1, 2)).tolist() == [[-1.0, 1.0]]


def test_whiten_gradient():
    """With s = (var + eps)^-1/2, y_0 = (x_0 - m) s, and for 2 and 4 with eps = 3: s = 1/2, ds/dvar = -s^3 / 2 = -1/16.
    dy_0/dx_0 = (1 - 1/2) s + (x_0 - m) ds/dvar dvar/dx_0 = 1/4 + (-1)(-1/16)(-1) = 3/16, and dy_0/dx_1 = -3/16: moving
    both tokens together changes nothing."""
    x = torch.tensor([[2.0, 4.0, 9.0]], requires_grad=True)
    whiten(x, torch.tensor([[1, 1, 0]]), eps=3.0)[0, 0].backward()
    assert x.grad.tolist() == [[3 / 16, -3 / 16, 0.0]]


@pytest.mark.parametrize("unbiased", [False, True])
def test_one_token_is_zero_not_nan(unbiased):
    """One token is its own mean: deviation 0, variance 0 (n - 1 = 0 must not divide), 0 * 1 / sqrt(eps) = 0."""
    x, mask = torch.tensor([[NAN, 7.0, NAN]]), torch.tensor([[0, 1, 0]])
    assert masked_var(x, mask, unbiased=unbiased).item() == 0.0
    assert whiten(x, mask, unbiased=unbiased).tolist() == [[0.0, 0.0, 0.0]]
    assert whiten(x, mask, center=False, unbiased=unbiased).tolist() == [[0.0, 7.0, 0.0]]  # 0 + mean


@pytest.mark.parametrize("dtype", MASK_TYPES)
def test_empty_mask_is_zero_not_nan(dtype):
    """0 tokens: the sum is 0, and 0 / 0 is taken to be 0."""
    x, mask = torch.tensor([[NAN, 1.0]]), torch.zeros(1, 2).to(dtype)
    assert masked_mean(x, mask).item() == 0.0
    assert masked_mean(x, mask, dim=1).tolist() == [0.0]
    assert masked_var(x, mask).item() == masked_var(x, mask, unbiased=True).item() == 0.0
    assert whiten(x, mask).tolist() == whiten(x, mask, center=False).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_and_counted_in_float32(dtype):
    """The mean of 513 ones under 513 ones is 513 / 513 = 1. bfloat16 counts 513 as 512, and the mean used to be 1.002.
    Of 70,000 ones too it is 1: float16 ends at 65,504, and inf / inf was NaN. 100 and -100, 35,000 of each: mean 0, variance
    10,000, in bfloat16 9,984, the next that it has; whitened 1 and -1."""
    ones = torch.ones(1, 513, dtype=dtype)
    assert masked_mean(ones.float(), ones).item() == 1.0
    many = torch.ones(1, 70_000, dtype=dtype)
    assert masked_mean(many, many).item() == masked_mean(many, many, dim=1).item() == masked_mean(many, many != 0).item() == 1.0
    sign = torch.cat([many[:, ::2], -many[:, ::2]], 1)
    assert masked_mean(100 * sign, many).item() == 0.0
    assert masked_var(100 * sign, many).item() == masked_var(100 * sign, many, unbiased=True).item() == torch.tensor(1e4).to(dtype).item()
    assert torch.equal(whiten(100 * sign, many), sign)


@pytest.mark.parametrize("of", [masked_mean, masked_var])
@pytest.mark.parametrize("x, mask, dtype", [
    (torch.float16, torch.bool, torch.float16), (torch.bfloat16, torch.int64, torch.bfloat16), (torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.float16, torch.float32), (torch.float32, torch.float64, torch.float64), (torch.int64, torch.bool, torch.float32),
])
def test_the_result_has_the_wider_precision_of_the_two(of, x, mask, dtype):
    assert of(torch.tensor([[1, 2]]).to(x), torch.tensor([[1, 1]]).to(mask)).dtype == dtype
