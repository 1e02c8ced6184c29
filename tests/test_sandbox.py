"""The sandbox under attack, and at ordinary work.

Each attack defines `f`, and is judged by `assert f(7) == 1234567`. Code that tries to forge a verdict cannot know the number;
code that tries to reach something returns it if it got there. So for every row: a pass is a hole. After each batch honest
code must still pass, and nothing may be left behind. Bombs are bounded by their own loops, in case a wall is missing.

    python -m tests.test_sandbox        # the table of docs/SANDBOX.md: attacks that got through, by user and layers left out
"""

import inspect
import json
import os
import platform
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf import sandbox
from nanorlhf.errors import InputError
from nanorlhf.jail import judge, walls
from nanorlhf.jail.values import receive, send
from nanorlhf.sandbox import Outcome, Sandbox, decode, encode, same

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox's walls need Linux")

OUTSIDE = f"{tempfile.gettempdir()}/nanorlhf_sandbox_{os.getpid()}"  # a folder anyone may write to, with a canary in it
SHARED = f"/dev/shm/nanorlhf_sandbox_{os.getpid()}"
SECRET = 1234567
TEST = f"assert f(7) == {SECRET}"
HONEST = ("def f(x): return x * 2", ["assert f(7) == 14"], "f")


def tries(body):
    """f tries something and returns the secret if no exception stopped it."""
    return "def f(x):\n" + textwrap.indent(textwrap.dedent(body).strip(), "    ") + f"\n    return {SECRET}\n"


def native(number, *args):
    """A raw system call, as a body for `tries`."""
    return f"""
        import ctypes
        lib = ctypes.CDLL(None, use_errno=True)
        lib.syscall.restype = ctypes.c_long
        if lib.syscall({', '.join(map(str, (number, *args)))}) < 0:
            raise OSError(ctypes.get_errno())"""


FORGED = """
import json, os
def frame(message):
    return json.dumps(message).encode() + bytes([10])
"""

ATTACKS = {
    # time
    "endless loop": "def f(x):\n    while True: pass",
    "endless loop at import": "while True: pass",
    "endless loop that eats exceptions": "def f(x):\n    while True:\n        try:\n            while True: pass\n        except BaseException: pass",
    "sleeps for ever": "import time\ndef f(x): time.sleep(1e6)",
    "masked signals": "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\ndef f(x):\n    while True: pass",
    "ignored signals": "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n"
                       "    except Exception: pass\ndef f(x):\n    while True: pass",
    "regex catastrophe": "import re\ndef f(x): return re.match('(a+)+$', 'a' * 60 + 'b')",
    "huge power": "def f(x): return 10 ** 10 ** 10",
    "huge int as text": "import sys\nsys.set_int_max_str_digits(0)\ndef f(x): return len(str(7 ** 10_000_000))",
    "endless generator as value": "def f(x): return iter(int, 1)",
    "deadlock": "import threading\ndef f(x):\n    lock = threading.Lock(); lock.acquire(); lock.acquire()",
    "slow answer, byte by byte": FORGED + "import time\ndef f(x):\n    for b in frame({'value': 1}):\n        os.write(3, bytes([b])); time.sleep(.2)",
    # memory, output, descriptors, processes
    "memory bomb": tries("a = bytearray(400 << 20)"),
    "memory bomb in small pieces": tries("a = []\nfor i in range(400): a.append(bytearray(1 << 20))"),
    "memory map bomb": tries("import mmap\nm = mmap.mmap(-1, 400 << 20)"),
    "string doubling": "def f(x):\n    s = 'a'\n    while len(s) < 1 << 29: s += s\n    return 1234567",
    "output bomb": "def f(x):\n    while True: print('x' * 1_000_000)",
    "verdict on stdout and stderr": "import sys\ndef f(x):\n    print('ok passed 1234567'); sys.stderr.write('ok')\n    return 0",
    "descriptor bomb": tries("import os\nfor i in range(1000): os.dup(0)"),
    "pipe bomb": tries("import os\na = [os.pipe() for i in range(500)]"),
    "fork": tries("import os\nif os.fork() == 0: os._exit(0)"),
    "fork bomb": "import os\ndef f(x):\n    for i in range(20):\n        try: os.fork()\n        except OSError: return 0\n    return 1234567",
    "daemon by double fork": tries("import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(30)\n    os._exit(0)"),
    "subprocess": tries("import subprocess\nsubprocess.run(['/bin/true'], check=True)"),
    "os.system": tries("import os\nassert os.system('true') == 0"),
    "exec": tries("import os\nos.execv('/bin/true', ['true'])"),
    "multiprocessing": tries("import multiprocessing as m\np = m.get_context('fork').Process(target=int); p.start(); p.join()"),
    "posix_spawn": tries("import os\nos.posix_spawn('/bin/true', ['true'], {})"),
    "thread bomb": tries("import threading, time\nthreading.stack_size(65536)\n"
                         "for i in range(300): threading.Thread(target=time.sleep, args=(5,), daemon=True).start()"),
    "vfork by system call": tries(native(58)),
    "clone by system call": tries(native(56, 17, 0, 0, 0, 0)),
    "clone3 by system call": tries(native(435, 0, 0)),
    # other processes
    "kill the parent": tries("import os\nos.kill(os.getppid(), 9)"),
    "kill everyone": tries("import os\nos.kill(-1, 9)"),
    "kill the group": tries("import os\nos.killpg(0, 9)"),
    "stop the parent": tries("import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)"),
    "ptrace": tries(native(101, 16, "__import__('os').getppid()", 0, 0)),
    "process_vm_readv": tries(native(310, "__import__('os').getppid()", 0, 0, 0, 0, 0)),
    "memory of the parent": tries("import os\nopen(f'/proc/{os.getppid()}/mem', 'rb').read(1)"),
    "pidfd_open": tries(native(434, 1, 0)),
    "signal by owning a descriptor": tries("import fcntl, os\nfcntl.fcntl(3, fcntl.F_SETOWN, os.getppid())"),
    "choose that signal": tries("import fcntl\nfcntl.fcntl(3, 10, 9)"),
    "raise its priority": tries("import os\nos.setpriority(os.PRIO_PROCESS, 0, -20)"),
    "other scheduler": tries("import os\nos.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))"),
    # files
    "read /etc/passwd": tries("open('/etc/passwd').read()"),
    "list /": tries("import os\nassert os.listdir('/')"),
    "list the home": tries("import os\nos.listdir('/root')"),
    "environment of the parent": tries("open('/proc/1/environ').read()"),
    "own command line": tries("open('/proc/self/cmdline').read()"),
    "own maps": tries("open('/proc/self/maps').read()"),
    "other processes in /proc": tries("import os\nos.listdir('/proc')"),
    "mounts": tries("open('/proc/mounts').read()"),
    "write to a file": tries(f"open('{OUTSIDE}/broken', 'w')"),
    "write to shared memory": tries(f"open('{SHARED}', 'w')"),
    "temporary file": tries("import tempfile\ntempfile.TemporaryFile()"),
    "append to the standard library": tries("import os\nopen(os.__file__, 'a')"),
    "remove a file": tries(f"import os\nos.remove('{OUTSIDE}/canary')"),
    "change a mode": tries(f"import os\nos.chmod('{OUTSIDE}', 0o700)"),
    "link": tries(f"import os\nos.symlink('/etc', '{OUTSIDE}/broken')"),
    "leave by chdir and ..": tries("import os\nos.chdir('../../../../..'); assert os.listdir('.')"),
    "memfd": tries("import os\nos.memfd_create('x')"),
    "raw open by system call": tries(native(2, "b'/etc/passwd'", 0)),
    "openat2": tries(native(437, -100, "b'/etc/passwd'", "bytes(24)", 24)),
    "raw device": tries("open('/dev/mem', 'rb')"),
    "inherited descriptors": "import os\ndef f(x):\n    for fd in range(4, 1000):\n        try: os.fstat(fd)\n"
                             "        except OSError: continue\n        return 1234567\n    return 0",
    "inherited environment": "import os\ndef f(x): return 1234567 if set(os.environ) - {'PYTHONHASHSEED', 'MALLOC_ARENA_MAX', 'LC_CTYPE'} else 0",
    # the network
    "socket": tries("import socket\nsocket.socket()"),
    "Unix socket": tries("import socket\nsocket.socket(socket.AF_UNIX)"),
    "raw socket": tries("import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)"),
    "netlink": tries("import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)"),
    "download": tries("import urllib.request\nurllib.request.urlopen('http://127.0.0.1:1')"),
    "send to an address over a pair": tries("import socket\na, b = socket.socketpair(type=socket.SOCK_DGRAM)\na.sendto(b'x', '\\0x')"),
    "pass descriptors": tries("import socket\na, b = socket.socketpair()\nsocket.send_fds(a, [b'x'], [0])"),
    # the kernel
    "raise a limit": tries("import resource\nresource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)"),
    "raise a limit of the parent": tries("import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))"),
    "become root": tries("import os\nos.setresuid(0, 0, 0); assert os.getuid() == 0"),
    "is root": "import os\ndef f(x): return 1234567 if os.getuid() == 0 else 0",
    "unshare": tries(native(272, 0x10000000)),
    "mount": tries(native(165, "b'none'", "b'/'", "b'tmpfs'", 0, 0)),
    "chroot": tries("import os\nos.chroot('/')"),
    "io_uring": tries(native(425, 4, "bytes(120)")),
    "bpf": tries(native(321, 5, "bytes(48)", 48)),
    "perf_event_open": tries(native(298, "bytes(112)", 0, -1, -1, 0)),
    "userfaultfd": tries(native(323, 0)),
    "keyring": tries(native(248, "b'user'", "b'k'", "b'v'", 1, -3)),
    "prctl": tries(native(157, 4, 1)),
    "second seccomp filter": tries(native(317, 0, 0, 0)),
    "reboot": tries(native(169, 0, 0, 0)),
    "shared memory, System V": tries(native(29, 0, 4096, 0o1600)),
    "32-bit system call numbers": tries(native(0x40000000 + 39)),
    # ending early
    "os._exit": "import os\nos._exit(0)",
    "os._exit in the call": "import os\ndef f(x): os._exit(0)",
    "sys.exit": "import sys\ndef f(x): sys.exit(0)",
    "sys.exit at import": "import sys\nsys.exit(0)",
    "raises its own pass": "def f(x): raise StopIteration",
    "raises an assertion": "def f(x): raise AssertionError",
    "raises KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "exception with a hostile str": "class E(Exception):\n    def __str__(self): import os; os._exit(0)\ndef f(x): raise E",
    "null pointer": "import ctypes\ndef f(x): ctypes.string_at(0)",
    "abort": "import os\ndef f(x): os.abort()",
    "stack overflow": "import sys\nsys.setrecursionlimit(10 ** 9)\nclass A:\n    def __getattr__(self, n): return getattr(self, n + 'x')\n"
                      "def g(): return repr_(lambda: g())\ndef repr_(h): return [h()].__repr__()\ndef f(x): return g()",
    "writes over a constant": "import ctypes\nctypes.memmove(id(7) + 24, (7654321).to_bytes(4, 'little'), 4)\ndef f(x): return 7",
    # forged verdicts
    "forged verdict": FORGED + "def f(x):\n    os.write(3, frame({'status': 'ok', 'passed': True, 'value': True}))\n    return 0",
    "forged answers in advance": FORGED + "for i in range(20): os.write(3, frame({'value': True}))\ndef f(x): return 0",
    "forged handle": FORGED + "def f(x):\n    os.write(3, frame({'value': {'kept': [0, 'int']}}))\n    return 0",
    "forged text of a frame": FORGED + "def f(x):\n    os.write(3, b'ok passed true' + bytes([10]))\n    return 0",
    "an answer without end": FORGED + "def f(x):\n    while True: os.write(3, b'1' * 100_000)",
    "half an answer": FORGED + "def f(x):\n    os.write(3, frame({'value': 1234567})[:-1])\n    os._exit(0)",
    "nested JSON bomb": FORGED + "def f(x):\n    os.write(3, b'[' * 400000 + bytes([10]))\n    return 0",
    "closes its descriptor": "import os\ndef f(x):\n    os.close(3)\n    return 0",
    "replaces its descriptor": "import os, socket\ndef f(x):\n    a, b = socket.socketpair(); os.dup2(a.fileno(), 3)\n    return 0",
    "patched answer loop": "import sys\nfor m in list(sys.modules.values()):\n    if hasattr(m, 'encode') and hasattr(m, 'decode'):\n"
                           "        m.encode = lambda value, keep=None: True\n        m._number = m.form = lambda a, b=0: True\ndef f(x): return 0",
    "patched json": "import json\njson.dumps = lambda m: '{\"value\": true}'\ndef f(x): return 0",
    "patched builtins": "import builtins\nbuiltins.AssertionError = None\nbuiltins.all = builtins.any = lambda *a: True\ndef f(x): return 0",
    "patched operator module": "import operator\noperator.eq = lambda a, b: True\ndef f(x): return 0",
    "trace function": "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(print)\ndef f(x): return 0",
    "atexit": "import atexit\natexit.register(print, 'ok')\ndef f(x): return 0",
    # hunting the expected value
    "frame hunt": "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
                  "        for v in [*frame.f_locals.values(), *frame.f_globals.values()]:\n"
                  "            if type(v) is int and v > 10**6 and v < 10**7: return v\n"
                  "            if type(v) is str and 'f(7)' in v: return int(v.split()[-1])\n        frame = frame.f_back",
    "gc hunt": "import gc\ndef f(x):\n    for o in gc.get_objects():\n        if type(o) in (tuple, list, dict):\n"
               "            for v in (o.values() if type(o) is dict else o):\n"
               "                if type(v) is int and 1234500 < v < 1234600: return v\n"
               "                if type(v) is str and v.startswith('assert f(7)'): return int(v.split()[-1])",
    "hunt in sys.modules": "import sys\ndef f(x):\n    for m in list(sys.modules.values()):\n        for v in list(vars(m).values()):\n"
                           "            if type(v) is int and 1234500 < v < 1234600: return v",
    "hunt in sys.argv and flags": "import sys\ndef f(x): return next(int(a) for a in sys.orig_argv if '12345' in a)",
    "peeks at the next question": "import os, re\ndef f(x):\n    os.set_blocking(3, False)\n    return int(re.findall(b'[0-9]{7}', os.read(3, 10000))[0])",
    # tricks with values
    "equal to everything": "class E:\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\n    __hash__ = None\ndef f(x): return E()",
    "int subclass equal to everything": "class E(int):\n    def __eq__(self, o): return True\n    __hash__ = int.__hash__\ndef f(x): return E(3)",
    "bool subclass by metaclass": "class M(type):\n    def __instancecheck__(c, o): return True\nclass E(metaclass=M):\n"
                                  "    def __eq__(self, o): return True\ndef f(x): return E",
    "float subclass": "class E(float):\n    def __eq__(self, o): return True\n    __hash__ = float.__hash__\ndef f(x): return E(3)",
    "reflected comparison": "class E(int):\n    def __rxor__(self, o): return 0\n    def __eq__(self, o): return True\n    def __index__(self): return 1234567\n"
                            "    def __pos__(self): return 1\n    __hash__ = None\ndef f(x): return E(3)",
    "lying class attribute": "class E:\n    __class__ = int\n    def __eq__(self, o): return True\ndef f(x): return E()",
    "unittest.mock.ANY": "from unittest import mock\ndef f(x): return mock.ANY",
    "deep list": "def f(x):\n    a = []\n    for i in range(100000): a = [a]\n    return a",
    "cyclic list": "def f(x):\n    a = []; a.append(a)\n    return a",
    "wide and shared": "def f(x):\n    a = [0]\n    for i in range(45): a = [a, a]\n    return a",
    "large value": "def f(x): return 'x' * (50 << 20)",
    "huge int": "def f(x): return 1 << 10 ** 8",
    "NaN": "def f(x): return float('nan')",
    "pickle gadget": "class E:\n    def __reduce__(self): import os; return os.system, ('true',)\ndef f(x): return E()",
    "hash collisions": "def f(x): return {i * (2 ** 61 - 1): 0 for i in range(20000)}",
    "endless iterator": "class E:\n    def __iter__(self): return self\n    def __next__(self): return 1\ndef f(x): return E()",
    "a value that is a test": "def f(x): return 'assert True'",
    "two wrongs by !=": ("class E:\n    def __ne__(self, o): return True\ndef f(x): return E()", "assert not f(7) != 3"),
    "endless list": ("class E:\n    def __iter__(self): return self\n    def __next__(self): return 1\ndef f(x): return E()",
                     "assert list(f(7)) == [1]"),
    "lying length": ("class E:\n    def __len__(self): return 3\n    def __getitem__(self, i): return self\n"
                     "    def __eq__(self, o): return True\ndef f(x): return E()", "assert len(f(7)) == 3 and f(7)[0] == 5"),
    "ends the test's loop": ("def f(x): raise StopIteration", "assert all(map(lambda x: f(x) == 2 * x, range(5)))"),
    "ends the test's zip": ("def f(x): raise StopIteration", "for got, want in zip(map(f, [1, 2]), [2, 4]):\n    assert got == want"),
    "global for a test's function": ("k = 100\ndef f(g): return g(1)", "k = 1\nassert f(lambda v: v + k) == 101"),
    "ends while a test catches all": ("import os\ndef f(x): os._exit(0)", "try:\n    f(7)\nexcept BaseException:\n    pass"),
    "loops while a test catches all": ("def f(x):\n    while True: pass", "while True:\n    try:\n        f(7)\n    except BaseException:\n        break"),
    "no answer while a test catches all": ("def f(x): return 'x' * (2 << 20)", "try:\n    f(7)\nexcept BaseException:\n    pass"),
    "a value that keeps the judge busy": ("def f(x): return 10 ** 4", "assert 7 ** f(7) ** f(7) == 0"),
    "another name for the test's helper": ("def same(a, b): return True\n__same__ = isclose = same\nimport math\nmath.isclose = same\n"
                                           "def f(x): return 0", "assert math.isclose(f(7), 3)"),
    "sort key of the code's choice": ("def f(x): return [3, 1]", "assert sorted(f(7), key=lambda v: v) == [3, 1]"),
    "changes its argument": ("def f(x):\n    x.clear()\n    return []", "xs = [2, 1]\nassert f(xs) == sorted(xs)"),
    # sources
    "null byte": "def f(x): return 0\0",
    "lone surrogate": "def f(x): return '\ud800'\n# \udfff",
    "right-to-left override": "def f(x): return 0 #\u202e 7654321 nruter",
    "nested parentheses": "x = " + "(" * 100_000 + ")" * 100_000,
    "nested blocks": "\n".join(" " * i + "if 1:" for i in range(2000)),
    "long source": "x = 1\n" * 400_000,
    "constant folding bomb": "x = ((((2 ** 64) ** 64) ** 64) ** 64) ** 64\ndef f(x): return 0",
    "coding cookie": "# coding: rot13\nqrs s(k): erghea 1234567",
    "no f": "g = 1234567",
    "f is a value": "f = 1234567",
    "syntax error": "def f(x: return 1234567",
}


# ---- ordinary programs: (code, tests); the entry point is what the tests name

PROGRAMS = {
    "arithmetic": ("def f(a, b): return a + b", ["assert f(1, 2) == 3", "assert f(-1, 1) == 0"]),
    "float": ("def f(a): return a / 2", ["assert f(3) == 1.5", "assert abs(f(1) - 0.5) < 1e-9", "assert f(4) == 2"]),
    "keyword arguments": ("def f(a, *b, c=0, **d): return a + sum(b) + c + sum(d.values())", ["assert f(1, 2, 3, c=4, e=5) == 15"]),
    "string": ("def f(s): return s[::-1].upper()", ["assert f('abc') == 'CBA'"]),
    "unicode": ("def f(s): return s + '\u00e9\u4e2d\U0001f600'", ["assert f('x') == 'x\u00e9\u4e2d\U0001f600'"]),
    "bytes": ("def f(b): return b.hex().encode()", ["assert f(b'\\x00\\xff') == b'00ff'"]),
    "bool": ("def f(n): return n % 2 == 0", ["assert f(2) is True", "assert f(3) == False", "assert not f(5)"]),
    "None": ("def f(x): pass", ["assert f(1) is None"]),
    "complex number": ("def f(x): return x * 1j", ["assert f(2) == 2j"]),
    "big int": ("import math\ndef f(n): return math.factorial(n)", ["import math\nassert f(2000) == math.factorial(2000)"]),
    "NaN comes back": ("def f(): return float('nan')", ["assert f() != f()", "import math\nassert math.isnan(f())"]),
    "infinity": ("def f(): return -float('inf')", ["assert f() == float('-inf')"]),
    "list of lists": ("def f(m): return [list(r) for r in zip(*m)]", ["assert f([[1, 2], [3, 4]]) == [[1, 3], [2, 4]]"]),
    "tuple is not list": ("def f(x): return tuple(x)", ["assert f([1]) == (1,)", "assert f([1]) != [1]"]),
    "set": ("def f(x): return set(x)", ["assert f([1, 1, 2]) == {1, 2}", "assert 2 in f([2])"]),
    "frozenset in a dict": ("def f(x): return {frozenset(x): 1}", ["assert f([1]) == {frozenset([1]): 1}"]),
    "dict": ("def f(a, b): return dict(zip(a, b))", ["assert f(['x'], [1]) == {'x': 1}", "assert f('ab', [1, 2])['b'] == 2"]),
    "Counter": ("import collections\ndef f(s): return collections.Counter(s)", ["assert f('aab') == {'a': 2, 'b': 1}"]),
    "defaultdict": ("from collections import defaultdict\ndef f(s):\n    d = defaultdict(list)\n    for c in s: d[c].append(1)\n    return d",
                    ["assert f('aa') == {'a': [1, 1]}"]),
    "OrderedDict": ("from collections import OrderedDict\ndef f(): return OrderedDict(a=1)", ["assert f() == {'a': 1}"]),
    "namedtuple": ("from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)", ["assert f() == (1, 2)"]),
    "deque in list()": ("from collections import deque\ndef f(): return deque([1, 2])", ["assert list(f()) == [1, 2]"]),
    "generator": ("def f(n):\n    for i in range(n): yield i * i", ["assert list(f(4)) == [0, 1, 4, 9]", "g = f(9)\nassert next(g) == 0\nassert next(g) == 1"]),
    "range": ("def f(n): return range(n)", ["assert sum(f(4)) == 6", "assert len(f(4)) == 4"]),
    "map": ("def f(x): return map(str, x)", ["assert ' '.join(f([1, 2])) == '1 2'"]),
    "class": ("class Stack:\n    def __init__(self): self.items = []\n    def push(self, x): self.items.append(x)\n"
              "    def pop(self): return self.items.pop()\n    def __len__(self): return len(self.items)",
              ["s = Stack()\ns.push(1)\ns.push('a')\nassert len(s) == 2\nassert s.pop() == 'a'\nassert s.items == [1]"]),
    "dataclass": ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n    y: int = 2", ["assert P(1).y == 2", "assert str(P(1)) == 'P(x=1, y=2)'"]),
    "instance as argument": ("class N:\n    def __init__(self, v, n=None): self.v, self.n = v, n\ndef f(n):\n    t = 0\n    while n: t += n.v; n = n.n\n    return t",
                             ["assert f(N(1, N(2))) == 3"]),
    "lambda as argument": ("def f(g, x): return [g(g(v)) for v in x]", ["assert f(lambda v: v + 1, [1]) == [3]"]),
    "test's function as argument": ("def f(g, x): return [g(v) for v in x]",
                                    ["def twice(v, n=2): return n * v\nassert f(twice, [1]) == [2]", "assert f([twice, 0][0], [3]) == [6]"]),
    "True is 1, as in Python": ("def f(x): return x > 0", ["assert f(7) == 1 and f(-7) in [0, 5]", "assert {'a': f(7)} == {'a': 1}"]),
    "named like a builtin": ("def sorted(x): return x", ["assert sorted([2, 1]) == [2, 1]"]),
    "test's function with defaults": ("def f(g, x): return g(x)", ["assert f(lambda v, a=2, *, b=3: v + a + b, 1) == 6"]),
    "attributes set by the test": ("class Node:\n    def __init__(self, v): self.v, self.next = v, None\n"
                                   "def f(n):\n    t = 0\n    while n: t += n.v; n = n.next\n    return t",
                                   ["a = Node(1)\na.next = Node(2)\na.v += 4\nassert f(a) == 7 and a.next.v == 2\ndel a.next\nassert not hasattr(a, 'next')"]),
    "attributes that cannot be set": ("class Node:\n    __slots__ = ()\ndef f(): return Node()",
                                      ["try:\n    f().v = 1\n    raised = False\nexcept AttributeError:\n    raised = True\nassert raised"]),
    "items set by the test": ("class D:\n    def __init__(self): self.d = {}\n    def __setitem__(self, k, v): self.d[k] = v\n"
                              "    def __getitem__(self, k): return self.d[k]\n    def __delitem__(self, k): del self.d[k]\ndef f(): return D()",
                              ["d = f()\nd['a'] = 1\nd['b'] = 2\ndel d['b']\nassert d['a'] == 1 and d.d == {'a': 1}"]),
    "arguments named as the sandbox's own": ("def f(self, question, keywords): return self + question + keywords",
                                             ["assert f(question='b', keywords='c', self='a') == 'abc'"]),
    "its own command line": ("import argparse\ndef f(): return vars(argparse.ArgumentParser().parse_args())", ["assert f() == {}"]),
    "many small lists": ("def f(n): return [[i * 10 ** 6] for i in range(n)]", ["assert f(49000)[-1] == [48999000000]"]),
    "a group of exceptions": ("def f(): raise ExceptionGroup('g', [ValueError('v')])",
                              ["try:\n    f()\nexcept Exception as e:\n    said = str(e)\nassert 'g' in said"]),
    "in a class body": ("def f(x): return x + 1", ["class Case:\n    value = f(1)\n    f = staticmethod(f)\nassert Case.value == 2 == Case.f(1)"]),
    "closure": ("def f(n):\n    return lambda x: x + n", ["assert f(2)(3) == 5"]),
    "decorator": ("import functools\n@functools.lru_cache(None)\ndef f(n): return n if n < 2 else f(n - 1) + f(n - 2)", ["assert f(80) == 23416728348467685"]),
    "raises": ("def f(x):\n    if x < 0: raise ValueError('negative')\n    return x",
               ["try:\n    f(-1)\n    raised = False\nexcept ValueError as e:\n    raised = 'negative' in str(e)\nassert raised"]),
    "raises its own error": ("class E(KeyError): pass\ndef f(): raise E('k')", ["try:\n    f()\nexcept KeyError:\n    pass\nelse:\n    assert False"]),
    "an end of the process is an Exception to a test": ("def f(): raise SystemExit(3)", ["try:\n    f()\n    raised = False\nexcept Exception:\n    raised = True\nassert raised"]),
    "an exception of two megabytes": ("def f(): raise ValueError('x' * (2 << 20))", ["try:\n    f()\nexcept ValueError as e:\n    said = str(e)\nassert said[:2] == 'xx'"]),
    "UnicodeDecodeError": ("def f(): return b'\\xff'.decode()", ["try:\n    f()\nexcept UnicodeDecodeError:\n    pass\nelse:\n    assert False"]),
    "check(candidate)": ("def f(x): return -x", ["def check(candidate):\n    assert candidate(1) == -1\n    assert all(candidate(i) == -i for i in range(5))\ncheck(f)"]),
    "math in the test": ("def f(x): return x ** .5", ["assert math.isclose(f(2), 1.41421356, rel_tol=1e-6)"]),
    "prints": ("def f(x):\n    print('hello', x)\n    return x", ["assert f(1) == 1"]),
    "recursion": ("def f(n): return 0 if n == 0 else 1 + f(n - 1)", ["assert f(900) == 900"]),
    "main guard": ("def f(): return 1\nif __name__ == '__main__':\n    input()", ["assert f() == 1"]),
    "walrus and match": ("def f(x):\n    match x:\n        case [a, *_] if (n := a) > 0: return n\n        case _: return None", ["assert f([3, 4]) == 3", "assert f([]) is None"]),
    "chained comparison": ("def f(x): return x", ["assert 0 < f(1) < 2", "assert f(2) == 2 == f(2)", "assert f(1) not in [2, 3]"]),
    "a chain calls once": ("xs = [1, 2, 3, 4]\ndef f(): return xs.pop(0)", ["assert 1 == f() == 1", "assert 1 < f() < 3 != 4", "assert not 3 == 4 == f()",
                                                                      "assert (n := f()) == 3 and n in [3]"]),
    "threads": ("from concurrent.futures import ThreadPoolExecutor\ndef f(n):\n    with ThreadPoolExecutor(4) as pool: return list(pool.map(abs, range(-n, 0)))", ["assert f(3) == [3, 2, 1]"]),
    "asyncio": ("import asyncio\nasync def g(x):\n    await asyncio.sleep(0.001)\n    return x\ndef f(): return asyncio.run(g(3))", ["assert f() == 3"]),
    "strptime": ("import datetime\ndef f(s): return datetime.datetime.strptime(s, '%d %B %Y').isoformat()", ["assert f('7 May 2021') == '2021-05-07T00:00:00'"]),
    "strftime": ("import time\ndef f(): return time.strftime('%Y', time.gmtime(0))", ["assert f() == '1970'"]),
    "textwrap": ("def f(s):\n    import textwrap\n    return textwrap.wrap(s, 5)", ["assert f('ab cd ef') == ['ab cd', 'ef']"]),
    "base64": ("def f(b):\n    import base64\n    return base64.b64encode(b).decode()", ["assert f(b'abc') == 'YWJj'"]),
    "binascii": ("def f(b):\n    import binascii\n    return binascii.crc32(b)", ["assert f(b'abc') == 891568578"]),
    "calendar": ("def f(y):\n    import calendar\n    return calendar.isleap(y), calendar.month_name[2]", ["assert f(2024) == (True, 'February')"]),
    "csv": ("def f(t):\n    import csv, io\n    return list(csv.reader(io.StringIO(t)))", ["assert f('a,b\\n1,\"2,3\"') == [['a', 'b'], ['1', '2,3']]"]),
    "json": ("import json\ndef f(s): return json.loads(s)", ["assert f('{\"a\": [1, null, true]}') == {'a': [1, None, True]}"]),
    "re": ("import re\ndef f(s): return re.findall(r'\\d+', s)", ["assert f('a1b22') == ['1', '22']"]),
    "match object": ("import re\ndef f(s): return re.match('(a)(b)', s)", ["assert f('ab')", "assert f('ab').group(2) == 'b'", "assert f('x') is None"]),
    "hashlib": ("import hashlib\ndef f(b): return hashlib.md5(b).hexdigest()", ["assert f(b'') == 'd41d8cd98f00b204e9800998ecf8427e'"]),
    "itertools": ("import itertools\ndef f(x): return list(itertools.permutations(x, 2))", ["assert f('ab') == [('a', 'b'), ('b', 'a')]"]),
    "heapq and bisect": ("import heapq, bisect\ndef f(x): return heapq.nsmallest(2, x), bisect.bisect([1, 3], 2)", ["assert f([3, 1, 2]) == ([1, 2], 1)"]),
    "decimal": ("from decimal import Decimal\ndef f(): return Decimal('0.1') + Decimal('0.2')", ["assert str(f()) == '0.3'", "assert float(f()) == 0.3"]),
    "fractions": ("from fractions import Fraction\ndef f(): return str(Fraction(1, 3) + Fraction(1, 6))", ["assert f() == '1/2'"]),
    "enum": ("import enum\nclass C(enum.IntEnum):\n    A = 3\ndef f(): return C.A", ["assert f() == 3"]),
    "random, seeded": ("import random\ndef f(): return random.Random(0).randint(1, 100)", ["import random\nassert f() == random.Random(0).randint(1, 100)"]),
    "random.shuffle": ("import random\ndef f(x):\n    x = list(x); random.shuffle(x)\n    return sorted(x)", ["assert f([2, 1]) == [1, 2]"]),
    "statistics": ("import statistics\ndef f(x): return statistics.median(x)", ["assert f([1, 3, 2]) == 2"]),
    "xml": ("import xml.etree.ElementTree as E\ndef f(s): return [e.tag for e in E.fromstring(s)]", ["assert f('<a><b/><c/></a>') == ['b', 'c']"]),
    "html": ("import html\ndef f(s): return html.unescape(s)", ["assert f('&lt;&eacute;') == '<\u00e9'"]),
    "urllib.parse": ("import urllib.parse\ndef f(u): return urllib.parse.parse_qs(urllib.parse.urlparse(u).query)", ["assert f('http://a/?b=1') == {'b': ['1']}"]),
    "annotations of the future": ("from __future__ import annotations\ndef f(x: list[Unknown]) -> int: return len(x)", ["assert f([1]) == 1"]),
    "an import over lines": ("import os, \\\n    lzma, \\\n    bz2\ndef f(b): return bz2.decompress(lzma.decompress(b))",
                             ["import bz2, lzma\nassert f(lzma.compress(bz2.compress(b'ab'))) == b'ab'"]),
    "a module of a module": ("import importlib\ndef f(): return importlib.machinery.SOURCE_SUFFIXES", ["assert f() == ['.py']"]),
    "a method for each type": ("import functools\n@functools.singledispatch\ndef f(x): return 'any'\n@f.register\ndef _(x: int): return 'int'",
                               ["assert f(1) == 'int' and f('1') == 'any'"]),
    "help of a command": ("import argparse\ndef f():\n    p = argparse.ArgumentParser('x')\n    p.add_argument('--y', help='z')\n    return p.format_help()",
                          ["assert '--y' in f()"]),
    "an archive in memory": ("import io, tarfile\ndef f():\n    b = io.BytesIO()\n    with tarfile.open(fileobj=b, mode='w:xz') as t:\n"
                             "        t.addfile(tarfile.TarInfo('a'))\n    b.seek(0)\n    return tarfile.open(fileobj=b).getnames()", ["assert f() == ['a']"]),
    "a mock": ("from unittest import mock\ndef f():\n    m = mock.Mock(return_value=3)\n    return m(1), m.call_count", ["assert f() == (3, 1)"]),
    "sqlite3": ("import sqlite3\ndef f():\n    c = sqlite3.connect(':memory:')\n    return c.execute('select 1 + 1').fetchall()", ["assert f() == [(2,)]"]),
    "zlib and pickle": ("import zlib, pickle\ndef f(x): return pickle.loads(zlib.decompress(zlib.compress(pickle.dumps(x))))", ["assert f([1]) == [1]"]),
    "encodings": ("import codecs\ndef f(s): return codecs.encode(s, 'rot13'), s.encode('utf-16-le'), s.encode('cp1252')", ["assert f('ab') == ('no', b'a\\0b\\0', b'ab')"]),
    "os.path": ("import os\ndef f(p): return os.path.splitext(os.path.basename(p))", ["assert f('/a/b.txt') == ('b', '.txt')"]),
    "pathlib": ("from pathlib import Path\ndef f(p): return Path(p).suffix", ["assert f('/a/b.txt') == '.txt'"]),
    "uuid and secrets": ("import uuid, secrets\ndef f(): return len(str(uuid.uuid4())), len(secrets.token_hex(4))", ["assert f() == (36, 8)"]),
    "ast.literal_eval": ("import ast\ndef f(s): return ast.literal_eval(s)", ["assert f('[1, (2,)]') == [1, (2,)]"]),
    "exec and eval": ("def f(s):\n    names = {}\n    exec(s, names)\n    return eval('a + 1', names)", ["assert f('a = 1') == 2"]),
    "StringIO and redirect": ("import io, contextlib\ndef f():\n    out = io.StringIO()\n    with contextlib.redirect_stdout(out): print('x')\n    return out.getvalue()", ["assert f() == 'x\\n'"]),
    "logging and warnings": ("import logging, warnings\ndef f():\n    logging.warning('w'); warnings.warn('w')\n    return 1", ["assert f() == 1"]),
    "typing and abc": ("import abc, typing\nclass A(abc.ABC):\n    @abc.abstractmethod\n    def g(self): ...\ndef f(x: typing.Optional[int] = None) -> int: return 1", ["assert f() == 1"]),
    "inspect": ("import inspect\ndef f(a, b=1): return list(inspect.signature(f).parameters)", ["assert f(1) == ['a', 'b']"]),
    "50 MB of memory": ("def f(): return len(bytearray(50 << 20))", ["assert f() == 50 << 20"]),
    "large value": ("def f(n): return list(range(n))", ["assert f(20000) == list(range(20000))"]),
}

ENTRY = {"class": "Stack", "dataclass": "P", "instance as argument": ("f", "N"), "attributes set by the test": ("f", "Node"), "named like a builtin": "sorted"}  # where it is not `f`

# Attacks on the time limit: with a short one, once for each user, and not again for each layer left out.
SLOW = ["endless loop", "endless loop at import", "endless loop that eats exceptions", "sleeps for ever", "masked signals",
        "ignored signals", "regex catastrophe", "huge power", "huge int as text", "deadlock", "slow answer, byte by byte",
        "output bomb", "stack overflow", "large value", "hash collisions", "endless list", "loops while a test catches all",
        "a value that keeps the judge busy", "constant folding bomb", "fork bomb", "string doubling"]
FAST = [name for name in ATTACKS if name not in SLOW]
ON_WALLS = FAST[:FAST.index("forged verdict")]  # those after it attack the judge, whatever the layers are


def attack(name):
    """A job of `check_many`."""
    row = ATTACKS[name]
    code, test = row if isinstance(row, tuple) else (row, TEST)
    return code, [test], "f"


def program(name):
    code, tests = PROGRAMS[name]
    return code, tests, ENTRY.get(name, "f")


# ---- work in a process of its own, as this user and as nobody

def members(sessions):
    """Living processes of these sessions: the sandbox gives each process that it starts one of its own."""
    found = set()
    for entry in os.scandir("/proc"):
        try:
            state, _, _, session, *_ = open(f"/proc/{entry.name}/stat").read().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue
        if int(session) in sessions and state != "Z":
            found.add(int(entry.name))
    return found


def work(jobs, values, options):
    """What a sandbox says of jobs and of values, and which processes it had before, after, and when it was closed."""
    with Sandbox(**options) as box:
        if not box.layers["seccomp"] and not (box.layers["pid_namespace"] and box.layers["own_user"] and box.layers["rlimits"]):
            raise SystemExit("too dangerous: without seccomp, an attack may reach what is not the sandbox's")
        def settled():
            """The number of its processes, once each zygote (mostly behind process 1 of its namespace) has two children."""
            sessions, end = {p.pid for w in box.workers for p in w.processes}, time.monotonic() + 5
            expected = len(box.workers) * (5 if box.layers["pid_namespace"] else 4)
            seen = [0]
            while seen[-3:] != [expected] * 3 and time.monotonic() < end:
                time.sleep(0.02)
                seen.append(len(members(sessions)))
            return seen[-1]

        def owner(pid):
            try:
                return os.stat(f"/proc/{pid}/mem").st_uid
            except OSError:  # it has just ended
                return 0

        before = settled()
        owners = sorted({owner(pid) for pid in members({p.pid for w in box.workers for p in w.processes})})
        outcomes = [[o.passed, o.status, o.detail, o.seconds] for o in box.check_many(jobs)]
        values = [box.evaluate(**each).value for each in values]
        honest = [any(box.check("def f(x): return x * 2", [f"assert f({i}) == {2 * i}"], "f").passed for _ in range(5))
                  for i in range(4)]  # a busy machine may need more than a short limit
        after, layers = settled(), {k: v if v else str(v) for k, v in box.layers.items()}
        sessions = {p.pid for w in box.workers for p in w.processes}
    return {"outcomes": outcomes, "values": values, "honest": honest, "layers": layers, "before": before, "after": after,
            "closed": len(members(sessions)), "owners": owners}


SCRIPT = "import json, os, sys, time\nfrom nanorlhf.sandbox import Sandbox\n" + inspect.getsource(members) + inspect.getsource(work)
SCRIPT += "print(json.dumps(work(*json.load(sys.stdin))))"
NOBODY = {"user": 65534, "group": 65534, "extra_groups": []}


def runner(python, folder, **become):
    """`work` in a process of its own."""
    def run(jobs, values=(), **options):
        command = [python, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n" + SCRIPT]
        done = subprocess.run(command, **become, input=json.dumps([jobs, values, {"timeout": 0.5} | options]), cwd="/", env={},
                              capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
    return run


def nobody_runner(folder):
    """`runner` as nobody, of a copy of the package in `folder`; a reason why not as text."""
    if os.geteuid() != 0:
        return "only root can become nobody; this user is unprivileged already"
    shutil.copytree(ROOT / "nanorlhf", folder / "nanorlhf", ignore=lambda at, names: [
        name for name in names if Path(at).name != "jail" and name not in ("__init__.py", "errors.py", "sandbox.py", "jail")])
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    check = f"import sys; assert sys.version_info >= (3, 11); sys.path.append({str(folder)!r}); import nanorlhf"
    for python in (sys.executable, sys._base_executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        try:
            if not subprocess.run([python, "-c", check], **NOBODY, cwd="/", env={}, stderr=subprocess.DEVNULL).returncode:
                return runner(python, folder, **NOBODY)
        except OSError:
            continue
    return "nobody may run no Python 3.11 or later on this machine"


@pytest.fixture(scope="module")
def outside():
    """What attacks on files try to change."""
    os.mkdir(OUTSIDE)
    os.chmod(OUTSIDE, 0o777)
    canary = Path(OUTSIDE, "canary")
    canary.write_text("sings")
    canary.chmod(0o666)
    yield canary
    shutil.rmtree(OUTSIDE)
    Path(SHARED).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def runners(outside):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        yield {"this user": runner(sys.executable, ROOT), "nobody": nobody_runner(Path(folder))}


@pytest.fixture(scope="module", params=["this user", "nobody"])
def run(request, runners):
    if isinstance(runners[request.param], str):
        pytest.skip(runners[request.param])
    return runners[request.param]


def untouched():
    return os.listdir(OUTSIDE) == ["canary"] and Path(OUTSIDE, "canary").read_text() == "sings" and not os.path.exists(SHARED)


# ---- attacks and programs

@pytest.fixture(scope="module")
def attacked(run):
    said, slow = run([attack(name) for name in FAST], timeout=10), run([attack(name) for name in SLOW], timeout=0.25)
    outcomes = dict(zip([*FAST, *SLOW], said["outcomes"] + slow["outcomes"]))
    return {key: [said[key], slow[key]] for key in said} | {"outcomes": outcomes}


@pytest.fixture(scope="module")
def worked(run):
    """Ordinary programs have time enough, even on a busy machine."""
    said = run([program(name) for name in PROGRAMS], timeout=30)
    return said | {"outcomes": dict(zip(PROGRAMS, said["outcomes"]))}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_fails(attacked, name):
    passed, status, detail, seconds = attacked["outcomes"][name]
    if name == "thread bomb" and "nproc" not in attacked["layers"][0]["rlimits"]:
        pytest.skip("processes are counted by user, and this machine gives this user no namespace of its own")
    assert not passed, f"{name} got through"
    assert status in ("failed", "error", "timeout", "memory", "crashed")
    assert detail.isprintable() and len(detail) <= 400 and seconds >= 0


def test_attacks_leave_nothing_behind(attacked):
    """Honest code passes after them; there is no process more, and none when the box is closed; no file changed."""
    assert len(ATTACKS) >= 60 and all(map(all, attacked["honest"])) and untouched()
    assert attacked["after"] == attacked["before"] and min(attacked["before"]) > 0 and attacked["closed"] == [0, 0]


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_passes(worked, name):
    assert worked["outcomes"][name][:3] == [True, "ok", ""]


def test_programs_are_many(worked):
    assert len(PROGRAMS) >= 60 and worked["after"] == worked["before"] and worked["closed"] == 0


def test_no_process_can_be_looked_into(worked):
    """What is undumpable belongs to root in /proc, whoever's it is: the judge, the zygote and the children."""
    assert worked["layers"]["undumpable"] is True and worked["owners"] == [0]


@pytest.mark.parametrize("without", [("landlock",), ("landlock", "chroot")], ids=" ".join)
def test_programs_pass_where_no_file_can_be_read(run, without):
    """Behind an empty root, or with no call to open, everything that honest code imports is there already."""
    outcomes = run([program(name) for name in PROGRAMS], timeout=30, without=without)["outcomes"]
    assert [name for name, outcome in zip(PROGRAMS, outcomes) if not outcome[0]] == []


# ---- one layer less

# What gets through when a layer is left out: everything else is held by two. Without no_new_privs there is no seccomp.
# The limit of processes counts by user: it is set where the user is the sandbox's own, and root is exempt from it.
REACHED = {"rlimits": {"memory bomb", "memory bomb in small pieces", "memory map bomb", "descriptor bomb", "pipe bomb"},
           "own_user": {"is root", "thread bomb"} if os.geteuid() == 0 else set()}
# What is held without seccomp too, by the walls around files, the user and the limits.
HELD_TWICE = {name for name in ATTACKS if name.startswith(("read ", "list the", "write to", "append", "remove", "change a", "link", "mount", "raw device"))} | {
    "list /", "environment of the parent", "memory of the parent", "temporary file", "exec", "os.system", "raise a limit", "raise its priority",
    "other scheduler", "become root", "is root", "chroot", "reboot", "raw socket", "memory bomb", "memory map bomb", "descriptor bomb", "pipe bomb"}
LEFT_OUT = ["net_namespace ipc_namespace undumpable", "pid_namespace", "rlimits", "landlock", "landlock chroot",
            "own_user", "seccomp"]


def needs_namespaces(run):
    if run([])["layers"]["pid_namespace"] is not True:
        pytest.skip("this machine gives this user no namespaces; without seccomp an attack would reach other processes")


def reached(run, without, names=ON_WALLS, timeout=10):
    """(what a run without these layers says, names of the attacks that got through)."""
    assert not {"seccomp", "no_new_privs"} & set(without) or not {"pid_namespace", "own_user", "rlimits"} & set(without)
    said = run([attack(name) for name in names], without=without, mode="weak", timeout=timeout, workers=1)
    return said, {name for name, outcome in zip(names, said["outcomes"]) if outcome[0]}


def left_out(run, layers):
    if "seccomp" in layers:
        needs_namespaces(run)
    said, names = reached(run, layers.split())
    for layer in layers.split():
        assert said["layers"][layer] == "off: left out on request"
    assert all(said["honest"]) and said["closed"] == 0 and untouched()
    if said["layers"]["seccomp"] is True:
        unlimited = set() if "nproc" in said["layers"]["rlimits"] else {"thread bomb"}
        assert names == REACHED.get(layers, set()) | unlimited and said["after"] == said["before"]
    elif said["layers"]["landlock"] and said["layers"]["own_user"]:
        assert len(HELD_TWICE) >= 26 and not names & HELD_TWICE


@pytest.mark.parametrize("layers", LEFT_OUT)
def test_layer_left_out(runners, layers):
    left_out(runners["this user"], layers)


def test_seccomp_needs_no_new_privs():
    """The kernel takes a filter only from a process that can gain no privileges; then auto refuses, naming the cause."""
    with pytest.raises(InputError, match=r"missing seccomp \(.*(Permission|not permitted)"):
        Sandbox(without=["no_new_privs"], workers=1)


@pytest.mark.parametrize("layers", ["landlock", "seccomp", "user_namespace"])
def test_layer_left_out_as_nobody(runners, layers):
    if isinstance(runners["nobody"], str):
        pytest.skip(runners["nobody"])
    left_out(runners["nobody"], layers)


CAPABILITIES = """
import ctypes
data = (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None).capget((ctypes.c_uint32 * 2)(0x20080522, 0), data) == 0
sum(data)
"""


def test_no_capability_is_kept(run):
    """Not even those that an own user namespace grants; asked without seccomp, which refuses the question."""
    said = run([], [{"code": CAPABILITIES}], without=["seccomp"], mode="weak", timeout=30, workers=1)
    assert said["values"] == [0]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_own_user_keeps_nothing_of_root():
    """Real, effective and saved user and group, one of which would be the way back; no further group."""
    script = "import os\nfrom nanorlhf.jail import walls\nwalls.own_user(1 << 30)\nprint({*os.getresuid(), *os.getresgid()}, os.getgroups())"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, extra_groups=[0, 7], capture_output=True, text=True)
    assert done.stdout == "{1073741824} []\n", done.stderr


LIMITS = "import resource\n{name: resource.getrlimit(getattr(resource, 'RLIMIT_' + name)) for name in %r}"


def test_limits_are_hard(box):
    """Of 30 s, 31 s of processor time; soft is hard, or code could lift it."""
    names = ["CPU", "NOFILE", "FSIZE", "CORE", "MEMLOCK", "MSGQUEUE"]
    found = box.evaluate(LIMITS % [*names, "AS", "NPROC"]).value
    assert [found[name] for name in names] == [(31, 31), (64, 64), (0, 0), (0, 0), (0, 0), (0, 0)]
    assert found["AS"][0] == found["AS"][1] < 1 << 30
    assert found["NPROC"] == (64, 64) or "nproc" not in box.layers["rlimits"]


LANDLOCK = """
import ast, os, socket, sys
from nanorlhf.jail import walls
folder, abstract = sys.argv[1:]
canary = f"{folder}/canary"
tried = {"read": lambda: open(canary), "write": lambda: open(canary, "r+"), "write library": lambda: open(ast.__file__, "r+"),
         "new": lambda: open(f"{folder}/new", "x"), "folder": lambda: os.mkdir(f"{folder}/f"), "pipe": lambda: os.mkfifo(f"{folder}/p"),
         "link": lambda: os.symlink("/", f"{folder}/l"), "Unix": lambda: socket.socket(socket.AF_UNIX).bind(f"{folder}/s"),
         "remove folder": lambda: os.rmdir(f"{folder}/empty"),
         "truncate 3": lambda: os.truncate(canary, 0), "remove": lambda: os.remove(canary),
         "bind 4": lambda: socket.socket().bind(("127.0.0.1", 0)), "connect 4": lambda: socket.socket().connect(("127.0.0.1", 1)),
         "signal 6": lambda: os.kill(os.getppid(), 0), "abstract 6": lambda: socket.socket(socket.AF_UNIX).connect("\\0" + abstract),
         "run": lambda: os.execv("/bin/true", ["true"])}
walls.no_new_privs()
print(walls.landlock())
for name, attempt in tried.items():
    try:
        attempt()
        print(name)
    except PermissionError:
        pass
"""


def test_landlock_alone(tmp_path):
    """Each thing that it forbids, tried with no other wall up; a number is the version that first knows it."""
    (tmp_path / "canary").write_text("sings")
    (tmp_path / "empty").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0nanorlhf_{os.getpid()}")
        listener.listen()
        done = subprocess.run([sys.executable, "-c", LANDLOCK, str(tmp_path), f"nanorlhf_{os.getpid()}"], cwd=ROOT, capture_output=True, text=True)
    if "Function not implemented" in done.stderr or "Operation not supported" in done.stderr:
        pytest.skip("this kernel has no Landlock")
    abi, *through = done.stdout.splitlines()
    assert [name for name in through if not name[-1].isdigit() or int(name[-1]) <= int(abi[3:])] == [] == done.stderr.splitlines()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change the root")
def test_a_new_root_is_empty_and_leaves_no_folder(tmp_path):
    script = (f"import os, tempfile\nfrom nanorlhf.jail import walls\ntempfile.tempdir = {str(tmp_path)!r}\nwalls.chroot()\nprint(os.listdir('/'))\n"
              "try:\n    open('/new', 'w')\nexcept FileNotFoundError:\n    print('nothing can be put there')\n")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\nnothing can be put there\n" and not os.listdir(tmp_path), done.stderr


def test_the_attacks_are_real(runners, outside):
    """With neither seccomp nor a wall around files, attacks on them do get through (other walls hold the rest)."""
    needs_namespaces(runners["this user"])
    said, names = reached(runners["this user"], ["seccomp", "landlock", "chroot"])
    Path(OUTSIDE, "broken").unlink(missing_ok=True)
    Path(SHARED).unlink(missing_ok=True)
    assert names >= {"read /etc/passwd", "list /", "write to a file", "remove a file", "socket", "fork", "memfd", "subprocess"}
    assert all(said["honest"]) and said["closed"] == 0
    outside.write_text("sings")


# ---- modes

@pytest.fixture(scope="module")
def box():
    with Sandbox(timeout=30, workers=1) as box:
        yield box


def test_layers_say_what_is_on(box):
    assert box.layers["seccomp"] is True and box.layers["rlimits"].startswith("as cpu")
    if os.geteuid() == 0 or box.layers["user_namespace"]:  # its users are its own
        assert "nproc" in box.layers["rlimits"]
    for state in box.layers.values():
        assert state is True or isinstance(state, str) and bool(state) != state.startswith("off: ")
        assert "probe went through" not in str(state)


def test_namespaces_are_its_own(box):
    """What the zygote's processes see of network, shared memory and processes is not what we see."""
    zygote = box.workers[0].processes[1].pid
    inside = members({zygote}) - ({zygote} if box.layers["pid_namespace"] else set())
    assert inside
    for kind in ("net", "ipc", "pid"):
        spaces = set()
        for pid in inside:
            try:
                spaces.add(os.readlink(f"/proc/{pid}/ns/{kind}"))
            except FileNotFoundError:  # the first child has just been ended
                continue
            except PermissionError:
                pytest.skip("only root may look at the namespaces of others")
        assert spaces
        assert not box.layers[f"{kind}_namespace"] or os.readlink(f"/proc/self/ns/{kind}") not in spaces, kind


def test_auto_and_require_fail_closed_naming_layer_and_cause():
    for mode, layer in (("auto", "seccomp"), ("require", "seccomp"), ("require", "net_namespace"), ("require", "own_user")):
        with pytest.raises(InputError, match=rf"'{mode}' will not run code here: missing .*{layer} \(left out on request\)"):
            Sandbox(mode=mode, without=[layer], workers=1)
    with pytest.raises(InputError, match="landlock or chroot"):
        Sandbox(mode="require", without=["landlock", "chroot"], workers=1)
    every = ["seccomp", "no_new_privs", "net_namespace", "ipc_namespace", "pid_namespace", "own_user", "undumpable", "rlimits"]
    with pytest.raises(InputError) as refused:
        Sandbox(mode="require", without=every, workers=1)
    assert all(f"{name} (left out on request)" in str(refused.value) for name in every)


def test_a_refusal_leaves_no_process():
    mine = set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
    with pytest.raises(InputError):
        Sandbox(mode="auto", without=["seccomp"], workers=1)
    assert set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()) == mine


def test_require_runs_where_every_layer_is():
    try:
        box = Sandbox(mode="require", workers=1, timeout=30)
    except InputError as error:
        pytest.skip(str(error))
    with box:
        assert box.check(*HONEST).passed and all(box.layers[name] for name in box.REQUIRED)


def test_a_degraded_layer_is_logged(caplog):
    caplog.set_level("WARNING", "nanorlhf.sandbox")  # a peer may have set the root's
    with Sandbox(without=["net_namespace"], workers=1, timeout=30) as box:
        assert box.check(*HONEST).passed and not box.layers["net_namespace"]
    assert "net_namespace (left out on request)" in caplog.text


def test_weak_runs_with_time_and_memory_limits_alone():
    """As on macOS, where only rlimits exist. Nothing here attacks: there is hardly a wall."""
    every = [name for name in Sandbox.LAYERS if name != "rlimits"]
    with Sandbox(mode="weak", without=every, workers=1, timeout=30) as box:
        assert [name for name, state in box.layers.items() if state] == ["rlimits"]
        assert box.check(*HONEST).passed
        assert box.evaluate("len(bytearray(400 << 20))").status == "memory"
    with pytest.raises(InputError, match="seccomp"):
        Sandbox(without=every, workers=1)


def test_a_layer_that_the_probe_gets_through_is_off(monkeypatch):
    """A layer is on by what code meets, not by what a system call returned."""
    monkeypatch.setattr("nanorlhf.sandbox.PROBE", "found = ['seccomp']")
    with pytest.raises(InputError, match=r"missing seccomp \(it was put up, but the probe went through it\)"):
        Sandbox(workers=1, timeout=30)


def test_the_probe_finds_what_is_not_there():
    """Without walls, the probe goes through each that it tries."""
    every = [name for name in Sandbox.LAYERS if name not in ("pid_namespace", "own_user")]
    with Sandbox(mode="weak", without=every, workers=1, timeout=30) as box:
        found = set(box.evaluate(sandbox.PROBE, expression="found").value)
    assert found - {"pid_namespace"} == {"seccomp", "landlock", "chroot", "rlimits"}


def test_a_short_limit_is_for_samples_and_not_for_the_probe():
    with Sandbox(timeout=0.01, workers=1) as box:
        assert box.layers["seccomp"] is True and box.check("while True: pass", ["f()"]).status == "timeout"
        time.sleep(judge.GRACE / 4 + 0.1)  # a sample's alarm is off when it is over, or it would end the judge
        assert box.workers[0].processes[0].poll() is None


def test_off_runs_nothing():
    with Sandbox(mode="off") as box:
        assert box.layers == {} and not box.workers
        for call in (lambda: box.check(*HONEST), lambda: box.evaluate("1"), lambda: box.check_many([HONEST])):
            with pytest.raises(InputError, match="off or closed"):
                call()


def test_a_closed_box_runs_nothing():
    box = Sandbox(workers=1)
    box.close()
    box.close()
    with pytest.raises(InputError, match="off or closed"):
        box.check(*HONEST)


# ---- bad arguments

@pytest.mark.parametrize("options, message", [
    ({"mode": "on"}, "sandbox mode 'on': choose one of auto, require, weak, off"),
    ({"timeout": 0}, "timeout must be a number from 0.01 to 86400, not 0"), ({"timeout": float("nan")}, "timeout"), ({"timeout": "1"}, "timeout"),
    ({"memory_mb": 1}, "memory_mb"), ({"workers": 0}, "workers"), ({"workers": 1.5}, "workers"), ({"workers": True}, "workers"),
    ({"without": ["seccom"]}, "seccom"), ({"without": "seccomp"}, "without"),
    ({"without": None}, "without"), ({"without": [["seccomp"]]}, "without"), ({"memory_mb": 1e13}, "memory_mb"), ({"timeout": 10 ** 400}, "timeout")])
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        Sandbox(**options)


@pytest.mark.parametrize("job, message", [
    ({"code": None, "tests": ["assert f()"]}, "code must be text, not NoneType"),
    ({"code": "", "tests": []}, "no tests"), ({"code": "", "tests": ["assert f("]}, "test 0 does not parse"),
    ({"code": "", "tests": ["x = '\0'"]}, "test 0 does not parse"), ({"code": "", "tests": [1]}, "tests must be text"),
    ({"code": "", "tests": None}, "tests must be text"), ({"code": "", "tests": ["return 1"]}, "test 0 does not parse"),
    ({"code": "", "tests": ["# assert f()"]}, "holds no statement"), ({"code": "", "tests": ["-" * 100_000 + "1"]}, "test 0 does not parse"),
    ({"code": "", "tests": ["assert f()"], "entry_point": []}, "entry_point"), ({"code": "", "tests": ["assert f()"], "entry_point": "f()"}, "entry_point"),
    ({"code": "", "tests": ["assert f()"], "entry_point": 3}, "entry_point"), ({"code": "1", "expression": 1}, "expression must be text"),
    ({"code": "1", "setup": 1}, "setup must be text"), ({"code": "1", "test": ["assert f()"]}, "'test'"),
    ({"code": "1", "tests": ["assert f()"], "setup": ""}, "'setup'"), ({"tests": ["assert f()"]}, "code"),
    (("1",), "tuple"), ("1", "job"), (["def f(): pass", ["assert f()"], "f", 1], "tuple")])
def test_bad_jobs(box, job, message):
    with pytest.raises(InputError, match=message):
        box.check_many([job])


# ---- check, evaluate, check_many

def test_names_that_tests_may_use(box):
    """Without entry_point all that the code has, but never in place of Python's or a module; with it nothing else."""
    code = "def f(x): return g(x)\ndef g(x): return x + 1\ndef abs(x): return 9\nclass math:\n    isclose = max"
    assert box.check(code, ["assert f(g(1)) == 3", "def twice(x): return g(g(x))\nassert [twice(x) for x in [1]] == [3]"]).passed
    assert not box.check(code, ["assert abs(f(1)) == 9"]).passed and not box.check(code, ["assert math.isclose(f(1), 3)"]).passed
    assert box.check(code, ["assert abs(1) == 9", "assert f(1) == 2"], ["abs", "f"]).passed
    assert box.check(code, ["assert f(1) == 2 and g"], "f").detail == "NameError: name 'g' is not defined"
    assert box.check(code, ["assert h(1)"]).detail == "NameError: the code does not define h"



def test_check(box):
    assert box.check("def f(x): return x + 1", ["assert f(1) == 2"]) == Outcome(True, "ok", pytest.approx(0, abs=30))
    failed = box.check("def f(x): return x + 1", ["assert f(1) == 2", "assert f(2) == 2"], "f")
    assert not failed.passed and failed.status == "failed" and failed.detail == "test 1: assert f(2) == 2"
    error = box.check("def f(x): return x[1]", ["assert f([]) == 2"], "f")
    assert (error.status, error.detail) == ("error", "IndexError: list index out of range")
    own = box.check("def f(x): assert x > 1, 'too small'", ["assert f(1)"], "f")  # the code's assertion, not the test's
    assert (own.status, own.detail) == ("error", "AssertionError: too small")
    assert box.check("def g(x): pass", "assert f(1)").detail == "NameError: the code does not define f"
    assert box.check("def f(:", "assert f(1)").detail.startswith("SyntaxError")
    assert "more than 1048576 characters" in box.check("def f(x): return x" + " " * (1 << 20), "assert f(1)").detail
    ended = box.check("import os\ndef f(x): os._exit(3)", "assert f(1)")
    assert ended.status == "crashed" and "exit code 3" in ended.detail
    ended = box.check("import ctypes\ndef f(x): ctypes.string_at(0)", "assert f(1)")
    assert ended.status == "crashed" and "SIGSEGV" in ended.detail


def test_evaluate(box):
    assert box.evaluate("ys = [x + 1 for x in xs]", setup="xs = [1]", expression="ys[0]").value == 2
    assert box.evaluate("a = 1\na + 1").value == 2 and box.evaluate("a = 1").value is None
    assert box.evaluate("__import__('collections').Counter('aab')").value == {"a": 2, "b": 1}
    for code, status in (("object()", "error"), ("lambda: 1", "error"), ("1 / 0", "error"), ("1 +", "error"), ("exit()", "error"),
                         ("'x' * (2 << 20)", "error"), ("a = []; a.append(a); a", "error"), ("bytearray(400 << 20)", "memory")):
        outcome = box.evaluate(code)
        assert (outcome.passed, outcome.status, outcome.value) == (False, status, None), code
    assert "lambda" not in str(box.evaluate("x", setup="1 / 0")) and box.evaluate("1", setup="1 / 0").status == "error"


@pytest.mark.parametrize("form", [
    {"kept": [0, "int"]}, {"kept": ["x", "y"]}, {"int": "zz"}, {"int": 3}, {"set": [[1]]}, {"dict": [[1, 2, 3]]}, {"dict": 1},
    {"bytes": "zz"}, {"complex": [1, 2, 3]}, {"complex": ["nan", {}]}, {"list": 1}, {}, {"a": 1, "b": 2}, {"tuple": None},
    {"dict": [[{"dict": []}, 1]]}, {"set": [[]]}, {"object": []}], ids=str)
def test_a_forged_value_is_an_error_and_the_judge_lives(box, form):
    """Whatever the code writes in place of an answer, the same judge judges on."""
    pids = [process.pid for process in box.workers[0].processes]
    code = FORGED + f"os.write(3, frame({{'value': {form!r}}}))\nimport time\ntime.sleep(60)"
    outcome = box.evaluate(code)
    assert (outcome.status, outcome.value) == ("error", None) and re.search("no value came back|type int cannot cross", outcome.detail)
    for reply in ({"value": form}, {"raised": 1, "text": 2}, {"raised": [form], "text": form}, {}, [], 1, None):
        code = FORGED + f"def f(x):\n    os.write(3, frame({reply!r}))\n    return 0"
        assert not box.check(code, [TEST], "f").passed
    assert [process.pid for process in box.workers[0].processes] == pids


def test_no_code_runs_in_the_trainer(box, capfd):
    """Neither the candidate nor a test: they run in other processes, and print nowhere."""
    assert box.evaluate("import os\nos.getpid()").value != os.getpid()
    test = "import sys\nsys.nanorlhf_was_here = 1\nprint('test')\nassert f()"
    assert box.check("import sys\nsys.nanorlhf_was_here = 1\nprint('code')\ndef f(): return 1", test, "f").passed
    assert not hasattr(sys, "nanorlhf_was_here") and capfd.readouterr() == ("", "")


def test_a_test_reaches_no_file_and_no_network(box):
    """The judge is behind walls of its own."""
    for test in ("open('/etc/passwd')", f"open({OUTSIDE + '/canary'!r}, 'w')", "import socket\nsocket.socket()",
                 "import os\nos.fork()", "import os\nos.kill(os.getppid(), 0)"):
        outcome = box.check("def f(x): return x * 2", [test], "f")
        assert outcome.status == "error" and re.match("PermissionError|FileNotFoundError", outcome.detail), outcome


def test_much_output_is_nothing(capfd):
    """Neither way; from a sandbox that was started under this `capfd`, which would not see an older one's."""
    code = "import os, sys\nos.write(1, b'x'); os.write(2, b'x')\ndef f(x):\n    for i in range(300): print('x' * 100_000), print('x', file=sys.stderr)\n    return x"
    with Sandbox(timeout=30, workers=1) as box:
        assert box.check(code, ["print('test')\nassert f(1) == 1"]).passed
    assert capfd.readouterr() == ("", "")


def test_check_many_keeps_order_and_takes_dicts_and_tuples():
    jobs = [(f"def f(x): return x + {i}", [f"assert f(1) == {1 + i}"], "f") for i in range(20)]
    jobs += [{"code": f"{i} * 2"} for i in range(20)] + [{"code": "def f(x): return x", "tests": "assert f(1) == 1"}]
    with Sandbox(timeout=30) as box:
        outcomes = box.check_many(jobs)
        assert all(o.passed for o in outcomes) and [o.value for o in outcomes[20:40]] == list(range(0, 40, 2))
        assert box.check_many([]) == []


def test_check_many_waits_for_no_job_longer_than_its_limit():
    """Twelve endless jobs of 0.3 s on two workers: six rounds, 1.8 s; honest jobs between them pass."""
    endless = [(f"def f(x):\n    while True: {i}", ["assert f(7) == 14"], "f") for i in range(12)]
    with Sandbox(timeout=0.3) as box:
        begin = time.perf_counter()
        outcomes = box.check_many(endless)
        assert [o.status for o in outcomes] == ["timeout"] * 12 and all(0.3 <= o.seconds < 5 for o in outcomes)
        assert 1.8 <= time.perf_counter() - begin < 15


def test_threads_may_share_a_box():
    from concurrent.futures import ThreadPoolExecutor
    with Sandbox(timeout=30) as box, ThreadPoolExecutor(6) as pool:
        outcomes = list(pool.map(lambda i: box.evaluate(f"{i} + 1"), range(30)))
    assert [o.value for o in outcomes] == list(range(1, 31))


def test_the_first_end_of_a_sample_is_its_status():
    """The code ends its process; a test that catches that goes on until the time is over."""
    with Sandbox(timeout=0.5, workers=1) as box:
        test = "import time\ntry:\n    f(7)\nexcept BaseException:\n    time.sleep(9)"
        assert box.check("import os\ndef f(x): os._exit(3)", [test], "f").detail == "the code ended its process (exit code 3)"


def test_the_time_limit_comes_again_should_a_test_catch_it():
    with Sandbox(timeout=0.3, workers=1) as box:
        judge, test = box.workers[0].processes[0].pid, "try:\n    f(7)\nexcept BaseException:\n    pass\nwhile True: pass"
        assert box.check("def f(x):\n    while True: pass", [test], "f").detail == "over 0.3 s" and box.workers[0].processes[0].pid == judge


def test_time_limit_counts_all_tests_together():
    code = "import time\ndef f(x):\n    time.sleep(.25)\n    return x"
    with Sandbox(timeout=0.9, workers=1) as box:
        assert box.check(code, ["assert f(1) == 1"] * 6, "f").status == "timeout"


def test_memory_limit():
    with Sandbox(timeout=30, memory_mb=64, workers=1) as box:
        assert box.check("def f(): return len(bytearray(40 << 20))", ["assert f() == 40 << 20"]).passed
        assert box.check("def f(): return len(bytearray(90 << 20))", ["assert f() == 90 << 20"]).status == "memory"
        assert box.check("def f(): return 2", ["assert bytearray(f() << 30)"]).status == "memory", "the judge has a limit of its own"


# ---- the cache

def test_cache_is_by_content():
    """Same code and same tests: the same outcome without a run, its time included. Any difference: a run of its own."""
    with Sandbox(timeout=30, workers=1) as box:
        first = box.check("def f(x): return x", ["assert f(1) == 1"], "f")
        assert box.check("def f(x): return x", ["assert f(1) == 1"], "f") == first and len(box.cache) == 1
        assert box.check("def f(x): return x", ["assert f(1) == 2"], "f").status == "failed"
        assert box.check("def f(x): return x ", ["assert f(1) == 1"], "f").passed and len(box.cache) == 3
        value = box.evaluate("[1]")
        value.value.append(2)
        assert box.evaluate("[1]").value == [1]  # what the caller does to a value stays his
        assert box.evaluate("[1]", setup="a = 1").passed and len(box.cache) == 5


def test_the_cache_holds_nothing_large():
    """Of 200,000 verdicts: code that answers with a megabyte must not fill the trainer's memory."""
    with Sandbox(timeout=30, workers=1) as box:
        assert [len(box.evaluate(f"'x' * {n}").value) for n in (1000, 10_000, 10_000)] == [1000, 10_000, 10_000]
        assert len(box.cache) == 1 and sum(map(len, box.cache.values())) < 2000
        test = "assert f() == '" + "\u4e2d" * 3000 + "'"
        assert box.check("def f(): pass", [test]) == box.check("def f(): pass", [test]) and len(box.cache) == 2  # the longest detail


@pytest.mark.parametrize("code, status, timeout", [
    ("while True: pass", "timeout", 0.3), ("import os\nos._exit(0)", "crashed", 30), ("bytearray(400 << 20)", "memory", 30)])
def test_what_the_machine_brought_about_is_not_cached(code, status, timeout):
    with Sandbox(timeout=timeout, workers=1) as box:
        assert box.evaluate(code).status == status and box.cache == {}


# ---- ends

def gone(pids, seconds=10):
    """Whether no process of these sessions is left, some time to end allowed."""
    end = time.monotonic() + seconds
    while members(pids) and time.monotonic() < end:
        time.sleep(0.02)
    return not members(pids)


def test_a_layer_that_is_lost_at_a_new_start_ends_the_work():
    """`layers` has said that it is on; a machine short of processes must not quietly run code without it."""
    with Sandbox(timeout=30, workers=1) as box:
        worker = box.workers[0]
        worker.config = {**worker.config, "without": ["rlimits"]}
        worker.processes[0].kill()
        worker.processes[0].wait()
        for _ in range(2):  # and whoever tries again
            with pytest.raises(RuntimeError, match=r"has lost its layer rlimits \(left out on request\)"):
                box.check(*HONEST)
        worker.config = {**worker.config, "without": []}
        assert box.check(*HONEST).passed


def test_a_process_that_ends_at_its_start_is_told(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/true")
    with pytest.raises(RuntimeError, match="can start no process: what it said is on stderr"):
        Sandbox(workers=1)


def test_a_machine_that_starts_no_process_says_so_and_leaves_none(monkeypatch):
    """At the start, and at a new one, after which work goes on."""
    popen, started = subprocess.Popen, []

    def one_only(*args, **kwargs):
        if started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(popen(*args, **kwargs))
        return started[-1]

    with Sandbox(timeout=30, workers=1) as box:
        monkeypatch.setattr(subprocess, "Popen", one_only)
        with pytest.raises(RuntimeError, match="can start no process: .*temporarily unavailable"):
            Sandbox(workers=1)
        assert gone({process.pid for process in started}) and len(started) == 1
        started.clear()
        box.workers[0].processes[0].kill()
        box.workers[0].processes[0].wait()
        with pytest.raises(RuntimeError, match="can start no process"):
            box.check(*HONEST)
        assert gone({process.pid for process in started})
        monkeypatch.undo()
        assert box.check(*HONEST).passed


@pytest.mark.parametrize("poorer", [0, 1])
def test_layers_are_those_that_every_worker_has(monkeypatch, poorer):
    made, worker = [], sandbox._Worker

    def start(config):
        made.append(worker({**config, "without": ["rlimits"] * (len(made) == poorer)}))
        return made[-1]

    monkeypatch.setattr(sandbox, "_Worker", start)
    with Sandbox(timeout=30, workers=2, mode="weak") as box:
        assert box.layers["rlimits"] == "off: left out on request" and box.layers["seccomp"] is True
        assert made[1 - poorer].layers["rlimits"] and not made[poorer].layers["rlimits"]
    made.clear()
    with pytest.raises(InputError, match="missing rlimits"):
        Sandbox(timeout=30, workers=2, mode="require")


class Unwalled:
    """In place of the judge's children: one that says that it is behind other walls than the first."""

    def __init__(self, layers):
        self.layers = layers

    def next(self):
        return None, None, self.layers


def test_a_child_behind_fewer_walls_than_the_first_gets_no_code():
    """A machine short of memory must not quietly run code behind less than `layers` says."""
    first = {"seccomp": True, "landlock": "abi7"}
    said = judge._sample(Unwalled({"seccomp": "off: [Errno 12] Cannot allocate memory", "landlock": "abi7"}), first, {}, 1)
    assert said["status"] == "broken" and "Cannot allocate memory" in said["detail"]


def test_a_wall_that_the_judge_lacks_is_told():
    """A layer is on only if the judge has it too; what is off already stays as it was told."""
    script = ("from nanorlhf.jail import judge, walls\ndef landlock(): raise OSError(38, 'not here')\nwalls.landlock = landlock\n"
              "layers = judge._close(['undumpable'], dict(no_new_privs=True, undumpable='off: left out', landlock='abi7', seccomp=True, rlimits='as'))\n"
              "print(sorted(layers.items()))")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == ("[('landlock', 'off: in the judge: [Errno 38] not here'), ('no_new_privs', True), ('rlimits', 'as'), ('seccomp', True), "
                           "('undumpable', 'off: left out')]\n"), done.stderr


def test_a_child_is_waited_for_and_looked_at_before_it_gets_code(monkeypatch):
    """None comes within the grace: OSError, and no wait for ever. It comes: no limit any more, the sample's counts. It was
    killed while it waited for its turn: EOFError, or honest code would be called crashed."""
    monkeypatch.setattr(judge, "GRACE", 0.05)
    children, (ours, theirs) = object.__new__(judge.Children), socket.socketpair()
    children.near, begin = [ours], time.monotonic()
    ours.settimeout(5)
    with ours, theirs:
        with pytest.raises(TimeoutError):
            children.next()
        assert time.monotonic() - begin < 4
        send(theirs, {"seccomp": True})
        near, _, layers = children.next()
        assert near.gettimeout() is None and layers == {"seccomp": True}
        send(theirs, {"seccomp": True})
        theirs.close()
        with pytest.raises(EOFError):
            children.next()


@pytest.mark.parametrize("without", [[], ["pid_namespace"]], ids=["all layers", "no pid_namespace"])
def test_a_killed_zygote_leaves_no_child(without):
    """Its end is its children's, also of one that catches everything and sleeps."""
    from concurrent.futures import ThreadPoolExecutor
    with Sandbox(timeout=30, workers=1, without=without) as box, ThreadPoolExecutor(1) as pool:
        worker, pids = box.workers[0], {process.pid for process in box.workers[0].processes}
        code = "import time\ndef f():\n    while True:\n        try: time.sleep(9)\n        except BaseException: pass"
        said = pool.submit(box.check, code, ["f()"], "f")
        time.sleep(1)
        os.killpg(worker.processes[1].pid, signal.SIGKILL)
        assert said.result().status == "crashed" and gone(pids)


def test_a_process_that_code_starts_without_seccomp_ends_with_the_sample():
    """With the group, which is the sample's own: left are the zygote, process 1 of its namespace and two children."""
    with Sandbox(timeout=30, workers=1, mode="weak", without=["seccomp"]) as box:
        if not box.layers["pid_namespace"]:
            pytest.skip("without a namespace it would be the machine's")
        code = "import os, time\ndef f():\n    if os.fork() == 0: time.sleep(60)\n    return 1"
        assert box.check(code, ["assert f() == 1"], "f").passed
        zygote, end, seen = box.workers[0].processes[1].pid, time.monotonic() + 5, []
        while seen[-10:] != [4] * 10 and time.monotonic() < end:  # one is ended, another forked
            time.sleep(0.02)
            seen.append(len(members({zygote})))
        assert seen[-1] == 4, seen


def test_close_leaves_no_process():
    with Sandbox() as box:
        pids = {process.pid for worker in box.workers for process in worker.processes}
        assert len(members(pids)) >= len(pids) == 4
    assert not members(pids)


@pytest.mark.parametrize("which", [0, 1], ids=["judge", "zygote"])
def test_a_worker_whose_process_died_starts_anew(which):
    with Sandbox(timeout=30, workers=1) as box:
        pids = {process.pid for process in box.workers[0].processes}
        victim = box.workers[0].processes[which].pid
        box.workers[0].processes[which].kill()
        while members({victim}):
            time.sleep(0.01)
        assert [box.check(f"def f(x): return x * {i}", [f"assert f(7) == {7 * i}"], "f").passed for i in range(3)] == [True] * 3
        assert gone(pids)


FORKS = """
import os, socket, sys
sys.path.append(sys.argv[1])
from jail import judge, walls, zygote
ours, theirs = socket.socketpair()
if os.fork() == 0:
    ours.close()
    forks, fork = [], os.fork

    def third_fails():
        forks.append(1)
        if len(forks) == 4:  # the first asks what a child can import
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return fork()

    os.fork = third_fails
    zygote.main({"without": list(walls.LAYERS), "memory_mb": 64, "timeout": 9}, theirs.detach())
theirs.close()
children = judge.Children(ours)
children.next()
children.end()  # the second is at work; the third cannot be forked
near, file, _ = children.next()
assert children.code() in (0, -9)  # it goes when its socket is closed, or is killed
near.sendall(b'["load", [["x = 1"], {}]]'.replace(b'[["x = 1"], {}]', b'{"tuple": [{"tuple": ["x = 1"]}, {"dict": []}]}') + bytes([10]))
assert file.readline() == b'{"value": null}' + bytes([10])
children.end()
try:
    children.next()
    raise SystemExit("a child that was never forked")
except EOFError:
    children.end()
print(children.next()[2]["seccomp"])
"""


def test_a_fork_that_fails_costs_the_sample_at_work_nothing():
    done = subprocess.run([sys.executable, "-c", FORKS, str(ROOT / "nanorlhf")], capture_output=True, text=True, timeout=60)
    assert done.stdout == "off: left out on request\n", done.stderr


def test_a_zygote_that_takes_its_time_to_start_is_waited_for(monkeypatch):
    launch = sandbox._Worker.launch
    monkeypatch.setattr(sandbox._Worker, "launch", lambda self, role, *ends: (
        time.sleep(judge.GRACE + 2 if role == "zygote" else 0), launch(self, role, *ends)))
    with Sandbox(timeout=30, workers=1) as box:
        assert box.check(*HONEST).passed


def test_a_close_does_not_wait_for_a_fork_of_the_trainer(monkeypatch):
    """Such as a loader's worker, which holds what the trainer held: the judge is killed at once, not after its time to end."""
    box, wait = Sandbox(timeout=30, workers=1), subprocess.Popen.wait
    worker, waited = box.workers[0], []
    held = [os.dup(end.fileno()) for end in worker.ends if end.fileno() >= 0]

    def watched(process, timeout=None):
        try:
            return wait(process, timeout)
        except subprocess.TimeoutExpired:
            waited.append(process)
            raise

    monkeypatch.setattr(subprocess.Popen, "wait", watched)
    box.close()
    assert not waited and not members({process.pid for process in worker.processes})
    for number in held:
        os.close(number)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a sample a user of its own")
def test_the_next_child_has_another_user(box):
    """It is there already while this one is at work."""
    users = [box.evaluate(f"import os\nos.getuid() + {i} - {i}").value for i in range(3)]
    assert users[0] == users[2] != users[1] and min(users) > 1 << 20


@pytest.mark.parametrize("entry", [None, "f"])
def test_tests_that_ask_the_code_nothing_are_no_pass(box, entry):
    """HumanEval's `check(candidate)`, which its reader must call, and pytest's functions used to pass any code."""
    wrong = "def f(x): return -x"
    for tests in (["def check(candidate):\n    assert candidate(3) == 3"], ["def test_f():\n    assert f(3) == 3"], ["y = 2", "assert y"], ["assert 1 + 1 == 2"],
                  ["candidate = f", "def check():\n    assert candidate(3) == 3"],
                  ["def g(x): assert candidate(x) == 3\nimport functools, threading\ncandidate, g = staticmethod(f), functools.wraps(f)(g)", "threading.Thread(target=f)"],
                  ["import abc\nclass T(abc.ABC):\n    candidate = lambda: f\n    candidate = candidate()"],
                  ["import unittest\nclass T(unittest.TestCase):\n    def test(self): assert f(3) == 3\nif __name__ == '__main__': unittest.main()"]):
        outcome = box.check(wrong, tests, entry)
        assert outcome.status == "error" and "never ask the code for anything" in outcome.detail and not outcome.passed
    check = "def check(candidate):\n    assert candidate(3) == 3\n"
    assert box.check(wrong, [check, "check(f)"], entry).status == "failed" and box.check("def f(x): return x", [check + "check(f)"], entry).passed
    assert box.check("f = 3", ["assert f == 3"], entry).passed, "a plain value is an answer"
    assert box.check("f = 3", [check], entry).status == box.check("f, k = 3, 4", [check], ["f", "k"]).status == "error", "if it is looked at"
    assert box.check(wrong, ["assert 1 + 1 == 2", "assert f(3) == -3"], entry).passed, "one that asks is enough"
    assert box.check(wrong, ["assert f(2) == -2 and fractions.Fraction(1, 2) == 0.5"], entry).passed, "a module is there, imported or not"
    assert "SyntaxError" in box.check("x = (", ["assert 1 + 1 == 2"], None).detail


def test_a_value_that_cannot_be_compared_is_named(box):
    outcome = box.check("import datetime\ndef f(): return datetime.date(2020, 1, 2)", ["assert f() == __import__('datetime').date(2020, 1, 2)"], "f")
    assert outcome.status == "failed" and "the code gave a date, which is no plain builtin and equals nothing here" in outcome.detail
    outcome = box.check("def f(): return 1\ndef g(): return f", ["assert g() != None", "assert f() == 2"], ["f", "g"])
    assert outcome.detail == "test 1: assert f() == 2"
    for near in ("from unittest.mock import ANY", "class Any:\n    def __eq__(self, other): return True\nANY = Any()"):
        assert box.check("def f(): return f", [f"{near}\nassert f() == ANY"], "f").passed, "the test's own == is asked"
    assert box.check("def f(): pass", ["d = {f: 1}\nassert d[f] == 1 and f == f and f != 1\nf()"], "f").passed


def test_an_object_answers_for_the_code_and_not_for_the_judge(box):
    """The judge's class has a docstring and an attribute of its own: `f.__doc__` used to be true of any function."""
    code = "def f(x): return x\ndef g(x):\n    'twice'\n    return 2 * x\nclass A:\n    def __init__(self): self.x = self.y = 1"
    assert box.check(code, ["assert f(1) == 1 and f.__doc__ is not None"], "f").status == "failed"
    assert box.check(code, ["assert A().x == 1 and len(vars(A())) == 1"], "A").status == "failed"
    assert box.check(code, ["assert g.__doc__ == 'twice' and g.__name__ == 'g'", "assert vars(A()) == A().__dict__ == {'x': 1, 'y': 1}"], ["g", "A"]).passed
    assert box.check(code, ["assert copy.copy(g)(2) == 4"], "g").passed, "copy reads __dict__ too"


def test_threads_of_a_test_may_ask(box):
    """Each gets the answer to its own question; the judge lives on when one is still asking at the end."""
    judge, pool = box.workers[0].processes[0].pid, "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(8) as pool:\n    "
    code = "def f(x): return 2 * x\ndef g(x):\n    while x: pass"
    assert box.check(code, [pool + "assert list(pool.map(f, range(300))) == [2 * i for i in range(300)]"], "f").passed
    late = "import threading, time\nthreading.Thread(target=g, args=(1,), daemon=True).start()\ntime.sleep(0.2)\nassert f is None"
    outcome = box.check(code, [late], ["f", "g"])
    assert outcome.status == "failed" and outcome.seconds < 10
    assert box.check(*HONEST).passed and box.workers[0].processes[0].pid == judge


@pytest.mark.parametrize("test", ["assert 3 in f(7)", "assert f(7) < 3", "assert f(7) >= 3", "assert f(7) - 3 == 0", "assert isinstance(f(7), int)",
                                  "assert hash(f(7)) == 3", "assert f(7).__eq__(3) is True", "assert round(f(7)) == 3", "assert 3 in {f(7): 1}"])
def test_an_object_is_not_its_own_judge(box, test):
    """Neither asked to compare nor told the expected value, whatever it defines: 3 is in no answer."""
    names = "contains lt gt le ge eq sub rsub and hash index round trunc abs instancecheck".split()
    code = "class E:\n    __class__ = int\n    def yes(self, *a): return True\n" + "\n".join(f"    __{name}__ = yes" for name in names)
    code += "\n    def __hash__(self): return 3\n    def __iter__(self): return iter([7])\ndef f(x): return E()"
    assert box.check(code, [test], "f").status in ("failed", "error")


def test_what_the_machine_does_to_an_answer_is_no_fault_of_the_code(box):
    """Half a line: the process was ended (by the kernel, short of memory); no memory for it in the judge: neither is cached."""
    code = FORGED + "import signal\ndef f(x):\n    os.write(3, frame({'value': 1})[:-1])\n    os._exit(9)"
    outcome, cached = box.check(code, [TEST], "f"), len(box.cache)
    assert outcome.status == "crashed" and "exit code 9" in outcome.detail
    assert box.check(code, [TEST], "f").status == "crashed" and len(box.cache) == cached

    class Full:
        def readline(self, limit):
            raise MemoryError

    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(judge.Stop) as stop:
        judge.Session(ours, Full()).ask("load", "x = 1")
    assert stop.value.args[0] == "memory"


def test_a_machine_that_can_start_no_child_is_no_verdict(monkeypatch):
    """The code did not run, so it did not fail: an exception, after one more try."""
    with Sandbox(timeout=30, workers=1) as box:
        worker = box.workers[0]
        monkeypatch.setattr(worker, "stop", lambda: None)
        worker.processes[1].kill()
        while members({worker.processes[1].pid}):
            time.sleep(0.01)
        with pytest.raises(RuntimeError, match="can start no process"):
            box.check(*HONEST)
        monkeypatch.undo()
        worker.stop()
        assert box.check(*HONEST).passed


def test_no_descriptor_left_for_a_worker_is_said_in_a_line():
    limits, held = resource.getrlimit(resource.RLIMIT_NOFILE), []
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        with pytest.raises(OSError):
            while True:
                held.append(os.dup(0))
        for _ in range(5):  # none left, or one, or two ...
            with pytest.raises(RuntimeError, match="the sandbox can start no process: .*Too many open files"):
                Sandbox(workers=1)
            os.close(held.pop())
    finally:
        for number in held:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_an_interrupt_starts_nothing_anew(monkeypatch):
    """The samples at work are ended; their workers come back with the next job, not before."""
    with Sandbox(timeout=30, workers=2) as box:
        starts, start = [], sandbox._Worker.start
        monkeypatch.setattr(sandbox._Worker, "start", lambda self: (starts.append(1), start(self)))
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 1)
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            box.check_many([(f"def f(x):\n    while x: pass  # {i}", [TEST], "f") for i in range(4)])
        signal.signal(signal.SIGALRM, before)
        time.sleep(1)
        assert time.monotonic() - begin < 10 and not starts
        assert box.check(*HONEST).passed and starts


TRAINER = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored
from nanorlhf.sandbox import Sandbox
with Sandbox(timeout=60) as box:
    print(*(process.pid for worker in box.workers for process in worker.processes), flush=True)
    busy = ("def f(): return 10 ** 4", ["assert 7 ** f() ** f() == 0"], "f")  # the judge never comes to look who is there
    box.check_many([busy] + [("import time\\ntime.sleep(%d)" % (50 + i), ["assert f()"], "f") for i in range(3)])
"""


DEAF = """
import signal
for each in (signal.SIGCHLD, signal.SIGIO):
    signal.signal(each, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
from nanorlhf.sandbox import Sandbox
with Sandbox(timeout=0.5, workers=1) as box:
    said = box.check("while True: pass", ["f()"])
    print(said.status, box.evaluate("import signal\\nlen(signal.pthread_sigmask(0, []))").value, *(process.pid for process in box.workers[0].processes), flush=True)
    box.workers[0].config["timeout"] = 60  # a test that no alarm can end
    box.check("def f(): return 'a' * 40", ["import re\\nre.match('(a+)+$', f() + 'b')"], "f")
"""


def test_signals_that_the_trainer_blocks_or_ignores():
    """They are inherited: the time limit is one, and so is the judge's end when the trainer is killed."""
    trainer = subprocess.Popen([sys.executable, "-c", DEAF], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    status, blocked, *pids = trainer.stdout.readline().split()
    assert (status, blocked) == ("timeout", "0")
    time.sleep(0.3)
    trainer.kill()
    trainer.communicate()
    assert gone(set(map(int, pids)))


def test_a_box_that_is_closed_meanwhile_starts_nothing_anew():
    from concurrent.futures import ThreadPoolExecutor
    box = Sandbox(timeout=30, workers=1)
    sessions = {process.pid for process in box.workers[0].processes}
    with ThreadPoolExecutor(1) as pool:
        worker, said = box.workers[0], pool.submit(box.check_many, [(f"import time\ntime.sleep(1)  # {i}", ["f()"]) for i in range(4)])
        time.sleep(0.5)
        box.close()
        with pytest.raises(InputError, match="off or closed"):
            said.result(20)
    assert gone(sessions | {process.pid for process in worker.processes}, 2)


def test_a_sample_leaves_the_judge_no_heavier():
    """Values, tests' functions and their globals are in cycles: uncollected, ten samples would fill the judge's gigabyte."""
    with Sandbox(workers=1, timeout=20, memory_mb=512) as box:
        code, test = "def f(n): return 'x' * n", "xs = []\ndef more(): xs.append(f(900_000))\nfor i in range(100): more()\nassert len(xs) == %d"
        assert [box.check(code, [test % 100 + f" + {i} - {i}"]).status for i in range(14)] == ["ok"] * 14
        assert box.check(code, [test % 7]).status == "failed"


def test_a_judge_killed_while_idle_costs_no_sample():
    with Sandbox(workers=1) as box:
        box.workers[0].processes[0].kill()
        box.workers[0].processes[0].wait()
        assert box.check("def f(): return 1", ["assert f() == 1"]).passed


def test_packages_below_the_library_cannot_be_read(tmp_path):
    """Where site-packages lies in the library's folder, as it does without a virtual environment."""
    lib = tmp_path / "lib"
    (lib / "site-packages").mkdir(parents=True)
    (lib / "site-packages" / "secret.py").write_text("1")
    (lib / "json").mkdir()
    for path in ("json/tool.py", "ast.py"):
        (lib / path).write_text("2")
    script = (f"import os, sysconfig\nfrom nanorlhf.jail import walls\nsysconfig.get_path = lambda name: {str(lib)!r}\n"
              "walls.no_new_privs()\nwalls.landlock()\n"
              f"print(open({str(lib / 'ast.py')!r}).read(), open({str(lib / 'json' / 'tool.py')!r}).read(), sorted(os.listdir({str(lib)!r})))\n"
              f"try:\n    open({str(lib / 'site-packages' / 'secret.py')!r})\nexcept PermissionError:\n    print('refused')\n")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    if "Function not implemented" in done.stderr or "Operation not supported" in done.stderr:
        pytest.skip("this kernel has no Landlock")
    assert done.stdout == "2 2 ['ast.py', 'json', 'site-packages']\nrefused\n", done.stderr


def test_what_arrives_while_a_sample_runs_ends_no_judge():
    """The kernel signals activity on the socket at any moment up to some time after a job was read: it must mean nothing.
    (A watch on that socket, in place of the lifeline, ended one judge in 20,000.)"""
    with Sandbox(workers=1) as box:
        worker, job = box.workers[0], {"code": "import time\ntime.sleep(0.3)\n7", "setup": "", "expression": None}
        for _ in range(2):
            send(worker.sock, job)
            time.sleep(0.1)  # the judge has the first and waits for the child
        assert [receive(worker.file)["value"] for _ in range(2)] == [7, 7]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda each: each.name)
def test_nothing_outlives_the_trainer(number):
    """Ctrl-C in the middle of jobs that take minutes, and worse."""
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pids = {int(pid) for pid in trainer.stdout.readline().split()}
    assert len(pids) >= 4
    time.sleep(0.3)
    trainer.send_signal(number)
    begin = time.monotonic()
    errors = trainer.communicate(timeout=30)[1]
    assert gone(pids) and time.monotonic() - begin < 20
    assert trainer.returncode != 0 and ("KeyboardInterrupt" in errors) == (number == signal.SIGINT)


# ---- values

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.complex_numbers(allow_nan=False)
    | st.text(st.characters()) | st.binary(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner)
    | st.sets(st.integers() | st.text()) | st.frozensets(st.integers() | st.booleans()), max_leaves=15)


def types(value):
    if isinstance(value, dict):
        return dict, [(types(k), types(v)) for k, v in value.items()]
    return type(value), [types(each) for each in value] if isinstance(value, (list, tuple)) else None


@settings(max_examples=150, deadline=None)
@given(PLAIN)
def test_values_come_back_as_they_were(value):
    back = decode(json.loads(json.dumps(encode(value))))
    assert back == value and types(back) == types(value) and same(back, value)


@settings(max_examples=150, deadline=None)
@given(PLAIN, PLAIN)
def test_same_is_equality_that_tells_true_from_one(a, b):
    assert not same(a, b) or a == b
    if "bool" not in f"{types(a)}{types(b)}":
        def plain(value):  # a frozenset hides its bools from `types`
            return not isinstance(value, (frozenset, set)) or not any(isinstance(each, bool) for each in value)
        if plain(a) and plain(b) and "frozenset" not in f"{types(a)}{types(b)}":
            assert same(a, b) == (a == b)


@pytest.mark.parametrize("a, b, expected", [
    (1, 1, True), (1, 1.0, True), (True, True, True), (True, 1, False), (0, False, False), ([True], [1], False),
    ({"a": True}, {"a": 1}, False), ({True: 1}, {1: 1}, False), ({1}, {True}, False), ({1, 2}, {2, 1}, True), ((1,), [1], False),
    (frozenset([1]), {1}, True), (frozenset([True]), {1}, False), ({(1, True)}, {(1, 1)}, False), (float("nan"), float("nan"), False), (None, 0, False), ("a", b"a", False), (0.1 + 0.2, 0.3, False),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True), ((bool, True), True, False), ([(1, [True])], [(1, [1])], False), (-0.0, 0.0, True)])
def test_same_by_hand(a, b, expected):
    assert same(a, b) is expected and same(b, a) is expected


def test_a_subclass_crosses_as_its_builtin():
    """Nothing of its own crosses: what the judge gets is exactly int, str, list ..."""
    for kind, value in ((int, 3), (float, 0.5), (complex, 1j), (str, "a"), (bytes, b"a"), (list, [1]), (dict, {"a": 1}), (set, {1})):
        sly = type("Sly", (kind,), {"__eq__": lambda self, other: True, "__hash__": None, "__repr__": lambda self: "7"})(value)
        assert encode(sly) == encode(value) and type(encode(sly)) is type(encode(value)), kind


def test_a_value_too_large_too_deep_or_strange_does_not_cross():
    deep = []
    for _ in range(60):
        deep = [deep]
    for value in (deep, list(range(200_000))):
        with pytest.raises(ValueError, match="too deep, cyclic or too large"):
            encode(value)
    with pytest.raises(TypeError, match="a value of type object cannot cross"):
        encode([object()])
    for deepen in (lambda form: [form], lambda form: {"tuple": [form]}):
        form = None
        for _ in range(60):
            form = deepen(form)
        with pytest.raises(ValueError, match="too deep"):
            decode(form)


# ---- the table of system calls

def bpf(program, architecture, number, *arguments):
    """What a seccomp program returns: its machine has one register, absolute loads, one mask, one jump, and return."""
    import struct
    data = struct.pack("<IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    at, register = 0, None
    while True:
        code, yes, no, operand = struct.unpack_from("HBBI", program, 8 * at)
        at += 1
        if code == 0x06:
            return operand
        if code == 0x20:
            register, = struct.unpack_from("<I", data, operand)
        elif code == 0x54:
            register &= operand
        else:
            assert code == 0x15
            at += yes if register == operand else no


X86, ARM = (0, 0xC000003E), (1, 0xC00000B7)
ALLOW, EPERM, ENOSYS, ENOTTY, KILL = 0x7FFF0000, 0x50001, 0x50026, 0x50019, 0x80000000


@pytest.mark.parametrize("arch, number, arguments, expected", [
    (X86, 0, (), ALLOW), (ARM, 63, (), ALLOW), (X86, 1, (), ALLOW), (ARM, 64, (), ALLOW), (X86, 57, (), EPERM),  # read, write, fork
    (X86, 59, (), EPERM), (ARM, 221, (), EPERM), (X86, 41, (), EPERM), (ARM, 198, (), EPERM),  # execve, socket
    (X86, 62, (), EPERM), (ARM, 129, (), EPERM), (X86, 101, (), EPERM), (ARM, 117, (), EPERM),  # kill, ptrace
    (X86, 2, (0, os.O_RDONLY), ALLOW), (X86, 2, (0, os.O_WRONLY), EPERM), (X86, 257, (0, 0, os.O_RDWR), EPERM),
    (X86, 257, (0, 0, os.O_RDONLY | os.O_CLOEXEC), ALLOW), (ARM, 56, (0, 0, os.O_CREAT), EPERM), (X86, 257, (0, 0, os.O_TRUNC), EPERM),
    (X86, 56, (0x10000,), ALLOW), (X86, 56, (17,), EPERM), (ARM, 220, (0x10000,), ALLOW), (ARM, 220, (0,), EPERM),  # clone
    (X86, 302, (0, 9, 0), ALLOW), (X86, 302, (0, 9, 1), EPERM), (X86, 302, (0, 9, 1 << 40), EPERM), (ARM, 261, (0, 9, 8), EPERM),
    (X86, 44, (3, 0, 0, 0, 0), ALLOW), (X86, 44, (3, 0, 0, 0, 1 << 32), EPERM), (ARM, 206, (3, 0, 0, 0, 8), EPERM), (X86, 53, (1,), ALLOW), (X86, 53, (2,), EPERM),
    (X86, 72, (3, 4, 0x800), ALLOW), (X86, 72, (3, 8, 1), EPERM), (ARM, 25, (3, 10, 9), EPERM),  # fcntl
    *[(X86, 72, (0, command), ALLOW) for command in (0, 1, 2, 3, 4, 1030)], (ARM, 25, (0, 0), ALLOW), (ARM, 25, (0, 1030), ALLOW),
    *[(X86, 72, (0, command, 1), EPERM) for command in (5, 6, 9, 15, 16, 37, 1024, 1025, 1026, 1031)],  # leases (1024) hold up who opens the file
    (ARM, 25, (0, 1024, 1), EPERM), (X86, 44, (3, 0, 0, 1, 0), EPERM), (ARM, 206, (3, 0, 0, 0x4001, 0), EPERM),  # MSG_OOB
    (X86, 16, (0, 0x5421), ALLOW), (X86, 16, (0, 0x5412), ENOTTY), (X86, 435, (0,), ENOSYS), (X86, 0x40000000, (), EPERM),
    (X86, 425, (), EPERM), (X86, 321, (), EPERM), (X86, 46, (), EPERM), (X86, 47, (), EPERM)])
def test_seccomp_program_by_hand(arch, number, arguments, expected):
    """Numbers from the kernel's tables; x32 (bit 30) is on no list; another ABI's numbers kill."""
    program = walls.seccomp_program(arch=arch)
    assert bpf(program, arch[1], number, *arguments) == expected
    assert bpf(program, 0x40000003, number, *arguments) == KILL


@pytest.mark.parametrize("arch", [X86, ARM], ids=["x86-64", "aarch64"])
def test_seccomp_program_allows_what_is_listed_alone(arch):
    listed = {pair.split()[1 + arch[0]] for pair in walls.CALLS.replace("\n", " ").split(", ")} - {"-"}
    allowed = {str(n) for n in range(600) if bpf(walls.seccomp_program(arch=arch), arch[1], n, *[(1 << 64) - 1] * 6) == ALLOW}
    assert allowed - {"56" if arch == X86 else "220"} == listed  # every bit is set: clone's CLONE_THREAD too
    closed = {n for n in range(600) if bpf(walls.seccomp_program(files=False, arch=arch), arch[1], n) == ALLOW}
    assert not closed & {2, 257} if arch == X86 else 56 not in closed


# What writes, names a process, opens a socket, changes a user, a limit or a mount, or widens what the kernel does: <x86-64 aarch64>, from
# the kernel's unistd.h, as in walls.CALLS.
NEVER = """chmod 90 -, chown 92 -, creat 85 -, fchmodat 268 53, fchownat 260 54, fork 57 -, ftruncate 77 46, link 86 -, linkat 265 37, mkdir 83
-, mkdirat 258 34, mknod 133 -, mknodat 259 33, rename 82 -, renameat 264 38, renameat2 316 276, rmdir 84 -, symlink 88 -, symlinkat
266 36, truncate 76 45, unlink 87 -, unlinkat 263 35, utimensat 280 88, open_by_handle_at 304 265, openat2 437 437, fallocate 285 47,
setxattr 188 5, execve 59 221, execveat 322 281, vfork 58 -, kill 62 129, tkill 200 130, tgkill 234 131, rt_sigqueueinfo 129 138,
rt_tgsigqueueinfo 297 240, pidfd_open 434 434, pidfd_getfd 438 438, pidfd_send_signal 424 424, ptrace 101 117, process_vm_readv 310
270, process_vm_writev 311 271, kcmp 312 272, socket 41 198, connect 42 203, bind 49 200, listen 50 201, accept 43 202, accept4 288
242, sendmsg 46 211, sendmmsg 307 269, recvmsg 47 212, recvmmsg 299 243, setuid 105 146, setgid 106 144, setresuid 117 147, setresgid
119 149, setgroups 116 159, setfsuid 122 151, capset 126 91, setrlimit 160 164, setpriority 141 140, sched_setscheduler 144 119,
sched_setaffinity 203 122, prctl 157 167, seccomp 317 277, unshare 272 97, setns 308 268, mount 165 40, umount2 166 39, pivot_root 155
41, chroot 161 51, move_mount 429 429, fsopen 430 430, reboot 169 142, swapon 167 224, init_module 175 105, finit_module 313 273,
kexec_load 246 104, bpf 321 280, perf_event_open 298 241, userfaultfd 323 282, io_uring_setup 425 425, io_uring_enter 426 426, keyctl
250 219, add_key 248 217, memfd_create 319 279, memfd_secret 447 447, shmget 29 194, shmat 30 196, msgget 68 186, semget 64 190,
mq_open 240 180, mbind 237 235, ioperm 173 -, iopl 172 -, arch_prctl 158 -, modify_ldt 154 -, personality 135 92, setsid 112 157,
setpgid 109 154, fanotify_init 300 262, inotify_init1 294 26, landlock_restrict_self 446 446"""


@pytest.mark.parametrize("arch", [X86, ARM], ids=["x86-64", "aarch64"])
def test_no_call_that_reaches_something_is_allowed(arch):
    """By their numbers, written down apart from the table: one that is wrong there would let another call through."""
    numbers = {each.split()[0]: each.split()[1 + arch[0]] for each in NEVER.replace("\n", " ").split(",")}
    refused = {name: bpf(walls.seccomp_program(arch=arch), arch[1], int(number)) for name, number in numbers.items() if number != "-"}
    assert set(refused.values()) == {EPERM}, refused


# ---- the house

def test_the_sandbox_needs_the_standard_library_alone():
    """No torch in the trainer's half; no site-packages and nothing else of ours in the children."""
    code = "import sys, nanorlhf.sandbox\nassert not {'torch', 'numpy', 'tokenizers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_code_finds_no_test_and_no_neighbour(box):
    """In its process there is neither the judge nor a way to import what is around the sandbox."""
    found = box.evaluate("import sys\nsorted(m for m in sys.modules if m.startswith(('jail', 'nanorlhf'))), sys.path").value
    assert found[0] == ["jail", "jail.child", "jail.values", "jail.walls", "jail.zygote"]
    assert not any(path.startswith(str(ROOT)) or "site-packages" in path or not path for path in found[1])
    for name in ("nanorlhf.data", "jail.judge", "torch", "numpy", "conftest"):
        assert box.evaluate(f"import {name}").detail.startswith(("ModuleNotFoundError", "PermissionError")), name


def test_time_zones_can_be_read(box):
    if not (box.layers["landlock"] and os.path.exists("/usr/share/zoneinfo/Asia/Tokyo")):
        pytest.skip("no time zones here, or no file can be read")
    code = "import datetime, zoneinfo\ndef f(): return datetime.datetime(2020, 1, 1, tzinfo=zoneinfo.ZoneInfo('Asia/Tokyo')).utcoffset().seconds"
    assert box.check(code, ["assert f() == 9 * 3600"], "f").passed


def test_texts_hash_alike_in_every_sandbox(box):
    """The order of a set of texts is the same in each run, and so is a verdict that hangs on it."""
    expected = subprocess.run([sys.executable, "-c", "print(hash('a'))"], env={"PYTHONHASHSEED": "0"}, capture_output=True).stdout
    assert box.evaluate("hash('a')").value == int(expected)
    assert box.check("def f(): return hash('a')", ["assert f() == hash('a')"], "f").passed


def test_command_line_lists_the_layers():
    done, strict, wrong = (subprocess.run([sys.executable, "-m", "nanorlhf.sandbox", *more], cwd=ROOT, capture_output=True, text=True)
                           for more in ([], ["--mode", "require"], ["--mode", "on"]))
    assert done.returncode == 0 and re.search(r"^seccomp +on$", done.stdout, re.M)
    assert strict.returncode == 0 and strict.stdout == done.stdout or "will not run code here: missing" in strict.stderr
    assert wrong.returncode == 2 and "invalid choice: 'on'" in wrong.stderr


# ---- the table for docs/SANDBOX.md

def table():
    """Attacks that got through, by user and layers left out; each row is a sandbox of its own."""
    os.mkdir(OUTSIDE)
    os.chmod(OUTSIDE, 0o777)
    Path(OUTSIDE, "canary").write_text("sings")
    with tempfile.TemporaryDirectory() as folder:
        runners = {"root" if os.geteuid() == 0 else "this user": runner(sys.executable, ROOT), "nobody": nobody_runner(Path(folder))}
        print(f"{time.strftime('%Y-%m-%d')}, Linux {platform.release().split('-')[0]} {platform.machine()}, Python {platform.python_version()}; "
              f"{len(ATTACKS)} attacks\n")
        print("| user | layers left out | off for other causes | attacks held | got through |\n|---|---|---|---:|---|")
        for user, run in runners.items():
            if isinstance(run, str):
                print(f"| {user} | | | | {run} |")
                continue
            for layers in ["", *(name for name in walls.LAYERS if name not in ("user_namespace", "chroot")), *
                           (["user_namespace"] if user != "root" else []), "landlock chroot", "seccomp landlock chroot"]:
                row(user, run, layers)
    shutil.rmtree(OUTSIDE)
    Path(SHARED).unlink(missing_ok=True)


def row(user, run, layers):
    (said, fast), (_, slow) = reached(run, layers.split(), FAST), reached(run, layers.split(), SLOW, 0.25)
    names = fast | slow
    other = [f"{name} ({state[5:]})" for name, state in said["layers"].items()
             if str(state).startswith("off") and name not in layers.split() and "not needed" not in state]
    print(f"| {user} | {layers.replace(' ', ', ') or 'none'} | {'; '.join(other)} | {len(ATTACKS) - len(names)} | "
          f"{', '.join(sorted(names))} |", flush=True)
    for name in ("broken", "canary"):
        Path(OUTSIDE, name).unlink(missing_ok=True)
    Path(OUTSIDE, "canary").write_text("sings")
    Path(SHARED).unlink(missing_ok=True)


if __name__ == "__main__":
    table()
