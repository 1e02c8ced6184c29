"""Synthetic feedback with its provenance: ratings by a language model, ranked pairs, mutated references.

    ratings     a GPT-2 rates responses from 1 to 5, read from its probabilities of the five digits after "Rating:"
    pairs       the best and the worst of a policy's samples, ranked by execution, a reward model or a metric
    mutations   a reference against itself with one error in it; what still passes the row's checks is discarded

Each row says in `source` how it came about. Nothing is invented: a rating is what the rater's probabilities say, with
the mass that they had, and a comment is what was found by parsing and running the response.

    python -m nanorlhf.feedback --kind pairs --policy runs/sft --samples 8 --out feedback/pairs.jsonl
    python -m nanorlhf.feedback --kind ratings --rater gpt2 --policy runs/sft --out feedback/ratings.json
    python train_reward.py --data feedback/pairs.jsonl --out runs/pairs/reward

The pairs that train_reward.py makes by default come from `preference_pairs` in nanorlhf/mutations.py.
"""
import re
from dataclasses import dataclass

from nanorlhf.config import asked, option, parse
from nanorlhf.errors import InputError, nearest
from nanorlhf.options import SANDBOX, DataOptions, RunOptions, SandboxOptions

KINDS = ("ratings", "pairs", "mutations")
RATING_PROMPT = "Task: {prompt}\nCode: {response}\nFrom 1 (bad) to 5 (good)\nRating:"
PLACES = re.compile(r"\{prompt\}|\{response\}")
SAMPLING = ("samples", "temperature", "template", "max_query", "max_response")
IDLE = {  # what would do nothing: asked for, it is refused
    "ratings": ("rank", "margin", "with_reference", "mutations"),
    "pairs": ("rater", "rating_prompt", "mutations"),
    "mutations": ("policy", *SAMPLING, "rater", "rating_prompt", "rank", "margin", "with_reference", "batch_size",
                  "gpu", "device", "precision"),
}


@dataclass
class Config(SandboxOptions, DataOptions, RunOptions):
    out: str = option("feedback.jsonl", "file to write: .jsonl, a row a line, or .json, a list", group="Run",
                      metavar="FILE")
    overwrite: bool = option(False, "replace the file --out")
    kind: str | None = option(None, "what to make", group="Feedback", choices=KINDS)
    split: str = option("train", "rows to make it of; what held-out rows give must not be trained on",
                        choices=("train", "validation", "test", "all"))
    policy: str = option("", "whose samples are rated or ranked; without it the responses in the data are rated",
                         metavar="FOLDER")
    samples: int = option(4, "samples for each prompt; equal ones count once", at_least=1)
    temperature: float = option(1.0, "temperature of the samples; 0: greedy", at_least=0)
    batch_size: int = option(64, "prompts answered, or responses rated, at once", at_least=1)
    rater: str = option("", "language model that rates, a GPT-2", group="Ratings", metavar="FOLDER_OR_NAME")
    rating_prompt: str = option(RATING_PROMPT, "what the rater continues with a digit; holds {prompt} and {response}")
    rank: str = option("execution", "what ranks the samples: execution (the share of a row's checks that pass), a "
                       "metric such as codebleu, or a reward, as for train_ppo.py", group="Pairs", metavar="RANKING")
    margin: float = option(0.0, "a pair's scores must differ by more than this", at_least=0)
    with_reference: bool = option(False, "rank the reference among the samples")
    mutations: int = option(2, "mutations of each reference", group="Mutations", at_least=1)

    def check(self):
        """InputError where options contradict each other."""
        super().check()
        if self.kind is None:
            raise InputError(f"--kind is missing: one of {', '.join(KINDS)}")
        if idle := asked(self, *IDLE[self.kind]):
            raise InputError(f"{idle}: not for --kind {self.kind}; leave out")
        if not self.out.endswith((".json", ".jsonl")):
            raise InputError(f"--out {self.out}: must end in .jsonl (a row a line) or .json (a list)")
        if self.temperature == 0 and self.samples > 1 and self.policy:
            raise InputError("--temperature 0: greedy samples are all alike; add --samples 1, or raise it")
        if self.kind != "mutations":
            {"ratings": self._check_ratings, "pairs": self._check_pairs}[self.kind]()

    def _check_ratings(self):
        if not self.rater:
            raise InputError("--rater is missing: name the GPT-2 that rates, such as --rater gpt2")
        if not self.policy and (idle := asked(self, *SAMPLING)):
            raise InputError(f"{idle}: for samples of a policy; name one with --policy, or leave out")
        check_rating_prompt(self.rating_prompt)

    def _check_pairs(self):
        if not self.policy:
            raise InputError("--policy is missing: name the policy whose samples are ranked, such as --policy runs/sft")
        if self.samples == 1 and not self.with_reference:
            raise InputError("--samples 1 leaves nothing to rank: raise it, or add --with-reference")
        if "execution" not in self.rank and (idle := asked(self, *SANDBOX)):
            raise InputError(f"{idle}: --rank {self.rank} runs no code; leave out")
        if self.rank == "execution" and self.sandbox == "off":
            raise InputError("--sandbox off and --rank execution contradict each other: change one of them")


PRESETS = {
    "fast": {},
    "conala": {"data": "conala", "max_response": 64},
    "research": {"data": "conala", "max_query": 128, "max_response": 128},
    "production": {"data": "conala", "max_query": 128, "max_response": 128},
}


def check_rating_prompt(template):
    """InputError unless a template has both places, and text after them for the digit to follow."""
    if set(PLACES.findall(template)) != {"{prompt}", "{response}"} or not PLACES.split(template)[-1].strip():
        raise InputError(f"--rating-prompt {template[:60]!r}: needs {{prompt}}, {{response}}, and after them text that "
                         "asks for a digit, such as 'Rating:'")


if __name__ == "__main__":
    CONFIG = parse(Config, PRESETS, prog="python -m nanorlhf.feedback")  # before torch is imported: --help is quick

import ast
import json
import math
import os
import random
import signal
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from nanorlhf import run
from nanorlhf.data import open_data
from nanorlhf.evaluation import answer, check_finite, open_sandbox
from nanorlhf.gpt2 import GPT2
from nanorlhf.logprobs import log_softmax
from nanorlhf.metrics import METRIC_NAMES, evaluate, exact_match, parses
from nanorlhf.metrics.execution import run_checks
from nanorlhf.metrics.match import parse as parse_code
from nanorlhf.mutations import each, identifiers, mutations_of, passing, row_names
from nanorlhf.pipeline import check_policy
from nanorlhf.reward import call_reward
from nanorlhf.terms import AGAINST_REFERENCE, RULES, ExecutionReward, load_reward, needs_execution, parse_sum
from nanorlhf.tokenizer import Tokenizer, pad


# ---- Ratings

def format_rating(prompt, response, template=RATING_PROMPT):
    """The text that the rater continues; braces within prompt and response stay as they are."""
    texts = {"{prompt}": prompt, "{response}": response}
    return PLACES.sub(lambda place: texts[place.group()], template)


def digit_tokens(tokenizer, template=RATING_PROMPT):
    """The ids of the tokens that 1 to 5 are after the template: of " 1" to " 5" where each is one token (as GPT-2's),
    else of "1" to "5". InputError where neither are: then no one probability is the digit's."""
    end = PLACES.split(template)[-1]
    start = tokenizer.encode(end)
    for space in ("",) if end[-1:].isspace() else (" ", ""):
        found = [tokenizer.encode(f"{end}{space}{digit}") for digit in "12345"]
        if all(ids[:-1] == start for ids in found) and len({ids[-1] for ids in found}) == 5:
            return [ids[-1] for ids in found]
    raise InputError(f"the rater's tokenizer does not make one token of each of 1 to 5 after {end!r}: end "
                     "--rating-prompt in another way, without a space, or name another --rater")


def rating_from(logps):
    """What the log-probs l_1 .. l_5 of the five digits say:

        p_k = exp(l_k) / sum_j exp(l_j)        rating = sum_k k p_k        mass = sum_k exp(l_k)

    Returns: a dict with rating, argmax (of equals the lowest), probabilities (p_1 .. p_5) and mass; near 0, the rater
        was not about to answer with a digit. There is no column `logits`: a reward model reads that one as an input,
        and these would tell it the rating.
    """
    weights = [math.exp(logp - max(logps)) for logp in logps]
    p = [weight / sum(weights) for weight in weights]
    return {"rating": sum(k * p_k for k, p_k in enumerate(p, 1)), "argmax": 1 + p.index(max(p)), "probabilities": p,
            "mass": sum(map(math.exp, logps))}


@torch.no_grad()
def rate(model, tokenizer, prompts, responses, template=RATING_PROMPT, batch_size=64, precision="fp32"):
    """A language model's rating of each response, from 1 to 5: `rating_from` the digits' log-probs after `template`.

    Args: model, a GPT2, and its tokenizer. prompts, responses: lists of texts. What is longer than the model's
        positions loses its beginning; how many do is said.
    Returns: a list of dicts. Raises: RunFailed if a log-prob is not finite.
    """
    digits, longest = digit_tokens(tokenizer, template), model.config.n_positions
    queries = [tokenizer.encode(format_rating(*texts, template)) for texts in zip(prompts, responses)]
    if cut := sum(len(query) > longest for query in queries):
        print(f"cut to length: {cut} rating prompts of {len(queries)} (the rater reads {longest} tokens)")
    found = []
    for start in tqdm(range(0, len(queries), batch_size), desc="rating", unit="batch", leave=False, disable=None):
        some = [query[-longest:] for query in queries[start:start + batch_size]]
        ids, mask = (x.to(model.device) for x in pad(some, tokenizer.pad_id, "left"))  # (b, T) each
        with run.autocast(model.device, precision):
            logits = model.logits(model.hidden(ids, mask)[:, -1])  # (b, V)
        logps = log_softmax(logits)[:, digits]  # (b, 5)
        if not torch.isfinite(logps).all():
            raise run.RunFailed("the rater's probabilities are not finite: are its weights damaged?")
        found += [rating_from(row) for row in logps.double().tolist()]
    return found


def comment(response, record, share):
    """What is known of a response, in words: that it is empty or does not parse, how many checks it passes, or that it
    equals the reference; else "". share: the share of its checks that it passes, or None."""
    if not response.strip():
        return "empty"
    if not parses(response):
        return "does not parse"
    if share is not None:
        return f"passes {round(share * len(record.checks))} of {len(record.checks)} checks"
    return "equals the reference" if record.reference is not None and exact_match(response, record.reference) else ""


def rating_rows(config, records, device, box):
    """(rows, words): responses, the policy's or the data's own, with their ratings and comments."""
    rater, tokenizer = load_model(config.rater, device)
    digit_tokens(tokenizer, config.rating_prompt)  # a rater that cannot answer is refused before anything is sampled
    if not config.policy and any(record.response is None for record in records):
        raise InputError(f"--data {config.data}: rows without a response to rate; name a --policy to sample some")
    answers = sample(config, records, device) if config.policy else [[record.response] for record in records]

    def ratings(responses, rows):
        return rate(rater, tokenizer, [record.prompt for record in rows], responses, config.rating_prompt,
                    config.batch_size, config.precision)

    def shares(responses, rows):
        return run_checks(box, responses, [record.checks for record in rows]) if box else [None] * len(rows)

    source = _source(config, rater=config.rater, policy=config.policy or None,
                     temperature=config.temperature if config.policy else None)
    rows, rated, passed = [], each(ratings, answers, records), each(shares, answers, records)  # {response: ...} for each record
    for name, record, numbers, share in zip(row_names(records), records, rated, passed):
        for i, response in enumerate(numbers):
            rows.append(_row(f"{name}-{i}" if config.policy else name, record, source, response=response, **numbers[response],
                             comment=comment(response, record, share[response])))
    mean, mass = (sum(row[column] for row in rows) / len(rows) for column in ("rating", "mass"))
    spread = (sum((row["rating"] - mean) ** 2 for row in rows) / len(rows)) ** 0.5
    doubt = "; it was not about to answer with a digit: do not trust these ratings" if mass < 0.1 else ""
    return rows, (f"{len(rows)} ratings, mean {mean:.2f}, standard deviation {spread:.2f}; the five digits had "
                  f"{mass:.1%} of the rater's probability{doubt}")


# ---- Ranked pairs

def best_and_worst(scores, margin=0.0):
    """(best, worst) of {answer: score}, or None unless the two scores differ by more than `margin`.

    Of equals the first counts. An answer whose score is None is not ranked; an empty one is never the best.
    """
    known = {text: score for text, score in scores.items() if score is not None}
    best = max((text for text in known if text.strip()), key=known.get, default=None)
    worst = min(known, key=known.get, default=None)
    return None if best is None or not known[best] - known[worst] > margin else (best, worst)


def ranking(config, records, device, box):
    """The function (codes, records) -> scores that --rank names; the score of what cannot be ranked is None."""
    if config.rank == "execution":
        return lambda codes, rows: run_checks(box, codes, [record.checks for record in rows])
    if config.rank in METRIC_NAMES:
        if not any(record.reference for record in records):
            raise InputError(f"--rank {config.rank}: the rows of --data {config.data} have no reference to go by")
        if reason := evaluate(["x"], ["x"], [config.rank])["reasons"].get(config.rank):
            raise InputError(f"--rank {config.rank}: texts alone do not give it ({reason}); choose another metric")
        return lambda codes, rows: [_score(config.rank, code, record.reference) for code, record in zip(codes, rows)]
    if re.fullmatch(r"\w+", config.rank) and config.rank not in RULES and not os.path.exists(config.rank):
        near = nearest(config.rank, ("execution", *METRIC_NAMES))
        hint = f"did you mean {near}?" if near else f"the metrics are {', '.join(METRIC_NAMES)}"
        raise InputError(f"--rank {config.rank}: no metric, folder or rule of that name; {hint}")
    with of_rank():
        if {name for _, name in parse_sum(config.rank)} & AGAINST_REFERENCE.keys() and not any(record.reference for record in records):
            raise InputError(f"--rank {config.rank}: the rows of --data {config.data} have no reference to go by")
        reward = load_reward([config.rank], device=device, execution=box and ExecutionReward(box, records))

    def scores(codes, rows):
        found = call_reward(reward, [record.prompt for record in rows], codes, [record.reference for record in rows])
        check_finite(found, rows, f"--rank {config.rank}", reward)
        return [None if math.isnan(score) else score for score in found.tolist()]
    return scores


@contextmanager
def of_rank():
    """What is said of --reward is said of --rank here."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace("--reward", "--rank")) from None


def _score(metric, code, reference):
    """A metric of one answer; None without a reference."""
    return None if reference is None else evaluate([code], [reference], [metric])[metric]


def ranked_rows(config, records, device, box):
    """(rows, words): of each prompt's samples, and its reference if asked for, the best against the worst."""
    if config.with_reference and not any(record.reference for record in records):
        raise InputError(f"--with-reference: the rows of --data {config.data} have no references; leave it out")
    score = ranking(config, records, device, box)
    sampled = sample(config, records, device)
    answers = [list(dict.fromkeys([*some, record.reference] if config.with_reference and record.reference else some))
               for some, record in zip(sampled, records)]  # the reference last: of equals a sample is chosen
    source = _source(config, rank=config.rank, policy=config.policy, temperature=config.temperature)
    rows, without = [], Counter()
    for name, record, some, scores in zip(row_names(records), records, sampled, each(score, answers, records)):
        if (pair := best_and_worst(scores, config.margin)) is None:
            without["unranked" if None in scores.values() else "tied" if len(scores) > 1 else "alone"] += 1
            continue
        columns = dict(zip(("chosen", "rejected"), pair))
        origin = {column: "policy" if text in some else "reference" for column, text in columns.items()}
        rows.append(_row(name, record, source | origin, **columns, chosen_score=scores[pair[0]],
                         rejected_score=scores[pair[1]]))
    return rows, (f"{len(rows)} pairs of {len(records)} prompts; none of {without['tied']} whose scores do not differ "
                  f"by more than {config.margin:g}, of {without['alone']} with one answer only, of "
                  f"{without['unranked']} that cannot be ranked")


# ---- Mutated references

def mutation_rows(config, records, device, box):
    """(rows, words): each reference against its mutations, those that pass its checks left out."""
    records = [record for record in records if record.reference is not None]
    if not records:
        raise InputError(f"--data {config.data}: no row has a reference to mutate")
    rng = random.Random(config.seed)
    names = sorted({name for record in records for name in identifiers(record.reference)})
    mutated = [mutations_of(record.reference, names, rng, config.mutations) for record in records]
    verdicts = each(passing(box), mutated, records) if box else [dict.fromkeys(some) for some in mutated]
    rows = [_row(f"{name}-{i}", record, _source(config, checked=passed is not None),
                 chosen=ast.unparse(parse_code(record.reference)), rejected=code)  # in one style, as mutations are
            for name, record, some in zip(row_names(records), records, verdicts)
            for i, (code, passed) in enumerate(some.items()) if passed is not True]
    found = Counter(passed for some in verdicts for passed in some.values())
    return rows, (f"{len(rows)} pairs of {len(records)} references; {found[True]} mutations that pass all checks were "
                  f"discarded, {found[False]} fail some, {found[None]} were not run; {mutated.count([])} references "
                  "gave none")


# ---- What all kinds share

def load_model(name, device):
    """A GPT-2 and its tokenizer."""
    model, tokenizer = GPT2.from_pretrained(name).to(device), Tokenizer.from_pretrained(name)
    tokenizer.check_fits(model.config.vocab_size, name)
    return model, tokenizer


def sample(config, records, device):
    """The different ones of --samples responses of the policy to each record: a list of texts a record."""
    check_policy(config.policy, config)
    policy, tokenizer = load_model(config.policy, device)
    policy.check_length(config.max_query + config.max_response)
    answers = [{} for _ in records]
    for i in range(config.samples):
        seed = config.seed * 1000 + i  # no sample of one seed is a sample of the next
        rows = answer(policy, tokenizer, records, config, config.temperature, seed=seed, batch_size=config.batch_size)
        for row, texts in zip(rows, answers):
            texts[row["response"]] = None
    return [list(texts) for texts in answers]


def _source(config, **more):
    """Where a row comes from."""
    return {"kind": config.kind, "data": config.data, "split": config.split, "seed": config.seed, **more}


def _row(name, record, source, **columns):
    """A row of the file. It keeps its question, whose rows must not part when the file is split."""
    question = {"question_id": record.meta["question_id"]} if record.meta.get("question_id") is not None else {}
    return {"id": name, "prompt": record.prompt, **columns, **question, "source": source}


# ---- Files

PAIR_FILES = ("preferences.jsonl", "preferences_validation.jsonl")  # in the reward model's run folder


def read_pairs(path):
    """Pairs as `write_pairs` wrote them."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")  # not splitlines: a response may hold U+2028 or U+0085
    return [json.loads(line) for line in lines if line]


def write_pairs(path, rows):
    """Rows as JSONL, or a JSON list in a .json file, for `nanorlhf.data.read`; whole or not at all."""
    path, lines = Path(path), [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "[\n" + ",\n".join(lines) + "\n]\n" if path.suffix == ".json" else "".join(f"{line}\n" for line in lines)
    partial = _partial(path)
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise run.RunFailed(f"{path} was not written: {error.strerror}; make room, or name another place") from None
    finally:
        partial.unlink(missing_ok=True)


def _partial(path):
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def check_out(path, overwrite):
    """InputError unless `path` can be written, before any work is done; nothing is touched."""
    try:
        os.stat(_partial(path))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # a parent that is a file, a name that is too long, a zero byte
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--out {str(path)[:80]!r}: cannot be written: {reason}; name another") from None
    if path.is_dir():
        raise InputError(f"--out {path}: is a folder; name a file inside it")
    if path.exists() and not overwrite:
        raise InputError(f"--out {path}: is there already; pass --overwrite to replace it, or name another")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not os.access(parent, os.W_OK):
        raise InputError(f"--out {path}: {parent} cannot be written to; name another folder")


# ---- python -m nanorlhf.feedback

MAKERS = {"ratings": rating_rows, "pairs": ranked_rows, "mutations": mutation_rows}


def sandbox(config, splits, records):
    """An open sandbox where code is to be run, else None; also where only comments need one, and none can be had."""
    if config.kind == "pairs":
        with of_rank():
            return open_sandbox(config, splits, needed=True) if needs_execution([config.rank]) else None
    checked = any(record.checks for record in records) and config.sandbox != "off"
    return open_sandbox(config, splits, needed=checked and config.kind == "mutations")


def make(config):
    """Make the file --out, or nothing."""
    path = Path(config.out)
    check_out(path, config.overwrite)
    run.seed_everything(config.seed)
    splits, _ = open_data(config)
    named = splits.named()
    records = named[config.split] if config.split != "all" else [record for rows in named.values() for record in rows]
    others = sum(map(len, named.values())) - len(records)
    print(f"data: {splits.source}; {len(records)} rows of {config.split}" + (f", {others} rows are in other splits (--split)" if others else ""))
    device = None if config.kind == "mutations" else run.pick_device(config.gpu, config.device)
    with sandbox(config, splits, records) or nullcontext() as box:
        rows, words = MAKERS[config.kind](config, records, device, box)
    if not rows:
        raise InputError(f"nothing to write: {words}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_pairs(path, rows)
    print(f"{path}: {words}")


def make_or_leave(config):
    """`make`; a signal says that there is nothing to resume."""
    try:
        make(config)
    except (KeyboardInterrupt, run.Interrupted) as error:
        signum = getattr(error, "signum", signal.SIGINT)
        raise run.Interrupted(signum, f"interrupted; {config.out} was not written") from None


if __name__ == "__main__":
    run.main(make_or_leave, CONFIG)
