"""Asking policies from the command line: the answers are those of `generate`, in order, on stdout alone."""
import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from nanorlhf import generate, rollout
from nanorlhf.config import parse
from nanorlhf.gpt2 import GPT2, GPT2Config
from nanorlhf.reward import RewardModel
from nanorlhf.run import main
from nanorlhf.tokenizer import Tokenizer, pad

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ["sort xs", "the larger of a and b", "sum rows"]
TEMPLATE = "Q: {prompt}\nA: "


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """policy/, a folder of weights; run/, a run whose template and lengths are not the defaults; reward/."""
    home = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer.train([f"{prompt}\nsorted(xs)" for prompt in PROMPTS] * 9, 270)
    for seed, folder in enumerate((home / "policy", home / "run" / "final")):
        torch.manual_seed(seed)
        GPT2.from_config(GPT2Config(tokenizer.vocab_size, 48, 16, 1, 2, initializer_range=0.4)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (home / "run" / "config.toml").write_text(f"template = {json.dumps(TEMPLATE)}\nmax_query = 30\nmax_response = 6\n")
    RewardModel.from_pretrained(home / "policy", new_head="native").save_pretrained(home / "reward")
    return home


@pytest.fixture
def ask(models, monkeypatch, capsys, tmp_path):
    """The command in this process: (exit code, stdout, stderr). Words are split at spaces, further ones are taken whole."""
    monkeypatch.chdir(tmp_path)
    for name in ("policy", "run", "reward"):
        os.symlink(models / name, name)

    def command(words, *more, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            main(generate.generate, parse(generate.Config, argv=[*words.split(), *more]))
            code = 0
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()
    return command


def by_hand(folder, prompt, template, length, temperature=0.0, seed=0):
    """The answer to one prompt through `rollout.generate`."""
    model, tokenizer = GPT2.from_pretrained(folder), Tokenizer.from_pretrained(folder)
    ids, mask = pad([tokenizer.encode(template.format(prompt=prompt))], tokenizer.pad_id, "left")
    found = rollout.generate(model, ids, mask, length, temperature, eos_id=tokenizer.eos_id, generator=torch.Generator().manual_seed(seed))
    return rollout.decode(tokenizer, *found[:2])[0]


def test_each_model_is_asked_as_it_was_trained(ask, models):
    """The run with its template and 6 tokens, the bare folder with the defaults; both with what is given."""
    code, out, err = ask("--model policy run --out a.jsonl --max-query 30 --max-response 6", "--prompt", *PROMPTS)
    rows = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    assert code == 0 and [(row["prompt"], row["model"]) for row in rows] == [(p, m) for p in PROMPTS for m in ("policy", "run")]
    for row in rows:
        folder, template = ("run/final", TEMPLATE) if row["model"] == "run" else ("policy", "{prompt}\n")
        assert row["response"] == by_hand(models / folder, row["prompt"], template, 6)
    ask("--model run --out b.jsonl", "--prompt", *PROMPTS)
    assert [json.loads(line) for line in Path("b.jsonl").read_text().splitlines()] == rows[1::2]
    ask("--model run --out c.jsonl", "--template", "{prompt}: ", "--prompt", "sort xs")
    assert json.loads(Path("c.jsonl").read_text())["response"] == by_hand(models / "run/final", "sort xs", "{prompt}: ", 6)
    for name, words, lengths in (("policy", [], (24, 24)), ("run", [], (30, 6)), ("run", ["--max-response", "9"], (30, 9)),  # 24: half of 48 positions
                                 ("policy", ["--max-response", "8"], (40, 8)), ("run", ["--max-query", "5"], (5, 6))):
        config = generate.load(name, parse(generate.Config, argv=["--model", name, *words]), "cpu")[2]
        assert (config.max_query, config.max_response) == lengths


def test_answers_alone_go_to_stdout(ask, models):
    code, out, err = ask("--model run --prompt", "sort xs")
    answer = by_hand(models / "run/final", "sort xs", TEMPLATE, 6)
    ask("--model run --out ended.jsonl --prompt", "sort xs")
    ended = json.loads(Path("ended.jsonl").read_text())["ended"]
    assert code == 0 and out == f"# sort xs\n{'' if ended else '# -- cut off' + chr(10)}{answer}\n\n" and "device: cpu" in err
    assert ask("--model run --prompt", "sort xs " * 40)[1].startswith("# sort xs"), "what is cut to length is said on stderr"
    out = ask("--model policy run --reward reward --max-query 30 --max-response 6 --prompt", "sort xs")[1]
    for name in ("policy", "run"):
        assert f"# -- {name}, " in out and out.count(", reward ") == 2


def test_samples_depend_on_the_seed_and_on_nothing_beside(ask, models):
    def rows(words):
        ask(words + " --temperature 1 --overwrite --out a.jsonl --prompt", *PROMPTS[:2])
        return [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    alone, again, both, other = rows("--model run --samples 3"), rows("--model run --samples 3"), rows("--model policy run --samples 3"), \
        rows("--model run --samples 3 --seed 1")
    assert not {row["response"] for row in alone} & {row["response"] for row in other}, "no sample of one seed is one of the next"
    assert alone == again == [row for row in both if row["model"] == "run"] and alone != other
    assert [row["sample"] for row in alone] == [0, 1, 2] * 2 and len({row["response"] for row in alone}) > 2
    one = rows("--model run --top-k 1")
    assert [row["response"] for row in one] == [by_hand(models / "run/final", prompt, TEMPLATE, 6) for prompt in PROMPTS[:2]]


def test_rewards_are_those_of_the_reward(ask):
    ask("--model run --reward reward --out a.jsonl --prompt", *PROMPTS)
    for row in map(json.loads, Path("a.jsonl").read_text().splitlines()):
        assert row["reward"] == pytest.approx(RewardModel.from_pretrained("reward").score([row["prompt"]], [row["response"]]).item(), abs=1e-5)
    ask("--model run --reward bleu --out b.jsonl --prompt", "sort xs")  # against what reference?
    assert json.loads(Path("b.jsonl").read_text())["reward"] is None
    assert "no reward" in ask("--model run --reward bleu --prompt", "sort xs")[1]


def test_a_prompt_a_line_from_stdin(ask):
    """Empty lines ask nothing; a prompt that comes twice is answered twice, so that lines and answers go together."""
    code, out, _ = ask("--model run --out a.json", stdin="sort xs\n\n  sum rows \nsort xs")
    assert code == 0 and [line for line in out.splitlines() if line.startswith("# ") and "cut off" not in line] == ["# sort xs", "# sum rows", "# sort xs"]
    rows = json.loads(Path("a.json").read_text())
    assert [row["prompt"] for row in rows] == ["sort xs", "sum rows", "sort xs"] and rows[0] == rows[2]


@pytest.mark.parametrize("words, line", [
    ("--prompt a", "--model: name at least one policy"), ("--model run", "no prompt: give --prompt, or a prompt a line on stdin"),
    ("--model run --prompt a --samples 2", "give --temperature above 0 too"), ("--model run --prompt a --top-k 2", "give --temperature above 0 too"),
    ("--model run --prompt a --top-p 0.5", "give --temperature above 0 too"),
    ("--model run --prompt a --template x", "has no {prompt}"), ("--model run --prompt a --overwrite", "there is no --out"),
    ("--model run --prompt a --max-response 40", "lower one of them"), ("--model policy --prompt a --max-response 400", "lower one of them"), ("--model nothing --prompt a", "nothing"),
    ("--model reward --prompt a", "score"), ("--model run --prompt a --reward execution", "needs rows with checks"),
    ("--model run --prompt a --out policy", "is a folder"), ("--model run --prompt a --reward nothing", "--reward nothing")])
def test_bad_input_is_one_line(ask, words, line):
    code, out, err = ask(words)
    assert code == 2 and out == "" and line in err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_an_interrupted_command_says_so_with_its_code(ask, monkeypatch, signum, code):
    monkeypatch.setattr(generate, "ask", lambda *what: signal.raise_signal(signum))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background without
    try:
        assert ask("--model run --prompt a") == (code, "", f"device: cpu (CPU, {torch.get_num_threads()} threads)\n"
                                                 f"{Path(sys.argv[0]).name}: {signum.name}: interrupted\n")
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_empty_prompt_asks_nothing(ask):
    code, _, err = ask("--model run --prompt", "a", " ")
    assert code == 2 and "an empty prompt asks nothing" in err


def test_what_is_there_is_not_replaced_unasked(ask):
    Path("a.jsonl").write_text("mine")
    code, out, err = ask("--model run --prompt a --out a.jsonl")
    assert code == 2 and "is there already" in err and Path("a.jsonl").read_text() == "mine" and out == ""


def test_a_terminal_is_asked_for_prompts(models, tmp_path):
    """Each line typed is answered before the next; Ctrl-D ends it, exit code 0."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "nanorlhf.generate", "--model", str(models / "run"), "--out", str(tmp_path / "a.jsonl")], cwd=ROOT,
                               stdin=theirs, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    seen = b""
    for line, expected in ((b"", b""), (b"sort xs\n", b"# sort xs"), (b"\n", b""), (b"sum rows\n", b"# sum rows")):
        os.write(ours, line)
        start, end = len(seen), time.monotonic() + 120
        while not seen[start:].endswith(b"> ") and time.monotonic() < end:
            seen += os.read(ours, 1000)
        assert expected in seen[start:], seen
    os.write(ours, b"\x04")
    assert process.wait(60) == 0, process.stderr.read()
    assert [json.loads(line)["prompt"] for line in (tmp_path / "a.jsonl").read_text().splitlines()] == ["sort xs", "sum rows"]
    process.stderr.close()
    os.close(ours)


def test_a_reader_that_goes_away_is_one_line(models):
    """`| head` closes the pipe while there is more to write."""
    (models / "prompts").write_text("sort xs\n" * 3000)
    done = subprocess.run(f"'{sys.executable}' -m nanorlhf.generate --model run < prompts | head -1", shell=True, cwd=models,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout == "# sort xs\n" and "Traceback" not in done.stderr and "whatever read the output has ended" in done.stderr
