"""Hugging Face folders: where a name leads, what is read, and that no write is left half done.

Damaged files of every kind: tests/test_bad_input.py.
"""

import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from nanorlhf import hf
from nanorlhf.errors import InputError

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.tensor([1.0, 2.0])}
CONFIG = {"model_type": "gpt2"}
ROOT = Path(hf.__file__).parents[1]


safe_pickles = pytest.mark.skipif(not hf.pickles_are_safe(), reason="pickles are refused before torch 2.10")


def message(call, *args, **kwargs):
    """The one line that a bad input is answered with."""
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600
    return text


def model_folder(folder, tensors=TENSORS):
    hf.write(folder, tensors, CONFIG)
    return folder


def assert_same(found, expected=TENSORS):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# ------------------------------------------------------------------------------------------------------------- resolve

def test_local_folder_and_run_folder(tmp_path):
    model = model_folder(tmp_path / "model")
    assert hf.resolve(model) == hf.resolve(str(model)) == model
    final = model_folder(tmp_path / "run" / "final")
    (tmp_path / "run" / "config.json").write_text("{}")  # a run's own settings do not make it a model
    assert hf.resolve(tmp_path / "run") == final
    (final / "tokenizer.json").write_text("{}")
    assert hf.resolve(tmp_path / "run", what="tokenizer") == final
    model_folder(model / "final")
    assert hf.resolve(model) == model  # what is a model itself stands for itself


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model_folder(tmp_path / "m")
    assert hf.resolve("~/m") == tmp_path / "m"


def test_what_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model_folder(Path("runs/sft"))
    Path("empty").mkdir()
    Path("notes.txt").write_text("")
    text = message(hf.resolve, "runs/stf")
    assert "no folder runs/stf" in text and "did you mean runs/sft" in text and str(tmp_path) in text
    assert "check the path" in message(hf.resolve, "./nowhere/at/all")
    assert "notes.txt is a file" in message(hf.resolve, "notes.txt")
    assert "it holds nothing" in message(hf.resolve, "empty")
    text = message(hf.resolve, "runs/sft", what="tokenizer")
    assert "not a tokenizer folder" in text and "vocab.json" in text and "config.json, model.safetensors" in text
    assert "'my model'" in message(hf.resolve, "my model")


ASK_TWICE = """
import os
from nanorlhf import hf
for _ in range(2):
    try:
        print(hf.resolve("gpt2"))
    except hf.InputError as error:
        print(error)
    os.rename("filled", "hub")
"""


def test_offline_says_what_was_looked_for_where(tmp_path):
    """A fresh process, since huggingface_hub reads its variables once: first the cache is empty, then it holds gpt2."""
    repo = tmp_path / "filled" / "models--gpt2"
    model_folder(repo / "snapshots" / "0123abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123abc")
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    env.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", ASK_TWICE], env=env, cwd=tmp_path, text=True, capture_output=True)
    refused, found = done.stdout.splitlines()
    assert all(part in refused for part in ("no model 'gpt2'", str(tmp_path / "hub"), "HF_HUB_OFFLINE is set"))
    assert found == str(tmp_path / "hub" / "models--gpt2" / "snapshots" / "0123abc")


class Hub:
    """A stand-in for the Hub: `snapshot_download` copies the files whose names match, and notes what it was asked."""

    def __init__(self, folder, files):
        self.folder, self.files, self.patterns = folder, files, []

    def snapshot_download(self, name, allow_patterns, ignore_patterns):
        from fnmatch import fnmatch
        self.patterns.append(allow_patterns)
        for file in self.files:
            if any(fnmatch(file, p) for p in allow_patterns) and not any(fnmatch(file, p) for p in ignore_patterns):
                self.folder.mkdir(exist_ok=True)
                (self.folder / file).write_text("{}")
        return str(self.folder)


@pytest.mark.parametrize("files, wanted", [
    (["config.json", "model.safetensors", "pytorch_model.bin", "tf_model.h5", "merges.txt", "onnx/config.json"],
     {"config.json", "model.safetensors", "merges.txt"}),
    (["config.json", "pytorch_model.bin", "flax_model.msgpack"], {"config.json", "pytorch_model.bin"}),
    (["config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json"],
     {"config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json"}),
])
def test_download_takes_safetensors_and_pickles_only_without(tmp_path, monkeypatch, files, wanted):
    import huggingface_hub
    hub = Hub(tmp_path / "hub", files)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: None)
    folder = hf.resolve("somebody/model")
    assert {path.name for path in folder.iterdir()} == wanted


def test_download_faults_are_one_line(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants, errors
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(tmp_path / "hub", ["config.json"]).snapshot_download)
    assert "holds no model files" in message(hf.resolve, "somebody/model")

    def failing(kind):
        def snapshot_download(*args, **kwargs):
            raise kind.__new__(kind)  # their constructors want a response of the HTTP library at hand
        return snapshot_download

    for kind, words in ((errors.RepositoryNotFoundError, "knows no such name"), (errors.GatedRepoError, "terms"),
                        (errors.LocalEntryNotFoundError, "check the network"), (ConnectionError, "check the network")):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(kind))
        text = message(hf.resolve, "somebody/model")
        assert words in text and str(tmp_path) in text and "'somebody/model'" in text


def test_half_a_cached_snapshot_is_not_taken(tmp_path, monkeypatch):
    """A download that broke off left the index and one of two shards: ask the Hub again."""
    import huggingface_hub
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    sharded(snapshot)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(snapshot / file))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    assert hf.resolve("somebody/model") == snapshot
    (snapshot / "m2.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(tmp_path / "n", ["config.json", "model.safetensors"])
                        .snapshot_download)
    assert hf.resolve("somebody/model") == tmp_path / "n"


# ---------------------------------------------------------------------------------------------------------------- read

def test_write_then_read(tmp_path):
    model_folder(tmp_path / "new" / "folder")
    assert_same(hf.read_weights(tmp_path / "new" / "folder"))
    assert hf.read_config(tmp_path / "new" / "folder") == CONFIG


@safe_pickles
def test_safetensors_come_before_pickles(tmp_path):
    torch.save({"old": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert_same(hf.read_weights(tmp_path), {"old": torch.zeros(1)})
    model_folder(tmp_path)
    assert_same(hf.read_weights(tmp_path))


def sharded(folder, weight_map=None):
    """a.weight in m1, a.bias in m2; `weight_map` may say something else."""
    safetensors.torch.save_file({"a.weight": TENSORS["a.weight"]}, folder / "m1.safetensors")
    safetensors.torch.save_file({"a.bias": TENSORS["a.bias"]}, folder / "m2.safetensors")
    weight_map = {"a.weight": "m1.safetensors", "a.bias": "m2.safetensors"} if weight_map is None else weight_map
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards(tmp_path):
    sharded(tmp_path)
    assert_same(hf.read_weights(tmp_path))


def raw_safetensors(header, data=b"\0" * 8):
    header = header.encode()
    return struct.pack("<Q", len(header)) + header + data


ENTRY = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


def test_sound_files_pass(tmp_path):
    """Also the header whose length, 640 bytes, starts like a pickle: 80 02."""
    header = '{"a":%s}' % ENTRY
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw_safetensors(header + " " * (640 - len(header))))
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert_same(hf.read_weights(tmp_path), {"a": torch.zeros(2)})


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil-was-here",)


@safe_pickles
def test_pickles_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    assert "may run code" in message(hf.read_weights, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Evil()}, protocol=2))
    assert "may run code" in message(hf.read_weights, tmp_path)
    assert not (tmp_path / "evil-was-here").exists()


def test_pickles_need_a_torch_that_reads_them_safely(tmp_path, monkeypatch):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    text = message(hf.read_weights, tmp_path)
    assert "torch >= 2.10" in text and "2.9.1" in text and "convert" in text
    monkeypatch.setattr(torch, "__version__", "2.10.0a0+git12")
    assert_same(hf.read_weights(tmp_path))


@safe_pickles
def test_convert_writes_safetensors(tmp_path):
    tied = torch.randn(3, 2)
    torch.save({"wte": tied, "head": tied, "t": tied.t()}, tmp_path / "pytorch_model.bin")
    done = subprocess.run([sys.executable, "-m", "nanorlhf.hf", "convert", str(tmp_path)], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.stdout.strip() == str(tmp_path / "model.safetensors") and done.returncode == 0
    assert_same(hf.read_tensors(tmp_path / "model.safetensors"), {"wte": tied, "head": tied, "t": tied.t()})


def test_a_byte_order_mark_is_read_over(tmp_path):
    """As Windows editors write it."""
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf{}")
    assert hf.read_config(tmp_path) == {}


def test_model_type():
    hf.check_model_type({"model_type": "gpt2"}, ("gpt2",), "x")
    hf.check_model_type({"architectures": ["GPT2LMHeadModel"]}, ("gpt2",), "x")  # as in 2019
    hf.check_model_type({}, ("gpt2",), "x")
    hf.check_model_type({"model_type": "bert"}, ("roberta", "bert"), "x")
    for config in ({"model_type": "llama"}, {"architectures": ["llamaForCausalLM"]}):
        assert message(hf.check_model_type, config, ("roberta", "bert"), "x").startswith(
            "x holds a model of type llama")


# --------------------------------------------------------------------------------------------------------------- check

def test_strip_prefix():
    found = hf.strip_prefix({"transformer.a": 1, "score.weight": 2}, "transformer.", "x")
    assert found == {"a": 1, "score.weight": 2}
    assert "tensor a is there twice" in message(hf.strip_prefix, {"t.a": 1, "a": 2}, "t.", "x")


def test_load_into_converts_and_copies():
    module = torch.nn.Linear(3, 2)
    given = {"weight": torch.ones(2, 3, dtype=torch.float16), "bias": torch.zeros(2)}
    hf.load_into(module, given, "x")
    assert module.weight.dtype == torch.float32 and module.weight.eq(1).all()
    given["bias"].fill_(7)
    assert module.bias.eq(0).all()  # the module owns its memory


BAD_TENSORS = {
    "missing": (dict(bias=None), "x lacks tensor bias"),
    "all missing": (dict(bias=None, weight=None), "x lacks tensors weight, bias"),
    "unexpected": (dict(other=torch.zeros(1)), "x has unexpected tensor other"),
    "many": ({f"t{i}": torch.zeros(1) for i in range(9)}, "x has unexpected tensors t0, t1, t2 and 6 more"),
    "shape": (dict(weight=torch.zeros(3, 2)), "weight has shape (3, 2), the model of its config.json needs (2, 3)"),
    "NaN": (dict(bias=torch.tensor([0.0, float("nan")])), "tensor bias holds NaN or infinity"),
    "infinity": (dict(bias=torch.tensor([0.0, float("-inf")]).half()), "tensor bias holds NaN or infinity"),
    "int8": (dict(weight=torch.zeros(2, 3, dtype=torch.int8)), "tensor weight is torch.int8"),
    "float8": (dict(weight=torch.zeros(2, 3).to(torch.float8_e4m3fn)), "tensor weight is torch.float8_e4m3fn"),
}


@pytest.mark.parametrize("changes, words", BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_bad_tensors_are_named_and_nothing_is_copied(changes, words):
    module = torch.nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    tensors = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2), **changes}
    assert words in message(hf.load_into, module, {k: t for k, t in tensors.items() if t is not None}, "x")
    assert_same(module.state_dict(), before)


# --------------------------------------------------------------------------------------------------------------- write

def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    """The disk fills up half way: the old weights stay, and nothing half-written is left."""
    model_folder(tmp_path)

    def full_disk(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError):
        hf.write(tmp_path, {"b": torch.zeros(9)}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert_same(hf.read_weights(tmp_path))
    assert hf.read_config(tmp_path) == CONFIG


def test_files_are_on_the_disk_before_they_have_their_names(tmp_path, monkeypatch):
    """Weights, then config.json: each is flushed and then renamed, so that a crash leaves the old file or the new one."""
    events, fsync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: events.append("fsync") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda old, new: events.append(Path(new).name) or rename(old, new))
    model_folder(tmp_path)
    assert events == ["fsync", "model.safetensors", "fsync", "config.json"]


def test_write_leaves_other_files_and_takes_any_tensor(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    odd = {"transposed": torch.arange(6.0).view(2, 3).t(), "parameter": torch.nn.Parameter(torch.ones(2)),
           "half": torch.ones(2, dtype=torch.bfloat16)}
    model_folder(tmp_path, odd)
    assert_same(hf.read_weights(tmp_path), odd)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
