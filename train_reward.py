"""Reward modelling: learn from preferences, ratings, or both, which response is better.

    pairs      loss = -mean log sigmoid(s_chosen - s_rejected) + c * mean (s_chosen + s_rejected)^2     Bradley & Terry 1952
    ratings    loss = mean (s - rating)^2, ratings standardised over the training rows
    both       each row of a batch counts the same, whatever its kind

The model is a GPT-2 or an encoder (RoBERTa, CodeBERT, BERT) with its own tokenizer, whatever the policy uses. Data without
preferences (nano, CoNaLa) gets them made: the reference against the SFT policy's own wrong answers and against mutated references,
from training rows for training and validation rows for validation; test rows are never touched. Where rows have checks, answers
are run: one that passes them all is not wrong. After training, gain and bias give the SFT policy's samples scores of mean 0 and
variance 1. Rated rows may carry people's logits, a vector that the model adds to the state its head reads (`RewardModel`); in
training it is dropped at random, for later there will be none.

    python train_reward.py                                                # the backbone starts from runs/sft
    python train_reward.py --model microsoft/codebert-base --data preferences.jsonl --out runs/codebert/reward --gpu 0
"""
from dataclasses import dataclass

from nanorlhf.config import asked, option, parse, replace
from nanorlhf.options import SANDBOX, DataOptions, SandboxOptions, TrainOptions


@dataclass
class Config(SandboxOptions, DataOptions, TrainOptions):
    out: str = option("runs/reward", "run folder: config, log, checkpoints, results, plots", group="Run", metavar="FOLDER")
    model: str = option("", "backbone, a GPT-2 or encoder: a folder or a name; empty: the SFT policy", group="Model",
                        metavar="FOLDER_OR_NAME")
    head: str = option("native", "native: the family's own, which transformers loads; linear: one layer; mlp: three with ReLU and dropout",
                       choices=("native", "linear", "mlp"))
    human_feedback_dim: int = option(64, "numbers in people's logits, where rated rows carry them", at_least=1)
    human_feedback_weight: float = option(0.3, "their weight beside the backbone's state", above=0)
    human_feedback_dropout: float = option(0.5, "chance that a row's are dropped in training", at_least=0, at_most=1)
    policy: str = option("", "SFT policy whose samples become pairs and set gain and bias; empty: the folder sft beside --out",
                         metavar="FOLDER")
    samples: int = option(2, "answers sampled from the policy for each prompt, to make pairs", group="Preferences", at_least=1)
    temperature: float = option(1.0, "temperature of these samples", above=0)
    pair_rows: int = option(2000, "training prompts to make pairs of; 0: all", at_least=0)
    mutations: int = option(1, "mutated references a prompt", at_least=0)
    ratings: str = option("", "a file of rated responses to learn from beside the pairs of --data", metavar="PATH")
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
                   "max_query": 128, "max_response": 128, "pair_rows": 0, "samples": 8, "precision": "bf16", "save_steps": 200,
                   "generation_batch_size": 64},
}

if __name__ == "__main__":
    CONFIG = parse(Config, PRESETS)  # before torch is imported: --help and typing errors answer at once

import random
from pathlib import Path

import torch
from tqdm import tqdm

from nanorlhf import hf
from nanorlhf.data import Splits, called, check_leakage, normalise, open_data
from nanorlhf.errors import InputError, naming
from nanorlhf.evaluation import answer, open_sandbox
from nanorlhf.feedback import PAIR_FILES, read_pairs, write_pairs
from nanorlhf.gpt2 import GPT2
from nanorlhf.losses import bradley_terry_loss, rating_loss
from nanorlhf.mutations import passing, preference_pairs
from nanorlhf.pipeline import check_policy
from nanorlhf.plots import plot_reward
from nanorlhf.reward import RewardModel
from nanorlhf.run import (Run, adamw, autocast, check_run, learning_rate, linear_decay, main, optimiser_step,
                          pick_device, seed_everything, set_lr)
from nanorlhf.sequences import epoch_batches
from nanorlhf.tokenizer import Tokenizer


def load_policy(config, device):
    """The SFT policy and its tokenizer, or (None, None) where there is none and nothing asked for needs one."""
    folder = config.policy or str(Path(config.out).parent / "sft")
    if not config.policy and not Path(folder).exists():
        if idle := asked(config, "temperature", "generation_batch_size"):
            raise InputError(f"{idle}: for the samples of an SFT policy, and there is none here: leave out, or name one with --policy")
        if idle := asked(config, "max_query", "max_response"):
            print(f"{idle}: of no effect, since they bound an SFT policy's samples and there is none; the reward model reads what its "
                  "positions hold")
        if not config.model:
            raise InputError(f"--model is empty and there is no {folder} to start from: run train_sft.py first, or name a backbone with --model")
        return None, None
    check_policy(folder, config)
    policy = GPT2.from_pretrained(folder).to(device)
    policy.check_length(config.max_query + config.max_response)
    return policy, Tokenizer.from_pretrained(folder)


def make_pairs(policy, tokenizer, records, config, seed, box):
    """Preference pairs of some records: sample the policy, then set the reference against what is wrong. box: a Sandbox or None."""
    samples = [[] for _ in records]
    for i in range(config.samples):
        for row, texts in zip(answer(policy, tokenizer, records, config, config.temperature, seed=seed + i), samples):
            texts.append(row["response"])
    return preference_pairs(records, samples, random.Random(seed), config.mutations, config.samples, passing(box) if box else None)


def examples(splits, policy, tokenizer, config, checkpoint=None):
    """(training rows, validation rows), each a list of dicts: pairs with chosen and rejected, rated responses, or both."""
    pairs = all(row.rating is None for row in splits.train)
    if config.ratings and not pairs:
        raise InputError(f"--ratings adds rated responses to pairs, but --data {config.data} is rated itself: put them into one file")
    found = pairs_of(splits, policy, tokenizer, config, checkpoint) if pairs else rated(splits, config)
    if config.ratings:
        more, _ = open_data(replace(config, data=config.ratings, data_format="feedback", min_probability=None), beside=True)
        with naming(f"--ratings {config.ratings}"):
            check_leakage(Splits(more.train, splits.validation, splits.test, splits.extra), config.allow_overlap)
        prompts = {normalise(r.prompt) for r in splits.train}
        seen = [r for r in more.validation if normalise(r.prompt) in prompts]
        if seen:
            print(f"ratings: {len(seen)} of {len(more.validation)} held-out rows have a prompt of the training pairs: trained on instead")
            more.train = more.train + seen
            more.validation = [r for r in more.validation if normalise(r.prompt) not in prompts]
        found = [rows + added for rows, added in zip(found, rated(more, config))]
    if asked(config, "human_feedback_dim", "human_feedback_weight", "human_feedback_dropout") and not has_feedback(found[0]):
        raise InputError("--human-feedback-dim, -weight and -dropout are for people's logits, but no rated row has any: leave them out")
    return found


def pairs_of(splits, policy, tokenizer, config, checkpoint):
    """The data's own pairs, or pairs made of references and the policy's samples; a resumed run reads the pairs that it made."""
    first = splits.train[0]
    if first.chosen is not None:
        if idle := asked(config, "samples", "mutations", "pair_rows", *SANDBOX):
            raise InputError(f"{idle}: for pairs made from references, but --data {config.data} brings {splits.kind} rows: leave out")
        return [[{"id": r.id, "prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected, "source": "data"} for r in rows]
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
    box = open_sandbox(config, splits)
    count = min(config.pair_rows or len(splits.train), len(splits.train))
    print(f"sampling {config.samples} answers to each of {count} training and {len(splits.validation)} validation prompts, to make pairs")
    some = random.Random(config.seed).sample(splits.train, count)
    return [make_pairs(policy, tokenizer, rows, config, config.seed * 1000 + i, box) for i, rows in enumerate((some, splits.validation))]


def rated(splits, config):
    """Rated responses, their ratings standardised over the training rows, with people's logits where there are any."""
    idle = asked(config, "samples", "mutations", "pair_rows", "center_coef", *SANDBOX) if not config.ratings else ""
    if idle:
        raise InputError(f"{idle}: for pairs, but --data {config.data} brings ratings, which say themselves where the scores are centred: "
                         "leave out")
    for r in splits.train + splits.validation:
        if r.rating is None:
            count = sum(row.rating is None for row in splits.train + splits.validation)
            raise InputError(f"{splits.source}: {count} rows have no rating, such as that of {r.prompt[:60]!r}: rate all, or none")
        if r.logits is not None and len(r.logits) != config.human_feedback_dim:
            raise InputError(f"{splits.source}: the logits of the row with prompt {r.prompt[:60]!r} are {len(r.logits)} numbers, not "
                             f"{config.human_feedback_dim}: give all rows as many, and say --human-feedback-dim {len(r.logits)}")
    mean, std = mean_and_std([r.rating for r in splits.train])
    if len({r.rating for r in splits.train}) == 1 and not config.max_rows:
        raise InputError(f"{splits.source}: all training rows are rated {mean:g}: nothing tells a good response from a bad one")
    return [[{"id": r.id, "prompt": r.prompt, "response": r.response, "rating": (r.rating - mean) / std, "feedback": r.logits}
             for r in rows] for rows in (splits.train, splits.validation)]


def has_feedback(rows):
    """Whether any row carries people's logits."""
    return any(row.get("feedback") is not None for row in rows)


def mean_and_std(values):
    values = torch.tensor(values, dtype=torch.float64)
    std = values.std(unbiased=False).item()
    return values.mean().item(), std if std > 1e-6 else 1.0


def batch_loss(model, rows, config, feedback=True):
    """(loss, {statistic: (mean, rows that it is over)}) of a list of pairs, ratings or both, with or without people's logits.

    The loss is the mean over all rows. Chosen, rejected and rated responses go through the model as one batch.
    """
    pairs, ratings = [row for row in rows if "chosen" in row], [row for row in rows if "rating" in row]
    prompts = [row["prompt"] for row in pairs * 2 + ratings]
    responses = [row["chosen"] for row in pairs] + [row["rejected"] for row in pairs] + [row["response"] for row in ratings]
    given = [None] * len(pairs) * 2 + [row.get("feedback") if feedback else None for row in ratings]
    if model.training and has_feedback(ratings):
        given = [None if drop else vector for vector, drop in zip(given, torch.rand(len(given)) < config.human_feedback_dropout)]
    inputs = model.encode(prompts, responses)
    with autocast(model.device, config.precision):
        scores = model(*(x.to(model.device) for x in inputs), model.vectors(given))
    chosen, rejected, alone = scores.split([len(pairs), len(pairs), len(ratings)])
    loss, stats = 0.0, {}
    if pairs:
        part, found = bradley_terry_loss(chosen, rejected, center_coef=config.center_coef)
        loss, stats = loss + part * len(pairs), stats | {name: (value, len(pairs)) for name, value in found.items()}
    if ratings:
        part, found = rating_loss(alone, torch.tensor([row["rating"] for row in ratings], device=model.device))
        loss, stats = loss + part * len(ratings), stats | {name: (value, len(ratings)) for name, value in found.items()}
    return loss / len(rows), stats


def add(totals, stats):
    """Add {statistic: (mean, rows)} to {statistic: (sum, rows)} in place."""
    for name, (value, count) in stats.items():
        total, before = totals.get(name, (0.0, 0))
        totals[name] = total + value * count, before + count


def means(totals):
    return {name: total / count for name, (total, count) in totals.items()}


@torch.no_grad()
def validate(model, rows, config):
    """{"eval/loss", "eval/accuracy", ...}: mean loss and, for pairs, the share in the right order, whole and by source.

    Without people's logits, as rewards are asked for in use; error_with_feedback is with them.
    """
    model.eval()
    totals, informed = {}, {}
    for start in range(0, len(rows), config.micro_batch_size):
        batch = rows[start:start + config.micro_batch_size]
        loss, stats = batch_loss(model, batch, config, feedback=False)
        add(totals, {"loss": (loss.item(), len(batch)), **stats})
        if has_feedback(batch):
            _, stats = batch_loss(model, [row for row in batch if row.get("feedback") is not None], config)
            add(informed, {"error_with_feedback": stats["error"]})
    numbers = {f"eval/{name}": value for name, value in means(totals | informed).items()}
    for source in sorted({row["source"] for row in rows if "source" in row}):
        some = [row for row in rows if row.get("source") == source]
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
    train_rows, held_out = examples(splits, policy, tokenizer, config, checkpoint)
    if not train_rows or not held_out:
        raise InputError("there are no training or no validation pairs: every sample matches its reference; raise --samples or --mutations")
    if checkpoint:
        model = RewardModel.from_pretrained(checkpoint).to(device)
    else:
        model = RewardModel.from_pretrained(config.model or config.policy or Path(config.out).parent / "sft", config.head, config.template,
                                            human_feedback_dim=config.human_feedback_dim if has_feedback(train_rows) else 0,
                                            human_feedback_weight=config.human_feedback_weight).to(device)
    pairs = [[row for row in rows if "chosen" in row] for rows in (train_rows, held_out)]
    print(f"data: {splits.source}{f' and {config.ratings}' if config.ratings else ''}; {len(pairs[0])} pairs and "
          f"{len(train_rows) - len(pairs[0])} ratings to train on, {len(pairs[1])} and {len(held_out) - len(pairs[1])} for validation")

    run = Run(config, checkpoint, {"data set": splits.train + splits.validation} | ({"set of ratings": Path(config.ratings)} if config.ratings else {})
              | ({"policy": hf.resolve(config.policy or Path(config.out).parent / "sft")} if policy is not None else {}))
    if pairs[0]:
        for name, rows in zip(PAIR_FILES, pairs):
            write_pairs(run.folder / name, rows)
    total_steps = config.epochs * -(-len(train_rows) // config.batch_size)
    warmup_steps = int(config.warmup * total_steps)
    lr = learning_rate(config.lr, model, model.width, 1e-3, 2e-5)
    optimizer = adamw([model], lr, weight_decay=config.weight_decay)
    lengths = [len(row["prompt"]) + max(len(row.get(name) or "") for name in ("chosen", "rejected", "response")) for row in train_rows]
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
            loss_sum, totals = 0.0, {}
            for start in range(0, len(batch), config.micro_batch_size):
                rows = [train_rows[i] for i in batch[start:start + config.micro_batch_size]]
                loss, stats = batch_loss(model, rows, config)
                share = len(rows) / len(batch)
                (loss * share).backward()
                loss_sum += loss.item() * share
                add(totals, stats)
            rate = set_lr(optimizer, lr * linear_decay(step, total_steps, warmup_steps))
            grad_norm = optimiser_step(optimizer, loss_sum, config.max_grad_norm, step, [called(train_rows[i]) for i in batch])
            run.log(step, {"loss": loss_sum, **means(totals), "lr": rate, "grad_norm": grad_norm, "epoch": epoch})
            bar.update()
            bar.set_postfix(loss=f"{loss_sum:.3f}", **{name: f"{value:.2f}" for name, value in means(totals).items()}, refresh=False)
            if epoch_ends:
                evaluate(step, epoch)
            run.end_step(step, model.save_pretrained, optimizer)

    model = RewardModel.from_pretrained(run.folder / "best").to(device)
    numbers = validate(model, held_out, config)
    if policy is not None:
        rows = answer(policy, tokenizer, splits.validation, config, config.temperature, seed=config.seed)
        model.normalise([row["prompt"] for row in rows], [row["response"] for row in rows])
    else:
        print("no SFT policy at hand: scores are normalised over the validation responses, chosen, rejected and rated, instead of a policy's samples")
        model.normalise(*zip(*[(row["prompt"], row[name]) for row in held_out for name in ("chosen", "rejected", "response") if name in row]))
    run.finish(model.save_pretrained, validation=numbers, best_step=run.best_step, steps=step, gain=model.gain, bias=model.bias,
               train_rows=len(train_rows), validation_rows=len(held_out), leakage=leakage)
    plot_reward(run.folder)
    shown = [f"held-out pair accuracy {numbers['eval/accuracy']:.3f}"] if "eval/accuracy" in numbers else []
    shown += [f"held-out mean absolute error {numbers['eval/error']:.3f} standard deviations"] if "eval/error" in numbers else []
    print(f"{run.folder}/final is step {run.best_step}: {', '.join(shown)}; gain {model.gain:.3f}, bias {model.bias:.3f}; {run.seconds():.0f} s")


if __name__ == "__main__":
    main(train, CONFIG)
