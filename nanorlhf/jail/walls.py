"""The walls around a process, as the kernel builds them: system calls, files, user, limits. Linux, but for limits.

A function that builds a wall builds it for the calling process, which cannot take it down again; OSError says why it
could not. Numbers of system calls are <x86-64 aarch64>, from the kernel's unistd.h; both are little-endian.
"""

import ctypes
import errno
import functools
import math
import os
import platform
import resource
import struct
import sys
import sysconfig
import tempfile

LINUX = sys.platform == "linux"
LIBRARY = ctypes.CDLL(None, use_errno=True)
LAYERS = ("no_new_privs", "user_namespace", "net_namespace", "ipc_namespace", "pid_namespace", "undumpable", "landlock",
          "chroot", "own_user", "rlimits", "seccomp")


class Off(str):
    """A layer that is off: the cause as text, and false."""

    def __bool__(self):
        return False


class Layers(dict):
    """What is on: {name of a layer: True, a word more, or `Off`}."""

    def __init__(self, without):
        self.without = without

    def wall(self, name, build, *args):
        """Build it, unless it is to be left out, and note its state."""
        try:
            if name in self.without:
                raise OSError("left out on request")
            if not LINUX and name != "rlimits":
                raise OSError(f"{sys.platform} has none, it needs Linux")
            self[name] = build(*args) or True
        except (OSError, AttributeError) as error:  # the C library or the machine lacks the call
            self[name] = Off(f"off: {error}")


# ---- system calls

ARCH = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}.get(platform.machine())  # column, name in the audit
CALLS = """read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, close 3 57, close_range 436 436,
fstat 5 80, newfstatat 262 79, stat 4 -, lstat 6 -, statx 332 291, lseek 8 62, access 21 -, faccessat 269 48,
faccessat2 439 439, readlink 89 -, readlinkat 267 78, getdents64 217 61, getcwd 79 17, dup 32 23, dup2 33 -,
dup3 292 24, mmap 9 222, munmap 11 215, mremap 25 216, mprotect 10 226, madvise 28 233, brk 12 214, membarrier 324 283,
futex 202 98, set_robust_list 273 99, get_robust_list 274 100, set_tid_address 218 96, rseq 334 293,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigtimedwait 128 137,
rt_sigsuspend 130 133, sigaltstack 131 132, restart_syscall 219 128, exit 60 93, exit_group 231 94, sched_yield 24 124,
sched_getaffinity 204 123, nanosleep 35 101, clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114,
gettimeofday 96 169, time 201 -, getrandom 318 278, uname 63 160, sysinfo 99 179, getrusage 98 165, times 100 153,
getpid 39 172, gettid 186 178, getppid 110 173, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177,
getgroups 115 158, getpgrp 111 -, getpgid 121 155, getsid 124 156, getrlimit 97 163, getitimer 36 102,
setitimer 38 103, alarm 37 -, pause 34 -, umask 95 166, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72,
epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22, eventfd2 290 19, pipe 22 -, pipe2 293 59,
recvfrom 45 207, shutdown 48 210, getsockname 51 204, getpeername 52 205, getsockopt 55 209, wait4 61 260,
waitid 247 95"""
LOW, HIGH, WHOLE = 16, 20, 0xFFFFFFFF  # where the two words of argument 0 are in struct seccomp_data; each next is 8 further
WRITING = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC
# Allowed where for every (offset, mask, *operands) word & mask is one of the operands; else the error.
TESTED = [((2, None), errno.EPERM, [(LOW + 8, WRITING, 0)]),  # open: to read
          ((257, 56), errno.EPERM, [(LOW + 16, WRITING, 0)]),  # openat
          ((56, 220), errno.EPERM, [(LOW, 0x10000, 0x10000)]),  # clone: CLONE_THREAD, threads and never processes
          # fcntl: F_DUPFD, flags, F_DUPFD_CLOEXEC; no signals to an owner, and no lease: who opens a leased file waits for the code
          ((72, 25), errno.EPERM, [(LOW + 8, WHOLE, 0, 1, 2, 3, 4, 1030)]),
          ((302, 261), errno.EPERM, [(LOW + 16, WHOLE, 0), (HIGH + 16, WHOLE, 0)]),  # prlimit64: without new limits
          # sendto: without an address, and without MSG_OOB, a corner of the kernel that nothing here needs
          ((44, 206), errno.EPERM, [(LOW + 24, 1, 0), (LOW + 32, WHOLE, 0), (HIGH + 32, WHOLE, 0)]),
          ((53, 199), errno.EPERM, [(LOW, WHOLE, 1)]),  # socketpair: AF_UNIX, what asyncio wakes itself with
          ((16, 29), errno.ENOTTY, [(LOW + 8, WHOLE, 0x5421)]),  # ioctl: FIONBIO, what setblocking does
          ((435, 435), errno.ENOSYS, [(LOW, 0, 1)])]  # clone3: never; the C library turns to clone


@functools.cache
def seccomp_program(files=True, extra=(), arch=ARCH):
    """The BPF program: `CALLS`, `TESTED` and `extra` pass, all others fail with EPERM, another ABI's kill. Without files,
    nothing is opened."""
    if not arch:
        raise OSError("there is no table of system calls for this processor")
    column, audit = arch
    load, mask, equal, back = 0x20, 0x54, 0x15, 0x06  # BPF_LD|W|ABS, ALU|AND|K, JMP|JEQ|K, RET|K
    allow, refuse = (back, 0, 0, 0x7FFF0000), 0x00050000  # RET_ALLOW, RET_ERRNO
    code = [(load, 0, 0, 4), (equal, 1, 0, audit), (back, 0, 0, 0x80000000), (load, 0, 0, 0)]
    for numbers, error, tests in TESTED if files else TESTED[2:]:
        block = [allow, (back, 0, 0, refuse | error)]
        for offset, bits, *operands, last in reversed(tests):
            either = [(equal, left, 0, operand) for left, operand in zip(range(len(operands), 0, -1), operands)]
            block = [(load, 0, 0, offset), (mask, 0, 0, bits), *either, (equal, 0, len(block) - 1, last), *block]
        if numbers[column] is not None:
            code += [(equal, 0, len(block), numbers[column]), *block]
    listed = [each.split()[1 + column] for each in CALLS.split(",")]
    listed = [int(number) for number in listed if number != "-"] + [pair[column] for pair in extra]
    code += [(equal, left, 0, number) for left, number in zip(range(len(listed), 0, -1), listed)]  # jumps to the last
    code += [(back, 0, 0, refuse | errno.EPERM), allow]
    return b"".join(struct.pack("HBBI", *each) for each in code)


def call(name, *args):
    """A C library call; OSError with its cause."""
    result = getattr(LIBRARY, name)(*[ctypes.c_ulong(a) if isinstance(a, int) else a for a in args])
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def no_new_privs():
    call("prctl", 38, 1, 0, 0, 0)


def undumpable():
    """No ptrace, no /proc/PID/mem."""
    call("prctl", 4, 0, 0, 0, 0)


def seccomp(files=True, extra=()):
    program = seccomp_program(files, extra)
    buffer = ctypes.create_string_buffer(program, len(program))
    call("prctl", 22, 2, struct.pack("HP", len(program) // 8, ctypes.addressof(buffer)), 0, 0)  # SET_SECCOMP, FILTER


# ---- files, users, processes

@functools.cache
def landlock_rules():
    """(descriptor of a ruleset, ABI): no file but the standard library's and the time zones, no TCP, no abstract socket and no
    signal to the outside, as far as this kernel knows them; it may know less than its version says."""
    for abi in range(max(1, call("syscall", 444, None, 0, 1)), 0, -1):
        files = (1 << (13, 14, 15, 15, 16)[min(abi, 5) - 1]) - 1
        attributes = struct.pack("QQQ", files, 3 * (abi >= 4), 3 * (abi >= 6))
        try:
            ruleset = call("syscall", 444, attributes, len(attributes), 0)
            break
        except OSError as error:
            if abi == 1 or error.errno not in (errno.EINVAL, errno.E2BIG):
                raise
    read, listing = 4, 8  # of all that is below a path; names of installed packages can be listed, their files not read
    folders = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
    rules = {os.path.join(folder, name): read for folder in folders for name in os.listdir(folder)
             if name not in ("site-packages", "dist-packages")} | dict.fromkeys(folders, 0) | {"/usr/share/zoneinfo": read}
    for path, rights in rules.items():
        if os.path.exists(path):  # no link to nowhere; the machine may have no time zones
            at = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rights |= listing * os.path.isdir(path)
            call("syscall", 445, ruleset, 1, struct.pack("=Qi", rights, at), 0)  # PATH_BENEATH
            os.close(at)
    return ruleset, abi


def landlock():
    ruleset, abi = landlock_rules()
    call("syscall", 446, ruleset, 0)
    return f"abi{abi}"


def chroot():
    """Into a removed folder: as a root, nothing is in it and nothing can be put there."""
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    os.rmdir(folder)
    os.chroot(".")


def own_user(uid):
    """As root: become a user that nobody is. Then give up every capability (an own user namespace grants them all)."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))


def die_with_parent():
    call("prctl", 1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG


def user_namespace():
    """For who is not root: it grants what the other namespaces need, inside it."""
    uid, gid = os.geteuid(), os.getegid()
    call("unshare", 0x10000000)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def mapped():
    """Bytes of address space in use; without /proc a number that is not below it."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 1 << 30


def rlimits(memory, seconds, processes):
    """Those that this machine accepts, as text. memory: bytes of address space. processes: a limit of them too; it counts by
    user, so only where the user is the sandbox's own."""
    wanted = {"AS": memory, "CPU": math.ceil(seconds) + 1, "NOFILE": 64, "FSIZE": 0, "CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0}
    accepted = []
    for name, value in (wanted | ({"NPROC": 64} if processes else {})).items():
        try:
            number = getattr(resource, f"RLIMIT_{name}")
            hard = resource.getrlimit(number)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(number, (value, value))
            accepted.append(name.lower())
        except (AttributeError, OSError, ValueError):  # macOS has no limit of memory
            pass
    if not accepted:
        raise OSError("this machine accepts no limit")
    return " ".join(accepted)
