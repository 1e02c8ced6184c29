"""Reward modelling: learn from preferences, ratings, or both, which response is better.

    pairs      loss = -mean log sigmoid(s_chosen - s_rejected) + c * mean (s_chosen + s_rejected)^2     Bradley & Terry 1952
    ratings    loss = mean (s - rating)^2, ratings standardised over the training rows

The model is a GPT-2 or an encoder (RoBERTa, CodeBERT, BERT) with its own tokenizer, whatever the policy uses. Data without
preferences (nano, CoNaLa) gets them made: the reference against the SFT policy's own wrong answers and against mutated
references, from training rows for training and validation rows for validation; test rows are never touched. After training,
gain and bias give the SFT policy's samples scores of mean 0 and variance 1.

    python train_reward.py                                                # the backbone starts from runs/sft
    python train_reward.py --model microsoft/codebert-base --data preferences.jsonl --out runs/codebert/reward --gpu 0
"""
from dataclasses import dataclass

from nanorlhf.config import asked, option, parse
from nanorlhf.options import DataOptions, TrainOptions


@dataclass
class Config(DataOptions, TrainOptions):
    out: str = option("runs/reward", "run folder: config, log, checkpoints, results, plots", group="Run", metavar="FOLDER")
    model: str = option("", "backbone, a GPT-2 or encoder: a folder or a name; empty: the SFT policy", group="Model",
                        metavar="FOLDER_OR_NAME")
    policy: str = option("", "SFT policy whose samples become pairs and set gain and bias; empty: the folder sft beside --out",
                         metavar="FOLDER")
    samples: int = option(2, "answers sampled from the policy for each prompt, to make pairs", group="Preferences", at_least=1)
    temperature: float = option(1.0, "temperature of these samples", above=0)
    pair_rows: int = option(2000, "training prompts to make pairs of; 0: all", at_least=0)
    mutations: int = option(1, "mutated references a prompt", at_least=0)
    epochs: int = option(2, "passes over the pairs", group="Optimiser", at_least=1)
    batch_size: int = option(16, "pairs (or ratings) of an optimiser step", at_least=1)
    micro_batch_size: int = option(64, "pairs (or ratings) of a forward pass", at_least=1)
    lr: float | None = option(None, "peak learning rate of AdamW; none: 1e-3 * 128 / width below 20 million parameters, 2e-5 above", above=0)
    warmup: float = option(0.05, "share of the steps over which the learning rate rises", at_least=0, below=1)
    weight_decay: float = option(0.01, "decay of the matrices, a step's share being lr * weight_decay", at_least=0)
    max_grad_norm: float = option(1.0, "bound on the gradient's norm", above=0)
    center_coef: float = option(0.01, "c: pull of the scores of a pair to mean 0", at_least=0)
    patience: int = option(1, "stop after so many epochs without a better validation", group="Evaluation", at_least=1)


PRESETS = {
    "fast": {},
    "conala": {"data": "conala", "max_response": 64, "pair_rows": 0, "mutations": 2, "epochs": 1},
    "research": {"model": "microsoft/codebert-base", "epochs": 3, "micro_batch_size": 16, "max_query": 128,
                 "max_response": 128, "pair_rows": 0},
    "production": {"model": "microsoft/codebert-base", "lr": 1e-5, "epochs": 3, "batch_size": 64, "micro_batch_size": 32,
                   "max_query": 128, "max_response": 128, "pair_rows": 0, "samples": 8, "precision": "bf16", "save_steps": 200},
}

if __name__ == "__main__":
    CONFIG = parse(Config, PRESETS)  # before torch is imported: --help and typing errors answer at once

import random
from pathlib import Path

import torch
from tqdm import tqdm

from nanorlhf.data import open_data
from nanorlhf.errors import InputError
from nanorlhf.evaluation import answer
from nanorlhf.feedback import PAIR_FILES, preference_pairs, read_pairs, write_pairs
from nanorlhf.gpt2 import GPT2
from nanorlhf.losses import bradley_terry_loss, rating_loss
from nanorlhf.pipeline import check_policy
from nanorlhf.plots import plot_reward
from nanorlhf.reward import RewardModel
from nanorlhf.run import (Run, adamw, autocast, check_run, learning_rate, linear_decay, main, optimiser_step,
                          pick_device, seed_everything, set_lr)
from nanorlhf.sequences import epoch_batches
from nanorlhf.tokenizer import Tokenizer


def load_policy(config, device):
    """The SFT policy and its tokenizer, or (None, None) where there is none and none was asked for."""
    folder = config.policy or str(Path(config.out).parent / "sft")
    if not config.policy and not Path(folder).exists():
        return None, None
    check_policy(folder, config)
    policy = GPT2.from_pretrained(folder).to(device)
    policy.check_length(config.max_query + config.max_response)
    return policy, Tokenizer.from_pretrained(folder)


def make_pairs(policy, tokenizer, records, config, seed):
    """Preference pairs of some records: sample the policy, then set the reference against what is wrong."""
    samples = [[] for _ in records]
    for i in range(config.samples):
        for row, texts in zip(answer(policy, tokenizer, records, config, config.temperature, seed=seed + i), samples):
            texts.append(row["response"])
    return preference_pairs(records, samples, random.Random(seed), config.mutations, most=config.samples)


def examples(splits, policy, tokenizer, config, checkpoint=None):
    """(training rows, validation rows), each a list of dicts: pairs with chosen and rejected, or rated responses. A resumed run
    reads the pairs that it made."""
    first = splits.train[0]
    idle = asked(config, "samples", "mutations", "pair_rows")
    if idle and (first.chosen is not None or first.rating is not None):
        raise InputError(f"{idle}: for pairs made from references, but --data {config.data} brings {splits.kind} rows: leave out")
    if first.chosen is not None:
        return [[{"id": r.id, "prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected, "source": "data"} for r in rows]
                for rows in (splits.train, splits.validation)]
    if first.rating is not None:
        unrated = [r for r in splits.train + splits.validation if r.rating is None]
        if unrated:
            raise InputError(f"--data {config.data}: {len(unrated)} rows have no rating, such as that of {unrated[0].prompt[:60]!r}: rate "
                             "all, or none")
        if asked(config, "center_coef"):
            raise InputError("--center-coef is for pairs; ratings say themselves where the scores are centred: leave it out")
        mean, std = mean_and_std([r.rating for r in splits.train])
        return [[{"id": r.id, "prompt": r.prompt, "response": r.response, "rating": (r.rating - mean) / std} for r in rows]
                for rows in (splits.train, splits.validation)]
    if first.reference is None:
        raise InputError(f"--data {config.data}: {splits.kind} rows carry no preference, rating or reference to learn from; "
                         "give one of them")
    if policy is None:
        raise InputError(f"--data {config.data} has references but no preferences: pairs are made from an SFT policy's samples, "
                         f"and there is no {Path(config.out).parent / 'sft'}; run train_sft.py first, or name one with --policy")
    if not config.policy:
        check_policy(Path(config.out).parent / "sft", config, "data", "split_seed")  # samples of other rows' answers would leak
    if checkpoint:
        return [read_pairs(Path(config.out) / name) for name in PAIR_FILES]
    count = min(config.pair_rows or len(splits.train), len(splits.train))
    print(f"sampling {config.samples} answers to each of {count} training and {len(splits.validation)} validation prompts, to make pairs")
    some = random.Random(config.seed).sample(splits.train, count)
    return [make_pairs(policy, tokenizer, rows, config, config.seed * 1000 + i) for i, rows in enumerate((some, splits.validation))]


def mean_and_std(values):
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), max(values.std(unbiased=False).item(), 1e-6)


def batch_loss(model, rows, config):
    """(loss, stats) of a list of pairs or ratings; chosen and rejected go through the model as one batch."""
    prompts = [row["prompt"] for row in rows]
    pairs = "chosen" in rows[0]
    responses = [row["chosen"] for row in rows] + [row["rejected"] for row in rows] if pairs else [row["response"] for row in rows]
    inputs = model.encode(prompts * 2 if pairs else prompts, responses)
    with autocast(model.device, config.precision):
        scores = model(*(x.to(model.device) for x in inputs))
    if pairs:
        return bradley_terry_loss(*scores.chunk(2), center_coef=config.center_coef)
    return rating_loss(scores, torch.tensor([row["rating"] for row in rows], device=model.device))


@torch.no_grad()
def validate(model, rows, config):
    """{"eval/loss", "eval/accuracy", ...}: mean loss and, for pairs, the share in the right order, whole and by source."""
    model.eval()
    totals, count = {}, 0
    for start in range(0, len(rows), config.micro_batch_size):
        batch = rows[start:start + config.micro_batch_size]
        loss, stats = batch_loss(model, batch, config)
        for name, value in {"loss": loss.item(), **stats}.items():
            totals[name] = totals.get(name, 0.0) + value * len(batch)
        count += len(batch)
    numbers = {f"eval/{name}": value / count for name, value in totals.items()}
    for source in sorted({row["source"] for row in rows if "source" in row}):
        some = [row for row in rows if row["source"] == source]
        gaps = (model.score([row["prompt"] for row in some], [row["chosen"] for row in some])
                - model.score([row["prompt"] for row in some], [row["rejected"] for row in some]))
        numbers[f"eval/accuracy_{source}"] = (gaps > 0).float().mean().item()
    return numbers


def train(config):
    checkpoint = check_run(config)
    device = pick_device(config.gpu, config.device)
    seed_everything(config.seed)
    splits, leakage = open_data(config)
    policy, tokenizer = load_policy(config, device)
    if not config.model and policy is None:
        raise InputError(f"--model is empty and there is no {Path(config.out).parent / 'sft'} to start from: run train_sft.py first, "
                         "or name a backbone with --model")
    if checkpoint:
        model = RewardModel.from_pretrained(checkpoint).to(device)
    else:
        model = RewardModel.from_pretrained(config.model or config.policy or Path(config.out).parent / "sft", new_head=True,
                                            template=config.template).to(device)
    train_rows, held_out = examples(splits, policy, tokenizer, config, checkpoint)
    if not train_rows or not held_out:
        raise InputError("there are no training or no validation pairs: every sample matches its reference; raise --samples or --mutations")
    print(f"data: {splits.source}; {len(train_rows)} training and {len(held_out)} validation "
          f"{'pairs' if 'chosen' in train_rows[0] else 'ratings'}")

    run = Run(config, checkpoint)
    if "chosen" in train_rows[0]:
        for name, rows in zip(PAIR_FILES, (train_rows, held_out)):
            write_pairs(run.folder / name, rows)
    total_steps = config.epochs * -(-len(train_rows) // config.batch_size)
    warmup_steps = int(config.warmup * total_steps)
    lr = learning_rate(config.lr, model, model.width, 1e-3, 2e-5)
    optimizer = adamw([model], lr, weight_decay=config.weight_decay)
    lengths = [len(row["prompt"]) + len(row.get("chosen") or row.get("response") or "") for row in train_rows]
    step, _ = run.restore(optimizer, total_steps)

    def evaluate(step, epoch):
        numbers = validate(model, held_out, config)
        run.log(step, {"epoch": epoch, **numbers})
        run.keep_best(step, -numbers["eval/loss"], model.save_pretrained)
        tqdm.write(f"epoch {epoch}: " + ", ".join(f"{name.removeprefix('eval/')} {value:.3f}" for name, value in numbers.items()))

    with run, tqdm(total=total_steps, initial=step, desc="reward model", unit="step", mininterval=1) as bar:
        batches = epoch_batches(lengths, config.batch_size, config.epochs, config.seed, done=step)
        for step, epoch, batch, epoch_ends in run.until_stalled(batches, config.patience):
            model.train()
            loss_sum, sums = 0.0, {}
            for start in range(0, len(batch), config.micro_batch_size):
                rows = [train_rows[i] for i in batch[start:start + config.micro_batch_size]]
                loss, stats = batch_loss(model, rows, config)
                share = len(rows) / len(batch)
                (loss * share).backward()
                loss_sum += loss.item() * share
                sums = {name: sums.get(name, 0.0) + value * share for name, value in stats.items()}
            rate = set_lr(optimizer, lr * linear_decay(step, total_steps, warmup_steps))
            grad_norm = optimiser_step(optimizer, loss_sum, config.max_grad_norm, step, [train_rows[i]["id"] for i in batch])
            run.log(step, {"loss": loss_sum, **sums, "lr": rate, "grad_norm": grad_norm, "epoch": epoch})
            bar.update()
            bar.set_postfix(loss=f"{loss_sum:.3f}", **{name: f"{value:.2f}" for name, value in sums.items()}, refresh=False)
            if epoch_ends:
                evaluate(step, epoch)
            run.end_step(step, model.save_pretrained, optimizer)

    model = RewardModel.from_pretrained(run.folder / "best").to(device)
    numbers = validate(model, held_out, config)
    if policy is not None:
        rows = answer(policy, tokenizer, splits.validation, config, config.temperature, seed=config.seed)
        model.normalise([row["prompt"] for row in rows], [row["response"] for row in rows])
    else:
        print("no SFT policy at hand: scores are normalised over the validation responses instead of a policy's samples")
        model.normalise([row["prompt"] for row in held_out], [row.get("chosen") or row["response"] for row in held_out])
    run.finish(model.save_pretrained, validation=numbers, best_step=run.best_step, steps=step, gain=model.gain, bias=model.bias,
               train_rows=len(train_rows), validation_rows=len(held_out), leakage=leakage)
    plot_reward(run.folder)
    shown = f"held-out pair accuracy {numbers['eval/accuracy']:.3f}" if "eval/accuracy" in numbers else \
        f"held-out mean absolute error {numbers['eval/error']:.3f} standard deviations"
    print(f"{run.folder}/final is step {run.best_step}: {shown}; gain {model.gain:.3f}, bias {model.bias:.3f}; {run.seconds():.0f} s")


if __name__ == "__main__":
    main(train, CONFIG)
