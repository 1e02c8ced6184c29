"""Stages that need earlier stages: SFT, then the reward model, then PPO or DPO, each from the folder of the one before.

A script that is not told where its policy or its reward model is looks for the folders `sft` and `reward` beside its own
--out; `ensure` runs the scripts that make them, as a user would from the command line. What is there is reused, and said so.

    python -m nanorlhf.pipeline                  # SFT, reward model, PPO, DPO, PPO on execution, on three seeds -> docs/RESULTS.md
    python -m nanorlhf.pipeline --preset conala --data PATH                          # the same on CoNaLa, PPO on BLEU -> docs/CONALA.md
"""
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import NamedTuple

from nanorlhf.config import asked, option, parse
from nanorlhf.errors import InputError
from nanorlhf.options import SANDBOX, data_flags, flags

ROOT = Path(__file__).resolve().parent.parent


def ensure(script, folder, config, **options):
    """Make sure that `folder` holds a finished run of `script`: reuse it, or run the script on the same data and device.

    Args:
        script: such as "train_sft.py". folder: such as runs/sft. config: that of the calling script.
        options: further options of the script; empty ones are left to it.
    Errors: InputError where the folder's run was made from other data or with other options.
    """
    from nanorlhf.run import read_config  # imports torch, which --help does without
    folder = Path(folder)
    if options.get("policy") and Path(options["policy"]) == folder.parent / "sft":
        options["policy"] = ""  # the stage's own default, by another name
    given = {name: str(value) for name, value in options.items() if value}
    if (folder / "results.json").is_file():
        wanted = {name: getattr(config, name) for name in
                  ("data", "data_format", "validation", "test", "split_seed", "min_probability", "skip_bad_rows", "template",
                   "max_query", "max_response")}
        # A few rows may use a stage made on all, all not one made on a few; a trial may use any.
        if read_config(folder).get("max_rows") and not getattr(config, "trial", False):
            wanted["max_rows"] = config.max_rows
        wanted |= given
        if "policy" in options:  # an empty one too: it is the stage's own default
            wanted["policy"] = options["policy"]
        check_same(folder, wanted)
        seed = read_config(folder).get("seed", config.seed)
        print(f"{folder}: finished already, reused" + (f"; its seed is {seed}" if seed != config.seed else ""))
        return
    words = [script, *flags({"out": folder, "seed": config.seed, "device": config.device, "precision": config.precision})]
    words += data_flags(config) + flags(given)
    if script == "train_reward.py":
        words += flags({name: getattr(config, name) for name in SANDBOX if asked(config, name)})
    words += flags({"epochs": 1 if getattr(config, "trial", False) else None, "gpu": config.gpu, "preset": config.config_preset})
    if folder.exists():
        print(f"{folder}: unfinished; gone on with if it was made with the same options, else made anew")
        words += ["--resume", "--overwrite"]
    print(f"$ python {shlex.join(words)}", flush=True)
    code = call([sys.executable, str(ROOT / script), *words[1:]])
    if code < 0:
        print(f"{script} was ended by signal {-code} (9 may mean out of memory: lower --micro-batch-size)", file=sys.stderr)
    if code in (130, 143):
        print("the command that started this stage goes on from there too", file=sys.stderr)
    if code:
        raise SystemExit(code if code > 0 else 1)


def call(words):
    """Run a command to its end and return its exit code. A Ctrl-C reaches it from the terminal, SIGTERM is passed on: it saves,
    and this process leaves with its code."""
    process = subprocess.Popen(words)
    before = signal.signal(signal.SIGINT, lambda signum, frame: None), \
        signal.signal(signal.SIGTERM, lambda signum, frame: process.terminate())
    try:
        return process.wait()
    finally:
        signal.signal(signal.SIGINT, before[0]), signal.signal(signal.SIGTERM, before[1])


def check_same(folder, wanted):
    """InputError unless the run in `folder` was made with these options: other rows, another template or another model must
    not be continued, or compared, unawares."""
    from nanorlhf.run import read_config  # imports torch, which --help does without
    theirs = {name: None if value == "none" else value for name, value in read_config(folder).items()}
    for name, value in wanted.items():
        if theirs.get(name) != value:  # an unset option is not in the file
            raise InputError(f"{folder} was made with {name} = {theirs.get(name)!r}, this run asks for {value!r}: ask for the same, "
                             "or name another folder; stages are made beside --out, unless --policy and --reward name them")


def check_policy(folder, config, *names):
    """InputError unless the run that made this policy, if it was one of ours, had the template (and other options) of `config`; and, on
    the same data, its split, unless --allow-overlap: held-out rows must not be those that it was trained on."""
    from nanorlhf.run import read_config  # imports torch, which --help does without
    run = run_of(Path(folder))
    if run is None:
        return
    if os.path.abspath(read_config(run).get("data", "")) == os.path.abspath(config.data) and not config.allow_overlap:
        names += "validation", "test", "split_seed"
    check_same(run, {name: getattr(config, name) for name in ("template", *names)})


def run_of(folder):
    """The run that a folder is, or is a model of: runs/ppo of runs/ppo, runs/ppo/final and runs/ppo/checkpoints/step-10; else None."""
    above = [folder.parent] * (folder.name in ("final", "best")) + [folder.parent.parent] * (folder.parent.name == "checkpoints")
    return next((each for each in [folder, *above] if (each / "config.toml").is_file()), None)


# ---- The whole job on several seeds, as a report

@dataclass
class Config:
    """SFT, reward model, PPO, DPO, and PPO on a reward that needs no model, on several seeds, and a report of all of them."""
    seeds: list[int] = option([0, 1, 2], "seeds, each a job of its own", group="Report", at_least=0)
    data: str = option("nano", "what is trained on, as for train_ppo.py", metavar="PATH")
    out: str = option("runs/seeds", "folder of the jobs: seed-N/sft, reward, ppo, dpo ...; finished ones are reused", metavar="FOLDER")
    report: str = option("docs/RESULTS.md", "the Markdown file to write", metavar="FILE")


PRESETS = {
    "fast": {},
    "conala": {"data": "conala", "out": "runs/conala-seeds", "report": "docs/CONALA.md"},
}


class Stage(NamedTuple):
    """A tuned policy: what the report calls it, what its results call it, and how it is made."""
    name: str
    model: str
    script: str
    options: list

    @property
    def learned(self):
        """Whether its reward is the reward model's: another's is not comparable, and not shown."""
        return "--reward" not in self.options


SFT = Stage("SFT", "SFT", "train_sft.py", [])
PPO, DPO = Stage("PPO", "PPO", "train_ppo.py", []), Stage("DPO", "DPO", "train_dpo.py", [])
TUNED = {
    "fast": {"ppo": PPO, "dpo": DPO, "ppo-execution": Stage("PPO on execution", "PPO", "train_ppo.py", ["--reward", "execution"])},
    "conala": {"ppo": PPO, "dpo": DPO, "ppo-bleu": Stage("PPO on BLEU", "PPO", "train_ppo.py", ["--reward", "bleu", "--normalise-terms"])},
}
HEADS = {
    "fast": ["# Results of the default job", "",
             "SFT, then PPO and DPO with a reward model's pairs, and PPO with `--reward execution`, on the embedded data, from random weights, "
             "seeds {seeds}. Regenerated by `python -m nanorlhf.pipeline`. \"Passes its checks\" is execution: the "
             "answer is run on each check of its row, and gives the reference's value every time. The reward of PPO on execution is the "
             "share of checks passed, which is not shown as a learned reward."],
    "conala": ["# Results on CoNaLa from random weights", "",
               "SFT, then PPO and DPO with a reward model's pairs, and PPO with `--reward bleu --normalise-terms` (sentence BLEU against the "
               "reference), on the curated rows of CoNaLa v1.1, `--preset conala`, seeds {seeds}. Regenerated by `python -m nanorlhf.pipeline "
               "--preset conala --data PATH`. The reward of PPO on BLEU is not shown as a learned reward."],
}
GAIN = ("Gain over SFT: the paired difference of each prompt, averaged over the seeds, with a bootstrap 95 % interval over "
        "prompts. It speaks of other prompts, not of other seeds; the learned reward is each seed's own model's, in standard "
        "deviations of its SFT policy's scores.")
COSTS = "Seconds and peak resident memory (MB) of each stage; `job` is the wall time of `python train_ppo.py` from nothing."


def job(folder, seed, preset, data):
    """One seed: train_ppo.py, which makes its own stages, then the others from the same ones."""
    for stage, (_, _, script, options) in TUNED[preset].items():
        if (folder / stage / "results.json").is_file():
            check_same(folder / stage, {"data": data})
            print(f"{folder / stage}: finished already, reused")
            continue
        words = [script, f"--preset={preset}", f"--data={data}", f"--out={folder / stage}", f"--seed={seed}", *options]
        words += ["--resume", "--overwrite"] if (folder / stage).exists() else []
        print(f"$ python {shlex.join(words)}", flush=True)
        started = time.perf_counter()
        code = call([sys.executable, str(ROOT / script), *words[1:]])
        if code:
            raise SystemExit(code)
        (folder / f"{stage}.seconds").write_text(f"{time.perf_counter() - started:.0f}\n")


def read_answers(folder, stage, split, mode, model):
    """Rows of a stage's answers.jsonl."""
    with open(folder / stage / "answers.jsonl", encoding="utf-8") as file:
        return [row for row in map(json.loads, file) if (row["split"], row["mode"], row["model"]) == (split, mode, model)]


POOLED = ("reward", "exact_match", "execution")


def mean_over_seeds(answers):
    """One row a prompt: the mean over the seeds of each pooled metric. `answers`: a list of rows a seed, in one order."""
    return [{metric: sum(row[metric] for row in rows) / len(rows) for metric in POOLED if rows[0].get(metric) is not None}
            for rows in zip(*answers)]


def report(folders, preset):
    """The Markdown report of finished jobs, {seed: folder}."""
    from nanorlhf.evaluation import ROWS  # torch, which the rest of this module does without
    tuned = TUNED[preset]
    results = {seed: {stage: json.loads((folder / stage / "results.json").read_text()) for stage in ("sft", "reward", *tuned)}
               for seed, folder in folders.items()}
    splits = results[min(results)]["ppo"]["test"]
    titles = {metric: title for metric, title in ROWS.items() if splits[next(iter(splits))]["sampled"]["PPO"].get(metric) is not None}
    lines = [*(line.format(seeds=", ".join(map(str, folders))) for line in HEADS[preset]), "",
             f"{date.today()}, {platform.machine()} CPU, {os.cpu_count()} cores, Python {platform.python_version()}, {_torch()}."]
    for split in splits:
        for mode in ("sampled", "greedy"):
            lines += ["", f"## {split}, {mode}", "", *scores_table(results, tuned, split, mode, titles), "", GAIN, "",
                      *gains(folders, tuned, split, mode)]
    return "\n".join([*lines, "", "## Time and memory", "", COSTS, "", *costs_table(results, tuned, folders)]) + "\n"


def scores_table(results, tuned, split, mode, titles):
    """A row for each seed and policy, a column for each metric of {metric: title}."""
    yield "| seed | policy | " + " | ".join(titles.values()) + " |"
    yield "|---|---|" + "---:|" * len(titles)
    for seed, stages in results.items():
        for name, stage in [("ppo", SFT), *tuned.items()]:  # SFT's answers stand beside PPO's
            numbers = stages[name]["test"][split][mode][stage.model]
            cells = ["" if numbers.get(metric) is None or metric == "reward" and not stage.learned else f"{numbers[metric]:.3f}"
                     for metric in titles]
            yield f"| {seed} | {stage.name} | " + " | ".join(cells) + " |"


def gains(folders, tuned, split, mode):
    """A line for each tuned policy: its gains over SFT."""
    from nanorlhf.evaluation import ROWS, compare
    for name, stage in tuned.items():
        before, after = (mean_over_seeds([read_answers(folder, name, split, mode, model) for folder in folders.values()])
                         for model in ("SFT", stage.model))
        found = {metric: compare(before, after, metric) for metric in POOLED if metric != "reward" or stage.learned}
        yield f"- {stage.name}: " + ", ".join(f"{ROWS[metric]} {gain['difference']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"
                                              for metric, gain in found.items() if gain)


def costs_table(results, tuned, folders):
    """A row for each seed, a column for each stage."""
    yield "| seed | SFT | reward | " + " | ".join(stage.name for stage in tuned.values()) + " | job | held-out pair accuracy |"
    yield "|---|" + "---:|" * (len(tuned) + 4)
    for seed, stages in results.items():
        cells = [f"{stages[stage]['seconds']:.0f} s, {stages[stage]['peak_memory_mb']} MB" for stage in ("sft", "reward", *tuned)]
        seconds = folders[seed] / "ppo.seconds"
        cells += [seconds.read_text().strip() + " s" if seconds.exists() else "", f"{stages['reward']['validation']['eval/accuracy']:.3f}"]
        yield f"| {seed} | " + " | ".join(cells) + " |"


def _torch():
    """Version and threads: with another number of threads sums round in another order, and runs go another way."""
    import torch
    return f"torch {torch.__version__}, threads: {torch.get_num_threads()}"


def main(config):
    preset = config.config_preset or "fast"
    folders = {seed: Path(config.out) / f"seed-{seed}" for seed in config.seeds}
    for seed, folder in folders.items():
        job(folder, seed, preset, config.data)
    Path(config.report).parent.mkdir(parents=True, exist_ok=True)
    Path(config.report).write_text(report(folders, preset), encoding="utf-8")
    print(f"wrote {config.report}")


if __name__ == "__main__":
    CONFIG = parse(Config, PRESETS)
    from nanorlhf import run  # imports torch, which `ensure` and --help do without
    run.main(main, CONFIG)
