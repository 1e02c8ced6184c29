"""Runs: exit codes, the run folder, whole-or-nothing saves, checkpoints, device, learning rate, optimiser step."""
import errno
import json
import math
import os
import signal
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from nanorlhf import config as configuration
from nanorlhf import run as runs
from nanorlhf.config import option, parse
from nanorlhf.errors import InputError
from nanorlhf.options import TrainOptions
from nanorlhf.run import (Run, RunFailed, adamw, check_free, linear_decay, main, optimiser_step, peak_memory_mb,
                          pick_device, seed_everything)

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Config(TrainOptions):
    lr: float = option(1e-3, "learning rate", group="Optimiser", above=0)


def settings(*words):
    return parse(Config, argv=list(words), exit_on_error=False)


@pytest.fixture
def run(tmp_path):
    return Run(settings("--out", str(tmp_path / "run")))


def writer(text):
    return lambda folder: (Path(folder) / "weights").write_text(text)


def tree(folder):
    """{relative path: content} of every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def contents(folder):
    """`tree` without manifests."""
    return {name: content for name, content in tree(folder).items() if not name.endswith("manifest.json")}


# ---------------------------------------------------------------------------------------------------------- exit codes

@pytest.mark.parametrize("error, code, line", [
    (InputError("--lr is odd"), 2, "train_x.py: error: --lr is odd\n"),
    (RunFailed("the loss is nan"), 1, "train_x.py: failed: the loss is nan\n"),
    (KeyboardInterrupt(), 130, "train_x.py: SIGINT: interrupted; nothing was finished: run it again, with --overwrite where it says that "
     "--out holds a run\n"),
], ids=["input", "run", "interrupt"])
def test_exit_codes(monkeypatch, capsys, error, code, line):
    """One line on stderr, nothing on stdout, and the house's code."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/train_x.py", "--lr", "1"])

    def body(config):
        raise error
    with pytest.raises(SystemExit) as exit:
        main(body, None)
    assert exit.value.code == code
    assert capsys.readouterr() == ("", line)


def test_an_interrupted_training_can_be_resumed(monkeypatch, capsys, tmp_path):
    """Of what trains and has begun, the message promises --resume; not of a dry run, of which nothing is left."""
    monkeypatch.setattr(sys, "argv", ["train_x.py"])

    def body(config):
        raise KeyboardInterrupt
    for words, promise in (([], "nothing was finished: run it again"), ([], "what was saved is kept, and the same command with --resume goes on from it\n"),
                           (["--dry-run"], "nothing was finished: run it again")):
        with pytest.raises(SystemExit) as exit:
            main(body, settings("--out", str(tmp_path / "run"), *words))
        assert exit.value.code == 130 and f"train_x.py: SIGINT: interrupted; {promise}" in capsys.readouterr().err
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "config.toml").touch()


def test_ctrl_c_in_an_import_of_the_body_is_an_interrupt_like_any_other():
    """What `parse` sets for the import of torch says that nothing was begun: no longer true."""
    before = signal.signal(signal.SIGINT, configuration.interrupted_import)
    try:
        main(lambda config: None, settings())
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_success_returns_and_passes_the_config():
    seen = []
    main(seen.append, "config")
    assert seen == ["config"]


def test_a_fault_of_ours_keeps_its_traceback():
    def body(config):
        raise ZeroDivisionError("ours")
    with pytest.raises(ZeroDivisionError):
        main(body, None)


def test_an_interrupted_process_exits_130(tmp_path):
    """Ctrl-C (SIGINT) in a real process: the code a shell expects, one line, no traceback."""
    code = ("import os, signal, sys\nfrom nanorlhf.run import main\nsys.argv[0] = 'train_x.py'\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job inherits it ignored
            "main(lambda config: os.kill(os.getpid(), signal.SIGINT), None)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 130
    assert done.stderr == "train_x.py: SIGINT: interrupted; nothing was finished: run it again, with --overwrite where it says that --out holds a run\n"


# -------------------------------------------------------------------------------------------------------------- device

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


def test_the_cpu_when_asked(capsys):
    assert pick_device(None, "cpu") == torch.device("cpu")
    assert "device: cpu" in capsys.readouterr().out


@no_cuda
def test_the_cpu_when_there_is_no_cuda(capsys):
    assert pick_device() == torch.device("cpu") and "cpu" in capsys.readouterr().out


def test_gpu_and_cpu_contradict_each_other():
    with pytest.raises(InputError, match="--gpu 0 and --device cpu"):
        pick_device(0, "cpu")


@no_cuda
@pytest.mark.parametrize("gpu, device, flag",
                         [(0, "auto", "--gpu 0"), (3, "cuda", "--gpu 3"), (None, "cuda", "--device cuda")])
def test_no_silent_fallback_to_the_cpu(gpu, device, flag):
    with pytest.raises(InputError, match=flag) as error:
        pick_device(gpu, device)
    assert "no CUDA" in str(error.value) and "\n" not in str(error.value)


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="--gpu 2: there are 2"):
        pick_device(2)


def test_seed_everything_reaches_three_generators():
    import random

    import numpy as np
    draws = []
    for seed in (1, 1, 2**40):
        seed_everything(seed)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1] and all(a != b for a, b in zip(draws[0], draws[2]))


def test_peak_memory_is_plausible():
    """A Python with torch holds between 50 MB and the machine."""
    assert 50 < peak_memory_mb() < 1e6


# ---------------------------------------------------------------------------------------------------------- run folder

def test_free_folders(tmp_path):
    check_free(tmp_path / "new" / "deep")
    check_free(tmp_path)  # there, but empty
    assert list(tmp_path.iterdir()) == [], "looking must not make anything"


def test_a_run_is_not_overwritten_unasked(tmp_path):
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(InputError, match="--overwrite"):
        check_free(tmp_path)
    check_free(tmp_path, may_exist=True)


def test_a_folder_of_the_user_is_never_overwritten(tmp_path):
    """Not even with --overwrite: it holds no run of ours."""
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="no run of ours"):
            check_free(tmp_path, overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match="is a file"):
        check_free(tmp_path / "run", may_exist=True)


def test_a_file_on_the_way_to_the_folder(tmp_path):
    """out = file/run: the folder cannot be made, and that is said before hours of training, not after."""
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        check_free(tmp_path / "file" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_parent(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot be written"):
        check_free(tmp_path / "run")


def test_a_new_run_holds_its_config(run, tmp_path):
    assert sorted(p.name for p in run.folder.iterdir()) == ["config.toml"]
    assert parse(Config, argv=["--config", str(run.folder / "config.toml")],
                 exit_on_error=False).out == str(tmp_path / "run")
    with pytest.raises(InputError, match="--overwrite"):
        Run(settings("--out", str(run.folder)))


@pytest.mark.parametrize("words", [[], ["--resume"], ["--overwrite"], ["--resume", "--overwrite"]], ids=" ".join)
def test_a_run_killed_in_its_first_moment_is_begun_anew(tmp_path, words):
    """Before its config.toml was whole: there is nothing to go on from, and nothing that would be lost."""
    out = tmp_path / "run"
    out.mkdir()
    (out / ".config.toml.1234.partial").write_text("seed =")
    config = settings("--out", str(out), *words)
    assert runs.check_run(config) is None
    Run(config).close()
    assert sorted(path.name for path in out.iterdir()) == ["config.toml"]


def test_overwrite_replaces_the_old_run(run):
    run.log(1, {"loss": 1.0})
    run.save("final", writer("old"))
    run.close()
    Run(settings("--out", str(run.folder), "--overwrite", "--lr", "0.5"))
    assert sorted(tree(run.folder)) == ["config.toml"]
    assert tomllib.loads((run.folder / "config.toml").read_text())["lr"] == 0.5


def test_the_saved_config_does_not_overwrite_or_resume_by_itself(run):
    """--config of a finished run is for another run: what was said once, --overwrite, is not said again by the file."""
    run.close()
    Run(settings("--out", str(run.folder), "--overwrite", "--lr", "0.5")).close()
    again = settings("--config", str(run.folder / "config.toml"))
    assert (again.overwrite, again.resume, again.allow_config_change, again.lr) == (False, False, False, 0.5)
    with pytest.raises(InputError, match="holds a run already"):
        Run(again)


def test_a_run_that_was_moved_is_resumed_where_it_is(tmp_path):
    """Its config.toml names the folder where it was; the advice was to leave --resume out, which starts it anew there."""
    old, new = tmp_path / "old", tmp_path / "new"
    Run(settings("--out", str(old)), inputs={"data set": ["a row"]}).close()
    old.rename(new)
    resumed = ["--config", str(new / "config.toml"), "--resume"]
    with pytest.raises(InputError, match=f"{old} holds no run; if {new} is that run, moved, pass --out {new} too"):
        runs.check_run(settings(*resumed))
    assert runs.check_run(settings(*resumed, "--out", str(new))) is None
    with pytest.raises(InputError, match="leave --resume out"):
        runs.check_run(settings(*resumed, "--out", str(tmp_path / "another")))


def test_a_second_resume_leaves_the_living_run_alone(run):
    """What is half-written belongs to the process that holds the lock."""
    partial = run.folder / "checkpoints" / ".step-6.partial"
    partial.mkdir(parents=True)
    with pytest.raises(InputError, match="another process is writing this run"):
        runs.check_run(settings("--out", str(run.folder), "--resume"))
    assert partial.is_dir()
    run.close()
    runs.check_run(settings("--out", str(run.folder), "--resume"))
    assert not partial.exists()


def test_what_a_killed_save_set_aside_comes_back_on_resume(run):
    """Killed between the two renames of `write_folder`: best/ is only there as .best.old."""
    run.save("best", writer("whole"))
    os.rename(run.folder / "best", run.folder / ".best.old")
    run.close()
    runs.check_run(settings("--out", str(run.folder), "--resume"))
    assert contents(run.folder)["best/weights"] == b"whole"


def test_options_that_may_change_and_those_that_may_not(run):
    """What a step computes stays; where it runs and what is kept may change. An unset option is no other than one that is "none"."""
    free = ["--save-steps", "7", "--keep-checkpoints", "9", "--gpu", "1", "--debug", "--dry-run", "--resume", "--overwrite"]
    assert runs.changes(settings("--out", "elsewhere", *free), run.folder) == []
    others = ["--seed", "1", "--device", "cpu", "--precision", "bf16", "--generation-batch-size", "2", "--lr", "0.5"]
    assert [line.split(":")[0] for line in runs.changes(settings(*others), run.folder)] == [
        "seed", "device", "precision", "generation_batch_size", "lr"]

    @dataclass
    class More(Config):
        clip: float | None = option(None, "an option that may be unset")
    (run.folder / "config.toml").write_text('clip = "none"\n')
    assert runs.changes(parse(More, argv=[]), run.folder) == []
    assert runs.changes(parse(More, argv=["--clip", "1"]), run.folder) == ["clip: None there, 1.0 here"]


def test_a_finished_run_is_not_gone_on_with_under_other_options(run):
    run.finish()
    with pytest.raises(SystemExit) as exit:
        runs.check_run(settings("--out", str(run.folder), "--resume"))
    assert exit.value.code == 0
    with pytest.raises(InputError, match="is finished, and cannot be gone on with under other options .lr: 0.001 there, 0.5 here"):
        runs.check_run(settings("--out", str(run.folder), "--resume", "--lr", "0.5", "--allow-config-change"))


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    """On a file system that is mounted to be read alone; it used to end in a traceback. Rights are `main`'s to speak of."""
    def refuse(number, words):
        def mkdir(path, **options):
            raise OSError(number, words, str(path))
        return mkdir
    out = str(tmp_path / "new")
    monkeypatch.setattr(Path, "mkdir", refuse(errno.EROFS, "Read-only file system"))
    with pytest.raises(InputError, match=f"^--out {out}: no folder can be made there: Read-only file system; name another$"):
        Run(settings("--out", out))
    monkeypatch.setattr(Path, "mkdir", refuse(errno.EACCES, "Permission denied"))
    with pytest.raises(PermissionError):
        Run(settings("--out", out))


def test_a_full_disk_stops_the_log_with_advice(run):
    (run.folder / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunFailed, match="metrics.jsonl was not written: No space left on device; free some space"):
        run.log(1, {"loss": 1.0})


def test_the_log_is_one_json_line_a_step(run):
    run.log(1, {"loss": 0.5})
    run.log(2, {"loss": 0.25, "eval/reward": -1.0})
    run.samples(2, [{"prompt": "é", "response": "x\ny"}, {"prompt": "b", "response": ""}])
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row.pop("time/run") >= 0 for row in rows)
    assert rows == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "eval/reward": -1.0}]
    rows = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text("utf-8").splitlines()]
    assert rows == [{"step": 2, "prompt": "é", "response": "x\ny"}, {"step": 2, "prompt": "b", "response": ""}]


def test_save_replaces_whole_folders(run):
    """A file of the old folder that the new one lacks is gone; nothing temporary stays."""
    run.save("best", lambda folder: (writer("1")(folder), (folder / "extra").write_text("")))
    run.save("best", writer("2"))
    assert contents(run.folder / "best") == {"weights": b"2"}
    assert sorted(p.name for p in run.folder.iterdir()) == ["best", "config.toml"]


@pytest.mark.parametrize("number, words", [(errno.ENOSPC, "No space left on device"), (errno.EDQUOT, "Disk quota exceeded")])
def test_a_full_disk_leaves_the_old_folder(run, number, words):
    """The disk, or the user's share of it, is full half-way: best/ is still the old one, nothing half-written stays, the message says what to do."""
    run.save("best", writer("old"))

    def disk_full(folder):
        writer("half")(folder)
        raise OSError(number, words)
    with pytest.raises(RunFailed, match=f"best was not written: {words}; free some space.*no checkpoint yet"):
        run.save("best", disk_full)
    assert contents(run.folder) == {"config.toml": (run.folder / "config.toml").read_bytes(), "best/weights": b"old"}
    run.save("best", writer("new"))
    assert contents(run.folder / "best") == {"weights": b"new"}


def test_a_first_save_that_fails_leaves_no_folder(run):
    def fail(folder):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        run.save("final", fail)
    assert not (run.folder / "final").exists()


def test_checkpoints_are_pruned_to_the_newest(tmp_path):
    """By number, not by name: step-100 is newer than step-20, which as text comes last."""
    run = Run(settings("--out", str(tmp_path / "run"), "--keep-checkpoints", "2"))
    optimizer = adamw([module()], 0.1)
    for step in (10, 20, 100):
        run.checkpoint(step, writer(str(step)), optimizer, {})
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == ["step-100", "step-20"]
    assert (run.folder / "checkpoints" / "step-20" / "weights").read_text() == "20"


def test_what_was_just_written_is_not_pruned_for_a_damaged_later_one(tmp_path):
    """Resumed from step 2 because 4 is damaged, and interrupted at 3: it used to keep 4 alone, and with it nothing to go on from."""
    run = Run(settings("--out", str(tmp_path / "run"), "--keep-checkpoints", "1"))
    optimizer = adamw([module()], 0.1)
    for step in (4, 2):
        run.checkpoint(step, writer(str(step)), optimizer, {})
    (run.folder / "checkpoints" / "step-4" / "weights").unlink()
    run.checkpoint(3, writer("3"), optimizer, {})
    assert runs.checkpoint.newest(run.folder)[0].name == "step-3"
    run.checkpoint(4, writer("4"), optimizer, {})
    assert [path.name for path in runs.checkpoint.step_folders(run.folder)] == ["step-4"]


def test_the_best_is_kept_and_misses_are_counted(run):
    """Scores 1, 0.5, 1 (a tie is no gain), 2: best at steps 1 and 4, misses 0, 1, 2, 0."""
    seen = []
    for step, score in enumerate((1.0, 0.5, 1.0, 2.0), start=1):
        run.keep_best(step, score, writer(str(step)))
        seen.append((run.best_step, run.misses, (run.folder / "best" / "weights").read_text()))
    assert seen == [(1, 0, "1"), (1, 1, "1"), (1, 2, "1"), (4, 0, "4")] and run.best_score == 2.0


def resumed(run, total_steps, *words):
    """The run as another process finds it: (Run, what `restore` returns)."""
    run.close()
    config = settings("--out", str(run.folder), "--resume", *words)
    again = Run(config, runs.check_run(config))
    return again, again.restore(adamw([module()], 0.1), total_steps)


def test_best_patience_and_seconds_go_on_after_a_resume(run):
    """Best at step 1, misses at 2 and 3, checkpoint after 3, 100 seconds in; what was logged after it is gone, time is counted on."""
    optimizer = adamw([module()], 0.1)
    for step, score in enumerate((2.0, 1.0, 1.5), start=1):
        run.log(step, {"loss": 1.0})
        run.samples(step, [{"response": "x"}])
        run.keep_best(step, score, writer("w"))
    run.started -= 100
    run.checkpoint(3, writer("w"), optimizer, {"kl_coef": 0.25})
    before = tree(run.folder)
    run.log(4, {"loss": 1.0})
    run.samples(4, [{"response": "x"}])
    again, numbers = resumed(run, 9)
    assert numbers == (3, {"kl_coef": 0.25}) and (again.best_score, again.best_step, again.misses) == (2.0, 1, 2)
    assert 100 <= again.seconds() < 200
    assert all(tree(run.folder)[name] == before[name] for name in ("metrics.jsonl", "samples.jsonl"))
    assert list(again.until_stalled(range(4, 10), patience=2)) == [] and list(again.until_stalled([4, 5], patience=3)) == [4, 5]


def test_under_changed_options_the_best_is_decided_anew(run):
    """The steps after the checkpoint will be others: best/ may hold one that will not come. Unless there are none."""
    run.keep_best(1, 2.0, writer("w"))
    run.keep_best(2, 1.0, writer("w"))
    run.checkpoint(2, writer("w"), adamw([module()], 0.1), {})
    for total, expected in ((9, (-math.inf, 0)), (2, (2.0, 1))):
        again, _ = resumed(run, total, "--lr", "0.5", "--allow-config-change")
        assert (again.best_score, again.misses) == expected
        again.close()
        (run.folder / "config.toml").write_text((run.folder / "config.toml").read_text().replace("lr = 0.5", "lr = 0.001"))


def test_weights_that_are_not_finite_are_not_saved(run):
    model = module()
    with torch.no_grad():
        model[0].weight[1, 1] = math.nan
    with pytest.raises(RunFailed, match="step 7: the weights are not finite; lower --lr; there is no checkpoint yet"):
        run.checkpoint(7, writer("w"), adamw([model], 0.1), {})
    assert not (run.folder / "checkpoints").exists()


@pytest.mark.parametrize("score", [None, math.nan, math.inf])
def test_a_validation_score_that_says_nothing_stops_the_run(run, score):
    with pytest.raises(RunFailed, match="step 7: the validation score is .* the reward, if there is one, or lower --lr"):
        run.keep_best(7, score, writer("w"))
    assert not (run.folder / "best").exists()


def test_room_on_the_disk_is_looked_for_before_the_first_step(run, monkeypatch):
    """12 + 4 + 4 + 4 + 4 + 1 = 29 parameters of 4 bytes; a new run needs 5 copies, 580 bytes: weights, two moments, best/ and final/."""
    from types import SimpleNamespace
    for free, fits in ((580, True), (579, False)):
        monkeypatch.setattr(runs.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
        if fits:
            assert run.restore(adamw([module()], 0.1), 9) == (0, {})
        else:
            with pytest.raises(RunFailed, match="are needed to save.*free some space"):
                run.restore(adamw([module()], 0.1), 9)


def test_a_signal_after_the_last_step_is_not_lost(run):
    """No `end_step` follows that would leave: the end of the loop does. What handled signals before does so again."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(runs.Interrupted, match="stopped; go on with: .* --resume") as error, run:
        os.kill(os.getpid(), signal.SIGTERM)
    assert error.value.signum == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_the_second_signal_leaves_at_once(run, monkeypatch):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    with pytest.raises(runs.Interrupted), run:
        for signum in (signal.SIGINT, signal.SIGTERM):
            assert left == []
            os.kill(os.getpid(), signum)
        assert left == [143]


def test_the_command_to_go_on_with_can_be_typed(run, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["/somewhere/train_x.py"])
    run.folder = tmp_path / "my run"
    assert run.resume_command() == f"python train_x.py --config '{tmp_path}/my run/config.toml' --resume"


def test_finish_writes_the_model_then_the_results(run, monkeypatch):
    """results.json says that a run is finished, so it comes last: where final/ fails, it is not there."""
    def fail(folder):
        raise OSError("disk full")
    with pytest.raises(OSError):
        run.finish(fail, best_step=3)
    assert not (run.folder / "results.json").exists()
    run.finish(writer("w"), best_step=3, test={"exact_match": 0.5})
    results = json.loads((run.folder / "results.json").read_text())
    assert results["best_step"] == 3 and results["test"] == {"exact_match": 0.5}
    assert results["seconds"] >= 0 and results["peak_memory_mb"] > 50
    assert sorted(p.name for p in run.folder.iterdir()) == ["config.toml", "final", "results.json"]


# -------------------------------------------------------------------------------------------------------- optimisation

@pytest.mark.parametrize("total, warmup, expected", [
    (4, 0, [2, 1.5, 1, 0.5, 0, 0]),               # 2 * (5 - step) / 4, and 0 after step 4
    (5, 1, [1, 2, 1.5, 1, 0.5, 0]),               # half-way up at step 1; then 2 * (6 - step) / 4
    (6, 3, [0.5, 1, 1.5, 2, 4 / 3, 2 / 3]),       # quarters up to the peak at step 4; then 2 * (7 - step) / 3
    (1, 0, [2, 0]),
])
def test_linear_decay_by_hand(total, warmup, expected):
    """Peak 2.0: every step of the schedule trains (no rate of 0 up to total_steps), and none rises past the peak."""
    assert [2 * linear_decay(step, total, warmup) for step in range(1, len(expected) + 1)] == pytest.approx(expected)


def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))


def test_weight_decay_is_for_matrices_only():
    """lr 0.1, decay 0.5 and zero gradients: matrices shrink by 1 - 0.05, biases and norms stay."""
    model = module()
    optimizer = adamw([model], 0.1, weight_decay=0.5)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name] * (0.95 if p.dim() == 2 else 1), atol=1e-7), name


def test_adamw_takes_every_parameter_once_and_leaves_frozen_ones():
    first, second = module(), module()
    second.requires_grad_(False)
    groups = adamw([first, second], 0.1, eps=1e-5, betas=(0.8, 0.9)).param_groups
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in first.parameters()}
    assert sum(len(group["params"]) for group in groups) == 6
    assert all(group["eps"] == 1e-5 and group["betas"] == (0.8, 0.9) and group["lr"] == 0.1 for group in groups)


def test_the_gradient_is_clipped_by_its_whole_norm():
    """Gradients (3,) and (4,): norm 5, bound 1 -> a step of lr * (0.6, 0.8); the norm before clipping is returned."""
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=1.0)
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert optimiser_step(optimizer, 0.1, 1.0, 1) == pytest.approx(5.0)
    assert a.item() == pytest.approx(-0.6) and b.item() == pytest.approx(-0.8)
    assert a.grad is None and b.grad is None, "the next step starts without gradients"


def test_a_small_gradient_is_not_scaled():
    a = nn.Parameter(torch.zeros(1))
    a.grad = torch.tensor([0.5])
    assert optimiser_step(torch.optim.SGD([a], lr=1.0), 0.1, 1.0, 1) == pytest.approx(0.5)
    assert a.item() == pytest.approx(-0.5)


@pytest.mark.parametrize("loss, gradient",
                         [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf), (1.0, -math.inf)])
def test_what_is_not_finite_stops_before_any_weight_changes(loss, gradient):
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([a, b], lr=0.1)
    a.grad, b.grad = torch.tensor([1.0, gradient]), torch.ones(1)
    with pytest.raises(RunFailed, match="step 17.*no weight was changed") as error:
        optimiser_step(optimizer, loss, 1.0, 17)
    assert (a == 1).all() and (b == 1).all() and not optimizer.state and "\n" not in str(error.value)


def test_autocast_computes_in_the_precision_asked_for():
    a = torch.ones(2, 2)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with runs.autocast(torch.device("cpu"), precision):
            assert (a @ a).dtype == dtype
