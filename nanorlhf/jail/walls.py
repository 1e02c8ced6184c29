"""The walls around a process, as the kernel builds them: system calls, files, user, limits. Linux, but for limits.

A function that builds a wall builds it for the calling process, which cannot take it down again; OSError says why it
could not.
Numbers of system calls are <x86-64 aarch64>, from the kernel's unistd.h; the machine is little-endian on both.
"""

import ctypes
import errno
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
LAYERS = ("no_new_privs", "user_namespace", "net_namespace", "ipc_namespace", "pid_namespace", "subreaper", "rlimits",
          "landlock", "chroot", "own_user", "undumpable", "seccomp")


# ---- system calls

ARCH = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}.get(platform.machine()) if LINUX else None
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
OPEN_FOR_WRITING = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC
# name, numbers, argument, test of it, operand, errno where the test fails
TESTED = [("open", (2, None), 1, "no bit", OPEN_FOR_WRITING, errno.EPERM),
          ("openat", (257, 56), 2, "no bit", OPEN_FOR_WRITING, errno.EPERM),
          ("clone", (56, 220), 0, "any bit", 0x10000, errno.EPERM),  # CLONE_THREAD: threads, never processes
          ("fcntl", (72, 25), 1, "no bit", 8, errno.EPERM),  # 8-15: signals to the owner of a descriptor
          ("prlimit64", (302, 261), 2, "equals", 0, errno.EPERM),  # reading limits, never setting them
          ("sendto", (44, 206), 4, "equals", 0, errno.EPERM),  # to the connected peer, never to an address
          ("socketpair", (53, 199), 0, "equals", 1, errno.EPERM),  # AF_UNIX: what asyncio wakes itself with
          ("ioctl", (16, 29), 1, "equals", 0x5421, errno.ENOTTY),  # FIONBIO: what setblocking does
          ("clone3", (435, 435), 0, "never", 0, errno.ENOSYS)]  # the C library turns to clone


def seccomp_program(files=True, extra=()):
    """The BPF program: an allow-list of system calls, a few by argument; all others fail with EPERM, another ABI kills.

    struct seccomp_data: number at 0, architecture at 4, argument i at 16 + 8 i (little-endian, low word first).
    """
    if not ARCH:
        raise OSError("there is no table of system calls for this processor")
    column, audit = ARCH
    allow, load, equal, anyset, back = 0x7FFF0000, 0x20, 0x15, 0x45, 0x06  # RET_ALLOW; BPF_LD|W|ABS, JEQ, JSET, RET
    refuse = 0x00050000  # RET_ERRNO
    code = [(load, 0, 0, 4), (equal, 1, 0, audit), (back, 0, 0, 0x80000000), (load, 0, 0, 0)]
    for name, pair, argument, test, operand, error in TESTED:
        if pair[column] is None or not files and name.startswith("open"):
            continue
        low, at = operand & 0xFFFFFFFF, 16 + 8 * argument
        yes, no = (back, 0, 0, allow), (back, 0, 0, refuse | error)
        block = {"no bit": [(load, 0, 0, at), (anyset, 0, 1, low), no, yes],
                 "any bit": [(load, 0, 0, at), (anyset, 0, 1, low), yes, no],
                 "equals": [(load, 0, 0, at), (equal, 0, 3, low), (load, 0, 0, at + 4),
                            (equal, 0, 1, operand >> 32), yes, no],
                 "never": [no]}[test]
        code += [(equal, 0, len(block), pair[column]), *block]
    numbers = [line.split()[1 + column] for line in CALLS.replace("\n", " ").split(", ")]
    numbers = [int(n) for n in numbers if n != "-"] + [pair[column] for pair in extra]
    code += [(equal, left, 0, number) for left, number in zip(range(len(numbers), 0, -1), numbers)]  # jumps to the last
    code += [(back, 0, 0, refuse | errno.EPERM), (back, 0, 0, allow)]
    return b"".join(struct.pack("HBBI", *each) for each in code)


def call(name, *args):
    """A C library call; OSError with its cause."""
    result = getattr(LIBRARY, name)(*[ctypes.c_ulong(a) if isinstance(a, int) else a for a in args])
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def install_seccomp(program):
    buffer = ctypes.create_string_buffer(program, len(program))
    call("prctl", 22, 2, struct.pack("HP", len(program) // 8, ctypes.addressof(buffer)), 0, 0)  # PR_SET_SECCOMP, FILTER


# ---- files, users, processes

def landlock_rules(readable):
    """(descriptor of a ruleset, "abi<version>"): refuse all files but those of `readable`, {path: "read" | "list"} with
    all below, TCP, abstract sockets and signals to the outside, as far as this kernel knows them."""
    version = call("syscall", 444, None, 0, 1)
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    attributes = [struct.pack("QQQ", files, 3, 3), struct.pack("QQ", files, 3), struct.pack("Q", files)]
    attributes = attributes[0 if version >= 6 else 1 if version >= 4 else 2:] + [struct.pack("Q", (1 << 13) - 1)]
    while True:
        attribute = attributes.pop(0)
        try:
            ruleset = call("syscall", 444, attribute, len(attribute), 0)
            break
        except OSError as error:  # a kernel that knows less than its version says
            if error.errno not in (errno.EINVAL, errno.E2BIG) or not attributes:
                raise
    read, listed = 4, 8  # READ_FILE, READ_DIR
    for path, rights in readable.items():
        rights = {"list": listed, "read": read | listed if os.path.isdir(path) else read}[rights]
        at = os.open(path, os.O_PATH | os.O_CLOEXEC)
        call("syscall", 445, ruleset, 1, struct.pack("=Qi", rights, at), 0)  # PATH_BENEATH
        os.close(at)
    return ruleset, f"abi{version}"


def enter_landlock(ruleset):
    call("syscall", 446, ruleset, 0)


def stand_in_empty_folder():
    """A removed one: as a root, nothing is in it and nothing can be put there."""
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    os.rmdir(folder)


def drop_user(uid):
    """As root: become a user that nobody is. Then give up every capability (an own user namespace grants them all)."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))


def die_with(parent):
    """Be killed when the parent ends; OSError if it has ended already."""
    call("prctl", 1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        raise OSError(errno.ESRCH, "the parent has ended")


def own_user_namespace():
    uid, gid = os.geteuid(), os.getegid()
    call("unshare", 0x10000000)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True


def try_in_fork(action, *args):
    """Try an irrevocable step in a child; OSError with its cause. RuntimeError where it could not be tried: a machine that
    is short of processes does not lack the wall."""
    try:
        pid = os.fork()
    except OSError as error:
        raise RuntimeError(f"the sandbox can start no process: {error}") from None
    if pid == 0:
        code = errno.EINVAL
        try:
            action(*args)
            code = 0
        except OSError as error:
            code = error.errno or code
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code < 0:
        raise RuntimeError(f"a process of the sandbox was ended by signal {-code} while it tried a wall")
    if code:
        raise OSError(code, os.strerror(code))


def libraries():
    """What may be read: the standard library and the time zones. Packages that are installed below it may be listed."""
    found = {"/usr/share/zoneinfo": "read"}
    for folder in map(sysconfig.get_path, ("stdlib", "platstdlib")):
        found |= {folder: "list"} | {os.path.join(folder, name): "read" for name in os.listdir(folder)
                                     if name not in ("site-packages", "dist-packages")}
    return {path: rights for path, rights in found.items() if os.path.exists(path)}


def limits(memory, seconds, own_user):
    """A child's rlimits that this machine accepts, {name: (soft, hard)}; memory counts from what is mapped now."""
    try:
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
    except FileNotFoundError:
        mapped = 128 << 20
    wanted = {"AS": mapped + memory, "CPU": math.ceil(seconds) + 1, "NOFILE": 64,
              "FSIZE": 0, "CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0}
    if own_user:
        wanted["NPROC"] = 64  # counts by user, so only where the user is the sandbox's own
    accepted = {}
    for name in wanted:
        number = getattr(resource, f"RLIMIT_{name}", None)
        if number is None:
            continue
        hard = resource.getrlimit(number)[1]
        value = wanted[name] if hard == resource.RLIM_INFINITY else min(wanted[name], hard)
        try:
            try_in_fork(resource.setrlimit, number, (value, value))
        except OSError:  # macOS has no limit of memory
            continue
        accepted[name] = (value, value)
    if not accepted:
        raise OSError("this machine accepts no limit")
    return accepted


# ---- what is on

class Off(str):
    """A layer that is off: the cause as text, and false."""

    def __bool__(self):
        return False


class Layers(dict):
    """What is on; `wall(name, build)` tries one layer and records True, a word, or `Off` with the cause."""

    def __init__(self, without):
        super().__init__()
        self.without = without

    def wall(self, name, build, *args):
        """Build it unless it is to be left out; its state, which is true where it is on."""
        try:
            if name in self.without:
                raise OSError("left out on request")
            if not LINUX and name != "rlimits":
                raise OSError(f"{sys.platform} has none, it needs Linux")
            self[name] = build(*args) or True
        except (OSError, AttributeError, TypeError) as error:  # the C library or the machine lacks the call
            self[name] = Off(f"off: {error}")
        return self[name]
