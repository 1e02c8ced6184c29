"""Figures from a run's log: one grid of small panels for each kind of training.

    plot_ppo("runs/ppo")  ->  runs/ppo/plots/ppo.png

The log is metrics.jsonl of the run folder: one JSON object a line, with `step` and flat metrics (`loss/policy`).
Metrics that start with `eval/` are validation and drawn as points; all others are training, drawn faint step by step
with a smooth line on top. A panel appears if any of its metrics was logged. Matplotlib is imported late and without
pyplot, so that importing this room costs little and no display is needed.
"""
import json
import math
import os
from pathlib import Path

import numpy as np

from nanorlhf.errors import InputError
from nanorlhf.monitor import GOLD, gold_metric

# A panel is (title, definition, {metric: label}). What each metric means is said here, in the panel's second line.
SFT = [
    ("Loss", "mean -log π(token); train: with label smoothing", {"loss": "train", "eval/loss": "validation"}),
    ("Exact match", "share of greedy answers equal as syntax trees", {"eval/exact_match": "validation"}),
    ("CoNaLa BLEU", "official script, 0 to 100", {"eval/conala_bleu": "validation"}),
    ("EOS", "share of answers that end", {"eval/eos": "validation"}),
    ("Gradient norm", "before clipping", {"grad_norm": "train"}),
    ("Learning rate", "of AdamW", {"lr": "train"}),
]
REWARD = [
    ("Loss", "Bradley–Terry or squared error", {"loss": "train", "eval/loss": "validation"}),
    ("Accuracy", "share of pairs with chosen above rejected", {"accuracy": "train", "eval/accuracy": "validation"}),
    ("Margin", "mean of score(chosen) - score(rejected)", {"margin": "train", "eval/margin": "validation"}),
    ("Error", "of ratings, in their standard deviations", {"error": "train", "eval/error": "validation",
                                                           "eval/error_with_feedback": "with people's logits"}),
    ("Gradient norm", "before clipping", {"grad_norm": "train"}),
    ("Learning rate", "of AdamW", {"lr": "train"}),
]
PPO = [
    ("Score", "mean of the responses, with clip and penalty", {"objective/score": "train", "eval/score": "validation"}),
    ("Exact match", "share of answers equal as syntax trees", {"eval/exact_match": "validation"}),
    ("Execution", "share of answers that pass their checks", {"eval/execution": "validation"}),
    ("CoNaLa BLEU", "official script, 0 to 100", {"eval/conala_bleu": "validation"}),
    ("KL to the reference", "nats a response", {"objective/kl": "train", "eval/kl": "validation"}),
    ("Disagreement", "standard deviation over the ensemble's members", {"objective/disagreement": "train"}),
    ("Shaped reward", "mean score - kl_coef · KL", {"objective/rewards": "train"}),
    ("KL coefficient", "kl_coef, set by the controller", {"objective/kl_coef": "train"}),
    ("Response length", "tokens, EOS included", {"response/length": "train", "eval/length": "validation"}),
    ("EOS", "share of responses that end", {"response/eos": "train", "eval/eos": "validation"}),
    ("Policy loss", "clipped surrogate", {"loss/policy": "train"}),
    ("Entropy", "nats a token", {"policy/entropy": "train"}),
    ("Approximate KL", "new against old policy, nats a token", {"policy/approx_kl": "train"}),
    ("Clipped", "share of tokens", {"policy/clipfrac": "ratio", "value/clipfrac": "value"}),
    ("Ratio", "mean of π_new / π_old", {"policy/ratio": "train"}),
    ("Value loss", "clipped squared error", {"loss/value": "train"}),
    ("Explained variance", "1 - Var(returns - values) / Var(returns)", {"value/explained_variance": "train"}),
    ("Gradient norm", "before clipping", {"grad_norm": "train"}),
    ("Time", "seconds a step", {"time/rollout": "rollout", "time/update": "update"}),
    ("Learning rate", "of AdamW", {"lr": "train"}),
]
DPO = [
    ("Loss", "mean over pairs", {"loss": "train", "eval/loss": "validation"}),
    ("Accuracy", "share of pairs with reward chosen > rejected",
     {"rewards/accuracy": "train", "eval/accuracy": "validation"}),
    ("Margin", "reward of chosen - rejected", {"rewards/margin": "train", "eval/margin": "validation"}),
    ("Implicit rewards", "β (log π - log π_ref)", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
    ("Log-probabilities", "log π(response), summed over tokens",
     {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
    ("Reward", "learned reward of answers", {"eval/reward": "validation"}),
    ("Exact match", "share of answers equal as syntax trees", {"eval/exact_match": "validation"}),
    ("Execution", "share of answers that pass their checks", {"eval/execution": "validation"}),
    ("CoNaLa BLEU", "official script, 0 to 100", {"eval/conala_bleu": "validation"}),
    ("KL to the reference", "nats a response", {"eval/kl": "validation"}),
    ("Response length", "tokens, EOS included", {"eval/length": "validation"}),
    ("EOS", "share of responses that end", {"eval/eos": "validation"}),
    ("Gradient norm", "before clipping", {"grad_norm": "train"}),
    ("Learning rate", "of AdamW", {"lr": "train"}),
]

EXACT = ("lr", "objective/kl_coef")  # set, not measured: no noise to smooth away

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, GREEN, VERMILLION = "#0072B2", "#009E73", "#D55E00"
INK, GREY, PALE = "#222222", "#6B6B6B", "#E4E4E4"
STYLE = {"font.size": 9, "text.color": INK, "axes.edgecolor": "#B0B0B0", "axes.linewidth": 0.8,
         "axes.labelcolor": GREY, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
         "axes.grid": True, "grid.color": PALE, "grid.linewidth": 0.7, "legend.fontsize": 8,
         "xtick.color": GREY, "ytick.color": GREY, "xtick.labelsize": 8, "ytick.labelsize": 8}
WIDTH, ROW, HEADER, FOOTER = 12, 2.3, 0.45, 0.3  # inches, at 150 pixels an inch


def plot_sft(run_folder):
    """Write plots/sft.png of a run of train_sft.py; returns its path."""
    return _plot_run(run_folder, SFT, "sft", "Supervised fine-tuning")


def plot_reward(run_folder):
    """Write plots/reward.png of a run of train_reward.py; returns its path."""
    return _plot_run(run_folder, REWARD, "reward", "Reward model")


def plot_ppo(run_folder):
    """Write plots/ppo.png of a run of train_ppo.py; returns its path."""
    return _plot_run(run_folder, PPO + _terms(run_folder), "ppo", "PPO")


def plot_dpo(run_folder):
    """Write plots/dpo.png of a run of train_dpo.py; returns its path."""
    return _plot_run(run_folder, DPO + _terms(run_folder), "dpo", "DPO")


def _terms(run_folder):
    """A panel for each term of the reward that the log knows, if that is a sum."""
    names = sorted({name.removeprefix("eval/") for row in read_log(Path(run_folder) / "metrics.jsonl") for name in row
                    if name.startswith(("reward/", "eval/reward/"))})
    return [("Term of the reward", name.removeprefix("reward/"), {name: "train", f"eval/{name}": "validation"}) for name in names]


def _plot_run(run_folder, spec, name, title):
    folder = Path(run_folder)
    rows = read_log(folder / "metrics.jsonl")
    results = folder / "results.json"  # written when a run ends: one that was killed has no best step to mark
    best = json.loads(results.read_text(encoding="utf-8")).get("best_step") if results.exists() else None
    curves, axis = evaluations(rows)
    plot_by_epoch({str(folder): curves}, axis, folder / "plots" / "evaluation_metrics_by_epoch.png",
                  title=f"{folder}: validation {decoding(rows)}".strip())
    return panels(rows, spec, folder / "plots" / f"{name}.png", f"{title}: {folder}", best)


# ---- The log

def read_log(path):
    """The rows of a JSONL log, each a dict with "step". A last line cut short, as a killed run leaves it, is left out.

    Any other bad line, no file, or a file without rows is an InputError.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no such log; a run writes it as it trains") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # no newline after it: the writer was stopped within this line
                break
            raise InputError(f"{path}:{number}: not a line of JSON ({error}); mend or remove the line") from None
        if not isinstance(row, dict) or type(row.get("step")) not in (int, float):
            raise InputError(f'{path}:{number}: not a row of a log: an object with a number "step" is expected')
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: the log has no rows yet: nothing to plot")
    return rows


def series(rows, metric):
    """(steps, values) of one metric in the order of steps; of rows of one step (after a resume) the last counts."""
    points = {row["step"]: row[metric] for row in rows if isinstance(row.get(metric), (int, float))}
    steps = sorted(points)
    return steps, [float(points[step]) for step in steps]


def smooth(values, width):
    """At each value, the least-squares line through its neighbours, `width` // 2 on either side where there are any.

    In the middle that is the running mean; at the ends, unlike a running mean, it neither lags nor bends. Values that
    are not finite are left out; where there is none in reach the result is NaN.
    """
    half = width // 2
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(values, half, constant_values=np.nan), 2 * half + 1)
    known = np.isfinite(windows)  # (n, width)
    offsets = np.arange(-half, half + 1)
    with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 where a window is empty or holds one value
        count = known.sum(1, keepdims=True)
        x = np.where(known, offsets - (known * offsets).sum(1, keepdims=True) / count, 0)
        centre = np.where(known, windows, 0).sum(1, keepdims=True) / count
        slope = (x * np.where(known, windows - centre, 0)).sum(1) / (x ** 2).sum(1)
        return centre[:, 0] - np.nan_to_num(slope) * (known * offsets).sum(1) / count[:, 0]


# ---- The figure

def panels(rows, spec, path, title, best_step=None, columns=3):
    """Draw the panels of `spec` that have data as a grid, into a PNG 1800 pixels wide.

    Args: rows, from `read_log`; spec, a list of (title, definition, {metric: label}); path, of the PNG; best_step,
    where a dashed line goes. Returns: path. Errors: InputError if no panel has data.
    """
    import matplotlib
    from matplotlib.figure import Figure  # its savefig renders with Agg: no display, no state shared between figures

    drawn = [panel for panel in spec if any(series(rows, metric)[0] for metric in panel[2])]
    if not drawn:
        wanted = ", ".join(metric for panel in spec[:3] for metric in panel[2])
        raise InputError(f"{title}: the log holds none of the metrics to plot ({wanted}, ...)")
    columns = min(columns, len(drawn))
    n_rows = -(-len(drawn) // columns)
    height = HEADER + ROW * n_rows + FOOTER
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08, rect=(0, FOOTER / height, 1, ROW * n_rows / height))
        grid = figure.subplots(n_rows, columns, squeeze=False, sharex=True).flatten()
        for i, axes in enumerate(grid):
            axes.set_visible(i < len(drawn))
            if i < len(drawn):
                _draw(axes, rows, *drawn[i], best_step, lowest=i + columns >= len(drawn))
        figure.text(0.01, 1 - 0.12 / height, title, fontsize=14, fontweight="bold", va="top")
        figure.text(0.01, 0.1 / height, _caption(best_step), fontsize=8.5, color=GREY)
        return _write(figure, Path(path))


def _caption(best_step):
    best = f"     dashed: step {best_step}, the best by validation" if best_step is not None else ""
    return f"faint: each step     line: smoothed     points: validation{best}"


def _draw(axes, rows, title, definition, metrics, best_step, lowest):
    """One panel: its series, the best step, a title with the definition under it."""
    colours = iter((BLUE, GREEN))
    for metric, label in metrics.items():
        steps, values = series(rows, metric)
        if not steps:
            continue
        if metric.startswith("eval/"):
            axes.plot(steps, values, "o-", color=VERMILLION, linewidth=1, markersize=4, label=label, zorder=3)
        else:
            _draw_training(axes, steps, values, next(colours), label, noisy=metric not in EXACT)
    if best_step is not None:
        axes.axvline(best_step, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    axes.set_title(title, fontsize=10.5, fontweight="bold", loc="left", pad=17)
    axes.text(0, 1.035, definition, transform=axes.transAxes, fontsize=8.5, color=GREY, va="bottom")
    axes.margins(x=0.02, y=0.12)
    # No common factor such as 1e-5 above the axis: it would stand in the title.
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}".replace("-", "−"))
    if definition.startswith("share"):
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.03), min(high, 1.03))
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False, handlelength=1.4, borderaxespad=0.2, labelspacing=0.2)
    if lowest:
        axes.set_xlabel("step")
        axes.tick_params(labelbottom=True)


def _draw_training(axes, steps, values, colour, label, noisy):
    """One training series: each step faint, its smooth line on top; a short or exact one as it is."""
    width = min(len(values) // 12, 200)
    if noisy and width >= 2:
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.25)
        values = smooth(values, width)
    axes.plot(steps, values, color=colour, linewidth=1.7, label=label)


def _write(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=150, facecolor="white")
    os.replace(partial, path)
    return path


# ---- Evaluations

TARGETS = {"bertscore": 0.7, "codebleu": 0.6, "bleu": 0.4, "rougeL": 0.5, "ruby": 0.3}
NAMES = {"bertscore": "BERTScore", "codebleu": "CodeBLEU", "bleu": "BLEU", "rougeL": "ROUGE-L", "ruby": "RUBY", "exact_match": "exact match",
         "conala_bleu": "CoNaLa BLEU", "token_f1": "token F1", "parses": "parses"}
COLOURS = (BLUE, VERMILLION, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B7A00")


def evaluations(rows):
    """{metric: (epochs or steps, values)} of a log's eval/... metrics, and the name of that axis."""
    rows = [row for row in rows if any(name.startswith("eval/") for name in row)]
    axis = "epoch" if rows and all("epoch" in row for row in rows) else "step"
    rows = [{**row, "step": row[axis]} for row in rows]
    names = {name for row in rows for name in row if name.startswith("eval/")}
    return {name[5:]: series(rows, name) for name in sorted(names)}, axis


def decoding(rows):
    """How the answers of a log's evaluations were decoded, in a word: "(greedy)", "(sampled)", or "" where it does not say."""
    found = {row["temperature"] > 0 for row in rows if "temperature" in row}
    return {(False,): "(greedy)", (True,): "(sampled)"}.get(tuple(found), "")


def plot_by_epoch(curves, axis, path, targets=None, title="Evaluation"):
    """One panel for each targeted metric that any model has: its points, the values of all or of the last, and the target's line.

    Args: curves, {model: {metric: (x, y)}}; axis, what x is; targets, {metric: value}. Returns path, or None without a value.
    """
    targets = TARGETS if targets is None else targets
    metrics = [metric for metric in targets if any(found.get(metric, ([], []))[0] for found in curves.values())]
    if not metrics:
        return None

    def draw(axes, metric):
        for i, ((model, found), colour) in enumerate(zip(curves.items(), COLOURS)):
            x, y = found.get(metric, ([], []))
            axes.plot(x, y, "o-", color=colour, linewidth=1.2, markersize=4, label=model)
            first = 0 if len(curves) == 1 and len(x) <= 8 else -1  # more values would overlap: the last one alone
            for at, value in list(zip(x, y))[first:]:
                axes.annotate(f"{value:.3f}", (at, value), textcoords="offset points", xytext=(0, -12 if i % 2 else 6), fontsize=7,
                              color=colour, ha="center")
        axes.axhline(targets[metric], color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_title(f"{NAMES.get(metric, metric)}: target {targets[metric]:g}", fontsize=10.5, fontweight="bold", loc="left")
        axes.set_ylim(0, 1.08)
        axes.set_xlabel(axis)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return _grid(metrics, draw, path, f"{title} by {axis}", legend=len(curves) > 1)


def plot_all_by_epoch(curves, axis, path, title="All evaluation metrics"):
    """One panel for each model: every metric between 0 and 1 as a line of its own. CoNaLa BLEU is drawn as a share of 100."""
    def shares(found):
        scaled = {metric: (x, [value / 100 for value in y] if metric == "conala_bleu" else y) for metric, (x, y) in found.items()}
        return {metric: scaled[metric] for metric in NAMES if metric in scaled}

    def draw(axes, model):
        for (metric, (x, y)), colour in zip(shares(curves[model]).items(), COLOURS):
            axes.plot(x, y, "o-", color=colour, linewidth=1.2, markersize=3, label=NAMES[metric])
        axes.set_title(model, fontsize=10.5, fontweight="bold", loc="left")
        axes.set_ylim(0, 1.03)
        axes.set_xlabel(axis)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False, ncols=2)
    models = [model for model, found in curves.items() if shares(found)]
    return _grid(models, draw, path, f"{title} by {axis}", columns=min(2, len(models)), row=4.2) if models else None


def plot_targets(values, path, targets=None):
    """A bar for each model and targeted metric, the target as a line across it, and whether it is met in words.

    Args: values, {model: {metric: value or None}}. A metric that could not be computed says so in place of a bar.
    """
    targets = TARGETS if targets is None else targets

    def draw(axes, model):
        for i, (metric, target) in enumerate(targets.items()):
            value = values[model].get(metric)
            met = value is not None and value >= target
            axes.barh(i, value or 0, color=GREEN if met else "#C9C9C9", height=0.62)
            axes.plot([target, target], [i - 0.4, i + 0.4], color=INK, linewidth=1.6)
            words = "not computed" if value is None else f"{value:.3f}, target {target:g}: {'met' if met else 'not met'}"
            axes.text(max(value or 0, target) + 0.015, i, words, va="center", fontsize=8)
        axes.set_yticks(range(len(targets)), [NAMES.get(metric, metric) for metric in targets])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.45)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.grid(axis="y", visible=False)
        axes.set_title(model, fontsize=10.5, fontweight="bold", loc="left")
    return _grid(list(values), draw, path, "Targets", columns=min(2, len(values)), row=0.45 * len(targets) + 1) if targets else None


def plot_training(run_folder, path):
    """The panels of a run's log, of whatever kind the run is, into `path`."""
    rows = read_log(Path(run_folder) / "metrics.jsonl")
    names = {name for row in rows for name in row}
    spec = PPO if "objective/kl" in names else DPO if "rewards/margin" in names else REWARD if "margin" in names else SFT
    return panels(rows, spec, Path(path), f"{run_folder}")


# ---- Over-optimisation

def plot_overoptimisation(run_folder, eval_rows=200, reward="Learned reward"):
    """Write plots/overoptimisation.png of a run of train_ppo.py: its reward, by that name, and gold on validation against the KL.

    Both are changes since the first evaluation; the axis is the square root of the KL, as in Gao et al. 2022, figure 1.
    Where the first goes on rising and the second turns, the policy is over-optimised. Gold is the monitor's
    (`gold_metric`, of so many rows). Returns the path; without two evaluations that have all three numbers it prints
    so and returns None.
    """
    folder = Path(run_folder)
    rows = read_log(folder / "metrics.jsonl")
    found = {name: {step: value for step, value in zip(*series(rows, name)) if math.isfinite(value)}
             for name in ("eval/kl", "eval/reward", *GOLD)}
    gold = gold_metric([{name: value} for name in GOLD for value in found[name].values()], eval_rows)
    steps = [step for step in found["eval/kl"] if gold and step in found["eval/reward"] and step in found[gold]]
    if len(steps) < 2:
        print(f"{folder}: no plot of over-optimisation: its log has no two evaluations with eval/reward, eval/kl and "
              f"gold ({', '.join(GOLD)})")
        return None
    kl = [max(0.0, found["eval/kl"][step]) for step in steps]  # an estimate: it may be below 0
    best = kl[max(range(len(steps)), key=lambda i: found[gold][steps[i]])]

    def draw(axes, name):
        values = [found[name][step] for step in steps]
        colour, title = (BLUE, reward) if name == "eval/reward" else (VERMILLION, f"Gold: {GOLD[name]}")
        _against_kl(axes, kl, [value - values[0] for value in values], steps, colour)
        axes.axvline(best, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        axes.set_title(title, fontsize=10.5, fontweight="bold", loc="left", pad=17)
        axes.text(0, 1.035, f"change since step {steps[0]:g}, which had {values[0]:.3g}; numbers: steps; dashed: the "
                  "best gold", transform=axes.transAxes, fontsize=8.5, color=GREY, va="bottom")
    path = folder / "plots" / "overoptimisation.png"
    return _grid(["eval/reward", gold], draw, path, f"Over-optimisation: {folder}", columns=1, row=3.1)


def _against_kl(axes, kl, changes, steps, colour):
    """Changes against KL in the order of steps, at most 13 of which are written: the last, and where there is room."""
    axes.axhline(0, color=GREY, linewidth=0.9, zorder=1)
    axes.plot(kl, changes, "-", color=colour, linewidth=1, alpha=0.45)
    axes.scatter(kl, changes, s=26, color=colour, zorder=4, clip_on=False)
    every, room, taken = -(-len(steps) // 13), 0.03 * math.sqrt(max(kl)), []
    written = list(zip(np.sqrt(kl), changes, steps))[::-every]
    for x, y, step in written:
        highest = max((other_y, other) for other_x, other_y, other in written if abs(other_x - x) <= room)
        sides = ("bottom", "top") if highest == (y, step) else ("top", "bottom")  # text above the highest, below others
        free = [side for side in sides if not any(side == other and abs(at - x) <= room for at, other in taken)]
        if free:
            taken.append((x, free[0]))
            axes.annotate(f"{step:g}", (x * x, y), textcoords="offset points",
                          xytext=(0, 6 if free[0] == "bottom" else -6), fontsize=8, color=INK, va=free[0], ha="center",
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8})
    axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    axes.set_xlim(0, 1.06 * max(kl) or 1)
    axes.margins(y=0.2)
    axes.set_xlabel("KL to the reference, nats a response (square-root scale)")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:+.4g}".replace("-", "−") if value else "0")


def _grid(items, draw, path, title, columns=3, row=2.6, legend=False):
    """A figure of one panel an item, drawn by draw(axes, item), into a PNG. Returns its path."""
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(columns, len(items))
    n_rows = -(-len(items) // columns)
    height = HEADER + row * n_rows + FOOTER
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08, rect=(0, FOOTER / height, 1, row * n_rows / height))
        for i, axes in enumerate(figure.subplots(n_rows, columns, squeeze=False).flatten()):
            axes.set_visible(i < len(items))
            if i < len(items):
                draw(axes, items[i])
                if legend and i == 0:
                    axes.legend(frameon=False)
        figure.text(0.01, 1 - 0.12 / height, title, fontsize=14, fontweight="bold", va="top")
        return _write(figure, Path(path))
