"""Evaluate policies: answer the prompts of a split with each, compare the answers with the references, and say what to make of it.

Greedy by default; with --temperature 1 the policy is sampled, which is what PPO trained. Where rows carry checks (nano), answers are
run in the sandbox: execution_accuracy is the share that pass all their checks, and with --samples n pass@k the chance that one of k
samples does. Queries and answers may be as long as in the policies' own runs, unless --max-query, --max-response or a preset says
otherwise. Every answer is written down, so that each number can be traced to its rows. Every metric has a bootstrap 95 % interval
over prompts; with several models the paired difference of each to the first has one too, and a p-value. Findings that speak against
an evaluation (overlap of train and test, repeated, empty, unparsable or copied answers, values too good to be true, metrics that
could not be computed) stand with their numbers in the results and below the table.

    python eval.py --model runs/sft runs/ppo runs/dpo
    python eval.py --model runs/ppo --split all --temperature 0.8 --samples 10
    python eval.py --preset conala --model runs/conala/ppo --every-checkpoint --encoder microsoft/codebert-base
    python eval.py --data conala --predictions answers.jsonl             # answers made elsewhere: rows of id (or prompt) and response
"""
from dataclasses import dataclass

from nanorlhf.config import asked, option, parse, replace
from nanorlhf.errors import InputError, naming
from nanorlhf.options import DataOptions, RunOptions, SandboxOptions

OF_MODELS = ("every_checkpoint", "temperature", "top_k", "top_p", "samples", "batch_size", "template", "max_query", "max_response")
DEFAULT_TARGETS = ["bertscore=0.7", "codebleu=0.6", "bleu=0.4", "rougeL=0.5", "ruby=0.3"]


@dataclass
class Config(SandboxOptions, DataOptions, RunOptions):
    out: str = option("runs/eval", "folder for results.json, predictions.jsonl and plots/", group="Run", metavar="FOLDER")
    model: list[str] = option([], "policies: run folders, model folders or names", group="Evaluation", metavar="FOLDER")
    predictions: list[str] = option([], "answers made elsewhere: files of rows with id (or prompt) and response, evaluated after the "
                                    "policies; several rows a prompt are samples, for pass@k", metavar="FILE")
    every_checkpoint: bool = option(False, "evaluate a run folder's checkpoints/step-N too, in order")
    split: str = option("test", "which rows to answer; all: every held-out split", choices=("validation", "test", "all"))
    rows: int = option(0, "answer only the first so many rows of a split; 0: all", at_least=0)
    temperature: float = option(0.0, "sampling temperature; 0: greedy", at_least=0)
    top_k: int = option(0, "sample among the k likeliest tokens; 0: all", at_least=0)
    top_p: float = option(1.0, "sample among the likeliest tokens of this probability; 1: all", above=0, at_most=1)
    samples: int = option(1, "answers to each prompt, for pass@k; the other metrics are those of the first", at_least=1)
    reward: list[str] = option([], "reward to score the answers with, as for train_ppo.py: of several the mean, terms as they are", metavar="REWARD")
    encoder: str = option("", "encoder for BERTScore, a folder or a name; empty: no BERTScore", metavar="FOLDER_OR_NAME")
    targets: list[str] = option(DEFAULT_TARGETS, "metrics and the values to reach, as metric=value", metavar="METRIC=VALUE")
    batch_size: int = option(128, "prompts answered at once", at_least=1)

    def check(self):
        super().check()
        if not self.model + self.predictions:
            raise InputError("--model: name at least one policy, such as --model runs/ppo, or answers with --predictions")
        if not self.model and (idle := asked(self, *OF_MODELS)):
            raise InputError(f"{idle}: for policies that answer, but there are only --predictions: leave out, or add --model")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise InputError("--top-k and --top-p are for sampling: give --temperature above 0 too, or leave them out")
        if self.temperature == 0 and self.samples > 1:
            raise InputError(f"--samples {self.samples}: greedy answers are all the same; give --temperature above 0 too, such as 0.8")


PRESETS = {
    "fast": {},
    "conala": {"data": "conala", "max_response": 64},
    "research": {"data": "conala", "max_query": 128, "max_response": 128},
    "production": {"data": "conala", "max_query": 128, "max_response": 128},
}

if __name__ == "__main__":
    CONFIG = parse(Config, PRESETS)  # before torch is imported: --help and typing errors answer at once

from pathlib import Path

from nanorlhf import plots
from nanorlhf.checkpoint import step_folders
from nanorlhf.data import called, open_data, read_rows
from nanorlhf.encoder import Encoder
from nanorlhf.evaluation import add_execution, add_rewards, answer, answer_row, mean, open_sandbox, write_answers
from nanorlhf.gpt2 import GPT2
from nanorlhf.metrics import METRIC_NAMES, bert_score, evaluate, pass_at_k
from nanorlhf.metrics.bootstrap import corpus_bootstrap, paired_corpus_bootstrap
from nanorlhf.metrics.counted import COUNTED
from nanorlhf.metrics.honesty import assess, finding
from nanorlhf.metrics.ruby import ruby_quality
from nanorlhf.pipeline import check_policy, run_of
from nanorlhf.run import Run, check_run, main, pick_device, read_config, seed_everything
from nanorlhf.terms import ExecutionReward, load_reward, needs_execution
from nanorlhf.tokenizer import Tokenizer

OF_ROWS = ("reward", "length", "ended", "execution_accuracy", "bertscore")  # means of values that the rows themselves carry
PASS_AT = (1, 2, 5, 10, 20, 50, 100)


def policies(config):
    """The folders to evaluate, in order; a run folder made with another template is an InputError."""
    found = []
    for name in config.model:
        folder = Path(name)
        check_policy(folder, config)
        if config.every_checkpoint:
            steps = step_folders(folder)
            if not steps:
                raise InputError(f"--every-checkpoint: {folder} holds no checkpoints/step-N; train with --save-steps, or leave it out")
            found += steps
        found.append(name)
    return list(dict.fromkeys(str(name) for name in found))


def as_trained(config):
    """The options with the longest query and response of the policies' own runs, where no length was given: a shorter one would cut
    answers that they were trained to give."""
    theirs, sources = [read_config(run) for name in config.model if (run := run_of(Path(name)))], getattr(config, "config_sources", {})
    lengths = {name: [options[name] for options in theirs if name in options] for name in ("max_query", "max_response")}
    found = {name: max(values) for name, values in lengths.items() if values and sources.get(name) == "default"}
    other = [f"--{name.replace('_', '-')} {value}" for name, value in found.items() if value != getattr(config, name)]
    if other:
        print(f"{', '.join(other)}: as in the policies' own runs")
    return replace(config, **found)


def read_predictions(path, split, records):
    """Answers made elsewhere to these records: a list of samples, each a list of rows as `answer` makes them, without what only the
    policy knows. InputError for a row without response, a prompt without answer, and prompts with more answers than others."""
    found, models, by_id = {}, set(), {str(record.id): record for record in records if record.id}
    for where, row in read_rows(Path(path)):
        if isinstance(row, InputError):
            raise row
        names = {name: str(row[name]) for name in ("id", "prompt") if row.get(name) not in (None, "")} if isinstance(row, dict) else {}
        if not names or not isinstance(row.get("response"), str):
            raise InputError(f"{where}: an answer needs id (or prompt) and response, as in eval.py's own predictions.jsonl")
        if row.get("split", split) == split:
            record = by_id.get(names.get("id"))
            if record and names.get("prompt", record.prompt).strip() != record.prompt.strip():
                raise InputError(f"{where}: its id {record.id} is that of the prompt {record.prompt[:60]!r}, not of {names['prompt'][:60]!r}: leave "
                                 "one of them out")
            key = record.id if record else names.get("prompt")
            found.setdefault(str(key), []).append(row["response"])
            models.add(str(row.get("model", path)))
    if len(models) > 1:
        raise InputError(f"--predictions {path}: answers of {len(models)} models ({', '.join(sorted(models))}): make a file of each")
    keys = [str(record.id) if str(record.id) in found else record.prompt for record in records]
    if missing := [record for record, key in zip(records, keys) if key not in found]:
        raise InputError(f"--predictions {path}: no answer to {len(missing)} of {len(records)} prompts of {split}, such as "
                         f"{called(missing[0])}: add them, or evaluate fewer --rows")
    answers, shared = [found[key] for key in keys], [keys.count(key) for key in keys]  # by how many records a key is shared
    ratios = {len(some) / count for some, count in zip(answers, shared)}
    if len(ratios) == 1 and min(ratios) >= 1 or len({*map(len, answers)}) > 1:
        # rows without ids that share a prompt, as CoNaLa has: each has answers of its own, in the file's order
        answers = [some[keys[:i].count(key)::count] for i, (key, some, count) in enumerate(zip(keys, answers, shared))]
    fewest, most = min(map(len, answers)), max(map(len, answers))
    if fewest < most:
        raise InputError(f"--predictions {path}: {fewest} to {most} answers a prompt: give each prompt as many")
    print(f"{path}: answers to {len(records)} prompts of {split}, {fewest} each; the file has those of {len(found)}")
    return [[answer_row(record, response) for record, response in zip(records, sample)] for sample in zip(*answers)]


def read_targets(words):
    """["bleu=0.4", ...] -> {"bleu": 0.4, ...}; an unknown metric or a value that is no number is an InputError."""
    targets = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            targets[name] = float(value)
        except ValueError:
            raise InputError(f"--targets {word}: write metric=value, such as bleu=0.4") from None
        if name not in (*METRIC_NAMES, "execution_accuracy", *(f"pass@{k}" for k in PASS_AT)):
            raise InputError(f"--targets {word}: no metric {name!r}; there are execution_accuracy, pass@k for k in "
                             f"{', '.join(map(str, PASS_AT))}, {', '.join(METRIC_NAMES)}")
    return targets


def texts(rows):
    """(predictions, references) of the rows that have a reference."""
    known = [row for row in rows if row["reference"] is not None]
    return [row["response"] for row in known], [row["reference"] for row in known]


def counts(rows):
    """{metric: (rows of counts, score)}: what the intervals and comparisons are drawn from."""
    pairs = list(zip(*texts(rows)))
    found = {name: ([metric.counts(prediction, [reference]) for prediction, reference in pairs], metric.score)
             for name, metric in COUNTED.items()}
    rated = [ruby_quality(row["response"], row["execution_accuracy"])["ruby_quality"] for row in rows if row["reference"] is not None]
    found["ruby_quality"] = [[value, 1.0] for value in rated], COUNTED["ruby_quality"].score  # as `score`: execution counts
    for name in of_rows(rows):
        if any(row.get(name) is not None for row in rows):  # a row without the value counts for nothing
            found[name] = ([[0.0, 0.0] if row.get(name) is None else [float(row[name]), 1.0] for row in rows],
                           lambda sums: sums[0] / max(sums[1], 1.0))
    return {name: (values, score) for name, (values, score) in found.items() if values}


def of_rows(rows):
    """The metrics that the rows themselves carry: OF_ROWS, and the terms of a sum and pass@k where they are."""
    return list(dict.fromkeys([*OF_ROWS, *filter(is_of_rows, rows[0] if rows else ())]))


def is_of_rows(name):
    return name in OF_ROWS or name.startswith(("reward/", "pass@"))


def score(rows, counted):
    """All numbers of one policy's answers: {metric: value or None}, {"intervals": {metric: [low, high]}}, {"reasons": ...}."""
    executes = [row["execution_accuracy"] for row in rows if row["reference"] is not None]
    numbers = {name: mean(rows, name) for name in of_rows(rows) if name != "bertscore"} | evaluate(*texts(rows), executes=executes)
    if numbers["execution_accuracy"] is None:
        numbers["reasons"]["execution_accuracy"] = "the rows have no checks, or there is no sandbox to run them in"
    if left_out := sum("reward" in row and row["reward"] is None for row in rows):
        numbers["left_out"] = left_out
        if left_out == len(rows):
            numbers["reasons"]["reward"] = "no answer could be scored"
    if any(row.get("bertscore") is not None for row in rows):
        for name in ("bertscore", "bertscore_precision", "bertscore_recall"):
            numbers[name] = mean(rows, name)
            numbers["reasons"].pop(name, None)
    else:
        numbers["reasons"] |= {name: "no encoder: name one with --encoder" for name in numbers["reasons"] if name.startswith("bertscore")}
    numbers["intervals"] = {name: corpus_bootstrap(values, formula)[1:] for name, (values, formula) in counted.items()}
    return numbers


def differences(first, other):
    """{metric: {"difference", "low", "high", "p"}} of other - first, on the prompts for which both have a value."""
    found = {}
    for name in first.keys() & other.keys():
        pairs = list(zip(other[name][0], first[name][0]))
        if is_of_rows(name):
            pairs = [pair for pair in pairs if pair[0][1] and pair[1][1]]
        if pairs:
            found[name] = dict(zip(("difference", "low", "high", "p"), paired_corpus_bootstrap(*zip(*pairs), first[name][1])))
    return {name: found[name] for name in first if name in found}


def table(split, results, gains):
    """Markdown: a row a metric, a column a policy with its interval; then the differences to the first policy."""
    names = list(results)
    lines = [f"\n| {split} | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for metric in dict.fromkeys(metric for numbers in results.values() for metric in numbers):
        if any(isinstance(results[name].get(metric), float) for name in names):
            lines.append(f"| {metric} | " + " | ".join(_cell(results[name], metric) for name in names) + " |")
    for name in names[1:]:
        lines += [f"\n| {name} - {names[0]} | difference [95 %] | p |", "|---|---:|---:|"]
        lines += [f"| {metric} | {gain['difference']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}] | {gain['p']:.3f} |"
                  for metric, gain in gains[name].items()]
    return "\n".join(lines)


def _cell(numbers, metric):
    value, interval = numbers.get(metric), numbers["intervals"].get(metric)
    if value is None:
        return "not computed"
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def in_words(name, numbers, findings, targets):
    """Findings and targets of a policy, a line each; what is flagged comes first, with a mark."""
    lines = [f"\n{name}"] + [f"  {'!' if found['flag'] else ' '} {found['says']}" for found in sorted(findings, key=lambda f: not f["flag"])]
    for metric, target in targets.items():
        value = numbers.get(metric)
        lines.append(f"    target {metric} {target:g}: " + ("not computed" if value is None else
                                                            f"{value:.3f}, {'met' if value >= target else 'not met'}"))
    return "\n".join(lines)


def learning_curves(config, names, results):
    """({model: {metric: (x, y)}}, what x is): the evaluated checkpoints of each run, or else the evaluations in its log."""
    found = {}
    for name in config.model:
        steps = [path for path in names if Path(path).parent == Path(name) / "checkpoints"]
        if steps:
            x = [int(path.rpartition("-")[2]) for path in steps]
            found[name] = {metric: (x, [results[path][metric] for path in steps]) for metric in METRIC_NAMES
                           if all(results[path].get(metric) is not None for path in steps)}, "step"
        elif (Path(name) / "metrics.jsonl").is_file():
            rows = plots.read_log(Path(name) / "metrics.jsonl")
            found[f"{name} {plots.decoding(rows)}".strip()] = plots.evaluations(rows)
        else:
            found[name] = {metric: ([0], [value]) for metric, value in results[name].items() if isinstance(value, float)}, "evaluation number"
    axes = {axis for _, axis in found.values()}
    if len(axes) == 1:
        return {name: curves for name, (curves, _) in found.items()}, axes.pop()
    return {name: {metric: (list(range(len(x))), y) for metric, (x, y) in curves.items()}
            for name, (curves, _) in found.items()}, "evaluation number"


def draw(config, folder, names, results, targets):
    """The figures, into plots/; says which there are, and which there are not and why."""
    folder = folder / "plots"
    curves, axis = learning_curves(config, names, results)
    if not any(metric in found for metric in targets for found in curves.values()):
        print("evaluation_metrics_by_epoch.png: not drawn, the logs hold none of the metrics that have targets")
    drawn = [plots.plot_by_epoch(curves, axis, folder / "evaluation_metrics_by_epoch.png", targets),
             plots.plot_all_by_epoch(curves, axis, folder / "all_evaluation_metrics_by_epoch.png"),
             plots.plot_targets({name: results[name] for name in config.model + config.predictions}, folder / "target_achievement.png", targets)]
    runs = [Path(name) for name in config.model if (Path(name) / "metrics.jsonl").is_file()]
    rewards = [run.parent / "reward" for run in runs if (run.parent / "reward" / "metrics.jsonl").is_file()]
    tuned = [run for run in runs if any({"objective/kl", "rewards/margin"} & row.keys() for row in plots.read_log(run / "metrics.jsonl"))]
    for found, name, what in ((rewards, "reward_training_metrics.png", "a run folder reward/ beside a model"),
                              (tuned, "rlhf_training_metrics.png", "a run of train_ppo.py or train_dpo.py among the models")):
        if found:
            drawn.append(plots.plot_training(found[-1], folder / name))
        else:
            print(f"{name}: not drawn, it needs {what}")
    print("figures: " + ", ".join(str(path) for path in drawn if path))


def run_evaluation(config):
    check_run(config)
    config = as_trained(config)
    device = pick_device(config.gpu, config.device)
    seed_everything(config.seed)
    targets = read_targets(config.targets)
    splits, leakage = open_data(config)
    held_out = {"validation": splits.validation} if config.split == "validation" else {"test": splits.test}
    if config.split == "all":
        held_out = {"validation": splits.validation, "test": splits.test, **splits.extra}
    held_out = {split: records[:config.rows or None] for split, records in held_out.items()}
    given = {(path, split): read_predictions(path, split, records) for path in config.predictions for split, records in held_out.items()}
    box = open_sandbox(config, splits, needs_execution(config.reward))
    execution = box and ExecutionReward(box, sum(splits.named().values(), []))
    reward = load_reward(config.reward, "mean", device, execution) if config.reward else None
    if box is None and asked(config, "samples"):
        raise InputError(f"--samples {config.samples}: pass@k needs rows with checks, as nano has, and a sandbox to run answers in: leave it out")
    encoder = (Encoder.from_pretrained(config.encoder).to(device), Tokenizer.from_pretrained(config.encoder)) if config.encoder else None
    models = {name: (GPT2.from_pretrained(name).to(device), Tokenizer.from_pretrained(name)) for name in policies(config)}
    for name, (model, tokenizer) in models.items():
        with naming(name):
            model.check_length(config.max_query + config.max_response)
        tokenizer.check_fits(model.config.vocab_size, name)

    run = Run(config)
    names, results = list(dict.fromkeys([*models, *config.predictions])), {}
    for split, records in held_out.items():
        counted, numbers, findings = {}, {}, {}
        for name in names:
            samples = given[name, split] if name not in models else [
                answer(*models[name], records, config, config.temperature, seed=config.seed * config.samples + i, batch_size=config.batch_size)
                for i in range(config.samples)]
            rows = samples[0]
            if reward is not None:
                add_rewards(rows, reward)
            if encoder is not None:
                add_bertscores(rows, *encoder)
            add_passes(samples, records, box)
            mode = "given" if name not in models else "greedy" if config.temperature == 0 else "sampled"
            for some in samples:
                write_answers(run.folder, split, mode, name, some, "predictions.jsonl")
            counted[name] = counts(rows)
            numbers[name] = score(rows, counted[name])
            known = [row for row in rows if row["reference"] is not None]
            findings[name] = assess(*texts(rows), [row["prompt"] for row in known], [row.answer for row in splits.train if row.answer],
                                    numbers[name], numbers[name]["reasons"], splits.kind == "conala", leakage["overlap"])
        for name, found in numbers.items():
            if found.get("left_out"):
                says = f"reward: {found['left_out']} of {len(records)} answers could not be scored"
                findings[name].append(finding("left out", True, says, rows=found["left_out"]))
        gains = {name: differences(counted[names[0]], counted[name]) for name in names[1:]}
        met = {name: {metric: None if found.get(metric) is None else found[metric] >= value for metric, value in targets.items()}
               for name, found in numbers.items()}
        results[split] = {"metrics": numbers, "gains": gains, "findings": findings, "targets": met, "rows": len(records)}
        print(table(f"{split}, {len(records)} prompts", numbers, gains))
        for name in names:
            print(in_words(name, numbers[name], findings[name], targets))
    run.finish(results=results, leakage=leakage, source=splits.source, encoder=config.encoder or None,
               sandbox=box.layers if box else None)
    draw(config, run.folder, names, results[list(results)[0]]["metrics"], targets)
    print(f"\n{run.folder}/results.json; {run.seconds():.0f} s")


def add_passes(samples, records, box):
    """Add execution_accuracy to the rows of every sample, in place, and with several samples pass@k to those of the first."""
    for rows in samples:
        for row in add_execution(rows, records, box):
            row["execution_accuracy"] = row.pop("execution")
    for of_prompt in zip(*samples) if len(samples) > 1 else ():
        passed = [row["execution_accuracy"] for row in of_prompt]
        for k in (k for k in PASS_AT if k <= len(passed)):
            of_prompt[0][f"pass@{k}"] = None if None in passed else pass_at_k(len(passed), int(sum(passed)), k)


def add_bertscores(rows, encoder, tokenizer):
    """Add bertscore, bertscore_precision and bertscore_recall to the rows that have a reference, in place."""
    known = [row for row in rows if row["reference"] is not None]
    scores = bert_score(*texts(rows), encoder, tokenizer)
    for row, *values in zip(known, *(column.tolist() for column in scores)):
        row |= dict(zip(("bertscore_precision", "bertscore_recall", "bertscore"), values))


if __name__ == "__main__":
    main(run_evaluation, CONFIG)
