"""Runs generated code where it can do no harm, and judges it where it cannot reach. Standard library only.

    trainer                this process: sends jobs, receives outcomes; runs no candidate code and no test
      judge   (1 a worker) holds the tests; where they call the code it asks a child, and compares plain values itself
      zygote  (1 a worker) clean interpreter in namespaces of its own; never sees code or a test
        child (1 a sample) forked, behind every other wall; runs the code and answers the judge's questions

All three are in nanorlhf/jail. What is promised and what is not: SECURITY.md. Each wall is tried at start, probed by
code that runs into it, and listed in `Sandbox.layers`, as `python -m nanorlhf.sandbox` does.
"""

import argparse
import ast
import hashlib
import json
import logging
import queue
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from nanorlhf.errors import InputError
from nanorlhf.jail.judge import GRACE
from nanorlhf.jail.values import MAX_BYTES, decode, encode, receive, same, send
from nanorlhf.jail.walls import LAYERS, Off

__all__ = ["Outcome", "Sandbox", "decode", "encode", "same"]

MODES = ("auto", "require", "weak", "off")
MAX_CACHED, MAX_LENGTH = 200_000, 2000  # verdicts; characters of one


@dataclass(frozen=True)
class Outcome:
    """What came of a sample.

    passed: every test went through (`check`), or a value came back (`evaluate`).
    status: "ok", "failed" (a test's assertion), "error" (an exception in the code or a test, or a value that is none),
        "timeout", "memory", or "crashed" (the code ended its process).
    seconds: wall time. detail: the failing test or the error, printable, about 300 characters at most. value: of `evaluate`.
    """

    passed: bool
    status: str
    seconds: float
    detail: str = ""
    value: object = None


class _Worker:
    """One judge and its zygote."""

    def __init__(self, config):
        self.config, self.layers = config, {}
        self.start()

    def start(self):
        """RuntimeError if the processes do not come up, or not with all layers that they came up with before."""
        self.ends, self.processes = [], []
        try:
            (self.sock, jobs), (_, life), (orders, control) = pairs = [socket.socketpair() for _ in range(3)]
            self.file = self.sock.makefile("rb")
            self.ends = [self.file, *(end for pair in pairs for end in pair)]
            self.launch("judge", jobs, life, orders)
            self.launch("zygote", control)
            found = self.probe()
            for name in self.layers:
                if self.layers[name] and not found[name]:
                    raise RuntimeError(f"the sandbox was started anew, and has lost its layer {name} ({found[name][5:]})")
            self.layers = self.layers or found
        except BaseException as error:
            self.stop()
            if isinstance(error, (EOFError, OSError)):
                raise RuntimeError(f"the sandbox can start no process: {str(error) or 'what it said is on stderr'}") from None
            raise

    def launch(self, role, *ends):
        """Flags: no site-packages, no folder of ours on the path. Environment: only what makes runs repeatable. Signals that the
        trainer blocks or ignores would be so there too, and with them the time limit and the end with the trainer."""
        numbers = [end.fileno() for end in ends]
        start = ("import signal, sys; signal.pthread_sigmask(signal.SIG_SETMASK, ()); "
                 "[signal.signal(each, signal.SIG_DFL) for each in (signal.SIGCHLD, signal.SIGIO)]; "
                 f"sys.path.append({str(Path(__file__).parent)!r}); import jail.{role}; sys.path.pop(); "
                 f"jail.{role}.main({self.config!r}, *{numbers!r})")
        self.processes.append(subprocess.Popen(
            [sys.executable, "-s", "-S", "-P", "-B", "-c", start], pass_fds=numbers, cwd="/", start_new_session=True,
            env={"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL))
        for end in ends:
            end.close()

    def probe(self):
        """{layer: state}, as the processes say; but no layer's word is taken where code can try what it forbids."""
        self.sock.settimeout(60)
        layers = {name: Off(state) if str(state).startswith("off: ") else state for name, state in receive(self.file).items()}
        send(self.sock, {"code": PROBE, "setup": "", "expression": "found", "timeout": 30})  # the user's may be short
        said = receive(self.file)
        if said["status"] != "ok":
            raise RuntimeError(f"the sandbox could not run its probe: {said['detail'] or said['status']}")
        for name in decode(said["value"]):
            layers[name] = layers[name] and Off("off: it was put up, but the probe went through it")
        return layers

    def run(self, job):
        """What the judge says of a job; twice where no child came to be for it, for then the code did not run."""
        for _ in range(2):
            if not self.processes or self.processes[0].poll() is not None:  # stopped below, or killed while idle
                self.stop()
                self.start()
            begin = time.perf_counter()
            try:
                self.sock.settimeout(self.config["timeout"] + 2 * GRACE)
                send(self.sock, job)
                said = receive(self.file)
            except (EOFError, OSError, ValueError) as error:  # a test that computes for ever, or ended the judge; or Ctrl-C
                said = {"status": "timeout" if isinstance(error, TimeoutError) else "crashed", "value": None,
                        "seconds": time.perf_counter() - begin, "detail": "the judge did not answer"}
                self.stop()
            if said["status"] != "broken":
                return said
            self.stop()
        raise RuntimeError(f"the sandbox can start no process for a sample ({said['detail']}); is the machine out of memory "
                           "or processes?")

    def stop(self):
        """Without its judge the zygote ends its children and then itself."""
        for end in self.ends:
            end.close()
        for judge in self.processes[:1]:
            judge.kill()  # losing the lifeline does not do it where a fork of the trainer holds it too
        for process in self.processes:
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Sandbox:
    """Runs generated code on tests or for values; a context manager.

        with Sandbox() as box:
            box.check("def f(x): return x + 1", tests=["assert f(1) == 2"], entry_point="f").passed

    Args:
        timeout: seconds of wall time for one sample, all its tests together.
        memory_mb: address space that one sample may add.
        workers: samples that run at once.
        mode: "auto" runs where seccomp holds, whatever else is missing; "require" only with every layer of `REQUIRED`;
            "weak" with any (macOS: time and memory limits only); "off" runs nothing.
        without: names of layers to leave out, for tests of the others; needs "weak" to leave out seccomp.
    """

    LAYERS = LAYERS  # all that are tried, in order
    REQUIRED = ("seccomp", "no_new_privs", "net_namespace", "ipc_namespace", "pid_namespace", "own_user", "undumpable",
                "rlimits")  # and one of landlock and chroot

    def __init__(self, timeout=1.0, memory_mb=256, workers=2, mode="auto", without=()):
        if mode not in MODES:
            raise InputError(f"sandbox mode {mode!r}: choose one of {', '.join(MODES)}")
        for name, value, least, most in (("timeout", timeout, 0.01, 86_400), ("memory_mb", memory_mb, 16, 1 << 20),
                                         ("workers", workers, 1, 1024)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
                raise InputError(f"{name} must be a number from {least} to {most}, not {value!r}")
        if workers != int(workers):
            raise InputError(f"workers must be a whole number, not {workers!r}")
        if not isinstance(without, (list, tuple)) or any(name not in LAYERS for name in without):
            raise InputError(f"without must be a list of layers, not {without!r}; there are {', '.join(LAYERS)}")
        self.mode, self.layers, self.workers, self.idle, self.cache = mode, {}, [], queue.SimpleQueue(), {}
        if mode == "off":
            return
        config = {"timeout": float(timeout), "memory_mb": int(memory_mb), "without": list(without)}
        try:
            for _ in range(int(workers)):
                worker = _Worker(config)
                self.workers.append(worker)
                self.idle.put(worker)
                self.layers = worker.layers | {name: state for name, state in self.layers.items() if not state}
            self._admit()
        except BaseException:
            self.close()
            raise

    def _admit(self):
        """Refuse to start with less than the mode asks for."""
        missing = [f"{name} ({self.layers[name][5:]})" for name in self.REQUIRED if not self.layers[name]]
        if not (self.layers["landlock"] or self.layers["chroot"]):
            missing.append(f"landlock or chroot ({self.layers['landlock'][5:]}; {self.layers['chroot'][5:]})")
        needed = {"require": missing, "auto": [each for each in missing if each.startswith("seccomp ")], "weak": []}[self.mode]
        if needed:
            raise InputError(f"sandbox mode {self.mode!r} will not run code here: missing {'; '.join(needed)}; "
                             "mode 'weak' runs with what there is")
        if missing:
            logging.getLogger(__name__).warning("sandbox runs without %s", "; ".join(missing))

    def check(self, code, tests, entry_point=None):
        """Whether the code passes all tests.

        Args:
            code: the candidate's source, run as a module.
            tests: sources with assertions; they run in the judge, where `entry_point` is a stub that asks the child.
                Arguments cross by value, so that a change of an argument is not seen.
            entry_point: the name, or a list of names, that tests may use from the code. None: all that nothing else has.
        Raises InputError if a test does not parse; never for anything in the code.
        """
        return self.check_many([{"code": code, "tests": tests, "entry_point": entry_point}])[0]

    def evaluate(self, code, setup="", expression=None):
        """Run setup, code, and the expression (None: the code's last line), in the child -> Outcome with `value`."""
        return self.check_many([{"code": code, "setup": setup, "expression": expression}])[0]

    def check_many(self, jobs):
        """Outcomes of jobs, in order. A job is a dict of the arguments of `check` or `evaluate`, or a tuple."""
        if not isinstance(jobs, (list, tuple)):
            raise InputError(f"jobs must be a list, not {type(jobs).__name__}")
        jobs = [_prepare(job) for job in jobs]
        self._check_open()
        with ThreadPoolExecutor(len(self.workers)) as pool:
            try:
                return list(pool.map(self._run, jobs))
            except BaseException:  # Ctrl-C: wait for no sample
                pool.shutdown(wait=False, cancel_futures=True)
                for process in [process for worker in self.workers for process in worker.processes]:
                    process.kill()
                raise

    def _run(self, job):
        """From the cache or a worker. Only what the code itself brought about is kept, no time-out or crash."""
        if len(job["code"]) > MAX_BYTES:
            return Outcome(False, "error", 0.0, f"the source has more than {MAX_BYTES} characters")
        key = hashlib.sha256(json.dumps(job).encode()).hexdigest()
        text = self.cache.get(key)
        if text is None:
            worker = self.idle.get()
            try:
                self._check_open()
                text = json.dumps(said := worker.run(job))
            finally:
                self.idle.put(worker)
            if said["status"] in ("ok", "failed", "error") and len(self.cache) < MAX_CACHED and len(text) <= MAX_LENGTH:
                self.cache[key] = text  # which takes less room than what it says
        said = json.loads(text)
        return Outcome(said["status"] == "ok", said["status"], said["seconds"], said["detail"], decode(said["value"]))

    def _check_open(self):
        if not self.workers:
            raise InputError("the sandbox is off or closed: no code is run")

    def close(self):
        workers, self.workers = self.workers, []  # first: a job that another thread has sent starts none of them anew
        for worker in workers:
            worker.stop()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _prepare(job):
    """The job as the judge wants it; InputError for what a user must mend."""
    if isinstance(job, (tuple, list)) and len(job) in (2, 3):
        job = dict(zip(("code", "tests", "entry_point"), job))
    if not isinstance(job, dict):
        raise InputError("a job is a dict, or a tuple (code, tests) or (code, tests, entry_point)")
    known = ("code", "tests", "entry_point") if "tests" in job else ("code", "setup", "expression")
    for name in job:
        if name not in known:
            raise InputError(f"a job has {name!r}: beside code it has tests and entry_point, or setup and expression")
    for name, kind in (("code", str), ("setup", str | None), ("expression", str | None)):
        if not isinstance(job.get(name), kind):
            raise InputError(f"a job's {name} must be text, not {type(job.get(name)).__name__}")
    if "tests" not in job:
        return {"code": job["code"], "setup": job.get("setup") or "", "expression": job.get("expression")}
    tests = _texts(job["tests"], "tests")
    if not tests:
        raise InputError("no tests: a check without one would pass anything")
    for number, test in enumerate(tests):
        try:
            statements = ast.parse(test, f"test {number}").body
            compile(test, f"test {number}", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise InputError(f"test {number} does not parse: {str(error) or 'it is too deep'}") from None
        if not statements:
            raise InputError(f"the test {test!r} holds no statement: it would pass anything")
    entries = None if job.get("entry_point") is None else _texts(job["entry_point"], "entry_point")
    if entries is not None and not (entries and all(entry.isidentifier() for entry in entries)):
        raise InputError(f"a job's entry_point must be a name or a list of names, not {job['entry_point']!r}")
    return {"code": job["code"], "tests": tests, "entries": entries}


def _texts(value, name):
    """A text or a list of texts as a list."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"a job's {name} must be text or a list of texts")
    return list(texts)


# Names the layers that do not hold.
PROBE = """
import os, resource, socket
found = []
for layer, passes in {"seccomp": socket.socket,
                      "landlock": lambda: os.listdir("/"),
                      "chroot": lambda: os.listdir("/"),
                      "own_user": lambda: os.getuid() == 0,
                      "pid_namespace": lambda: os.getppid() != 1,
                      "rlimits": lambda: resource.getrlimit(resource.RLIMIT_CORE)[1] != 0}.items():
    try:
        if passes():
            found.append(layer)
    except OSError:
        pass
"""


def main():
    """Print the layers of this machine; exit code 2 where the mode asked for would not start."""
    parser = argparse.ArgumentParser(prog="python -m nanorlhf.sandbox", description="The walls that this machine has for generated code.")
    parser.add_argument("--mode", choices=MODES[:3], default="weak", help="exit with 2, and say what is missing, if this mode would not start")
    try:
        with Sandbox(mode=parser.parse_args().mode) as box:
            for name, state in box.layers.items():
                print(f"{name:16} {'on' if state is True else state}")
    except InputError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
