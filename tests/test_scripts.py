"""The scripts: help, a small run of each from end to end, what PPO and DPO compute at their core, and bad input.

Stages are trained once on 60 rows with a model of one layer; `launch` runs a script's own parse, main and train in this
process (a new one costs seconds for torch alone), and two runs go through a real command line.
"""
import copy
import dataclasses
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import nn

from nanorlhf import evaluation, ops, pipeline, plots, run
from nanorlhf.advantages import gae, shape_rewards
from nanorlhf.config import options, parse, replace, save
from nanorlhf.data import Record, Splits, called
from nanorlhf.encoder import Encoder, EncoderConfig
from nanorlhf.errors import InputError
from nanorlhf.feedback import PAIR_FILES
from nanorlhf.gpt2 import GPT2, GPT2Config, PolicyWithValue
from nanorlhf.masked import whiten
from nanorlhf.metrics import METRIC_NAMES, conala_bleu
from nanorlhf.monitor import Alarm, Monitor
from nanorlhf.reward import RewardModel
from nanorlhf.rollout import roll_out, score_tokens
from nanorlhf.run import RunFailed, adamw, learning_rate, main
from nanorlhf.status import status
from nanorlhf.terms import RULES, Combination, Term
from nanorlhf.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train_sft", "train_reward", "train_ppo", "train_dpo")
no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
train_sft, train_reward, train_ppo, train_dpo = (importlib.import_module(name) for name in SCRIPTS)
evaluation_script = importlib.import_module("eval")

TEXT = ["--max-query", "20", "--max-response", "8", "--device", "cpu"]
SFT = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--vocab-size", "290", "--epochs", "2",
       "--batch-size", "16", "--lr", "0.02", "--eval-rows", "4"]
REWARD = ["--samples", "1", "--pair-rows", "20", "--epochs", "1", "--batch-size", "8"]
PPO = ["--steps", "2", "--batch-size", "8", "--minibatch-size", "4", "--micro-batch-size", "3", "--eval-every", "1",
       "--eval-rows", "4", "--lr", "3e-4"]
DPO = ["--epochs", "1", "--batch-size", "16", "--eval-every", "2", "--eval-rows", "4"]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def launch(script, *words, draw=False):
    """A script's `parse` and `main` in this process, as its last lines call them: returns the exit code. Drawing takes
    longer than all the rest of such a run, so it is left to `home` and the runs through the command line."""
    module = importlib.import_module(script)
    with pytest.MonkeyPatch.context() as patch:
        if not draw:
            patch.setattr(module, script.replace("train", "plot"), lambda folder: None)
            patch.setattr(module, "plot_overoptimisation", lambda *what: None, raising=False)
        try:
            main(module.train, parse(module.Config, module.PRESETS, list(words), prog=f"{script}.py"))
        except SystemExit as exit:
            return exit.code
    return 0


def command(script, *words):
    """A script as a user runs it: a new process in the repository root."""
    return subprocess.run([sys.executable, f"{script}.py", *words], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})


def log(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def timeless(rows):
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the data and finished stages: data.jsonl, runs/sft, runs/reward."""
    home = tmp_path_factory.mktemp("home")
    names = ["xs", "rows", "items", "names", "words", "values"]
    data = write_rows(home / "data.jsonl", [{"id": f"{name}{number}", "prompt": f"add {number} to {name}",
                                             "reference": f"{name} + {number}"} for number in range(10)
                                            for name in names])
    for script, flags in (("train_sft", SFT), ("train_reward", REWARD)):
        out = home / "runs" / script.removeprefix("train_")
        assert launch(script, "--data", data, "--out", str(out), *TEXT, *flags, draw=True) == 0
    return home


@pytest.fixture(scope="module")
def ppo(home):
    """PPO beside the stages, through the command line: (finished process, run folder)."""
    out = home / "runs" / "ppo"
    return command("train_ppo", "--data", str(home / "data.jsonl"), "--out", str(out), *TEXT, *PPO), out


@pytest.fixture(scope="module")
def dpo(home):
    out = home / "runs" / "dpo"
    return command("train_dpo", "--data", str(home / "data.jsonl"), "--out", str(out), *TEXT, *DPO), out


# ---------------------------------------------------------------------------------------------------------------- help

@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_quick_and_names_every_option(script):
    """Without torch (which alone takes longer) well under 2 s, of processor time: the machine may be busy."""
    before = os.times()
    done = command(script, "--help")
    after = os.times()
    assert done.returncode == 0 and done.stderr == ""
    module = importlib.import_module(script)
    for opt in options(module.Config).values():
        flag = f"--[no-]{opt.flag[2:]}" if opt.kind is bool else opt.flag
        assert f"  {flag}" in done.stdout, f"{flag} is missing"
        assert opt.help, f"{flag} has no help"
    assert all(f"\n  {name} " in done.stdout for name in ("fast", "research", "production"))
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert seconds < 2


# ---------------------------------------------------------------------------------------------------------- end to end

def test_sft_and_reward_run_folders(home):
    for script, metric in (("sft", "eval/exact_match"), ("reward", "eval/accuracy")):
        folder = home / "runs" / script
        names = {p.name for p in folder.iterdir()}
        assert {"config.toml", "metrics.jsonl", "results.json", "plots", "best", "final"} <= names
        assert metric in log(folder)[-1]
        assert (folder / "plots" / f"{script}.png").read_bytes().startswith(b"\x89PNG")
        assert not [p for p in folder.rglob("*") if "partial" in p.name]
    results = json.loads((home / "runs" / "reward" / "results.json").read_text())
    assert results["leakage"]["overlap"] == [] and results["train_rows"] > 0
    stored = json.loads((home / "runs" / "reward" / "final" / "reward_model.json").read_text())
    assert (stored["gain"], stored["bias"]) == (results["gain"], results["bias"])


def test_reward_pairs_come_from_training_and_validation_rows(home):
    """Never from test rows, and never the same prompt on both sides."""
    from nanorlhf.data import load_splits
    splits = load_splits(home / "data.jsonl")
    for name, rows in (("preferences", splits.train), ("preferences_validation", splits.validation)):
        pairs = [json.loads(line) for line in (home / "runs" / "reward" / f"{name}.jsonl").read_text().splitlines()]
        assert pairs and {pair["prompt"] for pair in pairs} <= {row.prompt for row in rows}


def test_ppo_from_the_command_line(ppo):
    """Exit 0; says which device it took and that both stages were reused; prints the table and five samples."""
    done, folder = ppo
    assert done.returncode == 0, done.stderr
    for words in ("device: cpu", "sft: finished already, reused", "reward: finished already, reused", "learned reward",
                  "exact match", "CoNaLa BLEU", "response length", "KL to the SFT policy", "ended with EOS",
                  "Five prompts"):
        assert words in done.stdout, words
    assert {p.name for p in folder.iterdir()} >= {"config.toml", "metrics.jsonl", "samples.jsonl", "results.json",
                                                  "plots",
                                                  "best", "final"}
    assert (folder / "plots" / "ppo.png").read_bytes().startswith(b"\x89PNG")


def test_ppo_logs_what_it_should(ppo):
    """Two steps and three evaluations (before, and after each), every number finite."""
    rows = log(ppo[1])
    steps = [row for row in rows if "objective/kl" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert [row["step"] for row in rows if "eval/reward" in row] == [0, 1, 2]
    assert set(steps[0]) >= {
        "objective/score", "objective/score_std", "objective/rewards", "objective/kl", "objective/kl_k2", "objective/kl_k3",
        "objective/kl_coef",
        "loss/total", "loss/policy", "loss/value", "policy/entropy", "policy/approx_kl", "policy/clipfrac",
        "policy/ratio",
        "policy/updates", "value/clipfrac", "value/explained_variance", "response/length", "response/eos", "grad_norm",
        "lr",
        "time/rollout", "time/update"}
    assert all(isinstance(value, (int, float)) and value == value and abs(value) < 1e9 for row in rows
               for value in row.values())
    assert abs(steps[0]["objective/kl"]) < 1e-4, "before the first update the policy is the reference"
    assert [row["lr"] for row in steps] == pytest.approx([3e-4, 1.5e-4])
    assert [row["policy/updates"] for row in steps] == [4, 4], "2 epochs of 2 minibatches"


def test_ppo_results(ppo, home):
    results = json.loads((ppo[1] / "results.json").read_text())
    test = results["test"]["test"]
    for mode in ("sampled", "greedy"):
        for name in ("SFT", "PPO"):
            assert set(test[mode][name]) >= {"reward", "exact_match", "conala_bleu", "length", "ended"}
        assert test["gain"][mode]["reward"]["low"] <= test["gain"][mode]["reward"]["high"]
    assert test["sampled"]["SFT"]["kl"] == pytest.approx(0, abs=1e-4)
    assert len(results["samples"]) == 5 and set(results["samples"][0]) == {"prompt", "reference", "SFT", "PPO"}
    assert results["steps"] == 2 and results["seconds"] > 0 and results["leakage"]["overlap"] == []


@pytest.mark.parametrize("run", ["ppo", "dpo"])
def test_final_loads_in_transformers(run, request):
    """AutoModelForCausalLM and AutoTokenizer load final/, and its logits are ours."""
    transformers = pytest.importorskip("transformers")
    folder = request.getfixturevalue(run)[1]
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(folder / "final", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "final")
    ids = tokenizer("add 3 to rows\n", return_tensors="pt").input_ids
    assert ids[0].tolist() == Tokenizer.from_pretrained(folder).encode("add 3 to rows\n")
    assert (theirs.eval()(ids).logits - GPT2.from_pretrained(folder)(ids)).abs().max() < 1e-5
    assert GPT2.from_pretrained(folder / "best").num_parameters() == theirs.num_parameters()


@pytest.mark.parametrize("script", ["train_sft", "train_ppo", "train_dpo"])
def test_final_ends_where_training_did_whatever_its_source_said(home, tmp_path, script):
    """A GPT-2 made with transformers' default config says EOS 50256, whatever its tokenizer's is: `final` said so too, and
    transformers' generate went on behind every answer."""
    transformers = pytest.importorskip("transformers")
    shutil.copytree(home / "runs" / "sft" / "final", tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"eos_token_id": 50256}))
    given = {"train_sft": ["--model", str(tmp_path / "source"), "--epochs", "1", "--eval-rows", "1"],
             "train_ppo": ["--policy", str(tmp_path / "source"), "--reward", "length", *PPO],
             "train_dpo": ["--policy", str(tmp_path / "source"), "--data", str(home / "runs" / "reward" / "preferences.jsonl"), "--epochs", "1"]}
    data = [] if script == "train_dpo" else ["--data", str(home / "data.jsonl")]
    assert launch(script, "--out", str(tmp_path / "run"), *data, *TEXT, *given[script]) == 0
    final = tmp_path / "run" / "final"
    eos = Tokenizer.from_pretrained(final).eos_id
    assert transformers.AutoConfig.from_pretrained(final).eos_token_id == eos
    assert transformers.GenerationConfig.from_pretrained(final).eos_token_id == eos


def test_final_is_the_best(ppo):
    """The model kept is the one with the best validation reward, not the last."""
    evaluations = {row["step"]: row["eval/reward"] for row in log(ppo[1]) if "eval/reward" in row}
    results = json.loads((ppo[1] / "results.json").read_text())
    assert results["best_step"] == max(evaluations, key=evaluations.get)
    for name in ("model.safetensors", "value_head.safetensors"):
        assert (ppo[1] / "final" / name).read_bytes() == (ppo[1] / "best" / name).read_bytes()


def test_the_saved_config_repeats_the_run(ppo, home):
    """--config runs/ppo/config.toml --out other, in another process: the same metrics and weights.

    With as many threads as the first run (one): sums over several threads are rounded in another order.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert launch("train_ppo", "--config", str(ppo[1] / "config.toml"), "--out", str(home / "runs" / "again")) == 0
    finally:
        torch.set_num_threads(threads)
    assert timeless(log(home / "runs" / "again")) == timeless(log(ppo[1]))
    for name in ("model.safetensors", "value_head.safetensors"):
        assert (home / "runs" / "again" / "final" / name).read_bytes() == (ppo[1] / "final" / name).read_bytes()
    first, again = (tomllib.loads((folder / "config.toml").read_text()) for folder in (ppo[1], home / "runs" / "again"))
    assert {name for name in first if first[name] != again[name]} == {"out"}


def test_another_seed_is_another_run(ppo, home):
    assert launch("train_ppo", "--config", str(ppo[1] / "config.toml"), "--out", str(home / "runs" / "seed1"),
                  "--seed", "1",
                  "--steps", "1") == 0
    assert timeless(log(home / "runs" / "seed1"))[1] != timeless(log(ppo[1]))[1]


def test_a_finished_run_is_not_overwritten(ppo, capsys):
    """Exit 2, one line, and every file as it was."""
    before = snapshot(ppo[1])
    assert launch("train_ppo", "--config", str(ppo[1] / "config.toml")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--overwrite" in error
    assert snapshot(ppo[1]) == before


def test_dpo_from_the_command_line(dpo, home):
    done, folder = dpo
    assert done.returncode == 0, done.stderr
    assert "sft: finished already, reused" in done.stdout and "reward: finished already, reused" in done.stdout
    assert (folder / "plots" / "dpo.png").read_bytes().startswith(b"\x89PNG")
    rows = [row for row in log(folder) if "loss" in row]
    pairs = len((home / "runs" / "reward" / "preferences.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows] == list(range(1, -(-pairs // 16) + 1))
    assert set(rows[0]) >= {"loss", "rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy",
                            "logps/chosen",
                            "logps/rejected", "lr", "grad_norm", "epoch"}
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-5), "log 2: the policy starts as the reference"
    assert rows[0]["rewards/margin"] == pytest.approx(0, abs=1e-5)
    results = json.loads((folder / "results.json").read_text())
    assert set(results["test"]["test"]["greedy"]) == {"SFT", "DPO"}


def test_eval_compares_two_models(home, ppo, capsys):
    """Two policies on the first four test rows: a Markdown table, every metric in results.json, every answer written
    down, and the metrics are those of the answers."""
    out, names = home / "runs" / "eval", [str(home / "runs" / "sft"), str(ppo[1])]
    words = ["--model", *names, "--data", str(home / "data.jsonl"), "--out", str(out), "--rows", "4", "--reward",
             str(home / "runs" / "reward"), *TEXT]
    main(evaluation_script.run_evaluation, parse(evaluation_script.Config, argv=words, prog="eval.py"))
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert table[0] == f"| test, 4 prompts | {names[0]} | {names[1]} |" and table[1] == "|---|---:|---:|"
    assert all(line.count("|") == 4 for line in table)
    answers = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [(row["split"], row["mode"], row["model"]) for row in answers] == \
        [("test", "greedy", name) for name in names for _ in range(4)]
    results = json.loads((out / "results.json").read_text())
    test = results["results"]["test"]
    assert test["rows"] == 4 and list(test["metrics"]) == names and results["leakage"]["overlap"] == []
    for name in names:
        numbers, rows = test["metrics"][name], [row for row in answers if row["model"] == name]
        assert set(numbers) >= {"reward", "length", "ended", *METRIC_NAMES}
        assert numbers["conala_bleu"] == conala_bleu([r["response"] for r in rows], [r["reference"] for r in rows])
        for metric in ("reward", "length", "exact_match"):
            assert numbers[metric] == pytest.approx(sum(row[metric] for row in rows) / 4)
            low, high = numbers["intervals"][metric]
            line = [line for line in table if line.startswith(f"| {metric} |")][0]
            assert line.split("|")[2 + names.index(name)].strip() == f"{numbers[metric]:.3f} [{low:.3f}, {high:.3f}]"
            assert low <= numbers[metric] <= high
        assert test["targets"][name]["bertscore"] is None and set(test["targets"][name]) == set(plots.TARGETS)
        assert {found["name"] for found in test["findings"][name]} >= {"overlap", "repeated", "empty", "unparsable", "not computed"}
    first, second = (test["metrics"][name]["reward"] for name in names)
    assert test["gains"][names[1]]["reward"]["difference"] == pytest.approx(second - first, abs=1e-6)
    assert {path.name for path in (out / "plots").iterdir()} == {
        "evaluation_metrics_by_epoch.png", "all_evaluation_metrics_by_epoch.png", "target_achievement.png", "reward_training_metrics.png",
        "rlhf_training_metrics.png"}


# --------------------------------------------------------------------------------- micro-batches change nothing

def weights(folder):
    return GPT2.from_pretrained(folder).state_dict()


def gap(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


def same_losses(first, second, name="loss"):
    first, second = ([row[name] for row in log(folder) if name in row] for folder in (first, second))
    return len(first) == len(second) and first == pytest.approx(second, abs=2e-5)


def test_sft_micro_batches(home):
    """Ragged responses: the mean is over the step's tokens, not over micro-batches. At a tenth of the rate, since Adam makes a
    step of the whole rate from a gradient that is rounding alone."""
    whole, micro = home / "runs" / "sft-whole", home / "runs" / "sft-micro"
    for out, size in ((whole, "64"), (micro, "3")):
        assert launch("train_sft", "--config", str(home / "runs" / "sft" / "config.toml"), "--out", str(out), "--lr", "0.002",
                      "--micro-batch-size", size) == 0
    assert same_losses(whole, micro) and gap(weights(whole), weights(micro)) < 1e-4


@pytest.mark.parametrize("script, flags", [("train_sft", SFT), ("train_reward", REWARD), ("train_ppo", PPO), ("train_dpo", DPO)])
def test_no_more_prompts_are_answered_at_once_than_said(home, monkeypatch, script, flags):
    """By the rows of every KV cache: rollouts, pairs and evaluations. (--micro-batch-size never bounded them.)"""
    sizes, new_cache = [], GPT2.new_cache
    monkeypatch.setattr(GPT2, "new_cache", lambda self, batch, length: (sizes.append(batch), new_cache(self, batch, length))[1])
    out = home / "runs" / f"{script}-in-parts"
    assert launch(script, "--data", str(home / "data.jsonl"), "--out", str(out), *TEXT, *flags, "--generation-batch-size", "3") == 0
    assert max(sizes) == 3


def test_reward_micro_batches(home):
    out = home / "runs" / "reward-micro"
    assert launch("train_reward", "--config", str(home / "runs" / "reward" / "config.toml"), "--out", str(out),
                  "--micro-batch-size", "3") == 0
    assert same_losses(home / "runs" / "reward", out) and same_losses(home / "runs" / "reward", out, "accuracy")


def test_dpo_micro_batches_and_one_pass_of_the_reference(dpo, home, monkeypatch):
    """3 pairs a forward pass rather than 16: the same losses and weights. The reference is asked twice, for the
    training and the validation pairs, however many steps follow."""
    calls = []
    once = train_dpo.reference_logps
    monkeypatch.setattr(train_dpo, "reference_logps", lambda *args: calls.append(len(args[2])) or once(*args))
    out = home / "runs" / "dpo-micro"
    assert launch("train_dpo", "--config", str(dpo[1] / "config.toml"), "--out", str(out), "--micro-batch-size",
                  "3") == 0
    assert len(calls) == 2
    assert same_losses(dpo[1], out) and same_losses(dpo[1], out, "rewards/margin")
    assert gap(weights(dpo[1] / "best"), weights(out / "best")) < 1e-4


# ------------------------------------------------------------------------------------- other data, other options

def test_every_ppo_option_at_once(home, monkeypatch):
    """A function as reward, prompts without references, adaptive KL, penalties, clips, checkpoints, early stop."""
    (home / "reward_zq.py").write_text("def short(prompts, responses, references):\n"
                                       "    assert references == [None] * len(prompts)\n"
                                       "    return [-float(len(r)) for r in responses]\n")
    monkeypatch.chdir(home)
    (home / "prompts.json").write_text(json.dumps([f"add {n} to xs" for n in range(30)]))
    assert launch("train_ppo", "--data", "prompts.json", "--policy", "runs/sft", "--reward", "reward_zq:short", "--out",
                  "runs/options", *TEXT, *PPO, "--steps", "4", "--missing-eos-penalty", "-1", "--kl-target", "6",
                  "--kl-horizon", "100", "--kl-estimator", "k3", "--temperature", "0.7", "--top-k", "20", "--top-p",
                  "0.9",
                  "--dual-clip", "3", "--entropy-coef", "0.01", "--target-kl", "1e-9", "--ppo-epochs", "3",
                  "--no-whiten-advantages",
                  "--bootstrap-truncated", "--save-steps", "1", "--keep-checkpoints", "2", "--gamma", "0.9") == 0
    folder = home / "runs" / "options"
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-3", "step-4"]
    steps = [row for row in log(folder) if "objective/kl" in row]
    assert all(row["policy/updates"] == 2 for row in steps), "target_kl ends the epochs after the first"
    factors = [b["objective/kl_coef"] / a["objective/kl_coef"] for a, b in zip(steps, steps[1:])]
    assert all(factor == pytest.approx(1 - 0.2 * 8 / 100) for factor in factors), "the error is clipped"
    assert json.loads((folder / "results.json").read_text())["test"]["test"]["greedy"]["PPO"]["exact_match"] is None


def test_whitened_rewards(home, monkeypatch):
    """What GAE sees: the KL-shaped rewards over their standard deviation, about their old mean: (r - m) / s + m. Their sum, and so
    the log's objective/rewards, stays: score - kl_coef * KL."""
    seen, shaped, choose = [], [], train_ppo.choose
    monkeypatch.setattr(train_ppo, "shape_rewards", lambda *args: shaped.append(shape_rewards(*args)) or shaped[-1])
    monkeypatch.setattr(train_ppo, "choose", lambda *args: dataclasses.replace(choose(*args), gae=lambda rewards, values, mask, *rest: (
        seen.append((rewards, mask)), gae(rewards, values, mask, *rest))[1]))
    out = home / "runs" / "whitened"
    assert launch("train_ppo", "--data", str(home / "data.jsonl"), "--out", str(out), *TEXT, *PPO, "--whiten-rewards") == 0
    rows = [row for row in log(out) if "objective/kl" in row]
    assert len(rows) == len(seen) == 2
    for (rewards, mask), before, row in zip(seen, shaped, rows):
        kept, were = rewards[mask], before[mask]
        expected = (were - were.mean()) / were.std(unbiased=False) + were.mean()
        torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-4)
        assert rewards[~mask].eq(0).all() and not torch.allclose(kept, were, atol=1e-2)
        assert row["objective/rewards"] == pytest.approx(before.sum(1).mean().item(), abs=1e-6)


def test_low_memory_reaches_the_evaluation(home, monkeypatch):
    """With it, no logits of several columns exist, neither in updates nor where the KL of answers is measured."""
    shapes, logits = [], GPT2.logits
    monkeypatch.setattr(GPT2, "logits", lambda self, hidden: (shapes.append(hidden.dim()), logits(self, hidden))[1])
    for script, flags in (("train_ppo", PPO), ("train_dpo", DPO)):
        shapes.clear()
        assert launch(script, "--data", str(home / "data.jsonl"), "--out", str(home / "runs" / f"{script}-low"), *TEXT, *flags,
                      "--low-memory") == 0
        assert set(shapes) == {2}, "one column at a time, in generation"


def test_patience_stops_early(home, monkeypatch):
    """A constant reward never gets better: with patience 1 it stops at the evaluation after step 1."""
    (home / "constant_zq.py").write_text("def one(prompts, responses, references):\n    return [1.0] * len(prompts)\n")
    monkeypatch.chdir(home)
    assert launch("train_ppo", "--data", "data.jsonl", "--policy", "runs/sft", "--reward", "constant_zq:one", "--out",
                  "runs/patience", *TEXT, *PPO, "--steps", "5", "--patience", "1") == 0
    results = json.loads((home / "runs" / "patience" / "results.json").read_text())
    assert (results["best_step"], results["steps"]) == (0, 1)


def test_ratings_and_an_encoder_with_its_own_tokenizer(home, tmp_path):
    """A BERT reward model trained on ratings, without any SFT policy; some ratings, all kinds of values."""
    characters = "abcdefghijklmnopqrstuvwxyz0123456789+"
    (tmp_path / "bert").mkdir()
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *("##" + c for c in characters)]
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(tokens) + "\n")
    Encoder.from_config(EncoderConfig("bert", len(tokens), 16, 1, 2, 32, 60)).save_pretrained(tmp_path / "bert")
    data = write_rows(tmp_path / "ratings.jsonl",
                      [{"prompt": f"add {n} to xs", "response": f"xs + {n}", "rating": n % 5 + 1}
                                                   for n in range(40)])
    assert launch("train_reward", "--data", data, "--model", str(tmp_path / "bert"), "--out", str(tmp_path / "reward"),
                  *TEXT, *REWARD[4:]) == 0
    results = json.loads((tmp_path / "reward" / "results.json").read_text())
    assert "eval/error" in results["validation"]
    assert (tmp_path / "reward" / "final" / "vocab.txt").is_file()


def preferences(path):
    return write_rows(path, [{"prompt": f"add {n} to xs", "chosen": f"xs + {n}", "rejected": f"xs - {n}"}
                             for n in range(40)])


def test_preference_data_go_through_sft_and_dpo(tmp_path):
    """Data with preferences of their own need no reward stage: SFT on the chosen responses, then DPO on the pairs."""
    data = preferences(tmp_path / "pairs.jsonl")
    assert launch("train_sft", "--data", data, "--out", str(tmp_path / "runs" / "sft"), *TEXT, *SFT) == 0
    assert launch("train_dpo", "--data", data, "--out", str(tmp_path / "runs" / "dpo"), *TEXT, *DPO[:-2], "--loss-type",
                  "ipo", "--beta", "0.1") == 0  # no --eval-rows: nobody answers
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["dpo", "sft"]
    rows = log(tmp_path / "runs" / "dpo")
    first = next(row for row in rows if "loss" in row)
    assert first["loss"] == pytest.approx(25, rel=1e-4), "h = 0: (1 / (2 * 0.1))^2"


def test_pairs_ratings_and_peoples_logits_at_once(home, tmp_path):
    """Pairs made from references, and rated responses of which every other carries logits: one run learns from all of it, with a
    head of three layers. Its scores need no logits, and move with them."""
    rows = [{"prompt": f"raise xs by {n}", "response": f"xs + {n}" if n % 2 else "xs", "rating": 1 + 4 * (n % 2),
             **({"logits": [float(n % 2), 1.0, 0.0]} if n % 4 else {})} for n in range(40)]
    ratings = write_rows(tmp_path / "ratings.jsonl", rows)
    out = tmp_path / "reward"
    assert launch("train_reward", "--data", str(home / "data.jsonl"), "--policy", str(home / "runs" / "sft"), "--ratings", ratings,
                  "--head", "mlp", "--human-feedback-dim", "3", "--out", str(out), *TEXT, *REWARD, draw=True) == 0
    results = json.loads((out / "results.json").read_text())
    assert {"eval/accuracy", "eval/error", "eval/error_with_feedback"} <= set(results["validation"])
    model = RewardModel.from_pretrained(out)
    assert model.head.kind == "mlp" and model.human_feedback_dim == 3
    scores = [model.score(["add 1 to xs"], ["xs + 1"], feedback=[vector]).item() for vector in (None, [5.0, 1.0, -5.0])]
    assert scores[0] != scores[1]
    seen = [row for row in log(out) if "loss" in row]
    assert any("error" in row for row in seen) and any("accuracy" in row for row in seen)
    assert all(json.loads(line)["chosen"] for line in (out / "preferences.jsonl").read_text().splitlines()), "pairs alone"


def test_peoples_logits_are_dropped_at_random_in_training_only(tmp_path):
    """With dropout 1 a row's logits change nothing while training, and everything while evaluating; with 0 they always count."""
    model = RewardModel.from_pretrained(random_policy(tmp_path), "linear", human_feedback_dim=2)
    rows = [{"prompt": "p", "response": "r", "rating": 1.0, "feedback": [3.0, -1.0]}]
    def loss(dropout, training, rows=rows):
        model.train(training)
        model.backbone.eval()
        return train_reward.batch_loss(model, rows, SimpleNamespace(human_feedback_dropout=dropout, precision="fp32", center_coef=0))[0].item()
    without = loss(0.0, False, [{**rows[0], "feedback": None}])
    assert loss(1.0, True) == without != loss(1.0, False) == loss(0.0, True)


def stop_after(step, monkeypatch, script, *words):
    """Run a script and interrupt it once this step is saved."""
    end_step = script.Run.end_step

    def stop(run, at, *args, **numbers):
        end_step(run, at, *args, **numbers)
        if at == step:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "end_step", stop)
        assert launch(script.__name__, *words) == 130


def test_ratings_of_held_out_prompts_are_refused(home, tmp_path, capsys):
    ratings = write_rows(tmp_path / "ratings.jsonl", [{"prompt": f"add {n} to {name}", "response": "x", "rating": n} for n in range(10)
                                                      for name in ("values", "xs", "rows")])
    assert launch("train_reward", "--data", str(home / "data.jsonl"), "--policy", str(home / "runs" / "sft"), "--ratings", ratings,
                  "--out", str(tmp_path / "reward"), *TEXT, *REWARD) == 2
    assert "ratings.jsonl: splits overlap" in capsys.readouterr().err


def test_held_out_ratings_of_training_prompts_are_trained_on(home, tmp_path, capsys):
    """Of one file's prompts some are held out at random; those of the training pairs would make eval/error too good."""
    trained = [json.loads(line)["prompt"] for line in (home / "runs" / "reward" / "preferences.jsonl").read_text().splitlines()]
    ratings = write_rows(tmp_path / "ratings.jsonl", [{"prompt": prompt, "response": "x", "rating": i % 5 + 1}
                                                      for i, prompt in enumerate(dict.fromkeys(trained))])
    assert launch("train_reward", "--data", str(home / "data.jsonl"), "--policy", str(home / "runs" / "sft"), "--ratings", ratings,
                  "--out", str(tmp_path / "reward"), *TEXT, *REWARD) == 0
    assert "held-out rows have a prompt of the training pairs: trained on instead" in capsys.readouterr().out
    assert "eval/error" not in json.loads((tmp_path / "reward" / "results.json").read_text())["validation"]


def test_ruby_quality_and_its_interval_are_of_one_quantity():
    """Three programs that parse and fail their checks: .8 each, and so are both ends of the interval."""
    rows = [{"response": "x + 1", "reference": "x", "execution_accuracy": 0.0, "reward": None, "length": 1, "ended": True}] * 3
    counted = evaluation_script.counts(rows)
    numbers = evaluation_script.score(rows, {"ruby_quality": counted["ruby_quality"]})
    assert numbers["ruby_quality"] == pytest.approx(0.8) and list(numbers["intervals"]["ruby_quality"]) == [pytest.approx(0.8)] * 2


def test_a_projection_that_never_saw_a_vector_resumes(home, tmp_path, monkeypatch):
    """All of people's logits were dropped so far: the optimiser still has a state for the projection."""
    rows = [{"prompt": f"raise xs by {n}", "response": "xs", "rating": n % 5, "logits": [1.0, 2.0]} for n in range(40)]
    words = ["--data", write_rows(tmp_path / "ratings.jsonl", rows), "--model", str(home / "runs" / "sft"), "--human-feedback-dim", "2",
             "--human-feedback-dropout", "1", "--save-steps", "1", "--epochs", "1", "--batch-size", "8", *TEXT]
    assert launch("train_reward", *words, "--out", str(tmp_path / "whole")) == 0
    stop_after(2, monkeypatch, train_reward, *words, "--out", str(tmp_path / "halves"))
    assert launch("train_reward", *words, "--out", str(tmp_path / "halves"), "--resume") == 0
    assert timeless(log(tmp_path / "halves")) == timeless(log(tmp_path / "whole"))


def random_policy(folder):
    """A GPT-2 of random weights with its tokenizer."""
    tokenizer = Tokenizer.train(["add 1 to xs", "xs + 1"], 270)
    tokenizer.save_pretrained(folder)
    GPT2.from_config(GPT2Config(vocab_size=tokenizer.vocab_size, n_positions=40, n_embd=16, n_layer=1, n_head=2)).save_pretrained(folder)
    return folder


def test_the_loss_of_a_mixed_batch_is_the_mean_over_its_rows(tmp_path):
    """Two pairs and one rating: (2 * pairs' loss + rating's loss) / 3."""
    model = RewardModel.from_pretrained(random_policy(tmp_path), "native")
    config = SimpleNamespace(human_feedback_dropout=0.5, precision="fp32", center_coef=0.01)
    pairs = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "c", "rejected": "dd"}]
    ratings = [{"prompt": "p", "response": "a", "rating": 0.7}]
    both, stats = train_reward.batch_loss(model, [pairs[0], *ratings, pairs[1]], config)
    of_pairs, _ = train_reward.batch_loss(model, pairs, config)
    of_rating, _ = train_reward.batch_loss(model, ratings, config)
    assert both.item() == pytest.approx((2 * of_pairs.item() + of_rating.item()) / 3, rel=1e-5)
    assert stats["accuracy"][1] == 2 and stats["error"][1] == 1
    gaps = (model.score(["p", "q"], ["a", "c"]) - model.score(["p", "q"], ["b", "dd"])) / model.gain
    assert stats["margin"][0] == pytest.approx(gaps.mean().item(), rel=1e-4), "chosen minus rejected"


@pytest.fixture(scope="module")
def checked(home, tmp_path_factory):
    """Rows with checks, beside the same stages."""
    rows = [{"id": f"{name}{number}", "intent": f"add {number} to {name}", "snippet": f"{name} + {number}",
             "checks": [{"setup": f"{name} = {value}", "value": str(value + number)} for value in (3, 70)]}
            for number in range(10) for name in ("xs", "rows", "items", "names", "words", "values")]
    return write_rows(tmp_path_factory.mktemp("checked") / "data.jsonl", rows)


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox's walls need Linux")
def test_ppo_on_execution(home, checked, tmp_path):
    """A sum with execution trains on truth: terms and gold are logged, the sandbox's layers are in the results."""
    out = tmp_path / "ppo"
    assert launch("train_ppo", "--data", checked, "--policy", str(home / "runs" / "sft"), "--out", str(out), *TEXT, *PPO,
                  "--reward", "execution + 0.1*syntax - 0.01*length", "--normalise-terms", "--term-clip", "2", "--save-steps", "1") == 0
    rows = log(out)
    trained = [row for row in rows if "objective/score" in row]
    assert all({"reward/execution", "reward/syntax", "reward/length", "response/left_out"} <= set(row) for row in trained)
    assert all("eval/execution" in row for row in rows if "eval/reward" in row)
    results = json.loads((out / "results.json").read_text())
    assert results["sandbox"]["seccomp"] and results["test"]["test"]["sampled"]["PPO"]["execution"] is not None


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox's walls need Linux")
def test_normalised_terms_resume_exactly(home, checked, tmp_path, monkeypatch):
    """Two steps equal one step, a stop, and the other: the running means, which learn from training alone, go through the checkpoint."""
    words = ["--data", checked, "--policy", str(home / "runs" / "sft"), *TEXT, *PPO, "--reward", "syntax - 0.1*length", "--normalise-terms",
             "--sandbox", "off", "--save-steps", "1"]
    assert launch("train_ppo", *words, "--out", str(tmp_path / "whole")) == 0
    stop_after(1, monkeypatch, train_ppo, *words, "--out", str(tmp_path / "halves"))
    state = json.loads((tmp_path / "halves" / "checkpoints" / "step-1" / "trainer.json").read_text())["extra"]["reward"]
    assert [count for count, _, _ in state["yardstick"].values()] == [4, 4], "the first evaluation's answers"
    assert [count for count, _, _ in state["running"].values()] == [4 + 8] * 2, "and a batch"
    assert launch("train_ppo", *words, "--out", str(tmp_path / "halves"), "--resume") == 0
    assert timeless(log(tmp_path / "halves")) == timeless(log(tmp_path / "whole"))


def test_a_row_whose_term_failed_is_left_out(home, tmp_path, monkeypatch, capsys):
    """Every other response has no score: the log counts them, the run goes on, and where none has one it stops."""
    (tmp_path / "holes_zq.py").write_text("NAN = float('nan')\n"
        "def some(prompts, responses, references): return [NAN if i % 2 else 1.0 for i in range(len(responses))]\n"
        "def never(prompts, responses, references): return [NAN] * len(responses)\n"
        "def none(prompts, responses, references): return [NAN] * len(responses) if len(responses) > 4 else [1.0] * len(responses)\n")
    monkeypatch.chdir(tmp_path)
    words = ["--data", str(home / "data.jsonl"), "--policy", str(home / "runs" / "sft"), *TEXT, *PPO]
    assert launch("train_ppo", *words, "--out", str(tmp_path / "some"), "--reward", "1*holes_zq:some + syntax") == 0
    assert [row["response/left_out"] for row in log(tmp_path / "some") if "response/left_out" in row] == [4, 4]
    assert launch("train_ppo", *words, "--out", str(tmp_path / "none"), "--reward", "1*holes_zq:none + syntax") == 1
    assert launch("train_ppo", *words, "--out", str(tmp_path / "alone"), "--reward", "holes_zq:some") == 2, "a lone reward must be finite"
    assert launch("train_ppo", *words, "--out", str(tmp_path / "never"), "--reward", "1*holes_zq:never") == 2
    assert "no validation row can be scored" in capsys.readouterr().err
    assert launch("train_dpo", *words[:4], *TEXT, *DPO, "--out", str(home / "runs" / "dpo-never"), "--reward", "1*holes_zq:never") == 1


class Nervous(Monitor):
    """A monitor that sees trouble in the first step, whatever it is shown."""

    def see(self, step, numbers):
        return [Alarm(name, step, f"step {step}: too far") for name in ("kl_high", "length")] if step == 1 and "objective/kl" in numbers else []


@pytest.mark.parametrize("on_alarm, steps, kl_coef", [("warn", [1, 2], [0.2, 0.2]), ("stop", [1], [0.2]), ("raise-kl", [1, 2], [0.2, 0.3])])
def test_alarms_are_heeded(home, tmp_path, monkeypatch, capsys, on_alarm, steps, kl_coef):
    """Two alarms in step 1 are said, logged and in the results; they stop the run, or raise kl_coef by half, once, where that was asked for."""
    monkeypatch.setattr(train_ppo, "Monitor", Nervous)
    out = tmp_path / "ppo"
    assert launch("train_ppo", "--data", str(home / "data.jsonl"), "--policy", str(home / "runs" / "sft"), "--reward", "syntax",
                  "--out", str(out), *TEXT, *PPO, "--on-alarm", on_alarm) == 0
    rows = [row for row in log(out) if "objective/kl" in row]
    assert [row["step"] for row in rows] == steps and [row["objective/kl_coef"] for row in rows] == pytest.approx(kl_coef)
    assert [(row["step"], row["alarm"]) for row in log(out) if "alarm" in row] == [(1, "kl_high"), (1, "length")]
    assert json.loads((out / "results.json").read_text())["alarms"] == [
        {"name": name, "step": 1, "message": "step 1: too far"} for name in ("kl_high", "length")]
    assert "ALARM step 1: too far" in capsys.readouterr().out
    assert "ALARM step 1: too far" in status(out)[0] and status(out)[1] == 0
    assert ("and ended there: by --patience or --on-alarm stop" in status(out)[0][1]) == (on_alarm == "stop")


def test_the_model_kept_is_the_best_by_score_not_by_reward(home, tmp_path):
    """Answers without EOS, whatever the reward gives them, count what they count in training."""
    words = settings(train_ppo, "--missing-eos-penalty", "-3")
    rows = [{"reward": 1.0, "ended": False}, {"reward": 2.0, "ended": True}, {"reward": None, "ended": True}]
    assert train_ppo.mean_score(rows, words) == pytest.approx((-3 + 2) / 2) and train_ppo.mean_score(rows[2:], words) is None
    out = tmp_path / "ppo"
    assert launch("train_ppo", "--data", str(home / "data.jsonl"), "--policy", str(home / "runs" / "sft"), "--reward", "syntax", "--out", str(out),
                  *TEXT, *PPO, "--missing-eos-penalty", "-3", "--max-response", "2") == 0
    evaluations = [row for row in log(out) if "eval/score" in row]
    for row in evaluations:
        assert row["eval/score"] == pytest.approx(row["eval/reward"], abs=4) and row["eval/score"] <= row["eval/reward"]
    assert min(row["eval/eos"] for row in evaluations) < 1, "answers of two tokens are cut"
    assert any(row["eval/score"] < row["eval/reward"] - 1 for row in evaluations)
    best = max(evaluations, key=lambda row: row["eval/score"])
    assert json.loads((out / "results.json").read_text())["best_step"] == best["step"]


def test_a_run_that_an_alarm_stopped_stays_stopped(home, tmp_path, monkeypatch):
    """Interrupted between the alarm and the end, it trains no further step on resume."""
    monkeypatch.setattr(train_ppo, "Monitor", Nervous)
    words = ["--data", str(home / "data.jsonl"), "--policy", str(home / "runs" / "sft"), "--reward", "syntax", "--save-steps", "1",
             *TEXT, *PPO, "--on-alarm", "stop", "--out", str(tmp_path / "ppo")]
    stop_after(1, monkeypatch, train_ppo, *words)
    assert launch("train_ppo", *words, "--resume") == 0
    assert [row["step"] for row in log(tmp_path / "ppo") if "objective/kl" in row] == [1]


def test_every_script_knows_what_it_was_begun_with(home, tmp_path, monkeypatch, capsys):
    """One validation row, or one rating, that changed; and with --overwrite beside --resume the run is made anew, as for other options."""
    monkeypatch.chdir(tmp_path)
    rows = [json.loads(line) for line in (home / "data.jsonl").read_text().splitlines()]
    sft, stage = str(home / "runs" / "sft"), ["--save-steps", "1", "--epochs", "1", "--batch-size", "16"]
    ratings = [{"prompt": row["prompt"], "response": row["reference"], "rating": 1 + n % 5} for n, row in enumerate(rows)]
    pairs = [{"prompt": row["prompt"], "chosen": row["reference"], "rejected": "x"} for row in rows]
    for script, made, words in (("train_sft", rows, ["--data", "d", "--model", sft]), ("train_dpo", pairs, ["--data", "d", "--policy", sft]),
                                ("train_reward", pairs, ["--data", "d", "--model", sft, "--head", "native"]),
                                ("train_reward", pairs, ["--data", "d", "--ratings", "ratings.jsonl", "--model", sft])):
        shutil.rmtree("d", ignore_errors=True)
        Path("d").mkdir()
        for name, some in (("train", made[:40]), ("validation", made[40:50]), ("test", made[50:])):
            write_rows(Path(f"d/{name}.jsonl"), some)
        write_rows(Path("ratings.jsonl"), ratings[:40])
        words, out = [*words, *stage, *TEXT[:4 if script != "train_reward" else 0]], script + "-ratings" * ("--ratings" in words)
        stop_after(1, monkeypatch, importlib.import_module(script), *words, "--out", out)
        if "--ratings" in words:
            write_rows(Path("ratings.jsonl"), [{**row, "rating": 6 - row["rating"]} for row in ratings[:40]])
        else:
            write_rows(Path("d/validation.jsonl"), made[41:50])
        assert launch(script, *words, "--out", out, "--resume") == 2, script
        assert "was begun with another " + ("set of ratings" if "--ratings" in words else "data set") in capsys.readouterr().err
        assert launch(script, *words, "--out", out, "--resume", "--overwrite") == 0
        assert ": made anew" in capsys.readouterr().out
        assert (Path(out) / "results.json").is_file()
        assert launch(script, *words, "--out", out, "--resume") == 0 and "nothing to resume" in capsys.readouterr().out
    (Path(out) / "results.json").unlink()
    for text in ("", "[]"):
        Path(out, "inputs.json").write_text(text)
        assert launch(script, *words, "--out", out, "--resume") == 2 and "not the inputs of a run" in capsys.readouterr().err


def test_a_reward_model_is_not_resumed_with_another_policy_unawares(home, tmp_path, monkeypatch, capsys):
    """Gain and bias were set on the samples of whatever policy stood there at the end, the pairs made of another's."""
    shutil.copytree(home / "runs" / "sft" / "final", tmp_path / "sft")
    monkeypatch.chdir(tmp_path)
    words = ["--data", str(home / "data.jsonl"), "--out", "reward", "--save-steps", "1", *TEXT, *REWARD]
    stop_after(1, monkeypatch, train_reward, *words)
    policy = GPT2.from_pretrained("sft")
    with torch.no_grad():
        next(policy.parameters()).add_(0.01)
    policy.save_pretrained("sft")
    assert launch("train_reward", *words, "--resume") == 2
    assert "--resume: reward was begun with another policy" in capsys.readouterr().err
    assert launch("train_reward", *words, "--resume", "--allow-config-change") == 0


@pytest.mark.parametrize("what", ["data set", "policy", "reward model 1", "reward model 2"])
def test_a_run_is_not_resumed_with_other_inputs_unawares(home, tmp_path, monkeypatch, capsys, what):
    """The same paths, with another model, or other rows, in them: said and refused; gone on with where that is asked for, and then known."""
    shutil.copy(home / "data.jsonl", tmp_path)
    for name, source in (("sft", "sft"), ("reward", "reward"), ("second", "reward")):
        shutil.copytree(home / "runs" / source / "final", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    words = ["--data", "data.jsonl", "--policy", "sft", "--reward", "0.5*reward + syntax", "second", "--save-steps", "1", *TEXT, *PPO,
             "--out", "ppo"]
    stop_after(1, monkeypatch, train_ppo, *words)
    if what == "data set":
        with open("data.jsonl", "a") as file:
            file.write(json.dumps({"prompt": "add 77 to zs", "reference": "zs + 77"}) + "\n")
    else:
        folder = {"policy": "sft", "reward model 1": "reward", "reward model 2": "second"}[what]
        model = (GPT2 if what == "policy" else RewardModel).from_pretrained(folder)
        with torch.no_grad():
            next(model.parameters()).add_(0.01)
        model.save_pretrained(folder)
    before = snapshot("ppo")
    assert launch("train_ppo", *words, "--resume") == 2
    assert f"--resume: ppo was begun with another {what}" in capsys.readouterr().err and snapshot("ppo") == before
    assert launch("train_ppo", *words, "--resume", "--allow-config-change") == 0
    assert f"resumed with another {what}" in capsys.readouterr().out and before["inputs.json"] != snapshot("ppo")["inputs.json"]


def test_fingerprints_are_of_what_is_said(tmp_path):
    """Of rows and of files, not of where they are; names count in a folder."""
    rows = [Record("p", "r"), Record("q", "s", id="1")]
    assert run.fingerprint(rows) == run.fingerprint([dataclasses.replace(row) for row in rows]) != run.fingerprint(rows[::-1])
    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.json").write_text(text)
    a, b, c = (run.fingerprint(tmp_path / name) for name in "abc")
    assert a == b != c and run.fingerprint(tmp_path / "a" / "x.json") == run.fingerprint(tmp_path / "b" / "x.json")
    for name in ("README.md", ".DS_Store", ".hidden.json"):  # what comes and goes beside a model
        (tmp_path / "b" / name).touch()
    assert run.fingerprint(tmp_path / "b") == a
    for name in ("model.safetensors", "pytorch_model.bin", "merges.txt", "train.jsonl", "train.csv", "train.TSV"):  # --ratings may be a folder of data
        (tmp_path / "b" / name).touch()
        assert run.fingerprint(tmp_path / "b") != a
        (tmp_path / "b" / name).unlink()
    (tmp_path / "b" / "x.json").rename(tmp_path / "b" / "y\udcff.json")
    assert run.fingerprint(tmp_path / "b") != a


def test_another_kl_coef_takes_effect_on_resume(home, tmp_path, monkeypatch):
    """With --allow-config-change; without a change the steered or raised one goes on."""
    monkeypatch.setattr(train_ppo, "Monitor", Nervous)
    words = ["--data", str(home / "data.jsonl"), "--policy", str(home / "runs" / "sft"), "--reward", "syntax", "--save-steps", "1",
             *TEXT, *PPO, "--on-alarm", "raise-kl"]
    for name, changed, expected in (("same", [], 0.3), ("changed", ["--allow-config-change", "--kl-coef", "5"], 5.0)):
        stop_after(1, monkeypatch, train_ppo, *words, "--out", str(tmp_path / name))
        assert launch("train_ppo", *words, "--out", str(tmp_path / name), "--resume", *changed) == 0
        assert [row["objective/kl_coef"] for row in log(tmp_path / name) if "objective/kl" in row] == pytest.approx([0.2, expected])


@pytest.mark.parametrize("words, lengths", [
    ([], (20, 8)),  # those of runs/sft
    (["--max-response", "32"], (20, 32)),  # what is given holds, also where it is the default
    (["--preset", "research"], (128, 128))])
def test_eval_asks_for_answers_as_long_as_the_runs_own(home, words, lengths, capsys):
    """32 tokens cut the answers of a model that was trained to give 64."""
    config = parse(evaluation_script.Config, evaluation_script.PRESETS, ["--model", str(home / "runs" / "sft" / "final"), *words], prog="eval.py")
    found = evaluation_script.as_trained(config)
    assert (found.max_query, found.max_response) == lengths
    assert ("--max-response 8: as in the policies' own runs" in capsys.readouterr().out) == (not words)


def test_eval_of_several_runs_takes_the_longest(home, tmp_path):
    """Of a run and a longer one; of a model that is no run, or has a config.toml of somebody else's, nothing is known. What was found
    is in the evaluation's own config.toml, and holds when that is given again."""
    for name, text in (("long", "max_query = 9\nmax_response = 40\n"), ("theirs", "depth = 3\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_text(text)
    def lengths(*words):
        config = evaluation_script.as_trained(parse(evaluation_script.Config, {}, [*words], prog="eval.py"))
        save(config, tmp_path / "saved.toml")
        return config.max_query, config.max_response
    sft, long, theirs = str(home / "runs" / "sft"), str(tmp_path / "long"), str(tmp_path / "theirs")
    assert lengths("--model", sft, long, theirs, "gpt2") == lengths("--model", long, sft) == (20, 40)
    assert lengths("--config", str(tmp_path / "saved.toml"), "--model", sft) == (20, 40)
    assert lengths("--model", theirs, "gpt2") == lengths("--predictions", "answers.jsonl") == (64, 32)


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox's walls need Linux")
def test_eval_runs_the_code(home, checked, tmp_path):
    """pass@1 over n samples is the mean share that passes; the layers are in the results; greedy needs no --samples."""
    words = ["--model", str(home / "runs" / "sft"), "--data", checked, *TEXT, "--temperature", "1.0", "--samples", "5", "--rows", "6",
             "--out", str(tmp_path / "eval")]
    assert command("eval", *words).returncode == 0
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    found = results["results"]["test"]["metrics"][str(home / "runs" / "sft")]
    rows = [json.loads(line) for line in (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 30 and results["sandbox"]["seccomp"]
    assert found["pass@1"] == pytest.approx(sum(row["execution_accuracy"] for row in rows) / 30)
    assert found["pass@1"] <= found["pass@2"] <= found["pass@5"] <= 1
    assert found["execution_accuracy"] == pytest.approx(sum(row["execution_accuracy"] for row in rows[:6]) / 6)
    assert any(rows[i]["response"] != rows[i + 6]["response"] for i in range(6)), "samples of other seeds"


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox's walls need Linux")
def test_eval_of_answers_made_elsewhere(home, checked, tmp_path, monkeypatch):
    """What eval.py wrote down, given back to it, has the numbers that it had (but for lengths, which only the policy knows), three
    samples of two splits; and the references, by prompt, from a CSV, beside them, pass. No model is needed."""
    monkeypatch.chdir(tmp_path)
    words = ["--data", checked, "--rows", "5", "--split", "all"]

    def results(*more):
        main(evaluation_script.run_evaluation, parse(evaluation_script.Config, argv=[*words, *more], prog="eval.py"))
        return json.loads((tmp_path / more[-1] / "results.json").read_text())["results"]

    made = results("--model", str(home / "runs" / "sft"), *TEXT, "--temperature", "1.0", "--samples", "3", "--out", "made")
    rows = [json.loads(line) for line in (tmp_path / "made" / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 30 and set(made) == {"validation", "test"}
    lines = ["prompt,response"] + list(dict.fromkeys(f"{row['prompt']},{row['reference']}" for row in rows))
    (tmp_path / "right.csv").write_text("\n".join(lines))
    given = results("--predictions", "made/predictions.jsonl", "right.csv", "--out", "given")
    for split in made:
        (before,), (after, right) = made[split]["metrics"].values(), given[split]["metrics"].values()
        for numbers in (before, before["intervals"]):
            for name in ("length", "ended"):
                del numbers[name]
        assert before.items() <= {**after, "reasons": before["reasons"]}.items() and before["intervals"] == after["intervals"]
        assert right["execution_accuracy"] == right["exact_match"] == 1 and "pass@1" not in right and before["pass@2"] == after["pass@2"]
    again = [json.loads(line) for line in (tmp_path / "given" / "predictions.jsonl").read_text().splitlines()]
    assert [row["response"] for row in again if row["model"] == "made/predictions.jsonl"] == [row["response"] for row in rows]
    assert {row["mode"] for row in again} == {"given"}


def predicted(tmp_path, rows, records):
    """Responses of each sample, as eval.py reads them from a file of these rows."""
    path = write_rows(tmp_path / "given.jsonl", rows)
    return [[row["response"] for row in sample] for sample in evaluation_script.read_predictions(path, "test", records)]


def test_predictions_for_prompts_that_repeat(tmp_path):
    """CoNaLa's rows have no ids, and some share a prompt. As eval.py writes them, a sample after the other, each row gets its own; where
    each different prompt has as many, rows that share it share them."""
    records = [Record(prompt=prompt, reference="x") for prompt in ("p", "q", "p")]
    rows = [{"id": None, "prompt": record.prompt, "response": f"{n}{i}"} for n in range(2) for i, record in enumerate(records)]
    assert predicted(tmp_path, rows, records) == [["00", "01", "02"], ["10", "11", "12"]]
    assert predicted(tmp_path, rows[:3], records) == [["00", "01", "02"]] and predicted(tmp_path, rows[:2], records) == [["00", "01", "00"]]
    with pytest.raises(InputError, match="answers a prompt: give each"):
        predicted(tmp_path, rows[:4], records)
    twice = [Record(prompt=prompt, reference="x") for prompt in ("p", "q", "p", "q")]
    own = [{"prompt": record.prompt, "response": str(i)} for i, record in enumerate(twice)]
    assert predicted(tmp_path, own, twice) == [["0", "1", "2", "3"]] and predicted(tmp_path, own[:2], twice) == [["0", "1", "0", "1"]]


def test_predictions_whose_id_and_prompt_disagree(tmp_path):
    """A tool's running number is not the id of our row; where it is none of ours, the prompt counts."""
    records = [Record(prompt=f"p{n}", id=str(n)) for n in range(3)]
    with pytest.raises(InputError, match="given.jsonl:1: its id 1 is that of the prompt 'p1', not of 'p2': leave one of them out"):
        predicted(tmp_path, [{"id": "1", "prompt": "p2", "response": "x"}], records)
    assert predicted(tmp_path, [{"id": f"mine-{n}", "prompt": f"p{n}", "response": f"r{n}"} for n in (2, 0, 1)], records) == [["r0", "r1", "r2"]]


def test_differences_are_of_rows_that_both_have():
    """Rewards 1 2 - 4 against - 1 0 2: of the rows that both have, 2 and 4 against 1 and 2, the difference is -1.5; of all, -1.33."""
    def counted(rewards):
        return {"reward": ([[0.0, 0.0] if x is None else [x, 1.0] for x in rewards], lambda sums: sums[0] / max(sums[1], 1.0))}
    found = evaluation_script.differences(counted([1.0, 2.0, None, 4.0]), counted([None, 1.0, 0.0, 2.0]))
    assert found["reward"]["difference"] == pytest.approx(-1.5)
    assert evaluation_script.differences(counted([1.0, None]), counted([None, 1.0])) == {}


def test_eval_says_what_could_not_be_scored(home, tmp_path, monkeypatch, capsys):
    """How many answers a sum of terms left out; and each of its terms is in the table."""
    (tmp_path / "gaps_zq.py").write_text("def f(p, responses, q): return [float('nan') if i % 3 else 1.0 for i in range(len(responses))]\n")
    monkeypatch.chdir(tmp_path)
    words = ["--model", str(home / "runs" / "sft"), "--data", str(home / "data.jsonl"), *TEXT, "--rows", "6", "--reward", "gaps_zq:f + syntax"]
    main(evaluation_script.run_evaluation, parse(evaluation_script.Config, argv=[*words, "--out", "e"], prog="eval.py"))
    (found,) = json.loads(Path("e/results.json").read_text())["results"]["test"]["metrics"].values()
    assert found["left_out"] == 4 and "reward" not in found["reasons"] and "4 of 6 answers" in capsys.readouterr().out
    assert found["reward/gaps_zq:f"] == 1.0 and 0 <= found["reward/syntax"] <= 1


def test_ratings_that_are_all_alike_are_only_centred():
    """A spread of 0 must not make validation ratings millions of standard deviations; of a few rows, as in a trial, that may happen."""
    config = settings(train_reward, "--max-rows", "3")
    train, held_out = train_reward.rated(Splits([Record("p", response="r", rating=5)] * 3, [Record("q", response="r", rating=3)], []), config)
    assert [row["rating"] for row in train] == [0, 0, 0] and held_out[0]["rating"] == -2
    with pytest.raises(InputError, match="all training rows are rated 5"):
        train_reward.rated(Splits([Record("p", response="r", rating=5)] * 3, [], []), settings(train_reward, "--ratings", "x"))


def test_a_dry_run_takes_no_more_rows_than_asked_for(home, capsys):
    assert launch("train_sft", "--data", str(home / "data.jsonl"), *TEXT, *SFT, "--out", str(home / "runs" / "dry"), "--dry-run", "--max-rows", "2") == 0
    assert "the first 2 rows" in capsys.readouterr().out


def test_a_stage_that_was_begun_on_other_rows_is_made_anew(home, tmp_path, monkeypatch, capsys):
    """`ensure` asks for --resume --overwrite: what cannot be gone on with is replaced, and the job goes on."""
    data = tmp_path / "data.jsonl"
    shutil.copy(home / "data.jsonl", data)
    words = ["--data", str(data), "--out", str(tmp_path / "sft"), *TEXT, *SFT, "--save-steps", "1"]
    stop_after(1, monkeypatch, train_sft, *words)
    with open(data, "a") as file:
        file.write(json.dumps({"prompt": "add 77 to zs", "reference": "zs + 77"}) + "\n")
    assert launch("train_sft", *words, "--resume", "--overwrite") == 0
    assert f"{tmp_path / 'sft'} was begun with another data set: made anew" in capsys.readouterr().out


def test_without_a_policy_scores_are_normalised_over_both_sides(home, tmp_path, capsys):
    """Mean 0 over good answers alone would be no zero at all."""
    out = tmp_path / "alone" / "reward"
    assert launch("train_reward", "--data", preferences(tmp_path / "pairs.jsonl"), "--model", str(home / "runs" / "sft"), "--out", str(out),
                  "--epochs", "1", "--batch-size", "8", "--device", "cpu") == 0
    assert "normalised over the validation responses, chosen, rejected and rated" in capsys.readouterr().out
    rows = [json.loads(line) for line in (out / PAIR_FILES[1]).read_text().splitlines()]
    scores = RewardModel.from_pretrained(out).score([row["prompt"] for row in rows] * 2, [row[name] for name in ("chosen", "rejected") for row in rows])
    assert scores.mean().item() == pytest.approx(0, abs=1e-4) and scores.std(unbiased=False).item() == pytest.approx(1, abs=1e-3)


def test_answers_without_a_reward_are_in_the_table():
    """They make the columns means over other rows; where there are none, there is no such line."""
    modes = {mode: {"SFT": {"reward": 1.0, "left_out": 3}, "PPO": {"reward": 2.0, "left_out": None}} for mode in ("sampled", "greedy")}
    results = {**modes, "gain": {"sampled": {}, "greedy": {}}}
    assert "| answers without a reward, sampled | 3 | 0 | |" in evaluation.table("test", 9, results)
    modes["greedy"]["SFT"]["left_out"] = None
    assert "without a reward, greedy" not in evaluation.table("test", 9, results)


def test_a_metric_that_only_a_later_policy_has_is_in_the_table():
    shown = evaluation_script.table("test", {"a": {"x": 1.0, "intervals": {}}, "b": {"x": 2.0, "pass@2": 0.5, "intervals": {}}}, {"b": {}})
    assert "| pass@2 | not computed | 0.500 |" in shown and "| x | 1.000 | 2.000 |" in shown


def test_eval_needs_policies_or_answers():
    for words, message in (([], "--model: name at least one policy, such as --model runs/ppo, or answers with --predictions"),
                           (["--predictions", "a.jsonl", "--temperature", "1"], "--temperature: for policies that answer, but there are only")):
        with pytest.raises(InputError) as error:
            parse(evaluation_script.Config, evaluation_script.PRESETS, words, exit_on_error=False)
        assert message in str(error.value)


def test_predictions_of_one_split_are_not_anothers(tmp_path):
    """Ids that each split counts from 0: the column `split`, where it is there, tells them apart."""
    path = tmp_path / "answers.jsonl"
    write_rows(path, [{"split": split, "id": n, "response": f"{split} {n}"} for split in ("validation", "test") for n in range(3)])
    records = [Record(prompt=f"p{n}", reference="test 1", id=str(n)) for n in range(3)]
    (rows,) = evaluation_script.read_predictions(str(path), "test", records)
    write_rows(tmp_path / "null.jsonl", [{"id": None, "prompt": f"p{n}", "response": f"test {n}"} for n in range(3)])
    (same,) = evaluation_script.read_predictions(str(tmp_path / "null.jsonl"), "test", [dataclasses.replace(r, id=None) for r in records])
    assert [row["response"] for row in same] == [row["response"] for row in rows], "eval.py writes such ids where rows have none"
    assert [row["response"] for row in rows] == ["test 0", "test 1", "test 2"] and [row["exact_match"] for row in rows] == [0, 1, 0]


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox's walls need Linux")
def test_references_that_fail_their_own_checks_are_said(home, checked, tmp_path, capsys):
    """A check that nothing passes makes execution worth nothing. Here none is so, then one check of every row."""
    rows = [json.loads(line) for line in Path(checked).read_text().splitlines()]
    for count in (0, len(rows)):
        for row in rows[:count]:
            row["checks"][1]["value"] = "'never'"
        data = write_rows(tmp_path / f"{count}.jsonl", rows)
        assert launch("train_reward", "--data", data, "--policy", str(home / "runs" / "sft"), "--out", str(tmp_path / f"reward{count}"), *TEXT,
                      *REWARD) == 0
        said = capsys.readouterr().out
        assert ("references that fail their own checks: 60 of the 60 tried, such as" in said) == bool(count)


def test_pass_at_k_by_hand(monkeypatch):
    """Five samples, two pass: pass@1 = 2/5, pass@2 = 1 - C(3,2)/C(5,2) = .7, pass@5 = 1. Without checks there is none."""
    verdicts = iter([1.0, None] + [0.0, None] * 3 + [1.0, None])
    def add_execution(rows, records, box):
        for row in rows:
            row["execution"] = next(verdicts)
        return rows
    monkeypatch.setattr(evaluation_script, "add_execution", add_execution)
    samples = [[{"id": "a"}, {"id": "b"}] for _ in range(5)]
    evaluation_script.add_passes(samples, [None, None], None)
    a, b = samples[0]
    assert (a["pass@1"], a["pass@2"], a["pass@5"], a["execution_accuracy"]) == (pytest.approx(0.4), pytest.approx(0.7), 1, 1)
    assert "pass@10" not in a and b["pass@1"] is None
    counted = evaluation_script.counts([{**row, "reference": None} for row in (a, b)])
    values, score = counted["pass@1"]
    assert values == [[pytest.approx(0.4), 1.0], [0.0, 0.0]] and score([0.4, 1.0]) == 0.4, "a row without a value counts for nothing"


# ---------------------------------------------------------------------------------------------------- pipeline

@pytest.mark.parametrize("preset", ["fast", "conala"])
def test_the_report_of_several_seeds(preset, tmp_path, monkeypatch):
    """Jobs are made in order with their preset, data and seed, finished stages are reused; the report has a row a seed and policy, no
    column that nothing fills, and the paired gain: exact matches [0, 1] -> [1, 1] on seed 0, [0, 0] -> [1, 1] on seed 1 is + .75."""
    ran, last = [], {"fast": "ppo-execution", "conala": "ppo-bleu"}[preset]
    numbers = {"reward": 1.5, "exact_match": 0.5, "execution": 0.25 if preset == "fast" else None, "conala_bleu": 9.0, "length": 3.0,
               "kl": 0.1, "ended": 1.0}

    def make(words):
        folder = Path(words[words.index(next(w for w in words if w.startswith("--out")))].removeprefix("--out="))
        ran.append((folder.name, *words[2:4], words[5]))
        seed, model = int(folder.parent.name[5:]), "DPO" if folder.name == "dpo" else "PPO"
        for stage in ("sft", "reward", folder.name):
            (folder.parent / stage).mkdir(parents=True, exist_ok=True)
            (folder.parent / stage / "config.toml").write_text(f'data = "{words[3].removeprefix("--data=")}"\n')
            (folder.parent / stage / "results.json").write_text(json.dumps({
                "seconds": 7.0, "peak_memory_mb": 8, "validation": {"eval/accuracy": 0.9},
                "test": {"test": {mode: {"SFT": numbers, model: numbers} for mode in ("sampled", "greedy")}}}))
        rows = [{"split": "test", "mode": mode, "model": name, **numbers, "exact_match": match}
                for mode in ("sampled", "greedy") for name in ("SFT", model)
                for match in ([0.0, 1.0 - seed] if name == "SFT" else [1.0, 1.0])]
        write_rows(folder / "answers.jsonl", rows)
        return 0

    monkeypatch.setattr(pipeline, "call", make)
    config = parse(pipeline.Config, pipeline.PRESETS, ["--preset", preset, "--seeds", "0", "1", "--out", str(tmp_path / "seeds"), "--report",
                                                       str(tmp_path / "docs" / "R.md")])
    pipeline.main(config)
    data = {"fast": "nano", "conala": "conala"}[preset]
    assert ran == [(stage, f"--preset={preset}", f"--data={data}", f"--seed={seed}") for seed in (0, 1) for stage in ("ppo", "dpo", last)]
    text = (tmp_path / "docs" / "R.md").read_text()
    pipeline.main(config)
    assert len(ran) == 6 and (tmp_path / "docs" / "R.md").read_text() == text
    with pytest.raises(InputError, match="ppo was made with data = '(nano|conala)'"):  # not a report of other data than is named
        pipeline.job(tmp_path / "seeds" / "seed-0", 0, preset, "other.jsonl")
    assert "seeds 0, 1." in text and "{" not in text and ("passes its checks |" in text) == (preset == "fast")
    assert text.count("\n| 1 | DPO |") == 2 and text.count("exact match (AST-equal) +0.750 [") == 6
    head, rule = (line for line in text.splitlines()[-4:-2])
    assert head.count("|") == rule.count("|") == text.splitlines()[-1].count("|") == 9



def test_a_job_goes_on_with_what_is_unfinished_and_ends_where_a_stage_fails(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(pipeline, "call", lambda words: ran.append(words) or (3 if len(ran) == 2 else 0))
    (tmp_path / "ppo").mkdir()
    with pytest.raises(SystemExit) as exit:
        pipeline.job(tmp_path, 0, "fast", "nano")
    assert exit.value.code == 3 and len(ran) == 2 and [path.name for path in tmp_path.glob("*.seconds")] == ["ppo.seconds"]
    assert ran[0][-2:] == ["--resume", "--overwrite"] and "--resume" not in ran[1]


def test_a_trial_uses_stages_made_on_a_few_rows(home, tmp_path, capsys):
    """A dry run takes fewer rows than any stage was made on; it used to refuse stages made with --max-rows, whatever was asked for."""
    shutil.copytree(home / "runs" / "sft", tmp_path / "sft")
    path = tmp_path / "sft" / "config.toml"
    config = settings(train_ppo, "--data", str(home / "data.jsonl"), *TEXT, "--max-rows", "8")
    pipeline.ensure("train_sft.py", tmp_path / "sft", config)  # made on all rows, of which ours are the first
    assert "finished already, reused" in capsys.readouterr().out
    path.write_text(path.read_text().replace("max_rows = 0", "max_rows = 40"))
    with pytest.raises(InputError, match="max_rows = 40, this run asks for 8"):
        pipeline.ensure("train_sft.py", tmp_path / "sft", config)
    config.trial = True
    pipeline.ensure("train_sft.py", tmp_path / "sft", config)
    assert "finished already, reused" in capsys.readouterr().out


def test_a_missing_stage_is_made_with_the_same_data(home, tmp_path, monkeypatch, capsys):
    """`ensure` runs the script as a user would, data options, seed and device handed on; its failure is ours."""
    ran = []
    monkeypatch.setattr(pipeline, "call", lambda words: ran.append(words) or 3)
    config = settings(train_ppo, "--data", str(home / "data.jsonl"), "--seed", "7", *TEXT, "--out",
                      str(tmp_path / "ppo"), "--template", "Q {prompt}\n", "--preset", "fast")
    with pytest.raises(SystemExit) as exit:
        pipeline.ensure("train_sft.py", tmp_path / "sft", config, model="gpt2")
    assert exit.value.code == 3
    words = ran[0][2:]
    made = parse(train_sft.Config, train_sft.PRESETS, words)
    assert (made.seed, made.data, made.template, made.max_query, made.device, made.model, made.out) == \
        (7, str(home / "data.jsonl"), "Q {prompt}\n", 20, "cpu", "gpt2", str(tmp_path / "sft"))
    config = replace(config, sandbox="require", sandbox_timeout=3.0)
    with pytest.raises(SystemExit):
        pipeline.ensure("train_reward.py", tmp_path / "reward", config, policy="")
    made = parse(train_reward.Config, train_reward.PRESETS, ran[1][2:])
    assert (made.sandbox, made.sandbox_timeout, made.sandbox_workers) == ("require", 3.0, 2)
    assert made.config_preset == "fast" and "--epochs=1" not in ran[1] and not {"--resume", "--overwrite"} & {*ran[1]}
    config = replace(config, gpu=0, device="auto", precision="bf16")
    config.trial = True
    (tmp_path / "sft").mkdir()  # begun, and not finished
    monkeypatch.setattr(pipeline, "call", lambda words: ran.append(words) or -9)  # the kernel's, where memory is out
    with pytest.raises(SystemExit) as exit:
        pipeline.ensure("train_sft.py", tmp_path / "sft", config)
    assert exit.value.code == 1 and "ended by signal 9" in capsys.readouterr().err
    made = parse(train_sft.Config, train_sft.PRESETS, ran[2][2:])
    assert (made.gpu, made.device, made.precision, made.epochs, made.resume, made.overwrite) == (0, "auto", "bf16", 1, True, True)


def test_a_reward_model_of_another_policys_samples_is_refused(tmp_path):
    """Without --policy a stage has the sft/ beside it, which may also be named."""
    folder = tmp_path / "reward"
    folder.mkdir()
    (folder / "results.json").touch()
    for theirs, ours, fits in (("", "", True), ("", tmp_path / "sft", True), ("other", "other", True), ("other", "", False),
                               ("other", tmp_path / "sft", False), ("", "other", False)):
        save(settings(train_reward, "--data", "d", f"--policy={theirs}"), folder / "config.toml")
        if fits:
            pipeline.ensure("train_reward.py", folder, settings(train_ppo, "--data", "d"), policy=str(ours))
        else:
            with pytest.raises(InputError, match="was made with policy = "):
                pipeline.ensure("train_reward.py", folder, settings(train_ppo, "--data", "d"), policy=str(ours))


def test_a_run_is_found_from_its_models(tmp_path):
    out = tmp_path / "ppo"
    for name in ("final", "best", "checkpoints/step-10", "other"):
        (out / name).mkdir(parents=True)
    assert pipeline.run_of(out / "final") is None
    (out / "config.toml").touch()
    assert [pipeline.run_of(out / name) for name in ("", "final", "best", "checkpoints/step-10", "other")] == [out] * 4 + [None]


def test_a_policy_of_another_split_is_refused(tmp_path):
    """On the same data other test rows are rows that it was trained on; on other data splits say nothing. Its template must be the same."""
    (tmp_path / "sft" / "final").mkdir(parents=True)
    (tmp_path / "sft" / "config.toml").write_text(f'data = "{tmp_path}/d"\ntemplate = "Q {{prompt}}\\n"\nvalidation = 0.1\ntest = 0.1\nsplit_seed = 0\n')

    def check(*words):
        config = parse(train_ppo.Config, train_ppo.PRESETS, ["--template", "Q {prompt}\n", "--data", f"{tmp_path}/x/../d", *words])
        pipeline.check_policy(tmp_path / "sft" / "final", config)
    check()
    for words in (["--split-seed", "1"], ["--test", "0.2"], ["--validation", "0.2"]):
        with pytest.raises(InputError, match="was made with " + words[0][2:].replace("-", "_")):
            check(*words)
        check(*words, "--allow-overlap")
        check(*words, "--data", "other")
    with pytest.raises(InputError, match="was made with template"):
        check("--template", "{prompt}")


def test_an_option_that_was_unset_by_hand_is_unset(tmp_path):
    """--min-probability none is in the file as "none": the stage was refused as one of other data."""
    (tmp_path / "config.toml").write_text('min_probability = "none"\n')
    pipeline.check_same(tmp_path, {"min_probability": None, "max_rows": None})
    for value in (0.5, 0.0):
        with pytest.raises(InputError, match=f"was made with min_probability = None, this run asks for {value}"):
            pipeline.check_same(tmp_path, {"min_probability": value})


@pytest.mark.parametrize("change",
                         [["--template", "Q {prompt}\n"], ["--split-seed", "5"], ["--data-format", "reference"], ["--max-query", "19"]])
def test_a_stage_of_other_data_is_refused(home, change, capsys):
    """Other splits would let the reward stage learn from what is now a test row."""
    out = home / "runs" / "ppo-other"
    assert launch("train_ppo", "--data", str(home / "data.jsonl"), "--out", str(out), *TEXT, *PPO, *change) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and change[0][2:].replace("-", "_") in error and not out.exists()


def test_other_shares_of_the_splits_are_refused_too(home, capsys):
    """--test 0.3 makes test rows of rows that the stages were trained on."""
    out = home / "runs" / "ppo-shares"
    assert launch("train_ppo", "--data", str(home / "data.jsonl"), "--out", str(out), *TEXT, *PPO, "--test", "0.3") == 2
    assert not out.exists()


# ---------------------------------------------------------------------------------------------------- inside SFT

@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_label_smoothing_by_hand(smoothing):
    """(1 - e) * CE + e * mean over the vocabulary of -log p, both means over the 11 response tokens, row by row and
    unpadded; the same as torch's own label smoothing, in loss and gradient."""
    torch.manual_seed(0)
    model = GPT2.from_config(GPT2Config(vocab_size=40, n_positions=32, n_embd=24, n_layer=2, n_head=3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    loss, stats = train_sft.batch_loss(model, SimpleNamespace(pad_id=EOS), QUERIES, RESPONSES, range(4), "fp32",
                                       smoothing)
    logits = torch.cat([model(torch.tensor([query + response]))[0, len(query) - 1:-1]
                        for query, response in zip(QUERIES, RESPONSES)])  # (11, 40)
    targets = torch.tensor(sum(RESPONSES, []))
    logp = logits.log_softmax(-1)
    cross_entropy = -sum(logp[t, token] for t, token in enumerate(targets)) / 11
    expected = (1 - smoothing) * cross_entropy + smoothing * -logp.sum() / (11 * 40)
    assert stats["tokens"] == 11 and loss.item() == pytest.approx(expected.item(), abs=1e-5)
    theirs = nn.functional.cross_entropy(logits, targets, label_smoothing=smoothing)
    assert loss.item() == pytest.approx(theirs.item(), abs=1e-5)
    for ours, reference in zip(*(torch.autograd.grad(x, list(model.parameters())) for x in (loss, theirs))):
        assert torch.allclose(ours, reference, atol=1e-6)


def test_label_smoothing_is_for_training_alone(home):
    """The option reaches the training loss, which it changes from the first step on; validation loss is the plain
    cross-entropy whatever the option."""
    plain, smooth = settings(train_sft, "--label-smoothing", "0"), settings(train_sft, "--label-smoothing", "0.7")
    model, tokenizer = GPT2.from_pretrained(home / "runs" / "sft"), Tokenizer.from_pretrained(home / "runs" / "sft")
    losses = [train_sft.validation_loss(model, tokenizer, QUERIES, RESPONSES, config) for config in (plain, smooth)]
    whole, _ = train_sft.batch_loss(model, tokenizer, QUERIES, RESPONSES, range(4), "fp32")
    assert losses[0] == losses[1] == pytest.approx(whole.item(), abs=1e-6)
    first = []
    for smoothing in ("0", "0.7"):
        out = home / "runs" / f"sft-smoothing-{smoothing}"
        assert launch("train_sft", "--config", str(home / "runs" / "sft" / "config.toml"), "--out", str(out),
                      "--epochs", "1", "--label-smoothing", smoothing) == 0
        first.append(log(out)[0]["loss"])
    assert abs(first[0] - first[1]) > 1e-4


# ---------------------------------------------------------------------------------------------------- inside PPO

EOS, QUERIES = 9, [[3], [5, 6, 2], [1, 2, 3, 4, 5, 6], [7, 7]]


def settings(module, *words):
    return parse(module.Config, module.PRESETS, list(words), exit_on_error=False)


def rolled(temperature=0.7, seed=0):
    """An actor with random value head, and a ragged rollout of 12 rows with advantages and returns."""
    torch.manual_seed(seed)
    models = [GPT2.from_config(GPT2Config(vocab_size=40, n_positions=32, n_embd=24, n_layer=2, n_head=3))
              for _ in range(2)]
    with torch.no_grad():
        for parameter in (p for model in models for p in model.parameters()):
            parameter.add_(0.2 * torch.randn_like(parameter))
    actor = PolicyWithValue(models[0])
    nn.init.normal_(actor.value_head.weight, std=0.1)
    tokenizer = SimpleNamespace(pad_id=EOS, eos_id=EOS, decode=lambda ids, skip_special: str(ids))
    batch = roll_out(actor, models[1], tokenizer, QUERIES * 3, 14, temperature,
                     generator=torch.Generator().manual_seed(seed))
    rewards = shape_rewards(torch.randn(12), batch.logprobs - batch.ref_logprobs, batch.response_mask, 0.1)
    advantages, returns = gae(rewards, batch.values, batch.response_mask)
    assert len(set(batch.lengths.tolist())) > 4, "the test wants ragged rows"
    return actor, batch, whiten(advantages, batch.response_mask), returns


def updated(actor, batch, advantages, returns, *words, optimizer=None):
    config = settings(train_ppo, "--temperature", "0.7", "--batch-size", "12", *words)
    optimizer = optimizer or adamw([actor], config.lr or 3e-4, eps=1e-5)
    return train_ppo.update(actor, optimizer, batch, advantages, returns, config, 1)


@pytest.mark.parametrize("micro", ["12", "6", "1"])
def test_the_first_minibatch_has_ratio_1(micro, monkeypatch):
    """Nothing has been updated yet: ratio 1 within 1e-5 on every token, approx_kl 0, clipfrac 0, on ragged rows."""
    actor, batch, advantages, returns = rolled()
    seen, ratios = [], []
    whole, policy_loss = train_ppo.minibatch_loss, ops.ppo_policy_loss
    monkeypatch.setattr(train_ppo, "minibatch_loss", lambda *args: seen.append(whole(*args)) or seen[-1])

    def watch(new, old, advantages, mask, *args):
        ratios.append(((new - old).exp() - 1)[mask].abs().max().item())
        return policy_loss(new, old, advantages, mask, *args)
    monkeypatch.setattr(ops, "ppo_policy_loss", watch)
    updated(actor, batch, advantages, returns, "--minibatch-size", "6", "--micro-batch-size", micro)
    first = max(1, 6 // int(micro))  # the micro-batches of the first minibatch
    assert max(ratios[:first]) < 1e-5
    for _, stats in seen[:first]:
        assert stats["policy/ratio"] == pytest.approx(1, abs=1e-5)
        assert abs(stats["policy/approx_kl"]) < 1e-8 and stats["policy/clipfrac"] == 0
    assert max(ratios[first:]) > 1e-3, "later minibatches should have moved"


@pytest.mark.parametrize("words", [[], ["--entropy-coef", "0.1", "--dual-clip", "2"]],
                         ids=["plain", "entropy, dual clip"])
def test_ppo_micro_batches_change_nothing(words):
    """2 epochs of 2 minibatches of 6 ragged rows in pieces of 6, 4, 1: equal weights to 1e-6 and equal statistics."""
    actor, batch, advantages, returns = rolled()
    results = []
    for micro in ("6", "4", "1"):
        copied = copy.deepcopy(actor)
        stats = updated(copied, batch, advantages, returns, "--minibatch-size", "6", "--micro-batch-size", micro,
                        *words)
        results.append((copied.state_dict(), stats))
    for state, stats in results[1:]:
        assert gap(results[0][0], state) < 1e-6
        assert stats == pytest.approx(results[0][1], abs=1e-5)
    assert gap(results[0][0], actor.state_dict()) > 1e-4, "the update should do something"


def test_one_update_by_hand():
    """One epoch, one minibatch, plain SGD: a step of -lr times the clipped gradient of the loss written out here."""
    actor, batch, advantages, returns = rolled()
    twin, mask = copy.deepcopy(actor), batch.response_mask
    stats = updated(actor, batch, advantages, returns, "--ppo-epochs", "1", "--minibatch-size", "12",
                    "--micro-batch-size", "5",
                    "--vf-coef", "0.3", "--entropy-coef", "0.05", "--max-grad-norm", "0.5",
                    optimizer=torch.optim.SGD(actor.parameters(), lr=0.1))
    new, entropy, values = score_tokens(twin, batch.query_response, batch.attention_mask, mask.shape[1], 0.7)
    ratio = (new - batch.logprobs)[mask].exp()  # (N,) 1 everywhere, but not its gradient
    loss = -(ratio * advantages[mask]).mean() + 0.3 * 0.5 * ((values[:, :-1] - returns)[mask] ** 2).mean() \
        - 0.05 * entropy[mask].mean()
    gradients = torch.autograd.grad(loss, list(twin.parameters()))
    norm = torch.sqrt(sum((g ** 2).sum() for g in gradients))
    assert stats["loss/total"] == pytest.approx(loss.item(), abs=1e-5)
    assert stats["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    for before, after, gradient in zip(twin.parameters(), actor.parameters(), gradients):
        assert torch.allclose(after, before - 0.1 * gradient * min(1, 0.5 / norm), atol=1e-6)


def test_steps_2_to_4_by_hand(home, monkeypatch):
    """What the loop makes of a rollout: penalty for a missing EOS, KL-shaped rewards, GAE with a bootstrapped end.

    Row i has score i, clipped to 5, or -3 where it was cut (odd rows), a KL of 0.1 (t + 1) at token t, values 0.5, and
    a last value of 2 that counts only where it was cut. kl_coef 0.5, gamma 0.9, lambda 0.8.
    """
    (home / "ranks_zq.py").write_text("def f(prompts, responses, references):\n"
                                      "    return [float(i) for i in range(len(prompts))]\n")
    monkeypatch.chdir(home)
    seen, real = {}, train_ppo.roll_out

    def craft(*args):
        batch = real(*args)
        B, R = batch.response_mask.shape
        batch.response_mask = torch.arange(R) <= torch.arange(B)[:, None] % R
        batch.ended = torch.arange(B) % 2 == 0
        batch.ref_logprobs = batch.logprobs - 0.1 * torch.arange(1, R + 1)
        batch.values, batch.last_values = torch.full((B, R), 0.5), torch.full((B,), 2.0)
        return batch

    def keep(actor, optimizer, batch, advantages, returns, *rest):
        seen.update(mask=batch.response_mask, advantages=advantages, returns=returns)
        optimizer.step()  # without gradients: the scheduler wants to see one
        return {"loss/total": 0.0}
    monkeypatch.setattr(train_ppo, "roll_out", craft)
    monkeypatch.setattr(train_ppo, "update", keep)
    assert launch("train_ppo", "--data", "data.jsonl", "--policy", "runs/sft", "--reward", "ranks_zq:f", "--out",
                  "runs/by-hand", *TEXT, *PPO, "--steps", "1", "--missing-eos-penalty", "-3", "--score-clip", "5",
                  "--bootstrap-truncated",
                  "--no-whiten-advantages", "--kl-coef", "0.5", "--gamma", "0.9", "--lam", "0.8") == 0
    for i, (mask, advantages, returns) in enumerate(zip(*seen.values())):
        cut, length = i % 2 == 1, int(mask.sum())
        advantage, next_value = 0.0, 2.0 if cut else 0.0
        for t in reversed(range(length)):
            reward = -0.5 * 0.1 * (t + 1) + (t == length - 1) * (-3 if cut else min(i, 5))
            advantage = reward + 0.9 * next_value - 0.5 + 0.9 * 0.8 * advantage
            next_value = 0.5
            assert advantages[t].item() == pytest.approx(advantage, abs=1e-4)
            assert returns[t].item() == pytest.approx(advantage + 0.5, abs=1e-4)
    row, = [row for row in log(home / "runs" / "by-hand") if "objective/kl" in row]
    assert row["objective/kl"] == pytest.approx(sum(0.05 * n * (n + 1) for n in range(1, 9)) / 8, abs=1e-3)
    assert row["objective/score"] == pytest.approx((0 - 3 + 2 - 3 + 4 - 3 + 5 - 3) / 8)


def test_each_row_is_used_once_an_epoch(monkeypatch):
    actor, batch, advantages, returns = rolled()
    seen, whole = [], train_ppo.minibatch_loss
    monkeypatch.setattr(train_ppo, "minibatch_loss", lambda *args: seen.append(args[3]) or whole(*args))
    stats = updated(actor, batch, advantages, returns, "--minibatch-size", "4", "--micro-batch-size", "3",
                    "--ppo-epochs", "2")
    assert stats["policy/updates"] == 6 and len(seen) == 12  # 2 epochs, 3 minibatches of 4, micro-batches of 3 and 1
    for epoch in (seen[:6], seen[6:]):
        assert sorted(torch.cat(epoch).tolist()) == sorted(returns.tolist())
    assert not torch.equal(torch.cat(seen[:6]), torch.cat(seen[6:])), "the epochs should differ in order"


def test_final_scores_by_hand():
    """Scores 1 and 2, the second response cut. Replace by -1: (1, -1). Subtract 0.5: (1, 1.5). Without: as is."""
    scores, ended = torch.tensor([1.0, 2.0]), torch.tensor([True, False])
    assert train_ppo.final_scores(scores, ended, settings(train_ppo)).tolist() == [1, 2]
    replace = settings(train_ppo, "--missing-eos-penalty", "-1")
    assert train_ppo.final_scores(scores, ended, replace).tolist() == [1, -1]
    subtract = settings(train_ppo, "--missing-eos-penalty", "0.5", "--missing-eos-mode", "subtract")
    assert train_ppo.final_scores(scores, ended, subtract).tolist() == [1, 1.5]
    assert scores.tolist() == [1, 2], "the argument stays as it is"


def test_rollout_numbers_by_hand():
    """Log-ratios of policy to reference: log 2 and log 2 in the first response, log 4 in the second, and 9 in a slot that is masked.
    k1: (2 log 2 + log 4) / 2. k2: halves of the squares, (2 (log 2)^2 / 2 + (log 4)^2 / 2) / 2. k3 = e^-d - 1 + d:
    (2 (1/2 - 1 + log 2) + 1/4 - 1 + log 4) / 2. Lengths 2 and 1; the first ended. Texts "a b" and "a": one pair, different."""
    log2 = math.log(2)
    batch = SimpleNamespace(
        logprobs=torch.tensor([[-1.0, -1.0], [-1.0, 9.0]]), ref_logprobs=torch.tensor([[-1.0 - log2, -1.0 - log2], [-1.0 - 2 * log2, 0.0]]),
        response_mask=torch.tensor([[True, True], [True, False]]), lengths=torch.tensor([2, 1]), ended=torch.tensor([True, False]),
        responses=["a b", "a"])
    assert train_ppo.rollout_numbers(batch) == {
        "objective/kl": pytest.approx(2 * log2), "objective/kl_k2": pytest.approx(1.5 * log2 ** 2),
        "objective/kl_k3": pytest.approx((4 * log2 - 1.75) / 2), "response/length": 1.5, "response/eos": 0.5, "response/distinct": 1.0}


def test_scores_are_clipped_before_the_penalty():
    """Scores -9 and 9 clipped to +-2; the second was cut: replaced by -5, which is not clipped, or 5 less than 2."""
    scores, ended = torch.tensor([-9.0, 9.0]), torch.tensor([True, False])
    clip = ["--score-clip", "2"]
    assert train_ppo.final_scores(scores, ended, settings(train_ppo, *clip)).tolist() == [-2, 2]
    replace = [*clip, "--missing-eos-penalty", "-5"]
    assert train_ppo.final_scores(scores, ended, settings(train_ppo, *replace)).tolist() == [-2, -5]
    subtract = [*clip, "--missing-eos-penalty", "5", "--missing-eos-mode", "subtract"]
    assert train_ppo.final_scores(scores, ended, settings(train_ppo, *subtract)).tolist() == [-2, -3]
    assert train_ppo.final_scores(scores, ended, settings(train_ppo, "--score-clip", "none")).tolist() == [-9, 9]


def test_eos_in_the_last_slot_is_not_missing():
    """A rollout whose greedy rows end exactly in the last slot: `ended`, so the penalty leaves their scores."""
    actor, batch, *_ = rolled()
    full = batch.response_mask.all(1)
    last = batch.query_response[:, -1]
    assert torch.equal(batch.ended, ~full | (last == EOS))
    penalised = train_ppo.final_scores(torch.zeros(12), batch.ended, settings(train_ppo, "--missing-eos-penalty", "-1"))
    assert torch.equal(penalised == 0, batch.ended)


@pytest.mark.parametrize("count, batch_size", [(10, 4), (3, 8), (1, 2), (6, 6)])
def test_prompt_rows(count, batch_size):
    """Always whole batches, for ever; every pass over the rows is a permutation; the seed decides the order."""
    def take(seed, batches):
        return [train_ppo.prompt_rows(step, count, batch_size, seed) for step in range(1, batches + 1)]
    batches = take(0, 2 * count)
    assert all(len(batch) == batch_size for batch in batches)
    rows = [row for batch in batches for row in batch]
    for start in range(0, len(rows) - count + 1, count):
        assert sorted(rows[start:start + count]) == list(range(count))
    assert take(0, 2 * count) == batches and (count == 1 or take(1, 2 * count) != batches)


def test_explained_variance_by_hand():
    """Returns 1, 3: values 1, 3 explain all (1), a constant nothing (0), values 0, 4 err by 1 around a variance of 1
    (0); the masked entry counts nowhere."""
    returns, mask = torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[True, True, False]])
    for values, expected in (([1.0, 3.0, -7.0], 1), ([5.0, 5.0, 0.0], 0), ([0.0, 4.0, 0.0], 0),
                             ([1.0, 2.0, 0.0], 0.75)):
        assert train_ppo.explained_variance(torch.tensor([values]), returns, mask) == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------- inside DPO

def dpo_model(folder):
    torch.manual_seed(0)
    model = GPT2.from_config(GPT2Config(vocab_size=40, n_positions=32, n_embd=24, n_layer=2, n_head=3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


RESPONSES = [[8, 9], [4], [11, 12, 13, 14, 9], [5, 5, 9]]


@pytest.mark.parametrize("words, mean",
                         [([], False), (["--loss-type", "ipo"], True), (["--loss-type", "ipo", "--ipo-sum"], False),
                                         (["--loss-type", "hinge"], False)], ids=["sigmoid", "ipo", "ipo sum", "hinge"])
def test_sequence_logps_equal_a_sum_through_transformers(tmp_path, words, mean):
    """Row by row, unpadded: the log-probs of the response tokens, EOS included, the query left out; means for ipo."""
    transformers = pytest.importorskip("transformers")
    model = dpo_model(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    found = train_dpo.sequence_logps(model, SimpleNamespace(pad_id=9), QUERIES, RESPONSES, settings(train_dpo, *words))
    for logp, query, response in zip(found, QUERIES, RESPONSES):
        whole = torch.tensor([query + response])
        logprobs = theirs(whole).logits[0, len(query) - 1:-1].log_softmax(-1)
        expected = sum(logprobs[t, token].item() for t, token in enumerate(response))
        assert logp.item() == pytest.approx(expected / len(response) if mean else expected, abs=1e-5)


def test_pair_and_reference_logps(tmp_path):
    """Chosen and rejected in one forward are each by themselves; the reference in pieces is the reference at once."""
    model, tokenizer = dpo_model(tmp_path), SimpleNamespace(pad_id=9)
    config = settings(train_dpo, "--micro-batch-size", "3")
    pairs = list(zip(QUERIES, RESPONSES, RESPONSES[::-1]))
    chosen, rejected = train_dpo.pair_logps(model, tokenizer, pairs, config)
    assert torch.allclose(chosen, train_dpo.sequence_logps(model, tokenizer, QUERIES, RESPONSES, config), atol=1e-5)
    assert torch.allclose(rejected, train_dpo.sequence_logps(model, tokenizer, QUERIES, RESPONSES[::-1], config),
                          atol=1e-5)
    reference = train_dpo.reference_logps(model, tokenizer, pairs, config)
    assert reference.shape == (4, 2) and not reference.requires_grad and chosen.requires_grad
    assert torch.allclose(reference, torch.stack([chosen, rejected], 1), atol=1e-5)
    losses, stats = train_dpo.batch_loss(model, tokenizer, pairs, reference, config)
    assert torch.allclose(losses, torch.full((4,), 0.693147), atol=1e-4)
    assert stats["rewards/margin"] == pytest.approx(0, abs=1e-5)


def test_validation_means_weigh_pairs_equally(tmp_path):
    """4 pairs in pieces of 3 and 1 give the mean over 4, not the mean of two means."""
    model, tokenizer = dpo_model(tmp_path), SimpleNamespace(pad_id=9)
    pairs, reference = list(zip(QUERIES, RESPONSES, RESPONSES[::-1])), torch.arange(8.0).reshape(4, 2) ** 1.5
    whole, pieces = (train_dpo.validate(model, tokenizer, pairs, reference,
                                        settings(train_dpo, "--micro-batch-size", size))
                     for size in ("4", "3"))
    assert whole == pytest.approx(pieces, abs=1e-4)


# --------------------------------------------------------------------------------------------------------- bad input

def rated(path, unrated=None):
    """30 responses with ratings, but for one where a row's number is given."""
    rows = [{"prompt": f"task {n}", "response": f"x + {n}", "rating": n % 5} for n in range(30)]
    if unrated is not None:
        del rows[unrated]["rating"]
    return write_rows(path, rows)


@pytest.fixture(scope="module")
def bad(home):
    """Faulty data beside the good: {name: path}."""
    leaking = home / "leaking"
    leaking.mkdir()
    rows = [{"prompt": f"task {n}", "reference": f"x + {n}"} for n in range(20)]
    write_rows(leaking / "train.jsonl", rows)
    write_rows(leaking / "test.jsonl", [{"prompt": "TASK 3", "reference": "y"}])
    (home / "bare.json").write_text(json.dumps([f"task {n}" for n in range(20)]))
    return {"leaking": str(leaking), "columns": write_rows(home / "columns.jsonl", [{"question": "a", "answer": "b"}]),
            "prompts": str(home / "bare.json"),
            "few": write_rows(home / "few.jsonl", rows[:2]), "pairs": preferences(home / "pairs.jsonl"),
            "ratings": rated(home / "ratings.jsonl"), "half_rated": rated(home / "half_rated.jsonl", 2),
            "data": str(home / "data.jsonl"), "sft": str(home / "runs" / "sft"),
            "reward": str(home / "runs" / "reward"), "nowhere": str(home / "nowhere" / "model")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_preset_is_good_and_takes_pretrained_weights(script):
    """Also `--preset conala --model NAME`: no preset contradicts itself, and its shape gives way to the model's."""
    module = importlib.import_module(script)
    for preset in module.PRESETS:
        assert settings(module, "--preset", preset, "--model", "gpt2").model == "gpt2"


def test_the_learning_rate_goes_by_size(capsys):
    """Width 256 halves the rate of 128; from 20,000,000 parameters on it is the second; --lr overrules both."""
    small, large = (SimpleNamespace(parameters=lambda n=n: [torch.empty(n, device="meta")]) for n in (19_999_999, 20_000_000))
    assert [learning_rate(None, small, 256, 1e-3, 1e-5), learning_rate(None, large, 256, 1e-3, 1e-5)] == [5e-4, 1e-5]
    assert learning_rate(0.5, large, 256, 1e-3, 1e-5) == 0.5
    assert "learning rate 1e-05, for 20,000,000 parameters" in capsys.readouterr().out



@no_cuda
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_gpu_that_is_not_there_is_one_line(script, tmp_path, capsys):
    assert launch(script, "--gpu", "0", "--out", str(tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--gpu 0" in error and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["train_ppo", "train_dpo"])
def test_a_bad_reward_is_refused_before_stages_are_made(script, bad, tmp_path, monkeypatch, capsys):
    """Neither minutes of SFT nor its folder should come before the line that says that --reward is no reward."""
    made = []
    monkeypatch.setattr(pipeline, "ensure", lambda script, *args, **options: made.append(script))
    data = preferences(tmp_path / "pairs.jsonl") if script == "train_dpo" else bad["data"]
    assert launch(script, "--data", data, "--reward", bad["nowhere"], "--out", str(tmp_path / "run"), *TEXT) == 2
    assert "nowhere" in capsys.readouterr().err and made == []


@pytest.mark.parametrize("returns, count", [("[1.0]", 5), ("[1.0] * 100", None)], ids=["one", "too many"])
def test_a_reward_with_the_wrong_number_of_scores(home, bad, monkeypatch, capsys, returns, count):
    """Found before training, on the first 5 rows, not averaged over the rows that happened to get a score: one score for anything, or
    a hundred."""
    name = f"miscounting_zq{len(returns)}"
    (home / f"{name}.py").write_text(f"def f(prompts, responses, references):\n    return {returns}\n")
    monkeypatch.chdir(home)
    out = home / "runs" / name
    assert launch("train_ppo", "--data", bad["data"], "--policy", bad["sft"], "--reward", f"{name}:f", "--out",
                  str(out), *TEXT, *PPO) == 2
    error = capsys.readouterr().err
    assert f"scores for {count or ''}" in error and ": error: the reward" in error.splitlines()[-1]
    assert not (out / "metrics.jsonl").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_rows_without_ids_are_named_by_their_prompts(home, tmp_path, capsys, script):
    """Rows of one's own have no ids: "its rows are None, None; look at them" said nothing."""
    rows = [{"prompt": f"add {number} to {name}", "reference": f"{name} + {number}"} for number in range(10) for name in ("xs", "rows")]
    pairs = [{"prompt": row["prompt"], "chosen": row["reference"], "rejected": "xs"} for row in rows]
    data, sft = write_rows(tmp_path / "rows.jsonl", pairs if script in ("train_reward", "train_dpo") else rows), str(home / "runs" / "sft")
    few = ["--batch-size", "4"]
    given = {"train_sft": ["--model", sft, *few], "train_reward": ["--model", sft, *few], "train_dpo": ["--policy", sft, *few],
             "train_ppo": ["--policy", sft, "--reward", "length", *PPO[:-2]]}
    assert launch(script, "--data", data, "--out", str(tmp_path / "run"), "--lr", "1e30", *(TEXT[-2:] if script == "train_reward" else TEXT),
                  *given[script]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "; its rows are 'add " in line and "None" not in line


def test_what_messages_call_a_row():
    assert called(Record("a", id="7")) == called({"id": "7", "prompt": "a"}) == "7"
    assert called(Record("a\nb")) == called({"id": None, "prompt": "a\nb"}) == r"'a\nb'"
    assert len(called(Record("long " * 99))) == 40
    with pytest.raises(RunFailed, match="is not finite for 1 of 2 responses: rows 'second'$"):
        evaluation.check_finite(torch.tensor([0.0, float("nan")]), [Record("first"), Record("second")], "validation", None)


@pytest.mark.parametrize("reward, excused", [(lambda *columns: [float("nan")] * len(columns[0]), True), (lambda *columns: [float("inf")] * len(columns[0]), False),
                                             (Combination([Term("length", 1e300, RULES["length"])]), False)], ids=["nan", "inf", "sum"])
def test_only_a_nan_is_told_that_a_sum_leaves_it_out(reward, excused):
    """The advice was given for infinities too, which no sum leaves out, and for sums: --reward '1*1e300*length'."""
    rows = [Record("a", reference="b")]
    with pytest.raises(InputError, match="not finite; mend it") as found:
        train_ppo.check_reward(reward, "mine:f", Splits(rows, rows, rows), SimpleNamespace(eval_rows=1, reward=["mine:f"]))
    assert ("'1*mine:f'" in str(found.value)) == excused


@pytest.mark.parametrize("rows, words", [(4, "validation: the reward is not finite for 4 of 4 responses: rows words2"),
                                         (8, "step 1: the reward is not finite for 8 of 8 responses: rows ")],
                         ids=["validation", "training"])
def test_a_reward_that_is_not_finite_stops_the_run(home, bad, monkeypatch, capsys, rows, words):
    """NaN for batches of one size, 4 validation rows or 8 training rows: exit 1, one line that names the step, before
    the policy learns from it."""
    name = f"nan_zq{rows}"
    (home / f"{name}.py").write_text("def f(prompts, responses, references):\n"
                                     f"    return [float('nan' if len(prompts) == {rows} else 0)] * len(prompts)\n")
    monkeypatch.chdir(home)
    assert launch("train_ppo", "--data", bad["data"], "--policy", bad["sft"], "--reward", f"{name}:f", "--out",
                  str(home / "runs" / name), *TEXT, *PPO) == 1
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (home / "runs" / name / "results.json").exists()
