"""Supervised fine-tuning: train a GPT-2 to answer a query with its reference snippet.

    loss = -mean over response tokens of (1 - s) log pi(token | query, tokens before) + s mean_v log pi(v | the same)

with s of --label-smoothing, which keeps the policy from growing so sure that PPO has nothing left to try (Szegedy et al. 2016).
Only response tokens (EOS included) carry loss. Without --model a small GPT-2 starts from random weights, with a byte-level
BPE trained on the training rows. The model kept is the one with the lowest validation loss.

    python train_sft.py                                              # embedded data, random weights, CPU
    python train_sft.py --preset research --data conala --gpu 0           # from gpt2
"""
from dataclasses import dataclass

from nanorlhf.config import asked, option, parse
from nanorlhf.errors import InputError
from nanorlhf.options import DataOptions, TrainOptions


@dataclass
class Config(DataOptions, TrainOptions):
    out: str = option("runs/sft", "run folder: config, log, checkpoints, results, plots", group="Run", metavar="FOLDER")
    model: str = option("", "GPT-2 to start from, a folder or a name such as gpt2; empty: random weights of the shape below",
                        group="Model", metavar="FOLDER_OR_NAME")
    n_layer: int = option(3, "layers (random weights)", at_least=1)
    n_head: int = option(4, "attention heads (random weights)", at_least=1)
    n_embd: int = option(128, "width (random weights)", at_least=1)
    vocab_size: int = option(800, "entries of the tokenizer that is trained (random weights)", at_least=258)
    dropout: float = option(0.0, "dropout while training (random weights)", at_least=0, below=1)
    label_smoothing: float = option(0.1, "probability mass that the targets spread over the whole vocabulary: leaves PPO something to do",
                                    at_least=0, below=1)
    epochs: int = option(4, "passes over the training rows", group="Optimiser", at_least=1)
    batch_size: int = option(16, "rows of an optimiser step", at_least=1)
    micro_batch_size: int = option(64, "rows of a forward pass: fewer need less memory and change nothing else", at_least=1)
    lr: float | None = option(None, "peak learning rate of AdamW; none: 2e-3 * 128 / width below 20 million parameters, 5e-5 above", above=0)
    warmup: float = option(0.05, "share of the steps over which the learning rate rises", at_least=0, below=1)
    weight_decay: float = option(0.01, "decay of the matrices, a step's share being lr * weight_decay", at_least=0)
    max_grad_norm: float = option(1.0, "bound on the gradient's norm", above=0)
    eval_rows: int = option(200, "validation rows answered greedily after each epoch", group="Evaluation", at_least=1)
    patience: int = option(2, "stop after so many epochs without a lower validation loss", at_least=1)

    def check(self):
        super().check()
        shape = asked(self, "n_layer", "n_head", "n_embd", "vocab_size", "dropout")
        if self.model and shape:
            raise InputError(f"{shape}: for random weights; --model {self.model} brings its own: leave out one of them")


PRESETS = {
    "fast": {},
    "conala": {"data": "conala", "max_response": 64, "n_embd": 192, "n_head": 6, "vocab_size": 2000, "dropout": 0.1, "epochs": 12,
               "patience": 4},
    "research": {"model": "gpt2", "epochs": 5, "batch_size": 32, "micro_batch_size": 16,
                 "label_smoothing": 0.0, "max_query": 128, "max_response": 128},
    "production": {"model": "gpt2-large", "lr": 2e-5, "epochs": 3, "batch_size": 64, "micro_batch_size": 8,
                   "label_smoothing": 0.0, "max_query": 128, "max_response": 128, "precision": "bf16", "save_steps": 200,
                   "generation_batch_size": 64},
}

if __name__ == "__main__":
    CONFIG = parse(Config, PRESETS)  # before torch is imported: --help and typing errors answer at once

import torch
from tqdm import tqdm

from nanorlhf.data import called, open_data
from nanorlhf.evaluation import answer, in_words, known, summary
from nanorlhf.gpt2 import GPT2, GPT2Config
from nanorlhf.losses import sft_loss
from nanorlhf.plots import plot_sft
from nanorlhf.run import (Run, adamw, autocast, check_run, learning_rate, linear_decay, main, optimiser_step,
                          pick_device, seed_everything, set_lr)
from nanorlhf.sequences import encode_queries, encode_responses, epoch_batches, join, predict
from nanorlhf.tokenizer import Tokenizer


def build(config, splits, source):
    """Model and tokenizer: from a folder or name, or, where that is empty, random weights and a BPE trained on the training rows."""
    if source:
        model, tokenizer = GPT2.from_pretrained(source), Tokenizer.from_pretrained(source)
        tokenizer.check_fits(model.config.vocab_size, f"--model {source}")
        model.config.eos_token_id = tokenizer.eos_id  # the end that is learned: where transformers' generate must stop, whatever the source says
    else:
        tokenizer = Tokenizer.train([text for row in splits.train for text in (row.prompt, row.answer)], config.vocab_size)
        model = GPT2.from_config(GPT2Config(
            vocab_size=tokenizer.vocab_size, n_positions=config.max_query + config.max_response, n_embd=config.n_embd,
            n_layer=config.n_layer, n_head=config.n_head, embd_pdrop=config.dropout, attn_pdrop=config.dropout,
            resid_pdrop=config.dropout, bos_token_id=tokenizer.eos_id, eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.pad_id))
    model.check_length(config.max_query + config.max_response)
    return model, tokenizer


def encode(tokenizer, records, config):
    """(queries, responses) as id lists; says how many were cut."""
    queries, cut_queries = encode_queries(tokenizer, [r.prompt for r in records], config.template, config.max_query)
    responses, cut_responses = encode_responses(tokenizer, [r.answer for r in records], config.max_response)
    if cut_queries or cut_responses:
        print(f"cut to length: {cut_queries} queries (--max-query {config.max_query}) and {cut_responses} responses "
              f"(--max-response {config.max_response}) of {len(records)}")
    return queries, responses


def batch_loss(model, tokenizer, queries, responses, rows, precision, smoothing=0.0):
    """(mean loss, stats) of some rows."""
    ids, attention_mask, response_mask = (
        x.to(model.device) for x in join([queries[i] for i in rows], [responses[i] for i in rows], tokenizer.pad_id))
    with autocast(model.device, precision):
        logits, targets = predict(model, ids, attention_mask, response_mask)  # (N, V), (N,)
    loss, stats = sft_loss(logits, targets)
    if smoothing:
        uniform = -torch.log_softmax(logits.float(), -1).mean()  # cross-entropy against the uniform distribution
        loss = (1 - smoothing) * loss + smoothing * uniform
    return loss, stats


@torch.no_grad()
def validation_loss(model, tokenizer, queries, responses, config):
    """Mean loss over all response tokens."""
    total = tokens = 0.0
    for start in range(0, len(queries), config.micro_batch_size):
        rows = range(start, min(start + config.micro_batch_size, len(queries)))
        loss, stats = batch_loss(model, tokenizer, queries, responses, rows, config.precision)
        total, tokens = total + loss.item() * stats["tokens"], tokens + stats["tokens"]
    return total / tokens


def train(config):
    checkpoint = check_run(config)
    device = pick_device(config.gpu, config.device)
    seed_everything(config.seed)
    splits, leakage = open_data(config)
    if any(row.answer is None for row in splits.train + splits.validation):
        raise InputError(f"--data {config.data}: prompts without answers cannot be fine-tuned on; give a reference each")
    model, tokenizer = build(config, splits, checkpoint or config.model)
    model.to(device)
    queries, responses = encode(tokenizer, splits.train, config)
    held_out = encode(tokenizer, splits.validation, config)
    print(f"data: {splits.source}; {len(splits.train)} training rows\n"
          f"model: {model.num_parameters():,} parameters, {config.model or 'random weights'}")

    run = Run(config, checkpoint, {"data set": splits.train + splits.validation})
    total_steps = config.epochs * -(-len(queries) // config.batch_size)
    warmup_steps = int(config.warmup * total_steps)
    lr = learning_rate(config.lr, model, model.config.n_embd, 2e-3, 5e-5)
    optimizer = adamw([model], lr, weight_decay=config.weight_decay, betas=(0.9, 0.95))
    lengths = [len(query) + len(response) for query, response in zip(queries, responses)]
    step, _ = run.restore(optimizer, total_steps)

    def save(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def evaluate(step, epoch):
        model.eval()
        loss = validation_loss(model, tokenizer, *held_out, config)
        answers = answer(model, tokenizer, splits.validation[:config.eval_rows], config, temperature=0)
        numbers = summary(answers)
        run.log(step, {"epoch": epoch, "temperature": 0.0, "eval/loss": loss, **known(numbers)})
        run.samples(step, answers[:5])
        run.keep_best(step, -loss, save)
        tqdm.write(f"epoch {epoch}: validation loss {loss:.3f}, greedy: {in_words(numbers)}")

    with run, tqdm(total=total_steps, initial=step, desc="SFT", unit="step", mininterval=1) as bar:
        batches = epoch_batches(lengths, config.batch_size, config.epochs, config.seed, done=step)
        for step, epoch, batch, epoch_ends in run.until_stalled(batches, config.patience):
            model.train()
            tokens, loss_sum = sum(len(responses[i]) for i in batch), 0.0  # the step's denominator
            for start in range(0, len(batch), config.micro_batch_size):
                rows = batch[start:start + config.micro_batch_size]
                loss, stats = batch_loss(model, tokenizer, queries, responses, rows, config.precision, config.label_smoothing)
                loss = loss * (stats["tokens"] / tokens)
                loss.backward()
                loss_sum += loss.item()
            rate = set_lr(optimizer, lr * linear_decay(step, total_steps, warmup_steps))
            grad_norm = optimiser_step(optimizer, loss_sum, config.max_grad_norm, step, [called(splits.train[i]) for i in batch])
            run.log(step, {"loss": loss_sum, "lr": rate, "grad_norm": grad_norm, "epoch": epoch})
            bar.update()
            bar.set_postfix(loss=f"{loss_sum:.3f}", refresh=False)
            if epoch_ends:
                evaluate(step, epoch)
            run.end_step(step, save, optimizer)

    model.load_state_dict(GPT2.from_pretrained(run.folder / "best").state_dict())
    numbers = summary(answer(model, tokenizer, splits.test, config, temperature=0))
    run.finish(save, test=numbers, validation_loss=-run.best_score, best_step=run.best_step, steps=step, leakage=leakage,
               parameters=model.num_parameters())
    plot_sft(run.folder)
    print(f"{run.folder}/final is step {run.best_step}; test, greedy: {in_words(numbers)}; {run.seconds():.0f} s")


if __name__ == "__main__":
    main(train, CONFIG)
