"""PPO on code generation (Ziegler et al. 2019; Stiennon et al. 2020): the policy learns to write what the reward model likes.

Each step, with the numbers of the algorithm box in the README:

    1  sample a response to each query of a batch; score its tokens by policy, value head and frozen reference
    2  score the responses with the reward (a model, execution, a sum of terms)
    3  rewards: r_t = -kl_coef * KL_t + [t last] * score
    4  advantages by GAE, whitened
    5  some epochs of minibatches on the clipped policy loss and the clipped value loss
    6  steer kl_coef; log, evaluate, save

Deviations from lm-human-preferences, by default: kl_coef stays fixed (--kl-target steers it), temperature 1, 2 epochs, rewards not
whitened (--whiten-rewards), advantages whitened once a batch rather than once a minibatch, gradients clipped, responses end at EOS
and a missing one costs nothing (--missing-eos-penalty), and the model kept is the best by validation score (the reward, clipped and
penalised as in training). As there, policy and value head share a transformer.
Stages that are missing are made first: SFT in `sft` and the reward model in `reward`, beside --out.

    python train_ppo.py                                              # everything, on the embedded data, CPU
    python train_ppo.py --preset research --data conala --model gpt2 --gpu 0
"""
from dataclasses import dataclass

from nanorlhf.config import asked, option, parse
from nanorlhf.errors import InputError
from nanorlhf.options import DataOptions, KernelOptions, SandboxOptions, TrainOptions


@dataclass
class Config(SandboxOptions, KernelOptions, DataOptions, TrainOptions):
    out: str = option("runs/ppo", "run folder: config, log, checkpoints, results, plots", group="Run", metavar="FOLDER")
    model: str = option("", "pretrained GPT-2 that the SFT stage starts from, such as gpt2; empty: its preset's, or random weights", group="Model",
                        metavar="FOLDER_OR_NAME")
    policy: str = option("", "SFT policy to start from, and the reference; empty: the SFT stage, made if missing",
                         metavar="FOLDER_OR_NAME")
    reward: list[str] = option([], "a reward-model folder, execution, module:function, or a sum such as '0.7*runs/reward + 0.3*execution "
                               "- 0.01*length' (terms: see nanorlhf/terms.py); several make an ensemble; empty: the reward stage",
                               group="Reward", metavar="REWARD")
    term_clip: float | None = option(None, "bound on the size of each term of a sum, before its weight", above=0)
    normalise_terms: bool = option(False, "bring each term of a sum to mean 0 and variance 1: in training over the responses so far, in "
                                  "evaluations over those of the first policy, so that these can be compared")
    combine: str = option("mean", "how several rewards become one", choices=("mean", "min", "mean-std"))
    score_clip: float | None = option(None, "clip scores to plus or minus this", above=0)
    missing_eos_penalty: float | None = option(None, "for a response cut before EOS: the score it gets, or what is taken off")
    missing_eos_mode: str = option("replace", "whether this penalty replaces the score or is subtracted",
                                   choices=("replace", "subtract"))
    kl_coef: float = option(0.2, "coefficient of the KL penalty in the reward", group="KL", at_least=0)
    kl_estimator: str = option("k1", "per-token estimate in the reward", choices=("k1", "k2", "k3", "abs"))
    kl_target: float | None = option(None, "steer kl_coef towards this KL of a response, in nats; none: kl_coef stays", above=0)
    kl_horizon: float = option(10000, "responses over which the steering takes effect", above=0)
    temperature: float = option(1.0, "sampling temperature; log-probs are taken at it too", group="Sampling", above=0)
    top_k: int = option(0, "sample among the k likeliest tokens; 0: all. The policy scored is then not the one sampled", at_least=0)
    top_p: float = option(1.0, "sample among the likeliest tokens of this probability; 1: all. As for top_k", above=0, at_most=1)
    steps: int = option(30, "PPO steps, each a batch of new responses", group="Optimiser", at_least=1)
    batch_size: int = option(256, "responses of a step", at_least=1)
    minibatch_size: int = option(128, "responses of an optimiser step", at_least=1)
    micro_batch_size: int = option(32, "responses of a forward pass; fewer need less memory and change nothing else", at_least=1)
    ppo_epochs: int = option(2, "passes over a step's responses", at_least=1)
    lr: float | None = option(None, "learning rate of AdamW at the start, which falls linearly to 0; none: 3e-4 * 128 / width "
                              "below 20 million parameters, 1e-5 above", above=0)
    max_grad_norm: float = option(1.0, "bound on the gradient's norm", above=0)
    gamma: float = option(1.0, "discount of later rewards", group="PPO", at_least=0, at_most=1)
    lam: float = option(0.95, "lambda of GAE", at_least=0, at_most=1)
    cliprange: float = option(0.2, "clip range of the probability ratio", above=0)
    cliprange_value: float = option(0.2, "clip range of the values", above=0)
    dual_clip: float | None = option(None, "bound on the ratio's weight where the advantage is negative", above=1)
    vf_coef: float = option(0.1, "weight of the value loss", at_least=0)
    entropy_coef: float = option(0.0, "weight of an entropy bonus", at_least=0)
    target_kl: float | None = option(None, "end a step's epochs once an epoch's mean approx_kl exceeds this", above=0)
    whiten_rewards: bool = option(False, "scale the KL-shaped rewards to variance 1 over the batch; their mean stays")
    whiten_advantages: bool = option(True, "scale advantages to mean 0 and variance 1 over the batch")
    bootstrap_truncated: bool = option(False, "take a response cut before EOS to be worth its last value, not 0, thereafter")
    eval_every: int = option(5, "evaluate on validation prompts every so many steps", group="Evaluation", at_least=1)
    eval_rows: int = option(200, "validation prompts answered", at_least=1)
    save_steps: int = option(10, "write checkpoints/step-N every so many steps; 0: only where a signal ends the run", at_least=0, group="Run")
    patience: int = option(0, "stop after so many evaluations without a better validation score; 0: never", at_least=0)
    on_alarm: str = option("warn", "when the monitor sees over-optimisation, collapse or divergence: say so; also stop; or also raise kl_coef "
                           "by half where that is the cure", choices=("warn", "stop", "raise-kl"))

    def check(self):
        super().check()
        if self.model and self.policy:
            raise InputError("--model is for the SFT stage, which --policy leaves out: give one of them")
        if self.out.rstrip("/").rpartition("/")[2] in ("sft", "reward"):
            raise InputError(f"--out {self.out}: that is the name of a stage's folder; name another, such as runs/ppo")
        if asked(self, "combine") and len(self.reward) < 2:
            raise InputError(f"--combine {self.combine} needs several rewards: name them with --reward, or leave it out")
        if self.normalise_terms and len(self.reward) > 1:
            raise InputError("--normalise-terms is for one sum, not for an ensemble of several --reward: write the sum 'a + b', or leave it out")
        if asked(self, "kl_horizon") and self.kl_target is None:
            raise InputError("--kl-horizon is for --kl-target, which steers kl_coef: give both, or neither")
        if self.kl_target is not None and self.kl_coef == 0:
            raise InputError("--kl-target steers kl_coef by factors, which --kl-coef 0 leaves at 0: give a --kl-coef above 0")
        if self.kl_target is not None and self.kl_horizon <= 0.2 * self.batch_size:
            raise InputError(f"--kl-horizon {self.kl_horizon:g}: one batch of {self.batch_size} could bring kl_coef to 0 or below; "
                             f"give more than {0.2 * self.batch_size:g}")
        if self.on_alarm == "raise-kl" and self.kl_coef == 0:
            raise InputError("--on-alarm raise-kl multiplies kl_coef, which --kl-coef 0 leaves at 0: give a --kl-coef above 0")
        if self.minibatch_size > self.batch_size:
            raise InputError(f"--minibatch-size {self.minibatch_size} exceeds --batch-size {self.batch_size}: lower it")
        if self.batch_size % self.minibatch_size:
            raise InputError(f"--batch-size {self.batch_size} is not a multiple of --minibatch-size {self.minibatch_size}")
        if self.missing_eos_mode == "subtract" and not (self.missing_eos_penalty or 0) > 0:
            raise InputError("--missing-eos-mode subtract takes --missing-eos-penalty off the score: give one above 0")


PRESETS = {
    "fast": {},
    "conala": {"data": "conala", "max_response": 64, "missing_eos_penalty": -1.0},
    "research": {"steps": 500, "batch_size": 128, "minibatch_size": 32, "micro_batch_size": 16, "ppo_epochs": 4,
                 "kl_coef": 0.15, "kl_target": 6.0, "temperature": 0.7, "max_query": 128, "max_response": 128,
                 "missing_eos_penalty": -1.0, "save_steps": 100},
    "production": {"steps": 2000, "batch_size": 512, "minibatch_size": 64, "micro_batch_size": 8, "ppo_epochs": 4, "lr": 5e-6,
                   "kl_coef": 0.15, "kl_target": 6.0, "temperature": 0.7, "max_query": 128, "max_response": 128,
                   "missing_eos_penalty": -1.0, "target_kl": 0.1, "precision": "bf16", "save_steps": 100, "patience": 10,
                   "generation_batch_size": 64},
}

if __name__ == "__main__":
    CONFIG = parse(Config, PRESETS)  # before torch is imported: --help and typing errors answer at once

import time
from pathlib import Path

import torch
from tqdm import tqdm

from nanorlhf import hf, pipeline
from nanorlhf.advantages import AdaptiveKLController, FixedKLController, shape_rewards
from nanorlhf.checkpoint import stream
from nanorlhf.data import called, open_data
from nanorlhf.evaluation import add_execution, add_rewards, answer, check_finite, in_words, known, open_sandbox, report, summary
from nanorlhf.gpt2 import GPT2, PolicyWithValue
from nanorlhf.logprobs import kl_estimate
from nanorlhf.losses import ppo_value_loss
from nanorlhf.masked import masked_var, whiten
from nanorlhf.monitor import RAISED, Monitor, cures, distinct_n
from nanorlhf.ops import TORCH, choose
from nanorlhf.plots import plot_overoptimisation, plot_ppo, read_log
from nanorlhf.reward import RewardModel, call_reward, term_values
from nanorlhf.rollout import hidden_states, roll_out
from nanorlhf.run import (Run, RunFailed, adamw, autocast, check_run, learning_rate, linear_decay, main, optimiser_step,
                          pick_device, seed_everything, set_lr)
from nanorlhf.sequences import encode_queries
from nanorlhf.terms import ExecutionReward, load_reward, needs_execution, reward_folders
from nanorlhf.tokenizer import Tokenizer


def prompt_rows(step, count, batch_size, seed):
    """The row indices of a step, from 1: shuffled passes over all rows, without end, are cut into batches; a set smaller than a
    batch repeats within it. They depend on the step and the seed alone, so that a resumed run takes the rows that are next."""
    first, last = (step - 1) * batch_size, step * batch_size - 1
    rows = [row for number in range(first // count, last // count + 1)
            for row in torch.randperm(count, generator=stream(seed, "prompts", number)).tolist()]
    return rows[first % count:first % count + batch_size]


def score_responses(reward, records, responses, step):
    """Step 2: the reward's scores (B,), NaN where a sum of terms cannot score a row. RunFailed if it can score none."""
    learn = getattr(reward, "learn", reward)  # a sum of normalised terms first counts these responses in
    scores = call_reward(learn, [r.prompt for r in records], responses, [r.reference for r in records])
    check_finite(scores, records, f"step {step}", reward)
    if scores.isnan().all():
        failed = ", ".join(name for name, values in term_values(reward).items() if values.isnan().any())
        raise RunFailed(f"step {step}: the reward is NaN for all {len(scores)} responses; terms that failed: {failed}")
    return scores


def final_scores(scores, ended, config):
    """Scores (B,), clipped, then with the penalty for responses that were cut before EOS."""
    if config.score_clip is not None:
        scores = scores.clamp(-config.score_clip, config.score_clip)
    if config.missing_eos_penalty is None:
        return scores
    penalised = scores - config.missing_eos_penalty if config.missing_eos_mode == "subtract" else \
        torch.full_like(scores, config.missing_eos_penalty)
    return torch.where(ended, scores, penalised)


def mean_score(rows, config):
    """The mean of `final_scores` over answers that have a reward, as `add_rewards` leaves them: what training would make of them."""
    rows = [row for row in rows if row["reward"] is not None]
    if not rows:
        return None
    return final_scores(torch.tensor([row["reward"] for row in rows]), torch.tensor([row["ended"] for row in rows]), config).mean().item()


def update(actor, optimizer, batch, advantages, returns, config, step, ids=(), ops=TORCH):
    """Step 5: epochs of minibatches. Returns the mean of each statistic over the optimiser steps taken."""
    sums, taken, generator = {}, 0, stream(config.seed, "minibatches", step)
    for _ in range(config.ppo_epochs):
        order, epoch_kl = torch.randperm(len(advantages), generator=generator), []
        for minibatch in order.tensor_split(-(-len(order) // config.minibatch_size)):  # alike in size, also where rows were left out
            tokens = batch.response_mask[minibatch].sum()  # the optimiser step's denominator, whatever the micro-batches
            by_length = batch.attention_mask[minibatch].sum(1).argsort().cpu()  # rows of like length waste little on padding
            stats = {}
            for rows in minibatch[by_length].split(config.micro_batch_size):
                loss, micro_stats = minibatch_loss(actor, batch.select(rows), advantages[rows], returns[rows], tokens, config, ops)
                loss.backward()
                share = (batch.response_mask[rows].sum() / tokens).item()
                for name, value in micro_stats.items():
                    stats[name] = stats.get(name, 0.0) + value * share
            stats["grad_norm"] = optimiser_step(optimizer, stats["loss/total"], config.max_grad_norm, step,
                                                [ids[i] for i in minibatch.tolist()] if ids else ())
            for name, value in stats.items():
                sums[name] = sums.get(name, 0.0) + value
            taken += 1
            epoch_kl.append(stats["policy/approx_kl"])
        if config.target_kl is not None and sum(epoch_kl) / len(epoch_kl) > config.target_kl:
            break
    return {**{name: value / taken for name, value in sums.items()}, "policy/updates": taken}


def minibatch_loss(actor, batch, advantages, returns, tokens, config, ops=TORCH):
    """(loss, stats) of some rows of a rollout: policy loss + vf_coef * value loss - entropy_coef * entropy.

    The loss is divided by `tokens`, those of the whole optimiser step, so that the losses of its micro-batches add up; the
    statistics are means over these rows.
    """
    mask = batch.response_mask  # (B, R)
    with autocast(mask.device, config.precision):
        hidden, new_values = hidden_states(actor, batch.query_response, batch.attention_mask, mask.shape[1])
        loss, policy_stats = ops.ppo_loss(  # less the entropy bonus, and divided by `tokens` already
            actor.policy, hidden, batch.query_response[:, -mask.shape[1]:], batch.logprobs, advantages, mask, config.temperature,
            cliprange=config.cliprange, dual_clip=config.dual_clip, entropy_coef=config.entropy_coef, denominator=tokens)
    value_loss, value_stats = ppo_value_loss(new_values[:, :-1], batch.values, returns, mask, config.cliprange_value)
    loss = loss + config.vf_coef * value_loss * (mask.sum() / tokens)
    policy, value = policy_stats.pop("policy_loss"), value_loss.item()
    total = policy + config.vf_coef * value - config.entropy_coef * policy_stats["entropy"]
    return loss, {"loss/total": total, "loss/policy": policy, "loss/value": value,
                  **{f"policy/{name}": number for name, number in policy_stats.items()},
                  **{f"value/{name}": number for name, number in value_stats.items()}}


def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns): 1 if the values predict all, 0 if no better than a constant."""
    return (1 - masked_var(returns - values, mask) / masked_var(returns, mask).clamp(min=1e-12)).item()


def rollout_numbers(batch):
    """What the log says of all responses of a step, also of those that cannot be scored."""
    def kl(estimator):
        """Of a response: the sum over its tokens, averaged over the responses."""
        return (kl_estimate(batch.logprobs, batch.ref_logprobs, estimator) * batch.response_mask).sum(1).mean().item()

    return {"objective/kl": kl("k1"), "objective/kl_k2": kl("k2"), "objective/kl_k3": kl("k3"),
            "response/length": batch.lengths.float().mean().item(), "response/eos": batch.ended.float().mean().item(),
            "response/distinct": distinct_n(batch.responses)}


def reward_numbers(reward):
    """What the terms of sums said of the latest responses, and how far an ensemble disagreed, for the log."""
    numbers = {f"reward/{name}": values.nanmean().item() for name, values in term_values(reward).items()
               if not values.isnan().all()}
    disagreement = getattr(reward, "disagreement", None)
    if disagreement is not None and not disagreement.isnan().all():
        numbers["objective/disagreement"] = disagreement.nanmean().item()
    return numbers


def make_stages(config, device, execution):
    """(the folder of the SFT policy, the reward, its names); a stage that is missing is made first.

    execution: the reward of the term of that name, or None.
    """
    beside, reward_names = Path(config.out).parent, config.reward
    form = {"device": device, "execution": execution, "clip": config.term_clip, "normalise": config.normalise_terms}
    reward = load_reward(reward_names, config.combine, **form) if reward_names else None  # a bad one is found before any training
    if config.policy:
        pipeline.check_policy(config.policy, config)
    else:
        pipeline.ensure("train_sft.py", beside / "sft", config, model=config.model)
    if reward is None:
        pipeline.ensure("train_reward.py", beside / "reward", config, policy=config.policy)
        reward_names = [str(beside / "reward")]
        reward = load_reward(reward_names, config.combine, **form)
    return config.policy or str(beside / "sft"), reward, reward_names


def check_reward(reward, name, splits, config):
    """A reward that cannot score fails here, on reference answers, not at step 1, and before --overwrite takes effect."""
    def score(records):
        return call_reward(reward, [r.prompt for r in records], [r.reference or "" for r in records], [r.reference for r in records])

    leaves_out = getattr(reward, "leaves_out", False)
    try:
        scores = score((splits.train * 2)[:5])
    except RunFailed as error:
        raise InputError(f"--reward {name}: {error}") from None
    if scores.isinf().any() or scores.isnan().any() and not leaves_out:
        # A sum leaves out what its terms know nothing of, a NaN; not an infinity, nor a fault of a model's.
        excusable = len(config.reward) == 1 and not scores.isinf().any() and not isinstance(reward, RewardModel)
        raise InputError(f"--reward {name}: the scores of the first training rows are not finite; mend it"
                         + (f", or leave such rows out of the updates by writing it as a sum: --reward '1*{name}'" if excusable else ""))
    if leaves_out and score(splits.validation[:config.eval_rows]).isnan().all():
        raise InputError(f"--reward {name}: no validation row can be scored; a metric needs references, execution needs checks, and a function may "
                         "say NaN for some rows, but not for all")


def train(config):
    checkpoint = check_run(config)
    device = pick_device(config.gpu, config.device)
    ops = choose(config.kernels, device, config.low_memory)

    # Rows, reward, reference and policy.
    splits, leakage = open_data(config)
    box = open_sandbox(config, splits, needs_execution(config.reward))
    execution = box and ExecutionReward(box, sum(splits.named().values(), []))
    folder, reward, reward_names = make_stages(config, device, execution)
    reward_name = ", ".join(reward_names)
    seed_everything(config.seed)
    tokenizer = Tokenizer.from_pretrained(folder)
    reference = GPT2.from_pretrained(folder).to(device).requires_grad_(False)
    actor = PolicyWithValue.from_pretrained(checkpoint or folder).to(device)
    tokenizer.check_fits(reference.config.vocab_size, folder)
    actor.policy.config.eos_token_id = tokenizer.eos_id  # where transformers' generate must stop, whatever the folder says
    reference.check_length(config.max_query + config.max_response)
    check_reward(reward, reward_name, splits, config)
    queries, cut = encode_queries(tokenizer, [row.prompt for row in splits.train], config.template, config.max_query)
    print(f"data: {splits.source}; {len(queries)} training prompts" + (f", {cut} cut to {config.max_query} tokens" if cut else "")
          + f"\npolicy and reference: {folder}; reward: {reward_name}")

    # The run folder, the optimiser, and what a resumed run takes up again.
    run = Run(config, checkpoint, {"data set": splits.train + splits.validation, "policy": hf.resolve(folder)}
              | reward_folders(reward_names))
    lr = learning_rate(config.lr, actor, reference.config.n_embd, 3e-4, 1e-5)
    optimizer = adamw([actor], lr, eps=1e-5)
    controller = FixedKLController(config.kl_coef) if config.kl_target is None else \
        AdaptiveKLController(config.kl_coef, config.kl_target, config.kl_horizon)
    step, resumed = run.restore(optimizer, config.steps)
    if resumed.get("asked_kl_coef") == config.kl_coef:  # another one, with --allow-config-change, takes effect here
        controller.value = resumed["kl_coef"]
    if step and config.normalise_terms:
        reward.restore(resumed.get("reward", {}))
    eval_records = splits.validation[:config.eval_rows]
    checked = [row for row in eval_records if row.checks] if box else []  # where gold is execution, it is the mean of these
    monitor = Monitor(len(checked) or len(eval_records), config.kl_target, repeat=config.on_alarm == "raise-kl")
    alarms = monitor.replay(read_log(run.folder / "metrics.jsonl")) if step else []

    def save(folder):
        actor.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def log(step, numbers):
        """Write a line of the log, and heed what the monitor sees in it."""
        run.log(step, numbers)
        seen = monitor.see(step, numbers)
        for alarm in seen:
            run.log(step, {"alarm": alarm.name, "message": alarm.message})
            tqdm.write(f"ALARM {alarm.message}")
        alarms.extend(seen)
        if config.on_alarm == "raise-kl" and any(map(cures, seen)):  # once, however many there are
            controller.value *= RAISED
            tqdm.write(f"kl_coef raised to {controller.value:.3g}")

    def evaluate(step):
        rows = answer(actor.policy, tokenizer, eval_records, config, config.temperature, reference, seed=config.seed, ops=ops)
        if config.normalise_terms and step == 0:  # the first policy's answers set the scale of all evaluations
            reward.start(*([row[name] for row in rows] for name in ("prompt", "response", "reference")))
        numbers = summary(add_execution(add_rewards(rows, reward), eval_records, box))
        numbers["score"] = mean_score(rows, config)
        log(step, {"temperature": config.temperature, **known(numbers)})
        run.samples(step, rows[:5])
        run.keep_best(step, numbers["score"], save)
        tqdm.write(f"step {step}: validation {in_words(numbers)}")

    if not step:
        evaluate(0)
    with run, tqdm(total=config.steps, initial=step, desc="PPO", unit="step") as bar:
        last_step = step if alarms and config.on_alarm == "stop" else config.steps  # an alarm before the interruption had stopped it
        for step in run.until_stalled(range(step + 1, last_step + 1), config.patience):
            started = time.perf_counter()
            rows = prompt_rows(step, len(queries), config.batch_size, config.seed)
            records = [splits.train[i] for i in rows]

            # 1. Roll out: sample responses, and score their tokens under policy, value head and reference.
            with autocast(device, config.precision):
                batch = roll_out(actor, reference, tokenizer, [queries[i] for i in rows], config.max_response, config.temperature,
                                 config.top_k, config.top_p, stream(config.seed, "tokens", step, device), config.micro_batch_size, ops,
                                 config.generation_batch_size)

            # 2. Score the responses; a row that a sum of terms cannot score is left out of this step.
            scores = score_responses(reward, records, batch.responses, step).to(device)
            scored = torch.nonzero(~scores.isnan()).flatten()
            left_out = len(scores) - len(scored)
            sampled = {**rollout_numbers(batch), "response/left_out": left_out}  # of all rows
            if left_out:
                batch, scores, records = batch.select(scored), scores[scored], [records[i] for i in scored.tolist()]
            scores = final_scores(scores, batch.ended, config)  # (B,)
            mask = batch.response_mask  # (B, R)

            # 3. KL-shaped rewards.
            kl = kl_estimate(batch.logprobs, batch.ref_logprobs, config.kl_estimator)  # (B, R)
            rewards = shape_rewards(scores, kl, mask, controller.value)
            if config.whiten_rewards:
                rewards = whiten(rewards, mask, center=False)

            # 4. Advantages and returns.
            last_values = torch.where(batch.ended, 0, batch.last_values) if config.bootstrap_truncated else None
            advantages, returns = ops.gae(rewards, batch.values, mask, config.gamma, config.lam, last_values)
            if config.whiten_advantages:
                advantages = whiten(advantages, mask)
            rolled_out = time.perf_counter()

            # 5. Epochs of minibatches.
            rate = set_lr(optimizer, lr * linear_decay(step, config.steps))
            stats = update(actor, optimizer, batch, advantages, returns, config, step, [called(r) for r in records], ops)

            # 6. KL controller, log, evaluate, save.
            log(step, {
                "objective/score": scores.mean().item(), "objective/score_std": scores.std(unbiased=False).item(),
                "objective/rewards": rewards.sum(1).mean().item(), "objective/kl_coef": controller.value,
                **reward_numbers(reward), **sampled, **stats,
                "value/explained_variance": explained_variance(batch.values, returns, mask),
                "lr": rate, "time/rollout": rolled_out - started, "time/update": time.perf_counter() - rolled_out})
            controller.update(sampled["objective/kl"], config.batch_size)
            bar.update()
            bar.set_postfix(loss=f"{stats['loss/total']:.3f}", reward=f"{scores.mean():.2f}", kl=f"{sampled['objective/kl']:.2f}",
                            **({"left_out": left_out} if left_out else {}))
            if step % config.eval_every == 0 or step == config.steps:
                evaluate(step)
            run.end_step(step, save, optimizer, kl_coef=controller.value, asked_kl_coef=config.kl_coef,
                         **{"reward": reward.state} if config.normalise_terms else {})
            if alarms and config.on_alarm == "stop":
                tqdm.write(f"stopped by --on-alarm stop at step {step}")
                break

    actor = PolicyWithValue.from_pretrained(run.folder / "best").to(device)
    results = report(run.folder, {"SFT": reference, "PPO": actor.policy}, tokenizer, splits, config, reward, reference, box, ops)
    run.finish(save, **results, best_step=run.best_step, steps=step, leakage=leakage,
               alarms=[alarm._asdict() for alarm in alarms])
    plot_ppo(run.folder)
    plot_overoptimisation(run.folder, monitor.eval_rows, "Learned reward" if isinstance(reward, RewardModel) else f"Reward: {reward_name}")
    if any(alarm.name == "gold" for alarm in alarms):
        print(monitor.gold_words(run.best_step))
    print(f"{run.folder}/final is step {run.best_step}, the best by validation score; {run.seconds():.0f} s")


if __name__ == "__main__":
    main(train, CONFIG)
