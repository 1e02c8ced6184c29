"""The judge: holds the tests. Where they call the code it asks the child, and compares plain values itself.

A child says values, never verdicts: whatever it writes to its one descriptor is read as the answer to a question, and
no expected value ever enters it, so to forge an answer is to guess it. Only the walk through every test is a pass.
"""

import builtins
import fcntl
import gc
import importlib
import itertools
import marshal
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
import types

from . import walls
from .values import MAX_BYTES, decode, encode, receive, send

GRACE = 2.0  # seconds to start a child, and seconds beyond the time limit after which the trainer takes the judge itself for stuck
SIGNALS = {each.value: each.name for each in signal.Signals}


class Stop(BaseException):
    """The sample is over (time, a dead child, an answer that is none); no test can catch it into a pass: `_judge`."""

    def __init__(self, status, detail):
        super().__init__(status, detail)


class Session:
    """Questions to one child."""

    def __init__(self, sock):
        self.sock, self.stopped = sock, None

    def stop(self, status, detail):
        self.stopped = self.stopped or Stop(status, detail)
        raise self.stopped

    def ask(self, question, *args, keywords={}, plain=False):
        """The value of one question. What the code raised is raised here as the nearest builtin Exception."""
        if self.stopped:
            raise self.stopped
        request = {"ask": question, "args": encode((args, keywords), self.number), "plain": plain}
        try:
            send(self.sock, request)
            reply = receive(self.sock, MAX_BYTES)
            if "raised" not in reply:
                return decode(reply["value"], None if plain else lambda number, name: Remote(self, number, name))
            names, text = [str(name) for name in reply["raised"]], str(reply["text"])
        except (EOFError, OSError):
            self.stop("crashed", "the code ended its process")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            self.stop("error", f"no value came back: {error}")
        if question != "next" and "StopIteration" in names:  # it would end the test's own loop, untested
            names = ["RuntimeError"]
        kinds = [getattr(builtins, name, None) for name in names if name not in ("ExceptionGroup", "Exception")]
        kind = next((k for k in kinds if isinstance(k, type) and issubclass(k, Exception)), Exception)
        error = kind.__new__(kind, text)  # not called: UnicodeDecodeError wants five arguments
        error.said = f"{names[0] if names else 'error'}: {text}"
        raise error

    def number(self, value):
        """The child's number of what is no plain value: it is there already, or a test's function, made anew there."""
        if isinstance(value, types.FunctionType) and not value.__closure__:
            value = self.ask("function", marshal.dumps(value.__code__), value.__defaults__, value.__kwdefaults__)
        if not isinstance(value, Remote):
            raise TypeError(f"a test gives the code a value of type {type(value).__name__}: only plain builtins can cross")
        return value._remote[1]


class Remote:
    """What stayed in the child, since it is not a plain value: a function, an instance, an iterator. Each use is a
    question. It equals nothing but itself, whatever its own __eq__ says."""

    def __init__(self, session, number, name):
        object.__setattr__(self, "_remote", (session, number, name))

    def __call__(self, /, *args, **kwargs):
        return self._remote[0].ask("call", self, *args, keywords=kwargs)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._remote[0].ask("getattr", self, name)

    def __repr__(self):
        return f"<{self._remote[2]} in the sandbox>"


for _name in ("setattr", "delattr", "getitem", "setitem", "delitem", "iter", "next", "len", "bool", "str", "int", "float"):
    setattr(Remote, f"__{_name}__", lambda self, *args, _name=_name: self._remote[0].ask(_name, self, *args))


class _Names(dict):
    """The names of tests: their own; the entry points; Python's; the standard library's modules, imported or not; and
    without entry points whatever the code has."""

    def __init__(self, session, entries):
        super().__init__({entry: session.ask("name", entry) for entry in entries or ()}, __name__="tests")
        self.session, self.all = session, entries is None

    def __missing__(self, name):
        if name in sys.stdlib_module_names:
            return self.setdefault(name, importlib.import_module(name))
        if hasattr(builtins, name) or not self.all:
            raise KeyError(name)  # Python looks among its own next
        return self.setdefault(name, self.session.ask("name", name))


def _walk_tests(session, job):
    """Run every test against the code; an exception ends it."""
    session.ask("load", job["code"])
    names = _Names(session, job["entries"])
    for number, test in enumerate(job["tests"]):
        try:
            exec(compile(test, f"<test {number}>", "exec", dont_inherit=True), names)
        except AssertionError as error:
            if hasattr(error, "said"):
                raise
            raise Stop("failed", f"test {number}: {test}") from None


def _value(session, job):
    """The encoded value of the expression, or of the code's last line."""
    if job["setup"]:
        session.ask("load", job["setup"])
    if job["expression"] is not None:
        session.ask("load", job["code"])
    return encode(session.ask("run", job["code"] if job["expression"] is None else job["expression"], plain=True))


def _judge(session, job, timeout):
    """One job on a fresh child -> (status, detail, value). "ok" only at the end of all tests, with nothing amiss."""
    def late(*_):
        session.stop("timeout", f"over {timeout:g} s")

    signal.signal(signal.SIGALRM, late)
    value = None
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, timeout, GRACE / 4)  # again and again, should a test catch it
            value = _walk_tests(session, job) if "tests" in job else _value(session, job)
            status, detail = "ok", ""
        except Exception as error:  # a test may raise anything at all, and so may the code
            status = "memory" if isinstance(error, MemoryError) else "error"
            detail = getattr(error, "said", f"{type(error).__name__}: {error}")
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Stop as stop:
        status, detail = stop.args
    except (SystemExit, KeyboardInterrupt, GeneratorExit):
        status, detail = "error", "a test ended itself"
    signal.setitimer(signal.ITIMER_REAL, 0)
    if session.stopped:  # whatever a test made of it
        status, detail = session.stopped.args
    return status, "".join(c if c.isprintable() else " " for c in detail[:300]), value if status == "ok" else None


class Zygote:
    """One of the judge's, mostly two: while a child of one is at work, the other clears up and has its next one ready."""

    def __init__(self, control):
        self.control, self.near, self.due = control, None, False
        self.next()

    def next(self):
        """End the child, and have the next one started."""
        if self.due:  # of the child before
            self.code()
        if self.near:
            self.near.close()
            self.due = True
        self.near, far = socket.socketpair()
        with far:
            socket.send_fds(self.control, [b"n"], [far.fileno()])

    def code(self):
        """The exit code of the last child that was ended."""
        said = self.control.recv(4)
        if not said:
            raise EOFError  # the zygote is gone
        self.due = False
        return struct.unpack("i", said)[0]

    def child(self):
        """A socket to the child, ready behind its walls; OSError, EOFError or ValueError if none came to be."""
        self.near.settimeout(GRACE)
        if receive(self.near, 100) != "ready":
            raise ValueError("not a child")
        self.near.settimeout(None)
        if select.select([self.near], [], [], 0)[0]:
            raise EOFError  # it was ready long ago, and has been killed since
        return self.near


def _sample(zygote, job, timeout):
    """One job on a fresh child -> what the trainer is told. "broken": no child came to be, so the code did not run."""
    begin = time.perf_counter()
    try:
        near = zygote.child()
    except (EOFError, OSError, ValueError):
        return {"status": "broken"}
    status, detail, value = _judge(Session(near), job, timeout)
    zygote.next()
    if status == "crashed":
        code = zygote.code()
        detail += f" ({SIGNALS.get(-code, -code) if code < 0 else f'exit code {code}'})" if code else ""
    return {"status": status, "detail": detail, "seconds": time.perf_counter() - begin, "value": value}


def _walls(config, layers):
    """The judge needs no file and no network either: a test is data as well. What is off here is off in `layers`."""
    own = walls.Layers(config["without"])
    if walls.LINUX:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    own.wall("no_new_privs", walls.call, "prctl", 38, 1, 0, 0, 0)
    own.wall("undumpable", walls.call, "prctl", 4, 0, 0, 0, 0)
    own.wall("landlock", lambda: walls.enter_landlock(walls.landlock_rules(walls.libraries())[0]))
    if on(layers["seccomp"]):  # with sendmsg and recvmsg, to hand over descriptors
        own.wall("seccomp", lambda: walls.install_seccomp(walls.seccomp_program(extra=((46, 211), (47, 212)))))
    for name, state in own.items():
        if not state and on(layers[name]):
            layers[name] = f"off: in the judge: {state[5:]}"


def on(state):
    """Whether a layer is on, by what the zygote sent: JSON has no `Off`."""
    return not str(state).startswith("off: ")


def main(config, trainer, lifeline, *controls):
    """Serve the trainer until it goes away. Nothing is ever sent on the lifeline: the one thing that can happen to it is
    that the trainer ends, and then the kernel ends this process too (SIGIO), whatever a test is busy with."""
    trainer, controls = socket.socket(fileno=trainer), [socket.socket(fileno=control) for control in controls]
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC)
    try:
        layers, *others = [receive(control) for control in controls]
        layers |= {name: state for other in others for name, state in other.items() if not on(state)}
        _walls(config, layers)
        send(trainer, layers)
        gc.freeze()
        for zygote in itertools.cycle([Zygote(control) for control in controls]):
            job = receive(trainer)
            send(trainer, _sample(zygote, job, job.get("timeout", config["timeout"])))
            gc.collect()  # what a test has made must not count against the memory of the next
    except (EOFError, ConnectionError):  # the trainer is gone; or the zygote, and it has said why
        os._exit(0)
