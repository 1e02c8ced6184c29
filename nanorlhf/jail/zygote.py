"""The zygote: a clean interpreter in namespaces of its own. It forks a child for each sample, closes the other walls
around it, and leaves nothing of it. It never sees code or a test: the socket to the judge goes through it to the child,
unread.
"""

import gc
import importlib
import json
import os
import resource
import signal
import socket
import struct
import sys

from . import walls
from .child import answer
from .values import send

# What much code uses, what Python imports by itself in the middle of something, and what links to libraries of the system.
USUAL = """__future__ collections.abc copy dataclasses datetime functools heapq importlib.machinery itertools math operator
random re string typing unicodedata _bz2 _ctypes _decimal _hashlib _lzma pyexpat _sqlite3 _ssl _strptime _uuid zlib
encodings.ascii encodings.cp1252 encodings.idna encodings.latin_1 encodings.unicode_escape encodings.utf_8_sig""".split()
# All that code may be expected to want.
ALL = """abc argparse array ast asyncio base64 binascii bisect bz2 calendar cmath codecs concurrent.futures.thread
configparser contextlib contextvars colorsys csv ctypes decimal difflib dis email.message email.mime.multipart
email.mime.text email.utils enum errno filecmp fileinput fnmatch fractions gc getopt getpass glob graphlib gzip gettext
hashlib hmac html html.parser http.client http.cookies importlib.util inspect io ipaddress json keyword linecache locale
logging lzma mimetypes mmap multiprocessing numbers optparse os.path pathlib pickle pkgutil platform plistlib pprint
queue quopri reprlib sched secrets select selectors shelve shlex shutil signal socket sqlite3 ssl stat statistics
stringprep struct subprocess symtable tarfile tempfile textwrap threading time timeit token tokenize tomllib traceback
types unittest unittest.mock urllib.parse urllib.request uuid warnings weakref xml.dom.minidom xml.etree.ElementTree
xml.sax.saxutils zipfile zoneinfo encodings.base64_codec encodings.cp437 encodings.hex_codec encodings.punycode
encodings.raw_unicode_escape encodings.rot_13 encodings.utf_16 encodings.utf_16_le encodings.utf_16_be encodings.utf_32
encodings.zlib_codec""".split()


def _import(names):
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:  # this Python was built without it
            pass


def _preload(layers, steps):
    """Import once what children would import again and again. A child is forked faster from a process that holds less, so
    the rest is left to those that want it, where they may read the library and find it compiled: not behind an empty
    root, and not where Python is its owner's alone."""
    try:
        walls.try_in_fork(_close, [*steps, (open, json.__spec__.cached)])
        lean = layers["landlock"]
    except OSError:
        lean = False
    _import(USUAL if lean else USUAL + ALL)


def _close(steps):
    """The last steps of a child: no file, another user without capabilities, no system call beyond the list."""
    for step, *args in steps:
        step(*args)


def _step(steps, *step):
    """Add a step that each child takes, if a fork can take it after the others; OSError with its cause."""
    walls.try_in_fork(_close, [*steps, step])
    steps.append(step)


def _files(steps):
    ruleset, version = walls.landlock_rules(walls.libraries())
    _step(steps, walls.enter_landlock, ruleset)
    return version


def _no_files(steps):
    walls.stand_in_empty_folder()
    _step(steps, os.chroot, ".")


def _calls(steps, files):
    _step(steps, walls.install_seccomp, walls.seccomp_program(files))


def _user_namespace():
    walls.try_in_fork(walls.own_user_namespace)  # half of one, which some systems allow, is worse than none
    return walls.own_user_namespace()


def _namespaces(layers):
    """Own network, IPC and processes. The zygote becomes process 1: when it ends, the kernel kills all others there."""
    if walls.LINUX and os.geteuid() != 0:
        layers.wall("user_namespace", _user_namespace)  # grants what the next three need, inside it
    for name, flag in (("net_namespace", 0x40000000), ("ipc_namespace", 0x08000000), ("pid_namespace", 0x20000000)):
        layers.wall(name, walls.call, "unshare", flag)
    if layers["pid_namespace"]:
        pid = os.fork()
        if pid:
            os.closerange(0, 1 << 16)
            os._exit(os.waitpid(pid, 0)[1] != 0)


def _limits(limits, config, own_user):
    limits.update(walls.limits(config["memory_mb"] << 20, config["timeout"], own_user))
    return " ".join(limits).lower()


def _child(sock, limits, steps):
    """In the forked child: limit everything, close the doors, keep one descriptor, and serve."""
    os.setpgid(0, 0)
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), value)
    _close(steps)
    os.dup2(1, 2)  # /dev/null, as 0 and 1 are
    os.dup2(sock, 3)
    os.closerange(4, 1 << 16)
    try:
        answer(socket.socket(fileno=3))
    except (EOFError, OSError):
        pass
    os._exit(0)


def _end(pid, listing):
    """Kill the child and everything it started; returns its wait status. Process 1 of a namespace kills all others at
    once; otherwise the child, its group, and again and again whatever became our child by the death of its parent."""
    status = None
    while True:
        targets = [-1] if os.getpid() == 1 else [-pid] if status is not None else [pid, -pid]
        if listing is not None:
            targets += map(int, os.pread(listing, 1 << 16, 0).split())
        for target in targets:
            try:
                os.kill(target, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):  # gone already; macOS says the second of a zombie's group
                pass
        try:
            found, code = os.waitpid(-1, 0)
        except ChildProcessError:
            return status
        status = code if found == pid else status


def main(config, control):
    """A byte with a descriptor ends the last child, which its exit code answers, and starts the next. Ends with the judge."""
    control = socket.socket(fileno=control)
    layers, limits, steps = walls.Layers(config["without"]), {}, []
    private_uid = 0x70000000 + os.getpid() % (1 << 20)  # above any that systemd gives out
    layers.wall("no_new_privs", walls.call, "prctl", 38, 1, 0, 0, 0)
    _namespaces(layers)
    layers.wall("subreaper", walls.call, "prctl", 36, 1, 0, 0, 0)  # orphans come to the zygote, as they do to process 1
    listing = f"/proc/self/task/{os.getpid()}/children"
    listing = os.open(listing, os.O_RDONLY | os.O_CLOEXEC) if os.getpid() != 1 and os.path.exists(listing) else None
    if layers.wall("landlock", _files, steps):
        layers["chroot"] = walls.Off("off: not needed beside Landlock, which leaves the standard library readable")
    else:
        layers.wall("chroot", _no_files, steps)
    layers.wall("own_user", _step, steps, walls.drop_user, private_uid)
    _preload(layers, steps)
    own_user = bool(layers.get("user_namespace") or walls.LINUX and os.geteuid() == 0)
    layers.wall("rlimits", _limits, limits, config, own_user)
    layers.wall("undumpable", walls.call, "prctl", 4, 0, 0, 0, 0)  # no ptrace, no /proc/PID/mem
    if walls.LINUX:
        steps.append((walls.die_with, os.getpid()))  # after the change of user, which would undo it
    if layers["pid_namespace"]:
        walls.call("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    layers.wall("seccomp", _calls, steps, bool(layers["landlock"] or layers["chroot"]))
    sys.argv[:] = [""]
    gc.freeze()  # children would copy the pages that a collection touches
    pid = None
    try:
        send(control, layers)
        while True:
            order, descriptors, _, _ = socket.recv_fds(control, 1, 1)
            if pid:
                status, pid = _end(pid, listing), None
                control.send(struct.pack("i", os.waitstatus_to_exitcode(status)))
            if not order:
                break
            pid = os.fork()
            if pid == 0:
                _child(descriptors[0], limits, steps)
            os.close(descriptors[0])
    except ConnectionError:  # the judge is gone, and left an answer unread
        if pid:
            _end(pid, listing)
    os._exit(0)
