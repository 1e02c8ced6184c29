"""What a policy is worth on held-out prompts: sampled and greedy answers, row by row, and the comparison of two policies.

Every number here is the mean of a per-row value (BLEU, a corpus figure, aside), so that bootstrap intervals and paired
comparisons are those of the rows.
"""
import atexit
import json
from pathlib import Path

import torch

from nanorlhf import metrics
from nanorlhf.config import asked
from nanorlhf.data import called
from nanorlhf.errors import InputError
from nanorlhf.metrics.bootstrap import paired_bootstrap
from nanorlhf.metrics.execution import passes_checks
from nanorlhf.ops import TORCH
from nanorlhf.reward import RewardModel, call_reward, term_values
from nanorlhf.rollout import decode, generate, has_ended, score_in_parts
from nanorlhf.run import RunFailed, autocast
from nanorlhf.sandbox import Sandbox
from nanorlhf.sequences import encode_queries
from nanorlhf.tokenizer import pad


@torch.no_grad()
def answer(model, tokenizer, records, config, temperature, reference=None, seed=0, batch_size=None, ops=TORCH):
    """Answer each record's prompt once.

    Args:
        model: a GPT2. records: list of Record. config: has template, max_query, max_response, precision, and top_k and top_p
            where answers are sampled with them.
        temperature: 0 is greedy.
        reference: a GPT2 to measure the KL against: per row the sum over tokens of log pi - log ref, an unbiased estimate
            of KL(policy || reference) where the tokens were sampled at temperature 1.
        seed: of the sampling; the same seed gives the same answers.
        batch_size: prompts answered at once; None: config.generation_batch_size.
        ops: who computes the reference's log-probs (nanorlhf.ops).
    Returns: a list of dicts with id, prompt, reference, response, length (tokens, EOS included), ended, exact_match (None
        without a reference answer), and kl if a reference model is given.
    """
    generator, batch_size = torch.Generator(model.device).manual_seed(seed), batch_size or config.generation_batch_size
    queries, cut = encode_queries(tokenizer, [record.prompt for record in records], config.template, config.max_query)
    if cut:
        print(f"cut to length: {cut} queries (--max-query {config.max_query}) of {len(queries)}")
    rows = []
    for start in range(0, len(records), batch_size):
        some = records[start:start + batch_size]
        ids, mask = (x.to(model.device) for x in pad(queries[start:start + batch_size], tokenizer.pad_id, "left"))
        with autocast(model.device, config.precision):
            responses, response_mask, logprobs = generate(
                model, ids, mask, config.max_response, temperature, getattr(config, "top_k", 0), getattr(config, "top_p", 1.0),
                tokenizer.eos_id, generator)
        columns = {"response": decode(tokenizer, responses, response_mask), "length": response_mask.sum(1).tolist(),
                   "ended": has_ended(responses, response_mask, tokenizer.eos_id).tolist()}
        if reference is not None:
            whole, whole_mask = torch.cat([ids, responses], 1), torch.cat([mask.bool(), response_mask], 1)
            with autocast(model.device, config.precision):
                ref_logprobs, _, _ = score_in_parts(reference, whole, whole_mask, responses.shape[1], temperature or 1.0,
                                                    config.micro_batch_size, ops)
            columns["kl"] = ((logprobs - ref_logprobs) * response_mask).sum(1).tolist()
        for i, record in enumerate(some):
            rows.append(answer_row(record, columns["response"][i]) | {name: column[i] for name, column in columns.items()})
    return rows


def answer_row(record, response):
    """What is known of an answer from its text: a dict with id, prompt, reference, response, exact_match (None without a reference)."""
    match = None if record.reference is None else float(metrics.exact_match(response, record.reference))
    return {"id": record.id, "prompt": record.prompt, "reference": record.reference, "response": response, "exact_match": match}


def add_rewards(rows, reward, when="validation"):
    """Add each row's reward in place, None where a sum of terms leaves the row out, and the terms of a sum as "reward/NAME".

    `reward` is any callable (prompts, responses, references) -> (B,) scores.
    """
    scores = call_reward(reward, *([row[name] for row in rows] for name in ("prompt", "response", "reference")))
    check_finite(scores, rows, when, reward)
    columns = {"reward": scores} | {f"reward/{name}": values for name, values in term_values(reward).items()}
    for name, values in columns.items():
        for row, value in zip(rows, values.tolist()):
            row[name] = None if value != value else value
    return rows


def add_execution(rows, records, box):
    """Add to each row in place whether its response passes all of its record's checks: 1.0 or 0.0, None without checks or box."""
    passed = [None] * len(rows) if box is None else passes_checks(box, [row["response"] for row in rows], [r.checks for r in records])
    for row, verdict in zip(rows, passed):
        row["execution"] = None if verdict is None else float(verdict)
    return rows


def open_sandbox(config, splits, needed=False):
    """The sandbox that answers to these rows are run in; None, and the reason on the screen, where none can be or none is needed.

    needed: whether a reward is taken from it; then what is missing is an InputError. It closes when the process ends.
    """
    if not any(record.checks for rows in splits.named().values() for record in rows):
        if needed or asked(config, "sandbox", "sandbox_workers", "sandbox_timeout"):
            raise InputError(f"--data {config.data} has no checks to run code on, as nano has: leave execution and --sandbox out")
        return None
    if config.sandbox == "off":
        if needed:
            raise InputError("--sandbox off runs no code, but --reward asks for execution: leave one of them out")
        print("sandbox: off; execution is not measured")
        return None
    try:
        box = Sandbox(config.sandbox_timeout, workers=config.sandbox_workers, mode=config.sandbox)
    except InputError as error:
        if needed or config.sandbox != "auto":
            raise
        print(f"execution is not measured: {error}")
        return None
    atexit.register(box.close)
    print("sandbox: " + ", ".join(name for name, state in box.layers.items() if state))
    some = [record for rows in splits.named().values() for record in rows[:50] if record.checks and record.reference]
    right = passes_checks(box, [record.reference for record in some], [record.checks for record in some])
    if wrong := [called(record) for record, passed in zip(some, right) if not passed]:
        print(f"references that fail their own checks: {len(wrong)} of the {len(some)} tried, such as {wrong[0]}")
    return box


def check_finite(scores, rows, when, reward):
    """RunFailed, naming the first rows (Records or dicts), if a score (B,) is not finite; where `reward` leaves rows out, NaN may be."""
    leaves_out = getattr(reward, "leaves_out", False)
    bad = torch.nonzero(scores.isinf() if leaves_out else ~scores.isfinite()).flatten().tolist()
    if bad:
        names = [called(rows[i]) for i in bad[:5]]
        raise RunFailed(f"{when}: the reward is not finite for {len(bad)} of {len(rows)} responses: rows {', '.join(names)}")


def mean(rows, name):
    """Mean of a per-row value over the rows that have it; None if none has."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return sum(values) / len(values) if values else None


TEXT_METRICS = ("conala_bleu", "bleu", "rougeL", "codebleu", "ruby")


def summary(rows):
    """The numbers of one set of answers: reward and its terms, exact_match, execution, length, ended, kl and TEXT_METRICS, each None
    where not known."""
    terms = [name for name in (rows[0] if rows else ()) if name.startswith("reward/")]
    numbers = {name: mean(rows, name) for name in ("reward", *terms, "exact_match", "execution", "length", "ended", "kl")}
    numbers["left_out"] = sum("reward" in row and row["reward"] is None for row in rows) or None  # rows that could not be scored
    known = [row for row in rows if row["reference"] is not None]
    found = metrics.evaluate([row["response"] for row in known], [row["reference"] for row in known], TEXT_METRICS)
    return numbers | {name: found[name] for name in TEXT_METRICS}


def known(numbers):
    """The numbers that are known, as metrics of the log: eval/..."""
    return {f"eval/{'eos' if name == 'ended' else name}": value for name, value in numbers.items() if value is not None}


def in_words(numbers, names=("reward", "exact_match", "execution", "conala_bleu", "kl", "length")):
    """Some of the known numbers on one line."""
    return ", ".join(f"{name.replace('_', ' ')} {numbers[name]:.3f}" for name in names if numbers.get(name) is not None)


def compare(before, after, name, seed=0):
    """The paired difference after - before of a per-row value: {"difference", "low", "high", "p"}, a 95 % interval."""
    pairs = [(a[name], b[name]) for a, b in zip(before, after) if a.get(name) is not None and b.get(name) is not None]
    if not pairs:
        return None
    difference, low, high, p = paired_bootstrap([b for _, b in pairs], [a for a, _ in pairs], seed=seed)
    return {"difference": difference, "low": low, "high": high, "p": p}


# What the final table shows: per-row values first, their meaning beside them.
ROWS = {"reward": "learned reward", "exact_match": "exact match (AST-equal)", "execution": "passes its checks",
        "conala_bleu": "CoNaLa BLEU",
        "length": "response length, tokens", "kl": "KL to the SFT policy, nats", "ended": "ended with EOS"}


def report(folder, models, tokenizer, splits, config, reward, reference, box=None, ops=TORCH):
    """Answer the test splits with each model, print the table and five samples, and return everything for results.json.

    Args: folder, where every answer goes, as answers.jsonl; models, {name: GPT2}, the baseline first; reference, the GPT2
        that KL is measured against; box, a Sandbox, for rows with checks.
    Returns: {"test": {split: {"sampled" | "greedy": {name: numbers}, "gain": {metric: paired difference}}}, "samples": [...], "sandbox": its layers}.
    """
    results, samples = {}, []
    (folder / "answers.jsonl").unlink(missing_ok=True)  # of a report that was interrupted
    for split, records in {"test": splits.test, **splits.extra}.items():
        answers = {}
        for mode, temperature in (("sampled", config.temperature), ("greedy", 0)):
            for name, model in models.items():
                rows = answer(model, tokenizer, records, config, temperature, reference if mode == "sampled" else None, config.seed, ops=ops)
                answers[mode, name] = add_execution(add_rewards(rows, reward), records, box)
                write_answers(folder, split, mode, name, rows)
        results[split] = split_results(answers, list(models))
        print(table(split, len(records), results[split], ROWS if isinstance(reward, RewardModel) else ROWS | {"reward": "reward"}))
        samples = samples or sample_answers(answers, list(models))
    print("\nFive prompts, greedy answers")
    for sample in samples:
        print("\n  " + sample["prompt"].replace("\n", "\n  "))
        for name in [*models, "reference"]:
            print(f"    {name:<10}" + str(sample[name]).replace("\n", "\n" + " " * 14))
    return {"test": results, "samples": samples, "sandbox": box.layers if box else None}


def write_answers(folder, split, mode, name, rows, file_name="answers.jsonl"):
    """Append answers to a JSONL file: what every number of the table is made of."""
    with open(Path(folder) / file_name, "a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({"split": split, "mode": mode, "model": name, **row}, ensure_ascii=False) + "\n")


def split_results(answers, names):
    """{"rows", "sampled": {name: numbers}, "greedy": {...}, "gain": {"sampled": {metric: ...}, "greedy": {...}}}."""
    first, last = names[0], names[-1]
    found = {mode: {name: summary(answers[mode, name]) for name in names} for mode in ("sampled", "greedy")}
    found["gain"] = {mode: {metric: compare(answers[mode, first], answers[mode, last], metric) for metric in
                            ("reward", "exact_match", "execution", "length", "ended")} for mode in ("sampled", "greedy")}
    return found


def table(split, count, results, meanings=ROWS):
    """A Markdown table of one split: a row a metric, a column a model, the last column the paired gain."""
    names = list(results["sampled"])
    lines = [f"\n| {split}, {count} prompts | " + " | ".join(names) + f" | {names[-1]} - {names[0]} [95 %] |",
             "|---|" + "---:|" * (len(names) + 1)]
    for mode in ("sampled", "greedy"):
        for metric, meaning in meanings.items():
            values = [results[mode][name].get(metric) for name in names]
            if any(value is None for value in values):
                continue
            gain = results["gain"][mode].get(metric)
            shown = f"{gain['difference']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]" if gain else f"{values[-1] - values[0]:+.3f}"
            lines.append(f"| {meaning}, {mode} | " + " | ".join(f"{value:.3f}" for value in values) + f" | {shown} |")
        left_out = [results[mode][name].get("left_out") or 0 for name in names]
        if any(left_out):  # the columns are means over other rows then, the gain over those that all have
            lines.append(f"| answers without a reward, {mode} | " + " | ".join(map(str, left_out)) + " | |")
    return "\n".join(lines)


def sample_answers(answers, names, count=5):
    """The first prompts with every model's greedy answer."""
    return [{"prompt": rows[0]["prompt"], "reference": rows[0]["reference"],
             **{name: row["response"] for name, row in zip(names, rows)}}
            for rows in list(zip(*(answers["greedy", name] for name in names)))[:count]]
