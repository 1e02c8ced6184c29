"""token_logprobs and the PPO loss on the CPU: the lean twins of nanorlhf/ops.py beside log_softmax, gather and entropy written out.

Forward and backward, median of the repeats, both in one run; `extra` is the memory made beside the logits, in tensors of their size.

    python bench/cpu_logprobs.py --report bench/results/cpu_logprobs.md
"""
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanorlhf.config import option, parse


@dataclass
class Config:
    """Sizes and repeats."""
    repeats: int = option(15, "timed calls of each, in turn", group="Benchmark", at_least=3)
    threads: int = option(2, "torch threads", at_least=1)
    report: str = option("", "Markdown file to write; empty: only print", metavar="FILE")


if __name__ == "__main__":
    CONFIG = parse(Config)

import torch
from torch.profiler import ProfilerActivity, profile

from nanorlhf import logprobs, ops
from nanorlhf.losses import ppo_policy_loss
from nanorlhf.masked import masked_mean

SHAPES = ((3000, 800), (512, 50257))


def naive(logits, targets, old, advantages, mask):
    """The definitions, one after the other."""
    new, entropy = logprobs.token_logprobs(logits, targets, 0.7)
    return ppo_policy_loss(new, old, advantages, mask)[0] - 0.01 * masked_mean(entropy, mask)


def lean(logits, targets, old, advantages, mask):
    return ops.fused_ppo_loss(logits, targets, old, advantages, mask, 0.7, entropy_coef=0.01)[0]


def inputs(rows, vocabulary):
    generator = torch.Generator().manual_seed(0)
    old, advantages = torch.randn(2, 1, rows, generator=generator)
    return (torch.randn(1, rows, vocabulary, generator=generator, requires_grad=True),
            torch.randint(0, vocabulary, (1, rows), generator=generator), old - 7, advantages, torch.ones(1, rows, dtype=torch.bool))


def step(function, arguments):
    arguments[0].grad = None
    loss = function(*arguments)
    loss.backward()
    return loss.item(), arguments[0].grad


def seconds(function, arguments):
    started = time.perf_counter()
    step(function, arguments)
    return time.perf_counter() - started


def extra(function, arguments):
    """The most memory in use at once beside the logits, in tensors of their size: from the profiler's allocations, in order."""
    arguments[0].grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step(function, arguments)
    used = most = 0
    for event in sorted((e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        used += event.nbytes()
        most = max(most, used)
    return most / arguments[0].numel() / 4


def run(config):
    torch.set_num_threads(config.threads)
    lines = ["| N x V | naive | lean | ratio | naive extra | lean extra |", "|---|---:|---:|---:|---:|---:|"]
    for rows, vocabulary in SHAPES:
        arguments = inputs(rows, vocabulary)
        first, second = step(naive, arguments), step(lean, arguments)
        assert abs(first[0] - second[0]) < 1e-5 and torch.allclose(first[1], second[1], atol=1e-7), "they do not compute the same"
        times = [(seconds(naive, arguments), seconds(lean, arguments)) for _ in range(config.repeats)]
        a, b = (statistics.median(column) for column in zip(*times))
        ratio = statistics.median(x / y for x, y in times)
        lines.append(f"| {rows} x {vocabulary} | {1e3 * a:.1f} ms | {1e3 * b:.1f} ms | {ratio:.2f} | {extra(naive, arguments):.2f} "
                     f"| {extra(lean, arguments):.2f} |")
    text = "\n".join(["# PPO loss from logits on the CPU, forward and backward", "",
                      f"`python bench/cpu_logprobs.py`, {time.strftime('%Y-%m-%d')}, {platform.machine()}, {config.threads} threads, Python "
                      f"{platform.python_version()}, torch {torch.__version__}. `extra`: peak memory beside the logits, in tensors of their "
                      "size; 1 is the gradient itself.", "", *lines]) + "\n"
    print(text)
    if config.report:
        Path(config.report).write_text(text)


if __name__ == "__main__":
    run(CONFIG)
