"""Stages that need earlier stages: SFT, then the reward model, then PPO or DPO, each from the folder of the one before.

A script that is not told where its policy or its reward model is looks for the folders `sft` and `reward` beside its own
--out, and `ensure` runs the scripts that make them, as a user would from the command line. What is there is reused, and said.

    python -m nanorlhf.pipeline --seeds 0 1 2          # the whole job on three seeds -> docs/RESULTS.md
"""
import json
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

from nanorlhf.config import group
from nanorlhf.errors import InputError
from nanorlhf.options import data_flags

ROOT = Path(__file__).resolve().parent.parent


def ensure(script, folder, config, flags=()):
    """Make sure that `folder` holds a finished run of `script`: reuse it, or run the script with the same data and device.

    Args:
        script: such as "train_sft.py". folder: such as runs/sft. config: of the calling script. flags: further words.
    Errors: InputError where the folder's run was made from other data or another template.
    """
    folder = Path(folder)
    if (folder / "results.json").is_file():
        check_same_data(folder, config)
        print(f"{folder}: finished already, reused (seed {read_config(folder).get('seed', 0)})")
        return
    words = [script, f"--out={folder}", f"--seed={config.seed}", f"--device={config.device}", f"--precision={config.precision}",
             *data_flags(config), *flags]
    if config.gpu is not None:
        words.append(f"--gpu={config.gpu}")
    if config.config_preset:
        words += ["--preset", config.config_preset]
    if folder.exists():
        print(f"{folder}: unfinished, made anew")
        words.append("--overwrite")
    print(f"$ python {shlex.join(words)}", flush=True)
    code = subprocess.run([sys.executable, str(ROOT / script), *words[1:]]).returncode
    if code:
        raise SystemExit(code)


def read_config(folder):
    """The config.toml of a run folder as a dict."""
    return tomllib.loads((Path(folder) / "config.toml").read_text(encoding="utf-8"))


def check_same_data(folder, config):
    """A stage made from other rows or another template must not be continued unawares."""
    theirs = read_config(folder)
    for name in ("data", "data_format", "split_seed", "template"):
        if name in theirs and theirs[name] != getattr(config, name):
            raise InputError(f"{folder} was made with {name} = {theirs[name]!r}, this run asks for {getattr(config, name)!r}: "
                             f"give another --out, so that its own {folder.name} is made beside it, or name the stages to use")
