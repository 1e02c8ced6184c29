"""The one room that chooses between torch and Triton for the work that touches the vocabulary.

`choose` gives an `Ops`, a bundle of functions with one signature and two makers. The Triton ones are those of `kernels/`; the
torch ones are below, leaner twins of the definitions in logprobs.py that a CPU is glad of: the definition of `token_logprobs`
makes about six tensors of the logits' size and keeps three for the backward, the one here works through a few rows at a time,
in the cache, keeps nothing but the logits, and makes the gradient in one pass.
"""
import functools
import importlib
from dataclasses import dataclass
from typing import Callable

import torch
from torch.utils.checkpoint import checkpoint

from nanorlhf import advantages, logprobs
from nanorlhf.errors import InputError
from nanorlhf.logprobs import kl_estimate
from nanorlhf.losses import ppo_policy_loss
from nanorlhf.masked import masked_mean

LOWEST = -1e30  # stands for -inf
PART = 1 << 18  # entries of the buffer that the torch twins work in: 1 MB of float32, which a core's cache holds


# ---- token_logprobs, a few rows at a time

def _parts(rows, width):
    """Slices over so many rows of this width, each of about PART entries."""
    step = max(1, PART // width)
    return [slice(start, start + step) for start in range(0, rows, step)]


class _TokenLogprobs(torch.autograd.Function):
    """logits (N, V), targets (N,) -> logprobs (N,), entropy (N,). With z = logits / T - max and S = sum_v exp z:

        logprobs = z_target - log S              entropy = log S - sum_v p_v z_v
        T dlogits_v = g ([v = target] - p_v) - h p_v (log p_v + entropy)
    """

    @staticmethod
    def forward(ctx, logits, targets, temperature):
        found = torch.empty(4, len(logits), 1, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
        for part in _parts(*logits.shape):
            top = logits[part].amax(1, keepdim=True).to(found.dtype)  # (n, 1)
            z = _shifted(logits[part], top, temperature)  # (n, V)
            e = z.exp()
            mass = e.sum(1, keepdim=True)
            log_mass = mass.log()
            found[0, part] = (logits[part].gather(1, targets[part, None]) - top) / temperature - log_mass  # -inf stays -inf
            found[1, part] = log_mass - e.mul_(z).sum(1, keepdim=True) / mass
            found[2, part], found[3, part] = top, log_mass
        ctx.save_for_backward(logits, targets, found)
        ctx.temperature = temperature
        return found[0, :, 0].clone(), found[1, :, 0].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        logits, targets, found = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        g, h = (x[:, None].to(found.dtype) / ctx.temperature for x in (grad_logprobs, grad_entropy))  # (N, 1) each
        logprobs, entropy, top, log_mass = found
        level, slope = -(g + h * entropy), -h
        at_target = -g * torch.expm1(logprobs)  # g (1 - p), without the rounding of p
        at_target += slope * logprobs.exp() * (logprobs.clamp(min=LOWEST) + entropy)
        entropic = bool(h.any())
        for part in _parts(*logits.shape):
            logp = _shifted(logits[part], top[part], ctx.temperature).sub_(log_mass[part])  # (n, V)
            p = logp.exp()
            p *= torch.addcmul(level[part], logp, slope[part]) if entropic else level[part]
            gradient[part] = p.scatter_(1, targets[part, None], at_target[part])
        idle = (g == 0) & (h == 0)
        if idle.any():  # a masked token: 0 whatever its logits hold, NaN included
            gradient.masked_fill_(idle, 0.0)
        return gradient, None, None


def _shifted(rows, top, temperature):
    """(rows - top) / temperature in top's precision. The smallest is finite: where p is 0, p log p must be 0 and not NaN."""
    z = rows - top
    if temperature != 1:
        z.div_(temperature)
    return z.clamp_(min=LOWEST)


def token_logprobs(logits, targets, temperature=1.0):
    """`logprobs.token_logprobs`, value and gradient, with one buffer of PART entries beside the logits and their gradient."""
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"logits {tuple(logits.shape)} do not fit targets {tuple(targets.shape)}: want (..., V) and (...)")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    found = _TokenLogprobs.apply(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), temperature)
    return tuple(x.view(targets.shape) for x in found)


def linear_token_logprobs(hidden, weight, targets, temperature=1.0):
    """token_logprobs(hidden @ weight.T, targets, temperature) with the logits of a few rows at a time, computed again in the
    backward: hidden (..., C), weight (V, C), targets (...) -> logprobs, entropy (...)."""
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)

    def rows(part):
        with torch.autocast(flat.device.type, enabled=False):  # as GPT2.logits, which says why
            return token_logprobs(flat[part].to(weight.dtype) @ weight.T, wanted[part], temperature)

    parts = _parts(len(flat), len(weight) // 8 + 1) or [slice(0)]
    found = [checkpoint(rows, part, use_reentrant=False) for part in parts]
    return tuple(torch.cat(column).view(targets.shape) for column in zip(*found))


# ---- The PPO loss from logits

def ppo_loss(new_logprobs, entropy, logprobs, advantages, mask, cliprange=0.2, dual_clip=None, ref_logprobs=None, kl_coef=0.0,
             kl_estimator="k3", entropy_coef=0.0, denominator=None):
    """Clipped policy loss + kl_coef * KL - entropy_coef * entropy, token means over the mask: what `fused_ppo_loss` computes.

    Args: denominator, what the sums over tokens are divided by instead of the mask's own count; with the tokens of the whole
        optimiser step here, the losses of its micro-batches add up to the step's.
    Returns: loss (scalar), means over the mask {"policy_loss", "clipfrac", "approx_kl", "ratio", "entropy", "kl"}.
    """
    if kl_coef and ref_logprobs is None:
        raise ValueError("kl_coef needs ref_logprobs")
    loss, stats = ppo_policy_loss(new_logprobs, logprobs, advantages, mask, cliprange, dual_clip)
    stats = {"policy_loss": loss.item(), **stats, "entropy": masked_mean(entropy.detach(), mask).item()}
    if entropy_coef:
        loss = loss - entropy_coef * masked_mean(entropy, mask)
    if ref_logprobs is not None:
        kl = masked_mean(kl_estimate(new_logprobs, ref_logprobs, kl_estimator), mask)
        loss, stats["kl"] = loss + kl_coef * kl, kl.item()
    if denominator is not None:
        loss = loss * (mask.sum().to(loss.dtype) / denominator)
    return loss, stats


def fused_ppo_loss(logits, targets, logprobs, advantages, mask, temperature=1.0, **options):
    """`ppo_loss` from logits (..., V): the torch twin of kernels.fused_ppo_loss, by way of `token_logprobs`."""
    new_logprobs, entropy = token_logprobs(logits, targets, temperature)
    return ppo_loss(new_logprobs, entropy, logprobs, advantages, mask, **options)


# ---- The choice

@dataclass(frozen=True)
class Ops:
    """The functions of one maker; `low_memory`: logits never exist whole, they are computed a few rows or tiles at a time."""
    name: str
    low_memory: bool
    token_logprobs: Callable
    linear_token_logprobs: Callable
    fused_ppo_loss: Callable
    gae: Callable

    def score(self, model, hidden, targets, temperature):
        """Log-probs and entropy of targets (...) under a GPT2 whose last hidden states (..., C) predict them."""
        if self.low_memory:
            return self.linear_token_logprobs(hidden, model.output_weight, targets, temperature)
        return self.token_logprobs(model.logits(hidden), targets, temperature)

    def ppo_loss(self, model, hidden, targets, logprobs, advantages, mask, temperature, **options):
        """PPO's loss from the hidden states of a GPT2; see the function `ppo_loss` for the options."""
        if self.low_memory:
            new_logprobs, entropy = self.score(model, hidden, targets, temperature)
            return ppo_loss(new_logprobs, entropy, logprobs, advantages, mask, **options)
        return self.fused_ppo_loss(model.logits(hidden), targets, logprobs, advantages, mask, temperature, **options)


def choose(kernels="auto", device="cpu", low_memory=False):
    """The Ops that --kernels asks for: "triton" | "torch" | "auto", which is Triton on a CUDA device where it is installed.
    Says which. Triton where it cannot run is an InputError."""
    why = cannot_run_triton(torch.device(device))
    if kernels == "triton" and why:
        raise InputError(f"--kernels triton: {why}; --kernels torch runs anywhere")
    triton = not why and kernels != "torch"
    print(f"kernels: {'triton' if triton else 'torch'}" + (f" ({why})" if why and kernels == "auto" else "")
          + (", low memory: logits in parts" if low_memory else ""))
    return _triton(low_memory) if triton else Ops("torch", low_memory, token_logprobs, linear_token_logprobs, fused_ppo_loss,
                                                  advantages.gae)


def cannot_run_triton(device):
    """Why Triton kernels cannot run on a device; "" if they can."""
    if device.type != "cuda":
        return f"Triton needs a CUDA device, this is {device.type}"
    try:
        importlib.import_module("triton")
    except ImportError:
        return "the package triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    return "" if capability >= (8, 0) else f"the kernels need compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"


def _triton(low_memory):
    import kernels
    # in place: nobody needs the logits again, since a linear layer's backward does not read its output
    return Ops("triton", low_memory, kernels.token_logprobs, kernels.linear_token_logprobs,
               functools.partial(kernels.fused_ppo_loss, inplace=True), kernels.gae)


# The default of functions that take `ops`: log-probs by their definition, where the Ops of `choose` has its twin.
TORCH = Ops("torch", False, logprobs.token_logprobs, linear_token_logprobs, fused_ppo_loss, advantages.gae)
