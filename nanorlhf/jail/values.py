"""Values that cross between processes: a bounded encoding of plain builtins, strict equality, and frames on a socket.

Never pickle: what is read from the code's process is JSON of a few known forms, and becomes an exact builtin or a
ValueError.
"""

import builtins
import json
import struct

MAX_BYTES, MAX_DEPTH, MAX_ITEMS = 1 << 20, 50, 100_000  # of one value; the first also of one source

ONE = {int: int.__pos__, float: float.__pos__, complex: complex.__pos__, str: str.__str__,
       bytes: lambda value: b"".join([value])}  # the plain value of a subclass's instance
MANY = {list: list.__iter__, tuple: tuple.__iter__, set: set.__iter__, frozenset: frozenset.__iter__, dict: dict.items}


def encode(value, keep=None):
    """A value as JSON: plain builtins by value; their subclasses (Counter, namedtuple, IntEnum ...) as the builtin that
    they extend; anything else through `keep(value) -> number`, or TypeError. ValueError if too deep or too large."""
    room = [MAX_ITEMS]

    def form(value, depth):
        kind = type(value)
        room[0] -= 1
        if depth > MAX_DEPTH or room[0] < 0:
            raise ValueError("the value is too deep, cyclic or too large")
        if value is None or kind is bool or kind is float or kind is str or kind is int and -1 << 63 <= value < 1 << 63:
            return value
        if kind is int:
            return {"int": hex(value)}  # no 4300-digit limit in base 16
        if kind is complex:
            return {"complex": [value.real, value.imag]}
        if kind is bytes:
            return {"bytes": value.hex()}
        if kind is dict:
            return {"dict": [[form(k, depth + 1), form(v, depth + 1)] for k, v in value.items()]}
        if kind is list:
            return [form(v, depth + 1) for v in value]
        if kind in MANY:
            return {kind.__name__: [form(v, depth + 1) for v in value]}
        for base in kind.__mro__[1:]:
            if base in ONE:
                return form(ONE[base](value), depth)
            if base in MANY:
                return form(base(MANY[base](value)), depth)
        if keep is None:
            raise TypeError(f"a value of type {kind.__name__} cannot cross: only plain builtins can")
        return {"kept": [keep(value), kind.__name__]}

    return form(value, 0)


def decode(form, kept=None):
    """Inverse of `encode`: exact builtins only, and `kept(number, type name)` for what stayed behind; or ValueError."""
    try:
        return _decode(form, kept, 0)
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"not a value: {error}") from None


def _decode(form, kept, depth):
    def inner(forms):
        return [_decode(each, kept, depth + 1) for each in forms]

    if depth > MAX_DEPTH:
        raise ValueError("the value is too deep")
    if type(form) is list:
        return inner(form)
    if type(form) is not dict:
        return form
    (kind, body), = form.items()
    if kind in ("tuple", "set", "frozenset"):
        return getattr(builtins, kind)(inner(body))
    if kind == "dict":
        return {_decode(k, kept, depth + 1): _decode(v, kept, depth + 1) for k, v in body}
    if kind == "int":
        return int(body, 16)
    if kind == "bytes":
        return bytes.fromhex(body)
    if kind == "complex":
        return complex(float(body[0]), float(body[1]))
    if kind == "kept" and kept:
        return kept(int(body[0]), str(body[1]))
    raise ValueError(f"not a value: {kind[:20]!r}")


def _strict(value):
    """A form in which == tells bool from number at any depth."""
    if type(value) is bool:
        return (bool, value)
    if isinstance(value, list):
        return [_strict(each) for each in value]
    if isinstance(value, tuple):
        return (tuple, *map(_strict, value))
    if isinstance(value, (set, frozenset)):
        return frozenset(map(_strict, value))
    if isinstance(value, dict):
        return {_strict(k): _strict(v) for k, v in value.items()}
    return value


def same(a, b):
    """Whether a value is the expected one: Python's ==, but True is not 1 at any depth. As in Python, 1 == 1.0, a
    list is not a tuple, and NaN equals nothing."""
    return bool(_strict(a) == _strict(b))


def send(sock, message):
    data = json.dumps(message).encode()
    sock.sendall(struct.pack("<I", len(data)) + data)


def receive(sock, limit=1 << 30):
    """One frame from the other side. EOFError at its end, ValueError if it is not a frame within the limit."""
    def exactly(n):
        data = bytearray()
        while len(data) < n:
            part = sock.recv(min(n - len(data), 1 << 16))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    size, = struct.unpack("<I", exactly(4))
    if size > limit:
        raise ValueError(f"a frame of {size} bytes is over the limit of {limit}")
    return json.loads(exactly(size))
