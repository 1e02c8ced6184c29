"""A training run: device, seeds, the run folder with its log and checkpoints, the optimiser step, exit codes.

A run folder holds

    config.toml      every option as resolved; `--config` runs it again
    metrics.jsonl    one line a step
    samples.jsonl    prompts and responses seen at each evaluation
    results.json     the numbers at the end
    plots/           curves
    checkpoints/     step-N/, every --save-steps; best/ is the best by validation
    final/           the model that the run is for: a Hugging Face folder
"""
import json
import os
import random
import resource
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch

from nanorlhf import config as configuration
from nanorlhf.errors import InputError


class RunFailed(RuntimeError):
    """The run cannot go on (a loss is not finite, say): one line on stderr, exit code 1."""


def main(body, config):
    """Run a script's body and turn what goes wrong into one line and the house's exit codes.

    0 done, 1 failed at run time, 2 usage or input, 130 interrupted. A fault of ours keeps its traceback.
    """
    program = os.path.basename(sys.argv[0])
    try:
        body(config)
    except InputError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except RunFailed as error:
        print(f"{program}: failed: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{program}: interrupted; checkpoints written so far are kept", file=sys.stderr)
        sys.exit(130)


def pick_device(gpu=None, device="auto"):
    """The device that --gpu and --device ask for. Without either: CUDA if there, else the CPU. Says which."""
    if gpu is not None:
        if device == "cpu":
            raise InputError(f"--gpu {gpu} and --device cpu contradict each other: give one of them")
        if not torch.cuda.is_available():
            raise InputError(f"--gpu {gpu}: torch {torch.__version__} sees no CUDA device; leave --gpu out to run on the CPU")
        if gpu >= torch.cuda.device_count():
            raise InputError(f"--gpu {gpu}: there are {torch.cuda.device_count()} CUDA devices, numbered from 0")
        chosen = torch.device("cuda", gpu)
        torch.cuda.set_device(chosen)
    elif device == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device cuda: torch {torch.__version__} sees no CUDA device; --device cpu runs on the CPU")
    else:
        chosen = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"device: {chosen} ({name})")
    return chosen


def seed_everything(seed):
    """Seed Python, NumPy and torch; scripts still draw samples and orders from generators of their own."""
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.manual_seed(seed)


def autocast(device, precision):
    """The context of a forward pass: "fp32" computes in float32, "bf16" runs matrix products in bfloat16."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def peak_memory_mb():
    """The largest resident size of this process so far, in MB (of CUDA: the most allocated)."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2 ** 20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)  # bytes on macOS, kilobytes on Linux


# ---- Run folders

def check_free(out, overwrite=False):
    """Refuse a folder that holds a run already, before any work is done and without touching it."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file, not a folder; name another")
    if out.is_dir() and any(out.iterdir()):
        if not (out / "config.toml").exists():
            raise InputError(f"--out {out}: the folder is not empty and holds no run of ours; name another")
        if not overwrite:
            raise InputError(f"--out {out}: holds a run already; pass --overwrite to replace it, or another --out")
    parent = next(folder for folder in [out, *out.absolute().parents] if folder.exists())
    if not parent.is_dir():
        raise InputError(f"--out {out}: {parent} is a file, not a folder; name another")
    if not os.access(parent, os.W_OK):
        raise InputError(f"--out {out}: {parent} cannot be written to; name another folder")


class Run:
    """The run folder of one training: create it once all input has proved good."""

    def __init__(self, config):
        check_free(config.out, config.overwrite)
        self.folder = Path(config.out)
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        configuration.save(config, self.folder / "config.toml")
        self.started = time.perf_counter()
        self.best_score, self.best_step, self.misses = -float("inf"), 0, 0

    def log(self, step, metrics):
        """Append one line to metrics.jsonl: {"step": step, metric: float, ...}."""
        self._append("metrics.jsonl", {"step": step, **metrics})

    def samples(self, step, rows):
        """Append prompts and responses to samples.jsonl."""
        for row in rows:
            self._append("samples.jsonl", {"step": step, **row})

    def _append(self, name, row):
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def save(self, name, write):
        """Write a model folder whole or not at all: `write(folder)` fills a temporary one, which is then renamed."""
        target, partial = self.folder / name, self.folder / f".{name.replace('/', '-')}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial, target)

    def checkpoint(self, step, write, keep):
        """Write checkpoints/step-N and prune to the newest `keep`."""
        self.save(f"checkpoints/step-{step}", write)
        steps = sorted((self.folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
        for old in steps[:-keep]:
            shutil.rmtree(old)

    def keep_best(self, step, score, write):
        """Write best/ if the validation score is the best so far; count the evaluations since otherwise."""
        if not np.isfinite(score):
            raise RunFailed(f"step {step}: the validation score is {score}; look at the reward and at the last lines of metrics.jsonl")
        if score > self.best_score:
            self.best_score, self.best_step, self.misses = score, step, 0
            self.save("best", write)
        else:
            self.misses += 1

    def seconds(self):
        """Wall time since the run folder was made."""
        return time.perf_counter() - self.started

    def finish(self, write=None, **results):
        """Write final/ (if there is a model) and, last of all, results.json: a folder that has it holds a finished run."""
        if write is not None:
            self.save("final", write)
        results["seconds"] = round(self.seconds(), 1)
        results["peak_memory_mb"] = round(peak_memory_mb())
        partial = self.folder / ".results.json.partial"
        partial.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, self.folder / "results.json")


# ---- Optimisation

def adamw(modules, lr, eps=1e-8, weight_decay=0.0, betas=(0.9, 0.999)):
    """AdamW over the parameters of the modules; weight decay on matrices only, not on biases, gains and norms."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, eps=eps, betas=betas)


SMALL = 20_000_000  # parameters


def learning_rate(asked, model, small, large):
    """What --lr asks for, or else the rate for a model of this size: models below 20 million parameters have been trained from
    random weights and take `small`, larger ones are pretrained, and `small` would undo that. Says which."""
    count = sum(p.numel() for p in model.parameters())
    rate = asked if asked is not None else small if count < SMALL else large
    print(f"learning rate {rate:g}" + (f", for {count:,} parameters (--lr sets another)" if asked is None else ""))
    return rate


def linear_decay(optimizer, total_steps, warmup_steps=0):
    """Learning rate: linear from 0 over the warm-up, then linear to 0 at total_steps."""
    def scale(step):
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
    return torch.optim.lr_scheduler.LambdaLR(optimizer, scale)


def optimiser_step(optimizer, loss_sum, max_grad_norm, step):
    """Clip the gradient and step; a loss or gradient that is not finite stops the run before any weight changes.

    Args: loss_sum, the loss of the whole step as a float; max_grad_norm, the bound on the gradient's norm.
    Returns: the gradient's norm before clipping.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
    if not (np.isfinite(loss_sum) and np.isfinite(norm)):
        raise RunFailed(f"step {step}: the loss is {loss_sum} and its gradient's norm {norm}; no weight was changed. "
                        "Lower --lr, or look at the rows of this step")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
