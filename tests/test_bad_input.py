"""Bad input of every kind, in one table: what is wrong, the command, what its one line must say.

Each case runs in a folder of its own, beside good data and tiny models (`world`), in this process. It must end with exit
code 2 and exactly one line on stderr that says what is wrong, where (file:line, flag, tensor) and the way out; no
traceback; every file of the folder as it was and none beside. To read all messages as they are:

    python -m tests.test_bad_input
"""
import importlib
import io
import json
import os
import pickle
import re
import shlex
import shutil
import struct
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import safetensors.torch
import torch

from bench.fuzz import ROWS, write_rows
from nanorlhf import data, hf, run
from nanorlhf.config import parse
from nanorlhf.encoder import Encoder, EncoderConfig, new_head
from nanorlhf.gpt2 import GPT2, GPT2Config
from nanorlhf.reward import LastToken, RewardModel
from nanorlhf.sequences import encode_queries
from nanorlhf.tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------------- what is made

FOLDER = object()  # instead of content: a folder of that name
GONE = object()  # instead of content: the file is removed


def write(path, content):
    """Bytes, text, rows (.jsonl) or JSON; a function of the old content; or FOLDER, GONE."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is FOLDER:
        return path.mkdir()
    if callable(content):
        content = content(path.read_bytes())
    path.unlink(missing_ok=True)  # it may be a link to the good one
    if content is GONE:
        return
    if not isinstance(content, (bytes, str)):
        content = "".join(json.dumps(row) + "\n" for row in content) if path.suffix == ".jsonl" else json.dumps(content, indent=1)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def merge(**changes):
    """A JSON file with some keys changed, or dropped where the value is GONE."""
    return lambda old: {name: value for name, value in {**json.loads(old), **changes}.items() if value is not GONE}


def tensors(**changes):
    """A safetensors file with some tensors changed by functions, or dropped (GONE); "." in names is written "__"."""
    def change(old):
        held = safetensors.torch.load(old)
        for name, how in changes.items():
            name = name.replace("__", ".")
            if how is GONE:
                del held[name]
            else:
                held[name] = how(held.get(name))
        return safetensors.torch.save(held, {"format": "pt"})
    return change


def header(text):
    """A safetensors file with this header and 8 bytes of data."""
    return struct.pack("<Q", len(text)) + text.encode() + b"\0" * 8


def spoilt(tensor):
    tensor.view(-1)[0] = float("nan")
    return tensor


def pickled(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil-was-here",)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 548105171\n"
HTML = "<!DOCTYPE html>\n<html><body>Sign in to continue</body></html>\n"
WTE = "transformer__wte__weight"
SPLIT_7 = 'template = "{prompt}\\n"\ndata = "./data.jsonl"\nvalidation = 0.1\ntest = 0.1\nsplit_seed = 7\n'
ANSWERS = [{"prompt": f"add {n} to xs", "response": "xs"} for n in range(30)]
ENTRY = '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'  # a header of one tensor


def world(folder):
    """Good data and models in `folder`, which the cases spoil: GPT-2 of 28 positions, so 20 query and 8 response tokens."""
    rows = [{"prompt": f"add {n} to xs", "reference": f"xs + {n}"} for n in range(30)]
    write(folder / "data.jsonl", rows)
    write(folder / "pairs.jsonl", [{"prompt": r["prompt"], "chosen": r["reference"], "rejected": "xs"} for r in rows])
    write(folder / "ratings.jsonl", [{"prompt": r["prompt"], "response": "xs", "rating": n % 5} for n, r in enumerate(rows)])
    write(folder / "prompts.json", [r["prompt"] for r in rows])
    tokenizer = Tokenizer.train([r["prompt"] + r["reference"] for r in rows], 270)
    torch.manual_seed(0)
    gpt2 = GPT2.from_config(GPT2Config(vocab_size=tokenizer.vocab_size, n_positions=28, n_embd=8, n_layer=1, n_head=2))
    gpt2.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    RewardModel(gpt2, LastToken(8), tokenizer).save_pretrained(folder / "reward")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz+0123456789"]
    write(folder / "bert" / "vocab.txt", "\n".join(names) + "\n")
    bert = EncoderConfig("bert", len(names), 8, 1, 2, 16, 28)
    RewardModel(Encoder.from_config(bert), new_head(bert), Tokenizer.from_pretrained(folder / "bert")).save_pretrained(folder / "bert")
    for name, template in (("run", "{prompt}\n"), ("other-run", "Q: {prompt}\n")):  # as finished runs leave them
        shutil.copytree(folder / "policy", folder / name / "final")
        write(folder / name / "config.toml", f"template = {json.dumps(template)}\n")
        write(folder / name / "results.json", {})


# What each script is called with where the case itself gives nothing else: its last word on an option counts.
GOOD = {"train_sft": "--data data.jsonl", "train_reward": "--data pairs.jsonl --model policy",
        "train_ppo": "--data data.jsonl --policy policy --reward reward", "train_dpo": "--data pairs.jsonl --policy policy",
        "eval": "--data data.jsonl --model policy"}
TEXT = "--max-query 20 --max-response 8 --out out/new"
TRAIN = "train_sft train_reward train_ppo train_dpo"
ALL = f"{TRAIN} eval"


# ---------------------------------------------------------------------------------------------------- machines

def gpus(count):
    """A machine with so many GPUs; nothing touches them before the check."""
    def patch(patch):
        patch.setattr(torch.cuda, "is_available", lambda: count > 0)
        patch.setattr(torch.cuda, "device_count", lambda: count)
    return patch


def read_only(patch):
    """Nothing here may be written. Told to the check itself: root may write wherever the file system can."""
    patch.setattr(run.os, "access", lambda path, mode: mode != os.W_OK)


def unreadable(patch):
    """rows.jsonl may not be read, as a user without the right meets it."""
    def refuse(path, *rest, **options):
        if Path(path).name == "rows.jsonl":
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, *rest, **options)
    patch.setattr(data, "open", refuse, raising=False)


def old_torch(patch):
    """A torch whose unpickler is not to be trusted."""
    patch.setattr(hf, "pickles_are_safe", lambda: False)


def new_torch(patch):
    """A torch that reads pickles: here, any, since ours are known."""
    patch.setattr(hf, "pickles_are_safe", lambda: True)


def no_conala(patch):
    patch.setattr(data, "DATA", Path("data"))


# ---------------------------------------------------------------------------------------------------- the table

CASES, SECTION = [], []


def section(title):
    SECTION.append(title)


def bad(what, made, command, *words, on=None):
    """One case: what is wrong, {file: content}, scripts and options (or "check ...", "convert ..."), words of the line."""
    names, _, rest = command.partition(" --")
    rest = f"--{rest}" if rest else ""
    if names.split()[0] in ("check", "convert"):
        names, rest = command.split()[0], command.partition(" ")[2]
    for name in names.split():
        CASES.append(SimpleNamespace(id=f"{name}: {what}", section=SECTION[-1], what=what, made=made, command=name, rest=rest,
                                     words=words, machine=on))


def row(**changes):
    return {"prompt": "p", "response": "r", "rating": 1, **changes}


section("Files of rows that cannot be read")
bad("a file that is not there", {}, "check data.json", "data.json: no such file", "did you mean data.jsonl?")
bad("a file that is not there, under no near name", {}, "check x/rows.csv", "x/rows.csv: no such file",
    "check the path")
bad("no such data in a script", {}, f"{ALL} --data nowhere.csv", "nowhere.csv: no such file", "check the path")
bad("a folder without data", {"rows": FOLDER}, "check rows", "rows: no train file (found: nothing)",
    "name the files train, validation and test")
bad("a folder named like a file", {"set/train.csv": FOLDER}, "check set", "set/train.csv: is a folder", "name a .csv")
bad("a name longer than names can be", {}, f"check {'x' * 300}.csv", "cannot be read: File name too long",
    "check the path")
bad("a file that may not be read", {"rows.jsonl": "{}"}, "check rows.jsonl",
    "rows.jsonl: cannot be read: Permission denied", "its permissions", on=unreadable)
bad("another kind of file", {"rows.parquet": "PAR1"}, "check rows.parquet", "unknown file type .parquet",
    "use .csv, .tsv, .json, .jsonl")
bad("a file without a suffix", {"rows": "prompt\np\n"}, "check rows", "unknown file type without suffix", "use .csv")
bad("an empty CSV file", {"rows.csv": ""}, "check rows.csv", "rows.csv:1: the file holds no rows", "data/README.md")
bad("a header alone", {"rows.csv": "prompt,reference\n"}, "check rows.csv", "rows.csv:1: the file holds no rows",
    "data/README.md")
bad("blank lines alone", {"rows.jsonl": "\n\n"}, "check rows.jsonl", "rows.jsonl:1: the file holds no rows")
bad("an empty JSON file", {"rows.json": ""}, "check rows.json", "rows.json:1: the file holds no rows")
bad("an empty list", {"rows.json": "[]"}, "check rows.json", "rows.json:1: the file holds no rows")
bad("an empty training set in a folder", {"set/train.jsonl": "", "set/test.jsonl": "{}"}, f"{TRAIN} --data set",
    "set/train.jsonl:1: the file holds no rows")
bad("Latin-1", {"rows.csv": b"prompt,reference\np,r\np,caf\xe9\n"}, "check rows.csv",
    "rows.csv:3: not UTF-8 (byte 0xe9 at position 6", "save the file as UTF-8")
bad("UTF-16", {"rows.csv": "prompt,reference\np,r\n".encode("utf-16")}, "check rows.csv",
    "rows.csv:1: this file is UTF-16", "save it as UTF-8")
bad("a NUL byte", {"rows.csv": "prompt,reference\np,r\0\n"}, "check rows.csv", "rows.csv:2: NUL byte",
    "save it again as UTF-8")
bad("a gzip file under a wrong name", {"rows.jsonl": b"\x1f\x8b\x08\x00abc"}, "check rows.jsonl",
    "rows.jsonl:1: not UTF-8")
bad("a git-LFS pointer for data", {"rows.csv": LFS}, "check rows.csv", "rows.csv:1: this is a git-LFS pointer",
    "git lfs pull")
bad("a web page for data", {"rows.jsonl": HTML}, "check rows.jsonl", "rows.jsonl:1: this is a web page",
    "download it again")

section("Rows that are not written right")
bad("JSON that breaks off", {"rows.json": '[\n"p",\n"q"'}, "check rows.json",
    "rows.json:3: malformed JSON: Expecting ','", "mend it there")
bad("JSON that is no list", {"rows.json": '{"prompt": "p"}'}, "check rows.json",
    "rows.json:1: a .json file holds a list", "name it .jsonl")
bad("JSON nested 200,000 deep", {"rows.json": "[" * 200_000}, "check rows.json",
    "rows.json: malformed JSON: nested too deeply")
bad("a malformed line of JSON", {"rows.jsonl": '{"prompt": "p", "reference": "r"}\n{"prompt": \n'}, f"check rows.jsonl",
    "rows.jsonl:2: malformed JSON: Expecting value", "mend it there")
bad("a malformed line of JSON in a script", {"rows.jsonl": '{"prompt": "p", "reference": "r"}\n{"prompt": \n'},
    f"{ALL} --data rows.jsonl", "rows.jsonl:2: malformed JSON")
bad("a number of 5,000 digits", {"rows.jsonl": f'{{"prompt": "p", "response": "r", "rating": {"9" * 5000}}}'},
    "check rows.jsonl", "rows.jsonl:1: malformed JSON: Exceeds")
bad("a cell too many", {"rows.csv": "prompt,reference\np,r,s\n"}, "check rows.csv",
    "rows.csv:2: 3 cells where the header has 2", "quote cells")
bad("a cell too few, after a blank line", {"rows.csv": "prompt,reference\np,r\n\np\n"}, "check rows.csv",
    "rows.csv:4: 1 cell where the header has 2", "add what is missing")
bad("a tab too many", {"rows.tsv": "prompt\treference\np\tr\ts\n"}, "check rows.tsv", "rows.tsv:2: 3 cells",
    "hold a tab")
bad("a quote that is not closed", {"rows.csv": 'prompt,reference\n"p\nq",r\n"open,r\nx\n'}, "check rows.csv",
    "rows.csv:4: malformed CSV: unexpected end of data", "close quotes", "runs to line 5")
bad("text after a closing quote", {"rows.csv": 'prompt,reference\n"p"q,r\n'}, "check rows.csv",
    "rows.csv:2: malformed CSV", "double those inside")
bad("a header that is not closed", {"rows.csv": '"prompt,reference\np,r\n'}, "check rows.csv",
    "rows.csv:1: malformed CSV header", "close quotes")
bad("lines that end in CR alone", {"rows.csv": "prompt,reference\rp,r\r"}, "check rows.csv", "rows.csv:1: ",
    "carriage return", "LF or CRLF")
bad("a column twice", {"rows.csv": "prompt,prompt\np,r\n"}, "check rows.csv",
    "rows.csv:1: column 'prompt' appears twice", "rename one")
bad("semicolons", {"rows.csv": "prompt;reference\np;r\n"}, "check rows.csv",
    "rows.csv:2: columns fit no format (columns found: prompt;reference)", "rename them")
bad("a row that is a number", {"rows.json": "[1]"}, "check rows.json", "rows.json:1: row 1: a row is a number",
    "named columns")
bad("a row that is a list", {"rows.json": "[[1]]"}, "check rows.json", "rows.json:1: row 1: a row is a list",
    "named columns")
bad("a row that is null, the fourth", {"rows.json": '["p",\n\n"q", {"prompt": "r"}, null]'}, "check rows.json",
    "rows.json:3: row 4: a row is null", "an object with prompt")
bad("text for an object", {"rows.json": '["p"]'}, "check rows.json --data-format reference", "row 1: a row is text",
    "an object with prompt, reference")

section("Rows that do not say what they should")
bad("an object without columns", {"rows.json": "[\n{}\n]"}, "check rows.json",
    "rows.json:2: row 1: columns fit no format (columns found: none)")
bad("renamed columns", {"rows.jsonl": [{"question": "a", "answer": "b"}]}, f"{ALL} --data rows.jsonl",
    "rows.jsonl:1: columns fit no format (columns found: question, answer)", "rename them", "--data-format")
bad("a misspelt answer", {"rows.jsonl": [{"prompt": "p", "completion": "c"}]}, "check rows.jsonl",
    "(columns found: prompt, completion)", "rename")
bad("a column name of two lines", {"rows.jsonl": [{"question\n": "p"}]}, "check rows.jsonl",
    "(columns found: question\\n)")
bad("a missing column", {"rows.jsonl": [{"prompt": "p", "chosen": "c"}]}, "check rows.jsonl",
    "rows.jsonl:1: no column 'rejected' (columns found: prompt, chosen)",
    "a preference row needs prompt, chosen, rejected")
bad("a missing column, in the second row", {"rows.jsonl": [row(), {"prompt": "p", "rating": 2}]}, "check rows.jsonl",
    "rows.jsonl:2: no column 'response'")
bad("a missing rating", {"rows.jsonl": [{"prompt": "p", "response": "r"}]}, "check rows.jsonl --data-format feedback",
    "no column 'rating'", "choose another --data-format")
bad("a format that does not fit", {}, f"{TRAIN} --data data.jsonl --data-format conala",
    "data.jsonl:1: no column 'intent'", "conala row needs intent, snippet")
bad("a rating that is null", {"rows.jsonl": [row(rating=None)]}, "check rows.jsonl --data-format feedback",
    "'rating' is null", "fill it in")
bad("a rating of NaN", {"rows.jsonl": '{"prompt": "p", "response": "r", "rating": NaN}'}, "check rows.jsonl",
    "rows.jsonl:1: 'rating' is nan", "mend or remove the row")
bad("a rating of NaN, in a CSV file", {"rows.csv": "prompt,response,rating\np,r,nan\n"}, "check rows.csv",
    "rows.csv:2: 'rating' is 'nan', not a finite number")
bad("a rating of NaN, in a script", {"rows.csv": "prompt,response,rating\np,r,1\np,r,nan\n"},
    "train_reward --data rows.csv", "rows.csv:3: 'rating' is 'nan'")
bad("a rating beyond floats", {"rows.jsonl": f'{{"prompt": "p", "response": "r", "rating": {"9" * 400}}}'},
    "check rows.jsonl", "not a finite number")
bad("a rating in words", {"rows.csv": "prompt,response,rating\np,r,good\n"}, "check rows.csv",
    "'rating' is 'good', not a finite number")
bad("a rating of true", {"rows.jsonl": [row(rating=True)]}, "check rows.jsonl", "'rating' is True, not a finite number")
bad("a rating in a list", {"rows.jsonl": [row(rating=[3])]}, "check rows.jsonl", "'rating' is [3], not a finite number")
bad("a prompt that is a number", {"rows.jsonl": [{"prompt": 3, "reference": "r"}]}, "check rows.jsonl",
    "'prompt' is a number, not text", "quotes")
bad("a reference that is null", {"rows.jsonl": [{"prompt": "p", "reference": None}]}, "check rows.jsonl",
    "'reference' is null", "remove the row")
bad("an empty prompt", {"rows.csv": "prompt,reference\n,r\n"}, "check rows.csv", "rows.csv:2: 'prompt' is empty",
    "fill it in or remove the row")
bad("a prompt of spaces", {"rows.json": '["p",\n"  "]'}, "check rows.json", "rows.json:2: row 2: 'prompt' is empty")
bad("an empty chosen answer", {"rows.jsonl": [{"prompt": "p", "chosen": "", "rejected": "r"}]}, "check rows.jsonl",
    "'chosen' is empty")
bad("a column under both its names",
    {"rows.jsonl": [{"prompt": "p", "chosen": "c", "chosen_response": "d", "rejected": "r"}]}, "check rows.jsonl",
    "both 'chosen' and 'chosen_response' are given", "keep one")
bad("half a surrogate pair", {"rows.jsonl": '{"prompt": "p", "reference": "\\ud800"}'}, "check rows.jsonl",
    "'reference' holds half a surrogate pair", "remove it")
bad("logits that are no list", {"rows.jsonl": [row(logits=3)]}, "check rows.jsonl", "'logits' is a number, not a list",
    "write [...]")
bad("logits in words", {"rows.jsonl": [row(logits=["x"])]}, "check rows.jsonl", "'logits' is 'x', not a finite number")
bad("an id that is a fraction", {"rows.jsonl": [{"prompt": "p", "reference": "r", "id": 1.5}]}, "check rows.jsonl",
    "an id is text or a whole number")
bad("an id used twice", {"rows.jsonl": [{"prompt": "p", "id": i} for i in (1, 2, 1)]}, "check rows.jsonl",
    "rows.jsonl:3: id '1' is used twice (first rows.jsonl:1)", "make ids unique")
bad("a probability of 1.5", {"rows.jsonl": [{"intent": "i", "snippet": "s", "prob": 1.5}]}, "check rows.jsonl",
    "'prob' is 1.5, not between 0 and 1")
bad("an empty intent", {"rows.jsonl": [{"intent": "", "snippet": "s"}]}, "check rows.jsonl", "'intent' is empty")
bad("a snippet that is a number", {"rows.jsonl": [{"intent": "i", "snippet": 4}]}, "check rows.jsonl",
    "'snippet' is a number, not text")
bad("checks without a value", {"rows.jsonl": [{"intent": "i", "snippet": "s", "checks": [{"setup": 1}]}]},
    "check rows.jsonl", "'checks' holds {'setup': 1}", "write {'setup': source text, 'value': text}")
bad("checks that are no list", {"rows.jsonl": [{"intent": "i", "snippet": "s", "checks": {}}]}, "check rows.jsonl",
    "'checks' is an object, not a list")

CHECKED = {"prompt": "sort xs", "reference": "xs.sort()", "checks": [{"setup": "xs = [2, 1]", "value": "[1, 2]", "expression": "xs"}]}


def checked(**changes):
    """Rows with a check, of which the second has some other keys."""
    return [CHECKED, {**CHECKED, "checks": [{**CHECKED["checks"][0], **changes}]}]


bad("a check's key misspelt", {"c.jsonl": checked(expresion="xs")}, "check c.jsonl", "c.jsonl:2: 'checks' has 'expresion'", "did you mean expression?")
bad("a check's setup that is no Python", {"c.jsonl": checked(setup="xs = ")}, "check c.jsonl", "c.jsonl:2: 'checks': the setup 'xs = ' is no Python",
    "mend it")
bad("a check's expression that is no Python", {"c.jsonl": checked(expression="xs +")}, "check c.jsonl", "c.jsonl:2", "is no Python", "mend it")
bad("ratings of which some are missing", {"r.jsonl": [{"prompt": f"add {n} to xs", "response": "xs", "reference": f"xs + {n}",
                                                       **({"rating": n % 5} if n % 7 else {})} for n in range(30)]},
    "train_reward --data r.jsonl", "rows have no rating, such as that of", "rate all, or none")
bad("ratings that are all alike", {"r.jsonl": [{"prompt": f"add {n} to xs", "response": "xs", "rating": 3} for n in range(30)]},
    "train_reward --data r.jsonl", "all training rows are rated 3: nothing tells a good response from a bad one")

section("Data sets that do not serve")
bad("too few rows to split", {"rows.jsonl": [{"prompt": "p", "reference": "r"}] * 9}, f"{ALL} --data rows.jsonl",
    "rows.jsonl: 9 rows with 1 different prompt cannot make 3 splits", "add rows")
bad("a test row that is a training row in capitals",
    {"set/train.jsonl": [{"prompt": f"task {n}", "reference": "x"} for n in range(9)],
    "set/test.jsonl": [{"prompt": "TASK 3", "reference": "y"}]},
    f"{ALL} --data set", "train and test share 1 intent (0 exact), such as 'TASK 3'", "--allow-overlap")
bad("the same, looked at",
    {"set/train.jsonl": [{"prompt": f"task {n}"} for n in range(9)], "set/test.jsonl": [{"prompt": "TASK 3"}]},
    "check set", "train and test share 1 intent", "remove these rows")
bad("files of two formats", {"set/train.csv": "prompt,reference\np,r\n", "set/test.csv": "prompt\nq\n"}, "check set",
    "its files differ in format", "keep one")
bad("two files for one split", {"set/train.csv": "prompt\np\n", "set/train.json": ["p"]}, "check set",
    "both train.csv and train.json", "remove one")
bad("test rows alone", {"set/test.csv": "prompt\np\n"}, "check set", "set: no train file (found: test.csv)",
    "name the files")
bad("a format that does not exist", {}, "check data.jsonl --data-format preferences",
    "--data-format preferences: no such format", "did you mean preference?")
WHOLE = {f"d/{name}.json": [f"add {name} {n} to xs" for n in range(9)] for name in ("train", "validation", "test")}
bad("a seed for splits that are there", WHOLE, "train_ppo eval --data d --split-seed 3", "--split-seed: d has files of its own", "leave out")
bad("a share of rows for a split that is there", {name: WHOLE[name] for name in ("d/train.json", "d/test.json")},
    "train_ppo eval --data d --validation 0.5 --split-seed 3 --test 0.2", "error: --test: d has files of its own", "leave out")
bad("a probability for rows without one", {}, f"{TRAIN} --data data.jsonl --min-probability 0.5",
    "--min-probability is for conala-mined rows, not for reference", "leave it out")
bad("no row of that probability", {"rows.jsonl": [{"intent": "i", "snippet": "s", "prob": 0.2}]},
    "check rows.jsonl --min-probability 0.9", "none of 1 rows has prob >= 0.9", "lower --min-probability")
bad("only faulty rows, to be skipped", {"rows.jsonl": "{oops\n"}, "check rows.jsonl --skip-bad-rows",
    "not one of 1 rows is sound; the first: rows.jsonl:1: malformed JSON")
bad("CoNaLa before it was fetched", {}, f"{ALL} --preset conala --data conala", "data/conala: no such folder",
    "python -m nanorlhf.data download conala", on=no_conala)
bad("an unknown command of nanorlhf.data", {}, "check", "the following arguments are required: path", "--help")
bad("prompts without answers for SFT", {}, "train_sft --data prompts.json",
    "prompts.json: prompts without answers cannot be fine-tuned on", "give a reference")
bad("prompts for a reward model", {}, "train_reward --data prompts.json --policy policy",
    "prompts rows carry no preference, rating or reference")
bad("prompts for DPO", {}, "train_dpo --data prompts.json", "prompts rows carry neither preferences nor references")
bad("ratings in some rows", {"rows.jsonl": [row(prompt=f"p {n}", rating=n if n != 3 else None) for n in range(20)]},
    "train_reward --data rows.jsonl", "1 rows have no rating", "rate all, or none")
bad("references, and no policy to make pairs with", {}, "train_reward --data data.jsonl --model policy",
    "there is no out/sft", "run train_sft.py first", "--policy")

section("The command line")
bad("an unknown option", {}, f"{ALL} --batchsize 3", "unknown option '--batchsize'", "did you mean --batch-size?")
bad("a value out of range", {}, f"{TRAIN} --lr 0", "--lr: expected a number > 0", "found 0")
bad("a value that is no number", {}, f"{ALL} --seed one", "--seed: expected an integer >= 0 and <= 4294967295, found \"one\"")
bad("a value of NaN", {}, f"{TRAIN} --lr nan", "--lr: expected a number > 0 or none, found nan")
bad("a fraction for a count", {}, f"{ALL} --batch-size 1.5", "--batch-size: expected an integer >= 1, found \"1.5\"")
bad("a missing value", {}, f"{ALL} --seed", "--seed: a value is missing", "expected an integer")
bad("two values for one", {}, f"{ALL} --seed 1 2", "--seed takes one value", "unexpected \"2\"")
bad("a value for a switch", {}, f"{ALL} --overwrite yes", "--overwrite takes no value",
    "write --overwrite or --no-overwrite")
bad("a word that is no option", {}, f"{ALL} --seed=1 fast", "unexpected 'fast'", "options start with --")
bad("a choice that does not exist", {}, f"{ALL} --data-format conla", "--data-format: expected one of auto, conala",
    "did you mean conala?")
bad("a preset that does not exist", {}, f"{ALL} --preset quick", "--preset: no preset \"quick\"",
    "the presets are fast, conala")
bad("a template without a prompt", {}, f"{ALL} --template query", "--template 'query' has no {prompt}",
    "write for example")
bad("shares that leave nothing", {}, f"{ALL} --validation 0.6 --test 0.4",
    "--validation 0.6 and --test 0.4 leave nothing to train on", "lower them")

section("A TOML file")
bad("one that is not there", {}, f"{ALL} --config run.toml", "--config: no file run.toml")
bad("a folder", {"cfg": FOLDER}, "train_ppo --config cfg", "--config: cfg is a folder", "give a TOML file")
bad("a run folder", {}, "train_ppo --config run", "--config: run is a folder", "did you mean run/config.toml?")
bad("no TOML", {"run.toml": "lr = 1e-4\nseed = \n"}, f"{ALL} --config run.toml", "run.toml:2: not valid TOML")
bad("text without quotes", {"run.toml": "data = nano\n"}, "train_sft --config run.toml", "run.toml:1: not valid TOML",
    "text needs quotes")
bad("not UTF-8", {"run.toml": b'out = "caf\xe9"\n'}, "train_sft --config run.toml",
    "run.toml is not UTF-8 text (byte 10)")
bad("an unknown key", {"run.toml": "# mine\nleraning_rate = 1\nlrr = 1\n"}, "train_ppo --config run.toml",
    "run.toml:2: unknown option 'leraning_rate'")
bad("a misspelt key", {"run.toml": "batch_sise = 8\n"}, f"{ALL} --config run.toml",
    "run.toml:1: unknown option 'batch_sise'", "did you mean batch_size?")
bad("a table", {"run.toml": "[ppo]\nlr = 1\n"}, "train_ppo --config run.toml", "run.toml:1: unknown option 'ppo'",
    "not in tables")
bad("a number in quotes", {"run.toml": 'seed = "1"\n'}, f"{ALL} --config run.toml",
    "run.toml:1: seed: expected an integer", "remove the quotes")
bad("a key twice", {"run.toml": "batch_size = 8\nbatch-size = 8\n"}, "train_sft --config run.toml",
    "run.toml:2: batch_size is given twice")
bad("a preset that does nothing", {"run.toml": 'data = "data.jsonl"\nmax_response = 8\n'},
    "eval --config run.toml --preset conala", "--preset conala changes nothing", "leave out one of them")

section("Options that contradict each other")
bad("a GPU and the CPU", {}, f"{ALL} --gpu 0 --device cpu", "--gpu 0 and --device cpu contradict each other",
    "give one of them")
bad("a pretrained model and a shape", {}, "train_sft --model policy --n-layer 2 --n-head 2",
    "--n-layer, --n-head: for random weights", "leave out one of them")
bad("a width that the heads do not divide", {}, "train_sft --n-embd 15 --n-head 2",
    "n_embd 15 is not a multiple of n_head 2")
bad("a policy and a model to start from", {}, "train_ppo train_dpo --model gpt2", "--model is for the SFT stage",
    "give one of them")
bad("the name of a stage", {}, "train_ppo train_dpo --out runs/sft",
    "--out runs/sft: that is the name of a stage's folder", "name another")
bad("minibatches larger than the batch", {}, "train_ppo --batch-size 8 --minibatch-size 16",
    "--minibatch-size 16 exceeds --batch-size 8")
bad("minibatches that do not divide the batch", {}, "train_ppo --batch-size 8 --minibatch-size 3",
    "--batch-size 8 is not a multiple of --minibatch-size 3")
bad("a penalty that is missing", {}, "train_ppo --missing-eos-mode subtract", "--missing-eos-penalty",
    "give one above 0")
bad("a combination of one", {}, "train_ppo --combine min", "--combine min needs several rewards", "leave it out")
bad("a horizon without a target", {}, "train_ppo --kl-horizon 5", "--kl-horizon is for --kl-target",
    "give both, or neither")
bad("smoothing where it has no meaning", {}, "train_dpo --loss-type ipo --label-smoothing 0.1",
    "--label-smoothing has no meaning for --loss-type ipo", "leave it 0")
bad("half the pairs assumed wrong", {}, "train_dpo --loss-type robust --label-smoothing 0.5",
    "--loss-type robust needs --label-smoothing below 0.5")
bad("sums for another loss than IPO", {}, "train_dpo --ipo-sum", "--ipo-sum goes with --loss-type ipo, not sigmoid")
bad("samples for pairs that are there", {}, "train_reward --samples 3", "--samples: for pairs made from references",
    "leave out")
bad("greedy samples", {}, "eval --samples 5", "--samples 5: greedy answers are all the same", "--temperature above 0")
bad("samples that cannot be run", {}, "eval --samples 5 --temperature 1", "--samples 5: pass@k needs rows with checks",
    "leave it out")
bad("a wall around nothing", {}, "train_ppo train_dpo eval --sandbox require", "has no checks to run code on",
    "leave execution and --sandbox out")
bad("a temperature for answers that nobody scores", {}, "train_dpo --temperature 0.5", "--temperature: for answers that a reward scores",
    "leave out, or give one")
bad("a KL target with nothing to steer", {}, "train_ppo --kl-target 6 --kl-coef 0", "--kl-target steers kl_coef by factors",
    "--kl-coef above 0")
bad("a horizon shorter than a fifth of a batch", {}, "train_ppo --kl-target 6 --kl-horizon 50", "--kl-horizon 50: one batch of 256",
    "more than 51.2")
bad("a penalty of nothing to raise", {}, "train_ppo --on-alarm raise-kl --kl-coef 0", "--on-alarm raise-kl multiplies kl_coef",
    "--kl-coef above 0")
bad("a scale for an ensemble", {}, "train_ppo --reward syntax length --normalise-terms", "--normalise-terms is for one sum",
    "leave it out")
bad("people's logits that nobody gave", {}, "train_reward --human-feedback-weight 1", "no rated row has any", "leave them out")
bad("ratings beside ratings", {}, "train_reward --data ratings.jsonl --ratings ratings.jsonl", "--ratings adds rated responses to pairs",
    "put them into one file")
bad("centring for ratings", {}, "train_reward --data ratings.jsonl --center-coef 0.5", "--center-coef: for pairs",
    "leave out")
bad("another template than the run's", {}, "train_ppo train_dpo --policy other-run",
    "other-run was made with template = 'Q: {prompt}\\n'", "ask for the same")
bad("another template than the sampled run's", {}, "train_reward --data data.jsonl --policy other-run",
    "other-run was made with template", "ask for the same")
bad("another template than the evaluated run's", {}, "eval --model other-run", "other-run was made with template",
    "ask for the same")
bad("the same by the folder of its model", {}, "eval --model other-run/final", "other-run was made with template", "ask for the same")
bad("the same for a run named final", {"final/config.toml": 'template = "Q: {prompt}"\n'}, "eval --model final", "final was made with template", "ask for the same")
bad("held-out rows that a policy was trained on", {"run/config.toml": SPLIT_7}, "eval --model run/final",
    "run was made with split_seed = 7, this run asks for 0", "ask for the same")
bad("the same for a policy to start from", {"run/config.toml": SPLIT_7}, "train_ppo train_reward --data data.jsonl --policy run",
    "run was made with split_seed = 7", "ask for the same")
bad("no policy to evaluate", {}, "eval --predictions", "--predictions: a value is missing")
bad("no reward to train on", {}, "train_ppo eval --reward", "--reward: a value is missing; expected a list")
bad("answers without a response", {"answers.jsonl": [*ANSWERS, {"id": "2", "answer": "x"}]}, "eval --predictions answers.jsonl",
    "answers.jsonl:31: an answer needs id (or prompt) and response")
bad("an answers file that is no JSON", {"answers.jsonl": "[1, 2\n"}, "eval --predictions answers.jsonl", "answers.jsonl:1")
bad("prompts without an answer", {"answers.jsonl": ANSWERS[:2]}, "eval --predictions answers.jsonl",
    "answers.jsonl: no answer to 3 of 3 prompts of test, such as", "add them, or evaluate fewer --rows")
bad("more answers to one prompt than to another", {"answers.jsonl": ANSWERS + ANSWERS[:15]}, "eval --predictions answers.jsonl",
    "answers.jsonl: 1 to 2 answers a prompt", "give each prompt as many")
bad("answers of two models in one file", {"answers.jsonl": [{**row, "model": name} for row in ANSWERS for name in "ab"]},
    "eval --predictions answers.jsonl", "answers.jsonl: answers of 2 models (a, b)", "make a file of each")

section("The run folder and the machine")
bad("a file for --out", {}, f"{ALL} --out data.jsonl", "--out data.jsonl: is a file, not a folder", "name another")
bad("a file above --out", {}, f"{ALL} --out data.jsonl/run", "data.jsonl is a file, not a folder", "name another")
bad("a folder of something else", {}, f"{ALL} --out policy",
    "--out policy: the folder is not empty and holds no run of ours", "name another")
bad("a finished run, to go on with under another seed", {}, "train_sft train_ppo --out run --resume --seed 5 --allow-config-change",
    "--resume: run is finished, and cannot be gone on with under other options", "name another --out")
bad("a finished run", {}, f"{ALL} --out run", "--out run: holds a run already", "--overwrite", "another --out")
bad("a folder that cannot be written", {}, f"{ALL} --out out/new", "cannot be written to", "name another folder",
    on=read_only)
bad("a run to resume that is not there", {}, f"{TRAIN} --resume", "--resume: out/new holds no run",
    "leave --resume out")
bad("a GPU on a machine without", {}, f"{ALL} --gpu 0", "--gpu 0: torch", "sees no CUDA device", "leave --gpu out",
    on=gpus(0))
bad("CUDA on a machine without", {}, f"{ALL} --device cuda", "--device cuda: torch", "--device cpu runs on the CPU",
    on=gpus(0))
bad("one of several processes", {}, ALL, "one of 2 processes", "start it with python", on=lambda patch: patch.setenv("WORLD_SIZE", "2"))
bad("the third of two GPUs", {}, f"{ALL} --gpu 2", "--gpu 2: there are 2 CUDA devices, numbered from 0", on=gpus(2))
bad("a negative GPU", {}, f"{ALL} --gpu -1", "--gpu: expected an integer >= 0")

POLICY = "train_ppo train_dpo --policy policy"
MODEL = "policy/model.safetensors"
section("Model folders")
bad("a policy that is not there", {}, "train_ppo train_dpo --policy ./nowhere", "no folder ./nowhere to read a",
    "check the path")
bad("a model to start from that is not there", {}, "train_sft train_reward --model ./nowhere",
    "no folder ./nowhere to read a", "check the path")
bad("a policy to sample that is not there", {}, "train_reward --data data.jsonl --policy no/such/folder",
    "no folder no/such/folder to read a", "check the path")
bad("a policy under a near name", {}, "eval --model ./polcy", "no folder ./polcy", "did you mean policy?")
bad("a name that cannot be a model's", {}, "eval --model 'my model'", "no folder 'my model'", "they look like gpt2")
bad("a model to download while offline", {}, "train_sft --model somebody/gpt2", "no model 'somebody/gpt2'",
    "HF_HUB_OFFLINE is set", "name a local folder")
bad("a name longer than names can be", {}, f"train_sft --model ./{'x' * 300}", "no folder ./xxx", "check the path")
bad("a file for a model", {}, "train_sft eval --model data.jsonl", "data.jsonl is a file; a model is a folder",
    "name the folder that holds it")
bad("an empty folder", {"empty": FOLDER}, "train_sft eval --model empty", "empty is not a model folder",
    "it holds nothing")
bad("a folder without weights", {MODEL: GONE}, POLICY, "policy is not a model folder", "config.json and weights")
bad("a folder without a tokenizer", {f"policy/{n}": GONE for n in ("tokenizer.json", "vocab.json", "merges.txt")},
    POLICY, "policy is not a tokenizer folder")
bad("an encoder for a policy", {}, "train_ppo train_dpo --policy bert",
    "bert holds a model of type bert; here it must be gpt2", "name the folder")
bad("an encoder to fine-tune", {}, "train_sft eval --model bert",
    "bert holds a model of type bert; here it must be gpt2")
bad("another architecture for a reward", {"reward/config.json": merge(model_type="llama")}, "train_ppo --reward reward",
    "reward holds a model of type llama; here it must be gpt2 or roberta or bert")
bad("no config.json beside the weights", {"policy/config.json": GONE}, POLICY,
    "policy is not a model folder: it needs config.json")
bad("a config.json that is no JSON", {"policy/config.json": '{\n"model_type": gpt2}'}, POLICY,
    "policy/config.json is not valid JSON (line 2: ", "mend it")
bad("a config.json that is a list", {"policy/config.json": "[]"}, POLICY,
    "policy/config.json must hold a JSON object, not list")
bad("a config.json nested too deeply", {"policy/config.json": "[" * 100_000}, POLICY,
    "policy/config.json is JSON nested too deeply")
bad("a config.json that is not UTF-8", {"policy/config.json": b'{"a": "\xe9"}'}, POLICY,
    "policy/config.json is text that is not UTF-8")
bad("a config.json that is a web page", {"policy/config.json": HTML}, POLICY, "policy/config.json is a web page",
    "download it again")
bad("a config.json that is empty", {"policy/config.json": ""}, POLICY, "policy/config.json is empty", "get it again")
bad("a width in words", {"policy/config.json": merge(n_embd="wide")}, POLICY,
    "policy/config.json: GPT-2 config: n_embd must be a positive integer, not 'wide'", "correct it")
bad("a billion layers", {"policy/config.json": merge(n_layer=10 ** 7)}, POLICY,
    "config.json is of 10000000 layers, its weights hold 1")
bad("a width that asks for terabytes", {"policy/config.json": merge(n_embd=10 ** 6)}, POLICY,
    "wte.weight has shape (270, 8), the model of its config.json needs (270, 1000000)")
bad("a width beyond integers", {"policy/config.json": merge(n_embd=10 ** 30)}, POLICY,
    "n_embd must be a positive integer, not an integer beyond 64 bits")
bad("dropout of 2", {"policy/config.json": merge(resid_pdrop=2)}, POLICY,
    "resid_pdrop must be a number, at least 0 and below 1, not 2")
bad("an unknown activation", {"policy/config.json": merge(activation_function="gelu_nw")}, POLICY,
    "activation_function 'gelu_nw' is not implemented", "did you mean gelu_new?")
bad("attention that is not GPT-2's", {"policy/config.json": merge(add_cross_attention=True)}, POLICY,
    "add_cross_attention = True is not implemented")
bad("an encoder's padding beyond its vocabulary", {"bert/config.json": merge(pad_token_id=99)},
    "train_reward --model bert",
    "bert/config.json: encoder config: pad_token_id 99 does not go with a vocabulary of 42", "correct it")

section("Weights")
bad("a git-LFS pointer", {MODEL: LFS}, f"{POLICY}", f"{MODEL} is a git-LFS pointer", "git lfs pull")
bad("a web page", {MODEL: "\n" + HTML}, POLICY, f"{MODEL} is a web page", "download it again")
bad("a web page in capitals", {MODEL: HTML.upper()[16:]}, POLICY, f"{MODEL} is a web page", "download it again")
bad("a pickle under another name", {MODEL: pickle.dumps({"a": 1}, protocol=2)}, POLICY,
    f"{MODEL} is a PyTorch pickle under another name", "rename it", "nanorlhf.hf convert")
bad("a zip pickle under another name", {MODEL: b"PK\x03\x04" + b"\0" * 99}, POLICY,
    f"{MODEL} is a PyTorch pickle under another name")
bad("an empty file", {MODEL: ""}, POLICY, f"{MODEL} is empty", "get it again")
bad("text", {MODEL: "Entry not found"}, POLICY, f"{MODEL} is not a safetensors file")
bad("a file cut in its length", {MODEL: lambda old: old[:5]}, POLICY,
    f"{MODEL} is not a safetensors file, or cut short (5 bytes)", "get it again")
bad("a file cut in its header", {MODEL: lambda old: old[:40]}, POLICY, "cut short (40 bytes)")
bad("a file cut in its data", {MODEL: lambda old: old[:-4]}, POLICY, f"{MODEL} is cut short: ",
    "bytes where its header promises", "get it again")
bad("a flipped bit in its header", {MODEL: lambda old: old[:9] + bytes([old[9] ^ 1]) + old[10:]}, POLICY,
    f"{MODEL} is not a safetensors file", "get it again")
bad("a flipped bit in a weight, to infinity", {MODEL: tensors(**{WTE: lambda t: t * float("inf")})}, POLICY,
    "tensor wte.weight holds NaN or infinity")
bad("a header that is no JSON", {MODEL: header("{nonsense}")}, POLICY, "its header is not the JSON it should be")
bad("a header of another kind", {MODEL: header('{"a": [1, 2, 3]}')}, POLICY, "its header is not the JSON it should be")
bad("a header nested too deeply", {MODEL: header("[" * 90_000)}, POLICY, "its header is not the JSON it should be")
bad("a header that ends in text", {MODEL: header(ENTRY.replace("8]", '"8 bytes"]'))}, POLICY,
    "its header is not the JSON it should be")
bad("a tensor twice", {MODEL: header(ENTRY[:-1] + ", " + ENTRY[1:])}, POLICY,
    f"{MODEL} is damaged: tensor a is in it twice", "get it again")
bad("a shape that its bytes do not fill", {MODEL: header(ENTRY.replace("[2]", "[9]"))}, POLICY,
    f"{MODEL} is a damaged safetensors file", "get it again")
bad("a shape beyond integers", {MODEL: header(ENTRY.replace("[2]", "[9223372036854775808, 0]"))}, POLICY,
    f"{MODEL} is a damaged safetensors file")
bad("a type of number that nobody knows", {MODEL: header(ENTRY.replace("F32", "XYZ"))}, POLICY,
    f"{MODEL} is a damaged safetensors file")
bad("a tensor that is missing", {MODEL: tensors(transformer__ln_f__bias=GONE)}, POLICY, "policy lacks tensor ln_f.bias",
    "another architecture")
bad("a tensor too many", {MODEL: tensors(adapter=lambda _: torch.zeros(2))}, POLICY,
    "policy has tensors that a GPT-2 language model does not: adapter", "name a language model's folder")
bad("a tensor under both its names", {MODEL: tensors(ln_f__bias=lambda _: torch.zeros(8))}, POLICY,
    "tensor ln_f.bias is there twice", "remove one")
bad("a tensor of another shape", {MODEL: tensors(transformer__ln_f__bias=lambda t: t[:4].clone())}, POLICY,
    "tensor ln_f.bias has shape (4,), the model of its config.json needs (8,)", "must belong together")
bad("weights that are NaN", {MODEL: tensors(transformer__ln_f__bias=spoilt)}, POLICY, "tensor ln_f.bias holds NaN",
    "take another checkpoint")
bad("an evaluated model that is NaN", {MODEL: tensors(transformer__ln_f__bias=spoilt)}, "eval --model policy",
    "tensor ln_f.bias holds NaN")
bad("a value head that is NaN",
    {"policy/value_head.safetensors": safetensors.torch.save({"weight": torch.full((1, 8), float("nan")), "bias": torch.zeros(1)})},
    "train_ppo --policy policy", "policy/value_head.safetensors: tensor weight holds NaN")
bad("quantised weights", {MODEL: tensors(transformer__ln_f__bias=lambda t: t.to(torch.int8))}, POLICY,
    "tensor ln_f.bias is torch.int8", "get float ones")
PICKLE = "policy/pytorch_model.bin"
bad("a pickle that runs code", {MODEL: GONE, PICKLE: pickled({"a": Evil()})}, POLICY, f"{PICKLE} is refused",
    "may run code (", ".system", "from whom you trust", on=new_torch)
bad("a pickle cut short", {MODEL: GONE, PICKLE: b"PK\x03\x04" + b"\0" * 200}, POLICY,
    f"{PICKLE} is damaged or cut short", "get it again", on=new_torch)
bad("a pickle of more than tensors", {MODEL: GONE, PICKLE: pickled({"state_dict": {}, "epoch": 3})}, POLICY,
    f"{PICKLE} holds no flat dictionary of tensors", "save model.state_dict()", on=new_torch)
bad("a pickle that is empty", {MODEL: GONE, PICKLE: ""}, POLICY, f"{PICKLE} is empty", "get it again")
bad("a pickle that is a pointer", {MODEL: GONE, PICKLE: LFS}, "convert policy", f"{PICKLE} is a git-LFS pointer")
bad("a pickle, on a torch that cannot read it safely", {MODEL: GONE, PICKLE: b"PK\x03\x04"}, POLICY,
    "cannot read safely", "use torch >= 2.10", on=old_torch)
bad("nothing to convert", {"empty": FOLDER}, "convert empty", "empty has no weights: looked for model.safetensors")
bad("no folder to convert", {}, "convert", "write python -m nanorlhf.hf convert FOLDER")


def shards(weight_map, **files):
    """policy/ with its weights in shards instead."""
    made = {MODEL: GONE, "policy/model.safetensors.index.json": {"weight_map": weight_map}}
    return made | {f"policy/{name}.safetensors": safetensors.torch.save({"a": torch.zeros(2)}) for name in files}


section("Weights in shards")
bad("a shard that is missing", shards({"a": "m1.safetensors", "b": "m2.safetensors"}, m1=1), POLICY,
    "names the shard m2.safetensors, which is missing", "get that file too")
bad("a shard in the folder above", shards({"a": "../policy/config.json"}), POLICY,
    "names the shard '../policy/config.json'", "must lie in the same folder")
bad("a shard at an absolute path", shards({"a": "/etc/passwd"}), POLICY, "names the shard '/etc/passwd'",
    "must lie in the same folder")
bad("a shard without a name", shards({"a": ""}), POLICY, "names the shard ''", "must lie in the same folder")
bad("a tensor in two shards", shards({"a": "m1.safetensors", "b": "m2.safetensors"}, m1=1, m2=1), POLICY,
    "tensor a is in two shards, m1.safetensors and m2.safetensors")
bad("a tensor that its shard does not hold", shards({"b": "m1.safetensors"}, m1=1), POLICY,
    "puts tensor b in m1.safetensors, which does not hold it")
bad("an index without a map", shards({}), POLICY, "model.safetensors.index.json has no weight_map", "get it again")
bad("an index that is no JSON", {MODEL: GONE, "policy/model.safetensors.index.json": "{"}, POLICY,
    "model.safetensors.index.json is not valid JSON")

TOKENIZER = "policy/tokenizer.json"
section("Tokenizers")
bad("one larger than the embedding", {MODEL: tensors(**{WTE: lambda t: t[:200].clone()})}, POLICY,
    "policy: the tokenizer has 270 tokens but the embedding 200 rows",
    "use the tokenizer that belongs to these weights")
bad("an evaluated model's, larger than its embedding", {MODEL: tensors(**{WTE: lambda t: t[:200].clone()})},
    "eval --model policy", "the tokenizer has 270 tokens but the embedding 200 rows")
bad("one larger than a reward model's embedding",
    {"reward/model.safetensors": tensors(**{WTE: lambda t: t[:200].clone()})}, "train_ppo --reward reward",
    "reward: the tokenizer has 270 tokens but the embedding 200 rows")
bad("a tokenizer.json that breaks off", {TOKENIZER: lambda old: old[:300]}, POLICY,
    f"{TOKENIZER} is not valid JSON (line ", "get it again")
bad("a tokenizer.json without a vocabulary", {TOKENIZER: "{}"}, POLICY, f'{TOKENIZER}: no vocabulary under "model"')
bad("a Unigram tokenizer", {TOKENIZER: {"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}}, POLICY,
    f"{TOKENIZER}: a Unigram tokenizer", "byte-level BPE")
bad("a tokenizer.json that the package refuses", {TOKENIZER: merge(added_tokens=[{"id": -1}])}, POLICY,
    f"{TOKENIZER}: tokenizers", "cannot read it", "get it again")
bad("one that cannot end a text",
    {TOKENIZER: lambda old: old.replace(b"<|endoftext|>", b"<|something|>"), "policy/special_tokens_map.json": {},
    "policy/tokenizer_config.json": {}},
    POLICY, "policy: the tokenizer has no token that ends a text", "use the tokenizer that belongs")
bad("merges of another vocabulary", {TOKENIZER: GONE, "policy/merges.txt": "#version: 0.2\nq z\n"}, POLICY,
    "policy/merges.txt:2: 'q z' does not merge", "must belong together")
bad("merges that are not UTF-8", {TOKENIZER: GONE, "policy/merges.txt": b"caf\xe9 x\n"}, POLICY,
    "policy/merges.txt: not UTF-8 text (byte 3)")
bad("a vocabulary that maps to text", {TOKENIZER: GONE, "policy/vocab.json": merge(a="b")}, POLICY,
    "policy/vocab.json: 'a' has the id b", "whole numbers")
bad("merges without a vocabulary", {TOKENIZER: GONE, "policy/vocab.json": GONE}, POLICY,
    "policy is not a tokenizer folder: it needs tokenizer.json, vocab.json")
bad("a special token that is a number", {"policy/special_tokens_map.json": {"eos_token": 7}}, POLICY,
    "one of its special or added tokens is 7, not text", "special_tokens_map.json")
bad("an added token with another's id", {"policy/added_tokens.json": {"<new>": 3}}, POLICY,
    "the added token '<new>' should have id 3 but the vocabulary gives it 270")
bad("a BERT vocabulary without [UNK]", {"bert/tokenizer.json": GONE, "bert/vocab.txt": "a\nb\n"},
    "train_reward --model bert", "bert/vocab.txt: no [UNK] among its 2 lines")
bad("a BERT vocabulary without a frame",
    {"bert/tokenizer.json": GONE, "bert/vocab.txt": "[UNK]\na\n", "bert/special_tokens_map.json": GONE, "bert/tokenizer_config.json": GONE},
    "train_reward --model bert", "bert: a bert tokenizer needs [CLS], [SEP], [PAD]", "get it again")

section("Rewards")
bad("a reward that is not there", {}, "train_ppo eval --reward ./nowhere", "no folder ./nowhere", "check the path")
bad("a language model", {}, "train_ppo eval --reward policy",
    "policy has no classification head (no tensor score.weight)", "train_reward.py --model policy")
bad("an encoder without a head", {"bert/model.safetensors": tensors(classifier__weight=GONE)},
    "train_ppo eval --reward bert", "bert has no classification head", "train_reward.py")
bad("a classifier of three labels",
    {"bert/model.safetensors": tensors(classifier__weight=lambda t: torch.zeros(3, 8), classifier__bias=lambda t: torch.zeros(3))},
    "train_ppo --reward bert", "bert classifies into several labels; a reward model has one")
bad("a reward_model.json that is no JSON", {"reward/reward_model.json": "{gain"}, "train_ppo eval --reward reward",
    "reward/reward_model.json is not valid JSON")
bad("a gain of NaN", {"reward/reward_model.json": merge(gain=float("nan"))}, "train_ppo --reward reward",
    "reward/reward_model.json: gain is nan", "train the model again")
bad("a head of an unknown kind", {"reward/reward_model.json": merge(head="deep")}, "train_ppo --reward reward",
    "reward/reward_model.json: head is 'deep'", "train the model again")
bad("a head that is not in the file", {"reward/reward_model.json": merge(head="mlp")}, "train_ppo eval --reward reward",
    "reward has no tensors reward_head.*", "get the folder again")
bad("a term misspelt", {}, "train_ppo train_dpo eval --reward syntx", "no folder and no term of that name", "did you mean syntax?")
bad("a sum with a weight that is no number", {}, "train_ppo eval --reward 0.1.2*syntax", "'0.1.2' is no number", "0.3*execution")
bad("a sum that names a term twice", {}, "train_ppo eval --reward 'syntax + 2*syntax'", "syntax is there twice", "add up")
bad("a sum without spaces", {}, "train_ppo --reward 2*syntax+3*length", "is no term", "a space on either side of + and -")
bad("execution without checks", {}, "train_ppo train_dpo eval --reward execution", "has no checks to run code on",
    "leave execution and --sandbox out")
bad("a check whose value is no literal", {"rows.jsonl": [{"intent": "i", "snippet": "1", "checks": [{"setup": "", "value": "f(1)"}]}]},
    "train_sft --data rows.jsonl", "rows.jsonl:1: 'checks'", "is no literal", "write repr(value)")
bad("logits of another length", {"rows.jsonl": [row(prompt=f"p {n}", response=f"r {n}", logits=[1, 2]) for n in range(20)]},
    "train_reward --data rows.jsonl", "are 2 numbers, not 64", "--human-feedback-dim 2")
bad("a module that is not there", {}, "train_ppo eval --reward no_such_module_zq:f",
    "--reward no_such_module_zq:f: no module 'no_such_module_zq'", "looked for in")
bad("a function that is not there", {}, "train_ppo eval --reward json:load_all",
    "--reward json:load_all: json has no function 'load_all'")
bad("a module that is not Python", {"broken_zq.py": "def f(:\n"}, "train_ppo --reward broken_zq:f", "broken_zq.py:1: ",
    "mend it there")
bad("a function of two arguments", {"two_zq.py": "def f(prompts, responses): return [1.0]\n"}, "train_ppo eval --reward two_zq:f",
    "--reward two_zq:f: f(prompts, responses) cannot be called with (prompts, responses, references)", "let it take these three lists")
bad("a reward that is NaN, and a run to replace", {"nan_zq.py": "def f(*columns): return [float('nan')] * len(columns[0])\n"},
    "train_ppo --reward nan_zq:f --out run --overwrite", "--reward nan_zq:f: the scores of the first training rows are not finite",
    "--reward '1*nan_zq:f'")
bad("a list given twice", {}, "train_ppo --reward syntax --reward length", "--reward is given twice", "--reward A B")
bad("one reward twice", {}, "train_ppo eval --reward syntax length syntax", "--reward names syntax twice", "name it once")
bad("a difference without spaces", {}, "train_ppo eval --reward syntax-length", "--reward syntax-length: no folder of that name", "a space on either side of + and -")
bad("a weight without *", {}, "train_ppo eval --reward 0.7reward", "'0.7reward' is no term", "weight*term")
bad("neither folder nor function", {}, "train_ppo --reward my:reward:1",
    "--reward my:reward:1: neither a folder nor module:function", "such as")
bad("a function that returns words", {"words_zq.py": "def f(prompts, responses, references):\n    return 'good'\n"},
    "train_ppo --reward words_zq:f", "the reward f returned 'good'", "one number a response")
bad("a function that returns a number too many",
    {"many_zq.py": "def f(prompts, responses, references):\n    return [1, 2]\n"}, "train_ppo --reward many_zq:f",
    "the reward f returned 2 scores for 5 responses")
bad("a function that returns one number for all, and a run to replace", {"one_zq.py": "def f(prompts, responses, references):\n    return 1.0\n"},
    "train_ppo --reward one_zq:f --out run --overwrite", "the reward f returned 1 scores for 5 responses")
bad("such a function, and a single training row", {"one_zq.py": "def f(prompts, responses, references):\n    return 1.0\n",
    **{f"one/{name}.json": [{"prompt": name, "reference": "x"}] for name in ("train", "validation", "test")}},
    "train_ppo --data one --reward one_zq:f --out run --overwrite", "the reward f returned 1 scores for 2 responses")
bad("a member of an ensemble that gives NaN, and a run to replace", {"nan_zq.py": "def f(prompts, responses, references):\n    return [float('nan')] * len(prompts)\n"},
    "train_ppo --reward syntax nan_zq:f --out run --overwrite", "--reward syntax, nan_zq:f: member 2 of the reward ensemble (f) gave NaN", "mend it")
bad("a metric without references, and a run to replace", {}, "train_ppo --data prompts.json --reward bleu --out run --overwrite",
    "--reward bleu: no validation row can be scored", "a metric needs references")
bad("a sum that overflows, and a run to replace", {}, "train_ppo --reward 1e300*length --out run --overwrite", "are not finite")
bad("one reward model by two names", {}, "train_ppo --reward reward ./reward", "--reward names ./reward twice", "name it once")
bad("one reward model by two names in a sum", {}, "train_ppo --reward 0.5*reward+0.5*./reward", "is no term")

section("Lengths")
bad("prompt and response over the context", {}, "train_ppo train_dpo --max-query 40",
    "--max-query and --max-response come to 48 tokens, more than the 28 positions", "lower one of them")
bad("the same for SFT and evaluation", {}, "train_sft eval --model policy --max-response 9",
    "come to 29 tokens, more than the 28 positions", "lower one of them")
bad("the same for the samples of pairs", {}, "train_reward --data data.jsonl --policy policy --max-query 40",
    "come to 48 tokens, more than the 28 positions")


# ---------------------------------------------------------------------------------------------------- running a case

def arguments(case):
    """The command's words, as typed."""
    if case.command in ("check", "convert"):
        return [case.command, *shlex.split(case.rest)]
    words = shlex.split(f"{GOOD[case.command]} {TEXT}")
    rest = shlex.split(case.rest)
    for flag in ("--model", "--reward"):  # a list may be given once
        if case.command in ("eval", "train_ppo") and flag in words and flag in rest:
            del words[words.index(flag):words.index(flag) + 2]
    return words + rest


def launch(command, words):
    """A command's own parse and main; the exit code."""
    if command in ("check", "convert"):
        return (data if command == "check" else hf).main(words)
    module = importlib.import_module(command)
    body = module.run_evaluation if command == "eval" else module.train
    run.main(body, parse(module.Config, module.PRESETS, words, prog=f"{command}.py"))
    return 0


def attempt(case, home, folder):
    """Run one case in `folder`, made of links to `home`: (exit code, stderr, what changed in the folder)."""
    shutil.copytree(home, folder, copy_function=os.link)
    for name, content in case.made.items():
        write(folder / name, content)
    before, errors = snapshot(folder), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(errors), redirect_stdout(io.StringIO()):
        patch.chdir(folder)
        patch.setattr(sys, "argv", [f"{case.command}.py"])
        patch.setattr(sys, "dont_write_bytecode", True)
        if case.machine:
            case.machine(patch)
        try:
            code = launch(case.command, arguments(case))
        except SystemExit as exit:
            code = exit.code
        finally:
            after = snapshot(folder)
            shutil.rmtree(folder)
    return code, errors.getvalue(), sorted(str(path) for path in before.keys() | after.keys() if before.get(path) != after.get(path))


def snapshot(folder):
    """{path: (which file, its size, when it was written)}."""
    found = {path: path.stat() for path in folder.rglob("*")}
    return {path: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("bad-input") / "world"
    world(home)
    return home


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_bad_input_is_one_line(case, home):
    """Exit 2, one line on stderr with what the table says, and nothing written."""
    code, error, changed = attempt(case, home, home.parent / "here")
    assert (code, error.count("\n")) == (2, 1), error
    assert "error: " in error and len(error) < 700
    for words in case.words:
        assert words in error
    assert changed == []


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl"])
@pytest.mark.parametrize("kind", list(ROWS))
def test_skipped_rows_are_counted_and_listed(kind, suffix, tmp_path, capsys):
    """Eight good rows, of which the third and the sixth lose their prompt: with --skip-bad-rows the others are used, and both
    are named with line and reason; without it the first stops."""
    rows = [dict(row) for row in ROWS[kind]]
    name = "intent" if "intent" in rows[0] else "prompt"
    rows[2][name] = rows[5][name] = ""
    path = tmp_path / f"rows{suffix}"
    write_rows(path, rows)
    assert data.main(["check", str(path)]) == 2
    first, = capsys.readouterr().err.splitlines()
    assert data.main(["check", str(path), "--skip-bad-rows"]) == 0
    out, err = capsys.readouterr()
    count, *listed = err.splitlines()
    assert count == f"{path}: skipped 2 of 8 rows" and [line.startswith(f"  {path}:") for line in listed] == [True, True]
    assert first == f"error: {listed[0].strip()}" and all(f"'{name}' is empty" in line for line in listed)
    assert sum(int(line.split()[1]) for line in out.splitlines() if " rows, " in line) == 6


def test_a_cell_that_swallows_rows_is_skipped_with_its_lines(tmp_path, capsys):
    """An open quote on line 3 takes the rest of the file with it: one row as CSV sees it, so its last line is said too."""
    path = tmp_path / "rows.csv"
    path.write_text('prompt\n' + "a\n" + '"b\n' + "".join(f"row {n}\n" for n in range(40)))
    assert len(data.read(path, skip_bad_rows=True)) == 1
    assert "rows.csv:3: malformed CSV" in (err := capsys.readouterr().err) and "the row runs to line 43" in err


def test_at_most_a_hundred_skipped_rows_are_listed(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p"}\n' + "oops\n" * 250)
    assert len(data.read(path, skip_bad_rows=True)) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("skipped 250 of 251 rows") and lines[-1].strip() == "... and 150 more" and len(lines) == 102


LONG = "take " * 30 + "the last of xs"


@pytest.mark.parametrize("script", TRAIN.split() + ["eval"])
def test_prompts_that_are_too_long_are_counted(script, home, tmp_path, monkeypatch, capsys):
    """Prompts of 33 words lose their beginning at 20 tokens; the script works, and says how many they were."""
    shutil.copytree(home, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    name = "pairs.jsonl" if script in ("train_dpo", "train_reward") else "data.jsonl"
    rows = [json.loads(line) for line in Path(name).read_text().splitlines()]
    for n in range(len(rows)):
        rows[n]["prompt"] = f"{n} {LONG}"
    write(Path(name), rows)
    words = shlex.split(f"{GOOD[script]} {TEXT} --device cpu --dry-run")
    drawing = script.replace("train", "plot").replace("eval", "draw")  # it takes longer than all the rest
    monkeypatch.setattr(importlib.import_module(script), drawing, lambda *args: None)
    with redirect_stderr(sys.stdout):
        launch(script, words)
    said = capsys.readouterr().out
    assert re.search(r"cut to length: [1-9]|[1-9]\d* cut to 20 tokens|[1-9]\d* of \d+ prompts with their responses are longer", said), said


def test_the_end_of_a_long_prompt_is_what_stays(home):
    tokenizer = Tokenizer.from_pretrained(home / "policy")
    (row,), cut = encode_queries(tokenizer, [LONG], "{prompt}", 12)
    assert cut == 1 and len(row) == 12 and LONG.endswith(tokenizer.decode(row)) and tokenizer.decode(row).endswith("the last of xs")
    model = RewardModel.from_pretrained(home / "reward")
    ids, mask, _ = model.encode([LONG, "xs"], ["xs + 1", "xs"])
    assert model.cut == 1 and mask.sum(1).tolist()[0] == 28
    assert tokenizer.decode(ids[0]).endswith("the last of xs\nxs + 1")
    bert = RewardModel.from_pretrained(home / "bert")
    bert.encode([LONG, "xs"], ["xs + 1", "xs"])
    assert bert.cut == 1


def test_the_table_is_large_and_of_different_cases():
    assert len({case.what for case in CASES}) >= 80 and len({case.id for case in CASES}) == len(CASES)
    assert {case.command for case in CASES} == {*ALL.split(), "check", "convert"}


# ---------------------------------------------------------------------------------------------------- the table as prose

def main():
    """Print every case with its message, by section."""
    import tempfile
    with tempfile.TemporaryDirectory() as scratch:
        home, title, seen = Path(scratch) / "world", None, set()
        world(home)
        for n, case in enumerate(CASES):
            _, error, _ = attempt(case, home, Path(scratch) / str(n))
            line = error.strip().replace(scratch, "...").removeprefix(f"{case.command}.py: ")
            if case.section != title:
                title = case.section
                print(f"\n## {title}\n")
            if (case.what, line) not in seen:  # several scripts that say the same are shown once
                print(f"- {case.what} (`{case.command} {case.rest}`):\n  {line}")
            seen.add((case.what, line))
        print(f"\n{len(CASES)} cases, {len({case.what for case in CASES})} kinds")


if __name__ == "__main__":
    main()
