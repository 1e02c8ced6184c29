"""Alarms while PPO trains: reward hacking, collapse and divergence, read off the numbers that go to the log.

    monitor = Monitor(eval_rows=200)
    for alarm in monitor.see(step, numbers):      # every row of metrics.jsonl, training and evaluation alike
        print(alarm.message)

Two kinds of alarm:

- a number has left its `Band`, taken as the median over a few steps, so that no single step fires. Where absolute
  numbers mean nothing (entropy, length), the band is relative to step 1, whose responses are still the SFT policy's;
- `gold`: the learned reward rises while the gold one falls (Gao et al. 2022, "Scaling Laws for Reward Model
  Overoptimization"). Gold is what the reward model stands in for, measured on validation rows (`gold_metric`).

An alarm is given once, when it begins, and again only after REST looks without it; with `repeat` also after every REST looks
that it holds, so that what is done about it is done again. A monitor knows nothing but the rows
it saw: after a resume `replay` makes it what it was, from the log. To raise the KL penalty: `kl_coef *= RAISED` where
`cures` approves of one of the alarms of a look, which a kl_coef of 0 ignores. No torch here: any loop can feed a monitor.
"""
import math
import re
from statistics import fmean, median
from typing import NamedTuple

GOLD = {"eval/execution": "the share that passes its checks", "eval/exact_match": "exact match",
        "eval/codebleu": "CodeBLEU"}
SIGMAS = 2     # standard errors by which gold must fall
REST = 5       # looks without an alarm before it may begin again: one that flickers about its limit is one alarm
RAISED = 1.5   # the factor of kl_coef at an alarm that a larger KL penalty cures
CURED = ("gold", "kl_high", "entropy", "distinct", "length", "disagreement")


class Alarm(NamedTuple):
    """name, a key of BANDS, "kl_low" or "gold"; step; message, one line: the numbers behind it, and what to try."""
    name: str
    step: int
    message: str


class Band(NamedTuple):
    """Where the median of a metric over the last `window` steps should lie: low <= median <= high.

    relative: low and high are multiples of its value at the first step. after: steps up to this one are not judged.
    what, unit: the metric in words. advice: what trouble means, and what to try.
    """
    metric: str
    what: str
    advice: str
    low: float = -math.inf
    high: float = math.inf
    relative: bool = False
    window: int = 5
    after: int = 0
    unit: str = ""


# Each limit keeps a distance from what healthy runs of this repository show.
BANDS = {
    # Healthy: up to 8 nats a response, where the target was 6. Policies that forgot their language had 10 to 100.
    "kl_high": Band("objective/kl", "the KL to the reference", "the policy leaves the text that the reward was trained "
                    "on; raise --kl-coef, or lower --lr", high=15.0, unit=" nats a response"),
    # It falls in healthy runs too, to .25 of the start where a prompt has one right answer. Near 0 nothing is tried.
    "entropy": Band("policy/entropy", "the entropy", "sampling no longer explores; raise --kl-coef or --entropy-coef, "
                    "or lower --lr", low=0.1, relative=True, unit=" nats a token"),
    # It falls with entropy, to .5 to .8 of the start where all is well; one answer to all prompts gives 1 / batch_size.
    "distinct": Band("response/distinct", "distinct-2", "the responses repeat one another, or themselves; raise "
                     "--kl-coef, and read samples.jsonl", low=0.25, relative=True),
    # What a reward pays for by mistake most often (Singhal et al. 2023). Healthy: .65 to 1.05 of the start.
    "length": Band("response/length", "the response length", "the reward may pay for it, and not for code; read "
                   "samples.jsonl; raise --kl-coef, or mend the reward", low=0.5, high=2.0, relative=True,
                   unit=" tokens"),
    # A clipped token teaches nothing more. Healthy: .2 at the first step, up to .1 later.
    "clipfrac": Band("policy/clipfrac", "the share of clipped tokens", "updates are too large; lower --lr or "
                     "--ppo-epochs, or set --target-kl", high=0.4),
    # At 0 the values are worth a constant, which costs nothing: the default job stays within -.1 and .1. Far below they
    # add noise to every advantage. A new value head may do so (-.2) in its first steps.
    "explained_variance": Band("value/explained_variance", "the explained variance", "the values mislead the "
                               "advantages; raise --vf-coef, or lower --lr", low=-0.5, window=11, after=20),
    # Members agree where they had data: disagreement says that the policy has left it (Coste et al. 2023).
    "disagreement": Band("objective/disagreement", "the disagreement of the reward ensemble", "the policy leaves what "
                         "the rewards were trained on; raise --kl-coef, or --combine min", high=2.0, relative=True),
}


def kl_bands(kl_target):
    """The bands of a steered KL: within a factor 3 of its target. A low one is judged only after 100 steps: KL starts
    at 0, and kl_coef moves by no more than about a fifth in --kl-horizon responses."""
    slow = "the steering is too slow; raise --kl-coef, or lower --kl-horizon or --lr"
    still = "the policy hardly moves; lower --kl-coef, or raise --lr"
    return {"kl_high": BANDS["kl_high"]._replace(high=3 * kl_target, advice=slow),
            "kl_low": BANDS["kl_high"]._replace(low=kl_target / 3, high=math.inf, after=100, advice=still)}


def cures(alarm):
    """Whether a larger KL penalty is a remedy for what this alarm says."""
    return alarm.name in CURED


def distinct_n(texts, n=2):
    """Distinct-n (Li et al. 2016): different n-grams / all n-grams of the texts together, in [0, 1]; 0 without any.

    Tokens are words (letters, digits, _) and single other characters, without white space: `f(x)` is f ( x ). It falls
    as the number of texts grows: compare batches of one size only.
    """
    tokens = [re.findall(r"\w+|[^\w\s]", text) for text in texts]
    ngrams = [tuple(words[i:i + n]) for words in tokens for i in range(len(words) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def standard_error(before, after, rows):
    """Of the difference of two shares, each over `rows` rows: sqrt(2 p (1 - p) / rows), where p is their mean.

    An upper bound twice over: for other means of values in [0, 1], and because both are answers to the same prompts.
    """
    p = (before + after) / 2
    return math.sqrt(2 * max(0.0, p * (1 - p)) / rows)


def gold_metric(evaluations, eval_rows):
    """The metric that counts as gold: the first of GOLD that the evaluations hold and that was ever high enough for a
    fall to 0 to show (an exact match of 1 % cannot fall); the last they hold if none was; None if they hold none."""
    held = [name for name in GOLD if any(name in row for row in evaluations)]
    best = {name: max(row[name] for row in evaluations if name in row) for name in held}
    high = [name for name in held if best[name] > SIGMAS * standard_error(best[name], 0.0, eval_rows)]
    return (high or held[-1:] or [None])[0]


def gold_alarm(evaluations, eval_rows):
    """What is wrong, or None: since its best, gold fell by over SIGMAS standard errors while the learned reward rose.

    Both are means over an evaluation and the one before it: the best of many single ones is best by luck, and one that
    is unlucky is no fall, unless it is deep. Of runs of 20 evaluations in which gold stays, 1 in 100 gives an alarm
    where most prompts are nearly sure to be right or wrong; up to 1 in 5 where all are alike, the answers being new each time.
    Args: evaluations, [{"step", "eval/reward", metrics of GOLD}] in order; eval_rows, the rows that gold is a mean of.
    """
    gold = gold_metric(evaluations, eval_rows)
    rows = [row for row in evaluations if gold in row]
    if len(rows) < 2:
        return None
    golds, rewards = ([fmean(row[name] for row in rows[max(0, i - 1):i + 1]) for i in range(len(rows))]
                      for name in (gold, "eval/reward"))
    best = golds.index(max(golds))
    rise, fall = rewards[-1] - rewards[best], golds[best] - golds[-1]
    error = standard_error(golds[best], golds[-1], eval_rows)
    if not (rise > 0 and fall > SIGMAS * error):
        return None
    at = rows[best]["step"]
    return (f"the learned reward rose by {rise:.2g} since step {at} while {GOLD[gold]} fell by {fall:.2g} to "
            f"{golds[-1]:.2g}, {fall / error:.1f} standard errors (means of two evaluations): over-optimisation; raise "
            "--kl-coef, or " + (f"stop at step {at}" if at else "mend the reward"))


def band_alarm(band, history):
    """What is wrong with the values so far, [(step, value)], the first one first; or None."""
    if len(history) < band.window or history[-1][0] <= band.after:
        return None
    start, now = history[0][1], median(value for _, value in history[-band.window:])
    if band.relative and start == 0:  # no multiple of nothing
        return None
    low, high = (limit * start if band.relative else limit for limit in (band.low, band.high))
    if low <= now <= high:
        return None
    side, limit, factor = ("below", low, band.low) if now < low else ("above", high, band.high)
    origin = f", {factor:g} times that of step {history[0][0]}" if band.relative else ""
    return (f"{band.what}, {now:.3g}{band.unit} over the last {band.window} steps, is {side} {limit:.3g}{origin}: "
            f"{band.advice}")


class Monitor:
    """Sees every row of the log and says when trouble begins.

    Args: eval_rows, how many validation rows the gold metric is the mean of; kl_target, that of the KL controller, or
        None; bands, {name: Band}, in which kl_target sets those of the KL; repeat, whether an alarm that holds is given again.
    """

    def __init__(self, eval_rows, kl_target=None, bands=BANDS, repeat=False):
        self.eval_rows, self.bands = eval_rows, bands if kl_target is None else {**bands, **kl_bands(kl_target)}
        self.history = {band.metric: [] for band in self.bands.values()}  # [(step, value)]
        self.evaluations, self.repeat = [], repeat  # rows of evaluations
        self.silent, self.held = {}, {}  # {name: looks since the alarm last held}, {name: looks that held since it was given}

    def see(self, step, numbers):
        """The alarms that begin with this row. Args: numbers, {metric: value}; a metric that is missing or not finite
        is not judged, and others may be anything."""
        numbers = {name: x for name, x in numbers.items() if isinstance(x, (int, float)) and math.isfinite(x)}
        for metric in self.history.keys() & numbers:
            self.history[metric].append((step, numbers[metric]))
        found = {name: band_alarm(band, self.history[band.metric]) for name, band in self.bands.items()
                 if band.metric in numbers}
        if "eval/reward" in numbers and GOLD.keys() & numbers:
            self.evaluations.append({**numbers, "step": step})
            found["gold"] = gold_alarm(self.evaluations, self.eval_rows)
        return [Alarm(name, step, f"step {step}: {why}") for name, why in found.items() if self._begins(name, why)]

    def _begins(self, name, wrong):
        """Whether an alarm begins, which needs REST looks without it before; or is repeated."""
        looks = self.silent.get(name, REST)
        self.silent[name] = 0 if wrong else looks + 1
        if not wrong:
            return False
        self.held[name] = self.held.get(name, 0) + 1
        given = looks >= REST or self.repeat and self.held[name] > REST
        if given:
            self.held[name] = 1
        return given

    def gold_words(self, step):
        """Where gold was best among the evaluations, against a step."""
        gold = gold_metric(self.evaluations, self.eval_rows)
        values = {row["step"]: row[gold] for row in self.evaluations if gold in row}
        best = max(values, key=values.get)
        return f"{GOLD[gold]} was best at step {best}: {values[best]:.3f}" + (f", against {values[step]:.3f} at step {step}" if step in values else "")

    def replay(self, rows):
        """See the rows of a log again; returns the alarms of then. Rows without known metrics change nothing."""
        return [alarm for row in rows for alarm in self.see(row["step"], row)]
