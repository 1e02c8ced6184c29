"""Values that cross between processes: a bounded encoding of plain builtins, strict equality, and lines on a socket.

Never pickle: what is read from the code's process is JSON of a few known forms, and becomes an exact builtin or an error.
"""

import json

MAX_BYTES, MAX_DEPTH, MAX_ITEMS = 1 << 20, 50, 100_000  # of one value; the first also of one source

# What an instance of a builtin, or of a subclass of one, is by the builtin's own methods.
ONE = {int: int.__pos__, float: float.__pos__, complex: complex.__pos__, str: str.__str__,
       bytes: lambda value: b"".join([value])}
MANY = {list: list.__iter__, tuple: tuple.__iter__, set: set.__iter__, frozenset: frozenset.__iter__, dict: dict.items}
WRITE = {int: hex, bytes: bytes.hex, complex: lambda value: [value.real, value.imag]}  # base 16: no 4300-digit limit
BUILTIN = {kind.__name__: kind for kind in MANY}
READ = {"int": lambda body: int(body, 16), "bytes": bytes.fromhex, "complex": lambda body: complex(*map(float, body))}


def encode(value, keep=None):
    """A value as JSON: plain builtins by value; their subclasses (Counter, namedtuple, IntEnum ...) as the builtin that
    they extend; anything else through `keep(value) -> number`, or TypeError. ValueError if too deep or too large."""
    room = [MAX_ITEMS]

    def form(value, depth):
        """The JSON of a value at this depth; `room` counts the items of all depths."""
        kind = type(value)
        room[0] -= 1
        if depth > MAX_DEPTH or room[0] < 0:
            raise ValueError("the value is too deep, cyclic or too large")
        if value is None or kind in (bool, float, str) or kind is int and -1 << 63 <= value < 1 << 63:
            return value
        if kind in WRITE:
            return {kind.__name__: WRITE[kind](value)}
        if kind is dict:
            return {"dict": [[form(k, depth + 1), form(v, depth + 1)] for k, v in value.items()]}
        if kind in MANY:
            items = [form(v, depth + 1) for v in value]
            return items if kind is list else {kind.__name__: items}
        for base in kind.__mro__[1:]:
            if base in ONE:
                return form(ONE[base](value), depth)
            if base in MANY:
                return form(base(MANY[base](value)), depth)
        if keep is None:
            raise TypeError(f"a value of type {kind.__name__} cannot cross: only plain builtins can")
        return {"kept": [keep(value), kind.__name__]}

    return form(value, 0)


def decode(form, kept=None, depth=0):
    """Inverse of `encode`: exact builtins, and `kept(number, type name)` for what stayed behind. An Exception if it is none."""
    def inner(form):
        return decode(form, kept, depth + 1)

    if depth > MAX_DEPTH:
        raise ValueError("the value is too deep")
    if type(form) is list:
        return [inner(each) for each in form]
    if type(form) is not dict:
        return form
    (kind, body), = form.items()
    if kind == "kept" and kept:
        return kept(int(body[0]), str(body[1]))
    if kind == "dict":
        return {inner(k): inner(v) for k, v in body}
    return READ[kind](body) if kind in READ else BUILTIN[kind](map(inner, body))


def _strict(value):
    """A form in which == tells bool from number at any depth."""
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return kind(map(_strict, value))
    if isinstance(value, dict):
        return {_strict(k): _strict(v) for k, v in value.items()}
    return (bool, value) if type(value) is bool else value


def same(a, b):
    """Whether a value is the expected one: Python's ==, but True is not 1 at any depth. As in Python, 1 == 1.0, a
    list is not a tuple, and NaN equals nothing."""
    return bool(_strict(a) == _strict(b))


def send(sock, message):
    sock.sendall(json.dumps(message).encode() + b"\n")


def receive(file, limit=-1):
    """One message from the other side, read from its socket's `makefile("rb")`. EOFError at its end, ValueError if it is none."""
    line = file.readline(limit)
    if len(line) == limit:
        raise ValueError("the message is too long")
    if not line.endswith(b"\n"):
        raise EOFError
    return json.loads(line)
