"""Fuzzing: damage valid files at random; each must load or be refused with an InputError of one line.

Every format of `nanorlhf.data` under every suffix, a TOML configuration, and model folders in every layout that `hf`,
`gpt2`, `encoder`, `reward` and `tokenizer` read. One file of a target is damaged a mutant: bits flipped, the end or the
start cut off, pieces copied elsewhere (also from other targets' files), lines swapped, a JSON value replaced. A model
that loads must also answer a text. Anything else fails: another exception, a message of several lines, more than
`--seconds` of time, more than `--memory-mb` beyond what the process had (so that a header cannot ask for gigabytes).

    python -m bench.fuzz                          # 10,000 mutants; the seed is fixed
    python -m bench.fuzz --seed 7 --mutants 500 --only gpt2
"""
import faulthandler
import io
import json
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch

from nanorlhf import hf
from nanorlhf.config import option, parse
from nanorlhf.data import check_leakage, describe, load_splits
from nanorlhf.encoder import Encoder, EncoderConfig
from nanorlhf.errors import InputError
from nanorlhf.gpt2 import GPT2, GPT2Config, PolicyWithValue
from nanorlhf.options import DataOptions, TrainOptions
from nanorlhf.reward import LastToken, RewardModel
from nanorlhf.tokenizer import Tokenizer


@dataclass
class Config:
    """Damage valid files at random: each must load or be refused with an InputError of one line."""
    mutants: int = option(10_000, "damaged files, shared out evenly among the targets", group="Fuzzing", at_least=1)
    seed: int = option(0, "seed of the damage", at_least=0)
    only: str = option("", "only targets whose name contains this")
    seconds: float = option(10.0, "longest time one mutant may take", above=0)
    memory_mb: int = option(1024, "most memory that one mutant may ask for", at_least=64)


# ---- Valid files

ROWS = {
    "conala": [{"intent": f"i {n}", "rewritten_intent": f"r `{n}`" if n % 3 else None, "snippet": f"f({n})", "question_id": n}
               for n in range(8)],
    "conala-mined": [{"intent": f"i {n}", "snippet": f"f({n})", "prob": n / 8, "question_id": n, "id": f"{n}_1"} for n in range(8)],
    "nano": [{"id": f"n-{n}", "family": "sum", "intent": f"sum {n}", "snippet": f"sum(xs) + {n}",
              "checks": [{"setup": "xs = [1]", "value": str(n + 1)}]} for n in range(8)],
    "prompts": [{"prompt": f"sum \"{n}\", é字"} for n in range(8)],
    "reference": [{"prompt": f"sum {n}", "reference": f"x\n+ {n}"} for n in range(8)],
    "response": [{"prompt": f"sum {n}", "response": f"x + {n}", "rating": n - 2.5} for n in range(8)],
    "preference": [{"prompt": f"sum {n}", "chosen": f"x + {n}", "rejected": f"x - {n}"} for n in range(8)],
    "feedback": [{"prompt": f"sum {n}", "response": f"x + {n}", "rating": n, "logits": [0.5, n], "comment": "good"} for n in range(8)],
}


def write_rows(path, rows):
    """Rows as .csv, .tsv, .json or .jsonl."""
    if path.suffix in (".csv", ".tsv"):
        import csv
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerow(rows[0])
            for row in rows:
                writer.writerow(json.dumps(value) if isinstance(value, list) else value for value in row.values())
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_models(home):
    """A folder for every layout: whole, in shards, pickled, with a value head, as a reward model; GPT-2, RoBERTa, BERT."""
    torch.manual_seed(0)
    bpe = Tokenizer.train(["sum xs", "sum of the rows"] * 4, 262)
    gpt2 = GPT2.from_config(GPT2Config(vocab_size=bpe.vocab_size, n_positions=16, n_embd=4, n_layer=2, n_head=2))
    PolicyWithValue(gpt2).save_pretrained(home / "gpt2")
    RewardModel(gpt2, LastToken(4), bpe).save_pretrained(home / "reward-gpt2")
    for name in ("gpt2-shards", "gpt2-pickle"):
        gpt2.save_pretrained(home / name)
    for name in ("gpt2", "gpt2-shards", "gpt2-pickle"):
        bpe.save_pretrained(home / name)
    for name in ("gpt2-shards", "gpt2-pickle"):  # vocab.json + merges.txt
        (home / name / "tokenizer.json").unlink()
    state = {name: tensor.clone() for name, tensor in gpt2.to_state().items()}
    whole = {name: home / name / "model.safetensors" for name in ("gpt2-shards", "gpt2-pickle")}
    for path in whole.values():
        path.unlink()
    torch.save(state, whole["gpt2-pickle"].with_name("pytorch_model.bin"))
    names = list(state)
    shards = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
    for shard, some in shards.items():
        hf.write_tensors(home / "gpt2-shards" / shard, {name: state[name] for name in some})
    index = {"metadata": {}, "weight_map": {name: shard for shard, some in shards.items() for name in some}}
    (home / "gpt2-shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters)]
    (home / "bert").mkdir()
    (home / "bert" / "vocab.txt").write_text("\n".join(words) + "\n")
    reward_model("bert", len(words), Tokenizer.from_pretrained(home / "bert")).save_pretrained(home / "bert")
    (home / "bert" / "tokenizer.json").unlink()
    roberta = Tokenizer(bpe.backend, "roberta", {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>",
                                                 "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"})
    reward_model("roberta", roberta.vocab_size, roberta).save_pretrained(home / "roberta")


def reward_model(family, vocab_size, tokenizer):
    from nanorlhf.encoder import new_head
    config = EncoderConfig(family, vocab_size, 4, 1, 2, 8, 20, pad_token_id=tokenizer.pad_id if family == "bert" else 1)
    return RewardModel(Encoder.from_config(config), new_head(config), tokenizer)


# ---- Reading them as the scripts do

def read_data(folder):
    file, = folder.iterdir()
    try:
        load_splits(file, skip_bad_rows=True)
    except InputError:
        pass
    splits = load_splits(file)
    check_leakage(splits, allow_overlap=True)
    describe(splits)


def read_toml(folder):
    @dataclass
    class Options(DataOptions, TrainOptions):
        pass
    parse(Options, {"fast": {"seed": 3}}, ["--config", str(folder / "config.toml")], exit_on_error=False)


def read_policy(folder):
    tokenizer = Tokenizer.from_pretrained(folder)
    model = PolicyWithValue.from_pretrained(folder)
    tokenizer.check_fits(model.policy.config.vocab_size, folder)
    ids, mask = tokenizer.batch(["sum xs", "s"], "left", max_length=8)
    model(ids, mask)
    tokenizer.decode(ids[0])


def read_reward(folder):
    RewardModel.from_pretrained(folder).score(["sum xs", "s"], ["sum of the rows, all of them", ""])


def targets(home):
    """{name: (folder of valid files, how it is read)}; the folders are made under `home`."""
    found = {}
    for kind, rows in ROWS.items():
        for suffix in (".csv", ".tsv", ".json", ".jsonl"):
            folder = home / f"{kind}{suffix}"
            folder.mkdir(parents=True)
            write_rows(folder / f"rows{suffix}", rows)
            found[folder.name] = folder, read_data
    (home / "toml").mkdir()
    (home / "toml" / "config.toml").write_text('# a run\npreset = "fast"\nout = "runs/x"\nvalidation = 0.2\nmax-query = 9\n'
                                               'skip_bad_rows = true\ntemplate = "Q {prompt}\\n"\nmin_probability = "none"\n')
    found["toml"] = home / "toml", read_toml
    write_models(home)
    for name in ("gpt2", "gpt2-shards", "gpt2-pickle"):
        found[name] = home / name, read_policy
    for name in ("reward-gpt2", "bert", "roberta"):
        found[name] = home / name, read_reward
    return found


# ---- Damage

VALUES = [b"null", b"true", b"-1", b"0", b"1", b"3", b"1e999", b"NaN", b"0.5", b"99999999999", b"9223372036854775808", b"9" * 5000, b'""',
          b'"x"', b"[]", b"{}", b"[1]", b'{"a": 1}', b'"\\ud800"', b'"../x"', b"[" * 3000]
SCALAR = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?|true|false|null')


def flip(data, rng, _):
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def cut(data, rng, _):
    at = rng.randrange(len(data))
    return data[:at] if rng.random() < 0.7 else data[at:]


def splice(data, rng, others):
    """A piece of this or another file, inserted or written over what is there."""
    source = rng.choice(others) if rng.random() < 0.3 else data
    start, size, at = rng.randrange(len(source)), rng.choice((1, 4, 16, 200)), rng.randrange(len(data))
    piece = source[start:start + size]
    return data[:at] + piece + data[at if rng.random() < 0.5 else at + len(piece):]


def swap_lines(data, rng, _):
    lines = data.splitlines(keepends=True)
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[i], lines[j] = lines[j], lines[i]
    return b"".join(lines)


def replace_value(data, rng, _):
    """Another JSON value in the place of one (a header of safetensors is JSON too, if its length still fits)."""
    found = list(SCALAR.finditer(data[:20_000]))
    if not found:
        return flip(data, rng, _)
    match, value = rng.choice(found), rng.choice(VALUES)
    if data[8:9] == b"{" and data[1:2] != b"\n":  # a safetensors file: keep its header's length
        value = value[:len(match[0])].ljust(len(match[0]))
    return data[:match.start()] + value + data[match.end():]


DAMAGE = (flip, cut, splice, swap_lines, replace_value, replace_value)


def mutate(folder, rng, others):
    """Damage one file of a folder, once or twice; says how."""
    path = rng.choice(sorted(p for p in folder.iterdir() if p.stat().st_size))
    data, names = bytearray(path.read_bytes()), []
    for _ in range(rng.choice((1, 1, 2))):
        kind = rng.choice(DAMAGE)
        data = bytearray(kind(data, rng, others)) or bytearray(b"\n")
        names.append(kind.__name__)
    path.write_bytes(data)
    return f"{path.name}: {', '.join(names)}"


# ---- One mutant

@contextmanager
def guarded(seconds, memory_mb):
    """TimeoutError after `seconds`, MemoryError (or torch's RuntimeError) beyond `memory_mb` more; a hang inside C code
    ends the process with all stacks shown."""
    def too_long(*_):
        raise TimeoutError(f"took longer than {seconds:g} s")
    before, limits = signal.signal(signal.SIGALRM, too_long), resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory_mb * 2 ** 20, limits[1]))
    faulthandler.dump_traceback_later(10 * seconds, exit=True, file=sys.__stderr__)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)


def attempt(folder, reader, seconds, memory_mb):
    """ "loaded", "refused", or what went wrong."""
    try:
        with guarded(seconds, memory_mb), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            reader(folder)
    except InputError as error:
        message = str(error)
        return "refused" if "\n" not in message and len(message) < 1000 else f"not one short line: {message[:300]!r}"
    except BaseException as error:  # all others, Rust's panics included, are what this looks for
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {str(error)[:300]}"
    return "loaded"


def fuzz(mutants, seed, only="", seconds=10.0, memory_mb=1024):
    """({target: Counter of outcomes}, [(target, seed of the mutant, damage, what went wrong)])."""
    counts, failures = {}, []
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        found = {name: target for name, target in targets(scratch / "valid").items() if only in name}
        if not found:
            raise InputError(f"--only {only}: no target has this in its name")
        for name, (folder, reader) in found.items():
            if (outcome := attempt(folder, reader, seconds, memory_mb)) != "loaded":
                failures.append((name, None, "none: the file is sound", outcome))
        others = [path.read_bytes() for folder, _ in found.values() for path in sorted(folder.iterdir())]
        names = sorted(found) + 4 * sorted(name for name, (_, reader) in found.items() if reader in (read_policy, read_reward))
        for n in range(mutants):
            name = names[n % len(names)]
            folder, reader = found[name]
            copy = scratch / "mutant"
            shutil.copytree(folder, copy)
            damage = mutate(copy, random.Random(f"{seed}-{n}"), others)
            outcome = attempt(copy, reader, seconds, memory_mb)
            known = outcome in ("loaded", "refused")
            counts.setdefault(name, Counter())[outcome if known else "failed"] += 1
            if not known:
                failures.append((name, n, damage, outcome))
            shutil.rmtree(copy)
    return counts, failures


def main(config):
    started = time.perf_counter()
    torch.set_num_threads(1)
    counts, failures = fuzz(config.mutants, config.seed, config.only, config.seconds, config.memory_mb)
    print("| target | loaded | refused | failed |\n|---|---:|---:|---:|")
    total = Counter()
    for name, found in counts.items():
        print(f"| {name} | {found['loaded']} | {found['refused']} | {found['failed']} |")
        total += found
    print(f"| all | {total['loaded']} | {total['refused']} | {total['failed']} |\n"
          f"\nseed {config.seed}, {time.perf_counter() - started:.0f} s")
    kinds = {}
    for name, n, damage, outcome in failures:
        kinds.setdefault((name, outcome[:60]), []).append((n, damage, outcome))
    for (name, _), some in kinds.items():
        print(f"FAILED {len(some)}x {name}, mutant {some[0][0]} ({some[0][1]}): {some[0][2]}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(parse(Config, prog="python -m bench.fuzz")))
