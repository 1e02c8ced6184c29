"""Checks a second in the sandbox: the references of data/nano, and MBPP-like tests, fresh and from the cache.

    python bench/sandbox.py --report bench/results/sandbox.md

A check is one snippet on one binding, its value compared with the expected one, or one function under three assertions;
every one must come out right, or the bench fails. One and two workers; each figure is the best of three new sandboxes.
The attack table is the test file's: python -m tests.test_sandbox.
"""

import argparse
import ast
import json
import os
import platform
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from nanorlhf.sandbox import Sandbox, same

WORKERS = (1, 2)
RUNS = 3


def value_jobs(path, count):
    """(jobs, their expected values) of the first `count` checks of a file with `checks`."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    pairs = [(row["snippet"], check) for row in rows for check in row["checks"]][:count]
    jobs = [{"code": code, "setup": check["setup"], "expression": check.get("expression")} for code, check in pairs]
    return jobs, [ast.literal_eval(check["value"]) for _, check in pairs]


def test_jobs(count):
    """Functions under three assertions each."""
    return [(f"def f(xs, n={i}):\n    return [x * n for x in sorted(xs) if x % 2 == 0]",
             [f"assert f([3, 2, 4]) == {[2 * i, 4 * i]}", "assert f([1]) == []", "assert f([6], n=2) == [12]"], "f")
            for i in range(count)]


def rates(box, jobs, right):
    """(fresh, cached) checks a second; `right(outcomes)` says that all came out as they should."""
    found = []
    for _ in range(2):
        begin = time.perf_counter()
        outcomes = box.check_many(jobs)
        found.append(len(jobs) / (time.perf_counter() - begin))
        if not right(outcomes):
            raise SystemExit(f"wrong: {next((o for o in outcomes if not o.passed), 'a value')}")
    return found


def measure(cases):
    """Rows (case, workers, start seconds, fresh, cached), and the layers that were on."""
    rows, layers = [], {}
    for name, jobs, right in cases:
        for workers in WORKERS:
            runs = []
            for _ in range(RUNS):
                begin = time.perf_counter()
                with Sandbox(timeout=30, workers=workers) as box:
                    start, layers = time.perf_counter() - begin, box.layers
                    runs.append((start, *rates(box, jobs, right)))
            start, fresh, cached = (best(column) for best, column in zip((min, max, max), zip(*runs)))
            rows.append((name, workers, start, fresh, cached))
    return rows, layers


def report(rows, layers, count):
    on = ", ".join(name if state is True else f"{name} ({state})" for name, state in layers.items() if state)
    off = "; ".join(f"{name} ({state[5:]})" for name, state in layers.items() if not state)
    lines = ["# The sandbox: checks a second", "",
             f"Date {time.strftime('%Y-%m-%d')}. {platform.system()} {platform.release().split('-')[0]} {platform.machine()}, "
             f"{os.cpu_count()} CPU cores, Python {platform.python_version()}, user id {os.geteuid()}. {count} checks "
             f"of each kind, each in a process of its own; the best of {RUNS} sandboxes.", "",
             "    python bench/sandbox.py --report bench/results/sandbox.md", "",
             f"Layers on: {on}. Off: {off or 'none'}.", "",
             "| check | workers | start, s | fresh, /s | fresh a worker, /s | cached, /s |",
             "|---|---:|---:|---:|---:|---:|"]
    lines += [f"| {name} | {workers} | {start:.2f} | {fresh:.0f} | {fresh / workers:.0f} | {cached:.0f} |"
              for name, workers, start, fresh, cached in rows]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=ROOT / "data/nano/test.jsonl", help="rows with checks")
    parser.add_argument("--count", type=int, default=400, help="checks of each kind")
    parser.add_argument("--report", type=Path, help="Markdown file to write; without it, only print")
    args = parser.parse_args()
    jobs, expected = value_jobs(args.data, args.count)
    cases = [("nano: a value", jobs, lambda outcomes: all(same(o.value, v) for o, v in zip(outcomes, expected))),
             ("three assertions on f", test_jobs(args.count), lambda outcomes: all(o.passed for o in outcomes))]
    text = report(*measure(cases), args.count)
    print(text, end="")
    if args.report:
        args.report.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
