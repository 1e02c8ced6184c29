"""Do ensembles, a sum with the truth, and people's logits help? On the default job's task, on several seeds.

    ensembles   three reward models with seeds of their own (their pairs, heads and order differ; the SFT policy that they start from
                is one); PPO on the first, on the mean, the minimum and the mean minus the standard deviation of the three
    sum         PPO on 0.7 times the first plus 0.3 times execution, the share of a row's checks that pass
    logits      answers of the SFT policy are rated by people who err: whoever sees an answer that passes its checks means 5, else 1, but
                for an error of mean 0 and standard deviation 2; their logits are of the ratings 1 to 5, peaked where they mean, and the
                rating is the likeliest. A reward model is trained on ratings with logits that are never, sometimes or always dropped, and
                tells passing test answers from failing ones, with and without logits.

Everything is made by the scripts, from the command lines that are printed; finished stages are reused.

    python bench/rewards.py --report bench/results/rewards.md
"""
import json
import platform
import shlex
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
    seeds: list[int] = option([0, 1, 2], "seeds, each with an SFT policy of its own", group="Benchmark", at_least=0)
    out: str = option("runs/rewards", "folder of the runs: seed-N/sft, reward-1, ...", metavar="FOLDER")
    report: str = option("", "Markdown file to write; empty: only print", metavar="FILE")


if __name__ == "__main__":
    CONFIG = parse(Config)

import torch

from nanorlhf.data import load_splits
from nanorlhf.evaluation import answer, compare
from nanorlhf.feedback import write_pairs
from nanorlhf.gpt2 import GPT2
from nanorlhf.metrics.execution import passes_checks
from nanorlhf.pipeline import call, mean_over_seeds, read_answers
from nanorlhf.reward import RewardModel
from nanorlhf.run import main, read_config
from nanorlhf.sandbox import Sandbox
from nanorlhf.tokenizer import Tokenizer

MEMBERS = ("reward-1", "reward-2", "reward-3")
REWARDS = {  # what PPO is trained on: (its folder, options of train_ppo.py with {} for the folder of the seed)
    "one reward model": ("ppo", ["--reward", "{}/reward-1"]),
    "mean of three": ("ppo-mean", ["--reward", *(f"{{}}/{name}" for name in MEMBERS)]),
    "minimum of three": ("ppo-min", ["--reward", *(f"{{}}/{name}" for name in MEMBERS), "--combine", "min"]),
    "mean - std of three": ("ppo-std", ["--reward", *(f"{{}}/{name}" for name in MEMBERS), "--combine", "mean-std"]),
    "0.7 one + 0.3 execution": ("ppo-sum", ["--reward", "0.7*{}/reward-1 + 0.3*execution"])}
DROPOUTS = {"0": "never", "0.5": "in half of the rows", "1": "always"}
RATED_ROWS, SAMPLES, ERROR = 2000, 2, 2.0


def stage(script, folder, *options):
    """The results of a finished run of a script, which is run, as from the command line, where there is none yet."""
    if (folder / "results.json").is_file():
        print(f"{folder}: finished already, reused")
    else:
        words = [script, f"--out={folder}", *options, *(["--resume", "--overwrite"] if folder.exists() else [])]
        print(f"$ python {shlex.join(words)}", flush=True)
        if code := call([sys.executable, str(ROOT / words[0]), *words[1:]]):
            raise SystemExit(code if code > 0 else 1)
    return json.loads((folder / "results.json").read_text())


def sampled_answers(home, records, seed):
    """One sampled answer of the SFT policy to each prompt, with `passed`: whether it passes all checks."""
    policy, tokenizer = GPT2.from_pretrained(home / "sft"), Tokenizer.from_pretrained(home / "sft")
    rows = answer(policy, tokenizer, records, SimpleNamespace(**read_config(home / "sft")), 1.0, seed=seed, batch_size=256)
    with Sandbox() as box:
        passed = passes_checks(box, [row["response"] for row in rows], [record.checks for record in records])
    return [row | {"passed": verdict} for row, verdict in zip(rows, passed)]


def rate(row, generator):
    """What a person who errs says of an answer: {"rating", "logits"}."""
    means = (5 if row["passed"] else 1) + ERROR * torch.randn((), generator=generator).item()
    logits = [-(rating - means) ** 2 / 2 for rating in range(1, 6)]
    return {"rating": 1 + logits.index(max(logits)), "logits": [value - max(logits) for value in logits]}


def ratings_file(home, seed):
    """Rated answers to training prompts, a file that train_reward.py splits by prompt."""
    path, generator = home / "ratings.jsonl", torch.Generator().manual_seed(seed)
    if not path.is_file():
        records = load_splits("nano").train[:RATED_ROWS]
        rows = [row for i in range(SAMPLES) for row in sampled_answers(home, records, 1000 * seed + i)]
        write_pairs(path, [{"prompt": row["prompt"], "response": row["response"], **rate(row, generator)} for row in rows])
    return path


def ordered(scores, passed):
    """The share of pairs of a passing and a failing answer whose scores (B,) are in that order, ties counting half: the area under the
    ROC curve. passed: bool (B,)."""
    gaps = scores[passed][:, None] - scores[~passed]
    return ((gaps > 0).float() + (gaps == 0).float() / 2).mean().item()


def logits_rows(home, seed):
    """{how often logits were dropped: [order without logits, order with them]} on answers to test prompts."""
    path, found = ratings_file(home, seed), {}
    rows = sampled_answers(home, load_splits("nano").test, seed)
    passed, generator = torch.tensor([row["passed"] for row in rows]), torch.Generator().manual_seed(seed + 1)
    logits = [rate(row, generator)["logits"] for row in rows]
    for dropout, name in DROPOUTS.items():
        folder = home / f"logits-{dropout}"
        stage("train_reward.py", folder, f"--data={path}", f"--policy={home / 'sft'}", "--human-feedback-dim=5",
              f"--human-feedback-dropout={dropout}", f"--seed={seed}")
        model = RewardModel.from_pretrained(folder / "final")
        texts = [row["prompt"] for row in rows], [row["response"] for row in rows]
        found[name] = [ordered(scores, passed) for scores in (model.score(*texts), model.score(*texts, feedback=logits))]
    return found | {"no model, the mean of the logits": [None, ordered(torch.tensor([expected(each) for each in logits]), passed)]}


def expected(logits):
    """The mean rating of logits over 1 to 5."""
    return (torch.tensor(logits).softmax(0) * torch.arange(1, 6)).sum().item()


def reward_rows(home, seed):
    """{reward: results of the PPO run on it}, and the members' accuracies on held-out pairs."""
    members = [stage("train_reward.py", home / name, f"--seed={seed + 100 * i}") for i, name in enumerate(MEMBERS)]
    runs = {name: stage("train_ppo.py", home / folder, f"--policy={home / 'sft'}", *(word.format(home) for word in options), f"--seed={seed}")
            for name, (folder, options) in REWARDS.items()}
    return runs, [member["validation"]["eval/accuracy"] for member in members]


def cell(values, digits=3):
    """The mean over the seeds, and each."""
    shown = [f"{value:.{digits}f}" for value in (sum(values) / len(values), *values)]
    return f"{shown[0]} ({', '.join(shown[1:])})"


def gain(homes, folder, mode):
    """What passes the checks after PPO on this reward, less what does after PPO on one reward model: each prompt's difference, averaged
    over the seeds, with a bootstrap interval over prompts."""
    one, other = (mean_over_seeds([read_answers(home, stage, "test", mode, "PPO") for home in homes]) for stage in ("ppo", folder))
    found = compare(one, other, "execution")
    return f"{found['difference']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"


def report(homes, rewards, logits, seeds):
    """The two tables, as Markdown."""
    lines = ["# Ensembles, a sum with the truth, and people's logits", "",
             f"`python bench/rewards.py`, {time.strftime('%Y-%m-%d')}, {platform.machine()} CPU, threads: {torch.get_num_threads()}, Python "
             f"{platform.python_version()}, torch {torch.__version__}. The default job's data and options; means over seeds {seeds}, each in brackets; "
             "what each row is: the script's docstring.", "",
             "## What PPO is trained on", "",
             "Test answers that pass their checks; the difference is from PPO on one reward model, each prompt's averaged over the seeds, with a bootstrap "
             "95 % interval over prompts, which says nothing of other seeds.", "",
             "| reward | sampled | difference [95 %] | greedy | difference [95 %] | KL, nats | best step |", "|---|---:|---:|---:|---:|---:|---:|"]
    for name, model, results in [("SFT", "SFT", "one reward model")] + [(name, "PPO", name) for name in REWARDS]:
        tests = [runs[results]["test"]["test"] for runs, _ in rewards]
        cells = [part for mode in ("sampled", "greedy") for part in (
            cell([test[mode][model]["execution"] for test in tests]), "" if results == "one reward model" else gain(homes, REWARDS[name][0], mode))]
        kl = "" if model == "SFT" else cell([test["sampled"][model]["kl"] for test in tests], 2)
        steps = "" if model == "SFT" else ", ".join(str(runs[name]["best_step"]) for runs, _ in rewards)
        lines.append(f"| {name} | {' | '.join(cells)} | {kl} | {steps} |")
    accuracies = "; ".join(f"seed {seed}: {', '.join(f'{value:.3f}' for value in members)}" for seed, (_, members) in zip(seeds, rewards))
    lines += ["", f"Held-out pairs that the three reward models order rightly: {accuracies}.", "", "## People's logits", "",
              "Pairs of a passing and a failing test answer that the scores order rightly (chance: 0.5).", "",
              "| logits dropped in training | asked without logits | asked with logits |", "|---|---:|---:|"]
    for name in logits[0]:
        columns = ["" if logits[0][name][i] is None else cell([found[name][i] for found in logits]) for i in (0, 1)]
        lines.append(f"| {name} | {columns[0]} | {columns[1]} |")
    return "\n".join(lines) + "\n"


def run(config):
    rewards, logits, homes = [], [], [Path(config.out) / f"seed-{seed}" for seed in config.seeds]
    for seed, home in zip(config.seeds, homes):
        stage("train_sft.py", home / "sft", f"--seed={seed}")
        rewards.append(reward_rows(home, seed))
        logits.append(logits_rows(home, seed))
    text = report(homes, rewards, logits, config.seeds)
    print(text)
    if config.report:
        Path(config.report).write_text(text)


if __name__ == "__main__":
    main(run, CONFIG)
