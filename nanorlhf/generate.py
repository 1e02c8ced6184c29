"""Ask policies: their answers to prompts of your own, from the command line, from a file, or typed one after the other.

    python -m nanorlhf.generate --model runs/sft runs/ppo --prompt "sort list xs by length" "sum of the squares of xs"
    python -m nanorlhf.generate --model runs/ppo --temperature 1 --samples 4 --reward runs/reward --prompt "sort list xs by length"
    python -m nanorlhf.generate --model runs/ppo < intents.txt --out answers.jsonl      # a prompt a line
    python -m nanorlhf.generate --model runs/ppo                                        # on a terminal: type prompts, end with Ctrl-D

Greedy by default. Each model is asked as it was trained: with the template and the lengths of its run, unless they are given here.
Answers go to stdout, everything else to stderr; --out writes rows of prompt, model and response, which eval.py --predictions reads.
Nothing that a policy answers is run.
"""
from dataclasses import dataclass

from nanorlhf.config import option, parse
from nanorlhf.errors import InputError


@dataclass
class Config:
    """Ask policies: their answers to prompts of your own."""
    model: list[str] = option([], "policies: run folders, model folders or names", group="Generation", metavar="FOLDER")
    prompt: list[str] = option([], "what to ask; without it, a prompt a line from stdin", metavar="TEXT")
    out: str = option("", "write the answers to this file too: .jsonl, a row a line, or .json, a list", metavar="FILE")
    overwrite: bool = option(False, "replace the file --out")
    temperature: float = option(0.0, "sampling temperature; 0: greedy", at_least=0)
    top_k: int = option(0, "sample among the k likeliest tokens; 0: all", at_least=0)
    top_p: float = option(1.0, "sample among the likeliest tokens of this probability; 1: all", above=0, at_most=1)
    samples: int = option(1, "answers to each prompt", at_least=1)
    reward: list[str] = option([], "show what this reward gives each answer: as for train_ppo.py, but nothing that needs checks or a "
                               "reference", metavar="REWARD")
    template: str | None = option(None, "how a prompt becomes the query; without it that of the model's run, else '{prompt}\\n'")
    max_query: int | None = option(None, "longest query in tokens; without it that of the model's run, else what the positions leave", at_least=1)
    max_response: int | None = option(None, "longest answer in tokens; without it that of the model's run, else 64", at_least=1)
    batch_size: int = option(64, "prompts answered at once", at_least=1)
    seed: int = option(0, "seed of the samples", at_least=0, at_most=2**32 - 1)
    gpu: int | None = option(None, "run on this GPU; without it CUDA is taken if there, else the CPU", at_least=0)
    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda"))
    precision: str = option("fp32", "bf16 runs matrix products in bfloat16", choices=("fp32", "bf16"))
    debug: bool = option(False, "show the traceback of every error")

    def check(self):
        """InputError where options contradict each other."""
        if not self.model:
            raise InputError("--model: name at least one policy, such as --model runs/ppo")
        if any(not prompt.strip() for prompt in self.prompt):
            raise InputError("--prompt: an empty prompt asks nothing")
        if self.temperature == 0 and (self.samples > 1 or self.top_k or self.top_p < 1):
            raise InputError("--samples, --top-k and --top-p are for sampling: give --temperature above 0 too, or leave them out")
        if self.template is not None and "{prompt}" not in self.template:
            raise InputError(f"--template {self.template!r} has no {{prompt}}; write for example '{{prompt}}\\n'")
        if self.overwrite and not self.out:
            raise InputError("--overwrite: there is no --out to replace; leave it out")


if __name__ == "__main__":
    CONFIG = parse(Config, prog="python -m nanorlhf.generate")  # before torch is imported: --help is quick

import os
import signal
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path

from nanorlhf.config import replace
from nanorlhf.data import Record
from nanorlhf.evaluation import add_rewards, answer
from nanorlhf.feedback import check_out, load_model, write_pairs
from nanorlhf.pipeline import run_of
from nanorlhf.run import Interrupted, main, pick_device, read_config
from nanorlhf.terms import load_reward


def load(name, config, device):
    """A policy as (GPT2, Tokenizer, config): with the template and the lengths that its run had where `config` leaves them open."""
    model, tokenizer = load_model(name, device)
    run = run_of(Path(os.path.abspath(name)))  # also of "."
    theirs = read_config(run) if run else {}
    response = config.max_response or theirs.get("max_response", min(64, model.config.n_positions // 2))
    model.check_length(1 + response)
    query = config.max_query or theirs.get("max_query", model.config.n_positions - response)
    model.check_length(query + response)
    template = theirs.get("template", "{prompt}\n") if config.template is None else config.template
    return model, tokenizer, replace(config, template=template, max_query=query, max_response=response)


def ask(policies, prompts, config, reward=None):
    """Answers to prompts: for each prompt a list of rows of prompt, model, sample, response, ended (False where the length cut it off),
    and reward if one is given (None where it leaves an answer out).

    Args: policies, {name: what `load` returns}. The same prompts, seed and options give the same answers, whoever is asked beside.
    """
    records, answers = [Record(prompt, id=str(number)) for number, prompt in enumerate(prompts, 1)], []
    for name, (model, tokenizer, asked) in policies.items():
        for sample in range(config.samples):
            rows = answer(model, tokenizer, records, asked, config.temperature, seed=config.seed * config.samples + sample,
                          batch_size=config.batch_size)
            if reward is not None:
                add_rewards(rows, reward, "answers")
            answers.append([{"prompt": row["prompt"], "model": name, "sample": sample, "response": row["response"], "ended": row["ended"]}
                            | ({"reward": row.get("reward")} if reward is not None else {}) for row in rows])
    return [list(rows) for rows in zip(*answers)]


def show(rows, several_models):
    """Print the answers to a prompt, to stdout."""
    print(f"# {rows[0]['prompt']}")
    for row in rows:
        notes = [row["model"]] * several_models + ["cut off"] * (not row["ended"])
        if "reward" in row:
            notes.append("no reward" if row["reward"] is None else f"reward {row['reward']:.3f}")
        print(*([f"# -- {', '.join(notes)}"] if notes else []), row["response"], sep="\n")
    print(flush=True)


def typed():
    """Prompts from a terminal, one at a time."""
    with suppress(ImportError):
        import readline  # noqa: F401  arrow keys and a history in input()
    while True:
        try:
            if not sys.stdout.isatty():  # answers go to a file: there the prompt would be one of them
                print("> ", end="", file=sys.stderr, flush=True)
            line = input("> " if sys.stdout.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line:
            yield [line]


def prompts_of(config):
    """Lists of prompts to be answered together."""
    if config.prompt:
        return [config.prompt]
    if sys.stdin is not None and sys.stdin.isatty():
        return typed()
    try:
        prompts = [line.strip() for line in sys.stdin or () if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"stdin is no text in {error.encoding}: {error.reason}; write it as UTF-8") from None
    if not prompts:
        raise InputError("no prompt: give --prompt, or a prompt a line on stdin")
    return [prompts]


def generate(config):
    """Answer all prompts and show them; with --out the file holds, whole, what has been answered so far."""
    if config.out:
        check_out(Path(config.out), config.overwrite)
    asked = prompts_of(config)
    with redirect_stdout(sys.stderr):
        device = pick_device(config.gpu, config.device)
        policies = {name: load(name, config, device) for name in config.model}
        reward = load_reward(config.reward, device=device) if config.reward else None
    with suppress(AttributeError):  # a stream that is no file
        sys.stdout.reconfigure(errors="backslashreplace")
    found = []
    try:
        for prompts in asked:
            with redirect_stdout(sys.stderr):
                answers = ask(policies, prompts, config, reward)
            found += [row for rows in answers for row in rows]
            if config.out:
                write_pairs(config.out, found)
            for rows in answers:
                show(rows, len(policies) > 1)
    except (KeyboardInterrupt, Interrupted) as error:
        raise Interrupted(getattr(error, "signum", signal.SIGINT), f"interrupted; {len(found)} answers are in {config.out}" if config.out and found
                          else "interrupted") from None


if __name__ == "__main__":
    main(generate, CONFIG)
