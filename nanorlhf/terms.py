"""What --reward names: one reward, several as an ensemble, or a sum of weighted terms.

    --reward runs/reward                                                      a reward model
    --reward runs/a runs/b --combine min                                      an ensemble
    --reward execution                                                        the share of its checks that the code passes
    --reward "0.7*runs/reward + 0.3*execution - 0.05*length + syntax"         a sum of terms

    score = sum over terms of weight * clip((term - mean) / deviation)        the last two where asked for

A term that cannot be computed for a row (no checks, no reference, a function that says NaN) makes that row's score NaN, and
the row is left out of the update, and counted: a 0 would be taken for a verdict. A lone model or module:function is no sum and must be
finite; write 1*module:function to leave rows out.
"""
import importlib
import inspect
import os
import re
import sys
from dataclasses import dataclass

from nanorlhf import hf, metrics
from nanorlhf.errors import InputError, nearest
from nanorlhf.metrics.execution import run_checks
from nanorlhf.reward import RewardEnsemble, RewardModel, call_reward
from nanorlhf.run import RunFailed

NAN = float("nan")


# ---- Rules: (prompts, responses, references) -> a list of floats

def syntax(prompts, responses, references):
    """1 for code that Python's parser accepts, 0 for other text and for none."""
    return [float(bool(response.strip()) and metrics.parses(response)) for response in responses]


def length(prompts, responses, references):
    """The number of tokens, as CoNaLa's BLEU counts them; meant for a small negative weight."""
    return [float(len(metrics.conala_tokens(response))) for response in responses]


def repetition(prompts, responses, references):
    """The share of a response's pairs of neighbouring tokens that occurred in it before; meant for a negative weight."""
    return [_repeated(metrics.conala_tokens(response)) for response in responses]


def _repeated(tokens):
    pairs = list(zip(tokens, tokens[1:]))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


AGAINST_REFERENCE = {  # one response, one reference -> 0 to 1
    "exact_match": lambda response, reference: float(metrics.exact_match(response, reference)),
    "bleu": lambda response, reference: metrics.sentence_bleu(
        [metrics.conala_tokens(reference)], metrics.conala_tokens(response), smoothing=metrics.BLEU_SMOOTHING),
    "rougeL": lambda response, reference: metrics.rouge(response, reference, ("rougeL",))["rougeL"][2],
    "codebleu": lambda response, reference: metrics.codebleu([response], [reference])["codebleu"],
    "token_f1": metrics.token_f1,
    "ruby": lambda response, reference: metrics.ruby(response, reference)[0],
}


def against_reference(name):
    """A rule: the metric of each response against its reference, NaN without one."""
    def rule(prompts, responses, references):
        return [NAN if reference is None else AGAINST_REFERENCE[name](response, reference)
                for response, reference in zip(responses, references)]
    return rule


RULES = {"syntax": syntax, "length": length, "repetition": repetition} | {name: against_reference(name) for name in AGAINST_REFERENCE}


class ExecutionReward:
    """The share of its checks that a response passes in the sandbox; NaN for a prompt without checks.

    Args: box, an open Sandbox; records, the rows whose prompts will be asked for; those alike in prompt and reference share their checks.
    """

    def __init__(self, box, records):
        self.box, self.checks = box, {}
        for record in records:
            if record.checks:
                known = self.checks.setdefault((record.prompt, record.reference), [])
                known += [check for check in record.checks if check not in known]

    def __call__(self, prompts, responses, references):
        shares = run_checks(self.box, responses, [self.checks.get(row) for row in zip(prompts, references)])
        return [NAN if share is None else share for share in shares]


# ---- The sum

@dataclass
class Term:
    """weight * reward; `name` is what the log calls it."""
    name: str
    weight: float
    reward: object


class Spread:
    """Running mean and standard deviation of the values seen, NaN left out (Chan, Golub & LeVeque 1979)."""

    def __init__(self, count=0, mean=0.0, squares=0.0):
        self.count, self.mean, self.squares = count, mean, squares

    def see(self, values):
        """Count these values (B,) in."""
        values = values[~values.isnan()].double()
        if not len(values):
            return
        count, mean = len(values), values.mean().item()
        gap, total = mean - self.mean, self.count + count
        self.squares += ((values - mean) ** 2).sum().item() + gap ** 2 * self.count * count / total
        self.mean += gap * count / total
        self.count = total

    def scale(self, values):
        """(values - mean) / standard deviation; where nothing varied yet they are only centred."""
        deviation = (self.squares / max(self.count, 1)) ** 0.5
        return (values - self.mean) / (deviation if deviation > 1e-6 else 1.0)


class Combination:
    """A weighted sum of terms, as a reward: combination(prompts, responses, references) -> (B,), NaN where a term failed.

    Args: terms, list of Term. clip: bound on a term's size, after normalisation and before its weight. normalise: bring each
        term to mean 0 and variance 1 first. In training that is over all responses so far (`learn`); a plain call, as in
        evaluations, uses the yardstick of `start`, so that its scores can be compared over a run.
    `.values`: {name: (B,)} of the latest call, as the terms gave them. `.state`: what a resumed run needs, see `restore`.
    """

    leaves_out = True  # rows whose score is NaN

    def __init__(self, terms, clip=None, normalise=False):
        self.terms, self.clip, self.normalise, self.values = terms, clip, normalise, {}
        self.running = {term.name: Spread() for term in terms}
        self.yardstick = {term.name: Spread() for term in terms}

    def __call__(self, prompts, responses, references=None):
        self.values = self._terms(prompts, responses, references)
        return self._sum(self.yardstick)

    def learn(self, prompts, responses, references=None):
        """As a call, but normalised by the running spread, which sees these responses first."""
        self.values = self._terms(prompts, responses, references)
        for name, values in self.values.items():
            self.running[name].see(values)
        return self._sum(self.running)

    def start(self, prompts, responses, references=None):
        """Take the spread over these responses, the first policy's, as the yardstick and the beginning of the running one."""
        self.values = self._terms(prompts, responses, references)
        for name, values in self.values.items():
            self.yardstick[name].see(values)
            self.running[name].see(values)

    def _terms(self, prompts, responses, references):
        found = {}
        for term in self.terms:
            found[term.name] = call_reward(term.reward, prompts, responses, references).cpu()
            if found[term.name].isinf().any() or isinstance(term.reward, RewardModel) and found[term.name].isnan().any():
                raise RunFailed(f"the reward term {term.name} is not finite: mend it; a function may give NaN for a row to leave it out")
        return found

    def _sum(self, spreads):
        total = 0.0
        for term in self.terms:
            values = self.values[term.name]
            values = spreads[term.name].scale(values) if self.normalise else values
            values = values if self.clip is None else values.clamp(-self.clip, self.clip)
            total = total + term.weight * values
        return total

    @property
    def state(self):
        return {kind: {name: [spread.count, spread.mean, spread.squares] for name, spread in getattr(self, kind).items()}
                for kind in ("running", "yardstick")}

    def restore(self, state):
        """Take up `.state` again; that of other terms is an InputError."""
        theirs, ours = list(state.get("running", {})), [term.name for term in self.terms]
        if theirs != ours:
            raise InputError(f"--resume: the checkpoint holds normalised terms {', '.join(theirs) or '(none)'}, this run has {', '.join(ours)}: "
                             "resume with the same --reward and --normalise-terms, or start anew")
        for kind, spreads in state.items():
            setattr(self, kind, {name: Spread(*values) for name, values in spreads.items()})


# ---- From the command line

def parse_sum(spec):
    """"0.7*runs/reward - 0.05*length" -> [(0.7, "runs/reward"), (-0.05, "length")]; a path that exists is one term, as it is."""
    if os.path.exists(spec):
        return [(1.0, spec)]
    sign, terms = 1.0, []
    for part in re.split(r"\s+([+-])\s+", spec.strip()):
        if part in ("+", "-"):
            sign = 1.0 if part == "+" else -1.0
            continue
        own, weight, name = re.fullmatch(r"([+-]?)\s*(?:([\d.]+(?:[eE][+-]?\d+)?)\s*\*\s*)?(.*)", part, re.DOTALL).groups()
        try:
            terms.append((sign * float(f"{own}{'1' if weight is None else weight}"), name))
        except ValueError:
            raise InputError(f"--reward {spec}: {weight!r} is no number; write weight*term, such as 0.3*execution") from None
    if not terms:
        raise InputError(f"--reward {spec}: a sign alone; put the whole sum into quotes, such as 'syntax - 0.05*length'")
    if twice := repeated([name for _, name in terms]):
        raise InputError(f"--reward {spec}: {twice} is there twice; add up its weights")
    for _, name in terms:
        slip = re.search(r"[()]|^\d[\d.]*[A-Za-z]", name) and not os.path.exists(name)  # brackets, or 0.5bleu: meant where it is a path
        if not name or re.search(r"[\s*]", name) or slip:
            raise InputError(f"--reward {spec}: {name!r} is no term; write weight*term, without brackets, and a space on either side of + and -")
    return terms


def repeated(names):
    """The first name that says the same as one before it: folders are compared as folders. None if there is none."""
    same = [os.path.realpath(name).removesuffix("/final") if os.path.exists(name) else name for name in names]
    return next((name for i, name in enumerate(names) if same[i] in same[:i]), None)


def reward_folders(specs):
    """{"reward model N": folder} of the reward models among the terms."""
    names = [name for spec in specs for _, name in parse_sum(spec) if os.path.isdir(name) and name not in (*RULES, "execution")]
    return {f"reward model {number}": hf.resolve(name) for number, name in enumerate(names, 1)}


def needs_execution(specs):
    """Whether any of the specs has the term `execution`."""
    return any(name == "execution" for spec in specs for _, name in parse_sum(spec))


def load_reward(specs, combine="mean", device="cpu", execution=None, clip=None, normalise=False):
    """The reward that --reward names; see the head of this file.

    Args: specs, a list of strings: each a folder, module:function, or a sum of terms. combine: how several become one.
        device: where models go. execution: the reward of the term `execution`, or None where there is nothing to run.
        clip, normalise: of each term of a sum.
    """
    if twice := repeated(specs):
        raise InputError(f"--reward names {twice} twice: an ensemble of one and the same never disagrees; name it once")
    rewards = [_load(spec, device, execution, clip, normalise) for spec in specs]
    return rewards[0] if len(rewards) == 1 else RewardEnsemble(rewards, combine)


def _load(spec, device, execution, clip, normalise):
    terms = parse_sum(spec)
    alone = terms == [(1.0, spec)] and spec not in (*RULES, "execution")  # a model or a function, whose NaN is a fault
    if alone and clip is None and not normalise:
        return _term(spec, device, execution)
    return Combination([Term(name, weight, _term(name, device, execution)) for weight, name in terms], clip, normalise)


def _term(name, device, execution):
    if name == "execution":
        if execution is None:
            raise InputError("--reward execution needs rows with checks, as nano has, and a sandbox: name such --data, and not --sandbox off")
        return execution
    if name in RULES:
        return RULES[name]
    if ":" in name and not os.path.exists(name):
        return function(name)
    if re.fullmatch(r"\w+", name) and not os.path.exists(name):
        near = nearest(name.lower(), ["execution", *RULES])
        raise InputError(f"--reward {name}: no folder and no term of that name; " + (f"did you mean {near}? " if near else "") +
                         f"Terms are execution, {', '.join(RULES)}, folders of reward models, and module:function")
    if {"execution", *RULES}.intersection(re.split("[+-]", name)) and not os.path.exists(name):
        raise InputError(f"--reward {name}: no folder of that name; for a sum put a space on either side of + and -")
    return RewardModel.from_pretrained(name).to(device)


def function(spec):
    """module:function -> the function; the module is looked for in the working directory too."""
    module_name, _, name = spec.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), name]):
        raise InputError(f"--reward {spec}: neither a folder nor module:function, such as my_rewards:length")
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(f"--reward {spec}: no module {error.name!r}; it is looked for in {folder} and on the Python path") \
            from None
    except SyntaxError as error:
        raise InputError(f"--reward {spec}: {error.filename}:{error.lineno}: {error.msg}; mend it there") from None
    except (Exception, SystemExit) as error:
        raise InputError(f"--reward {spec}: importing {module_name} ended with {type(error).__name__}: {error}; mend it there (--debug shows "
                         "where)") from error
    finally:
        if folder in sys.path:  # not the first of the path: the module may have put a folder of its own before it
            sys.path.remove(folder)
    found = getattr(module, name, None)
    if found is not None and not callable(found):
        raise InputError(f"--reward {spec}: {name} is of type {type(found).__name__}; name a function")
    if found is None:
        near = nearest(name, dir(module), cutoff=0.7)
        raise InputError(f"--reward {spec}: {module_name} has no function {name!r}; " +
                         (f"did you mean {near}?" if near else "name one that it defines"))
    try:
        inspect.signature(found).bind([], [], [])
    except TypeError:
        raise InputError(f"--reward {spec}: {name}{inspect.signature(found)} cannot be called with (prompts, responses, references); let it "
                         "take these three lists") from None
    except ValueError:  # written in C, without a signature
        pass
    return found
