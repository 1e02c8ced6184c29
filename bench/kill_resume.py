"""kill -9 while checkpoints are written, again and again: is anything lost, and is the end the same?

Each of the four trainers runs on a small task and saves after every step. A process is killed with SIGKILL at a random moment
while it saves (a temporary folder is there), what it left is checked, and the next process goes on with --resume; after so
many kills the last one runs to the end. Lost would be: no undamaged checkpoint although one was there before, a damaged one under
its final name, or an end that differs by one bit from the run that was never killed.

    python bench/kill_resume.py --kills 100 --report bench/results/kill_resume.md
"""
import importlib
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanorlhf.config import option, parse


@dataclass
class Config:
    """Kills, for each trainer, and where the table goes."""
    kills: int = option(100, "SIGKILLs for each trainer", group="Benchmark", at_least=1)
    seed: int = option(0, "seed of the moments", at_least=0)
    report: str = option("", "Markdown file to write; empty: only print", metavar="FILE")


if __name__ == "__main__":
    CONFIG = parse(Config)

import torch
from safetensors.torch import load_file

from nanorlhf.checkpoint import damage, newest, step_folders, sweep
from nanorlhf.run import main

TEXT = ["--max-query", "20", "--max-response", "8", "--device", "cpu", "--save-steps", "1", "--eval-rows", "2"]
STAGES = {
    "sft": ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--vocab-size", "290", "--dropout", "0.1", "--batch-size", "8",
            "--micro-batch-size", "3", "--patience", "999"],
    "reward": ["--samples", "1", "--pair-rows", "40", "--batch-size", "8", "--patience", "999"],
    "ppo": ["--batch-size", "8", "--minibatch-size", "4", "--micro-batch-size", "3", "--eval-every", "5", "--kl-target", "0.5"],
    "dpo": ["--batch-size", "8", "--micro-batch-size", "3", "--eval-every", "5"],
}
LENGTH = {"sft": "--epochs", "reward": "--epochs", "ppo": "--steps", "dpo": "--epochs"}


def words(home, stage, out, length):
    words = ["--data", f"{home}/data.jsonl", "--out", str(out), *TEXT, *STAGES[stage], LENGTH[stage], str(length)]
    return [word for i, word in enumerate(words) if stage != "reward" or "--eval-rows" not in words[max(0, i - 1):i + 1]]


def fork(stage, arguments):
    """A trainer in a process of its own, which has torch already; its output goes nowhere. Returns the process id."""
    pid = os.fork()
    if pid:
        return pid
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    module = importlib.import_module(f"train_{stage}")
    setattr(module, f"plot_{stage}", lambda folder: None)
    code = 0
    try:
        main(module.train, parse(module.Config, module.PRESETS, arguments))
    except SystemExit as exit:
        code = exit.code
    finally:
        os._exit(code or 0)


def finish(stage, arguments):
    """Run a trainer to its end."""
    _, status = os.waitpid(fork(stage, arguments), 0)
    if status:
        raise SystemExit(f"train_{stage}.py {' '.join(arguments)}: exit code {os.waitstatus_to_exitcode(status)}")


def saving_now(out):
    """Whether a folder is being written: the temporary one is there."""
    try:
        return any(entry.name.startswith(".") and entry.is_dir() for folder in (out, out / "checkpoints") for entry in os.scandir(folder))
    except FileNotFoundError:  # the trainer is only about to make, or to replace, the folder
        return False


def kill_while_saving(stage, arguments, out, rng):
    """Start a trainer, let it save once to four times, and kill it up to 20 ms into the next save. False if it ended before."""
    pid, saves, saving = fork(stage, arguments), rng.randint(1, 4), False
    while True:
        done, _ = os.waitpid(pid, os.WNOHANG)
        if done:
            return False
        now = saving_now(out)
        if now and not saving:
            saves -= 1
            if saves == 0:
                time.sleep(rng.random() * 0.02)
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return True
        saving = now


def lost(out, before):
    """What a kill has cost, in words; None if nothing. `before`: the step of the newest good checkpoint until now."""
    sweep(out), sweep(out / "checkpoints")
    found, skipped = newest(out)
    step = int(found.name[5:]) if found else 0
    if skipped:
        return f"damaged: {skipped}"
    if step < before:
        return f"step {before} was there, now {step}"
    if (out / "best").exists() and damage(out / "best"):
        return f"best/: {damage(out / 'best')}"
    return None


def same_end(left, right):
    """Whether two runs ended with equal weights and optimisers and wrote equal logs, times aside."""
    last = [folder / "checkpoints" / step_folders(folder)[-1].name for folder in (left, right)]
    pairs = [(f"{a}/{name}", f"{b}/{name}") for a, b in (last, (left / "final", right / "final"))
             for name in sorted(path.name for path in Path(a).glob("*.safetensors"))]
    for a, b in pairs:
        a, b = load_file(a), load_file(b)
        if a.keys() != b.keys() or not all(torch.equal(a[name], b[name]) for name in a):
            return False
    logs = [[{name: value for name, value in json.loads(line).items() if not name.startswith("time/")}
             for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (left, right)]
    return logs[0] == logs[1]


def trial(home, stage, kills, rng):
    """(kills, losses, whether the end is the same, seconds)."""
    started, whole, out = time.perf_counter(), home / f"whole-{stage}" / stage, home / f"killed-{stage}" / stage
    length = 20 + int(kills * {"sft": 1, "reward": 0.6, "ppo": 5, "dpo": 0.6}[stage])
    out.parent.mkdir(exist_ok=True), whole.parent.mkdir(exist_ok=True)
    for folder in (out.parent, whole.parent):
        for earlier in ("sft", "reward"):
            if earlier != stage:
                (folder / earlier).symlink_to(home / "stages" / earlier)
    finish(stage, words(home, stage, whole, length))
    done, losses, step, more = 0, [], 0, []
    while done < kills:
        if not kill_while_saving(stage, words(home, stage, out, length) + more, out, rng):
            raise SystemExit(f"{stage}: the run ended after {done} kills; it needs more steps")
        done += 1
        fault = lost(out, step)
        if fault:
            losses.append(fault)
        found, _ = newest(out)
        step, more = (int(found.name[5:]) if found else 0), ["--resume"]
    finish(stage, words(home, stage, out, length) + more)
    for fault in losses:
        print(f"{stage}: lost: {fault}")
    return done, len(losses), same_end(whole, out), time.perf_counter() - started


def run(config):
    torch.set_num_threads(1)
    rng, lines = random.Random(config.seed), ["| trainer | SIGKILLs while saving | losses | end equal to the run never killed |",
                                              "|---|---:|---:|---|"]
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # a kill needs no disk, and thousands of syncs take long on one
    with tempfile.TemporaryDirectory(prefix="nanorlhf-kill-", dir=memory) as scratch:
        home = Path(scratch)
        rows = [{"id": f"{name}{n}", "prompt": "please " * (n % 3) + f"add {n} to {name}", "reference": f"{name} + {n}" + " + 1" * (n % 2)}
                for n in range(10) for name in ("xs", "rows", "items", "names", "words", "values")]
        (home / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for stage in ("sft", "reward"):
            finish(stage, words(home, stage, home / "stages" / stage, 2))
        for stage in STAGES:
            kills, losses, same, seconds = trial(home, stage, config.kills, rng)
            lines.append(f"| train_{stage}.py | {kills} | {losses} | {'yes, bit by bit' if same else 'NO'} |")
            print(f"{lines[-1]}  {seconds:.0f} s", flush=True)
    text = "\n".join(["# Killed while saving", "", f"`python bench/kill_resume.py --kills {config.kills}`, {time.strftime('%Y-%m-%d')}, "
                      f"{platform.machine()} CPU, Python {platform.python_version()}, torch {torch.__version__}.", "", *lines]) + "\n"
    if config.report:
        Path(config.report).write_text(text)


if __name__ == "__main__":
    run(CONFIG)
