"""Checkpoints: folders that are there whole or not at all, and the state from which a run goes on to the last bit.

A folder is written under a temporary name on the same file system: the files, then manifest.json with each one's size and
sha256, all synced to the disk, then a rename, then a sync of the parent. A process killed at any moment leaves the old
folder, the new one, or a temporary one that `sweep` removes; a file damaged later no longer agrees with the manifest.

Of the state nothing is pickled: tensors go to trainer.safetensors, numbers to trainer.json.
"""
import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from nanorlhf.data import sha256
from nanorlhf.errors import InputError

MANIFEST, TENSORS, NUMBERS = "manifest.json", "trainer.safetensors", "trainer.json"
PARTIAL, OLD = ".partial", ".old"


# ---- Folders, whole or not at all

def write_folder(target, write):
    """`write(folder)` fills a temporary folder, which then takes the place of `target`; if it raises, `target` stays as it was."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (target.with_name(f".{target.name}{suffix}") for suffix in (PARTIAL, OLD))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write(partial)
        files = {str(path.relative_to(partial)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
                 for path in sorted(partial.rglob("*")) if path.is_file()}
        (partial / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n")
        for path in [*(partial / name for name in files), partial / MANIFEST, partial]:
            sync(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # on a full disk this is also what makes room again
        raise
    if target.exists():  # a folder that is not empty cannot be renamed over: for a moment only .old is there, which `sweep` puts back
        os.replace(target, old)
    os.replace(partial, target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def sweep(folder):
    """Remove what a killed `write_folder` left in a folder, and put back what it had set aside."""
    for path in Path(folder).glob(f".*{OLD}"):
        target = path.with_name(path.name[1:-len(OLD)])
        shutil.rmtree(path) if target.exists() else os.replace(path, target)
    for path in Path(folder).glob(f".*{PARTIAL}"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def damage(folder):
    """What is wrong with a written folder, in words; None if every file agrees with the manifest."""
    try:
        files = json.loads((Path(folder) / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, OSError):
        return f"{MANIFEST} cannot be read"
    for name, known in files.items():
        path = Path(folder) / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != known["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {known['bytes']}"
        if sha256(path) != known["sha256"]:
            return f"{name} has changed since it was written"
    return None


def step_folders(run_folder):
    """The folders checkpoints/step-N of a run, oldest first."""
    found = [path for path in (Path(run_folder) / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def newest(run_folder):
    """(the newest undamaged checkpoint of a run or None, [(newer checkpoint, what is wrong with it)])."""
    skipped = []
    for path in reversed(step_folders(run_folder)):
        fault = damage(path)
        if fault is None:
            return path, skipped
        skipped.append((path, fault))
    return None, skipped


def sync(path):
    """Force a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- The state of a run

def save_state(folder, optimizer, numbers):
    """Write the optimiser, the random generators and a dict of plain numbers beside a checkpoint's model."""
    save_file(optimizer_tensors(optimizer) | random_state(), Path(folder) / TENSORS, metadata={"format": "pt"})
    (Path(folder) / NUMBERS).write_text(json.dumps(numbers, indent=1) + "\n")


def load_state(folder, optimizer):
    """Restore optimiser and random generators from a checkpoint, and return its numbers. What is missing is an InputError."""
    tensors = load_file(Path(folder) / TENSORS)
    load_optimizer(optimizer, tensors, folder)
    restore_random(tensors, folder)
    return json.loads((Path(folder) / NUMBERS).read_text())


def optimizer_tensors(optimizer):
    """AdamW's state as {"optimizer/INDEX/exp_avg": tensor, ...}; the index counts parameters over all groups, in order."""
    return {f"optimizer/{index}/{name}": tensor.detach().contiguous()
            for index, state in optimizer.state_dict()["state"].items() for name, tensor in state.items()}


def load_optimizer(optimizer, tensors, source):
    """The inverse. Every parameter must find moments of its own shape, or none may have any (before the first step)."""
    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    state = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            index, _, field = rest.partition("/")
            state.setdefault(int(index), {})[field] = tensor
    fits = all(state[i]["exp_avg"].shape == shape for i, shape in enumerate(shapes) if i in state)
    if state and (len(state) != len(shapes) or not fits):
        raise InputError(f"{source}/{TENSORS}: {len(state)} optimiser states do not fit {len(shapes)} parameters: it is of another model")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def random_state():
    """The state of Python's, NumPy's and torch's global generators (CUDA's too where it is in use), as tensors."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    found = {"random/python": torch.tensor([version, *words]),
             "random/python_gauss": torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64),
             "random/numpy": torch.tensor([position, has_gauss, *keys.tolist()]),
             "random/numpy_gauss": torch.tensor([cached], dtype=torch.float64),
             "random/torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["random/cuda"] = torch.cuda.get_rng_state()
    return found


def restore_random(tensors, source):
    """Set the global generators from `random_state`'s tensors. One that is missing is an InputError: the run would not be the same."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    wanted = ["python", "python_gauss", "numpy", "numpy_gauss", "torch"] + ["cuda"] * cuda
    missing = [name for name in wanted if f"random/{name}" not in tensors]
    if missing == ["cuda"]:
        raise InputError(f"{source} was written by a run on the CPU, which a GPU cannot go on with as it would have: pass --device cpu")
    if missing:
        raise InputError(f"{source}/{TENSORS} lacks the state of the random generator {missing[0]}: the run cannot go on as it would "
                         "have; remove this checkpoint to resume from an older one")
    version, *words = tensors["random/python"].tolist()
    has_gauss, gauss = tensors["random/python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss if has_gauss else None))
    position, has_gauss, *keys = tensors["random/numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, tensors["random/numpy_gauss"].item()))
    torch.set_rng_state(tensors["random/torch"])
    if cuda:
        torch.cuda.set_rng_state(tensors["random/cuda"])


def stream(seed, use, number, device="cpu"):
    """A generator of its own for each use and number ("order" of epoch 3, "tokens" of step 17), made from the seed.

    What is drawn depends on these alone and not on what was drawn before, so a run that goes on in the middle draws the same.
    """
    digest = hashlib.sha256(f"{seed} {use} {number}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
