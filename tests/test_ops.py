"""The torch twins in ops.py against the definitions, value and gradient, and the choice between torch and Triton."""
import importlib
import math
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanorlhf import logprobs, ops
from nanorlhf.advantages import gae
from nanorlhf.errors import InputError
from nanorlhf.gpt2 import GPT2, GPT2Config
from nanorlhf.logprobs import kl_estimate
from nanorlhf.losses import ppo_policy_loss
from nanorlhf.masked import masked_mean

INF = float("inf")


def both(function, logits, targets, temperature, weights):
    """(logprobs, entropy, gradient into the logits) for random upstream gradients."""
    logits = logits.clone().requires_grad_()
    found = function(logits, targets, temperature)
    sum((x * w.to(x)).sum() for x, w in zip(found, weights)).backward()
    return *(x.detach() for x in found), logits.grad


def case(rows, vocabulary, seed=0, scale=3.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) * scale + shift
    weights = torch.randn(2, rows, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, vocabulary, (rows,), generator=generator), weights


@pytest.mark.parametrize("rows, vocabulary", [(1, 2), (7, 11), (600, 1000), (9, 50257)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_equals_the_definition_in_float64(rows, vocabulary, temperature):
    """Several parts of PART entries, the last one smaller, and a single one."""
    logits, targets, weights = case(rows, vocabulary)
    for found, expected in zip(both(ops.token_logprobs, logits, targets, temperature, weights),
                               both(logprobs.token_logprobs, logits, targets, temperature, weights)):
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift, scale", [(0, 3), (-115, 3), (1e4, 30), (-1e4, 30), (0, 0.01)])
def test_is_as_exact_as_the_definition(dtype, shift, scale):
    """Against float64 on the same rounded logits: at most twice the definition's error. GPT-2's logits lie near -115."""
    logits, targets, weights = case(50, 3001, scale=scale, shift=shift)
    logits = logits.to(dtype)
    exact = both(logprobs.token_logprobs, logits.double(), targets, 0.9, weights)
    found, definition = (both(function, logits, targets, 0.9, weights) for function in (ops.token_logprobs, logprobs.token_logprobs))
    for a, b, c in zip(found, definition, exact):
        assert a.dtype == b.dtype and a.isfinite().all()
        assert (a - c).abs().max() <= 2 * (b - c).abs().max() + 1e-6, (a - c).abs().max()


def test_gradient_without_an_entropy_term():
    logits, targets, weights = case(20, 30)
    weights[1] = 0
    for found, expected in zip(both(ops.token_logprobs, logits, targets, 1.0, weights),
                               both(logprobs.token_logprobs, logits, targets, 1.0, weights)):
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_forbidden_tokens_by_hand():
    """Logits (0, 0, -inf): p = (1/2, 1/2, 0), log p = (-0.6931, -0.6931, -inf), H = 0.6931; d log p_0 / d logits = (1/2, -1/2, 0);
    the entropy of a flat distribution has gradient 0, and nothing is NaN."""
    logits = torch.tensor([[0.0, 0.0, -INF], [0.0, 0.0, -INF]], requires_grad=True)
    found, entropy = ops.token_logprobs(logits, torch.tensor([0, 2]))
    assert found[0].item() == pytest.approx(-0.693147) and found[1].item() == -INF
    assert entropy.tolist() == pytest.approx([0.693147] * 2)
    (found[0] + 3 * entropy[0]).backward()
    assert torch.allclose(logits.grad[0], torch.tensor([0.5, -0.5, 0.0]), atol=1e-6) and (logits.grad[1] == 0).all()
    _, entropy = ops.token_logprobs(logits, torch.tensor([0, 2]))
    gradient, = torch.autograd.grad(entropy[1], logits)  # of a row whose own token is forbidden
    assert torch.allclose(gradient, torch.zeros(2, 3), atol=1e-6)


@pytest.mark.parametrize("gap", [4.0, 10.0, 16.0, 40.0])
def test_the_gradient_at_the_target_is_minus_expm1_of_the_log_prob(gap):
    """Logits (0, gap): to all its digits, where 1 - exp(log p) would round at 6e-8, 4e-5 of the whole at a gap of 10. The log-prob
    itself is -log(1 + e^-gap), whose sum float32 rounds to steps of 1.2e-7: beyond a gap of 17 both are 0. (This test used to ask for
    4.2e-18 at 40, with a tolerance of 1e-12 that it did not mention, and got 0.) The other entry is -e^-gap to 7 digits at any gap."""
    logits = torch.tensor([[0.0, gap]], requires_grad=True)
    logprob = ops.token_logprobs(logits, torch.tensor([1]))[0]
    logprob.sum().backward()
    other, target = logits.grad[0].tolist()
    assert target == pytest.approx(-math.expm1(logprob.item()), rel=1e-6, abs=0)
    assert target == pytest.approx(1 / (1 + math.exp(gap)), rel=0, abs=1.2e-7)
    assert other == pytest.approx(-1 / (1 + math.exp(gap)), rel=1e-6, abs=0)


def test_shapes_and_errors():
    logits = torch.randn(2, 3, 5)
    found = ops.token_logprobs(logits, torch.zeros(2, 3, dtype=torch.long))
    assert [x.shape for x in found] == [(2, 3), (2, 3)]
    assert [x.shape for x in ops.token_logprobs(torch.randn(0, 5), torch.zeros(0, dtype=torch.long))] == [(0,), (0,)]
    with pytest.raises(ValueError, match="do not fit targets"):
        ops.token_logprobs(logits, torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="temperature"):
        ops.token_logprobs(logits, torch.zeros(2, 3, dtype=torch.long), 0.0)


class Largest(TorchDispatchMode):
    """Counts the tensors of at least `size` entries that are made, and remembers the most entries of the others."""

    def __init__(self, size):
        super().__init__()
        self.size, self.whole, self.most = size, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                entries = x.untyped_storage().nbytes() // x.element_size()
                if entries >= self.size:
                    self.whole += 1
                else:
                    self.most = max(self.most, entries)
        return out


def test_memory_of_token_logprobs():
    """Of the logits' size only the gradient is made; everything else fits the buffer. The definition makes several."""
    logits, targets, _ = case(512, 4096)
    logits = logits.float().requires_grad_()
    with Largest(logits.numel()) as lean:
        ops.token_logprobs(logits, targets)[0].sum().backward()
    assert lean.whole == 1 and lean.most <= ops.PART
    with Largest(logits.numel()) as definition:
        logprobs.token_logprobs(logits, targets)[0].sum().backward()
    assert definition.whole > 3


def test_linear_equals_the_whole_product_and_never_holds_it():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 700, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1000, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 1000, (3, 700), generator=generator)
    expected = logprobs.token_logprobs(hidden @ weight.T, targets, 0.8)
    gradients = torch.autograd.grad(expected[0].sum() + expected[1].square().sum(), (hidden, weight))
    with Largest(2100 * 1000) as memory:
        found = ops.linear_token_logprobs(hidden, weight, targets, 0.8)
        parts = torch.autograd.grad(found[0].sum() + found[1].square().sum(), (hidden, weight))
    assert memory.whole == 0
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        ops.linear_token_logprobs(hidden, weight, targets, 0.8)
    assert sum(kept) < 2100 * 1000 / 4, "the parts of the logits wait for the backward: together they are the whole"
    for a, b in zip((*found, *parts), (*expected, *gradients)):
        assert a.shape == b.shape and torch.allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"dual_clip": 1.5}, {"cliprange": 0.5}, {"entropy_coef": 0.1},
                                     {"kl_coef": 0.3, "kl_estimator": "k2"}])
def test_ppo_loss_is_its_parts_and_micro_batches_add_up(options):
    """fused = policy loss + kl_coef KL - entropy_coef H by the definitions; with the step's tokens as denominator the losses of
    ragged halves add up to the whole."""
    logits, targets, weights = case(12, 40, seed=3)
    logits, targets = logits.view(4, 3, 40).requires_grad_(), targets.view(4, 3)
    old, ref, advantages = (torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) - 3 for n in range(3))
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    new, entropy = logprobs.token_logprobs(logits, targets, 0.7)
    policy_loss, stats = ppo_policy_loss(new, old, advantages, mask, options.get("cliprange", 0.2), options.get("dual_clip"))
    mean_entropy, kl = masked_mean(entropy, mask), masked_mean(kl_estimate(new, ref, options.get("kl_estimator", "k3")), mask)
    expected = policy_loss - options.get("entropy_coef", 0) * mean_entropy + options.get("kl_coef", 0) * kl
    wanted, = torch.autograd.grad(expected, logits)
    loss, found = ops.fused_ppo_loss(logits, targets, old, advantages, mask, 0.7, ref_logprobs=ref, **options)
    gradient, = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12) and torch.allclose(gradient, wanted, atol=1e-12)
    assert found == pytest.approx({"policy_loss": policy_loss.item(), **stats, "entropy": mean_entropy.item(), "kl": kl.item()}, rel=1e-6)
    halves = [ops.fused_ppo_loss(logits[rows], targets[rows], old[rows], advantages[rows], mask[rows], 0.7, ref_logprobs=ref[rows],
                                 denominator=mask.sum(), **options)[0] for rows in (slice(0, 2), slice(2, 4))]
    assert sum(halves).item() == pytest.approx(loss.item(), rel=1e-12)


def test_low_memory_scores_and_losses_are_the_same():
    """Log-probs, entropy, PPO's loss, its numbers and its gradient at T = 0.9, with options that are not the defaults; the whole logits are
    asked for by one of the two alone."""
    torch.manual_seed(0)
    model = GPT2.from_config(GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2, initializer_range=0.5))
    hidden, targets, mask = torch.randn(3, 5, 8, requires_grad=True), torch.randint(0, 50, (3, 5)), torch.rand(3, 5) < 0.7
    old, advantages = torch.randn(3, 5) - 4, torch.randn(3, 5)
    options = dict(cliprange=0.4, entropy_coef=0.1, ref_logprobs=old + 0.1, kl_coef=0.2, kl_estimator="k2", denominator=20)
    expected = ops.ppo_loss(*logprobs.token_logprobs(model.logits(hidden), targets, 0.9), old, advantages, mask, **options)
    logits, asked, results = model.logits, [], []
    model.logits = lambda hidden: asked.append(hidden.shape) or logits(hidden)
    for low_memory in (False, True):
        maker = ops.choose("torch", low_memory=low_memory)
        results.append([*maker.score(model, hidden, targets, 0.9)])
        loss, found = maker.ppo_loss(model, hidden, targets, old, advantages, mask, 0.9, **options)
        assert found == pytest.approx(expected[1], rel=1e-5) and loss.item() == pytest.approx(expected[0].item(), rel=1e-5)
        results[-1] += torch.autograd.grad(loss, hidden)
        assert maker.low_memory is low_memory and len(asked) == 2
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("low_memory", [False, True])
def test_logits_are_made_in_the_weights_precision(low_memory):
    """bfloat16 states, as autocast may leave them, meet float32 weights: the product is that of the same states in float32."""
    model = GPT2.from_config(GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    hidden, targets, maker = torch.randn(3, 5, 8).bfloat16(), torch.randint(0, 50, (3, 5)), ops.choose("torch", low_memory=low_memory)
    for found, expected in zip(maker.score(model, hidden, targets, 1.0), maker.score(model, hidden.float(), targets, 1.0)):
        assert torch.equal(found, expected)


def test_a_second_derivative_is_an_error():
    """The backward takes what the forward found for constants: a derivative of it would be wrong, and there is none."""
    logits = torch.randn(2, 5, requires_grad=True)
    gradient, = torch.autograd.grad(ops.token_logprobs(logits, torch.tensor([0, 1]))[0].sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


def test_the_choice_is_said_and_never_silent(capsys, monkeypatch):
    assert ops.choose("torch").name == "torch"
    assert capsys.readouterr().out == "kernels: torch\n"
    assert ops.choose("auto", "cpu").name == "torch"
    assert capsys.readouterr().out == "kernels: torch (Triton needs a CUDA device, this is cpu)\n"
    with pytest.raises(InputError, match="--kernels triton: Triton needs a CUDA device, this is cpu; --kernels torch runs"):
        ops.choose("triton", "cpu")

    def missing(name):
        raise ImportError(name)
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(InputError, match="the package triton is not installed"):
        ops.choose("triton", "cuda")


def test_a_masked_token_has_no_gradient_whatever_its_logits_hold():
    """As in the kernels: 0 and not NaN, where both upstream gradients are 0."""
    logits = torch.randn(3, 7)
    logits[1] = float("nan")
    logits.requires_grad_()
    logprobs, entropy = ops.token_logprobs(logits, torch.tensor([0, 1, 2]))
    (logprobs[[0, 2]].sum() + entropy[[0, 2]].sum()).backward()
    assert not logits.grad[1].any() and logits.grad[[0, 2]].isfinite().all() and logits.grad[0].any()


def test_a_kl_coefficient_without_a_reference_is_an_error():
    x = torch.zeros(2)
    with pytest.raises(ValueError, match="kl_coef needs ref_logprobs"):
        ops.ppo_loss(x, x, x, x, torch.ones(2, dtype=torch.bool), kl_coef=0.1)


def test_nothing_in_nothing_out():
    """No rows, no tokens: empty results of the right shapes, as from the kernels."""
    results = ops.linear_token_logprobs(torch.zeros(0, 4), torch.zeros(9, 4), torch.zeros(0, dtype=torch.long))
    assert [result.shape for result in results] == [(0,), (0,)]
    for result in gae(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool), last_values=torch.zeros(2)):
        assert result.shape == (2, 0)
