"""The zygote: a clean interpreter in namespaces of its own. It forks a child for each sample, closes the other walls
around it, and leaves nothing of it. It never sees code or a test: the socket to the judge goes through it to the child,
unread.
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

# Imported at start: what much code uses, and what Python imports by itself in the middle of something.
USUAL = """copy datetime heapq string _strptime unicodedata encodings.ascii encodings.base64_codec encodings.cp1252
encodings.cp437 encodings.hex_codec encodings.idna encodings.latin_1 encodings.punycode encodings.raw_unicode_escape
encodings.rot_13 encodings.unicode_escape encodings.utf_16 encodings.utf_16_le encodings.utf_16_be encodings.utf_32
encodings.utf_8_sig encodings.zlib_codec""".split()
# Imported when code first names their first word: a child is forked faster from a process that holds less.
NAMED = """abc argparse array ast asyncio base64 binascii bisect bz2 calendar cmath codecs collections.abc
concurrent.futures.thread configparser contextlib contextvars colorsys csv ctypes dataclasses decimal difflib dis
email.message email.mime.multipart email.mime.text email.utils enum errno filecmp fileinput fnmatch fractions functools
gc getopt getpass glob graphlib gzip gettext hashlib hmac html html.parser http.client http.cookies importlib.util
inspect io ipaddress itertools json keyword linecache locale logging lzma math mimetypes mmap multiprocessing numbers
operator optparse os.path pathlib pickle pkgutil platform plistlib pprint queue quopri random re reprlib sched secrets
select selectors shelve shlex shutil signal socket sqlite3 ssl stat statistics stringprep struct subprocess symtable
tarfile tempfile textwrap threading time timeit token tokenize tomllib traceback types typing unittest unittest.mock
urllib.parse urllib.request uuid warnings weakref xml.dom.minidom xml.etree.ElementTree xml.sax.saxutils zipfile zlib
zoneinfo""".split()


def _import(names):
    """Import what code wants, here and before the walls: behind them the library may be out of reach (an empty root, a
    Python that is its owner's alone), and what its modules link to is. Only ever these, of the standard library."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:  # this Python was built without it
            pass
    gc.freeze()  # children would copy the pages that a collection touches


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
    """Modules' names with a descriptor start a child; b"e" ends it and is answered by its exit code. Ends with the judge."""
    control = socket.socket(fileno=control)
    layers, limits, steps, left = walls.Layers(config["without"]), {}, [], set(NAMED)
    private_uid = 0x70000000 + os.getpid() % (1 << 20)  # above any that systemd gives out
    layers.wall("no_new_privs", walls.call, "prctl", 38, 1, 0, 0, 0)
    _namespaces(layers)
    layers.wall("subreaper", walls.call, "prctl", 36, 1, 0, 0, 0)  # orphans come to the zygote, as they do to process 1
    _import(USUAL)
    own_user = bool(layers.get("user_namespace") or walls.LINUX and os.geteuid() == 0)
    layers.wall("rlimits", _limits, limits, config, own_user)
    listing = f"/proc/self/task/{os.getpid()}/children"
    listing = os.open(listing, os.O_RDONLY | os.O_CLOEXEC) if os.getpid() != 1 and os.path.exists(listing) else None
    if layers.wall("landlock", _files, steps):
        layers["chroot"] = walls.Off("off: not needed beside Landlock, which leaves the standard library readable")
    else:
        layers.wall("chroot", _no_files, steps)
    layers.wall("own_user", _step, steps, walls.drop_user, private_uid)
    layers.wall("undumpable", walls.call, "prctl", 4, 0, 0, 0, 0)  # no ptrace, no /proc/PID/mem
    if layers["pid_namespace"]:
        walls.call("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    layers.wall("seccomp", _calls, steps, bool(layers["landlock"] or layers["chroot"]))
    sys.argv[:] = [""]
    send(control, layers)
    try:
        while True:
            wanted, descriptors, _, _ = socket.recv_fds(control, 1 << 16, 1)
            if not wanted:
                break
            new = [name for name in left if name.partition(".")[0] in wanted.decode().split()]
            if new:
                left -= set(new)
                _import(new)
                layers.wall("rlimits", _limits, limits, config, own_user)  # what they take is not the sample's memory
            pid = os.fork()
            if pid == 0:
                _child(descriptors[0], limits, steps)
            os.close(descriptors[0])
            try:
                order = control.recv(1)
            finally:
                status = _end(pid, listing)
            if order:
                control.send(struct.pack("i", os.waitstatus_to_exitcode(status)))
    except ConnectionError:  # the judge is gone, and left an answer unread
        pass
    os._exit(0)
