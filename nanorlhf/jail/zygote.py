"""The zygote: a clean interpreter behind namespaces, Landlock and an own user. It forks a child for each sample and
leaves nothing of it. It never sees code or a test: the socket to the judge goes through it to the child, unread.
"""

import gc
import importlib
import os
import resource
import signal
import socket
import struct
import sys

from . import walls
from .child import answer
from .values import send

PRELOAD = """abc argparse array ast asyncio base64 binascii bisect bz2 calendar cmath codecs collections
collections.abc concurrent.futures.thread configparser contextlib contextvars copy colorsys csv ctypes dataclasses
datetime decimal difflib dis email.message email.mime.multipart email.mime.text email.utils enum errno filecmp
fileinput fnmatch fractions functools gc getopt getpass glob graphlib gzip gettext hashlib heapq hmac html html.parser
http.client http.cookies importlib.util inspect io ipaddress itertools json keyword linecache locale logging lzma math
mimetypes mmap multiprocessing numbers operator optparse os.path pathlib pickle pkgutil platform plistlib pprint queue
quopri random re reprlib sched secrets select selectors shelve shlex shutil signal socket sqlite3 ssl stat statistics
string stringprep struct subprocess symtable tarfile tempfile textwrap threading time timeit token tokenize tomllib
traceback types typing unicodedata unittest unittest.mock urllib.parse urllib.request uuid warnings weakref
xml.dom.minidom xml.etree.ElementTree xml.sax.saxutils zipfile zlib zoneinfo _strptime encodings.ascii
encodings.base64_codec encodings.cp1252 encodings.cp437 encodings.hex_codec encodings.idna encodings.latin_1
encodings.punycode encodings.raw_unicode_escape encodings.rot_13 encodings.unicode_escape encodings.utf_16
encodings.utf_16_le encodings.utf_16_be encodings.utf_32 encodings.utf_8_sig encodings.zlib_codec""".split()


def _preload():
    """Import what code may want: behind a chroot, or where Python is its owner's alone, nothing can be read later."""
    for name in PRELOAD:
        try:
            importlib.import_module(name)
        except ImportError:  # this Python was built without it
            pass


def _files_wall(layers):
    """Landlock, and where it is off an empty root; either is one way only."""
    if layers.wall("landlock", walls.enter_landlock, walls.libraries()):
        layers["chroot"] = walls.Off("off: not needed beside Landlock, which leaves the standard library readable")
    else:
        layers.wall("chroot", walls.enter_empty_root)


def _seccomp_wall(layers, user):
    """The program that each child installs, tried in a fork; None where it cannot. Without a files wall, no opening."""
    def build():
        if not walls.ARCH:
            raise OSError("there is no table of system calls for this processor")
        walls.try_in_fork(_lock, user, program)

    program = walls.ARCH and walls.seccomp_program(files=bool(layers["landlock"] or layers["chroot"]))
    return program if layers.wall("seccomp", build) else None


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


def _lock(user, program):
    """The last two steps of a child: another user without capabilities, and no system call beyond the list."""
    if user is not None:
        walls.drop_user(user)
    if program:
        walls.install_seccomp(program)


def _child(sock, limits, user, program):
    """In the forked child: keep one descriptor, limit everything, close the last door, and serve."""
    os.setpgid(0, 0)
    os.dup2(1, 2)  # /dev/null, as 0 and 1 are
    os.dup2(sock, 3)
    os.closerange(4, 1 << 16)
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), value)
    _lock(user, program)
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


def main(control, config):
    """b"r" with a descriptor starts a child, b"e" ends it and is answered by its exit code. Ends with the judge."""
    control = socket.socket(fileno=control)
    layers, limits = walls.Layers(config["without"]), {}
    private_uid = 0x70000000 + os.getpid() % (1 << 20)  # above any that systemd gives out
    layers.wall("no_new_privs", walls.call, "prctl", 38, 1, 0, 0, 0)
    _namespaces(layers)
    layers.wall("subreaper", walls.call, "prctl", 36, 1, 0, 0, 0)  # orphans come to the zygote, as they do to process 1
    _preload()
    own_user = layers.get("user_namespace") or walls.LINUX and os.geteuid() == 0
    layers.wall("rlimits", _limits, limits, config, bool(own_user))
    listing = f"/proc/self/task/{os.getpid()}/children"
    listing = os.open(listing, os.O_RDONLY | os.O_CLOEXEC) if os.getpid() != 1 and os.path.exists(listing) else None
    _files_wall(layers)
    user = private_uid if layers.wall("own_user", walls.try_in_fork, walls.drop_user, private_uid) else None
    layers.wall("undumpable", walls.call, "prctl", 4, 0, 0, 0, 0)  # no ptrace, no /proc/PID/mem
    if layers["pid_namespace"]:
        walls.call("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    program = _seccomp_wall(layers, user)
    sys.argv[:] = [""]
    gc.freeze()  # children would copy the pages that a collection touches
    send(control, layers)
    while True:
        order, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not order:
            os._exit(0)
        pid = os.fork()
        if pid == 0:
            _child(descriptors[0], limits, user, program)
        os.close(descriptors[0])
        order = control.recv(1)
        status = _end(pid, listing)
        if order:
            control.send(struct.pack("i", os.waitstatus_to_exitcode(status)))
