"""How a run is doing, from outside and while it goes on: progress, time left, latest numbers, alarms, the health of its
checkpoints.

    python -m nanorlhf.status runs/ppo

Reads the run folder alone. Exit code 0: finished or going on; 1: stopped before its end; 2: no run there.
"""
import fcntl
import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

from nanorlhf.errors import InputError

SHOWN = ("loss", "loss/total", "objective/score", "objective/kl", "objective/kl_coef", "accuracy", "rewards/accuracy", "policy/entropy",
         "policy/clipfrac", "grad_norm", "lr")


def read_log(folder):
    """The rows of metrics.jsonl; a last line that is being written just now is left out."""
    path = Path(folder) / "metrics.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def in_use(folder):
    """Whether a process holds the lock of a run folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)


def numbers(row, names):
    """Some of a log row's numbers in words."""
    return ", ".join(f"{name.removeprefix('eval/') if name.startswith('eval/') else name.rpartition('/')[2]} {row[name]:.4g}".replace("_", " ")
                     for name in names if name in row)


def status(folder):
    """(lines, exit code) for a run folder."""
    folder = Path(folder)
    if not (folder / "config.toml").is_file():
        beside = [str(path.parent) for path in sorted(folder.parent.glob("*/config.toml")) if in_use(path.parent)]
        raise InputError(f"{folder}: no run there (no config.toml); "
                         + (f"running beside it: {', '.join(beside)}" if beside else "name a run folder, such as runs/ppo"))
    rows, finished, running = read_log(folder), (folder / "results.json").is_file(), in_use(folder)
    state = "finished" if finished else "running" if running else "stopped before its end: the same command with --resume goes on"
    lines = [f"{folder}: {state}"]
    steps = [row for row in rows if "alarm" not in row and not any(name.startswith("eval/") for name in row)]
    evaluations = [row for row in rows if any(name.startswith("eval/") for name in row)]
    if steps:
        lines += progress(folder, steps[-1], running, finished)
        lines.append(f"latest step {steps[-1]['step']}: {numbers(steps[-1], SHOWN)}")
    if evaluations:
        shown = [name for name in evaluations[-1] if name.startswith("eval/")]
        lines.append(f"latest evaluation, step {evaluations[-1]['step']}: {numbers(evaluations[-1], shown)}")
    lines += [f"ALARM {row['message']}" for row in rows if "alarm" in row][-5:]
    return lines + checkpoints(folder), 0 if finished or running else 1


def progress(folder, row, running, finished=False):
    """Steps done of all, time taken and, while the run goes on, time left at the mean pace."""
    path, step, seconds = folder / "progress.json", row["step"], row.get("time/run", 0.0)
    total = json.loads(path.read_text())["total_steps"] if path.exists() else None
    words = f"step {step}" + (f" of {total} ({step / total:.0%})" if total else "") + f" after {timedelta(seconds=round(seconds))}"
    if finished and total and step < total:
        words += ", and ended there: by --patience or --on-alarm stop"
    if running and total and step:
        idle = time.time() - (folder / "metrics.jsonl").stat().st_mtime
        words += f", about {timedelta(seconds=round(seconds / step * (total - step)))} of training left; last line {idle:.0f} s ago"
    return [words]


def checkpoints(folder):
    """A line for each checkpoint, best/ and final/: whole, or what is wrong with it."""
    from nanorlhf.checkpoint import damage, step_folders  # imports torch
    found = [path for path in (*step_folders(folder), folder / "best", folder / "final") if path.is_dir()]
    faults = [(path.relative_to(folder), damage(path)) for path in found]
    return [f"{name}: {fault or 'whole'}" for name, fault in faults] or ["no checkpoint yet"]


def main(words):
    """Print the status of the run folder in `words`, the command line's; returns the exit code."""
    if len(words) != 1 or words[0].startswith("-"):
        print(__doc__)
        return 0 if words in (["-h"], ["--help"]) else 2
    try:
        lines, code = status(words[0])
    except InputError as error:
        print(f"nanorlhf.status: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
