"""Is this machine ready? One line for each thing that a run needs: a verdict, what was found, and what to do about it.

    ok       as it should be
    note     works, with less than there could be
    problem  a run will fail: mend it first

Exit code 1 if anything is a problem. Nothing is written, downloaded or changed.

    python -m nanorlhf.doctor
    python -m nanorlhf.doctor --out /big/disk/runs
"""
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nanorlhf.config import option, parse
from nanorlhf.data import CONALA_SHA256, DATA, load_splits, sha256
from nanorlhf.errors import InputError
from nanorlhf.sandbox import Sandbox

ROOT = Path(__file__).resolve().parent.parent
PYTHON = (3, 11)
MEMORY_GB = (1, 4)  # the default job holds about 1 GB at its peak; below the first it fails, below the second it may
DISK_GB = (1, 10)  # the default job writes less than 0.1 GB; a checkpoint of gpt2-large, weights and two moments, takes 9.3 GB


@dataclass
class Config:
    """Is this machine ready? One line for each thing that a run needs."""
    out: str = option("runs", "the folder that runs will go to: its disk is looked at", group="Doctor", metavar="FOLDER")


class Line(NamedTuple):
    verdict: str  # "ok", "note" or "problem"
    what: str
    found: str
    fix: str = ""

    def __str__(self):
        return f"{self.verdict:<8} {self.what:<16} {self.found}" + (f"; {self.fix}" if self.fix else "")


# ---- Versions

def check_python():
    found = f"{platform.python_version()}, {platform.platform()}"
    if sys.version_info[:2] < PYTHON:
        return Line("problem", "Python", found, f"install Python {PYTHON[0]}.{PYTHON[1]} or newer")
    return Line("ok", "Python", found)


def requirements():
    """{package: [(">=", "2.6"), ("<", "2.14")]} as requirements.txt has them."""
    found = {}
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if name := re.match(r"[\w.-]+", line):
            found[name[0]] = re.findall(r"(>=|<=|==|<|>)\s*([\w.]+)", line.partition(";")[0])
    return found


def release(version):
    """"2.13.0+cpu" -> (2, 13, 0)."""
    return tuple(int(part) for part in re.match(r"\d+(?:\.\d+)*", version)[0].split("."))


def satisfies(version, bounds):
    """Whether a version such as "2.13.0+cpu" keeps to bounds such as [(">=", "2.6"), ("<", "2.14")]."""
    ours = release(version)
    for sign, bound in bounds:
        theirs = release(bound)
        width = max(len(ours), len(theirs))
        a, b = (part + (0,) * (width - len(part)) for part in (ours, theirs))
        if not {">=": a >= b, "<=": a <= b, "==": a == b, "<": a < b, ">": a > b}[sign]:
            return False
    return True


def check_package(name, bounds):
    """That a package is there, of a version that requirements.txt allows, and can be imported."""
    wanted = name + ",".join(sign + bound for sign, bound in bounds)
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if name == "triton":
            return Line("note", name, "not installed: torch's own definitions are used", f"on a GPU: pip install '{wanted}'")
        return Line("problem", name, "not installed", "pip install -r requirements.txt")
    if not satisfies(version, bounds):
        return Line("problem", name, f"{version}, this library wants {wanted}", "pip install -r requirements.txt")
    try:
        importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: a shared library that is missing
        return Line("problem", name, f"{version} cannot be imported ({str(error).splitlines()[0][:100]})", "install it again")
    return Line("ok", name, version)


# ---- Machine

def check_device(torch):
    """The GPU, or why there is none."""
    if torch.cuda.is_available():
        return [_gpu(torch, index) for index in range(torch.cuda.device_count())]
    if torch.version.cuda is None and _has_nvidia():
        return [Line("problem", "device", f"there is an NVIDIA GPU, and torch {torch.__version__} is built without CUDA",
                     "install torch's build for CUDA, or give --device cpu")]
    if _has_nvidia():
        return [Line("problem", "device", f"there is an NVIDIA GPU that torch {torch.__version__} (CUDA {torch.version.cuda}) does not "
                     "see", "look at nvidia-smi and at CUDA_VISIBLE_DEVICES; the driver may be too old for this CUDA")]
    return [Line("note", "device", f"no GPU ({platform.processor() or platform.machine()})",
                 "the default job takes minutes on a CPU; --preset research and production want a GPU")]


def _gpu(torch, index):
    free, total = torch.cuda.mem_get_info(index)
    properties = torch.cuda.get_device_properties(index)
    found = (f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
             f"{free / 2**30:.1f} of {total / 2**30:.1f} GB free, CUDA {torch.version.cuda}")
    if properties.major < 8:
        return Line("note", f"GPU {index}", found, "the kernels need 8.0: --kernels torch runs on it; bfloat16 is slow, leave --precision fp32")
    if free < total / 2:
        return Line("note", f"GPU {index}", found, "another process holds most of it (nvidia-smi): choose another with --gpu")
    return Line("ok", f"GPU {index}", found)


def _has_nvidia():
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def cores():
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_threads(torch):
    threads, allowed = torch.get_num_threads(), cores()
    found = f"{threads} thread{'s' * (threads > 1)} on {allowed} core{'s' * (allowed > 1)}"
    if threads > allowed:
        return Line("note", "threads", found, f"they get in each other's way: set OMP_NUM_THREADS={allowed}")
    if threads < allowed:
        return Line("note", "threads", found, f"OMP_NUM_THREADS={allowed} would use all" if "OMP_NUM_THREADS" in os.environ else "")
    return Line("ok", "threads", found)


def memory():
    """(available, total) bytes, a container's limit counted; None where the system does not say."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return None
    available, total = (1024 * int(fields[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is not None and limit < total:
        available, total = min(available, limit - (used or 0)), limit
    return available, total


def _number(path):
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None


def check_memory():
    if (found := memory()) is None:
        return Line("note", "memory", f"{platform.system()} does not say how much is free",
                    f"have {MEMORY_GB[1]} GB for the default job")
    available, total = (amount / 2**30 for amount in found)
    return _enough("memory", available, MEMORY_GB, f"{available:.1f} of {total:.1f} GB available", "close other programs, or lower "
                   "--micro-batch-size")


def _enough(what, gigabytes, limits, found, fix):
    verdict = "problem" if gigabytes < limits[0] else "note" if gigabytes < limits[1] else "ok"
    return Line(verdict, what, found, "" if verdict == "ok" else fix)


def check_disk(out):
    """Free space, and the right to write, where --out will be."""
    out = Path(out).absolute()
    parent = next(folder for folder in [out, *out.parents] if os.path.exists(folder))
    if not os.path.isdir(parent):
        return Line("problem", "disk", f"{parent} is a file", "give another folder to --out")
    if not os.access(parent, os.W_OK):
        return Line("problem", "disk", f"{parent} cannot be written to", "give another folder to --out")
    free = shutil.disk_usage(parent).free / 2**30
    return _enough("disk", free, DISK_GB, f"{free:.1f} GB free for {out}", "free some, or give a folder on another disk to --out")


# ---- What runs use

def check_sandbox():
    """The walls that this machine allows around generated code, and which of `Sandbox.REQUIRED` it does not."""
    try:
        with Sandbox(mode="weak", workers=1) as box:
            layers = box.layers
    except (OSError, RuntimeError) as error:
        return Line("problem", "sandbox", f"does not start ({error})", "pass --sandbox off: execution is then not measured")
    on = ", ".join(name if value is True else f"{name} {value}" for name, value in layers.items() if value) or "no wall"
    missing = [name for name in Sandbox.REQUIRED if not layers[name]]
    missing += [] if layers["landlock"] or layers["chroot"] else ["landlock or chroot"]
    if "seccomp" in missing:
        return Line("note", "sandbox", f"{on}; without {', '.join(missing)}", "code runs with --sandbox weak alone; read SECURITY.md first")
    if missing:
        return Line("note", "sandbox", f"{on}; without {', '.join(missing)}", "a newer Linux kernel, or fewer container limits, bring them")
    return Line("ok", "sandbox", on)


def check_nano():
    try:
        splits = load_splits("nano")
    except InputError as error:
        return Line("problem", "data nano", str(error), "restore it from the repository, or run data/nano/generate.py")
    return Line("ok", "data nano", ", ".join(f"{len(rows)} {name}" for name, rows in splits.named().items()))


def check_conala():
    """Whether CoNaLa's files are where `nanorlhf.data download` puts them, and are the official ones."""
    folder, command = DATA / "conala", "python -m nanorlhf.data download conala"
    absent = [name for name in CONALA_SHA256 if not (folder / name).is_file()]
    if absent:
        return Line("note", "data conala", f"no {' and '.join(absent)} in {folder}", f"to have it: {command}")
    wrong = [name for name, digest in CONALA_SHA256.items() if sha256(folder / name) != digest]
    if wrong:
        return Line("problem", "data conala", f"{' and '.join(wrong)} in {folder}: not the file of CoNaLa v1.1",
                    f"remove it, then: {command}")
    return Line("ok", "data conala", f"v1.1 in {folder}")


def check_hub():
    """The Hugging Face cache: pretrained models come from it, or into it."""
    from huggingface_hub import constants
    cache = Path(constants.HF_HUB_CACHE)
    held = sorted(path.name.removeprefix("models--").replace("--", "/") for path in cache.glob("models--*"))
    shown = (", ".join(held[:5]) + (f" and {len(held) - 5} more" if len(held) > 5 else "")) or "no models"
    found = f"{shown} in {cache}"
    if constants.HF_HUB_OFFLINE:
        return Line("ok" if held else "note", "Hugging Face", f"{found}; offline", "" if held else
                    "unset HF_HUB_OFFLINE to download models by name, or name local folders")
    parent = next(folder for folder in [cache, *cache.parents] if folder.exists())
    if not os.access(parent, os.W_OK):
        return Line("note", "Hugging Face", f"{found}; {parent} cannot be written to", "set HF_HOME to a folder that can")
    return Line("ok", "Hugging Face", f"{found}; others are downloaded")


# ---- All of it

def examine(config):
    """Every Line, in order. What needs a package that is missing is left out: its own line says so."""
    lines = [check_python()]
    lines += [check_package(name, bounds) for name, bounds in requirements().items()]
    usable = {line.what for line in lines if line.verdict != "problem"}
    if "torch" in usable:
        import torch
        lines += [*check_device(torch), check_threads(torch)]
    lines += [check_memory(), check_disk(config.out), check_sandbox(), check_nano(), check_conala()]
    if "huggingface_hub" in usable:
        lines.append(check_hub())
    return lines


def main(config):
    """Print the lines and the sum of them; returns the exit code."""
    lines = examine(config)
    for line in lines:
        print(line)
    problems = sum(line.verdict == "problem" for line in lines)
    print("ready" if not problems else f"{problems} problem{'s' * (problems > 1)}: a run may fail until mended")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(parse(Config, prog="python -m nanorlhf.doctor")))
