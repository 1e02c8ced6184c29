"""Direct preference optimisation (Rafailov et al. 2023): the policy learns from preference pairs, without a reward model.

    h = (log pi(chosen) - log pi(rejected)) - (log ref(chosen) - log ref(rejected))            loss = -log sigmoid(beta h)

The reference is the policy at the start; its log-probs are computed once, before training. Log-probs are sums over response
tokens (for "ipo" means, as its authors advise). Data without preferences (nano, CoNaLa) takes the pairs that the reward stage
made, so that PPO and DPO start from the same SFT model and learn from the same pairs.

    python train_dpo.py                                              # the pairs of runs/reward, from runs/sft
    python train_dpo.py --preset research --policy runs/gpt2/sft --data preferences.jsonl --gpu 0
"""
from dataclasses import dataclass

from nanorlhf.config import asked, option, parse
from nanorlhf.errors import InputError
from nanorlhf.options import DataOptions, KernelOptions, SandboxOptions, TrainOptions


@dataclass
class Config(SandboxOptions, KernelOptions, DataOptions, TrainOptions):
    out: str = option("runs/dpo", "run folder: config, log, checkpoints, results, plots", group="Run", metavar="FOLDER")
    model: str = option("", "pretrained GPT-2 that the SFT stage starts from, such as gpt2; empty: its preset's, or random weights", group="Model",
                        metavar="FOLDER_OR_NAME")
    policy: str = option("", "SFT policy to start from, and the reference; empty: the SFT stage, made if missing",
                         metavar="FOLDER_OR_NAME")
    reward: list[str] = option([], "reward that evaluates the policy, as for train_ppo.py; empty: the reward stage where it made "
                               "the pairs, else none", metavar="FOLDER")
    loss_type: str = option("sigmoid", "the loss", group="DPO", choices=("sigmoid", "ipo", "hinge", "robust"))
    beta: float = option(0.5, "strength of the pull to the reference", above=0)
    label_smoothing: float = option(0.0, "share of pairs assumed to be the wrong way round (sigmoid, robust)", at_least=0, at_most=0.5)
    reference_free: bool = option(False, "leave the reference's log-probs out of the loss, and of the logged rewards")
    ipo_sum: bool = option(False, "for ipo: sums of token log-probs rather than means")
    epochs: int = option(2, "passes over the pairs", group="Optimiser", at_least=1)
    batch_size: int = option(64, "pairs of an optimiser step", at_least=1)
    micro_batch_size: int = option(64, "pairs of a forward pass; fewer need less memory and change nothing else", at_least=1)
    lr: float | None = option(None, "peak learning rate of AdamW; none: 6e-5 * 128 / width below 20 million parameters, 1e-6 above", above=0)
    warmup: float = option(0.1, "share of the steps over which the learning rate rises", at_least=0, below=1)
    weight_decay: float = option(0.0, "decay of the matrices, a step's share being lr * weight_decay", at_least=0)
    max_grad_norm: float = option(1.0, "bound on the gradient's norm", above=0)
    temperature: float = option(1.0, "temperature of the samples that are evaluated", group="Evaluation", above=0)
    eval_every: int = option(40, "evaluate every so many steps", at_least=1)
    eval_rows: int = option(200, "validation prompts answered, where a reward scores answers", at_least=1)
    save_steps: int = option(25, "write checkpoints/step-N every so many steps; 0: only where a signal ends the run", at_least=0, group="Run")
    patience: int = option(0, "stop after so many evaluations without a better one; 0: never", at_least=0)

    def check(self):
        super().check()
        if self.model and self.policy:
            raise InputError("--model is for the SFT stage, which --policy leaves out: give one of them")
        if self.out.rstrip("/").rpartition("/")[2] in ("sft", "reward"):
            raise InputError(f"--out {self.out}: that is the name of a stage's folder; name another, such as runs/dpo")
        if self.label_smoothing and self.loss_type in ("ipo", "hinge"):
            raise InputError(f"--label-smoothing has no meaning for --loss-type {self.loss_type}: leave it 0")
        if self.loss_type == "robust" and self.label_smoothing == 0.5:
            raise InputError("--loss-type robust needs --label-smoothing below 0.5")
        if self.ipo_sum and self.loss_type != "ipo":
            raise InputError(f"--ipo-sum goes with --loss-type ipo, not {self.loss_type}")


PRESETS = {
    "fast": {},
    "conala": {"data": "conala", "max_response": 64},
    "research": {"beta": 0.1, "epochs": 1, "batch_size": 64, "micro_batch_size": 8, "max_query": 128, "max_response": 128,
                 "temperature": 0.7},
    "production": {"beta": 0.1, "lr": 5e-7, "epochs": 1, "batch_size": 128, "micro_batch_size": 8, "max_query": 128, "max_response": 128,
                   "temperature": 0.7, "precision": "bf16", "save_steps": 100, "patience": 5, "generation_batch_size": 64},
}

if __name__ == "__main__":
    CONFIG = parse(Config, PRESETS)  # before torch is imported: --help and typing errors answer at once

from pathlib import Path

import torch
from tqdm import tqdm

from nanorlhf import hf, pipeline
from nanorlhf.data import called, open_data, read
from nanorlhf.evaluation import add_execution, add_rewards, answer, known, open_sandbox, report, summary
from nanorlhf.feedback import PAIR_FILES
from nanorlhf.gpt2 import GPT2
from nanorlhf.losses import dpo_loss
from nanorlhf.ops import TORCH, choose
from nanorlhf.plots import plot_dpo
from nanorlhf.run import (Run, adamw, autocast, check_run, learning_rate, linear_decay, main, optimiser_step,
                          pick_device, seed_everything, set_lr)
from nanorlhf.sequences import encode_queries, encode_responses, epoch_batches, join, response_states
from nanorlhf.terms import ExecutionReward, load_reward, needs_execution, reward_folders
from nanorlhf.tokenizer import Tokenizer


def make_stages(config, splits, device, execution):
    """(the folder of the SFT policy, training pairs, validation pairs, the reward or None, its names); a stage that is missing is made first.

    Pairs are the data's own or, where that has references only, those that the reward stage made; its model is then the reward
    unless --reward names another. execution: the reward of the term of that name, or None.
    """
    beside, first, reward_names = Path(config.out).parent, splits.train[0], config.reward
    reward = load_reward(reward_names, "mean", device, execution) if reward_names else None  # a bad one is found before any training
    if first.chosen is None and first.reference is None:
        raise InputError(f"--data {config.data}: {splits.kind} rows carry neither preferences nor references to make them from; "
                         "give one of them")
    if first.chosen is not None and reward is None and (idle := asked(config, "temperature", "eval_rows")):
        raise InputError(f"{idle}: for answers that a reward scores, but --data {config.data} brings its own pairs and there is no "
                         "--reward: leave out, or give one")
    if config.policy:
        pipeline.check_policy(config.policy, config)
    else:
        pipeline.ensure("train_sft.py", beside / "sft", config, model=config.model)
    pairs = [splits.train, splits.validation]
    if first.chosen is None:
        pipeline.ensure("train_reward.py", beside / "reward", config, policy=config.policy)
        pairs = [read(beside / "reward" / name, "preference") for name in PAIR_FILES]
        if reward is None:
            reward_names = [str(beside / "reward")]
            reward = load_reward(reward_names, "mean", device)
    return config.policy or str(beside / "sft"), *pairs, reward, reward_names


def encode(tokenizer, pairs, config):
    """[(query, chosen, rejected)] as id lists. Cutting never takes a response's start; what is cut is counted."""
    queries, cut_queries = encode_queries(tokenizer, [pair.prompt for pair in pairs], config.template, config.max_query)
    chosen, cut_chosen = encode_responses(tokenizer, [pair.chosen for pair in pairs], config.max_response)
    rejected, cut_rejected = encode_responses(tokenizer, [pair.rejected for pair in pairs], config.max_response)
    if cut_queries or cut_chosen or cut_rejected:
        print(f"cut to length: {cut_queries} queries (--max-query {config.max_query}), {cut_chosen} chosen and {cut_rejected} "
              f"rejected responses (--max-response {config.max_response}) of {len(pairs)} pairs")
    return list(zip(queries, chosen, rejected))


def sequence_logps(model, tokenizer, queries, responses, config, ops=TORCH):
    """Log-prob of each response, (B,): summed over its tokens; for ipo their mean, unless sums are asked for."""
    ids, attention_mask, response_mask = (x.to(model.device) for x in join(queries, responses, tokenizer.pad_id))
    with autocast(model.device, config.precision):
        hidden, targets = response_states(model, ids, attention_mask, response_mask)  # (N, C), (N,)
        logprobs, _ = ops.score(model, hidden, targets, 1.0)  # (N,)
    row = torch.nonzero(response_mask)[:, 0]  # (N,) the row each token belongs to
    logps = torch.zeros(len(ids), device=ids.device).index_add(0, row, logprobs)
    mean = config.loss_type == "ipo" and not config.ipo_sum
    return logps / response_mask.sum(1) if mean else logps


def pair_logps(model, tokenizer, pairs, config, ops=TORCH):
    """(chosen logps, rejected logps), (B,) each, in one forward."""
    queries, chosen, rejected = zip(*pairs)
    return sequence_logps(model, tokenizer, queries * 2, chosen + rejected, config, ops).chunk(2)


@torch.no_grad()
def reference_logps(model, tokenizer, pairs, config, ops=TORCH):
    """The reference's logps of all pairs, (N, 2), computed once."""
    chunks = [torch.stack(pair_logps(model, tokenizer, pairs[i:i + config.micro_batch_size], config, ops), 1)
              for i in range(0, len(pairs), config.micro_batch_size)]
    return torch.cat(chunks)


def batch_loss(model, tokenizer, pairs, ref_logps, config, ops=TORCH):
    """(losses (B,), stats) of some pairs; ref_logps (B, 2)."""
    chosen_logps, rejected_logps = pair_logps(model, tokenizer, pairs, config, ops)
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        chosen_logps, rejected_logps, ref_logps[:, 0], ref_logps[:, 1], config.beta, config.loss_type, config.label_smoothing,
        config.reference_free)
    margins = chosen_rewards - rejected_rewards  # (B,)
    return losses, {"loss": losses.mean().item(), "rewards/chosen": chosen_rewards.mean().item(),
                    "rewards/rejected": rejected_rewards.mean().item(), "rewards/margin": margins.mean().item(),
                    "rewards/accuracy": (margins > 0).float().mean().item(),
                    "logps/chosen": chosen_logps.mean().item(), "logps/rejected": rejected_logps.mean().item()}


@torch.no_grad()
def validate(model, tokenizer, pairs, ref_logps, config, ops=TORCH):
    """Mean of each statistic over the validation pairs, as eval/..."""
    sums = {}
    for start in range(0, len(pairs), config.micro_batch_size):
        rows = slice(start, start + config.micro_batch_size)
        _, stats = batch_loss(model, tokenizer, pairs[rows], ref_logps[rows], config, ops)
        for name, value in stats.items():
            sums[name] = sums.get(name, 0.0) + value * len(pairs[rows])
    return {f"eval/{name.removeprefix('rewards/')}": value / len(pairs) for name, value in sums.items()}


def train(config):
    checkpoint = check_run(config)
    device = pick_device(config.gpu, config.device)
    ops = choose(config.kernels, device, config.low_memory)
    splits, leakage = open_data(config)
    box = open_sandbox(config, splits, needs_execution(config.reward))
    execution = box and ExecutionReward(box, sum(splits.named().values(), []))
    folder, train_pairs, validation_pairs, reward, reward_names = make_stages(config, splits, device, execution)
    seed_everything(config.seed)
    tokenizer = Tokenizer.from_pretrained(folder)
    policy, reference = GPT2.from_pretrained(checkpoint or folder).to(device), GPT2.from_pretrained(folder).to(device)
    tokenizer.check_fits(policy.config.vocab_size, folder)
    policy.config.eos_token_id = tokenizer.eos_id  # where transformers' generate must stop, whatever the folder says
    policy.check_length(config.max_query + config.max_response)
    encoded, held_out = encode(tokenizer, train_pairs, config), encode(tokenizer, validation_pairs, config)
    print(f"data: {splits.source}; {len(encoded)} training and {len(held_out)} validation pairs\n"
          f"policy and reference: {folder}; evaluated by: {', '.join(reward_names) or 'validation pairs only'}")

    ref_logps = reference_logps(reference, tokenizer, encoded, config, ops)  # (N, 2)
    held_out_ref_logps = reference_logps(reference, tokenizer, held_out, config, ops)
    run = Run(config, checkpoint, {"data set": splits.train + splits.validation, "set of pairs": encoded + held_out, "policy": hf.resolve(folder)}
              | reward_folders(reward_names))
    total_steps = config.epochs * -(-len(encoded) // config.batch_size)
    warmup_steps = int(config.warmup * total_steps)
    lr = learning_rate(config.lr, policy, policy.config.n_embd, 6e-5, 1e-6)
    optimizer = adamw([policy], lr, weight_decay=config.weight_decay)
    lengths = [len(query) + max(len(chosen), len(rejected)) for query, chosen, rejected in encoded]
    step, _ = run.restore(optimizer, total_steps)

    def save(folder):
        policy.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def evaluate(step):
        numbers = validate(policy, tokenizer, held_out, held_out_ref_logps, config, ops)
        if reward is not None:
            records = splits.validation[:config.eval_rows]
            rows = answer(policy, tokenizer, records, config, config.temperature, reference, seed=config.seed, ops=ops)
            numbers |= {"temperature": config.temperature, **known(summary(add_execution(add_rewards(rows, reward), records, box)))}
            run.samples(step, rows[:5])
        run.log(step, numbers)
        run.keep_best(step, numbers.get("eval/reward") if reward is not None else -numbers["eval/loss"], save)
        tqdm.write(f"step {step}: validation " + ", ".join(
            f"{name} {numbers[f'eval/{name}']:.3f}" for name in ("loss", "accuracy", "reward", "exact_match", "execution", "kl")
            if f"eval/{name}" in numbers))

    if not step:
        evaluate(0)
    with run, tqdm(total=total_steps, initial=step, desc="DPO", unit="step", mininterval=1) as bar:
        batches = epoch_batches(lengths, config.batch_size, config.epochs, config.seed, done=step)
        for step, epoch, batch, _ in run.until_stalled(batches, config.patience):
            sums = {}
            for start in range(0, len(batch), config.micro_batch_size):
                rows = batch[start:start + config.micro_batch_size]
                losses, stats = batch_loss(policy, tokenizer, [encoded[i] for i in rows], ref_logps[rows], config, ops)
                (losses.sum() / len(batch)).backward()
                for name, value in stats.items():
                    sums[name] = sums.get(name, 0.0) + value * len(rows) / len(batch)
            rate = set_lr(optimizer, lr * linear_decay(step, total_steps, warmup_steps))
            grad_norm = optimiser_step(optimizer, sums["loss"], config.max_grad_norm, step, [called(train_pairs[i]) for i in batch])
            run.log(step, {**sums, "lr": rate, "grad_norm": grad_norm, "epoch": epoch})
            bar.update()
            bar.set_postfix(loss=f"{sums['loss']:.3f}", reward=f"{sums['rewards/margin']:.2f}",
                            accuracy=f"{sums['rewards/accuracy']:.2f}", refresh=False)
            if step % config.eval_every == 0 or step == total_steps:
                evaluate(step)
            run.end_step(step, save, optimizer)

    policy.load_state_dict(GPT2.from_pretrained(run.folder / "best").state_dict())
    results = {} if reward is None else report(run.folder, {"SFT": reference, "DPO": policy}, tokenizer, splits, config, reward, reference, box, ops)
    results["validation"] = validate(policy, tokenizer, held_out, held_out_ref_logps, config, ops)
    run.finish(save, **results, best_step=run.best_step, steps=step, leakage=leakage)
    plot_dpo(run.folder)
    print(f"{run.folder}/final is step {run.best_step}, the best by validation "
          f"{'loss' if reward is None else 'reward'}; {run.seconds():.0f} s")


if __name__ == "__main__":
    main(train, CONFIG)
