"""Statistics over the tokens that count: mean, variance and whitening under a mask.

Padding never reaches a result: masked entries may hold anything, NaN and infinities included, and receive zero gradient.
"""
import torch


def check_shapes(**tensors):
    """Raise a ValueError that names the tensors unless all have one shape; None entries are passed over."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes differ: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))


def keep(x, mask):
    """x * mask, with exact zeros where the mask is 0: 0 * NaN would be NaN, so the product alone does not mask."""
    return torch.where(mask != 0, x * mask, 0.0)  # 0.0 and not 0: whole numbers become floats


def widen(x):
    """float16 and bfloat16 as float32: the one has no sum above 65504, the other no odd count above 256."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def masked_mean(x, mask, dim=None):
    """Mean of x over the tokens of the mask: sum(x * mask) / sum(mask).

    Args:
        x: any shape, such as (B, R); gradient flows.
        mask: same shape, bool or float (a float mask is a weight per token).
        dim: the dimension or dimensions to reduce; None reduces all.
    Returns: the mean; 0 where the mask is empty. Half precision is summed in float32.
    """
    check_shapes(x=x, mask=mask)
    total, count = keep(widen(x), widen(mask)).sum(dim), widen(mask).sum(dim)
    mean, dtype = total / torch.where(count == 0, 1, count), torch.promote_types(x.dtype, mask.dtype)
    return mean.to(dtype) if dtype.is_floating_point else mean


def masked_var(x, mask, unbiased=False):
    """Variance of x over the tokens of the mask, biased (divided by n) unless told otherwise.

    Args:
        x: any shape, such as (B, R).
        mask: same shape, bool or float.
        unbiased: divide by n - 1 (Bessel's correction); one token then has variance 0, not NaN.
    Returns: a scalar.
    """
    wide, dtype = widen(x), torch.promote_types(x.dtype, mask.dtype)
    deviation = torch.where(mask != 0, wide - masked_mean(wide, mask), 0)  # zeroed before the square: its gradient would be NaN * 0
    variance = masked_mean(deviation ** 2, mask)
    if unbiased:
        count = widen(mask).sum()
        variance = variance * count / (count - 1).clamp(min=1)
    return variance.to(dtype) if dtype.is_floating_point else variance


def whiten(x, mask, center=True, unbiased=False, eps=1e-8):
    """Scale x to variance 1 over the tokens of the mask: (x - mean) / sqrt(var + eps).

    Args:
        x: (B, R).
        mask: (B, R), bool or float.
        center: subtract the mean for good; False adds it back after the division, so that only the scale changes.
        unbiased: variance over n - 1; the original PPO for language models (Ziegler et al. 2019) divides by n.
    Returns: (B, R), 0 where the mask is 0. A one-token mask gives 0 (the token itself without centring), not NaN.
    """
    wide = torch.where(mask != 0, x, 0).to(torch.promote_types(x.dtype, torch.float32))  # eps is 0 in float16
    mean, variance = masked_mean(wide, mask), masked_var(wide, mask, unbiased)
    whitened = (wide - mean) * torch.rsqrt(variance + eps)
    return torch.where(mask != 0, whitened if center else whitened + mean, 0).to(x.dtype)
