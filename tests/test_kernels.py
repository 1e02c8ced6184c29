"""kernels/ against the definitions in nanorlhf/: log-probs, exact KL, GAE, the fused PPO and DPO losses.

Most tests run where the kernels do: on a GPU, or on CPU tensors in Triton's interpreter. The interpreter has to be
chosen before the kernels are imported, so `test_interpreter` runs this file once more in a process of its own.
(kernels/linear_logprobs.py has a file of its own, test_kernel_linear.py.)
"""
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanorlhf import advantages, logprobs, losses
from nanorlhf.masked import masked_mean, whiten

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

import kernels  # noqa: E402
from kernels import exact_kl, fused_dpo_loss, fused_ppo_loss, gae, ppo, token_logprobs  # noqa: E402
from kernels.advantages import gae_moments, gae_whitened  # noqa: E402
from kernels.rows import INTERPRETED, as_rows, cut, like_rows, phase, tiling  # noqa: E402

GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
ROOT = Path(__file__).resolve().parent.parent
INF, NAN = math.inf, math.nan

runs_kernels = pytest.mark.skipif(not (GPU or INTERPRETED), reason="no GPU; test_interpreter runs this one")
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
per_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda x: str(x)[6:])

# Around a group of 16 bytes; one tile and more; odd and even; the widest row in registers, and one beyond it.
WIDTHS = [7, 9, 257, 4099, 50257] + ([8, 23, 1000, 50264, 50304, ppo.RESIDENT, ppo.RESIDENT + 1, 151936] if GPU else [])
per_width = pytest.mark.parametrize("V", WIDTHS)


@pytest.fixture(autouse=True)
def poisoned():
    """New memory holds NaN, not what happened to be there: an element that a kernel fails to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def problem(N, V, dtype=torch.float32, size=3.0, level=-100.0):
    """Logits (N, V) about `level`, as GPT-2's are, and targets (N,)."""
    logits = (normal(N, V) * size + level).to(dtype)
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return logits, targets


def gradients_of(function, inputs, upstream):
    """(results, gradients into inputs), all in float64; upstream: a gradient for each result."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    results = function(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    gradients = torch.autograd.grad(results, inputs, [g.to(r.dtype) for g, r in zip(upstream, results)])
    return [x.detach().double() for x in results], [x.double() for x in gradients]


def rms(x):
    return x.pow(2).mean().sqrt().item()


def assert_no_worse(ours, its, right, dtype, size=None):
    """Our error is at most twice torch's in the same precision, both against float64.

    One float32 rounding of a number of the given size (by default the largest result) is free: on few numbers torch
    may be right by luck. So is a whole last digit in the interpreter, which cuts bfloat16 off where a GPU rounds it.
    """
    assert ours.shape == right.shape and ours.isfinite().all()
    slack = 2 ** -23 * (right.abs().max().item() if size is None else size)
    if INTERPRETED and dtype == torch.bfloat16:
        slack += torch.finfo(dtype).eps * rms(right)
    assert rms(ours - right) <= 2 * rms(its - right) + slack


def assert_as_good_as_torch(function, definition, inputs, upstream, size):
    """Results, of numbers of the given size, and gradients of a kernel against those of its definition."""
    right, right_gradients = gradients_of(definition, [x.double() for x in inputs], upstream)
    its, its_gradients = gradients_of(definition, inputs, upstream)
    ours, our_gradients = gradients_of(function, inputs, upstream)
    for triple in zip(ours, its, right):
        assert_no_worse(*triple, torch.float32, size)
    for triple in zip(our_gradients, its_gradients, right_gradients):
        assert_no_worse(*triple, inputs[0].dtype)


# --- token_logprobs ---------------------------------------------------------------------------------------------------


@runs_kernels
@per_dtype
@per_width
def test_logprobs_values_and_gradients(V, dtype):
    """Both upstream gradients random, in some rows 0."""
    logits, targets = problem(4, V, dtype)
    upstream = normal(2, 4, seed=2)
    upstream[:, 2] = 0
    assert_as_good_as_torch(lambda x: token_logprobs(x, targets, 0.7), lambda x: logprobs.token_logprobs(x, targets, 0.7),
                            [logits], upstream, size=10)


@runs_kernels
@pytest.mark.parametrize("which", [0, 1], ids=["logprobs", "entropy"])
def test_one_result_alone(which):
    """The other's upstream gradient is then None, and this one's an expanded scalar."""
    logits, targets = problem(4, 257)
    ours = gradients_of(lambda x: token_logprobs(x, targets)[which].sum(), [logits], [torch.tensor(2.0)])
    right = gradients_of(lambda x: logprobs.token_logprobs(x, targets)[which].sum(), [logits.double()], [torch.tensor(2.0)])
    torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6)


@runs_kernels
def test_logprobs_by_hand():
    """Logits ln 1, ln 2, ln 5: p = 1/8, 2/8, 5/8. Target 1: log p = -2 ln 2, gradient (-1/8, 6/8, -5/8).
    H = 2.75 ln 2 - 0.625 ln 5; dH/dx_v = -p_v (log p_v + H)."""
    ln2, ln5 = math.log(2), math.log(5)
    logits = torch.tensor([[0, ln2, ln5]], device=DEVICE)
    target, one, none = torch.tensor([1], device=DEVICE), torch.ones(1, device=DEVICE), torch.zeros(1, device=DEVICE)
    (logprob, entropy), (gradient,) = gradients_of(lambda x: token_logprobs(x, target), [logits], [one, none])
    _, (entropy_gradient,) = gradients_of(lambda x: token_logprobs(x, target), [logits], [none, one])
    H = 2.75 * ln2 - 0.625 * ln5
    for ours, hand in ((logprob, [-2 * ln2]), (entropy, [H]), (gradient, [[-1 / 8, 6 / 8, -5 / 8]]),
                       (entropy_gradient, [[-1 / 8 * (H - 3 * ln2), -2 / 8 * (H - 2 * ln2), -5 / 8 * (H - 3 * ln2 + ln5)]])):
        torch.testing.assert_close(ours.cpu(), torch.tensor(hand, dtype=torch.float64), rtol=1e-6, atol=1e-7)


@runs_kernels
@pytest.mark.parametrize("level", [-115.0, -1e4, 1e4])
def test_logits_far_from_zero(level):
    """Logits level + k / 512, exact in float32, so that only the softmax can lose digits: it must not. A maximum that
    starts at 0 makes the log-probs of -115 infinite; rounding 1e4 log2(e) shows in the fourth digit."""
    steps = torch.randint(4096, (6, 1000), generator=torch.Generator().manual_seed(0)).to(DEVICE) / 512
    targets = torch.arange(6, device=DEVICE)
    upstream = normal(2, 6)
    ours = gradients_of(lambda x: token_logprobs(x, targets), [level + steps], upstream)
    right = gradients_of(lambda x: logprobs.token_logprobs(x, targets), [steps.double()], upstream)
    torch.testing.assert_close(ours, right, rtol=1e-5, atol=2e-6)


@runs_kernels
@per_dtype
def test_forbidden_tokens(dtype):
    """Logits of -inf: whole groups, edges, all of a row but one; p log p is 0 there, never NaN."""
    logits, targets = problem(4, 300, dtype, level=0)
    logits[0, :150], logits[1, ::2], logits[2, 1:] = -INF, -INF, -INF
    targets[:] = torch.tensor([200, 1, 0, 7])
    assert_as_good_as_torch(lambda x: token_logprobs(x, targets), lambda x: logprobs.token_logprobs(x, targets), [logits],
                            normal(2, 4), size=10)
    targets[0] = 0
    assert token_logprobs(logits, targets)[0][0] == -INF
    ours, right = (gradients_of(lambda x: function(x, targets), [logits], normal(2, 4))[1][0]
                   for function in (token_logprobs, logprobs.token_logprobs))
    assert ours.isfinite().all()  # p log p of the target is 0 too
    torch.testing.assert_close(ours, right, rtol=2 * torch.finfo(dtype).eps, atol=max(1e-6, torch.finfo(dtype).eps))


@runs_kernels
def test_spread_wide():
    """Logits of +-1e4: every probability 0 or 1, all finite."""
    logits, targets = problem(6, 300, size=1e4, level=0)
    ours = gradients_of(lambda x: token_logprobs(x, targets), [logits], normal(2, 6))
    right = gradients_of(lambda x: logprobs.token_logprobs(x, targets), [logits.double()], normal(2, 6))
    torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6)


@runs_kernels
@per_dtype
@pytest.mark.parametrize("gap", [6.0, 10.0, 14.0, 60.0])
def test_a_probability_near_one_keeps_its_gradient(gap, dtype):
    """Target logit `gap`, the 299 others 0: 1 - p is about 299 e^-gap, at gap 14 2.5e-4: in bfloat16, p would be 1.
    float32 rounds the row's sum 1 + 299 e^-gap by at most 1.2e-7: that is all the error there is, beside the output's
    rounding."""
    logits = torch.zeros(1, 300, device=DEVICE, dtype=dtype)
    logits[0, 170] = gap
    target, upstream = torch.tensor([170], device=DEVICE), torch.tensor([[2.0], [0.0]], device=DEVICE)
    _, (ours,) = gradients_of(lambda x: token_logprobs(x, target), [logits], upstream)
    _, (right,) = gradients_of(lambda x: logprobs.token_logprobs(x, target), [logits.double()], upstream)
    smallest = 2 ** -24 if dtype == torch.float16 else 0
    torch.testing.assert_close(ours, right, rtol=max(torch.finfo(dtype).eps, 1e-5), atol=max(3e-7, smallest))


@runs_kernels
def test_rows_without_upstream_gradient_are_not_read():
    """NaN and infinities in such rows: exact zeros, where a product would give NaN * 0."""
    logits, targets = problem(3, 300)
    clean = gradients_of(lambda x: token_logprobs(x, targets), [logits], torch.tensor([[1.0, 0, 2], [3, 0, 4]], device=DEVICE))
    logits[1], logits[1, ::3], logits[1, ::7] = NAN, INF, -INF
    _, (ours,) = gradients_of(lambda x: token_logprobs(x, targets), [logits], torch.tensor([[1.0, 0, 2], [3, 0, 4]], device=DEVICE))
    assert torch.equal(ours, clean[1][0]) and (ours[1] == 0).all()


@runs_kernels
def test_nan_and_all_forbidden_rows_are_seen():
    """A NaN logit, an infinite one and a row of -inf give NaN, as in torch, and only there."""
    logits, targets = problem(4, 300)
    logits[0, 5], logits[1, 100], logits[2] = NAN, INF, -INF
    for result in token_logprobs(logits, targets):
        assert result.isnan().tolist() == [True, True, True, False]


@runs_kernels
def test_a_target_outside_the_vocabulary_gives_nan():
    logits, _ = problem(4, 300)
    result, entropy = token_logprobs(logits, torch.tensor([-100, 0, 300, 2 ** 32], device=DEVICE))
    assert result.isnan().tolist() == [True, False, True, True] and entropy.isfinite().all()


# --- where rows lie ---------------------------------------------------------------------------------------------------

LAYOUTS = {
    "padded columns": lambda x: torch.nn.functional.pad(x, (0, 7), value=1e3)[..., :-7],
    "cut columns": lambda x: torch.nn.functional.pad(x, (3, 0), value=1e3)[..., 3:],
    "time slice": lambda x: torch.nn.functional.pad(x, (0, 0, 2, 1), value=NAN)[:, 2:-1],
    "batch slice": lambda x: x.repeat_interleave(2, 0)[::2],
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns apart": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "expanded": lambda x: x[:1, :1].expand(x.shape),
}


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    """Rows any stride apart, starting anywhere within 16 bytes, give what a copy gives, and inputs stay as they were."""
    logits, targets = problem(6, 77, dtype)
    view, targets = LAYOUTS[layout](logits.view(2, 3, 77)), targets.view(2, 3)
    before = view.clone()
    upstream = normal(2, 3, 2).unbind(-1)
    ours = gradients_of(lambda x: token_logprobs(x, targets), [view], upstream)
    copies = gradients_of(lambda x: token_logprobs(x, targets), [view.clone(memory_format=torch.contiguous_format)], upstream)
    torch.testing.assert_close(ours, copies, rtol=1e-5, atol=1e-5)
    assert torch.equal(view, before)


@runs_kernels
@pytest.mark.parametrize("shape", [(50,), (1, 50), (2, 1, 2, 50), (0, 50), (2, 0, 50)], ids=str)
def test_leading_dimensions(shape):
    logits = normal(*shape)
    targets = torch.zeros(shape[:-1], dtype=torch.int64, device=DEVICE)
    upstream = [normal(*shape[:-1], seed=i) for i in (1, 2)]
    ours = gradients_of(lambda x: token_logprobs(x, targets), [logits], upstream)
    right = gradients_of(lambda x: logprobs.token_logprobs(x, targets), [logits.double()], upstream)
    torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6)


def test_the_gradient_lies_like_its_rows():
    """Each row of like_rows starts at its original's place within 16 bytes, rows do not overlap, and a contiguous
    original has a contiguous gradient."""
    for dtype in (torch.float32, torch.bfloat16):
        base = torch.zeros(4096, dtype=dtype)
        for offset in range(9):
            for V in (7, 8, 50):
                for outer, inner in ((3 * V, V), (3 * V + 5, V + 1), (200, V + 3), (0, V), (0, 0)):
                    rows = base.as_strided((2, 3, V), (outer, inner, 1), offset)
                    out = like_rows(rows)
                    assert phase(out) == phase(rows) and out.stride(1) >= V and out.stride(0) >= 3 * out.stride(1)
                    assert not rows.is_contiguous() or out.is_contiguous()
    assert as_rows(base.view(2, 2, 2, 512)).data_ptr() == base.data_ptr()


@runs_kernels
def test_offsets_beyond_2_to_the_31():
    """Three rows 2^30 elements apart: a 32-bit product of row and stride would read, and write, elsewhere. The 4 GiB
    between are only reserved, and never touched."""
    torch.use_deterministic_algorithms(False)  # nor filled
    rows = torch.empty(2 ** 31 + 2 ** 12, dtype=torch.bfloat16, device=DEVICE).as_strided((3, 300), (2 ** 30, 1))
    logits, targets = problem(3, 300, torch.bfloat16)
    rows.copy_(logits)
    tokens = [targets, *normal(2, 3).unbind(), torch.ones(3, dtype=torch.bool, device=DEVICE)]
    assert torch.equal(token_logprobs(rows, targets)[0], token_logprobs(logits, targets)[0])
    right = gradients_of(lambda x: fused_ppo_loss(x, *tokens)[0], [logits], [torch.tensor(1.0)])[1][0]
    rows.requires_grad_()
    fused_ppo_loss(rows, *tokens, inplace=True)[0].backward()
    assert torch.equal(rows.detach().double(), right)


@triton.jit
def cut_kernel(X, OUT, width, UNIT: tl.constexpr):
    head, groups = cut(X, width, UNIT)
    tl.store(OUT, head)
    tl.store(OUT + 1, groups)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_groups_start_at_multiples_of_16_bytes(dtype):
    """Wherever a row starts: what the compiler is promised, and the interpreter never needs."""
    unit, memory = 16 // dtype.itemsize, torch.zeros(64, dtype=dtype, device=DEVICE)
    out = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    for offset in range(unit + 1):
        for V in (1, 3, unit, 3 * unit + 1, 50):
            cut_kernel[(1,)](memory[offset:], out, V, unit)
            head, groups = out.tolist()
            aligned = memory[offset + head:].data_ptr() % 16 == 0
            assert 0 <= head < unit and (aligned or head == V)
            assert 0 <= V - head - groups * unit < unit


# --- fused_ppo_loss ---------------------------------------------------------------------------------------------------


def ppo_definition(logits, targets, old, advantages, mask, temperature=1.0, cliprange=0.2, dual_clip=None,
                   ref_logprobs=None, kl_coef=0.0, kl_estimator="k3", entropy_coef=0.0):
    """The sum of definitions that fused_ppo_loss stands for, and its statistics."""
    new, entropy = logprobs.token_logprobs(logits, targets, temperature)
    loss, stats = losses.ppo_policy_loss(new, old, advantages, mask, cliprange, dual_clip)
    stats |= {"policy_loss": loss.item(), "entropy": masked_mean(entropy, mask).item()}
    loss = loss - entropy_coef * masked_mean(entropy, mask)
    if ref_logprobs is not None:
        kl = masked_mean(logprobs.kl_estimate(new, ref_logprobs, kl_estimator), mask)
        loss, stats["kl"] = loss + kl_coef * kl, kl.item()
    return loss, stats


def ppo_problem(B, R, V, dtype=torch.float32, temperature=1.0, **rest):
    """(logits, arguments of fused_ppo_loss): ragged rows, ratios on both sides of the clip, a reference nearby."""
    logits, targets = problem(B * R, V, dtype, **rest)
    logits, targets = logits.view(B, R, V), targets.view(B, R)
    new = logprobs.token_logprobs(logits, targets, temperature)[0]
    lengths = torch.tensor([R, 0, 1, R - 1], device=DEVICE).repeat(-(-B // 4))[:B]  # the second row is fully masked
    return logits, dict(targets=targets, logprobs=new + 0.4 * normal(B, R, seed=3), advantages=normal(B, R, seed=4),
                        mask=torch.arange(R, device=DEVICE) < lengths[:, None], temperature=temperature,
                        ref_logprobs=new + 0.3 * normal(B, R, seed=5))


def doubles(arguments):
    return {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in arguments.items()}


def ppo_gradient(function, logits, arguments, upstream=1.0):
    logits = logits.detach().requires_grad_()
    loss, stats = function(logits, **arguments)
    loss.backward(torch.full_like(loss, upstream))
    return loss.item(), logits.grad.double(), stats


def assert_ppo(logits, arguments, upstream=1.0):
    loss, gradient, stats = ppo_gradient(fused_ppo_loss, logits, arguments, upstream)
    right, right_gradient, right_stats = ppo_gradient(lambda x, targets, logprobs, **rest: ppo_definition(
        x, targets, logprobs, **rest), logits.double(), doubles(arguments), upstream)
    _, its_gradient, _ = ppo_gradient(lambda x, targets, logprobs, **rest: ppo_definition(x, targets, logprobs, **rest),
                                      logits, arguments, upstream)
    assert loss == pytest.approx(right, rel=1e-5, abs=1e-5)
    assert_no_worse(gradient, its_gradient, right_gradient, logits.dtype)
    assert stats.keys() == right_stats.keys()
    assert stats == pytest.approx(right_stats, rel=1e-5, abs=1e-5)
    return gradient


@runs_kernels
@pytest.mark.parametrize("dual_clip, loss, slope", [(3.0, 3.0, 0.0), (5.0, 4.0, 4.0)])
def test_ppo_dual_clip_by_hand(dual_clip, loss, slope):
    """One token, p = 1/2, ratio 4, A = -1: max(4, 1.2) = 4. Dual clip 3: min(4, 3) = 3, which does not move with new.
    Dual clip 5: 4, dloss/dnew = -A ratio = 4, times (1/2, -1/2)."""
    logits = torch.zeros(1, 2, device=DEVICE, requires_grad=True)
    old, one = torch.full((1,), -math.log(8), device=DEVICE), torch.ones(1, device=DEVICE)
    found, _ = fused_ppo_loss(logits, torch.zeros(1, dtype=torch.int64, device=DEVICE), old, -one, one, dual_clip=dual_clip)
    found.backward()
    assert found.item() == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(logits.grad.cpu(), torch.tensor([[slope / 2, -slope / 2]]), rtol=1e-6, atol=1e-7)


@runs_kernels
@per_dtype
@per_width
def test_ppo_values_and_gradients(V, dtype):
    """The whole loss: reference, dual clip, entropy bonus, temperature, ragged rows. In float16 under a loss scale,
    as such training needs."""
    logits, arguments = ppo_problem(2, 3, V, dtype, temperature=0.7)
    gradient = assert_ppo(logits, dict(arguments, kl_coef=0.3, entropy_coef=0.05, dual_clip=2.0),
                          upstream=1024.0 if dtype == torch.float16 else 1.0)
    assert (gradient[~arguments["mask"]] == 0).all()


@runs_kernels
@pytest.mark.parametrize("options", [
    dict(), dict(cliprange=0.05), dict(dual_clip=1.5), dict(entropy_coef=0.1), dict(kl_coef=0.5, kl_estimator="k1"),
    dict(kl_coef=0.5, kl_estimator="k2"), dict(kl_coef=0.5, kl_estimator="k3"), dict(kl_coef=0.5, kl_estimator="abs"),
    dict(kl_coef=0.0), dict(ref_logprobs=None), dict(ref_logprobs=None, entropy_coef=0.1, dual_clip=3.0),
    dict(temperature=2.0, entropy_coef=0.1), dict(temperature=1, dual_clip=2, entropy_coef=1, kl_coef=1),
], ids=str)
def test_ppo_options(options):
    logits, arguments = ppo_problem(3, 3, 40, temperature=options.get("temperature", 1.0))
    assert_ppo(logits, arguments | options, upstream=-0.37)


@runs_kernels
def test_ppo_by_hand():
    """p = 1/4, 3/4 for two tokens, targets 0 and 1, old log-probs such that the ratios are 1/2 and 2, advantages 1, 3.

    Ratio 1/2, A = 1: max(-1/2, -0.8) = -1/2, unclipped: dloss/dnew = -1/2. Ratio 2, A = 3: max(-6, -3.6) = -3.6,
    clipped: no gradient. Loss (-1/2 - 3.6) / 2 = -2.05; dloss/dx of row 0: -1/2 (3/4, -3/4) / 2 = (-3/16, 3/16).
    """
    logits = torch.tensor([[0, math.log(3)]] * 2, device=DEVICE, requires_grad=True)
    old = torch.tensor([math.log(1 / 4) + math.log(2), math.log(3 / 4) - math.log(2)], device=DEVICE)
    loss, stats = fused_ppo_loss(logits, torch.tensor([0, 1], device=DEVICE), old, torch.tensor([1.0, 3.0], device=DEVICE),
                                 torch.ones(2, dtype=torch.bool, device=DEVICE))
    loss.backward()
    torch.testing.assert_close(logits.grad.cpu(), torch.tensor([[-3 / 16, 3 / 16], [0, 0]]), rtol=1e-6, atol=1e-7)
    assert loss.item() == pytest.approx(-2.05, abs=1e-6)
    assert stats["clipfrac"] == 0.5 and stats["ratio"] == pytest.approx(1.25, abs=1e-6)


@runs_kernels
def test_ppo_runaway_ratios():
    """Log-ratios beyond +-20 are clamped: the loss stays finite and such tokens have no policy gradient."""
    logits, arguments = ppo_problem(3, 3, 40)
    arguments["logprobs"] += torch.tensor([-30.0, 40.0, -21.0], device=DEVICE)
    arguments["advantages"].abs_().neg_()  # the sign for which a large ratio is not clipped
    assert_ppo(logits, arguments | dict(ref_logprobs=None))
    assert_ppo(logits, arguments | dict(ref_logprobs=None, dual_clip=3.0))


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_ppo_masked_tokens_count_for_nothing(poison, dtype):
    """Masked tokens may hold anything in every argument: results do not change by a bit and their gradient is 0."""
    logits, arguments = ppo_problem(3, 3, 300, dtype)
    arguments |= dict(kl_coef=0.3, entropy_coef=0.05, dual_clip=2.0)
    clean = ppo_gradient(fused_ppo_loss, logits, arguments)
    off = ~arguments["mask"]
    logits, arguments = logits.clone(), {name: x.clone() if torch.is_tensor(x) else x for name, x in arguments.items()}
    for x in (logits, *(arguments[name] for name in ("logprobs", "advantages", "ref_logprobs"))):
        x[off] = poison
    arguments["targets"][off] = -100
    dirty = ppo_gradient(fused_ppo_loss, logits, arguments)
    assert dirty[0] == clean[0] and dirty[2] == clean[2]
    assert torch.equal(dirty[1], clean[1]) and (dirty[1][off] == 0).all()


@runs_kernels
def test_ppo_coefficient_0_adds_nothing_whatever_the_reference():
    """A reference that forbids a token: its KL is infinite, 0 times it must not make the loss NaN."""
    logits, arguments = ppo_problem(1, 2, 20)
    right = ppo_gradient(fused_ppo_loss, logits, arguments | dict(ref_logprobs=None))
    arguments["ref_logprobs"] = torch.full((1, 2), -INF, device=DEVICE)
    for estimator in ("k1", "k2", "k3", "abs"):
        loss, gradient, stats = ppo_gradient(fused_ppo_loss, logits, arguments | dict(kl_estimator=estimator))
        assert loss == right[0] and torch.equal(gradient, right[1]) and not math.isfinite(stats["kl"])


@runs_kernels
def test_ppo_fully_masked():
    logits, arguments = ppo_problem(2, 3, 40)
    loss, gradient, stats = ppo_gradient(fused_ppo_loss, logits, arguments | dict(mask=torch.zeros(2, 3, device=DEVICE)))
    assert loss == 0 and (gradient == 0).all() and not any(stats.values())


@runs_kernels
def test_ppo_weighted_mask():
    """A float mask weighs the tokens, as in masked_mean."""
    logits, arguments = ppo_problem(3, 3, 40)
    assert_ppo(logits, arguments | dict(mask=arguments["mask"] * normal(3, 3).abs(), kl_coef=0.1, entropy_coef=0.1))


@runs_kernels
@per_dtype
def test_ppo_micro_batches_with_a_shared_denominator(dtype):
    """Ragged micro-batches divided by the whole step's tokens: losses and gradients add up to those of one batch, and
    the upstream gradient is 1 throughout."""
    logits, arguments = ppo_problem(3, 3, 300, dtype)
    arguments |= dict(kl_coef=0.3, entropy_coef=0.05)
    scale = 1024.0 if dtype == torch.float16 else 1.0
    loss, gradient, stats = ppo_gradient(fused_ppo_loss, logits, arguments, scale)
    tokens = arguments["mask"].sum()
    for name, mean in ppo_gradient(fused_ppo_loss, logits, arguments | dict(denominator=2 * tokens), scale)[2].items():
        assert mean == pytest.approx(stats[name], rel=1e-6)  # statistics are means over the mask whatever the loss is divided by
    for denominator in (tokens, tokens.item()):
        parts = [ppo_gradient(fused_ppo_loss, logits[rows], {name: x[rows] if torch.is_tensor(x) else x for name, x
                              in arguments.items()} | dict(denominator=denominator), scale)
                 for rows in (slice(0, 1), slice(1, 3))]
        assert sum(part[0] for part in parts) == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient, rtol=1e-6, atol=1e-9)


@runs_kernels
@per_dtype
@pytest.mark.parametrize("inplace", [False, True])
def test_ppo_upstream_gradients(dtype, inplace):
    """The loss within a larger one, here times -3; the multiplication is in place, in memory that nobody else sees."""
    logits, arguments = ppo_problem(3, 3, 300, dtype)
    scale = 1024.0 if dtype == torch.float16 else 1.0
    _, one, _ = ppo_gradient(fused_ppo_loss, logits, arguments, scale)
    leaf = logits.clone().requires_grad_()
    (scale * 5 - 3 * scale * fused_ppo_loss(leaf * 1, inplace=inplace, **arguments)[0]).backward()
    smallest = 2 ** -22 if dtype == torch.float16 else 1e-9
    torch.testing.assert_close(leaf.grad.double(), -3 * one, rtol=2 * torch.finfo(dtype).eps, atol=smallest)
    assert torch.equal(leaf.detach(), logits)


@runs_kernels
@per_dtype
def test_ppo_two_backwards_through_one_graph(dtype):
    """Upstream gradients 2, then 3, then 1: each result is its own, and stays so when the next is asked for."""
    logits, arguments = ppo_problem(3, 3, 300, dtype)
    logits.requires_grad_()
    loss, _ = fused_ppo_loss(logits, **arguments)
    one, = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = one.clone()
    two, = torch.autograd.grad(2 * loss, logits, retain_graph=True)
    three, = torch.autograd.grad(3 * loss, logits, retain_graph=True)
    last, = torch.autograd.grad(loss, logits)
    assert torch.equal(one, kept) and torch.equal(last, kept)
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(two.double(), 2 * kept.double(), rtol=tolerance, atol=1e-7)
    torch.testing.assert_close(three.double(), 3 * kept.double(), rtol=tolerance, atol=1e-7)


@runs_kernels
def test_results_may_be_changed_in_place():
    """As masking does: the backward's own numbers are elsewhere."""
    logits, targets = problem(3, 40, level=0)
    for function in (lambda x: token_logprobs(x, targets)[0], lambda x: token_logprobs(x, targets)[1], lambda x: exact_kl(x, logits * 0.5)):
        gradients = []
        for double in (lambda y: y * 2, lambda y: y.mul_(2)):
            x = logits.clone().requires_grad_()
            double(function(x)).sum().backward()
            gradients.append(x.grad)
        assert torch.equal(*gradients)


@runs_kernels
def test_no_second_derivative_is_given():
    """The gradient is a kernel's: differentiating it raises, where what is left of its graph would give a part of the truth."""
    logits, arguments = ppo_problem(1, 3, 40)
    logits.requires_grad_()
    loss = fused_ppo_loss(logits, **arguments)[0] ** 2
    gradient, = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@runs_kernels
def test_ppo_small_gradients_in_float16():
    """Divided by 2^20 tokens most gradients are 0 in float16, whose smallest number is 2^-24. Under a loss scale of 2^20
    they are what they are without either: nothing was rounded away before the scale came."""
    logits, arguments = ppo_problem(2, 3, 300, torch.float16)
    plain = ppo_gradient(fused_ppo_loss, logits, arguments | dict(denominator=1.0))[1]
    many = arguments | dict(denominator=2.0 ** 20)
    assert (ppo_gradient(fused_ppo_loss, logits, many)[1] == 0).float().mean() > 0.9
    assert torch.equal(ppo_gradient(fused_ppo_loss, logits, many, upstream=2.0 ** 20)[1], plain)


@runs_kernels
@per_dtype
@pytest.mark.parametrize("V", [77, 3000])
def test_ppo_in_place(V, dtype):
    """The gradient stands where the logits were, every bit as out of place; nothing beside them is written."""
    logits, arguments = ppo_problem(2, 3, V, dtype)
    _, right, _ = ppo_gradient(fused_ppo_loss, logits, arguments)
    for offset in range(0, 9, 3):
        memory = torch.full((offset + 6 * (V + 3) + 16,), 7.0, dtype=dtype, device=DEVICE)
        view = memory.as_strided((2, 3, V), (3 * (V + 3), V + 3, 1), offset)
        view.copy_(logits)
        leaf = view.detach().requires_grad_()
        fused_ppo_loss(leaf, inplace=True, **arguments)[0].backward()
        if offset == 0 or dtype == torch.float32:  # elsewhere the sums are taken in another order
            torch.testing.assert_close(view.double(), right, rtol=2e-5, atol=1e-8)
        assert leaf.grad.data_ptr() == view.data_ptr() or torch.equal(leaf.grad, view)
        view.fill_(7.0)
        assert (memory == 7).all()


@runs_kernels
def test_ppo_in_place_is_refused_to_those_who_need_the_logits():
    """Whoever saved the logits for a backward gets torch's error, not a wrong gradient."""
    logits, arguments = ppo_problem(2, 6, 40)
    logits = logits.requires_grad_() * 1
    loss = (logits ** 2).sum() + fused_ppo_loss(logits, inplace=True, **arguments)[0]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@runs_kernels
def test_ppo_without_gradient_computes_none(monkeypatch):
    """Under no_grad, and of logits that ask for none: same loss, no memory for a gradient, in-place logits untouched."""
    logits, arguments = ppo_problem(2, 6, 40)
    loss, _, stats = ppo_gradient(fused_ppo_loss, logits, arguments)
    monkeypatch.setattr(ppo, "place", None)
    before = logits.clone()
    for x in (logits, logits.detach().requires_grad_()):
        with torch.set_grad_enabled(not x.requires_grad):
            other, other_stats = fused_ppo_loss(x, inplace=True, **arguments)
        assert other.item() == loss and other_stats == stats and not other.requires_grad
    assert torch.equal(logits, before)


@runs_kernels
def test_reruns_are_identical_to_the_bit():
    for dtype in (torch.float32, torch.bfloat16):
        logits, arguments = ppo_problem(3, 3, 3000, dtype)
        before = logits.clone()
        first, second = (ppo_gradient(fused_ppo_loss, logits, dict(arguments, entropy_coef=0.1)) for _ in range(2))
        assert first[0] == second[0] and torch.equal(first[1], second[1]) and first[2] == second[2]
        assert torch.equal(logits, before)


@runs_kernels
def test_ppo_arguments_of_any_stride():
    """Slices and expanded tensors as arguments are read where they are."""
    logits, arguments = ppo_problem(3, 3, 40)
    right = ppo_gradient(fused_ppo_loss, logits, arguments | dict(advantages=torch.ones(3, 3, device=DEVICE)))
    strided = {name: torch.stack([x, x], -1)[..., 0] if torch.is_tensor(x) else x for name, x in arguments.items()}
    strided["advantages"] = torch.ones(1, 1, device=DEVICE).expand(3, 3)
    ours = ppo_gradient(fused_ppo_loss, logits, strided)
    assert ours[0] == right[0] and torch.equal(ours[1], right[1])


# --- exact_kl ---------------------------------------------------------------------------------------------------------


@runs_kernels
@per_dtype
@per_width
def test_kl_values_and_gradients(V, dtype):
    """Into both; one row without upstream gradient."""
    logits, _ = problem(4, V, dtype)
    ref_logits = (logits.float() + normal(4, V, seed=6)).to(dtype)
    upstream = normal(1, 4, seed=7)
    upstream[0, 2] = 0
    assert_as_good_as_torch(lambda x, y: exact_kl(x, y, 0.7), lambda x, y: logprobs.exact_kl(x, y, 0.7),
                            [logits, ref_logits], upstream, size=2)


@runs_kernels
def test_kl_by_hand():
    """p = 1/4, 3/4 against q = 1/2, 1/2: KL = 1/4 ln 1/2 + 3/4 ln 3/2 = 3/4 ln 3 - ln 2.
    dKL/dx_0 = p_0 (ln 1/2 - KL) = -3/16 ln 3; dKL/dy = q - p = (1/4, -1/4)."""
    ln3 = math.log(3)
    x, y = torch.tensor([[0, ln3]], device=DEVICE), torch.zeros(1, 2, device=DEVICE)
    (kl,), (dx, dy) = gradients_of(exact_kl, [x, y], [torch.ones(1, device=DEVICE)])
    for ours, hand in ((kl, [0.75 * ln3 - math.log(2)]), (dx, [[-3 / 16 * ln3, 3 / 16 * ln3]]), (dy, [[0.25, -0.25]])):
        torch.testing.assert_close(ours.cpu(), torch.tensor(hand, dtype=torch.float64), rtol=1e-6, atol=1e-7)


@runs_kernels
@pytest.mark.parametrize("level", [-115.0, 1e4])
def test_kl_of_distributions_alike(level):
    """KL of two nearly equal distributions is about their squared difference, 5e-7, which a difference of two entropies
    of about 6 would lose. Of equal ones, and of one shifted by a constant, it is exactly 0."""
    steps = torch.randint(4096, (8, 1000), generator=torch.Generator().manual_seed(0)).to(DEVICE) / 512
    other = steps + torch.randint(2, (8, 1000), generator=torch.Generator().manual_seed(1)).to(DEVICE) / 512
    right = logprobs.exact_kl(steps.double(), other.double())
    ours, its = exact_kl(level + steps, other - level), logprobs.exact_kl(steps, other)
    assert_no_worse(ours.double(), its.double(), right, torch.float32)
    torch.testing.assert_close(ours.double(), right, rtol=0, atol=2e-7)
    assert (exact_kl(level + steps, steps + level) == 0).all()
    assert (exact_kl(level + steps, steps) == 0).all()


@runs_kernels
def test_kl_forbidden_tokens():
    """Forbidden by the policy: no contribution, whatever the reference. Forbidden by the reference alone: infinite."""
    x, y = normal(4, 300), normal(4, 300, seed=1)
    x[0, :150], y[0, :100] = -INF, -INF
    x[1, 0::2], y[1, 0::4] = -INF, -INF
    y[2, :150] = -INF
    y[3, 299] = -INF
    ours, right = exact_kl(x, y), logprobs.exact_kl(x.double(), y.double()).float()
    torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6)
    assert right[2:].isinf().all()
    ours = gradients_of(exact_kl, [x[:2], y[:2]], [torch.ones(2, device=DEVICE)])
    right = gradients_of(logprobs.exact_kl, [x[:2].double(), y[:2].double()], [torch.ones(2, device=DEVICE)])
    torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6)


@runs_kernels
def test_kl_spread_wide():
    """The reference's maximum moves by thousands while the policy's stays: nothing is rounded to a floor."""
    x, y = normal(4, 3000), 1e3 * normal(4, 3000, seed=1)
    torch.testing.assert_close(exact_kl(x, y).double(), logprobs.exact_kl(x.double(), y.double()), rtol=1e-5, atol=1e-5)


@runs_kernels
@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_kl_gradient_into_one_alone(wanted):
    x, y = (z.requires_grad_(w) for z, w in zip((normal(3, 2, 77), normal(3, 2, 77, seed=1)), wanted))
    exact_kl(x, y).sum().backward()
    a, b = (z.detach().double().requires_grad_() for z in (x, y))
    logprobs.exact_kl(a, b).sum().backward()
    for ours, right, w in ((x, a, wanted[0]), (y, b, wanted[1])):
        assert (ours.grad is not None) == w
        if w:
            torch.testing.assert_close(ours.grad.double(), right.grad, rtol=1e-5, atol=1e-6)


@runs_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kl_layouts_and_precisions(layout):
    """The two may lie differently, and differ in precision: then the wider counts."""
    logits, _ = problem(6, 77)
    x, y = logits.view(2, 3, 77), (logits + normal(6, 77, seed=1)).view(2, 3, 77).bfloat16()
    upstream = [torch.ones(2, 3, device=DEVICE)]
    for pair in ((x, LAYOUTS[layout](y)), (LAYOUTS[layout](x), y)):
        ours = gradients_of(exact_kl, pair, upstream)
        right = gradients_of(logprobs.exact_kl, [z.double() for z in pair], upstream)
        torch.testing.assert_close(ours[0], right[0], rtol=1e-5, atol=1e-5)
        for our, its, source in zip(ours[1], right[1], pair):
            torch.testing.assert_close(our, its, rtol=2 * torch.finfo(source.dtype).eps, atol=5e-6)


# --- gae --------------------------------------------------------------------------------------------------------------


@runs_kernels
@pytest.mark.parametrize("kind", ["ragged", "holes", "weights"])
@pytest.mark.parametrize("R, block", [(1, 1024), (2, 1024), (7, 1024), (64, 1024), (45, 16)])
def test_gae(R, block, kind, monkeypatch):
    """Against the loop, whatever the mask; a row longer than a block carries its state from block to block."""
    monkeypatch.setattr("kernels.advantages.BLOCK", block)
    rewards, values, last_values = normal(5, R), normal(5, R, seed=1), normal(5, seed=2)
    mask = torch.rand(5, R, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    if kind == "ragged":
        mask = torch.arange(R, device=DEVICE) < torch.tensor([R, R // 2, 1, 0, R - 1], device=DEVICE)[:, None]
    elif kind == "holes":
        mask = mask > 0.3
    else:
        mask = mask * (mask > 0.3)
    for last in (None, last_values):
        ours = gae(rewards, values, mask, 0.99, 0.95, last)
        right = advantages.gae(rewards.double(), values.double(), mask, 0.99, 0.95, None if last is None else last.double())
        for our, its in zip(ours, right):
            assert our.dtype == torch.float32 and (our[mask == 0] == 0).all()
            torch.testing.assert_close(our.double(), its, rtol=1e-5, atol=1e-5)


@runs_kernels
def test_gae_by_hand():
    """Rewards 1, 2 of two tokens, values 3, 4, then padding; gamma = 1/2, lam = 1/2, value 8 after the end.

    A_1 = 2 + 8 / 2 - 4 = 2; A_0 = (1 + 4 / 2 - 3) + A_1 / 4 = 1/2; returns 3 1/2 and 6."""
    rewards, values = torch.tensor([[1.0, 2, NAN]], device=DEVICE), torch.tensor([[3.0, 4, INF]], device=DEVICE)
    mask, last = torch.tensor([[True, True, False]], device=DEVICE), torch.tensor([8.0], device=DEVICE)
    results = gae(rewards, values, mask, 0.5, 0.5, last)
    assert [x.tolist() for x in results] == [[[0.5, 2, 0]], [[3.5, 6, 0]]]


@runs_kernels
def test_gae_arguments_of_any_stride():
    """Transposed rewards, every second value, a mask that is a slice, one last value for all: what copies give."""
    rewards, values, mask = normal(7, 3).T, normal(3, 14)[:, ::2], (normal(3, 8, seed=1) > -1).float()[:, 1:]
    last_values = normal(1, seed=2).expand(3)
    arguments = rewards, values, mask, 0.9, 0.9, last_values
    for i in (0, 1, 2, 5):
        assert not arguments[i].is_contiguous()
    copies = [x.clone(memory_format=torch.contiguous_format) if torch.is_tensor(x) else x for x in arguments]
    for ours, copy in zip(gae(*arguments), gae(*copies)):
        assert torch.equal(ours, copy)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gae_precisions(dtype):
    rewards, values = normal(3, 50).to(dtype), normal(3, 50, seed=1).to(dtype)
    mask = torch.ones(3, 50, dtype=torch.bool, device=DEVICE)
    ours = gae(rewards, values, mask)
    right = advantages.gae(rewards.double(), values.double(), mask)
    assert ours[0].dtype == ours[1].dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2 ** -7)
    torch.testing.assert_close([x.double() for x in ours], list(right), rtol=tolerance, atol=tolerance)


@runs_kernels
def test_gae_moments(monkeypatch):
    """Count, mean and variance from the same launch, also where the mean is 1e4 and the variance 1; and whitening."""
    monkeypatch.setattr("kernels.advantages.BLOCK", 32)
    rewards, values = 1e4 + normal(5, 150), normal(5, 150, seed=1)
    mask = torch.arange(150, device=DEVICE) < torch.tensor([150, 97, 3, 1, 0], device=DEVICE)[:, None]
    plain, returns, (count, mean, variance) = gae_moments(rewards, values, mask, gamma=0.0)
    kept = plain[mask].double()
    assert count == mask.sum()
    assert mean.item() == pytest.approx(kept.mean().item(), rel=1e-6)
    assert variance.item() == pytest.approx(kept.var(unbiased=False).item(), rel=1e-3)
    plain, returns = gae(rewards - 1e4, values, mask)
    whitened, same = gae_whitened(rewards - 1e4, values, mask)
    torch.testing.assert_close(whitened.double(), whiten(plain.double(), mask), rtol=1e-5, atol=1e-5)
    assert torch.equal(same, returns)
    one = torch.zeros_like(mask)
    one[0, 7] = True
    assert (gae_whitened(rewards, values, one)[0] == 0).all()  # a single token has mean itself and variance 0


# --- fused_dpo_loss ---------------------------------------------------------------------------------------------------


def dpo_definition(chosen, rejected, arguments):
    """The mean of dpo_loss over masked sums of log-probs, for "ipo" means."""
    arguments = dict(arguments)
    logps = []
    for logits, side in ((chosen, "chosen"), (rejected, "rejected")):
        mask = arguments.pop(f"{side}_mask")
        tokens = torch.where(mask, logprobs.token_logprobs(logits, arguments.pop(f"{side}_targets"))[0], 0).sum(1)
        logps.append(tokens / mask.sum(1).clamp(min=1) if arguments.get("loss_type") == "ipo" else tokens)
    return losses.dpo_loss(*logps, **arguments)[0].mean()


def dpo_problem(dtype=torch.float32, V=60, scale=1.0):
    """Chosen and rejected of different lengths, ragged, one rejected response empty."""
    sides = {}
    for seed, (side, T, lengths) in enumerate((("chosen", 6, (6, 1, 3)), ("rejected", 4, (2, 4, 0)))):
        logits, targets = problem(3 * T, V, dtype, level=-100 - seed)
        mask = torch.arange(T, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]
        reference = torch.where(mask, logprobs.token_logprobs(logits.view(3, T, V), targets.view(3, T))[0], 0).sum(1)
        sides |= {side: logits.view(3, T, V), f"{side}_targets": targets.view(3, T), f"{side}_mask": mask,
                  f"ref_{side}_logps": (reference + normal(3, seed=seed)) * scale}
    return [sides.pop("chosen"), sides.pop("rejected")], sides


@runs_kernels
@per_dtype
@pytest.mark.parametrize("options", [
    dict(), dict(beta=2.0), dict(label_smoothing=0.2), dict(loss_type="robust"), dict(loss_type="robust", label_smoothing=0.1),
    dict(loss_type="ipo"), dict(loss_type="hinge", beta=0.5)], ids=str)
def test_dpo(options, dtype):
    logits, arguments = dpo_problem(dtype, scale=1 / 6 if options.get("loss_type") == "ipo" else 1.0)
    arguments |= options
    ours = gradients_of(lambda x, y: fused_dpo_loss(x, y, **arguments)[0], logits, [torch.tensor(1.7)])
    right = gradients_of(lambda x, y: dpo_definition(x, y, doubles(arguments)), [x.double() for x in logits], [torch.tensor(1.7)])
    its = gradients_of(lambda x, y: dpo_definition(x, y, arguments), logits, [torch.tensor(1.7)])
    torch.testing.assert_close(ours[0], right[0], rtol=1e-5, atol=1e-5)
    for our, it, exact, side in zip(ours[1], its[1], right[1], ("chosen", "rejected")):
        assert_no_worse(our, it, exact, dtype)
        assert (our[~arguments[f"{side}_mask"]] == 0).all()


@runs_kernels
def test_dpo_statistics_and_padding():
    """NaN in masked rows changes nothing. The statistics are those of dpo_loss's rewards."""
    logits, arguments = dpo_problem()
    loss, stats = fused_dpo_loss(*logits, **arguments)
    for x, side in zip(logits, ("chosen", "rejected")):
        x[~arguments[f"{side}_mask"]] = NAN
    assert fused_dpo_loss(*logits, **arguments)[1] == stats
    for gradient in gradients_of(lambda x, y: fused_dpo_loss(x, y, **arguments)[0], logits, [torch.tensor(1.0)])[1]:
        assert gradient.isfinite().all()
    logps = [torch.where(arguments[f"{side}_mask"], logprobs.token_logprobs(x, arguments[f"{side}_targets"])[0], 0).sum(1)
             for x, side in zip(logits, ("chosen", "rejected"))]
    _, chosen, rejected = losses.dpo_loss(*logps, arguments["ref_chosen_logps"], arguments["ref_rejected_logps"])
    right = {"accuracy": (chosen > rejected).float().mean(), "margin": (chosen - rejected).mean(), "chosen_reward": chosen.mean(),
             "rejected_reward": rejected.mean(), "chosen_logps": logps[0].mean(), "rejected_logps": logps[1].mean()}
    assert stats == pytest.approx({name: x.item() for name, x in right.items()}, rel=1e-5, abs=1e-5)


@runs_kernels
def test_dpo_by_hand():
    """All log-probs -ln 2, reference -20 and 0: h = 20, loss log(1 + e^-20) = 2.06e-9, which 1 + e^-20 would round to 0. With equal
    references h = 0, loss ln 2, and a tie is no success. A forbidden rejected token: h is infinite, loss 0 (and not 0 * infinity)."""
    def dpo(ref_chosen, x=0.0):
        rejected = torch.tensor([[[x, 0.0]]], device=DEVICE)
        target, one = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), torch.ones(1, 1, device=DEVICE)
        loss, stats = fused_dpo_loss(torch.zeros_like(rejected), rejected, target, target, one, one,
                                     torch.tensor([ref_chosen], device=DEVICE), torch.zeros(1, device=DEVICE), beta=1.0)
        return loss.item(), stats["accuracy"]

    assert dpo(-20.0) == (pytest.approx(2.0611536e-9, rel=1e-5), 1.0)
    assert dpo(0.0) == (pytest.approx(math.log(2), rel=1e-6), 0.0)
    assert dpo(0.0, -INF) == (0.0, 1.0)


@runs_kernels
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_dpo_responses_longer_than_a_block(loss_type, monkeypatch):
    """Responses of 6 and 4 tokens in blocks of 2: all their tokens count."""
    logits, arguments = dpo_problem(V=8)
    whole = fused_dpo_loss(*logits, loss_type=loss_type, **arguments)
    monkeypatch.setattr("kernels.dpo.BLOCK", 2)
    loss, stats = fused_dpo_loss(*logits, loss_type=loss_type, **arguments)
    assert loss.item() == pytest.approx(whole[0].item(), rel=1e-5) and stats == pytest.approx(whole[1], rel=1e-5)


@runs_kernels
def test_dpo_arguments_of_any_stride():
    """Slices and expanded tensors as targets, masks and reference give what copies give."""
    logits, arguments = dpo_problem()
    arguments |= {name: x.float() for name, x in arguments.items() if "mask" in name}  # bool ones are copied anyway
    strided = {name: torch.stack([x, x], -1)[..., 0] for name, x in arguments.items()}
    strided["ref_rejected_logps"] = torch.ones(1, device=DEVICE).expand(3)
    assert not any(x.is_contiguous() for x in strided.values())
    copies = {name: x.clone(memory_format=torch.contiguous_format) for name, x in strided.items()}
    (loss, stats), (right, right_stats) = (fused_dpo_loss(*logits, **each) for each in (strided, copies))
    assert loss == right and stats == right_stats


@runs_kernels
@pytest.mark.parametrize("shift", [-1e4, 1e4])
@pytest.mark.parametrize("loss_type", ["sigmoid", "robust", "hinge"])
def test_dpo_far_from_a_tie(shift, loss_type):
    """A gap of 1e4: log(1 + e^h) would overflow."""
    logits, arguments = dpo_problem()
    arguments |= dict(loss_type=loss_type, beta=1.0)
    arguments["ref_chosen_logps"] = arguments["ref_chosen_logps"] + shift
    ours = gradients_of(lambda x, y: fused_dpo_loss(x, y, **arguments)[0], logits, [torch.tensor(1.0)])
    right = gradients_of(lambda x, y: dpo_definition(x, y, doubles(arguments)), [x.double() for x in logits], [torch.tensor(1.0)])
    torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6)


# --- bad input --------------------------------------------------------------------------------------------------------

X, Y, F = torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3)


@runs_kernels
@pytest.mark.parametrize("call, message", [
    (lambda: token_logprobs(X, Y[:1]), r"logits \(2, 3, 8\) do not fit targets \(1, 3\)"),
    (lambda: token_logprobs(X, Y, 0.0), "temperature must be above 0, not 0"),
    (lambda: token_logprobs(X.double(), Y), "not torch.float64: use the torch definitions"),
    (lambda: token_logprobs(X, Y.to("meta")), "move them together"),
    (lambda: exact_kl(X, X[:1]), "want one shape, one device"),
    (lambda: exact_kl(X, X, -1.0), "temperature must be above 0"),
    (lambda: gae(F, F, F[:1]), r"must have one shape, \(B, R\)"),
    (lambda: gae(F, F, F, last_values=F), r"want \(B,\)"),
    (lambda: fused_ppo_loss(X, Y, F, F[:1], F), "do not fit advantages"),
    (lambda: fused_ppo_loss(X, Y, F, F, F, ref_logprobs=F[:1]), "do not fit ref_logprobs"),
    (lambda: fused_ppo_loss(X, Y, F, F, F, dual_clip=1.0), "dual_clip must be above 1"),
    (lambda: fused_ppo_loss(X, Y, F, F, F, kl_estimator="k4"), "unknown KL estimator 'k4': choose from k1, k2, k3, abs"),
    (lambda: fused_ppo_loss(X, Y, F, F, F, kl_coef=0.1), "kl_coef needs ref_logprobs"),
    (lambda: fused_ppo_loss(X.mT.contiguous().mT, Y, F, F, F, inplace=True), "make them contiguous"),
    (lambda: fused_dpo_loss(X, X, Y, Y, F, F[:1], F[:, 0], F[:, 0]), "do not fit rejected_mask"),
    (lambda: fused_dpo_loss(X, X[:1], Y, Y[:1], F, F[:1], F[:, 0], F[:, 0]), "with one B"),
    (lambda: fused_dpo_loss(X, X, Y, Y, F, F, F, F[:, 0]), "ref_chosen_logps"),
    (lambda: fused_dpo_loss(X, X, Y, Y, F, F, F[:, 0], F[:, 0], loss_type="dpo"), "unknown loss type 'dpo'"),
    (lambda: fused_dpo_loss(X, X, Y, Y, F, F, F[:, 0], F[:, 0], loss_type="ipo", label_smoothing=0.1), "has no meaning"),
    (lambda: fused_dpo_loss(X, X, Y, Y, F, F, F[:, 0], F[:, 0], label_smoothing=0.6), r"must be in \[0, 0.5\]"),
])
def test_bad_input(call, message, monkeypatch):
    for name in "XYF":
        monkeypatch.setitem(globals(), name, globals()[name].to(DEVICE))
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
@pytest.mark.parametrize("call", [
    lambda: token_logprobs(X, Y), lambda: exact_kl(X, X), lambda: gae(F, F, F), lambda: fused_ppo_loss(X, Y, F, F, F),
    lambda: fused_dpo_loss(X, X, Y, Y, F, F, F[:, 0], F[:, 0])], ids=["logprobs", "kl", "gae", "ppo", "dpo"])
def test_cpu_tensors_are_refused(call):
    with pytest.raises(ValueError, match="the kernels take CUDA tensors, not cpu ones"):
        call()


# --- the package and the launch ---------------------------------------------------------------------------------------


def test_importing_the_package_does_not_import_triton():
    """Other libraries find a package named kernels beside them and import it; its functions come when asked for."""
    code = ("import sys, kernels; assert 'triton' not in sys.modules and 'torch' not in sys.modules; "
            "sys.modules['triton'] = None\n"
            "try: kernels.gae\nexcept ImportError: pass\nelse: raise SystemExit('no error')")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kernels.nothing
    assert all(callable(getattr(kernels, name)) for name in kernels.HOMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_cover_the_row(dtype):
    """In registers and in loops: tiles hold every whole group, warps are a power of two, and no tile is four times too wide."""
    unit = 16 // dtype.itemsize
    for V in (1, 7, 8, 9, 257, 4097, 50257, 50304, ppo.RESIDENT, ppo.RESIDENT + 1, 151936):
        for form in (tiling(V, dtype), ppo.shape(V, dtype)):
            assert form["UNIT"] == unit and form["num_warps"] in (1, 2, 4, 8)
            assert form["GROUPS"] <= 4 * max(V // unit, 1) and form["GROUPS"].bit_count() == 1
        assert form["RESIDENT"] == (dtype == torch.bfloat16 and V <= ppo.RESIDENT)
        if form["RESIDENT"]:
            assert form["TILES"] * form["GROUPS"] >= V // unit and form["TILES"] <= 26


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@needs_gpu
@per_dtype
def test_sizes_of_real_models(dtype):
    logits, arguments = ppo_problem(8, 64, 50257, dtype)
    assert_ppo(logits, dict(arguments, kl_coef=0.1, entropy_coef=0.01, dual_clip=3.0),
               upstream=2.0 ** 12 if dtype == torch.float16 else 1.0)


@needs_gpu
def test_many_rows_at_once():
    """More rows than run at a time, as often as a race would need to show: every run the same to the bit."""
    logits, arguments = ppo_problem(64, 64, 50257, torch.bfloat16)
    first = ppo_gradient(fused_ppo_loss, logits, arguments | dict(entropy_coef=0.01))
    for _ in range(5):
        again = ppo_gradient(fused_ppo_loss, logits, arguments | dict(entropy_coef=0.01))
        assert again[0] == first[0] and torch.equal(again[1], first[1])


@needs_gpu
def test_more_than_2_to_the_31_logits():
    """43000 x 50257 logits in place: the last rows' gradients are those of the last rows alone, divided alike."""
    N, V = 43_000, 50257
    assert N * V > 2 ** 31
    torch.use_deterministic_algorithms(False)
    logits = torch.randn(N, V, device=DEVICE, dtype=torch.bfloat16)
    arguments = dict(targets=torch.randint(V, (N,), device=DEVICE), logprobs=torch.full((N,), -11.0, device=DEVICE),
                     advantages=torch.randn(N, device=DEVICE), mask=torch.ones(N, device=DEVICE), denominator=8.0)
    last = {name: x[-8:] if torch.is_tensor(x) else x for name, x in arguments.items()}
    right = ppo_gradient(fused_ppo_loss, logits[-8:].clone(), last)[1]
    logits.requires_grad_()
    fused_ppo_loss(logits, inplace=True, **arguments)[0].backward()
    torch.testing.assert_close(logits.detach()[-8:].double(), right, rtol=2 ** -7, atol=1e-8)


@needs_gpu
def test_peak_memory():
    """In place, nothing of the logits' size is made; out of place, one such tensor, the gradient."""
    logits, arguments = ppo_problem(16, 64, 50257, torch.bfloat16)
    size = logits.numel() * logits.element_size()
    for inplace, most in ((True, 0.01), (False, 1.01)):
        leaf = logits.detach().clone().requires_grad_()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fused_ppo_loss(leaf, inplace=inplace, **arguments)[0].backward()
        assert torch.cuda.max_memory_allocated() - before < most * size


# --- without a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED or GPU, reason="runs this file where neither a GPU nor the interpreter does")
def test_interpreter():
    """The tests above, in Triton's interpreter."""
    result = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(Path(__file__))], cwd=ROOT,
                            env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2_000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 200
