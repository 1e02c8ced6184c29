"""The zygote: a clean interpreter in namespaces of its own that forks a child for each sample, and ends it. It never sees
code or a test: the socket to the judge goes through it to the child, unread.
"""

import gc
import importlib
import json
import os
import signal
import socket
from contextlib import suppress

from . import walls
from .child import answer
from .values import send

# What much code uses, what Python imports by itself in the middle of something, and what links to libraries of the system.
USUAL = """__future__ collections.abc copy dataclasses datetime functools heapq importlib.machinery itertools json math
operator random re string typing unicodedata _bz2 _ctypes _decimal _hashlib _lzma pyexpat _sqlite3 _ssl _strptime _uuid
zlib encodings.ascii encodings.cp1252 encodings.idna encodings.latin_1 encodings.unicode_escape encodings.utf_8_sig"""
# What code may be expected to want beside them.
MORE = """abc argparse array ast asyncio base64 binascii bisect bz2 calendar cmath codecs colorsys
concurrent.futures.thread configparser contextlib contextvars csv ctypes decimal difflib dis email.message
email.mime.multipart email.mime.text email.utils enum errno filecmp fileinput fnmatch fractions gc getopt getpass glob
graphlib gzip gettext hashlib hmac html html.parser http.client http.cookies importlib.util inspect io ipaddress keyword
linecache locale logging lzma mimetypes mmap multiprocessing.dummy numbers optparse os.path pathlib pickle pkgutil
platform plistlib pprint queue quopri reprlib sched secrets select selectors shelve shlex shutil signal socket sqlite3
ssl stat statistics stringprep struct subprocess symtable tarfile tempfile textwrap threading time timeit token tokenize
tomllib traceback tracemalloc types unittest unittest.mock urllib.parse urllib.request uuid warnings weakref
xml.dom.minidom xml.etree.ElementTree xml.sax.saxutils zipfile zoneinfo encodings.base64_codec encodings.cp437
encodings.hex_codec encodings.punycode encodings.raw_unicode_escape encodings.rot_13 encodings.utf_16
encodings.utf_16_be encodings.utf_16_le encodings.utf_32 encodings.zlib_codec"""


def main(config, control):
    """Each message of the judge's brings a socket for a child to be forked. Two are kept, one at work and one that is ready:
    for a third the first is ended. The answer is the exit code of the child that was ended, or 0. Ends with the judge."""
    control, children = socket.socket(fileno=control), []
    config["user"] = 0x70000000 + os.getpid() % (1 << 20)  # above any that systemd gives out
    layers = _namespaces(config["without"])
    config["zygote"] = os.getpid()
    with suppress(OSError):
        walls.seccomp_program(True, ())  # as `seccomp` will ask; both are kept, once for all children
        walls.landlock_rules()
    _import(USUAL)
    if not _can_import(layers, config):
        _import(MORE)
    gc.freeze()  # children would copy the pages that a collection touches
    with suppress(ConnectionError):  # the judge has gone, and left an answer unread
        while descriptors := socket.recv_fds(control, 1, 1)[1]:
            code = _end(children.pop(0)) if len(children) == 2 else 0
            config["user"] ^= 1 << 20  # another than that of the child at work, which is none of its business
            try:
                children.append(os.fork())
            except OSError:  # the judge finds its socket closed when its turn comes; the child at work goes on
                children.append(None)
            if children[-1] == 0:
                _child(descriptors[0], layers, config)
            os.close(descriptors[0])
            control.send(code.to_bytes(2, "big", signed=True))
    for pid in children:
        _end(pid)
    os._exit(0)


def _import(modules):
    for name in modules.split():
        with suppress(ImportError):  # this Python was built without it
            importlib.import_module(name)


def _can_import(layers, config):
    """Whether a child can read the library behind Landlock, and finds it compiled: not where Python is its owner's alone. Then
    `MORE` is left to those that want it; a smaller process is forked faster."""
    pid = os.fork()
    if pid == 0:
        try:
            _close_doors(layers, config)
            os._exit(not (layers["landlock"] and open(json.__spec__.cached)))
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def _namespaces(without):
    """Own network, IPC and processes."""
    layers = walls.Layers(without)
    layers.wall("no_new_privs", walls.no_new_privs)
    if walls.LINUX and os.geteuid() != 0:
        layers.wall("user_namespace", walls.user_namespace)
    for name, flag in (("net_namespace", 0x40000000), ("ipc_namespace", 0x08000000), ("pid_namespace", 0x20000000)):
        layers.wall(name, walls.call, "unshare", flag)
    layers.wall("undumpable", walls.undumpable)
    if layers["pid_namespace"]:
        pid = os.fork()  # process 1 there: when it ends, the kernel kills all others
        if pid:
            os.closerange(0, 1 << 16)
            os._exit(os.waitpid(pid, 0)[1] != 0)
        walls.die_with_parent()
    return layers


def _close_doors(layers, config):
    """In a child: every wall but the last, seccomp."""
    memory = walls.mapped() + (config["memory_mb"] << 20)
    own = layers.get("user_namespace") or os.geteuid() == 0
    layers.wall("landlock", walls.landlock)
    if layers["landlock"]:
        layers["chroot"] = walls.Off("off: not needed beside Landlock, which leaves the standard library readable")
    else:
        layers.wall("chroot", walls.chroot)
    layers.wall("own_user", walls.own_user, config["user"])
    layers.wall("undumpable", walls.undumpable)  # again, since the change of user may undo it
    layers.wall("rlimits", walls.rlimits, memory, config["timeout"], own)
    if walls.LINUX:
        walls.die_with_parent()  # after the change of user, which would undo it
        if os.getppid() != config["zygote"]:
            os._exit(1)


def _child(sock, layers, config):
    """In a child: close all doors, keep one descriptor, say which walls are up, and serve."""
    os.setpgid(0, 0)
    _close_doors(layers, config)
    os.dup2(1, 2)  # /dev/null, as 0 and 1 are
    os.dup2(sock, 3)
    os.closerange(4, 1 << 16)
    layers.wall("seccomp", walls.seccomp, bool(layers["landlock"] or layers["chroot"]))
    try:
        sock = socket.socket(fileno=3)
        send(sock, layers)  # from here on an end is the code's own doing
        answer(sock)
    finally:
        os._exit(0)


def _end(pid):
    """Kill a child, if it came to be, and its group -> its exit code."""
    if not pid:
        return 0
    for each in (pid, -pid):
        with suppress(ProcessLookupError, PermissionError):  # gone already; macOS says the second of a zombie's group
            os.kill(each, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
