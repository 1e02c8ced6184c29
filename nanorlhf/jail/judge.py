"""The judge: holds the tests. Where they call the code it asks the child, and compares plain values itself.

A child says values, never verdicts: whatever it writes to its one descriptor is read as the answer to a question, and
no expected value ever enters it, so to forge an answer is to guess it. Only the walk through every test is a pass.
"""

import builtins
import fcntl
import gc
import importlib
import marshal
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
import types

from . import walls
from .values import MAX_BYTES, decode, encode, receive, send

GRACE = 2.0  # seconds to start a child; twice as many beyond the time limit, and the trainer takes the judge for stuck
SIGNALS = {each.value: each.name for each in signal.Signals}


class Stop(BaseException):
    """The sample is over: time, a dead child, an answer that is none. A test that catches it changes nothing (`_judge`)."""


class Session:
    """Questions to one child."""

    def __init__(self, sock, file):
        self.sock, self.file, self.stopped = sock, file, None
        self.turn = threading.Lock()  # a test may ask from threads of its own
        self.asked, self.note = 0, ""  # questions; what to say of a test that fails

    def stop(self, status, detail):
        self.stopped = self.stopped or Stop(status, detail)
        raise self.stopped

    def ask(self, question, /, *args, **keywords):
        """The value of one question. What the code raised is raised here as the nearest builtin Exception."""
        if self.stopped:
            raise self.stopped
        self.asked += 1
        request = question, encode((args, keywords), self.number)
        try:
            with self.turn:
                send(self.sock, request)
                reply = receive(self.file, MAX_BYTES)
            if "raised" not in reply:
                return decode(reply["value"], lambda number, name: Remote(self, number, name))
            names, text = [str(name) for name in reply["raised"]], str(reply["text"])
        except (EOFError, OSError):
            self.stop("crashed", "the code ended its process")
        except MemoryError:
            self.stop("memory", "the judge has no memory for an answer")
        except Exception as error:
            self.stop("error", f"no value came back: {error}")
        if question != "next" and "StopIteration" in names:  # it would end the test's own loop, untested
            names = ["RuntimeError"]
        kinds = [getattr(builtins, name, None) for name in names if name != "ExceptionGroup"]  # which wants its parts
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


def _told(name):
    """What Python would answer from `Remote`, and not from the code's. `staticmethod(f)` reads it too, so it asks nothing yet."""
    def told(self):
        self._remote[0].asked -= 1
        return self._remote[0].ask("getattr", self, name)
    return property(told)


class Remote:
    """What stayed in the child, since it is not a plain value: a function, an instance, an iterator. Each use is a
    question. It equals nothing but itself, whatever its own __eq__ says."""

    def __init__(self, session, number, name):
        object.__setattr__(self, "_remote", (session, number, name))

    __doc__, __name__, __dict__ = map(_told, ("__doc__", "__name__", "__dict__"))

    def __call__(self, /, *args, **kwargs):
        return self._remote[0].ask("call", self, *args, **kwargs)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._remote[0].ask("getattr", self, name)

    def __eq__(self, other):
        self._remote[0].note = f" (the code gave a {self._remote[2][:40]}, which is no plain builtin and equals nothing here)"
        return self is other or NotImplemented

    __hash__ = object.__hash__

    def __copy__(self):
        """Another handle would be the same object: `copy` makes one from __dict__, which is the code's."""
        return self

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
        self.plain = {name for name, value in self.items() if name != "__name__" and not isinstance(value, Remote)}

    def __getitem__(self, name):
        self.session.asked += name in self.plain  # an answer that is there already
        return super().__getitem__(name)

    def __missing__(self, name):
        if name in sys.stdlib_module_names:
            return self.setdefault(name, importlib.import_module(name))
        if hasattr(builtins, name) or not self.all:
            raise KeyError(name)  # Python looks among its own next
        value = self.setdefault(name, self.session.ask("name", name))
        self.session.asked -= isinstance(value, Remote)  # to name it is to ask nothing yet, as with entry points
        return value


def _walk_tests(session, job):
    """Run every test against the code; an exception ends it. Tests that never ask it for anything are no pass."""
    session.ask("load", job["code"])
    names = _Names(session, job["entries"])
    loaded = session.asked
    for number, test in enumerate(job["tests"]):
        session.note = ""
        try:
            exec(compile(test, f"<test {number}>", "exec", dont_inherit=True), names)
        except AssertionError as error:
            if hasattr(error, "said"):  # the code's own
                raise
            session.stop("failed", f"test {number}{session.note}: {test}")
    if session.asked == loaded:
        session.stop("error", "the tests never ask the code for anything: a function that is defined must also be called")


def _value(session, job):
    """The encoded value of the expression, or of the code's last line."""
    sources = [job[name] for name in ("setup", "code", "expression") if job[name] is not None]
    return encode(session.ask("run", *sources), _refuse)


def _refuse(value):
    raise TypeError(f"a value of type {value._remote[2]} cannot cross: only plain builtins can")


def _judge(session, job, timeout):
    """One job on a fresh child -> (status, detail, value). "ok" only at the end of all tests, with nothing amiss."""
    signal.signal(signal.SIGALRM, lambda *_: session.stop("timeout", f"over {timeout:g} s"))
    status, detail, value = "ok", "", None
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, timeout, GRACE / 4)  # again and again, should a test catch it
            value = _walk_tests(session, job) if "tests" in job else _value(session, job)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except BaseException as error:  # a test may raise anything at all, and so may the code
        status = "memory" if isinstance(error, MemoryError) else "error"
        detail = getattr(error, "said", f"{type(error).__name__}: {error}")
    if session.stopped:  # whatever a test made of it
        (status, detail), value = session.stopped.args, None
    return status, "".join(c if c.isprintable() else " " for c in detail[:300]), value


class Children:
    """The zygote's: one for this job, and the next, which is forked and walled in meanwhile."""

    def __init__(self, control):
        self.control, self.near = control, []
        self.fork()
        self.fork()
        self.control.recv(2)  # waits for the zygote's start; of the two answers one is always left, to be looked at

    def fork(self):
        near, far = socket.socketpair()
        with far:
            socket.send_fds(self.control, [b"n"], [far.fileno()])
        self.near.append(near)

    def next(self):
        """(socket, file, layers) of the next child, behind its walls; OSError, EOFError or ValueError if none came to be."""
        near = self.near[0]
        near.settimeout(GRACE)
        file = near.makefile("rb")
        layers = receive(file)
        near.settimeout(None)
        if select.select([near], [], [], 0)[0]:
            raise EOFError  # it was ready long ago, and has been killed since
        return near, file, layers

    def end(self):
        """End that child."""
        self.near.pop(0).close()
        self.control.recv(2)
        self.fork()

    def code(self):
        """The exit code of the child that was ended last."""
        return int.from_bytes(self.control.recv(2, socket.MSG_PEEK), "big", signed=True)


def _sample(children, layers, job, timeout):
    """One job on a fresh child -> what the trainer is told. "broken": none came to be with these layers, no code ran."""
    begin = time.perf_counter()
    try:
        near, file, found = children.next()
        if found != layers:
            raise ValueError(f"that has the walls of the first, but one with {found}")
    except (EOFError, OSError, ValueError) as error:
        return {"status": "broken", "detail": f"no child came to be {error}"}
    status, detail, value = _judge(Session(near, file), job, timeout)
    children.end()  # first: a test's thread may still wait at the file, until the child is gone
    file.close()
    if status == "crashed" and (code := children.code()):
        detail += f" ({SIGNALS.get(-code, -code) if code < 0 else f'exit code {code}'})"
    return {"status": status, "detail": detail, "seconds": time.perf_counter() - begin, "value": value}


def _close(without, layers):
    """Walls of its own, since the judge needs no file and no network either: a test is data as well. Returns `layers`, with
    what is off here as off."""
    if walls.LINUX:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    own = walls.Layers(without)
    own.wall("no_new_privs", walls.no_new_privs)
    own.wall("undumpable", walls.undumpable)
    own.wall("landlock", walls.landlock)
    own.wall("seccomp", walls.seccomp, True, ((46, 211), (47, 212)))  # sendmsg and recvmsg, to hand over descriptors
    return layers | {name: f"off: in the judge: {state[5:]}" for name, state in own.items()
                     if not state and not str(layers[name]).startswith("off: ")}


def main(config, trainer, lifeline, control):
    """Serve the trainer until it goes away. Nothing is ever sent on the lifeline: the one thing that can happen to it is
    that the trainer ends, and then the kernel ends this process too (SIGIO), whatever a test is busy with."""
    trainer, control = socket.socket(fileno=trainer), socket.socket(fileno=control)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC)
    jobs = trainer.makefile("rb")
    try:
        children = Children(control)
        layers = children.next()[2]  # what the first says, the others must say too
        children.end()
        send(trainer, _close(config["without"], layers))
        gc.freeze()
        while True:
            job = receive(jobs)
            send(trainer, _sample(children, layers, job, job.get("timeout", config["timeout"])))
            gc.collect()  # what a test has made must not count against the memory of the next
    except (EOFError, ConnectionError):  # the trainer is gone; or the zygote, and it has said why
        os._exit(0)
