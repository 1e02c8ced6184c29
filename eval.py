"""Evaluate policies: answer the prompts of a split with each, and compare the answers with the references.

Greedy by default; with --temperature 1 the policy is sampled, which is what PPO trained. Every answer is written down, so that
each number can be traced to its rows. With several models the paired difference of each to the first is shown, with a bootstrap
95 % interval over prompts.

    python eval.py --model runs/sft runs/ppo runs/dpo
    python eval.py --preset conala --model runs/conala/ppo --every-checkpoint
"""
from dataclasses import dataclass

from nanorlhf.config import option, parse
from nanorlhf.errors import InputError
from nanorlhf.options import DataOptions, RunOptions


@dataclass
class Config(DataOptions, RunOptions):
    out: str = option("runs/eval", "folder for results.json and answers.jsonl", group="Run", metavar="FOLDER")
    model: list[str] = option([], "policies: run folders, model folders or names", group="Evaluation", metavar="FOLDER")
    every_checkpoint: bool = option(False, "evaluate a run folder's checkpoints/step-N too, in order")
    split: str = option("test", "which rows to answer; all: every held-out split", choices=("validation", "test", "all"))
    rows: int = option(0, "answer only the first so many rows of a split; 0: all", at_least=0)
    temperature: float = option(0.0, "sampling temperature; 0: greedy", at_least=0)
    reward: list[str] = option([], "reward-model folders, or module:function, to score the answers with", metavar="FOLDER")
    batch_size: int = option(128, "prompts answered at once", at_least=1)

    def check(self):
        super().check()
        if not self.model:
            raise InputError("--model: name at least one policy, such as --model runs/ppo")


PRESETS = {
    "fast": {},
    "conala": {"data": "conala", "max_response": 64},
    "research": {"data": "conala", "max_query": 128, "max_response": 128},
    "production": {"data": "conala", "max_query": 128, "max_response": 128},
}

if __name__ == "__main__":
    CONFIG = parse(Config, PRESETS)  # before torch is imported: --help and typing errors answer at once

from pathlib import Path

from nanorlhf.data import open_data
from nanorlhf.evaluation import add_rewards, answer, compare, mean, write_answers
from nanorlhf.gpt2 import GPT2
from nanorlhf.metrics import evaluate
from nanorlhf.pipeline import check_policy
from nanorlhf.reward import load_reward
from nanorlhf.run import Run, check_run, main, pick_device, seed_everything
from nanorlhf.tokenizer import Tokenizer


def policies(config):
    """The folders to evaluate, in order; a run folder made with another template is an InputError."""
    found = []
    for name in config.model:
        folder = Path(name)
        check_policy(folder, config)
        if config.every_checkpoint:
            found += sorted((folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
        found.append(name)
    return [str(name) for name in found]


def score(rows):
    """All metrics of one policy's answers: means of per-row values, then the corpus metrics."""
    numbers = {name: mean(rows, name) for name in ("reward", "length", "ended")}
    known = [row for row in rows if row["reference"] is not None]
    return numbers | evaluate([row["response"] for row in known], [row["reference"] for row in known])


def table(split, results, gains):
    """A Markdown table: a row a metric, a column a policy."""
    names = list(results)
    lines = [f"\n| {split} | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for metric in results[names[0]]:
        if all(isinstance(results[name].get(metric), float) for name in names):
            lines.append(f"| {metric} | " + " | ".join(f"{results[name][metric]:.3f}" for name in names) + " |")
    for metric in ("exact_match", "reward"):
        shown = [gains[name].get(metric) for name in names[1:]]
        if shown and all(shown):
            lines.append(f"| {metric}, gain over {names[0]} [95 %] | | " + " | ".join(
                f"{gain['difference']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]" for gain in shown) + " |")
    return "\n".join(lines)


def run_evaluation(config):
    check_run(config)
    device = pick_device(config.gpu, config.device)
    seed_everything(config.seed)
    splits, leakage = open_data(config)
    held_out = {"validation": splits.validation} if config.split == "validation" else {"test": splits.test}
    if config.split == "all":
        held_out = {"validation": splits.validation, "test": splits.test, **splits.extra}
    names = policies(config)
    reward = load_reward(config.reward, "mean", device) if config.reward else None
    models = {name: (GPT2.from_pretrained(name).to(device), Tokenizer.from_pretrained(name)) for name in names}
    for model, _ in models.values():
        model.check_length(config.max_query + config.max_response)

    run = Run(config)
    results = {}
    for split, records in held_out.items():
        records = records[:config.rows or None]
        answers = {}
        for name, (model, tokenizer) in models.items():
            answers[name] = answer(model, tokenizer, records, config, config.temperature, seed=config.seed,
                                   batch_size=config.batch_size)
            if reward is not None:
                add_rewards(answers[name], reward)
            write_answers(run.folder, split, "greedy" if config.temperature == 0 else "sampled", name, answers[name])
        numbers = {name: score(rows) for name, rows in answers.items()}
        gains = {name: {metric: compare(answers[names[0]], rows, metric) for metric in ("exact_match", "reward")}
                 for name, rows in answers.items()}
        results[split] = {"metrics": numbers, "gains": gains, "rows": len(records)}
        print(table(f"{split}, {len(records)} prompts", numbers, gains))
    run.finish(results=results, leakage=leakage, source=splits.source)
    print(f"\n{run.folder}/results.json; {run.seconds():.0f} s")


if __name__ == "__main__":
    main(run_evaluation, CONFIG)
