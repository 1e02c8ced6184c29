"""nanorlhf.plots: logs are read as killed runs leave them, panels follow the data, and the files are whole PNGs."""
import json
import math
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nanorlhf import plots
from nanorlhf.errors import InputError
from nanorlhf.plots import (DPO, PPO, REWARD, SFT, panels, plot_dpo, plot_ppo, plot_reward, plot_sft, read_log, series,
                            smooth)

ROOT = Path(__file__).parents[1]


def write_log(folder, rows, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def synthetic(spec, steps=40, every=10):
    """A log with every metric of the spec: training rows each step, validation rows every tenth."""
    metrics = [metric for _, _, lines in spec for metric in lines]
    rows = []
    for step in range(1, steps + 1):
        rows.append({"step": step, **{m: math.sin(step / 9) for m in metrics if not m.startswith("eval/")}})
        if step % every == 0:
            rows.append({"step": step, **{m: math.cos(step / 9) for m in metrics if m.startswith("eval/")}})
    return rows


def png_size(path):
    """(width, height); fails unless the file starts and ends as a PNG does."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND" and len(content) > 10_000
    return struct.unpack(">II", content[16:24])


@pytest.fixture
def figure(monkeypatch):
    """Catches the figure instead of rendering it: `figure()` after a call of `panels` is its list of visible axes."""
    caught = []
    monkeypatch.setattr(plots, "_write", lambda fig, path: caught.append(fig) or path)
    return lambda: [axes for axes in caught[-1].axes if axes.get_visible()]


def titles(axes_list):
    return [axes.get_title(loc="left") for axes in axes_list]


# ---- Reading the log

def test_a_log_is_read_row_by_row(tmp_path):
    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": float("nan")}]
    assert read_log(write_log(tmp_path, rows[:1], tail="\n\n")) == rows[:1]
    assert math.isnan(read_log(write_log(tmp_path, rows))[1]["loss"])


@pytest.mark.parametrize("tail", ['{"step": 3, "lo', '{"step": 3, "note": "na\u00ef', '{'])
def test_a_last_line_cut_by_a_kill_is_left_out(tmp_path, tail):
    path = write_log(tmp_path, [{"step": 1}, {"step": 2}])
    path.write_bytes(path.read_bytes() + tail.encode()[:-1 if "na" in tail else None])  # also cut within a character
    assert read_log(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("tail, line", [('{"step": 3, "lo\n{"step": 4}\n', 2), ('{"step": 3, "lo\n', 2), ("[1]\n", 2),
                                        ('{"loss": 1}\n', 2), ('{"step": null}\n', 2), ('{"step": true}\n', 2)])
def test_any_other_bad_line_is_named(tmp_path, tail, line):
    path = write_log(tmp_path, [{"step": 1}], tail)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}:{line}: not a "):
        read_log(path)


def test_no_log_and_an_empty_log_are_named(tmp_path):
    with pytest.raises(InputError, match=r"metrics\.jsonl: no such log"):
        plot_ppo(tmp_path / "nowhere")
    for tail in ("", "\n", '{"step": 1'):
        with pytest.raises(InputError, match=r"metrics\.jsonl: the log has no rows yet"):
            plot_ppo(write_log(tmp_path, [], tail).parent)


def test_series_sorts_steps_skips_nulls_and_takes_the_last_of_a_repeated_step():
    """A run resumed from step 1 logs step 2 again; the second row is the one whose weights live on."""
    rows = [{"step": 1, "a": 1}, {"step": 3, "a": 9.0}, {"step": 2, "a": 7}, {"step": 2, "a": 8},
            {"step": 4, "a": None}]
    assert series(rows, "a") == ([1, 2, 3], [1.0, 8.0, 9.0]) and series(rows, "b") == ([], [])


# ---- Smoothing

def test_smooth_is_the_running_mean_in_the_middle_and_a_line_at_the_ends():
    """0 3 0 3 0, width 3. Middle: (0+3+0)/3 = 1, (3+0+3)/3 = 2, 1. First: the line through (0, 0), (1, 3) is 0 at 0."""
    assert smooth([0.0, 3.0, 0.0, 3.0, 0.0], 3) == pytest.approx([0, 1, 2, 1, 0], abs=1e-12)


@pytest.mark.parametrize("width", [0, 2, 7, 50])
def test_smooth_leaves_a_straight_line_as_it_is_to_its_ends(width):
    line = [2.0 - 0.5 * i for i in range(20)]
    assert smooth(line, width) == pytest.approx(line, abs=1e-12)


def test_smooth_leaves_out_what_is_not_finite():
    """5 beside a NaN and an inf: each of the three sees only the 5; the last value is out of its reach."""
    out = smooth([math.nan, 5.0, math.inf, math.nan, math.nan], 3)
    assert out[:3] == pytest.approx([5, 5, 5]) and np.isnan(out[4])


# ---- Figures

@pytest.mark.parametrize("plot, spec, name", [(plot_sft, SFT, "sft"), (plot_reward, REWARD, "reward"),
                                              (plot_ppo, PPO, "ppo"), (plot_dpo, DPO, "dpo")])
def test_each_kind_of_run_gives_one_png_1800_wide(tmp_path, plot, spec, name):
    write_log(tmp_path / "run", synthetic(spec[:2]))  # two panels of each: rendering takes time
    path = plot(tmp_path / "run")
    assert path == tmp_path / "run" / "plots" / f"{name}.png" and png_size(path)[0] == 1800
    assert [file.name for file in path.parent.iterdir()] == [f"{name}.png"]  # no partial file is left


def test_only_panels_with_data_are_drawn(figure, tmp_path):
    panels(synthetic(PPO), PPO, tmp_path / "x.png", "PPO")
    assert titles(figure()) == [title for title, _, _ in PPO]
    rows = [{"step": 1, "objective/kl": 1.0, "lr": 1e-5, "unknown": 3.0}, {"step": 1, "eval/score": 2.0},
            {"step": 1, "eval/conala_bleu": None}]
    panels(rows, PPO, tmp_path / "x.png", "PPO")
    assert titles(figure()) == ["Score", "KL to the reference", "Learning rate"]


def test_a_log_of_another_kind_is_refused(tmp_path):
    with pytest.raises(InputError, match="none of the metrics to plot .objective/score, "):
        panels([{"step": 1, "loss": 1.0}], PPO, tmp_path / "x.png", "PPO")
    assert not (tmp_path / "x.png").exists()


def test_validation_is_points_and_training_a_smooth_line_over_the_faint_raw_one(figure, tmp_path):
    panels(synthetic(SFT), SFT[:1], tmp_path / "x.png", "SFT", best_step=30)
    faint, line, points, best = figure()[0].get_lines()
    assert (faint.get_alpha(), len(faint.get_xdata()), len(line.get_xdata())) == (0.25, 40, 40)
    assert points.get_marker() == "o" and list(points.get_xdata()) == [10, 20, 30, 40]
    assert list(best.get_xdata()) == [30, 30] and best.is_dashed()
    assert [text.get_text() for text in figure()[0].get_legend().get_texts()] == ["train", "validation"]


def test_what_is_set_rather_than_measured_is_not_smoothed(figure, tmp_path):
    """Smoothing once rounded the kink at the end of the warm-up off the learning rate."""
    rows = [{"step": step, "lr": min(step, 60 - step) / 30} for step in range(60)]
    panels(rows, SFT, tmp_path / "x.png", "SFT")
    (line,) = figure()[0].get_lines()
    assert max(line.get_ydata()) == 1.0


def test_a_legend_names_only_what_was_logged(figure, tmp_path):
    panels([{"step": 1, "loss": 1.0}], SFT, tmp_path / "x.png", "SFT")
    assert figure()[0].get_legend() is None


def test_shares_are_not_drawn_beyond_zero_and_one(figure, tmp_path):
    for values, side in (((1.0, 0.5), 1), ((0.5, 0.0), 0)):
        panels([{"step": step, "eval/eos": value} for step, value in enumerate(values)], SFT, tmp_path / "x.png", "SFT")
        assert figure()[0].get_ylim()[side] == (-0.03, 1.03)[side]


def test_the_best_step_comes_from_the_results_of_the_run(figure, tmp_path):
    write_log(tmp_path, synthetic(SFT))
    plot_sft(tmp_path)
    assert not any(line.is_dashed() for line in figure()[0].get_lines())  # killed before it had results
    for best in (20, 0):  # 0: the policy before its first step was the best
        (tmp_path / "results.json").write_text(json.dumps({"best_step": best}))
        plot_sft(tmp_path)
        assert list(figure()[0].get_lines()[-1].get_xdata()) == [best, best]


def test_non_finite_values_and_a_single_row_are_drawn(tmp_path):
    rows = [{"step": step, "loss": value} for step, value in enumerate([1.0, math.nan, math.inf, 2.0] * 10)]
    png_size(panels(rows, SFT, tmp_path / "a.png", "SFT"))
    png_size(panels(rows[:1], SFT, tmp_path / "b.png", "SFT"))


def test_validation_metrics_go_by_epoch_where_all_rows_have_one():
    rows = [{"step": 5, "epoch": 1, "eval/bleu": 0.5, "eval/loss": 2.0}, {"step": 7, "loss": 1.0}, {"step": 10, "epoch": 2, "eval/bleu": 0.75}]
    assert plots.evaluations(rows) == ({"bleu": ([1, 2], [0.5, 0.75]), "loss": ([1], [2.0])}, "epoch")
    del rows[2]["epoch"]
    assert plots.evaluations(rows) == ({"bleu": ([5, 10], [0.5, 0.75]), "loss": ([5], [2.0])}, "step")
    assert plots.evaluations(rows[1:2]) == ({}, "step")


def test_how_answers_were_decoded_is_said_where_it_is_one_way():
    for temperatures, words in (([0.0, 0.0], "(greedy)"), ([0.7, 1.0], "(sampled)"), ([0.0, 1.0], ""), ([], "")):
        assert plots.decoding([{"step": 1, "temperature": value} for value in temperatures] + [{"step": 2}]) == words


@pytest.mark.parametrize("plot, metric", [(plot_ppo, "objective/kl"), (plot_dpo, "rewards/margin")])
def test_each_term_of_a_reward_has_a_panel(figure, tmp_path, plot, metric):
    rows = [{"step": 1, metric: 1.0, "reward/syntax": 0.5, "reward/bleu": 0.5}, {"step": 1, "eval/reward/syntax": 0.5}]
    plot(write_log(tmp_path, rows).parent)
    assert titles(figure())[1:] == ["Term of the reward"] * 2
    assert [len(axes.get_lines()) for axes in figure()[1:]] == [1, 2], "bleu: training alone; syntax: both"
    assert [axes.texts[0].get_text() for axes in figure()[1:]] == ["bleu", "syntax"]


def test_a_run_leaves_a_figure_of_its_validation_by_epoch(monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(plots, "_write", lambda figure, path: written.append((path.name, figure)) or path)
    plot_sft(write_log(tmp_path, [{"step": 3, "epoch": 1, "eval/loss": 1.0, "eval/bleu": 0.5, "temperature": 0.0}]).parent)
    (name, figure), (other, _) = written
    assert (name, other) == ("evaluation_metrics_by_epoch.png", "sft.png")
    assert figure.axes[0].get_title(loc="left") == "BLEU: target 0.4" and figure.texts[0].get_text() == f"{tmp_path}: validation (greedy) by epoch"


def test_a_metric_that_one_model_lacks_is_drawn_for_the_other(figure, tmp_path):
    curves = {"a": {"bleu": ([1, 2], [0.1, 0.2])}, "b": {"ruby": ([1], [0.3])}}
    plots.plot_by_epoch(curves, "epoch", tmp_path / "x.png")
    assert titles(figure()) == ["BLEU: target 0.4", "RUBY: target 0.3"]
    plots.plot_all_by_epoch({"a": {"conala_bleu": ([1], [25.0]), "bleu": ([1], [0.5]), "length": ([1], [9.0])}, "b": {"length": ([1], [9.0])}},
                            "epoch", tmp_path / "x.png")
    assert titles(figure()) == ["a"] and {line.get_label(): list(line.get_ydata()) for line in figure()[0].get_lines()} == \
        {"BLEU": [0.5], "CoNaLa BLEU": [0.25]}


def test_a_target_is_met_at_its_value(figure, tmp_path):
    plots.plot_targets({"a": {"bleu": 0.4, "ruby": 0.299, "bertscore": None}}, tmp_path / "x.png", {"bleu": 0.4, "ruby": 0.3, "bertscore": 0.7})
    assert [text.get_text() for text in figure()[0].texts] == ["0.400, target 0.4: met", "0.299, target 0.3: not met", "not computed"]
    assert plots.plot_targets({"a": {}}, tmp_path / "x.png", {}) is None


@pytest.mark.parametrize("metrics, panel", [({"objective/kl": 1.0, "loss": 1.0}, "KL to the reference"), ({"loss": 1.0}, "Loss"),
                                            ({"rewards/margin": 1.0, "eval/margin": 1.0}, "Margin"), ({"margin": 1.0, "error": 1.0}, "Margin")])
def test_the_training_of_any_run_is_drawn_by_what_it_logged(figure, tmp_path, metrics, panel):
    """A reward model logs margin and error, DPO rewards/margin; SFT knows neither."""
    plots.plot_training(write_log(tmp_path, [{"step": 1, **metrics}]).parent, tmp_path / "x.png")
    assert titles(figure())[0] == panel and len(figure()) == len([name for name in metrics if not name.startswith(("eval/", "loss"))] or [1])


def test_every_metric_stands_in_one_panel_only_and_has_a_definition():
    for spec in (SFT, REWARD, PPO, DPO):
        metrics = [metric for _, _, lines in spec for metric in lines]
        assert len(metrics) == len(set(metrics)) and all(title and definition for title, definition, _ in spec)


def test_importing_the_room_does_not_import_matplotlib():
    code = "import sys, nanorlhf.plots; assert 'matplotlib' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=20)
