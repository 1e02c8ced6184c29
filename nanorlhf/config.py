"""Configuration: one dataclass per script -> command line, TOML file and presets.

    @dataclass
    class Config:
        out: str = option("runs/ppo", "run folder", group="Run")
        lr: float = option(1e-5, "peak learning rate of AdamW", group="Optimiser", above=0)
        early_stop: bool = option(True, "stop when validation reward stalls")     # --early-stop / --no-early-stop

    config = parse(Config, presets={"fast": {"lr": 1e-4}})

A value comes from, weakest first: the field's default, the preset (`--preset fast`, or `preset = "fast"` in the file),
the TOML file (`--config run.toml`), the command line. The rules, where there was a choice:

- Of an option given twice on the command line the last one counts; a list, `--config` and `--preset` may come once; a
  `--preset` of which the file leaves nothing in force is an error, not a setting that does nothing.
- Nothing is abbreviated or guessed: an unknown name, a wrong type, a value out of range, `nan` and `inf` are errors of
  one line that name the flag or `file:line`. An integer will do for a float; in TOML a number in quotes will not.
- `none` unsets an optional option (`int | None`), on the command line and, as "none", in TOML, which has no null.
- A string that starts with `--` is given as `--option=--value`.

Only the standard library is imported, so that `--help` answers at once.
"""

import dataclasses
import json
import math
import operator
import os
import re
import signal
import sys
import textwrap
import threading
import tomllib
import types
import typing
from pathlib import Path

from nanorlhf.errors import InputError, nearest

KINDS = {str: ("text", "TEXT"), int: ("an integer", "INT"), float: ("a number", "NUMBER"), bool: ("true or false", "")}
LIMITS = {"above": (">", operator.gt), "at_least": (">=", operator.ge),
          "at_most": ("<=", operator.le), "below": ("<", operator.lt)}
TABLES = "; options stand at the top level of the file, not in tables"
WIDTH = 110  # of --help and of the comments in a saved file


@dataclasses.dataclass(frozen=True)
class Option:
    """What is known of one field of a configuration dataclass."""
    name: str
    kind: type  # str, int, float or bool; of the items where the option is a list
    is_list: bool
    optional: bool  # may be None
    default: object
    help: str
    group: str
    limits: dict
    choices: tuple | None
    metavar: str | None

    @property
    def flag(self):
        return "--" + self.name.replace("_", "-")

    @property
    def bounds(self):
        """The range: "> 0 and <= 1", or ""."""
        return " and ".join(f"{LIMITS[name][0]} {limit}" for name, limit in self.limits.items())

    @property
    def expects(self):
        """What a value must be, in words: for error messages."""
        noun = KINDS[self.kind][0] + (" " + self.bounds if self.limits else "")
        if self.choices:
            noun = "one of " + ", ".join(map(str, self.choices))
        return ("a list, each item " if self.is_list else "") + noun + (" or none" if self.optional else "")


# ---- Declaring options

def option(default, help, *, group=None, above=None, at_least=None, at_most=None, below=None, choices=None,
           metavar=None):
    """A dataclass field with its line of help; limits and `choices` hold for each item where the field is a list.

    Without `group` the option joins the group of the option above it. The type comes from the annotation: str, int,
    float, bool, a list of one of these, each also `| None`.
    """
    limits = {"above": above, "at_least": at_least, "at_most": at_most, "below": below}
    metadata = {"help": help, "group": group, "choices": choices, "metavar": metavar,
                "limits": {name: limit for name, limit in limits.items() if limit is not None}}
    if isinstance(default, (list, tuple)):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def options(cls):
    """{name: Option} of a configuration dataclass, in the order of its fields. A faulty declaration is a TypeError."""
    hints, found, current = typing.get_type_hints(cls), {}, "Options"
    for field in dataclasses.fields(cls):
        kind, is_list, optional = _read_annotation(cls, field.name, hints[field.name])
        default = field.default if field.default is not dataclasses.MISSING else None
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        elif field.default is dataclasses.MISSING or field.name in ("config", "preset", "help"):
            raise TypeError(f"{cls.__name__}.{field.name}: needs a default, and a name other than config, preset, help")
        meta = field.metadata
        current = meta.get("group") or current
        found[field.name] = Option(field.name, kind, is_list, optional, default, meta.get("help", ""), current,
                                   meta.get("limits", {}), meta.get("choices"), meta.get("metavar"))
    return found


def _read_annotation(cls, name, hint):
    """`list[float] | None` -> (float, is_list True, optional True)."""
    arms = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    real = [arm for arm in arms if arm is not type(None)]
    is_list = typing.get_origin(real[0]) is list
    kind = typing.get_args(real[0])[0] if is_list else real[0]
    if len(real) != 1 or kind not in KINDS:
        raise TypeError(f"{cls.__name__}.{name}: {hint} is not str, int, float, bool, a list of one, or these | None")
    return kind, is_list, len(arms) > len(real)


# ---- Checking one value

def check_value(opt, value, where):
    """The value as the field's type (an int turns float where one is due), or an InputError opening with `where`."""
    if opt.optional and (value is None or value == "none"):
        return None
    if opt.is_list:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where}: expected {opt.expects}, found {_shown(value)}")
        return [_check_item(opt, item, where) for item in value]
    return _check_item(opt, value, where)


def _check_item(opt, value, where):
    wanted = (int, float) if opt.kind is float else (opt.kind,)
    in_range = type(value) in wanted and _in_range(opt, value)  # type(), not isinstance: True is no integer here
    if in_range and (opt.choices is None or value in opt.choices):
        return opt.kind(value)
    raise InputError(f"{where}: expected {opt.expects}, found {_shown(value)}{_advice(opt, value)}")


def _in_range(opt, value):
    if opt.kind is str:
        # Bytes of the command line that are not UTF-8 arrive as surrogates, which no file can hold.
        return not any("\ud800" <= char <= "\udfff" for char in value)
    if not (-2**63 <= value < 2**63 if type(value) is int else math.isfinite(value)):
        return False
    return all(LIMITS[name][1](value, limit) for name, limit in opt.limits.items())


def _advice(opt, value):
    """How to mend it, where that can be told."""
    if isinstance(value, dict):
        return TABLES
    if opt.kind in (int, float) and isinstance(value, str) and type(_from_text(opt, value)) is not str:
        return "; remove the quotes"
    return _did_you_mean(value, opt.choices, cutoff=0.7) if opt.choices else ""


def _shown(value):
    """The value on one line, as TOML writes it, cut where it is long."""
    if isinstance(value, dict):
        return "a table"
    if type(value) is int and abs(value) > 2**63:
        return "an integer beyond 64 bits"  # Python refuses to print one of thousands of digits
    text = _toml(value) if isinstance(value, (str, bool, list, tuple)) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---- Where values come from

def parse(cls, presets=None, argv=None, prog=None, exit_on_error=True):
    """The configuration that defaults, preset, TOML file and command line give, checked.

    Args: cls, a dataclass of `option` fields; if it defines `check(self)`, that is called at the end and may raise
    InputError (for options that contradict each other). presets, {name: {field: value}}. argv, without the program.
    Returns: an instance with three attributes more: `config_sources`, {field: "default" | "preset NAME" | path of the
    file | "command line"}, `config_preset`, the preset's name or None, and `config_baseline`, {field: value} before file and
    command line.
    Errors: one line on stderr and exit code 2, or InputError with `exit_on_error=False`. `--help` prints and exits 0.
    """
    prog = prog or os.path.basename(sys.argv[0])
    mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if argv is None and mine:
        signal.signal(signal.SIGINT, interrupted_import)
    argv = [str(token) for token in (sys.argv[1:] if argv is None else argv)]
    if "-h" in argv or "--help" in argv:
        _print_help(help_text(cls, presets, prog))
        raise SystemExit(0)
    try:
        return _resolve(cls, presets or {}, argv)
    except InputError as error:
        if not exit_on_error:
            raise
        print(f"{prog}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def interrupted_import(signum, frame):
    """Ctrl-C as ever, but without a traceback through the import of torch, which takes its time after the options are read."""
    outer = frame
    while outer is not None:
        if outer.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, f"{os.path.basename(sys.argv[0])}: SIGINT: interrupted; nothing was begun\n".encode())
            os._exit(130)
        outer = outer.f_back
    signal.default_int_handler(signum, frame)


def _resolve(cls, presets, argv):
    opts = options(cls)
    presets = {name: _read_preset(opts, name, values) for name, values in presets.items()}
    typed, named = _read_command_line(opts, argv, presets)
    path = named.get("config")
    filed, preset = _read_toml(opts, path, presets) if path is not None else ({}, None)
    if named.get("preset", preset) != preset:
        preset = _known_preset(named["preset"], presets, "--preset")
        if presets[preset] and not presets[preset].keys() - filed.keys():
            raise InputError(f"--preset {preset} changes nothing: {path} sets all its options; leave out one of them")
    values = {name: check_value(opt, opt.default, f"default of {name}") for name, opt in opts.items()}
    baseline = values | presets.get(preset, {})
    sources = dict.fromkeys(opts, "default")
    for source, layer in ((f"preset {preset}", presets.get(preset, {})), (str(path), filed), ("command line", typed)):
        values.update(layer)
        sources.update(dict.fromkeys(layer, source))
    return _build(cls, values, sources, preset, baseline)


def _build(cls, values, sources, preset, baseline):
    config = cls(**values)
    object.__setattr__(config, "config_baseline", baseline)
    object.__setattr__(config, "config_sources", sources)  # object's: also sets on a frozen dataclass
    object.__setattr__(config, "config_preset", preset)
    if hasattr(config, "check"):
        config.check()
    return config


def _read_preset(opts, preset, values):
    unknown = [name for name in values if name not in opts]
    if unknown:
        raise InputError(f"preset {preset}: unknown option {unknown[0]!r}{_did_you_mean(unknown[0], opts)}")
    return {name: check_value(opts[name], value, f"preset {preset}: {name}") for name, value in values.items()}


def _known_preset(name, presets, where):
    if name in presets:
        return name
    known = f"the presets are {', '.join(presets)}" if presets else "there are no presets here"
    raise InputError(f"{where}: no preset {_shown(name)}; {known}{_did_you_mean(name, presets)}")


def _did_you_mean(word, choices, cutoff=0.6, prefix=""):
    meant = nearest(word, choices, cutoff)
    return f"; did you mean {prefix}{meant}?" if meant else ""


def _read_command_line(opts, argv, presets):
    """Tokens -> ({field: value}, {"config": path, "preset": name} where given)."""
    flags = {opt.flag: opt for opt in opts.values()}
    negated = {"--no-" + opt.flag[2:]: opt for opt in opts.values() if opt.kind is bool and not opt.is_list}
    typed, named, queue = {}, {}, list(argv)
    while queue:
        flag, equals, attached = queue.pop(0).partition("=")
        values = [attached] if equals else []
        while queue and not equals and not queue[0].startswith("--"):
            values.append(queue.pop(0))
        if flag in ("--config", "--preset"):
            if flag[2:] in named:
                raise InputError(f"{flag} is given twice; give it once")
            named[flag[2:]] = _single(flag, values, "a TOML file" if flag == "--config" else "the name of a preset")
        elif flag in flags or flag in negated:
            opt = flags.get(flag) or negated[flag]
            if opt.is_list and opt.name in typed:
                raise InputError(f"{flag} is given twice; write its values behind one: {flag} A B")
            typed[opt.name] = _read_values(opt, flag, values, flag in flags)
        elif flag.startswith("--"):
            known = [name[2:] for name in [*flags, *negated, "--config", "--preset", "--help"]]
            raise InputError(f"unknown option {flag!r}{_did_you_mean(flag[2:], known, prefix='--')}")
        else:
            hint = _did_you_mean(flag.lstrip("-"), [name[2:] for name in flags], prefix="--")
            raise InputError(f"unexpected {flag + equals + attached!r}; options start with --{hint}")
    return typed, named


def _read_values(opt, flag, values, positive):
    """The values that follow a flag -> the option's value."""
    if opt.is_list:
        if not values and not opt.default:
            raise InputError(f"{flag}: a value is missing; expected {opt.expects}")  # such as those of an unset shell variable
        unset = opt.optional and values == ["none"]
        return check_value(opt, None if unset else [_from_text(opt, text) for text in values], flag)
    if opt.kind is bool:
        if values:
            either = f"{opt.flag} or --no-{opt.flag[2:]}"
            raise InputError(f"{flag} takes no value, found {_shown(values[0])}; write {either}")
        return positive
    return check_value(opt, _from_text(opt, _single(flag, values, opt.expects)), flag)


def _single(flag, values, expects):
    if not values:
        raise InputError(f"{flag}: a value is missing; expected {expects}")
    if len(values) > 1:
        raise InputError(f"{flag} takes one value; unexpected {_shown(values[1])} after {_shown(values[0])}")
    return values[0]


def _from_text(opt, text):
    """Text -> number where it is one; other text is left as it is, for `check_value` to refuse."""
    if opt.kind is bool:
        return {"true": True, "false": False}.get(text, text)
    try:
        return opt.kind(text)
    except ValueError:
        return text


def _read_toml(opts, path, presets):
    """File -> ({field: value}, preset or None). Keys may be written with dashes as well as underscores."""
    text = _read_text(path)
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, an integer of thousands of digits, brackets without end
        line = re.search(r"at line (\d+)", str(error))
        line = line.group(1) if line else text.rstrip().count("\n") + 1
        hint = "text needs quotes, true and false are lower-case"
        raise InputError(f"{path}:{line}: not valid TOML: {error}; {hint}") from None
    filed, preset = {}, None
    for key, value in table.items():
        name, where = key.replace("-", "_"), f"{path}:{_line_of(text, key)}"
        if name == "preset":
            preset = _known_preset(value if isinstance(value, str) else str(value), presets, where)
        elif name not in opts:
            hint = TABLES if isinstance(value, dict) else _did_you_mean(name, [*opts, "preset"])
            raise InputError(f"{where}: unknown option {key!r}{hint}")
        elif name in filed:
            raise InputError(f"{where}: {name} is given twice, with dashes and with underscores")
        else:
            filed[name] = check_value(opts[name], value, f"{where}: {name}")
    return filed, preset


def _read_text(path):
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"--config: no file {path}; name a TOML file, such as a run's config.toml") from None
    except IsADirectoryError:
        inside = Path(path) / "config.toml"
        hint = f"; did you mean {inside}?" if inside.exists() else "; give a TOML file"
        raise InputError(f"--config: {path} is a folder{hint}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--config: {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise InputError(f"--config: cannot read {path!r}: {getattr(error, 'strerror', None) or error}") from None


def _line_of(text, key):
    """The line on which a top-level key or table stands: `tomllib` does not tell."""
    key = rf"[\"']?{re.escape(key)}[\"']?\s*"
    found = re.search(rf"^[ \t]*(?:{key}[.=]|\[\[?\s*{key}[.\]])", text, re.MULTILINE)
    return text.count("\n", 0, found.start()) + 1 if found else 1


# ---- Help

def help_text(cls, presets=None, prog="script.py"):
    """The text of `--help`: what the script is for, its options by group with defaults, and what each preset sets."""
    script = sys.modules.get(cls.__module__)
    summary = ((script and script.__doc__) or cls.__doc__ or "").strip().split("\n\n")[0]
    lines = [f"usage: {prog} [--config FILE.toml]{' [--preset NAME]' if presets else ''} [options]", "",
             *_wrap(summary, WIDTH)]
    for heading, members in _by_group(cls).items():
        lines += ["", heading]
        for opt in members:
            lines += _two_columns(_usage(opt), f"{opt.help} ({_facts(opt)})".strip())
    lines += ["", "Configuration"]
    lines += _two_columns("--config FILE.toml", "options from a TOML file; those on the command line count more")
    if presets:
        names = ", ".join(presets)
        lines += _two_columns("--preset NAME", f"other defaults: {names}; the file and the command line count more")
    lines += _two_columns("-h, --help", "show this and stop")
    lines += ["", "Presets"] if presets else []
    for name, values in (presets or {}).items():
        lines += _two_columns(name, _as_flags(values) or "the defaults")
    return "\n".join(lines)


def _by_group(cls):
    """{group: [Option]}, groups in the order in which they first occur."""
    groups = {}
    for opt in options(cls).values():
        groups.setdefault(opt.group, []).append(opt)
    return groups


def _print_help(text):
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `--help | head`; the interpreter's own flush at exit must find an open file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage(opt):
    if opt.kind is bool and not opt.is_list:
        return f"--[no-]{opt.flag[2:]}"
    return f"{opt.flag} {opt.metavar or KINDS[opt.kind][1]}{' ...' if opt.is_list else ''}"


def _facts(opt):
    """What stands in brackets after the help: choices, limits, default; lines do not break within the latter two."""
    choices = [" | ".join(map(str, opt.choices))] if opt.choices else []
    default = {True: "on", False: "off"}[opt.default] if type(opt.default) is bool else _words(opt.default)
    return "; ".join(choices + [fact.replace(" ", "\xa0") for fact in (opt.bounds, f"default {default}") if fact])


def _words(value):
    """A value as one would type it, lists without brackets; text in quotes where it would be hard to see without."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(_words, value)) or "none"
    plain = not isinstance(value, str) or (value.isprintable() and value.strip() == value != "")
    return "none" if value is None else str(value) if plain else _toml(value)


def _as_flags(values):
    """{"batch_size": 8, "early_stop": False} -> "--batch-size 8  --no-early-stop"."""
    flags = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        switch = f"--{flag}" if value else f"--no-{flag}"
        flags.append(switch if type(value) is bool else f"--{flag}\xa0{_words(value)}")
    return "  ".join(flags)


def _wrap(text, width):
    return [line.replace("\xa0", " ") for line in textwrap.wrap(text, width, break_on_hyphens=False)] or [""]


def _two_columns(left, right, column=30):
    lines = [(" " * column + line).rstrip() for line in _wrap(right, WIDTH - column)]
    if len(left) + 3 > column:
        return [f"  {left}", *lines]
    return [f"  {left}".ljust(column) + lines[0].lstrip(), *lines[1:]]


# ---- Using and saving a configuration

def to_dict(config):
    """{field: value}, plain values only: for JSON."""
    return dataclasses.asdict(config)


def replace(config, **changes):
    """A checked copy with some fields changed; their source becomes "replace"."""
    opts = options(type(config))
    for name in changes.keys() - opts.keys():
        raise TypeError(f"{type(config).__name__} has no field {name!r}")
    changes = {name: check_value(opts[name], value, name) for name, value in changes.items()}
    sources = {**getattr(config, "config_sources", {}), **dict.fromkeys(changes, "replace")}
    return _build(type(config), {**to_dict(config), **changes}, sources, getattr(config, "config_preset", None),
                  getattr(config, "config_baseline", {name: opt.default for name, opt in opts.items()}))


def asked(config, *names):
    """The flags, as one text, of those options that differ from what defaults and preset say; "" if none does. For options
    that would do nothing beside others: what was asked for is refused, what merely is there is not."""
    baseline = getattr(config, "config_baseline", None) or {name: opt.default for name, opt in options(type(config)).items()}
    return ", ".join("--" + name.replace("_", "-") for name in names if getattr(config, name) != baseline[name])


def differences(config):
    """What differs from the defaults, one line an option: "lr = 3e-05 (command line; default 1e-05)"."""
    sources = getattr(config, "config_sources", {})
    return [f"{name} = {_written(getattr(config, name))} ({sources.get(name, 'set')}; default {_written(opt.default)})"
            for name, opt in options(type(config)).items() if getattr(config, name) != opt.default]


def _written(value):
    return "none" if value is None else _toml(value)


def to_toml(config):
    """The configuration as a TOML file with each option's help; `parse` makes an equal configuration from it."""
    preset, sources = getattr(config, "config_preset", None), getattr(config, "config_sources", {})
    lines = ["# All options of a run. To run it again: --config and the name of this file.", ""]
    lines += [f"preset = {_toml(preset)}", ""] if preset is not None else []
    for heading, members in _by_group(type(config)).items():
        lines += [f"# --- {heading}", ""]
        for opt in members:
            lines += [f"# {line}" for line in _wrap(f"{opt.help} ({_facts(opt)})".strip(), WIDTH - 2)]
            value = getattr(config, opt.name)
            unset_by_default = value is None is opt.default and sources.get(opt.name, "default") == "default"
            lines += [f"# {opt.name} =" if unset_by_default else f"{opt.name} = {_toml(value)}", ""]
    return "\n".join(lines)


def _toml(value):
    if value is None:
        return '"none"'
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):  # a JSON string is a TOML string, save for the DEL character
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def save(config, path):
    """Write `to_toml(config)` whole or not at all: a killed run leaves the old file or the new one, never a half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            file.write(to_toml(config))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
