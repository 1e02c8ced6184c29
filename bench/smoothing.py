"""Why the default SFT smooths its labels: what PPO learns after plain cross-entropy, and how much of its gradient is noise.

For each seed, SFT with several --label-smoothing, then PPO from each on the true reward, exact match. And from each SFT policy the
gradient of PPO's first update, on four batches of responses to prompts of their own: the cosine of two batches is near 1 where they
agree about the way to go, near 0 where each batch is right about nothing but itself.

Everything is made by the scripts, from the command lines that are printed; finished stages are reused.

    python bench/smoothing.py --report bench/results/smoothing.md
"""
import itertools
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanorlhf.config import option, parse


@dataclass
class Config:
    """Seeds, and where runs and table go."""
    seeds: list[int] = option([0, 1, 2], "seeds, each with SFT policies of its own", group="Benchmark", at_least=0)
    out: str = option("runs/smoothing", "folder of the runs: seed-N/sft-0, ppo-0, ...", metavar="FOLDER")
    report: str = option("", "Markdown file to write; empty: only print", metavar="FILE")


if __name__ == "__main__":
    CONFIG = parse(Config)

import torch
from torch.nn.functional import cosine_similarity

from bench.rewards import cell, stage
from nanorlhf.advantages import gae, shape_rewards
from nanorlhf.checkpoint import stream
from nanorlhf.data import load_splits
from nanorlhf.gpt2 import PolicyWithValue
from nanorlhf.losses import ppo_policy_loss
from nanorlhf.masked import whiten
from nanorlhf.metrics import exact_match
from nanorlhf.rollout import roll_out, score_tokens
from nanorlhf.run import main, read_config
from nanorlhf.sequences import encode_queries
from nanorlhf.tokenizer import Tokenizer

SMOOTHINGS = ("0", "0.01", "0.03", "0.1")
BATCHES, BATCH, PART = 4, 1024, 128


def first_gradient(actor, tokenizer, records, config, generator):
    """(gradient of PPO's first update, as one vector; mean entropy of a response token, nats) on one sampled response to each prompt.

    As train_ppo.py has it: the reward on the last token, no KL yet, values 0, GAE, whitened advantages, the clipped loss at ratio 1.
    """
    queries, _ = encode_queries(tokenizer, [record.prompt for record in records], config.template, config.max_query)
    batch = roll_out(actor, actor.policy, tokenizer, queries, config.max_response, generator=generator)
    mask = batch.response_mask  # (B, R)
    scores = torch.tensor([float(exact_match(*pair)) for pair in zip(batch.responses, [record.reference for record in records])])
    rewards = shape_rewards(scores, torch.zeros_like(batch.logprobs), mask, kl_coef=0.0)
    advantages = whiten(gae(rewards, batch.values, mask)[0], mask)
    actor.zero_grad()
    for rows in torch.arange(len(records)).split(PART):
        part = batch.select(rows)
        logprobs, _, _ = score_tokens(actor.policy, part.query_response, part.attention_mask, mask.shape[1], 1.0)
        loss, _ = ppo_policy_loss(logprobs, part.logprobs, advantages[rows], part.response_mask)
        (loss * part.response_mask.sum() / mask.sum()).backward()
    return torch.cat([weight.grad.flatten() for weight in actor.policy.parameters()]), batch.entropy[mask].mean().item()


def agreement(folder, seed):
    """(mean cosine of the gradients of two batches, over all pairs of batches; entropy) of an SFT policy, on training prompts."""
    actor, tokenizer = PolicyWithValue.from_pretrained(folder), Tokenizer.from_pretrained(folder)
    records, config = load_splits("nano").train, SimpleNamespace(**read_config(folder))
    order = torch.randperm(len(records), generator=stream(seed, "prompts", 0)).tolist()
    found = [first_gradient(actor, tokenizer, [records[i] for i in order[BATCH * n:BATCH * (n + 1)]], config, stream(seed, "tokens", n))
             for n in range(BATCHES)]
    cosines = [cosine_similarity(a, b, dim=0).item() for (a, _), (b, _) in itertools.combinations(found, 2)]
    return sum(cosines) / len(cosines), sum(entropy for _, entropy in found) / BATCHES


def measure(home, seed, smoothing):
    """One seed's numbers for one amount of smoothing."""
    sft, ppo = home / f"sft-{smoothing}", home / f"ppo-{smoothing}"
    stage("train_sft.py", sft, f"--label-smoothing={smoothing}", f"--seed={seed}")
    results = stage("train_ppo.py", ppo, f"--policy={sft}", "--reward=exact_match", f"--seed={seed}")
    test, (cosine, entropy) = results["test"]["test"], agreement(sft, seed)
    return {"cosine": cosine, "entropy": entropy, "step": results["best_step"],
            **{(mode, model): test[mode][model]["exact_match"] for mode in ("sampled", "greedy") for model in ("SFT", "PPO")}}


def report(found, seeds):
    """The table, as Markdown. found: {smoothing: a dict of `measure` for each seed}."""
    lines = ["# Label smoothing before PPO", "",
             f"`python bench/smoothing.py`, {time.strftime('%Y-%m-%d')}, {platform.machine()} CPU, threads: {torch.get_num_threads()}, Python "
             f"{platform.python_version()}, torch {torch.__version__}. The default job's data and options, PPO on the true reward `exact_match`; means over "
             f"seeds {seeds}, each in brackets. Exact match on test prompts; entropy of a response token in nats; the cosine of PPO's first gradients on "
             f"two batches of {BATCH:,} responses, mean over the pairs of {BATCHES} batches.", "",
             "| label smoothing | sampled, SFT | sampled, PPO | greedy, SFT | greedy, PPO | best step | entropy | cosine |", "|---" + "|---:" * 7 + "|"]
    for smoothing, rows in found.items():
        cells = [cell([row[mode, model] for row in rows]) for mode in ("sampled", "greedy") for model in ("SFT", "PPO")]
        cells += [", ".join(str(row["step"]) for row in rows), cell([row["entropy"] for row in rows]), cell([row["cosine"] for row in rows])]
        lines.append(f"| {smoothing} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def run(config):
    found = {smoothing: [measure(Path(config.out) / f"seed-{seed}", seed, smoothing) for seed in config.seeds] for smoothing in SMOOTHINGS}
    text = report(found, config.seeds)
    print(text)
    if config.report:
        Path(config.report).write_text(text)


if __name__ == "__main__":
    main(run, CONFIG)
