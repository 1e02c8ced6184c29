"""A training run: device, seeds, the run folder with its log and checkpoints, resume, signals, the optimiser step, exit codes.

A run folder holds

    config.toml      every option as resolved; `--config` runs it again
    metrics.jsonl    one line a step
    samples.jsonl    prompts and responses seen at each evaluation
    progress.json    the number of steps: `python -m nanorlhf.status` reads it, and the log, while the run goes on
    results.json     the numbers at the end
    plots/           curves
    checkpoints/     step-N/, every --save-steps and where the run was interrupted: all that --resume needs
    best/            the best model by validation
    final/           the model that the run is for: a Hugging Face folder

`--resume` goes on from the newest undamaged checkpoint and ends with the very weights and log lines that the run would have had
without the interruption: what is random in a step comes from a generator of its own (`checkpoint.stream`) or from the global ones,
whose state is saved.
"""
import errno
import fcntl
import hashlib
import json
import os
import random
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import tomllib
import traceback
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from nanorlhf import checkpoint
from nanorlhf import config as configuration
from nanorlhf.data import SUFFIXES, sha256
from nanorlhf.errors import InputError


UNBORN = ".config.toml.*.partial"  # all that a run killed in its first moment leaves
INPUTS = "inputs.json"  # sha256 of what a run was begun with
KEPT = "interrupted; what was saved is kept, and the same command with --resume goes on from it"
NOTHING_KEPT = "interrupted; nothing was finished: run it again, with --overwrite where it says that --out holds a run"


class RunFailed(RuntimeError):
    """The run cannot go on (a loss is not finite, say): one line on stderr, exit code 1."""


class Interrupted(Exception):
    """A signal ended the run after it was saved: one line on stderr, exit code 128 + signal."""

    def __init__(self, signum, message):
        super().__init__(message)
        self.signum = signum


def main(body, config):
    """Run a script's body and turn what goes wrong into one line and the house's exit codes.

    0 done, 1 failed at run time, 2 usage or input, 130 / 143 interrupted by SIGINT / SIGTERM. A fault of ours keeps its
    traceback; --debug shows every other one's too.
    """
    def kept():
        resumable = hasattr(config, "resume") and not getattr(config, "dry_run", False)
        return KEPT if resumable and os.path.isfile(os.path.join(config.out, "config.toml")) else NOTHING_KEPT

    def terminate(signum, frame):
        raise Interrupted(signum, kept())

    before = signal.signal(signal.SIGTERM, terminate) if threading.current_thread() is threading.main_thread() else None
    if signal.getsignal(signal.SIGINT) is configuration.interrupted_import:  # torch is there: from here on something may be lost
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            trial(body, config) if getattr(config, "dry_run", False) else body(config)
        except OtherInputs as why:  # --resume --overwrite
            print(f"{why}: made anew")
            body(configuration.replace(config, resume=False))
    except InputError as error:
        _leave(config, "error", error, 2)
    except RunFailed as error:
        _leave(config, "failed", error, 1)
    except Interrupted as error:
        _leave(config, signal.Signals(error.signum).name, error, 128 + error.signum)
    except KeyboardInterrupt:
        _leave(config, "SIGINT", kept(), 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where Python will flush what it still holds
        _leave(config, "failed", "whatever read the output has ended, as head does; send it to a file", 1)
    except PermissionError as error:
        _leave(config, "error", f"{error.filename}: {error.strerror}; change its rights, or name another place", 2)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        _leave(config, "failed", f"out of memory; to need less: {memory_advice(config)}", 1)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _leave(config, kind, error, code):
    if getattr(config, "debug", False):
        traceback.print_exc()
    print(f"{os.path.basename(sys.argv[0])}: {kind}: {error}", file=sys.stderr)
    sys.exit(code)


def out_of_memory(error):
    """Whether an error is the machine's memory, or the GPU's, running out."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def memory_advice(config):
    """The flags to lower, in the order that helps most and changes least."""
    advice = []
    if getattr(config, "micro_batch_size", 1) > 1:
        advice.append(f"--micro-batch-size {max(1, config.micro_batch_size // 4)} (now {config.micro_batch_size}; "
                      "the same update, but for dropout's draws)")
    if getattr(config, "generation_batch_size", 1) > 1:
        advice.append(f"--generation-batch-size {max(1, config.generation_batch_size // 4)} (now {config.generation_batch_size})")
    if getattr(config, "precision", "bf16") == "fp32":
        advice.append("--precision bf16")
    advice += [f"--{name.replace('_', '-')} below {getattr(config, name)}" for name in ("max_response", "max_query", "batch_size")
               if getattr(config, name, None)]
    return ", then ".join(advice) or "a smaller model"


def trial(body, config):
    """--dry-run: one step of every phase, on a few rows, with all that the script writes going to a temporary folder.

    Finished stages beside --out are used; missing ones are trained on the same few rows. Says how much memory it took.
    """
    out = Path(config.out)
    with tempfile.TemporaryDirectory(prefix="nanorlhf-dry-run-") as scratch:
        for stage in ("sft", "reward"):
            if (out.parent / stage / "results.json").is_file() and stage != out.name:
                os.symlink((out.parent / stage).absolute(), Path(scratch) / stage)
        small = {"out": f"{scratch}/{out.name}", "overwrite": False, "resume": False, "dry_run": False, "steps": 1, "epochs": 1,
                 "eval_rows": 2, "eval_every": 1, "save_steps": 1, "max_rows": min(getattr(config, "max_rows", 0) or 1 << 30, getattr(config, "batch_size", 8))}
        small = {name: value for name, value in small.items() if hasattr(config, name)}
        tried = configuration.replace(config, **small)
        tried.config_baseline = {**tried.config_baseline, **small}  # nobody asked for these
        tried.trial = True  # for the stages that `pipeline.ensure` makes
        body(tried)
    print(f"dry run of {out}: every phase went through one step of a full batch, {peak_memory_mb(children=True):.0f} MB of "
          f"{'GPU memory' if torch.cuda.is_available() and config.device != 'cpu' else 'memory'} at the most; nothing was kept")


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


def peak_memory_mb(children=False):
    """The largest resident size of this process so far, in MB, or of a child that has ended (of CUDA: the most allocated)."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2 ** 20
    peak = max(resource.getrusage(who).ru_maxrss for who in [resource.RUSAGE_SELF] + [resource.RUSAGE_CHILDREN] * children)
    return peak / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)  # bytes on macOS, kilobytes on Linux


# ---- Run folders

FREE = {"out", "overwrite", "resume", "allow_config_change", "debug", "dry_run", "gpu", "save_steps", "keep_checkpoints"}  # may change


def check_run(config):
    """See that --out may be used, before any work is done: None for a new run, with --resume the checkpoint to go on from.

    A folder that holds a run is refused without --overwrite or --resume; with both it is resumed if its options are this
    run's, else replaced.
    """
    if (processes := os.environ.get("WORLD_SIZE") or "1") != "1":
        raise InputError(f"started as one of {processes} processes (WORLD_SIZE, as torchrun sets it), which would all do the same work: this "
                         "runs in one process, on one GPU; start it with python, or unset WORLD_SIZE")
    out, overwrite, resume = Path(config.out), config.overwrite, getattr(config, "resume", False)
    check_free(out, overwrite or resume)
    if not resume:
        return None
    if not (out / "config.toml").is_file():
        if overwrite or any(out.glob(UNBORN)):
            return None
        told = Path(getattr(config, "config_sources", {}).get("out", ""))  # who named it: a run's own config.toml, after --config
        moved = told.name == "config.toml" and (told.parent / INPUTS).is_file()
        raise InputError(f"--resume: {out} holds no run; " + (f"if {told.parent} is that run, moved, pass --out {told.parent} too" if moved else
                                                              "leave --resume out to start one"))
    changed, finished = changes(config, out), (out / "results.json").is_file()
    if changed and overwrite:
        return None
    if changed and finished:
        raise InputError(f"--resume: {out} is finished, and cannot be gone on with under other options ({'; '.join(changed[:3])}): name another "
                         "--out for a new run")
    if changed and not config.allow_config_change:
        raise InputError(f"--resume: {out} was made with other options ({'; '.join(changed)}): pass the same, such as by --config "
                         f"{out}/config.toml, or --allow-config-change")
    if finished:
        print(f"{out}: finished already, nothing to resume")
        raise SystemExit(0)
    claimed = claim(out)  # what a living run is writing must not be swept
    checkpoint.sweep(out)
    checkpoint.sweep(out / "checkpoints")
    os.close(claimed)
    found, skipped = checkpoint.newest(out)
    for path, fault in skipped:
        print(f"skipped {path}: {fault}")
    if changed and found:
        print(f"resumed with changed options: {'; '.join(changed)}")
    print(f"resuming from {found}" if found else f"{out} has no checkpoint to resume from: starting from the beginning")
    return found


def read_config(folder):
    """The config.toml of a run folder as a dict; one that cannot be read is an InputError."""
    path = Path(folder) / "config.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path}: not the options of a run ({error}); put it back, or name another folder") from None


def changes(config, folder):
    """What differs between a run folder's options and these, as ["lr: 0.1 there, 0.2 here"], options that may change left out."""
    theirs, ours, defaults = read_config(folder), configuration.to_dict(config), configuration.options(type(config))
    found = []
    for name, value in ours.items():
        there = theirs.get(name, defaults[name].default)  # an option that is newer than the run
        there = None if there == "none" else there
        if name not in FREE and there != value:
            found.append(f"{name}: {there} there, {value} here")
    return found


def check_free(out, may_exist=False):
    """Refuse a folder that cannot be written, is not ours, or, unless it may exist, holds a run; without touching it."""
    out = Path(out)
    try:
        os.stat(out)
    except ValueError:
        raise InputError(f"--out {str(out)!r}: no folder can have this name; give another") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(f"--out {str(out)[:60]}...: the name is too long; shorten it") from None
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file, not a folder; name another")
    if out.is_dir() and {*out.iterdir()} - {*out.glob(UNBORN)}:
        if not (out / "config.toml").exists():
            raise InputError(f"--out {out}: the folder is not empty and holds no run of ours; name another")
        if not may_exist:
            raise InputError(f"--out {out}: holds a run already; pass --resume to go on with it, --overwrite to replace it, or another "
                             "--out")
    parent = next(folder for folder in [out, *out.absolute().parents] if folder.exists())
    if not parent.is_dir():
        raise InputError(f"--out {out}: {parent} is a file, not a folder; name another")
    if not os.access(parent, os.W_OK):
        raise InputError(f"--out {out}: {parent} cannot be written to; name another folder")


def claim(folder):
    """Lock a run folder: two processes in it would ruin each other's files. Returns the descriptor that holds the lock,
    which goes with the process, however it ends."""
    found = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(found)
        raise InputError(f"--out {folder}: another process is writing this run; wait for it, or name another folder") from None
    return found


def write_whole(path, text):
    """Write a file under another name and rename it: there is the old one or the new one, never a half."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


class OtherInputs(Exception):
    """A run that was to be resumed or replaced was begun with other inputs: it is replaced."""


def fingerprint(what):
    """sha256 of a file, of the settings, weights and vocabulary or the data in a folder (a Path each), or of what the rows of a list say."""
    if isinstance(what, Path) and what.is_dir():
        lines = [f"{path.name} {sha256(path)}" for path in sorted(what.iterdir()) if path.is_file() and not path.name.startswith(".")
                 and path.suffix.lower() in (*SUFFIXES, ".safetensors", ".bin", ".txt")]
    else:
        lines = [sha256(what)] if isinstance(what, Path) else map(repr, what)
    found = hashlib.sha256()
    for line in lines:
        found.update(line.encode(errors="surrogateescape") + b"\n")
    return found.hexdigest()


class Run:
    """The run folder of one training. Make it once all input has proved good; `with run:` around the loop minds the signals.

    Args: config, that of the script; resumed, the checkpoint to go on from (`check_run`), or None for a new run; inputs, {what it is called:
        rows, or a file or folder as a Path}, what else decides how the run goes: it is resumed with the same, or with --allow-config-change.
    """

    def __init__(self, config, resumed=None, inputs=None):
        check_free(config.out, config.overwrite or getattr(config, "resume", False))
        self.config, self.folder, self.resumed = config, Path(config.out), resumed
        self.claim, self.signum = None, None
        self.inputs = {name: fingerprint(what) for name, what in (inputs or {}).items()}
        self.changed = bool(resumed and (changes(config, self.folder) + self._other_inputs()))
        if resumed is None and self.folder.exists():  # what --overwrite replaces, unless a process writes it
            self.claim = claim(self.folder)
            shutil.rmtree(self.folder)
            self.close()
        self._make_folder()
        self.claim = claim(self.folder)
        if resumed is None:
            self._save_config()
        self.started, self.earlier = time.perf_counter(), 0.0
        self.best_score, self.best_step, self.misses = -float("inf"), 0, 0

    def _make_folder(self):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except PermissionError:  # `main` says which folder forbids it
            raise
        except OSError as error:  # a file system that is read-only
            raise InputError(f"--out {self.config.out}: no folder can be made there: {error.strerror}; name another") from None

    def _other_inputs(self):
        """The inputs that are not what they were when the run began; refused, unless --allow-config-change lets them be, or --overwrite
        asks for a new run then. A run that is older than this file says nothing."""
        path = self.folder / INPUTS
        try:
            theirs = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else dict(self.inputs)
            other = [name for name, found in self.inputs.items() if theirs.get(name) != found]
        except (ValueError, AttributeError) as error:
            raise InputError(f"{path}: not the inputs of a run ({error}); put it back, or remove it") from None
        words = f"{self.folder} was begun with another {' and another '.join(other)}"
        if other and self.config.overwrite:
            raise OtherInputs(words)
        if other and not self.config.allow_config_change:
            raise InputError(f"--resume: {words}: put back what was there, or pass --allow-config-change")
        if other:
            print(f"resumed with another {' and another '.join(other)}")
        return other

    def _save_config(self):
        once = {name: False for name in ("overwrite", "resume", "allow_config_change") if hasattr(self.config, name)}
        configuration.save(configuration.replace(self.config, **once), self.folder / "config.toml")  # a later --config must not replay them
        if self.inputs:
            write_whole(self.folder / INPUTS, json.dumps(self.inputs, indent=1) + "\n")

    def close(self):
        """Let go of the folder."""
        if self.claim is not None:
            os.close(self.claim)
        self.claim = None

    # -- Log

    def log(self, step, metrics):
        """Append one line to metrics.jsonl: {"step": step, metric: float, ...}, with the seconds since the run began."""
        self._append("metrics.jsonl", {"step": step, **metrics, "time/run": round(self.seconds(), 2)})

    def samples(self, step, rows):
        """Append prompts and responses to samples.jsonl."""
        for row in rows:
            self._append("samples.jsonl", {"step": step, **row})

    def _append(self, name, row):
        with self._space(name), open(self.folder / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    @contextmanager
    def _space(self, name):
        """A full disk becomes a RunFailed with advice."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise RunFailed(f"{self.folder / name} was not written: {os.strerror(error.errno)}; free some space, or lower "
                            f"--keep-checkpoints; {self.last_good()}") from None

    # -- Checkpoints

    def save(self, name, write):
        """Write a model folder whole or not at all. A full disk keeps the old folder and stops the run."""
        with self._space(name):
            checkpoint.write_folder(self.folder / name, write)

    def check_space(self, optimizer, copies):
        """RunFailed unless the disk has room for so many copies of the weights that the optimiser trains."""
        needed = copies * sum(p.numel() * p.element_size() for group in optimizer.param_groups for p in group["params"])
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise RunFailed(f"{self.folder}: {needed / 2**20:.0f} MB are needed to save, {free / 2**20:.0f} MB are free; free some space; "
                            f"{self.last_good()}")

    def restore(self, optimizer, total_steps):
        """(the step to go on after, the numbers given to `end_step` there): (0, {}) for a new run.

        Restores optimiser, random generators, the best score and the logs' lengths. The model is the script's to load, from
        `resumed`. InputError where changed options leave no step to go on with: what best/ holds may be of a later one.
        """
        self.check_space(optimizer, copies=3 if self.resumed else 5)  # a checkpoint: weights and two moments; best; final
        progress = json.dumps({"total_steps": total_steps}) + "\n"
        if not self.resumed:
            write_whole(self.folder / "progress.json", progress)
            return 0, {}
        numbers = checkpoint.load_state(self.resumed, optimizer)
        if self.changed and numbers["step"] > total_steps:
            self.close()
            raise InputError(f"--resume: {self.resumed} is at step {numbers['step']}, and these options ask for {total_steps}: ask for more, "
                             "or start anew with --overwrite")
        for name, length in numbers["logged"].items():
            if length > ((self.folder / name).stat().st_size if (self.folder / name).is_file() else 0):
                self.close()
                raise InputError(f"{self.folder / name} is shorter than at {self.resumed}: it was changed since; put it back, or start "
                                 "anew with --overwrite")
        write_whole(self.folder / "progress.json", progress)
        for name, length in numbers["logged"].items():
            with open(self.folder / name, "ab") as file:
                file.truncate(length)
        self.best_score, self.best_step, self.misses = (numbers[name] for name in ("best_score", "best_step", "misses"))
        self.best_score = -float("inf") if self.best_score is None else self.best_score
        self.earlier = numbers["seconds"]
        if self.changed and numbers["step"] < total_steps:  # the replay will not be the same: best/ may be of a later step, and is decided anew
            self.best_score, self.misses = -float("inf"), 0
        self._save_config()
        return numbers["step"], numbers["extra"]

    def end_step(self, step, write, optimizer, **extra):
        """Close a step: save where --save-steps or a signal asks for it, and after a signal leave.

        Args: write(folder) saves the model; extra, numbers of the script's own that a resumed run needs, such as kl_coef.
        """
        every = self.config.save_steps
        if self.signum is not None or every and step % every == 0:
            self.checkpoint(step, write, optimizer, extra)
        if self.signum is not None:
            raise Interrupted(self.signum, f"stopped after step {step}; go on with: {self.resume_command()}")

    def checkpoint(self, step, write, optimizer, extra):
        """Write checkpoints/step-N, then prune to the newest --keep-checkpoints."""
        self.check_space(optimizer, copies=3)
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        if not all(torch.isfinite(p).all() for p in weights):
            raise RunFailed(f"step {step}: the weights are not finite; lower --lr; {self.last_good()}")
        logs = [self.folder / name for name in ("metrics.jsonl", "samples.jsonl")]
        logged = {path.name: path.stat().st_size if path.exists() else 0 for path in logs}
        numbers = {"step": step, "best_score": self.best_score if np.isfinite(self.best_score) else None, "best_step": self.best_step,
                   "misses": self.misses, "logged": logged, "seconds": self.seconds(), "extra": extra}

        def write_all(folder):
            write(folder)
            checkpoint.save_state(folder, optimizer, numbers)

        self.save(f"checkpoints/step-{step}", write_all)
        written = [path for path in checkpoint.step_folders(self.folder) if int(path.name[5:]) <= step]  # a later one was damaged, and skipped
        for old in written[:-self.config.keep_checkpoints]:
            shutil.rmtree(old)

    def keep_best(self, step, score, write):
        """Write best/ if the validation score is the best so far; count the evaluations since otherwise."""
        if score is None or not np.isfinite(score):
            found = "not known, no validation row could be scored" if score is None else str(score)
            raise RunFailed(f"step {step}: the validation score is {found}; look at the last lines of metrics.jsonl and at the reward, if there is "
                            "one, or lower --lr")
        if score > self.best_score:
            self.best_score, self.best_step, self.misses = score, step, 0
            self.save("best", write)
        else:
            self.misses += 1

    def until_stalled(self, steps, patience):
        """The items of `steps` until so many evaluations in a row brought no better score; a patience of 0 waits for ever."""
        steps = iter(steps)
        while not (patience and self.misses >= patience):
            try:
                yield next(steps)
            except StopIteration:
                return
        print(f"\nno better validation score for {self.misses} evaluations: stopping")

    def finish(self, write=None, **results):
        """Write final/ (if there is a model) and, last of all, results.json: a folder that has it holds a finished run."""
        if write is not None:
            self.save("final", lambda folder: (write(folder), self._write_card(folder, results)))
        results["seconds"] = round(self.seconds(), 1)
        results["peak_memory_mb"] = round(peak_memory_mb())
        write_whole(self.folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        self.close()

    def _write_card(self, folder, results):
        """README.md of final/: where the model comes from, and its numbers as far as they are plain."""
        script = os.path.basename(sys.argv[0])
        numbers = {name: value for name, value in results.items() if isinstance(value, (int, float))}
        lines = ["---", "library_name: transformers", "tags: [nanorlhf, rlhf, code-generation]", "---", "",
                 f"# {self.folder.name}", "", f"Made by nanorlhf's `{script}`, whose run folder holds all options in `config.toml` and all "
                 "results in `results.json`.", "", "Options that differ from the defaults:", "",
                 *(f"- `{line}`" for line in configuration.differences(self.config)), "", "| | |", "|---|---|",
                 *(f"| {name} | {value:.6g} |" for name, value in numbers.items())]
        (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def seconds(self):
        """Wall time since the run folder was made, without the pauses between an interruption and a resume."""
        return self.earlier + time.perf_counter() - self.started

    def resume_command(self):
        """What to type to go on with this run."""
        return f"python {shlex.join([os.path.basename(sys.argv[0]), '--config', f'{self.folder}/config.toml', '--resume'])}"

    def last_good(self):
        """The newest checkpoint, in words for an error message."""
        found, _ = checkpoint.newest(self.folder)
        return f"the last good checkpoint is {found}" if found else "there is no checkpoint yet"

    # -- Signals

    def __enter__(self):
        """From here on SIGINT and SIGTERM let the step finish; `end_step` then saves and leaves. The second one leaves at once."""
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():
            self.handlers = {signum: signal.signal(signum, self._note) for signum in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, signum, frame):
        if self.signum is not None:
            os._exit(128 + signum)
        self.signum = signum
        print("\nfinishing this step, then saving; once more to leave at once", file=sys.stderr, flush=True)

    def __exit__(self, kind, error, trace):
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)
        if kind is not None:
            self.close()
        if kind is RunFailed and "checkpoint" not in str(error):
            raise RunFailed(f"{error}; {self.last_good()}") from None
        if kind is None and self.signum is not None:  # it came after the last step
            raise Interrupted(self.signum, f"stopped; go on with: {self.resume_command()}")


# ---- Optimisation

def adamw(modules, lr, eps=1e-8, weight_decay=0.0, betas=(0.9, 0.999)):
    """AdamW over the parameters of the modules; weight decay on matrices only, not on biases, gains and norms."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    fused = True if parameters[0].device.type == "cpu" else None  # six times as fast there; elsewhere torch chooses
    return torch.optim.AdamW(groups, lr=lr, eps=eps, betas=betas, fused=fused)


SMALL = 20_000_000  # parameters


def learning_rate(asked, model, width, small, large):
    """What --lr asks for, or else a rate for the size of the model. Says which.

    Below 20 million parameters models are trained from random weights here: `small` is the rate at width 128, and it falls with
    the width (Yang et al. 2022, "Tensor Programs V", table 3: Adam's rate for matrices). Larger ones are pretrained, which
    `small` would undo: they take `large`.
    """
    count = sum(p.numel() for p in model.parameters())
    rate = asked if asked is not None else small * 128 / width if count < SMALL else large
    print(f"learning rate {rate:.3g}" + (f", for {count:,} parameters (--lr sets another)" if asked is None else ""))
    return rate


def linear_decay(step, total_steps, warmup_steps=0):
    """The share of the peak learning rate at a step, from 1: linear up over the warm-up, then linearly towards 0, which would
    come one step after the last."""
    if step <= warmup_steps:
        return step / (warmup_steps + 1)
    return max(0.0, (total_steps - step + 1) / max(1, total_steps - warmup_steps))


def set_lr(optimizer, lr):
    """Set the learning rate of the next step; returns it, for the log."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def optimiser_step(optimizer, loss_sum, max_grad_norm, step, rows=()):
    """Clip the gradient and step; a loss or gradient that is not finite stops the run before any weight changes.

    Args: loss_sum, the loss of the whole step as a float; max_grad_norm, the bound on the gradient's norm; rows, what the step
        was computed from, for the message.
    Returns: the gradient's norm before clipping.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
    if not (np.isfinite(loss_sum) and np.isfinite(norm)):
        shown = f"; its rows are {', '.join(map(str, rows[:8]))}{', ...' if len(rows) > 8 else ''}" if rows else ""
        raise RunFailed(f"step {step}: the loss is {loss_sum} and its gradient's norm {norm}; no weight was changed{shown}; "
                        "look at them, or lower --lr")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
