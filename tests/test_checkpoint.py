"""Checkpoints: folders whole or not at all, damage of every kind found, exact resume of all four trainers, signals."""
import importlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nanorlhf import checkpoint
from nanorlhf.checkpoint import (damage, load_optimizer, newest, optimizer_tensors, random_state, restore_random, step_folders,
                                 stream, sweep, write_folder)
from nanorlhf.config import parse
from nanorlhf.errors import InputError
from nanorlhf.run import main

ROOT = Path(__file__).resolve().parent.parent


def fill(text):
    def write(folder):
        (folder / "a").write_text(text)
        (folder / "deep").mkdir()
        (folder / "deep" / "b").write_text(text * 2)
    return write


def content(folder):
    return (folder / "a").read_text(), (folder / "deep" / "b").read_text()


# ------------------------------------------------------------------------------------------------------------- folders

def test_a_written_folder_is_whole_and_verified(tmp_path):
    write_folder(tmp_path / "x", fill("1"))
    assert content(tmp_path / "x") == ("1", "11") and damage(tmp_path / "x") is None
    write_folder(tmp_path / "x", fill("2"))
    assert content(tmp_path / "x") == ("2", "22") and damage(tmp_path / "x") is None
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_all_is_on_the_disk_before_the_name_is_taken(tmp_path, monkeypatch):
    """A crash of the machine, too, leaves the old folder or the new one: files, manifest and folder are synced before the rename,
    the parent after it."""
    done, fsync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.fstat(fd).st_ino), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("rename"), rename(*names)))
    write_folder(tmp_path / "x", fill("1"))
    inside = {path.stat().st_ino for path in [tmp_path / "x", *(tmp_path / "x").rglob("*")] if path.name != "deep"}
    assert done.index("rename") == len(done) - 2 and inside <= set(done[:-2]) and done[-1] == tmp_path.stat().st_ino


class Killed(BaseException):
    """Stands in for kill -9: nothing of ours runs after it."""


@pytest.mark.parametrize("moment", range(40))
def test_killed_at_any_system_call_nothing_is_lost(tmp_path, monkeypatch, moment):
    """The process dies before its n-th rename, sync, delete or file write: after `sweep` there is the old folder or the new one,
    whole, and nothing else."""
    write_folder(tmp_path / "x", fill("old"))
    calls = iter(range(1000))

    def dying(function):
        def call(*args, **kwargs):
            if next(calls) >= moment:
                raise Killed
            return function(*args, **kwargs)
        return call
    with monkeypatch.context() as patch:
        for owner, name in ((os, "replace"), (os, "fsync"), (os, "mkdir"), (Path, "write_text"), (shutil, "rmtree"), (os, "open")):
            patch.setattr(owner, name, dying(getattr(owner, name)))
        try:
            write_folder(tmp_path / "x", fill("new"))
            finished = True
        except Killed:
            finished = False
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and damage(tmp_path / "x") is None
    assert content(tmp_path / "x") in ((("new", "newnew"),) if finished else (("old", "oldold"), ("new", "newnew")))


DAMAGES = {
    "a missing": lambda folder: (folder / "a").unlink(),
    "a truncated": lambda folder: (folder / "a").write_text(""),
    "a has changed": lambda folder: (folder / "a").write_text("2"),
    "deep/b missing": lambda folder: shutil.rmtree(folder / "deep"),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "manifest unreadable": lambda folder: (folder / "manifest.json").write_text("{"),
    "manifest of something else": lambda folder: (folder / "manifest.json").write_text("[1]"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found_and_an_older_checkpoint_taken(tmp_path, kind):
    """step-100 is damaged: step-20 is the newest good one, and what was skipped is named with its fault."""
    for step in (3, 20, 100):
        write_folder(tmp_path / "checkpoints" / f"step-{step}", fill("1"))
    DAMAGES[kind](tmp_path / "checkpoints" / "step-100")
    found, skipped = newest(tmp_path)
    assert found.name == "step-20" and [path.name for path, _ in skipped] == ["step-100"]
    assert skipped[0][1] and kind.split()[0] in skipped[0][1] or kind.startswith("no")


def test_no_checkpoint_at_all(tmp_path):
    assert newest(tmp_path) == (None, []) and step_folders(tmp_path) == []
    (tmp_path / "checkpoints" / "step-2 (copy)").mkdir(parents=True)  # not ours
    assert newest(tmp_path) == (None, [])


# --------------------------------------------------------------------------------------------------------------- state

def trained(seed=0, steps=3):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW([{"params": list(model.parameters())[:2], "weight_decay": 0.1},
                                   {"params": list(model.parameters())[2:]}], lr=0.1)
    for _ in range(steps):
        model(torch.randn(5, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_the_optimiser_goes_on_bit_by_bit():
    model, optimizer = trained()
    other, fresh = trained(steps=0)
    other.load_state_dict(model.state_dict())
    load_optimizer(fresh, {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer).items()}, "x")
    for m, o in ((model, optimizer), (other, fresh)):
        torch.manual_seed(9)
        m(torch.randn(5, 3)).sum().backward()
        o.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    assert len(optimizer_tensors(optimizer)) == 18, "6 parameters: step, exp_avg, exp_avg_sq"


def test_an_optimiser_of_another_model_is_refused():
    _, optimizer = trained()
    small = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], lr=0.1)
    with pytest.raises(InputError, match="6 optimiser states do not fit 1 parameters"):
        load_optimizer(small, optimizer_tensors(optimizer), "x")
    wrong = {name: tensor[..., :1] if tensor.dim() else tensor for name, tensor in optimizer_tensors(optimizer).items()}
    with pytest.raises(InputError, match="another model"):
        load_optimizer(trained(steps=0)[1], wrong, "x")
    fewer = {name: tensor for name, tensor in optimizer_tensors(optimizer).items() if not name.startswith("optimizer/5/")}
    with pytest.raises(InputError, match="5 optimiser states do not fit 6 parameters"):
        load_optimizer(trained(steps=0)[1], fewer, "x")


def draws():
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()


def test_three_global_generators_go_on():
    """Also in the middle of a pair of Gaussian draws, of which the second is kept for later."""
    random.gauss(0, 1), np.random.randn()
    state = {name: tensor.clone() for name, tensor in random_state().items()}
    expected = draws()
    assert draws() != expected
    restore_random(state, "x")
    assert draws() == expected


@pytest.mark.parametrize("name", ["python", "python_gauss", "numpy", "numpy_gauss", "torch"])
def test_a_generator_that_cannot_be_restored_is_an_error(name):
    state = random_state()
    del state[f"random/{name}"]
    with pytest.raises(InputError, match=f"x/trainer.safetensors lacks the state of the random generator {name}"):
        restore_random(state, "x")


def test_streams_differ_by_seed_use_and_number_and_by_nothing_else():
    first = torch.rand(4, generator=stream(0, "order", 1))
    torch.rand(3)
    assert torch.equal(first, torch.rand(4, generator=stream(0, "order", 1)))
    for other in (stream(1, "order", 1), stream(0, "tokens", 1), stream(0, "order", 2)):
        assert not torch.equal(first, torch.rand(4, generator=other))


# ------------------------------------------------------------------------------------------------------- exact resume

TEXT = ["--max-query", "20", "--max-response", "8", "--device", "cpu"]
STAGES = {
    "sft": ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--vocab-size", "290", "--dropout", "0.1", "--epochs", "2",
            "--batch-size", "10", "--micro-batch-size", "3", "--lr", "0.01", "--eval-rows", "4"],
    "reward": ["--samples", "1", "--pair-rows", "20", "--epochs", "2", "--batch-size", "8", "--micro-batch-size", "3"],
    "ppo": ["--steps", "6", "--batch-size", "8", "--minibatch-size", "4", "--micro-batch-size", "3", "--eval-every", "2",
            "--eval-rows", "4", "--kl-target", "0.1", "--kl-horizon", "100", "--lr", "0.002", "--reward", "{home}/runs/reward"],
    "dpo": ["--epochs", "2", "--batch-size", "8", "--micro-batch-size", "3", "--eval-every", "2", "--eval-rows", "4", "--lr", "0.001",
            "--reward", "{home}/runs/reward"],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Ragged data, and every stage trained without an interruption: runs/sft, reward, ppo, dpo. --save-steps 2 keeps all
    checkpoints."""
    home = tmp_path_factory.mktemp("home")
    names = ["xs", "rows", "items", "names", "words", "values"]
    rows = [{"id": f"{name}{number}", "prompt": "please " * (number % 3) + f"add {number} to {name}",
             "reference": f"{name} + {number}" + " + 1" * (number % 2)} for number in range(10) for name in names]
    (home / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for stage in STAGES:
        assert launch(home, stage, home / "runs" / stage) == 0
    return home


def words(home, stage, out):
    return ["--data", str(home / "data.jsonl"), "--out", str(out), "--save-steps", "2", "--keep-checkpoints", "99", *TEXT,
            *(word.format(home=home) for word in STAGES[stage])]


def launch(home, stage, out, *more):
    """A script in this process; returns its exit code. Figures are left out."""
    module = importlib.import_module(f"train_{stage}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, f"plot_{stage}", lambda folder: None)
        try:
            main(module.train, parse(module.Config, module.PRESETS, words(home, stage, out) + list(more), prog=f"train_{stage}.py"))
        except SystemExit as exit:
            return exit.code
    return 0


def log(folder, name="metrics.jsonl"):
    """The lines of a log, times left out."""
    return [{key: value for key, value in json.loads(line).items() if not key.startswith("time/")}
            for line in (folder / name).read_text().splitlines()]


def tensors(folder):
    """Every tensor below a folder: weights, optimiser, random generators."""
    return {str(path.relative_to(folder)): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}


def equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].keys() == right[name].keys()
        for key in left[name]:
            assert torch.equal(left[name][key], right[name][key]), f"{name}: {key}"
    return True


def interrupted(home, stage, out, step):
    """A copy of the finished run as SIGKILL would have left it some time after it wrote checkpoints/step-`step`: later
    checkpoints gone, log lines of later steps there, best/ of a later step, no final/ and no results."""
    shutil.copytree(home / "runs" / stage, out)
    for path in step_folders(out):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    shutil.rmtree(out / "final")
    (out / "results.json").unlink()
    text = (out / "config.toml").read_text().replace(f'out = "{home}/runs/{stage}"', f'out = "{out}"')
    (out / "config.toml").write_text(text)
    (out / "checkpoints" / ".step-99.partial").mkdir()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("step", [2, 4])
def test_resumed_is_uninterrupted(home, tmp_path, capsys, stage, step):
    """N steps = k steps, kill, resume, N - k steps: equal weights, optimiser and generators in every later checkpoint, in best/ and
    in final/; equal logs line by line; equal results. With ragged rows, micro-batches, dropout (SFT) and an adaptive KL
    coefficient (PPO)."""
    out = tmp_path / "runs" / stage
    out.parent.mkdir()
    for other in ("sft", "reward"):
        if other != stage:
            (out.parent / other).symlink_to(home / "runs" / other)
    interrupted(home, stage, out, step)
    torch.rand(7), random.random()  # a new process is elsewhere in its generators
    assert launch(home, stage, out, "--resume") == 0
    assert f"resuming from {out}/checkpoints/step-{step}" in capsys.readouterr().out
    whole = home / "runs" / stage
    assert equal(tensors(whole), tensors(out)) and len(tensors(whole)) >= 8
    assert log(whole) == log(out) and len(log(whole)) > step
    for name in {"reward": ["preferences.jsonl"], "sft": ["samples.jsonl"]}.get(stage, ["samples.jsonl", "answers.jsonl"]):
        assert log(whole, name) == log(out, name), name
    first, second = (json.loads((folder / "results.json").read_text()) for folder in (whole, out))
    for name in ("seconds", "peak_memory_mb"):
        first.pop(name), second.pop(name)
    assert first == second
    assert not list(out.rglob("*.partial"))


def test_a_damaged_checkpoint_is_skipped_and_named(home, tmp_path, capsys):
    out = tmp_path / "sft"
    interrupted(home, "sft", out, 4)
    with open(out / "checkpoints" / "step-4" / "trainer.safetensors", "r+b") as file:
        file.seek(200)
        file.write(b"\x00\x01")
    assert launch(home, "sft", out, "--resume") == 0
    shown = capsys.readouterr().out
    assert "step-4: trainer.safetensors has changed since it was written" in shown and "resuming from" in shown
    assert equal(tensors(home / "runs" / "sft" / "final"), tensors(out / "final"))


def test_changed_options_are_named_and_must_be_allowed(home, tmp_path, capsys):
    out = tmp_path / "sft"
    interrupted(home, "sft", out, 4)
    assert launch(home, "sft", out, "--resume", "--lr", "0.02") == 2
    error = capsys.readouterr().err
    assert "lr: 0.01 there, 0.02 here" in error and "--allow-config-change" in error and error.count("\n") == 1
    assert launch(home, "sft", out, "--resume", "--lr", "0.02", "--allow-config-change") == 0
    assert "resumed with changed options: lr: 0.01 there, 0.02 here" in capsys.readouterr().out
    assert "lr = 0.02" in (out / "config.toml").read_text()


def test_a_run_cannot_be_made_shorter_than_it_is(home, tmp_path, capsys):
    """It used to end at once, with a best/ of a later step as final/, and an infinite best score. Nothing is touched."""
    out = tmp_path / "sft"
    interrupted(home, "sft", out, 6)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert launch(home, "sft", out, "--resume", "--epochs", "1", "--allow-config-change") == 2
    assert "step-6 is at step 6, and these options ask for 5: ask for more" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert launch(home, "sft", out, "--resume") == 0
    assert equal(tensors(home / "runs" / "sft" / "final"), tensors(out / "final"))


def test_options_that_are_newer_than_a_run_are_no_change(home, tmp_path, capsys):
    """A run made before an option existed had its default. Nor is one whose options leave it as long as it is: it ends."""
    out = tmp_path / "sft"
    interrupted(home, "sft", out, 10)
    path = out / "config.toml"
    path.write_text(path.read_text().replace("generation_batch_size = 256", ""))
    assert launch(home, "sft", out, "--resume", "--micro-batch-size", "2", "--allow-config-change") == 0
    assert "changed options: micro_batch_size: 3 there, 2 here\n" in capsys.readouterr().out
    assert math.isfinite(json.loads((out / "results.json").read_text())["validation_loss"])
    assert equal(tensors(home / "runs" / "sft" / "final"), tensors(out / "final"))


def test_resume_and_overwrite_together(home, tmp_path, capsys):
    """The same options: gone on with. Others: replaced. So a stage's command can be repeated as it is."""
    out = tmp_path / "sft"
    interrupted(home, "sft", out, 4)
    assert launch(home, "sft", out, "--resume", "--overwrite") == 0
    assert "resuming from" in capsys.readouterr().out
    interrupted(home, "sft", tmp_path / "again", 4)
    assert launch(home, "sft", tmp_path / "again", "--resume", "--overwrite", "--seed", "3") == 0
    assert "resuming from" not in capsys.readouterr().out


def test_resume_where_there_is_nothing(home, tmp_path, capsys):
    assert launch(home, "sft", tmp_path / "new", "--resume") == 2
    assert "holds no run" in capsys.readouterr().err and not (tmp_path / "new").exists()
    assert launch(home, "sft", home / "runs" / "sft", "--resume") == 0
    assert "finished already" in capsys.readouterr().out
    out = tmp_path / "sft"
    interrupted(home, "sft", out, 0)
    assert launch(home, "sft", out, "--resume") == 0
    assert "starting from the beginning" in capsys.readouterr().out
    assert equal(tensors(home / "runs" / "sft" / "final"), tensors(out / "final"))


def test_a_log_that_lost_lines_is_not_gone_on_with(home, tmp_path, capsys):
    out = tmp_path / "sft"
    interrupted(home, "sft", out, 4)
    (out / "metrics.jsonl").unlink()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert launch(home, "sft", out, "--resume") == 2
    assert "metrics.jsonl is shorter than at" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}, "refused, and nothing touched"


# ------------------------------------------------------------------------------------------------------------- signals

def start(home, stage, out, *more):
    """A script in a process of its own, once it has logged its second step."""
    process = subprocess.Popen([sys.executable, f"train_{stage}.py", *words(home, stage, out), *more], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        if (out / "metrics.jsonl").exists() and len(log(out)) >= 2:
            return process
        time.sleep(0.005)
    raise AssertionError(process.communicate())


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(home, tmp_path, signum, code):
    out = tmp_path / "sft"
    process = start(home, "sft", out, "--epochs", "200", "--save-steps", "0")
    process.send_signal(signum)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    last = error.strip().splitlines()[-1]
    assert last.startswith(f"train_sft.py: {signum.name}: stopped after step ") and "Traceback" not in error
    assert last.endswith(f"go on with: python train_sft.py --config {out}/config.toml --resume")
    step = int(last.split("step ")[1].split(";")[0])
    found, skipped = newest(out)
    assert found.name == f"step-{step}" and not skipped and log(out)[-1]["step"] == step


def test_a_killed_run_is_gone_on_with(home, tmp_path):
    """SIGKILL at whatever moment, the resume command, the same end as without."""
    out = tmp_path / "sft"
    process = start(home, "sft", out)
    process.kill()
    process.communicate()
    assert launch(home, "sft", out, "--resume") == 0
    assert equal(tensors(home / "runs" / "sft" / "final"), tensors(out / "final")) and log(home / "runs" / "sft") == log(out)


def test_two_processes_do_not_share_a_folder(home, tmp_path, capsys):
    out = tmp_path / "sft"
    process = start(home, "sft", out, "--epochs", "200")
    try:
        assert launch(home, "sft", out, "--epochs", "200", "--overwrite") == 2
        assert "another process is writing this run" in capsys.readouterr().err
        assert (out / "config.toml").is_file()
    finally:
        process.kill()
        process.communicate()


# ------------------------------------------------------------------------------------------------------------ dry runs

@pytest.mark.parametrize("stage", STAGES)
def test_a_dry_run_tries_everything_and_keeps_nothing(home, tmp_path, capsys, monkeypatch, stage):
    """Beside finished stages, which it uses and leaves as they are; a line says how much memory it took."""
    out = tmp_path / "runs" / stage
    out.parent.mkdir()
    for other in ("sft", "reward"):
        if other != stage:
            (out.parent / other).symlink_to(home / "runs" / other)
    scratch = tmp_path / "tmp"  # of its own: other processes try runs too
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    before = sorted(path.name for path in out.parent.iterdir())
    assert launch(home, stage, out, "--dry-run") == 0
    assert sorted(path.name for path in out.parent.iterdir()) == before and list(scratch.iterdir()) == []
    shown = capsys.readouterr().out
    assert f"dry run of {out}: every phase went through one step" in shown and "MB of memory" in shown


def test_a_dry_run_finds_what_would_fail(home, tmp_path, capsys):
    assert launch(home, "ppo", tmp_path / "ppo", "--dry-run", "--max-response", "2000", "--policy", str(home / "runs" / "sft")) == 2
    assert "positions" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------------------- status

def test_status_names_the_terms_of_a_sum():
    """"eval/execution" (gold) and "eval/reward/execution" (a term) were both called execution."""
    from nanorlhf.status import numbers
    row = {"eval/execution": 0.5, "eval/reward/execution": 0.25, "objective/kl_coef": 0.2, "eval/exact_match": 1.0}
    assert numbers(row, row) == "execution 0.5, reward/execution 0.25, kl coef 0.2, exact match 1"


def test_status_by_hand(tmp_path, monkeypatch):
    """4 of 10 steps in 60 seconds: 15 a step, 90 for the other 6. Evaluations and alarms are no steps; the last five alarms are shown."""
    from nanorlhf import status
    (tmp_path / "config.toml").touch()
    (tmp_path / "progress.json").write_text('{"total_steps": 10}')
    rows = [{"step": 4, "loss": 0.5, "time/run": 60.0}, {"step": 4, "eval/loss": 0.25, "time/run": 61.0}]
    rows += [{"step": 4, "alarm": "kl", "message": f"number {number}", "time/run": 62.0} for number in range(6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines, code = status.status(tmp_path)
    assert code == 1 and lines[0].endswith("stopped before its end: the same command with --resume goes on")
    assert lines[1:] == ["step 4 of 10 (40%) after 0:01:00", "latest step 4: loss 0.5", "latest evaluation, step 4: loss 0.25",
                         *(f"ALARM number {number}" for number in range(1, 6)), "no checkpoint yet"]
    with monkeypatch.context() as patch:
        patch.setattr(status, "in_use", lambda folder: True)
        lines, code = status.status(tmp_path)
        assert code == 0 and ", about 0:01:30 of training left; last line " in lines[1]
    (tmp_path / "results.json").touch()
    lines, code = status.status(tmp_path)
    assert code == 0 and lines[1] == "step 4 of 10 (40%) after 0:01:00, and ended there: by --patience or --on-alarm stop"
    (tmp_path / "progress.json").write_text('{"total_steps": 4}')
    assert status.status(tmp_path)[0][1] == "step 4 of 4 (100%) after 0:01:00"
    assert status.main([]) == status.main(["a", "b"]) == status.main(["--all"]) == 2 and status.main(["--help"]) == 0
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "config.toml").touch()
    with pytest.raises(InputError, match="name a run folder"):
        status.status(tmp_path / "other")  # no process holds the run beside it


def test_status_of_a_finished_a_running_and_a_stopped_run(home, tmp_path, capsys):
    from nanorlhf.status import main as status
    assert status([str(home / "runs" / "ppo")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].endswith("ppo: finished") and shown[1].startswith("step 6 of 6 (100%) after 0:")
    assert "score" in shown[2] and "kl" in shown[2] and shown[3].startswith("latest evaluation, step 6: reward")
    assert "checkpoints/step-2: whole" in shown and "final: whole" in shown
    out = tmp_path / "sft"
    process = start(home, "sft", out, "--epochs", "200")
    assert status([str(out)]) == 0
    shown = capsys.readouterr().out
    assert ": running\n" in shown and "of training left" in shown
    assert status([str(tmp_path / "ppo")]) == 2 and f"running beside it: {out}" in capsys.readouterr().err  # an earlier stage still
    process.kill()
    process.communicate()
    (out / "metrics.jsonl").open("a").write('{"step": 9, "lo')
    for path in step_folders(out):
        (path / "config.json").write_text("")
    assert status([str(out)]) == 1
    shown = capsys.readouterr().out
    assert "stopped before its end" in shown and (": config.json has 0 bytes instead of" in shown or not step_folders(out))
    assert status([str(tmp_path)]) == 2 and "no run there" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- out of memory

@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")])
def test_out_of_memory_names_the_flags_to_lower_in_order(monkeypatch, capsys, error):
    import train_ppo
    monkeypatch.setattr(sys, "argv", ["train_ppo.py"])

    def body(config):
        raise error
    with pytest.raises(SystemExit) as exit:
        main(body, parse(train_ppo.Config, train_ppo.PRESETS, []))
    shown = capsys.readouterr().err
    assert exit.value.code == 1 and shown.count("\n") == 1
    places = [shown.index(flag) for flag in ("--micro-batch-size 8", "--generation-batch-size 64", "--precision bf16", "--max-response below 32", "--batch-size below")]
    assert places == sorted(places)
