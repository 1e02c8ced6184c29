"""Hugging Face folders: find or download, read, check, map names, write.

A folder here is what transformers writes: config.json beside model.safetensors (whole or in shards) or, in older ones,
pytorch_model.bin. The models (`gpt2`, `encoder`) know their own tensor names; this room knows files and mistrusts them:

    folder = resolve("gpt2")                     # local folder, then the Hugging Face cache, then a download
    config = read_config(folder)
    tensors = read_weights(folder)               # name -> tensor, as stored
    load_into(module, tensors, folder)           # strict: names, shapes, no NaN
    write(folder, tensors, config)               # transformers loads what is written here

Every fault is an `InputError` of one line that names the file or tensor and the way out. Pickles (.bin) are read with
`weights_only=True` alone, and only on torch >= 2.10, since a crafted file gets past it in earlier releases
(CVE-2026-24747); `python -m nanorlhf.hf convert FOLDER` turns them into safetensors.
"""

import json
import math
import os
import pickle
import re
import struct
import sys
from collections import Counter
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from .errors import InputError, impostor, nearest

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                "pytorch_model.bin.index.json")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")
MAX_HEADER = 100_000_000  # bytes; the safetensors library's own limit
MAX_SIZE = 10_000_000  # of one dimension in a config.json: beyond it products of two overflow, and no model is near
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# What an unpickler meets in a damaged file is interpreted as it comes: nearly every error is possible.
UNPICKLING = (RuntimeError, EOFError, OSError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ArithmeticError,
              MemoryError, struct.error)


# ---------------------------------------------------------------------------------------------------- find or download

def resolve(folder_or_name, what="model"):
    """The folder that `folder_or_name` means: a local folder, else one in the Hugging Face cache, else a download.

    A run folder (runs/ppo) stands for its final/ subfolder. `what` is "model" (config.json and weights) or "tokenizer".
    `HF_HOME`, `HF_HUB_OFFLINE`, `HF_TOKEN` work as everywhere, since huggingface_hub does the cache and the download.

    Returns: Path. Raises InputError, saying what was looked for and where, when nothing is found.
    """
    name = str(folder_or_name)
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):  # os.path's say no, where Path's raise, to a name that is too long
        return _local(path, what)
    if os.path.exists(path):
        raise InputError(f"{name} is a file; a {what} is a folder: name the folder that holds it")
    if _is_path(name):
        close = nearest(path.name, [p.name for p in path.parent.iterdir()], 0.6) if os.path.isdir(path.parent) else None
        hint = f"; did you mean {path.parent / close}?" if close else "; check the path"
        raise InputError(f"no folder {_short(name, 200)} to read a {what} from (looked in {path.parent.absolute()}){hint}")
    _check_hub_name(name)
    return _cached(name, what) or _download(name, what)


def _local(path, what):
    for folder in (path, path / "final"):
        if _holds(folder, what):
            return folder
    wanted = "tokenizer.json, vocab.json or vocab.txt" if what == "tokenizer" else "config.json and weights"
    names = sorted(p.name for p in path.iterdir())
    found = (", ".join(names[:6]) + (", ..." if len(names) > 6 else "")) or "nothing"
    raise InputError(f"{path} is not a {what} folder: it needs {wanted}, here or in final/; it holds {found}")


def _holds(folder, what):
    if what == "tokenizer":
        return any((folder / name).is_file() for name in TOKENIZER_FILES)
    return (folder / "config.json").is_file() and _weight_file(folder) is not None


def _weight_file(folder):
    return next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)


def _is_path(name):
    """Whether `name` can only be a path: absolute, dotted, too deep for a repository name, or inside a folder here."""
    parent = Path(name).parent
    return (name.startswith(("/", "~", ".")) or name.count("/") > 1 or "\\" in name
            or (parent != Path(".") and os.path.isdir(parent)))


def _check_hub_name(name):
    from huggingface_hub import errors, utils
    try:
        utils.validate_repo_id(name)
    except errors.HFValidationError:
        raise InputError(f"no folder {name!r} in {Path.cwd()}, and the Hugging Face Hub has no such names; "
                         "they look like gpt2 or microsoft/codebert-base") from None


def _cached(name, what):
    """The snapshot of `name` in the Hugging Face cache, or None where it is absent or incomplete."""
    from huggingface_hub import try_to_load_from_cache
    files = [try_to_load_from_cache(name, file) for file in
             (TOKENIZER_FILES if what == "tokenizer" else ("config.json",))]
    folders = [Path(file).parent for file in files if isinstance(file, str)]
    return next((folder for folder in folders if _holds(folder, what) and _shards_present(folder)), None)


def _shards_present(folder):
    """False where a download broke off between the shards that its index names."""
    path = _weight_file(folder)
    return path is None or not path.name.endswith(".index.json") or all(
        (folder / str(shard)).is_file() for shard in _weight_map(path).values())


def _download(name, what):
    from huggingface_hub import constants, errors, snapshot_download
    patterns = ["*.json", "*.txt"] + ([] if what == "tokenizer" else ["model*.safetensors"])
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
        if what != "tokenizer" and not _holds(folder, what):  # an older repository: pickles only
            snapshot_download(name, allow_patterns=["pytorch_model*"], ignore_patterns=["*/*"])
    # The bases of HfHubHTTPError are the errors of the HTTP library, which changed with huggingface_hub's version.
    except (OSError, errors.EntryNotFoundError, *errors.HfHubHTTPError.__bases__) as error:
        raise InputError(
            f"no {what} {name!r}: no such folder in {Path.cwd()}, not in the Hugging Face cache "
            f"{constants.HF_HUB_CACHE}, and {_why_no_download(error, constants.HF_HUB_OFFLINE)}") from error
    if not _holds(folder, what):
        raise InputError(f"{name!r} on the Hugging Face Hub holds no {what} files (downloaded to {folder})")
    return folder


def _why_no_download(error, offline):
    from huggingface_hub import errors
    if offline:
        return "HF_HUB_OFFLINE is set: unset it to download, or name a local folder"
    if isinstance(error, errors.GatedRepoError):
        return "the Hub asks for its terms to be accepted on the model's page: accept them and set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the Hub knows no such name (or it is private: set HF_TOKEN)"
    return f"the download failed ({type(error).__name__}): check the network, or name a local folder"


# ---------------------------------------------------------------------------------------------------------------- read

def read_config(folder):
    """config.json of `folder` as a dict."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} has no config.json: it is not a Hugging Face model folder")
    return read_json(path)


def check_model_type(config, wanted, source):
    """Raise unless config.json is of one of the architectures `wanted`, such as ("gpt2",).

    Files from 2019 carry no `model_type`; there the class names in `architectures` decide, and with neither the tensor
    names do when the weights are loaded.
    """
    found = config.get("model_type")
    name = _class_name(config) if found is None else ""
    if found in wanted or found is None and (not name or name.startswith(tuple(wanted))):
        return
    raise InputError(f"{source} holds a model of type {name if found is None else found}; here it must be {' or '.join(wanted)}: "
                     "name the folder of such a model")


def is_model_type(config, name):
    """Whether config.json is of the architecture `name`, by its `model_type` or, where it has none, its `architectures`."""
    return config.get("model_type") == name or config.get("model_type") is None and _class_name(config).startswith(name)


def _class_name(config):
    """The first name in `architectures`, such as gpt2lmheadmodel, or ""."""
    classes = config.get("architectures")
    return str(classes[0]).lower() if isinstance(classes, list) and classes else ""


def read_weights(folder):
    """All tensors of `folder` by name, on the CPU and in the dtype they are stored in.

    Reads the first there is of model.safetensors, its shards, pytorch_model.bin, its shards.
    """
    folder = Path(folder)
    path = _weight_file(folder)
    if path is None:
        raise InputError(f"{folder} has no weights: looked for {', '.join(WEIGHT_FILES)}; name another folder")
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    return read_tensors(path)


def read_tensors(path):
    """The tensors of one .safetensors or .bin file by name."""
    path = Path(path)
    return _read_pickle(path) if path.suffix == ".bin" else _read_safetensors(path)


def _read_safetensors(path):
    if wrong := sniff(path):
        raise InputError(f"{path} is {wrong}")
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, TypeError, RuntimeError, AttributeError) as error:  # the last: dtypes torch does not know
        raise InputError(f"{path} is a damaged safetensors file ({_reason(error)}): get it again") from error


def _weight_map(index_path):
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index_path} has no weight_map from tensor names to shards: get it again")
    return weight_map


def _read_shards(index_path):
    weight_map = _weight_map(index_path)
    tensors, owner = {}, {}
    for shard in sorted(set(map(str, weight_map.values()))):
        if not shard or Path(shard).name != shard or "\\" in shard or shard == "..":
            raise InputError(f"{index_path} names the shard {shard!r}: a shard must lie in the same folder; mend the index")
        if not (index_path.parent / shard).is_file():
            raise InputError(f"{index_path} names the shard {shard}, which is missing: get that file too")
        for name, tensor in read_tensors(index_path.parent / shard).items():
            if name in tensors:
                raise InputError(f"{index_path.parent}: tensor {name} is in two shards, {owner[name]} and {shard}: get both again")
            tensors[name], owner[name] = tensor, shard
    for name, shard in weight_map.items():
        if owner.get(name) != shard:
            raise InputError(f"{index_path} puts tensor {name} in {shard}, which does not hold it: get both again")
    return tensors


def pickles_are_safe():
    """Whether this torch's `weights_only=True` keeps what it promises: from 2.10 on (CVE-2026-24747)."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)


def _read_pickle(path):
    if wrong := _not_weights(_head(path)):
        raise InputError(f"{path} is {wrong}")
    if not pickles_are_safe():
        raise InputError(f"{path} is a pickle, which torch {torch.__version__} cannot read safely: use torch >= 2.10, "
                         "or convert it to safetensors elsewhere (python -m nanorlhf.hf convert FOLDER)")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is refused: it is not a plain pickle of tensors and may run code "
                         f"({_reason(error)}): get safetensors of it, from whom you trust") from error
    except UNPICKLING as error:
        raise InputError(f"{path} is damaged or cut short ({_reason(error)}): get it again") from error
    if not isinstance(tensors, dict) or not all(_is_plain(tensor) for tensor in tensors.values()):
        raise InputError(f"{path} holds no flat dictionary of tensors: save model.state_dict(), not more")
    return {str(name): tensor for name, tensor in tensors.items()}


def _reason(error):
    """A library's error on one short line; of torch's page on unpickling, what it is about."""
    about = re.search(r"(?:WeightsUnpickler error: |Trying to )([^\n]+)", str(error))
    text = about[1] if about else str(error).strip() or type(error).__name__
    return _short(text.splitlines()[0].split(". ")[0], 120)


def _is_plain(value):
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def read_json(path):
    """The JSON object in a file, as a dict; whatever else the file holds is an InputError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        value = "text that is not UTF-8"
    except RecursionError:
        value = "JSON nested too deeply"
    except ValueError as error:  # malformed, or an integer of thousands of digits
        line = f" (line {error.lineno}: {error.msg})" if isinstance(error, json.JSONDecodeError) else ""
        value = f"not valid JSON{line}"
    if isinstance(value, str):
        wrong = _not_weights(_head(path)) or f"{value}: mend it, or get it again"
        raise InputError(f"{path} is {wrong}")
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, not {type(value).__name__}: get it again")
    return value


def sniff(path):
    """What is wrong with a .safetensors file, as "a git-LFS pointer: ...", or None where its header is sound.

    The format: 8 bytes n, little endian; n bytes of JSON {name: {dtype, shape, data_offsets}}; the data. The library
    says "header too large" to everything else and takes the last of two equal names, so the header is read here.
    """
    size, head = path.stat().st_size, _head(path)
    if wrong := _not_weights(head):
        return wrong
    if head[8:9] != b"{" and head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return ("a PyTorch pickle under another name: rename it to pytorch_model.bin, then "
                "python -m nanorlhf.hf convert FOLDER")
    length = struct.unpack("<Q", head[:8])[0] if size >= 8 else 0
    if not 2 <= length <= min(size - 8, MAX_HEADER):
        return f"not a safetensors file, or cut short ({size} bytes): get it again"
    with path.open("rb") as file:
        header = file.read(8 + length)[8:]
    try:
        pairs = json.loads(header, object_pairs_hook=lambda pairs: pairs)
        names = [name for name, _ in pairs]
        end = max((int(dict(entry)["data_offsets"][1]) for name, entry in pairs if name != "__metadata__"), default=0)
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
        return "not a safetensors file (its header is not the JSON it should be): get it again"
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        return f"damaged: tensor {twice} is in it twice: get it again"
    if size < (promised := 8 + length + end):
        return f"cut short: {size} bytes where its header promises {promised}: get it again"
    return None


def _head(path):
    with path.open("rb") as file:
        return file.read(64)


def _not_weights(head):
    """Name the usual impostors by their first bytes."""
    return impostor(head) if head else "empty: get it again"


# --------------------------------------------------------------------------------------------------------------- check

def strip_prefix(tensors, prefix, source):
    """`tensors` with `prefix` ("transformer.") cut off the names that have it; other names stay as they are.

    transformers writes a bare backbone without the prefix and a backbone with a head with it. One file has one of both.
    """
    stripped = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(prefix)
        if short in stripped:
            raise InputError(f"{source}: tensor {short} is there twice, with and without the prefix {prefix!r}: remove one")
        stripped[short] = tensor
    return stripped


def load_into(module, tensors, source):
    """Copy `tensors` into `module`, converting to the dtype and device of its parameters.

    Strict: raises InputError naming the tensors when some are missing, unexpected, of another shape or dtype kind, or
    hold NaN or infinity. Nothing is copied then. `source` (a folder) is for the messages. A module on the meta device gets
    its memory on the CPU, but only once all fits: a config.json cannot ask for more than its weights fill.
    """
    wanted = module.state_dict()
    _refuse(source, "lacks", [name for name in wanted if name not in tensors])
    _refuse(source, "has unexpected", [name for name in tensors if name not in wanted])
    for name, target in wanted.items():
        tensor = tensors[name]
        if tensor.shape != target.shape:
            raise InputError(f"{source}: tensor {name} has shape {tuple(tensor.shape)}, the model of its config.json needs "
                             f"{tuple(target.shape)}: the two files must belong together")
        if tensor.dtype not in FLOATS and target.is_floating_point():
            raise InputError(f"{source}: tensor {name} is {tensor.dtype}: quantised weights cannot be trained; get float ones")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{source}: tensor {name} holds NaN or infinity: the file is damaged, or training diverged; take "
                             "another checkpoint, or get it again")
    if any(parameter.is_meta for parameter in module.parameters()):
        module.to_empty(device="cpu")
    module.load_state_dict(tensors)


def check_layers(tensors, prefix, promised, source):
    """InputError unless the tensors `prefix`0..., `prefix`1... are of as many layers as config.json promised. To be asked
    before a model is built: building a billion layers does not end."""
    layer = re.compile(re.escape(prefix) + r"(\d{1,6})\.")
    held = 1 + max((int(found[1]) for name in tensors if (found := layer.match(name))), default=-1)
    if held != promised:
        raise InputError(f"{source}: its config.json is of {promised} layers, its weights hold {held}: take both from one model")


def check_sizes(settings, names, what):
    """InputError unless all of these settings are whole numbers of a size that a model can have."""
    for name in names:
        value = getattr(settings, name)
        if type(value) is not int or not 0 < value <= MAX_SIZE:
            raise InputError(f"{what} config: {name} must be a positive integer, not {_shown(value)}, and at most {MAX_SIZE:,}: "
                             "correct it")


def check_numbers(settings, names, what, below=math.inf):
    """InputError unless all of these settings are numbers at least 0 and below a bound."""
    for name in names:
        value = getattr(settings, name)
        if type(value) not in (int, float) or not 0 <= value < below:
            bound = "" if below == math.inf else f" and below {below}"
            raise InputError(f"{what} config: {name} must be a number, at least 0{bound}, not {_shown(value)}: correct it")


def _shown(value):
    return _short(repr(value)) if type(value) is not int or abs(value) < 2 ** 64 else "an integer beyond 64 bits"


def _short(text, most=60):
    return text if len(text) <= most else text[:most - 3] + "..."


def _refuse(source, verb, names):
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise InputError(f"{source} {verb} {'tensor' if len(names) == 1 else 'tensors'} {', '.join(names[:3])}{more}: "
                         "it is of another architecture, or its config.json is of another model")


# --------------------------------------------------------------------------------------------------------------- write

def write(folder, tensors, config):
    """Write model.safetensors and config.json into `folder` (made where absent); other files there stay.

    Each file is written beside its place, flushed to the disk and renamed: a crash leaves the old file or the new one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", tensors)
    text = json.dumps(config, indent=2) + "\n"
    _replace(folder / "config.json", lambda path: path.write_text(text, encoding="utf-8"))


def write_tensors(path, tensors):
    """Write one safetensors file. The metadata says "pt", without which transformers refuses it."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _replace(Path(path), lambda beside: safetensors.torch.save_file(tensors, beside, metadata={"format": "pt"}))


def _replace(path, writer):
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        writer(beside)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def convert(folder):
    """Write model.safetensors beside the pytorch_model.bin of `folder`; returns its path."""
    path = Path(folder) / "model.safetensors"
    if not path.exists():
        # clone: tied tensors share memory in a pickle, which safetensors refuses
        write_tensors(path, {name: tensor.clone() for name, tensor in read_weights(folder).items()})
    return path


def main(words):
    """python -m nanorlhf.hf convert FOLDER; returns the exit code: 0, 1 where the disk failed, 2 for bad input."""
    try:
        if len(words) != 2 or words[0] != "convert":
            raise InputError("write python -m nanorlhf.hf convert FOLDER")
        print(convert(words[1]))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
