"""nanorlhf.config: precedence, one-line errors that name flag or file:line, saved files that give the same run."""

import dataclasses
import functools
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf.config import (asked, check_value, differences, help_text, option, options, parse, replace, save,
                             to_dict, to_toml)
from nanorlhf.errors import InputError

ROOT = Path(__file__).parents[1]
data = functools.partial(option, group="Data")


@dataclass
class Config:
    """A configuration with a field of every kind."""
    out: str = option("runs/ppo", "run folder", group="Run")
    seed: int = option(0, "seed of everything random")
    gpu: int | None = option(None, "which GPU", at_least=0)
    lr: float = option(1e-5, "peak learning rate of AdamW", group="Optimiser", above=0)
    lam: float = option(0.95, "lambda of GAE", at_least=0, at_most=1)
    dropout: float = option(0.0, "dropout", at_least=0, below=1)
    kl: str = option("k1", "KL estimator", choices=("k1", "k2", "k3", "abs"))
    early_stop: bool = option(True, "stop when validation reward stalls")
    models: list[str] = data((), "reward models")
    betas: list[float] = data((0.9, 0.999), "betas of AdamW", at_least=0, below=1)
    note: str | None = data("hello", "an optional text with a default")
    batch_size: int = option(32, "queries a step", group="Optimiser", at_least=1)

    def check(self):
        if self.early_stop and self.seed == 13:
            raise InputError("--seed 13 and --early-stop exclude each other")


PRESETS = {"fast": {"lr": 1e-4, "batch_size": 8, "early_stop": False}, "research": {}, "gpu": {"gpu": 0}}


def run(*argv, presets=PRESETS, cls=Config):
    return parse(cls, presets, argv=list(argv), exit_on_error=False)


def fails(*argv, **kwargs):
    with pytest.raises(InputError) as caught:
        run(*argv, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def toml(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


# ---- Values and where they come from

def test_no_arguments_give_the_defaults():
    assert run() == Config()
    assert set(run().config_sources.values()) == {"default"} and run().config_preset is None


def test_the_command_line_gives_each_kind_of_value():
    config = run("--out", "a b", "--seed", "-3", "--gpu=1", "--lr", "3", "--no-early-stop", "--models", "x", "y",
                 "--betas", "--note", "none")
    assert config == Config(out="a b", seed=-3, gpu=1, lr=3.0, early_stop=False, models=["x", "y"], betas=[], note=None)
    assert type(config.lr) is float


def test_each_source_overrides_the_ones_before_it(tmp_path):
    """default < preset < file < command line. All four set batch_size: 32, 8, 16, 64; lr stops at the preset."""
    path = toml(tmp_path, 'preset = "fast"\nbatch-size = 16\nseed = 5\n')
    config = run("--config", path)
    assert (config.batch_size, config.lr, config.seed, config.lam) == (16, 1e-4, 5, 0.95)
    assert run("--config", path, "--batch-size", "64").batch_size == 64
    sources = run("--batch-size", "64", "--config", path).config_sources
    assert (sources["lam"], sources["lr"], sources["seed"], sources["batch_size"]) == \
        ("default", "preset fast", path, "command line")


def test_a_preset_on_the_command_line_replaces_the_one_in_the_file(tmp_path):
    path = toml(tmp_path, 'preset = "fast"\nseed = 5\n')
    config = run("--config", path, "--preset", "gpu")
    assert (config.lr, config.gpu, config.config_preset) == (1e-5, 0, "gpu")


def test_a_preset_that_the_file_overrides_wholly_is_refused(tmp_path):
    path = toml(tmp_path, "gpu = 2\n")
    assert run("--preset", "research", "--config", path).config_preset == "research", "one that is the defaults has nothing to lose"
    assert fails("--preset", "gpu", "--config", path) == \
        f"--preset gpu changes nothing: {path} sets all its options; leave out one of them"


def test_a_preset_can_be_named_again_beside_the_file_that_names_it(tmp_path):
    save(run("--preset", "fast"), tmp_path / "config.toml")
    assert run("--config", str(tmp_path / "config.toml"), "--preset", "fast") == run("--preset", "fast")


def test_the_last_of_an_option_given_twice_counts():
    assert run("--seed", "1", "--seed", "2", "--models", "a", "b").seed == 2
    assert run("--no-early-stop", "--early-stop").early_stop is True
    assert fails("--preset", "fast", "--preset", "gpu") == "--preset is given twice; give it once"
    assert fails("--models", "a", "--models", "b") == "--models is given twice; write its values behind one: --models A B", "b alone used to count"


def test_lists_are_not_shared_between_configurations():
    """A default list that every instance holds would carry one run's models into the next."""
    presets = {"two": {"models": ["a", "b"]}}
    run("--preset", "two", presets=presets).models.append("c")
    run().betas.append(0.5)
    assert run("--preset", "two", presets=presets).models == ["a", "b"] and run().betas == [0.9, 0.999]
    assert presets == {"two": {"models": ["a", "b"]}}


def test_strings_that_look_like_options_are_given_with_an_equals_sign():
    assert run("--out=--no-early-stop").out == "--no-early-stop"
    assert run("--out=a=b").out == "a=b" and run("--out=").out == ""
    assert run("--lr", "1e-3", "--seed", "-1").seed == -1


# ---- Bad input: the command line

@pytest.mark.parametrize("argv, message", [
    ("--lrr 3", "unknown option '--lrr'; did you mean --lr?"),
    ("--batch_size 3", "unknown option '--batch_size'; did you mean --batch-size?"),
    ("--batch 3", "unknown option '--batch'; did you mean --batch-size?"),
    ("--no-early-stops", "unknown option '--no-early-stops'; did you mean --no-early-stop?"),
    ("--zzz", "unknown option '--zzz'"),
    ("--no-seed", "unknown option '--no-seed'; did you mean --seed?"),
    ("gpu 0", "unexpected 'gpu'; options start with --; did you mean --gpu?"),
    ("-seed=1", "unexpected '-seed=1'; options start with --; did you mean --seed?"),
    ("--", "unknown option '--'"),
    ("--lr", "--lr: a value is missing; expected a number > 0"),
    ("--lr --seed 1", "--lr: a value is missing; expected a number > 0"),
    ("--seed 1 2", '--seed takes one value; unexpected "2" after "1"'),
    ("--lr 0", "--lr: expected a number > 0, found 0.0"),
    ("--lr -1e-5", "--lr: expected a number > 0, found -1e-05"),
    ("--lr nan", "--lr: expected a number > 0, found nan"),
    ("--lr inf", "--lr: expected a number > 0, found inf"),
    ("--lr 1e999", "--lr: expected a number > 0, found inf"),
    ("--lr big", '--lr: expected a number > 0, found "big"'),
    ("--lam 1.01", "--lam: expected a number >= 0 and <= 1, found 1.01"),
    ("--dropout 1", "--dropout: expected a number >= 0 and < 1, found 1.0"),
    ("--seed 1.0", '--seed: expected an integer, found "1.0"'),
    ("--seed 99999999999999999999", "--seed: expected an integer, found an integer beyond 64 bits"),
    ("--seed none", '--seed: expected an integer, found "none"'),
    ("--gpu True", '--gpu: expected an integer >= 0 or none, found "True"'),
    ("--gpu -1", "--gpu: expected an integer >= 0 or none, found -1"),
    ("--kl k4", '--kl: expected one of k1, k2, k3, abs, found "k4"'),
    ("--kl abbs", '--kl: expected one of k1, k2, k3, abs, found "abbs"; did you mean abs?'),
    ("--early-stop false", '--early-stop takes no value, found "false"; write --early-stop or --no-early-stop'),
    ("--no-early-stop=1", '--no-early-stop takes no value, found "1"; write --early-stop or --no-early-stop'),
    ("--betas 0.9 x", '--betas: expected a list, each item a number >= 0 and < 1, found "x"'),
    ("--preset fats", '--preset: no preset "fats"; the presets are fast, research, gpu; did you mean fast?'),
    ("--preset", "--preset: a value is missing; expected the name of a preset"),
    ("--seed 13", "--seed 13 and --early-stop exclude each other"),
])
def test_a_bad_command_line_is_named_in_one_line(argv, message):
    assert fails(*argv.split()) == message


def test_boundaries_belong_to_at_least_and_at_most_but_not_to_above_and_below():
    assert run("--lam", "1").lam == 1 and run("--lam", "0").lam == 0 and run("--dropout", "0").dropout == 0


def test_a_script_without_presets_says_so():
    assert fails("--preset", "fast", presets=None) == '--preset: no preset "fast"; there are no presets here'


def test_bytes_that_are_not_utf8_are_refused():
    assert "--out: expected text, found" in fails("--out", os.fsdecode(b"runs/\xff"))


def test_a_long_value_is_cut_in_the_message():
    assert len(fails("--seed", "x" * 10_000)) < 120


# ---- Bad input: the file

@pytest.mark.parametrize("text, message", [
    ("# a\n\nlrr = 1\n", ":3: unknown option 'lrr'; did you mean lr?"),
    ("batch-sizes = 1\n", ":1: unknown option 'batch-sizes'; did you mean batch_size?"),
    ('seed = 1\n"lrr" = 1\n', ":2: unknown option 'lrr'; did you mean lr?"),
    ('seed = 1\nlr = "1e-5"\n', ':2: lr: expected a number > 0, found "1e-5"; remove the quotes'),
    ("lr = nan\n", ":1: lr: expected a number > 0, found nan"),
    ("lr = inf\n", ":1: lr: expected a number > 0, found inf"),
    ("lr = true\n", ":1: lr: expected a number > 0, found true"),
    ("\nseed = true\n", ":2: seed: expected an integer, found true"),
    ("seed = 3.0\n", ":1: seed: expected an integer, found 3.0"),
    ("seed = 0x" + "f" * 6000 + "\n", ":1: seed: expected an integer, found an integer beyond 64 bits"),
    ("seed = 2024-01-01\n", ":1: seed: expected an integer, found 2024-01-01"),
    ("early_stop = 1\n", ":1: early_stop: expected true or false, found 1"),
    ('early_stop = "true"\n', ':1: early_stop: expected true or false, found "true"'),
    ('models = "a"\n', ':1: models: expected a list, each item text, found "a"'),
    ("models = [1]\n", ":1: models: expected a list, each item text, found 1"),
    ("out = 3\n", ":1: out: expected text, found 3"),
    ('kl = "k"\n', ':1: kl: expected one of k1, k2, k3, abs, found "k"'),
    ("seed = 1\n[optimiser]\nlr = 1\n",
     ":2: unknown option 'optimiser'; options stand at the top level of the file, not in tables"),
    ("seed = 1\n[lr]\nx = 1\n",
     ":2: lr: expected a number > 0, found a table; options stand at the top level of the file, not in tables"),
    ("batch-size = 1\nbatch_size = 2\n", ":2: batch_size is given twice, with dashes and with underscores"),
    ('preset = "slow"\n', ':1: no preset "slow"; the presets are fast, research, gpu'),
    ("preset = 3\n", ':1: no preset "3"; the presets are fast, research, gpu'),
])
def test_a_bad_file_is_named_with_its_line(tmp_path, text, message):
    path = toml(tmp_path, text)
    assert fails("--config", path) == path + message


@pytest.mark.parametrize("text, line", [("seed = 1\nout = runs/x\n", 2), ("seed = 1\nseed = 2\n", 2),
                                        ("seed = [1,\n\n", 1), ("lr 3\n", 1), ("seed = " + "9" * 5000, 1)])
def test_broken_toml_is_named_with_its_line(tmp_path, text, line):
    path = toml(tmp_path, text)
    assert fails("--config", path).startswith(f"{path}:{line}: not valid TOML: ")


def test_files_that_cannot_be_read(tmp_path):
    assert fails("--config", "nowhere.toml") == "--config: no file nowhere.toml; name a TOML file, such as a run's config.toml"
    assert fails("--config", str(tmp_path)) == f"--config: {tmp_path} is a folder; give a TOML file"
    save(Config(), tmp_path / "config.toml")
    assert fails("--config", str(tmp_path)) == f"--config: {tmp_path} is a folder; did you mean {tmp_path}/config.toml?"
    path = toml(tmp_path, b"out = '\xff'")
    assert fails("--config", path) == f"--config: {path} is not UTF-8 text (byte 7); save it as UTF-8"
    assert fails("--config", "a\0b").startswith("--config: cannot read 'a\\x00b'")


def test_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = toml(tmp_path, b"\xef\xbb\xbfseed = 4\r\nlr = 1\r\n")
    assert (run("--config", path).seed, run("--config", path).lr) == (4, 1.0)


# ---- Presets and declarations are checked too

@pytest.mark.parametrize("presets, message", [
    ({"a": {"lrr": 1}}, "preset a: unknown option 'lrr'; did you mean lr?"),
    ({"a": {}, "b": {"lr": -1}}, "preset b: lr: expected a number > 0, found -1"),
])
def test_every_preset_is_checked_at_every_start(presets, message):
    assert fails(presets=presets) == message


def test_a_default_outside_its_own_limits_is_found():
    @dataclass
    class Faulty:
        lr: float = option(0.0, "rate", above=0)
    assert fails(cls=Faulty, presets=None) == "default of lr: expected a number > 0, found 0.0"


@pytest.mark.parametrize("annotation, default", [(dict, None), (int | str, 1), (tuple[int], ()), (bytes, b"")])
def test_a_type_that_no_option_can_have_is_an_error_of_the_declaration(annotation, default):
    cls = dataclasses.make_dataclass("Faulty", [("x", annotation, option(default, "?"))])
    with pytest.raises(TypeError, match="Faulty.x: "):
        options(cls)


def test_a_name_that_parse_needs_and_a_missing_default_are_errors_of_the_declaration():
    for field in (("preset", str, option("", "?")), ("x", int)):
        with pytest.raises(TypeError, match="needs a default, and a name other than"):
            options(dataclasses.make_dataclass("Faulty", [field]))


# ---- Exit codes and help

def test_errors_end_the_process_with_code_2_and_one_line(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(Config, PRESETS, argv=["--lrr"], prog="train_ppo.py")
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "train_ppo.py: error: unknown option '--lrr'; did you mean --lr?\n")


def test_help_shows_every_option_once_with_its_group_default_and_limits(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(Config, PRESETS, argv=["--seed", "x", "--help"], prog="train_ppo.py")
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert text.startswith("usage: train_ppo.py [--config FILE.toml] [--preset NAME] [options]\n")
    assert "nanorlhf.config: precedence" in text  # the summary of the docstring of the script, which here is this file
    for line in ("  --lr NUMBER                 peak learning rate of AdamW (> 0; default 1e-05)",
                 "  --[no-]early-stop           stop when validation reward stalls (default on)",
                 "  --kl TEXT                   KL estimator (k1 | k2 | k3 | abs; default k1)",
                 "  --betas NUMBER ...          betas of AdamW (>= 0 and < 1; default 0.9 0.999)",
                 "  --gpu INT                   which GPU (>= 0; default none)",
                 "  fast                        --lr 0.0001  --batch-size 8  --no-early-stop",
                 "  research                    the defaults"):
        assert text.count(line + "\n") == 1, line
    headings = [line for line in text.splitlines() if line.isalpha()]  # batch_size joins the earlier Optimiser
    assert headings == ["Run", "Optimiser", "Data", "Configuration", "Presets"]


def test_help_fits_the_screen_and_keeps_long_names_readable():
    cls = dataclasses.make_dataclass("Long", [("a_very_long_name_of_an_option", str, option("x", "word " * 60))])
    lines = help_text(cls).splitlines()
    assert max(map(len, lines)) <= 110 and "  --a-very-long-name-of-an-option TEXT" in lines


def test_help_shows_text_that_cannot_be_seen_in_quotes_and_keeps_facts_on_one_line():
    """A default of "{prompt}\\n" used to be shown as "{prompt} ", and an empty one as nothing."""
    @dataclass
    class Faint:
        template: str = option("{prompt}\n", "template")
        model: str = option("", "model", group="Model")
        rows: int | None = option(None, "word " * 13, at_least=0)
    text = help_text(Faint, {"a": {"template": "", "rows": None}})
    assert 'template (default "{prompt}\\n")\n' in text and 'model (default "")\n' in text
    assert text.endswith('--template ""  --rows none') and "\n" + " " * 30 + "default none)\n" in text
    assert "\xa0" not in text


@pytest.mark.skipif(os.name != "posix", reason="the shell's pipe")
def test_help_into_a_closed_pipe_is_no_traceback():
    code = ("from dataclasses import make_dataclass; from nanorlhf.config import option, parse; "
            "parse(make_dataclass('C', [('x', str, option('', 'x ' * 99_999))]), argv=['-h'])")
    command = f'"{sys.executable}" -c "{code}" | true'
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, timeout=20)
    assert done.stderr == b""


def test_help_takes_well_under_two_seconds_because_torch_is_not_imported():
    code = ("import sys; from nanorlhf import config; "
            "assert not {'torch', 'numpy', 'transformers', 'matplotlib'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=20)


# ---- Saving

def test_a_saved_file_is_read_as_written(tmp_path):
    config = run("--preset", "fast", "--lr", "0.5")
    text = to_toml(config)
    assert 'preset = "fast"' in text and "\n# peak learning rate of AdamW (> 0; default 1e-05)\nlr = 0.5\n" in text
    assert "\n# gpu =\n" in text
    save(config, tmp_path / "deep" / "config.toml")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["config.toml"]
    again = run("--config", str(tmp_path / "deep" / "config.toml"))
    assert again == config and again.config_preset == "fast"


def test_none_is_written_so_that_no_default_and_no_preset_comes_back(tmp_path):
    """A commented line alone would bring `note = "hello"` (its default) and `gpu = 0` (the preset's) back."""
    config = run("--preset", "gpu", "--gpu", "none", "--note", "none")
    save(config, tmp_path / "c.toml")
    again = run("--config", str(tmp_path / "c.toml"))
    assert again == config and again.gpu is None and again.note is None


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)  # Cs: lone surrogates, which are not text
UNIT = st.floats(0, 1, exclude_max=True)


@given(out=TEXT, seed=st.integers(-2**63, 2**63 - 1).filter(lambda seed: seed != 13),
       gpu=st.none() | st.integers(0, 99),
       lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False), lam=UNIT, kl=st.sampled_from(["k1", "abs"]),
       early_stop=st.booleans(), models=st.lists(TEXT), betas=st.lists(UNIT), preset=st.sampled_from([None, *PRESETS]),
       note=st.none() | TEXT.filter(lambda text: text != "none"))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_configuration_survives_saving(tmp_path_factory, preset, **values):
    config = replace(run(*(["--preset", preset] if preset else [])), **values)
    path = tmp_path_factory.getbasetemp() / "any.toml"
    save(config, path)
    assert run("--config", str(path)) == config


@pytest.mark.parametrize("text", ['"', "\\", "\\n", "a\nb\r\n", "\x00\x1b\x7f\x85\u2028", "naïve 数 🙂", "'''", '"""',
                                  "# x", ""])
def test_awkward_strings_survive_saving(tmp_path, text):
    save(Config(out=text, models=[text, ""]), tmp_path / "c.toml")
    assert run("--config", str(tmp_path / "c.toml")) == Config(out=text, models=[text, ""])


def test_a_failed_save_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, monkeypatch):
    save(Config(seed=1), tmp_path / "c.toml")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(Config(seed=2), tmp_path / "c.toml")
    assert [path.name for path in tmp_path.iterdir()] == ["c.toml"]
    assert run("--config", str(tmp_path / "c.toml")).seed == 1


# ---- Using a configuration

def test_replace_checks_and_keeps_sources():
    config = replace(run("--seed", "3"), lr=1)
    assert (config.lr, config.seed, config.config_sources["lr"], config.config_sources["seed"]) == \
        (1.0, 3, "replace", "command line")
    with pytest.raises(InputError, match="^lr: expected a number > 0, found -1$"):
        replace(config, lr=-1)
    with pytest.raises(InputError, match="exclude each other"):
        replace(config, seed=13)
    with pytest.raises(TypeError, match="no field 'lrr'"):
        replace(config, lrr=1)


def test_a_replaced_copy_knows_its_preset():
    """A run saves such a copy: its file names the preset, and what the preset set was not asked for."""
    config = replace(replace(run("--preset", "fast"), seed=1), gpu=0)
    assert config.config_preset == "fast" and 'preset = "fast"' in to_toml(config)
    assert asked(config, "lr", "batch_size", "early_stop", "seed", "gpu") == "--seed, --gpu"


def test_differences_tell_value_source_and_default():
    assert differences(run()) == []
    assert differences(run("--preset", "fast", "--seed", "7", "--gpu", "1")) == [
        "seed = 7 (command line; default 0)", "gpu = 1 (command line; default none)",
        "lr = 0.0001 (preset fast; default 1e-05)", "early_stop = false (preset fast; default true)",
        "batch_size = 8 (preset fast; default 32)"]
    assert differences(Config(seed=7)) == ["seed = 7 (set; default 0)"]


def test_asked_names_what_differs_from_defaults_and_preset(tmp_path):
    """fast sets lr 1e-4 and batch_size 8: typing the preset's or the default's value asks for nothing, nor does a saved file."""
    assert asked(run(), "lr", "seed") == ""
    assert asked(run("--preset", "fast", "--seed", "0", "--batch-size", "8"), "lr", "seed", "batch_size") == ""
    config = run("--preset", "fast", "--lr", "1", "--batch-size", "9", "--gpu", "0")
    assert asked(config, "lr", "seed", "batch_size") == "--lr, --batch-size"
    save(run("--preset", "fast"), tmp_path / "c.toml")
    assert asked(run("--config", str(tmp_path / "c.toml")), "lr", "batch_size") == ""
    assert asked(replace(run(), lr=1), "lr") == "--lr" and asked(Config(seed=3), "seed", "lr") == "--seed"


def test_to_dict_is_plain_and_whole():
    assert to_dict(run("--models", "a"))["models"] == ["a"]
    assert list(to_dict(run())) == [field.name for field in dataclasses.fields(Config)]


def test_inheritance_frozen_and_plain_fields():
    @dataclass(frozen=True)
    class Base:
        seed: int = option(0, "seed", group="Run")

    @dataclass(frozen=True)
    class Child(Base):
        flags: list[bool] = option((True,), "switches")
        plain: float | None = None
    config = run("--seed", "2", "--flags", "false", "true", "--plain", "1", cls=Child, presets=None)
    assert config == Child(2, [False, True], 1.0) and config.config_sources["seed"] == "command line"


def test_check_value_makes_floats_of_integers_only_where_floats_are_due():
    opts = options(Config)
    assert math.copysign(1, check_value(opts["lr"], 2, "x")) == 1 and type(check_value(opts["lr"], 2, "x")) is float
    assert type(check_value(opts["seed"], 2, "x")) is int


def test_ctrl_c_while_modules_are_imported_is_a_line(tmp_path):
    """Torch takes seconds to import, after the options are read: no traceback through it. Later Ctrl-C is KeyboardInterrupt as ever."""
    (tmp_path / "slow.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    begin = ("import signal, sys, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nsys.argv = ['train_x.py']\n"
             "from dataclasses import dataclass\nfrom nanorlhf.config import option, parse\n"
             "@dataclass\nclass Config:\n    seed: int = option(0, 'a seed')\nparse(Config)\n")
    for then, code, error in (("import slow\n", 130, "train_x.py: SIGINT: interrupted; nothing was begun\n"),
                              ("try:\n    print('ready', flush=True)\n    time.sleep(60)\nexcept KeyboardInterrupt: sys.exit(7)\n", 7, "")):
        process = subprocess.Popen([sys.executable, "-c", begin + then], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"})
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("", error) and process.returncode == code
