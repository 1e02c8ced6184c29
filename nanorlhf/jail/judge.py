"""The judge: holds the tests. Where they call the code it asks the child, and compares plain values itself.

A child says values, never verdicts: whatever it writes to its one descriptor is read as the answer to a question, and
no expected value ever enters it, so to forge an answer is to guess it. Only the walk through every test is a pass.
"""

import ast
import builtins
import fcntl
import importlib
import operator
import os
import resource
import signal
import socket
import struct
import sys
import time

from . import walls
from .values import MAX_BYTES, decode, encode, isin, receive, same, send

GRACE = 2.0  # seconds beyond the time limit after which the trainer takes the judge itself for stuck
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

    def ask(self, question, /, *args, plain=False, **kwargs):
        """The value of one question. What the code raised is raised here as the nearest builtin Exception."""
        if self.stopped:
            raise self.stopped
        request = {"ask": question, "args": encode((args, kwargs), _number), "plain": plain}
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
        kinds = [getattr(builtins, name, None) for name in names if name not in ("ExceptionGroup", "Exception")]
        kind = next((k for k in kinds if isinstance(k, type) and issubclass(k, Exception)), Exception)
        error = kind.__new__(kind, text)  # not called: UnicodeDecodeError wants five arguments
        error.said = f"{names[0] if names else 'error'}: {text}"
        raise error


class Remote:
    """What stayed in the child, since it is not a plain value: a function, an instance, an iterator. Each use is a
    question. It equals nothing but itself, whatever its own __eq__ says."""

    def __init__(self, session, number, name):
        self._remote = session, number, name

    def __call__(self, /, *args, **kwargs):
        return self._remote[0].ask("call", self, *args, **kwargs)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._remote[0].ask("getattr", self, name)

    def __repr__(self):
        return f"<{self._remote[2]} in the sandbox>"


for _name in ("getitem", "iter", "next", "len", "bool", "str", "int", "float"):
    setattr(Remote, f"__{_name}__", lambda self, *args, _name=_name: self._remote[0].ask(_name, self, *args))


def _number(value):
    """How the judge refers to what stayed in the child."""
    if type(value) is not Remote:
        raise TypeError(f"a test gives the code a value of type {type(value).__name__}: only plain builtins can cross")
    return value._remote[1]


COMPARISONS = {"Eq": same, "NotEq": lambda a, b: not same(a, b), "In": isin, "NotIn": lambda a, b: not isin(a, b),
               "Lt": operator.lt, "LtE": operator.le, "Gt": operator.gt, "GtE": operator.ge, "Is": operator.is_,
               "IsNot": operator.is_not}


def _compare(kinds, left, *rights):
    """A comparison in a test; of a chain, `rights` are functions."""
    kinds = kinds.split()
    if len(kinds) == 1:
        return COMPARISONS[kinds[0]](left, rights[0])
    for kind, right in zip(kinds, rights):
        right = right()
        result = COMPARISONS[kind](left, right)
        if not result:
            break
        left = right
    return result


class _Strict(ast.NodeTransformer):
    """In a test, == and `in` become strict, and a lambda given to the code is made in the child."""

    def __init__(self, entries):
        self.entries = entries

    def visit_Compare(self, node):
        self.generic_visit(node)
        kinds = [type(op).__name__ for op in node.ops]
        if not {"Eq", "NotEq", "In", "NotIn"} & set(kinds):
            return node
        rights = node.comparators
        if len(kinds) > 1:  # each operand is evaluated once, and not at all after a false comparison
            nothing = ast.arguments([], [], None, [], [], None, [])
            rights = [ast.Lambda(nothing, right) for right in rights]
        return ast.Call(ast.Name("__compare__", ast.Load()), [ast.Constant(" ".join(kinds)), node.left, *rights], [])

    def visit_Call(self, node):
        if isinstance(node.func, ast.Name) and node.func.id in self.entries:
            node.args = [self.made_there(each) if isinstance(each, ast.Lambda) else each for each in node.args]
        return self.generic_visit(node)

    def made_there(self, node):
        return ast.Call(ast.Name("__run__", ast.Load()), [ast.Constant(ast.unparse(node))], [])


def test_names(tests):
    """(names that the tests read and neither they, Python nor the standard library define; modules among them)."""
    read, bound = set(), set(dir(builtins))
    for node in (node for test in tests for node in ast.walk(ast.parse(test))):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler)) and node.name:
            bound.add(node.name)
    unknown = read - bound
    return unknown - sys.stdlib_module_names, unknown & sys.stdlib_module_names


def _walk_tests(session, job):
    """Run every test against the code; an exception ends it."""
    session.ask("load", job["code"])
    names = {"__name__": "tests", "__compare__": _compare, "__run__": lambda text: session.ask("run", text)}
    names.update({module: importlib.import_module(module) for module in test_names(job["tests"])[1]})
    names.update({entry: session.ask("name", entry) for entry in job["entries"]})
    for number, test in enumerate(job["tests"]):
        tree = ast.fix_missing_locations(_Strict(job["entries"]).visit(ast.parse(test)))
        try:
            exec(compile(tree, f"<test {number}>", "exec"), names)
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


def _watch(trainer, on):
    """While a sample runs, the kernel ends this process (SIGIO) as soon as the trainer is gone, whatever it does."""
    fcntl.fcntl(trainer, fcntl.F_SETFL, os.O_ASYNC if on else 0)
    try:
        if on and not trainer.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
            os._exit(0)  # gone before we looked
    except BlockingIOError:
        pass


def _fresh_child(control):
    """A socket to a new child, ready behind its walls; OSError, EOFError or ValueError if the zygote made none."""
    near, far = socket.socketpair()
    with far:
        socket.send_fds(control, [b"r"], [far.fileno()])
    near.settimeout(GRACE)
    if receive(near, 100) != "ready":
        raise ValueError("not a child")
    near.settimeout(None)
    return near


def _sample(control, job, timeout):
    """One job on a fresh child -> what the trainer is told. "broken": no child came to be, so the code did not run."""
    begin = time.perf_counter()
    try:
        near = _fresh_child(control)
    except (EOFError, OSError, ValueError):
        return {"status": "broken"}
    with near:
        status, detail, value = _judge(Session(near), job, timeout)
        control.send(b"e")
        code = control.recv(4)
    if not code:
        raise EOFError  # the zygote is gone
    code, = struct.unpack("i", code)
    if status == "crashed" and code:
        detail += f" ({SIGNALS.get(-code, -code) if code < 0 else f'exit code {code}'})"
    return {"status": status, "detail": detail, "seconds": time.perf_counter() - begin, "value": value}


def _walls(config, layers):
    """The judge needs no file and no network either: a test is data as well. What is off here is off in `layers`."""
    own = walls.Layers(config["without"])
    if walls.LINUX:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    own.wall("no_new_privs", walls.call, "prctl", 38, 1, 0, 0, 0)
    own.wall("undumpable", walls.call, "prctl", 4, 0, 0, 0, 0)
    own.wall("landlock", walls.enter_landlock, walls.libraries())
    if on(layers["seccomp"]):  # with sendmsg and recvmsg, to hand over descriptors
        own.wall("seccomp", lambda: walls.install_seccomp(walls.seccomp_program(extra=((46, 211), (47, 212)))))
    for name, state in own.items():
        if not state and on(layers[name]):
            layers[name] = f"off: in the judge: {state[5:]}"


def on(state):
    """Whether a layer is on, by what the zygote sent: JSON has no `Off`."""
    return not str(state).startswith("off: ")


def main(trainer, control, config):
    """Serve the trainer until it goes away."""
    trainer, control = socket.socket(fileno=trainer), socket.socket(fileno=control)
    fcntl.fcntl(trainer, fcntl.F_SETOWN, os.getpid())
    try:
        layers = receive(control)
        _walls(config, layers)
        send(trainer, layers)
        while True:
            job = receive(trainer)
            _watch(trainer, True)
            said = _sample(control, job, config["timeout"])
            _watch(trainer, False)
            send(trainer, said)
    except (EOFError, BrokenPipeError):  # the trainer is gone; or the zygote, and it has said why
        os._exit(0)
