"""The doctor: one line a check, the right verdicts for machines that are not this one, and the exit code."""
import hashlib
import importlib.metadata
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanorlhf import doctor
from nanorlhf.config import parse
from nanorlhf.doctor import Line, check_package, release, satisfies

ROOT = Path(__file__).resolve().parent.parent


def config(*words):
    return parse(doctor.Config, argv=list(words))


def test_this_machine_from_the_command_line(tmp_path):
    """Exit 0 where nothing is a problem, else 1; every line has a verdict; nothing is written."""
    done = subprocess.run([sys.executable, "-m", "nanorlhf.doctor", "--out", str(tmp_path / "runs")], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    *lines, last = done.stdout.splitlines()
    assert done.stderr == "" and all(line.split()[0] in ("ok", "note", "problem") for line in lines)
    problems = sum(line.startswith("problem") for line in lines)
    assert done.returncode == (1 if problems else 0) and last.startswith(f"{problems} problem" if problems else "ready")
    for what in ("Python", "torch", "triton", "tokenizers", "safetensors", "numpy", "huggingface_hub", "threads", "memory",
                 "disk", "sandbox", "data nano", "data conala", "Hugging Face"):
        assert sum(line[9:].startswith(what + " ") for line in lines) == 1, what
    assert list(tmp_path.iterdir()) == []


def test_help_and_unknown_options(capsys):
    with pytest.raises(SystemExit) as exit:
        parse(doctor.Config, argv=["--help"], prog="python -m nanorlhf.doctor")
    out = capsys.readouterr().out
    assert exit.value.code == 0 and "usage: python -m nanorlhf.doctor" in out and "--out FOLDER" in out
    with pytest.raises(SystemExit) as exit:
        parse(doctor.Config, argv=["--fix"], prog="python -m nanorlhf.doctor")
    assert exit.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("verdicts, code, last", [
    (["ok", "note"], 0, "ready"), (["ok", "problem"], 1, "1 problem: "), (["problem"] * 2, 1, "2 problems: ")])
def test_exit_code(monkeypatch, capsys, verdicts, code, last):
    monkeypatch.setattr(doctor, "examine", lambda config: [Line(verdict, "x", "y", "z") for verdict in verdicts])
    assert doctor.main(config()) == code
    *lines, end = capsys.readouterr().out.splitlines()
    assert lines == [f"{verdict:<8} x                y; z" for verdict in verdicts] and end.startswith(last)


# ---- Versions

@pytest.mark.parametrize("version, bounds, good", [
    ("2.6.0", [(">=", "2.6"), ("<", "2.14")], True), ("2.5.9", [(">=", "2.6")], False), ("2.13.1+cpu", [("<", "2.14")], True),
    ("2.14.0", [("<", "2.14")], False), ("2.14", [("<", "2.14.0")], False), ("3", [(">=", "2.6")], True),
    ("1.0", [("==", "1")], True), ("1.0.1", [("==", "1.0")], False), ("2.10.0a0+git12", [(">=", "2.10")], True),
    ("1.2", [(">", "1.2")], False), ("1.2", [("<=", "1.2.0")], True)])
def test_versions_are_compared_as_numbers(version, bounds, good):
    """2.13 is above 2.6 although the text "2.13" is not."""
    assert satisfies(version, bounds) is good


def test_requirements_are_those_of_the_file():
    found = doctor.requirements()
    assert found["torch"] == [(">=", "2.6"), ("<", "2.14")] and found["triton"] == [(">=", "3.2")]
    assert set(found) == {"torch", "triton", "tokenizers", "huggingface_hub", "safetensors", "numpy", "tqdm", "matplotlib"}
    assert release("2.13.0+cpu") == (2, 13, 0)


def test_packages(monkeypatch, tmp_path):
    assert check_package("numpy", [(">=", "1.0")]).verdict == "ok"
    line = check_package("numpy", [(">=", "99")])
    assert line.verdict == "problem" and "numpy>=99" in line.found and "requirements.txt" in line.fix
    line = check_package("no_such_package_zq", [])
    assert (line.verdict, line.found) == ("problem", "not installed")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    (tmp_path / "broken_zq.py").write_text("import no_such_module_zq\n")
    monkeypatch.syspath_prepend(tmp_path)
    line = check_package("broken_zq", [])
    assert line.verdict == "problem" and "1.0 cannot be imported (No module named 'no_such_module_zq')" in line.found


def test_triton_may_be_missing(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)
    monkeypatch.setattr(importlib.metadata, "version", version)
    line = check_package("triton", [(">=", "3.2")])
    assert line.verdict == "note" and "triton>=3.2" in line.fix


def test_what_needs_a_missing_package_is_left_out(monkeypatch):
    monkeypatch.setattr(doctor, "check_package", lambda name, bounds: Line("problem", name, "not installed", "pip"))
    found = [line.what for line in doctor.examine(config())]
    assert "memory" in found and not {"device", "threads", "Hugging Face"} & set(found)


# ---- Machines that are not this one

def gpu(free, total=16, major=8):
    properties = SimpleNamespace(name="Some GPU", major=major, minor=0)
    cuda = SimpleNamespace(is_available=lambda: True, device_count=lambda: 1, get_device_properties=lambda index: properties,
                           mem_get_info=lambda index: (free * 2**30, total * 2**30))
    return SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="12.8"), __version__="2.13.0")


@pytest.mark.parametrize("machine, verdict, words", [
    (gpu(15), "ok", "15.0 of 16.0 GB free"), (gpu(3), "note", "another process"), (gpu(15, major=6), "note", "the kernels need 8.0"),
    (gpu(15, major=7), "note", "the kernels need 8.0")])
def test_gpus(machine, verdict, words):
    line, = doctor.check_device(machine)
    assert line.verdict == verdict and line.what == "GPU 0" and words in str(line)


@pytest.mark.parametrize("built, driver, verdict, words", [
    (None, False, "note", "no GPU"), (None, True, "problem", "built without CUDA"), ("12.8", True, "problem", "CUDA_VISIBLE_DEVICES"),
    ("12.8", False, "note", "no GPU")])
def test_without_a_usable_gpu(monkeypatch, built, driver, verdict, words):
    monkeypatch.setattr(doctor, "_has_nvidia", lambda: driver)
    machine = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False), version=SimpleNamespace(cuda=built), __version__="2.13.0")
    line, = doctor.check_device(machine)
    assert line.verdict == verdict and words in str(line)


@pytest.mark.parametrize("threads, allowed, verdict", [(4, 4, "ok"), (8, 4, "note"), (1, 4, "note")])
def test_threads(monkeypatch, threads, allowed, verdict):
    monkeypatch.setattr(doctor, "cores", lambda: allowed)
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    line = doctor.check_threads(SimpleNamespace(get_num_threads=lambda: threads))
    assert line.verdict == verdict and line.found == f"{threads} thread{'s' * (threads > 1)} on {allowed} cores"
    assert threads == allowed or f"OMP_NUM_THREADS={allowed}" in line.fix


@pytest.mark.parametrize("free, verdict", [(0.5, "problem"), (2, "note"), (8, "ok")])
def test_memory(monkeypatch, free, verdict):
    monkeypatch.setattr(doctor, "memory", lambda: (free * 2**30, 16 * 2**30))
    line = doctor.check_memory()
    assert line.verdict == verdict and line.found == f"{free:.1f} of 16.0 GB available" and bool(line.fix) is (verdict != "ok")


def test_memory_of_a_system_that_does_not_say(monkeypatch):
    monkeypatch.setattr(doctor, "memory", lambda: None)
    assert doctor.check_memory().verdict == "note"


def test_a_containers_limit_counts(monkeypatch):
    """12 GB of 16 are free, but the container may have 4 and uses 1: 3 of 4."""
    files = {"/proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 12582912 kB\n", "/sys/fs/cgroup/memory.max": f"{4 * 2**30}\n",
             "/sys/fs/cgroup/memory.current": f"{2**30}\n"}
    monkeypatch.setattr(Path, "read_text", lambda path, *_, **__: files[str(path)])
    monkeypatch.setattr(Path, "is_file", lambda path: str(path) in files)
    assert doctor.memory() == (3 * 2**30, 4 * 2**30)
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert doctor.memory() == (12 * 2**30, 16 * 2**30)


@pytest.mark.parametrize("free, verdict", [(0.5, "problem"), (5, "note"), (50, "ok")])
def test_disk(monkeypatch, tmp_path, free, verdict):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: namedtuple("Usage", "free")(free * 2**30))
    line = doctor.check_disk(tmp_path / "a" / "b")
    assert line.verdict == verdict and str(tmp_path / "a" / "b") in line.found and bool(line.fix) is (verdict != "ok")


def test_a_disk_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    assert doctor.check_disk(tmp_path / "file" / "runs").verdict == "problem"
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    line = doctor.check_disk(tmp_path / "runs")
    assert line.verdict == "problem" and "cannot be written to" in line.found and "--out" in line.fix


# ---- What runs use

class Box:
    """A sandbox with the given layers, which does not start where they are an error."""
    REQUIRED = ("seccomp", "own_user")

    def __init__(self, mode, workers):
        assert mode == "weak"

    def __enter__(self):
        if isinstance(self.layers, Exception):
            raise self.layers
        return self

    def __exit__(self, *_):
        return False


WALLS = {"seccomp": True, "own_user": True, "landlock": "abi7", "chroot": False}


@pytest.mark.parametrize("layers, verdict, words, fix", [
    (WALLS, "ok", "seccomp, own_user, landlock abi7", ""), (WALLS | {"landlock": False, "chroot": True}, "ok", "chroot", ""),
    (WALLS | {"landlock": False}, "note", "without landlock or chroot", "kernel"),
    (WALLS | {"own_user": False}, "note", "seccomp, landlock abi7; without own_user", "kernel"),
    (dict.fromkeys(WALLS, False), "note", "no wall; without seccomp, own_user, landlock or chroot", "--sandbox weak"),
    (OSError("no fork"), "problem", "does not start (no fork)", "--sandbox off")])
def test_sandbox(monkeypatch, layers, verdict, words, fix):
    monkeypatch.setattr(doctor, "Sandbox", type("Sandbox", (Box,), {"layers": layers}))
    line = doctor.check_sandbox()
    assert line.verdict == verdict and words in line.found and fix in line.fix


def test_conala(monkeypatch, tmp_path):
    """Absent: how to get it. Present with other bytes: a problem. The right bytes: ok."""
    monkeypatch.setattr(doctor, "DATA", tmp_path)
    line = doctor.check_conala()
    assert line.verdict == "note" and "download conala" in line.fix
    (tmp_path / "conala").mkdir()
    for name in doctor.CONALA_SHA256:
        (tmp_path / "conala" / name).write_bytes(b"[]")
    line = doctor.check_conala()
    assert line.verdict == "problem" and "conala-train.json and conala-test.json" in line.found
    monkeypatch.setattr(doctor, "CONALA_SHA256", dict.fromkeys(doctor.CONALA_SHA256, hashlib.sha256(b"[]").hexdigest()))
    assert doctor.check_conala().verdict == "ok"


def test_nano(monkeypatch, tmp_path):
    assert doctor.check_nano().verdict == "ok" and "train" in doctor.check_nano().found
    monkeypatch.setattr("nanorlhf.data.DATA", tmp_path)
    line = doctor.check_nano()
    assert line.verdict == "problem" and "generate.py" in line.fix


def test_hugging_face(monkeypatch, tmp_path):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = doctor.check_hub()
    assert line.verdict == "note" and "no models" in line.found and "HF_HUB_OFFLINE" in line.fix
    for name in ("gpt2", "microsoft--codebert-base"):
        (tmp_path / "hub" / f"models--{name}").mkdir(parents=True)
    assert doctor.check_hub() == Line("ok", "Hugging Face", f"gpt2, microsoft/codebert-base in {tmp_path / 'hub'}; offline")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert doctor.check_hub().verdict == "ok"
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert doctor.check_hub().verdict == "note" and "HF_HOME" in doctor.check_hub().fix


def test_an_old_python(monkeypatch):
    monkeypatch.setattr(doctor, "PYTHON", (99, 0))
    assert doctor.check_python().verdict == "problem" and "99.0" in doctor.check_python().fix


def test_a_machine_without_torchs_gpu_is_not_a_problem():
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    assert all(line.verdict == "note" or "NVIDIA" in line.found for line in doctor.check_device(torch))
