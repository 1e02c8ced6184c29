"""The kernels on a GPU: time, bandwidth and memory beside eager torch, torch.compile and other libraries' kernels.

    python bench/kernels.py --report bench/results/kernels.md      needs a GPU; other libraries are used where installed
    python bench/kernels.py --smoke                                anywhere: every case at a tiny size, correctness only

Every result of everyone is first compared with the definition in float64, all rows of it, on inputs that nobody has
seen and in new memory that holds NaN. Times are medians of triton.testing.do_bench; it turns through three sets of
inputs, so that none is found in the cache. Kernels that work in place are then timed on what they left behind: their
speed does not depend on values. Bandwidth counts the bytes that the work needs at least, whatever is really moved, as a
share of what a copy reaches in the same run. --smoke runs in Triton's interpreter, on CPU tensors.
"""
import argparse
import functools
import importlib.metadata
import itertools
import math
import os
import platform
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

if __name__ == "__main__" and "--smoke" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from torch.nn.functional import pad
from triton.errors import TritonError

import kernels
from nanorlhf import advantages, logprobs, losses
from nanorlhf.masked import masked_mean

VOCABULARIES = (50257, 50304, 151936)
LENGTH, WIDTH = 128, 768  # tokens of a sequence, C of the hidden states
KL = dict(kl_coef=0.05, kl_estimator="k3")
WRONG = {torch.float32: 1e-4, torch.bfloat16: 0.03}  # relative error that no rounding explains
SUMS = ("loss", "dweight")  # results summed over rows; all others have a row for each
PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "fla-core", "trl")
REFUSALS = (ImportError, RuntimeError, AssertionError, ValueError, TypeError, AttributeError, TritonError)


# --- inputs, all (B, L, ...) ------------------------------------------------------------------------------------------


def generator(device, seed):
    return functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(seed), device=device)


def shape(N):
    length = min(LENGTH, N // 2)
    return N // length, length


def some_logits(N, V, dtype, normal):
    """About -100, as GPT-2's are, and targets."""
    rows = shape(N)
    logits = normal(*rows, V, dtype=torch.float32).mul_(3).sub_(100).to(dtype)
    return {"logits": logits, "targets": (normal(*rows).abs() * V).long() % V}


def ppo_inputs(N, V, dtype, normal):
    """Ratios on both sides of the clip. One advantage a sequence, because Liger's GRPO loss takes no other."""
    given = some_logits(N, V, dtype, normal)
    parts = zip(given["logits"].split(1), given["targets"].split(1))  # whole, they would take many times the logits
    new = torch.cat([logprobs.token_logprobs(*part)[0] for part in parts])
    return given | {"old": new + 0.3 * normal(*new.shape), "ref": new + 0.3 * normal(*new.shape),
                    "advantages": normal(len(new), 1).expand(new.shape).contiguous()}


def kl_inputs(N, V, dtype, normal):
    logits = some_logits(N, V, dtype, normal)["logits"]
    return {"logits": logits, "ref_logits": (logits + normal(*logits.shape, dtype=dtype)).to(dtype)}


def dpo_inputs(N, V, dtype, normal):
    """N / 2 tokens on each side."""
    sides = [{name: x[:len(x) // 2] for name, x in some_logits(N, V, dtype, normal).items()} for _ in range(2)]
    found = {f"{side}_{name}": x for side, one in zip(("chosen", "rejected"), sides) for name, x in one.items()}
    return found | {f"ref_{side}": normal(len(found["chosen_logits"])) - 1000 for side in ("chosen", "rejected")}


def gae_inputs(N, V, dtype, normal):
    return {"rewards": normal(*shape(N)), "values": normal(*shape(N))}


def linear_inputs(N, V, dtype, normal):
    width = min(WIDTH, 8 * N)
    return {"hidden": normal(*shape(N), width).to(dtype), "weight": (normal(V, width) * 3 / width ** 0.5).to(dtype),
            "targets": (normal(*shape(N)).abs() * V).long() % V}


# --- definitions and kernels: (total rows, inputs) -> results, of which "loss" is differentiated ----------------------


def scores(function):
    return lambda total, logits, targets: dict(zip(("logprobs", "entropy"), function(logits, targets)))


def nll(function, entropy_coef=0.0):
    def loss(total, logits, targets):
        found, entropy = function(logits, targets)
        return {"loss": -(found.sum() + (entropy_coef * entropy.sum() if entropy_coef else 0)) / total}
    return loss


def ppo_definition(total, logits, targets, old, ref, advantages):
    mask = torch.ones_like(targets, dtype=torch.bool)
    new, _ = logprobs.token_logprobs(logits, targets)
    loss, _ = losses.ppo_policy_loss(new, old, advantages, mask)
    kl = masked_mean(logprobs.kl_estimate(new, ref, KL["kl_estimator"]), mask)
    return {"loss": (loss + KL["kl_coef"] * kl) * targets.numel() / total}


def ppo(total, logits, targets, old, ref, advantages, inplace=False):
    mask = torch.ones_like(targets, dtype=torch.bool)
    return {"loss": kernels.fused_ppo_loss(logits, targets, old, advantages, mask, ref_logprobs=ref, inplace=inplace,
                                           **KL)[0]}


def divergence(function, mean=False):
    def result(total, logits, ref_logits):
        kl = function(logits, ref_logits)
        return {"loss": kl.sum() / total} if mean else {"kl": kl}
    return result


def dpo_definition(total, chosen_logits, chosen_targets, rejected_logits, rejected_targets, ref_chosen, ref_rejected):
    chosen = logprobs.token_logprobs(chosen_logits, chosen_targets)[0].sum(1)
    rejected = logprobs.token_logprobs(rejected_logits, rejected_targets)[0].sum(1)
    pairs = total / 2 / chosen_targets.shape[1]
    return {"loss": losses.dpo_loss(chosen, rejected, ref_chosen, ref_rejected)[0].sum() / pairs}


def dpo(total, chosen_logits, chosen_targets, rejected_logits, rejected_targets, ref_chosen, ref_rejected):
    mask = torch.ones_like(chosen_targets, dtype=torch.bool)
    return {"loss": kernels.fused_dpo_loss(chosen_logits, rejected_logits, chosen_targets, rejected_targets, mask, mask,
                                           ref_chosen, ref_rejected)[0]}


def gae(function):
    return lambda total, rewards, values: dict(zip(("advantages", "returns"), function(
        rewards, values, torch.ones_like(values, dtype=torch.bool))))


def linear(function, head):
    """`head` of what function(hidden, weight, targets) scores: `scores` or `nll`."""
    return lambda total, hidden, weight, targets: head(lambda _, y: function(hidden, weight, y))(total, None, targets)


def linear_definition(hidden, weight, targets):
    return logprobs.token_logprobs(hidden @ weight.T, targets)


# --- other libraries, called as their own documentation does ----------------------------------------------------------


def liger_nll(total, logits, targets):
    from liger_kernel.transformers.functional import liger_cross_entropy
    return {"loss": liger_cross_entropy(logits.flatten(0, 1), targets.flatten())}


def liger_ppo(total, logits, targets, old, ref, advantages):
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss
    loss, _ = triton_grpo_loss(logits, old, ref, targets, advantages[:, 0].contiguous(), torch.ones_like(old),
                               temperature=1.0, beta=KL["kl_coef"], eps_high=0.2, loss_type="bnpo", reduce=True)
    return {"loss": loss}


def one_more_step(logits, **rest):
    """Liger's GRPO loss leaves out each sequence's last row."""
    return {"logits": pad(logits, (0, 0, 0, 1)), **rest}


def liger_linear(total, hidden, weight, targets):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    return {"loss": liger_fused_linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten())}


def cce_linear(total, hidden, weight, targets):
    from cut_cross_entropy import linear_cross_entropy
    return {"loss": linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten())}


def fla_nll(total, logits, targets):
    from fla.modules.fused_cross_entropy import cross_entropy_loss
    return {"loss": cross_entropy_loss(logits.flatten(0, 1), targets.flatten())[0].mean()}


def fla_linear(total, hidden, weight, targets):
    from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss
    return {"loss": fused_linear_cross_entropy_loss(hidden.flatten(0, 1), targets.flatten(), weight)}


def trl_scores(logits, targets):
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy
    return selective_log_softmax_and_entropy(logits, targets)


def trl_linear(hidden, weight, targets):
    from trl.kernels import ChunkedLogProbFunction
    return [x.view(targets.shape) for x in ChunkedLogProbFunction.apply(
        hidden.flatten(0, 1), weight, None, targets.flatten(), 1.0, 8192, None, 1.0, ("entropy",))[:2]]


# --- cases ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """wanted: inputs that the loss is differentiated in. others: name -> (function, where it does less, how to make
    inputs for it). least: reads and writes of a logit, at least. products: of N x V x C. goal: µs at 8192 x 50257."""
    name: str
    inputs: Callable
    definition: Callable
    ours: Callable
    wanted: tuple = ()
    least: int = 0
    products: int = 0
    goal: int | None = None
    others: dict = field(default_factory=dict)


DEFINITION, KERNEL, SCORE, LINEAR = (logprobs.token_logprobs, kernels.token_logprobs, linear_definition,
                                     kernels.linear_token_logprobs)
TRL, TRL_CHUNKED = "TRL logprob_entropy", "TRL chunked_logprob"
GRPO = {"Liger GRPO loss": (liger_ppo, "2 launches, in place; no entropy", one_more_step)}
CASES = [
    Case("token_logprobs, forward", some_logits, scores(DEFINITION), scores(KERNEL), least=1, goal=310,
         others={TRL: (scores(trl_scores), "", None)}),
    Case("token_logprobs, forward + backward", some_logits, nll(DEFINITION), nll(KERNEL), ("logits",), 2,
         others={"Liger cross-entropy": (liger_nll, "no entropy; in place; its forward makes the gradient", None),
                 "fla cross-entropy": (fla_nll, "no entropy", None), TRL: (nll(trl_scores), "", None)}),
    Case("token_logprobs, entropy's gradient too", some_logits, nll(DEFINITION, 0.5), nll(KERNEL, 0.5), ("logits",), 2,
         others={TRL: (nll(trl_scores, 0.5), "", None)}),
    Case("fused_ppo_loss, with gradient", ppo_inputs, ppo_definition, ppo, ("logits",), 2, goal=650, others=GRPO),
    Case("fused_ppo_loss, in place", ppo_inputs, ppo_definition, functools.partial(ppo, inplace=True), ("logits",), 2,
         goal=650, others=GRPO),
    Case("exact_kl, forward", kl_inputs, divergence(logprobs.exact_kl), divergence(kernels.exact_kl), least=2,
         goal=650),
    Case("exact_kl, with gradient", kl_inputs, divergence(logprobs.exact_kl, True), divergence(kernels.exact_kl, True),
         ("logits",), 3, goal=950),
    Case("fused_dpo_loss, with gradient", dpo_inputs, dpo_definition, dpo, ("chosen_logits", "rejected_logits"), 3),
    Case("gae", gae_inputs, gae(advantages.gae), gae(kernels.gae)),
    Case("linear_token_logprobs, forward", linear_inputs, linear(SCORE, scores), linear(LINEAR, scores), products=1,
         goal=1000, others={TRL_CHUNKED: (linear(trl_linear, scores), "", None)}),
    Case("linear_token_logprobs, forward + backward", linear_inputs, linear(SCORE, nll), linear(LINEAR, nll),
         ("hidden", "weight"), products=3, goal=3300,
         others={"Liger fused linear": (liger_linear, "no entropy", None),
                 "cut-cross-entropy": (cce_linear, "no entropy; drops small gradients", None),
                 "fla fused linear": (fla_linear, "no entropy", None),
                 TRL_CHUNKED: (linear(trl_linear, nll), "", None)}),
]


def everyone(case, compiled):
    """(name, function, remark, how to make its inputs) of all who do a case's work, ours first."""
    yield "ours", case.ours, "", None
    yield "torch, eager", case.definition, "", None
    if compiled:
        yield "torch.compile", torch.compile(case.definition, dynamic=False), "", None
    for name, other in case.others.items():
        yield name, *other


def run(case, function, inputs, total):
    """Results, and the loss's gradients into what is wanted."""
    inputs = {name: x.detach().requires_grad_(name in case.wanted) for name, x in inputs.items()}
    with torch.set_grad_enabled(bool(case.wanted)):
        results = function(total, **inputs)
    if case.wanted:
        found = torch.autograd.grad(results["loss"], [inputs[name] for name in case.wanted])
        results |= {f"d{name}": x for name, x in zip(case.wanted, found)}
    return {name: x.detach() for name, x in results.items()}


# --- correctness ------------------------------------------------------------------------------------------------------


def wrongness(case, results, inputs, total):
    """{result: root mean square of its error, as a share of its own} against the float64 definition, by sequences.
    A NaN counts as infinitely wrong."""
    squares, sums = {}, {}
    for i in range(min(len(x) for name, x in inputs.items() if name != "weight")):
        part = {name: x if name == "weight" else x[i:i + 1] for name, x in inputs.items()}
        part = {name: x.double() if x.is_floating_point() else x for name, x in part.items()}
        right = run(case, case.definition, part, total)
        for name, x in right.items():
            if name in SUMS:
                sums[name] = sums.get(name, 0) + x
            else:
                ours = results[name].view(-1, *results[name].shape[-x.dim() + 1:])[i:i + 1, :x.shape[1]].double()
                error, size = squares.get(name, (0, 0))
                squares[name] = error + (ours - x).square().sum(), size + x.square().sum()
    squares |= {name: ((results[name].double() - x).square().sum(), x.square().sum()) for name, x in sums.items()}
    return {name: (error / size).sqrt().nan_to_num(nan=math.inf).item() for name, (error, size) in squares.items()}


def checked(case, function, prepare, inputs, total):
    """`wrongness` of a function on copies of the inputs; memory it allocates and does not fill holds NaN."""
    own = {name: x.clone() for name, x in inputs.items()}
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills it
    try:
        results = run(case, function, prepare(**own) if prepare else own, total)
    finally:
        torch.use_deterministic_algorithms(False)
    return wrongness(case, results, inputs, total)


def reason(error):
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: {error.name}"
    return f"fails: {type(error).__name__} {(str(error).splitlines() or [''])[0][:60]}"


def smoke(cases, shapes=((8, 7), (8, 130), (6, 1001))):
    """Every case of everyone who can run here; what is ours or the definition's must be right."""
    wrong = 0
    for case, (N, V) in itertools.product(cases, shapes):
        inputs = case.inputs(N, V, torch.float32, generator("cpu", seed=V))
        for name, function, _, prepare in everyone(case, compiled=False):
            try:
                error = max(checked(case, function, prepare, inputs, N).values())
            except REFUSALS as refusal:
                if name in ("ours", "torch, eager"):
                    raise
                print(f"{case.name}, {N} x {V}, {name}: {reason(refusal)}")
                continue
            good = error <= WRONG[torch.float32]
            wrong += not good and name in ("ours", "torch, eager")
            print(f"{case.name}, {N} x {V}, {name}: {error:.1e}{'' if good else ' WRONG'}", flush=True)
    return wrong


# --- time -------------------------------------------------------------------------------------------------------------


def microseconds(call):
    return 1e3 * triton.testing.do_bench(call, return_mode="median")


def extra_memory(call):
    """Bytes allocated at the peak of a call, beside what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def turn(case, function, turns, total):
    return run(case, function, next(turns), total)


def copy_bandwidth(N, V):
    """Bytes a microsecond, read and written, of a copy as large as the logits."""
    source = torch.ones(N, V, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / microseconds(lambda: target.copy_(source))


def measure(case, N, V, bandwidth):
    """Lines of the table for one case."""
    fresh = case.inputs(N, V, torch.bfloat16, generator("cuda", seed=time.time_ns()))
    for name, function, remark, prepare in everyone(case, compiled=True):
        try:
            error = max(checked(case, function, prepare, fresh, N).values())
            sets = [case.inputs(N, V, torch.bfloat16, generator("cuda", seed)) for seed in range(3)]
            turns = itertools.cycle([prepare(**one) if prepare else one for one in sets])
            call = functools.partial(turn, case, function, turns, N)
            memory, spent = extra_memory(call), microseconds(call)
        except REFUSALS as refusal:
            if name == "ours":
                raise
            yield f"| {case.name} | {V} | {name} | {reason(refusal)} | | | | | {remark} |"
            continue
        finally:
            sets = turns = call = None  # a set may be 5 GB
        share = f"{case.least * 2 * N * V / spent / bandwidth:.0%} of a copy" if case.least else ""
        if case.products:
            share = f"{2 * case.products * N * V * WIDTH / spent / 1e6:.0f} TFLOP/s"
        goal = ""
        if case.goal and name == "ours" and (N, V) == (8192, 50257):
            goal = f"{case.goal}: {'met' if spent <= case.goal else 'missed'}"
        good = f"{error:.1e}" + (" **WRONG**" if not error <= WRONG[torch.bfloat16] else "")
        cells = case.name, V, name, f"{spent:.0f}", share, f"{memory / 2 ** 20:.0f}", good, goal, remark
        yield f"| {' | '.join(map(str, cells))} |"


def benchmark(cases, N, vocabularies):
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES
                         if any(importlib.metadata.distributions(name=name)))
    out = ["# Kernels: time, bandwidth, memory", "",
           "    python bench/kernels.py --report bench/results/kernels.md", "",
           f"{torch.cuda.get_device_name()}, {time.strftime('%Y-%m-%d')}, Python {platform.python_version()}, "
           f"{versions}. {N} rows, bfloat16, C = {WIDTH}. What the columns are: `python bench/kernels.py --help`.", "",
           "| case | V | who | µs | reached | extra MiB | error | goal, µs | remark |",
           "|---|---:|---|---:|---:|---:|---:|---|---|"]
    for V in vocabularies:
        bandwidth = copy_bandwidth(N, V)
        copied = f"{4 * N * V / bandwidth:.0f} | {bandwidth / 1e6:.2f} TB/s"
        out.append(f"| copy of the logits | {V} | torch | {copied} | | | | |")
        for case in cases:
            for line in measure(case, N, V, bandwidth):
                out.append(line)
                print(line, flush=True)
            torch.cuda.empty_cache()
    return "\n".join(out) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=8192, help="rows, a multiple of 256 (8192)")
    parser.add_argument("--vocab", type=int, nargs="+", default=VOCABULARIES, help="widths of the logits")
    parser.add_argument("--cases", nargs="+", default=[""], help="only cases whose name has one of these in it")
    parser.add_argument("--report", type=Path, help="Markdown file to write")
    parser.add_argument("--smoke", action="store_true", help="correctness alone, tiny, in the interpreter")
    arguments = parser.parse_args()
    cases = [case for case in CASES if any(part in case.name for part in arguments.cases)]
    warnings.filterwarnings("ignore")  # of operations that cannot be made deterministic
    if arguments.smoke:
        return smoke(cases)
    if not torch.cuda.is_available():
        print("bench/kernels.py times kernels, and there is no CUDA device here; --smoke checks them on the CPU")
        return 2
    text = benchmark(cases, arguments.n, arguments.vocab)
    if arguments.report:
        arguments.report.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
