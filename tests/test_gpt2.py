"""GPT-2 against transformers (the oracle), by hand, and against itself: padding, cache, causality, gradients."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import torch.nn.functional as F

from nanorlhf import hf
from nanorlhf.errors import InputError
from nanorlhf.gpt2 import (SIZES, GPT2, GPT2Config, KVCache, PolicyWithValue, ValueHead, attention_allowed,
                           position_ids)
from nanorlhf.ops import TORCH, Ops

transformers = pytest.importorskip("transformers")

SHAPES = {  # settings of GPT2Config that differ from BASE
    "base": {},
    "n_inner": dict(n_inner=50),
    "odd vocabulary": dict(vocab_size=61),
    "untied": dict(tie_word_embeddings=False),
    "one head, one layer": dict(n_head=1, n_layer=1),
    "gelu, epsilon": dict(activation_function="gelu", layer_norm_epsilon=1e-3),
    "relu": dict(activation_function="relu"),
    "gelu_pytorch_tanh": dict(activation_function="gelu_pytorch_tanh", n_embd=36, n_head=3),
}
BASE = dict(vocab_size=64, n_positions=24, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
LEFT = [[0, 0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1], [1] * 8]
RIGHT = [[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0], [1] * 8]
BOTH = [[0, 0, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1]]
MASKS = {"none": [[1] * 8] * 3, "left": LEFT, "right": RIGHT, "both": BOTH}


def peer(seed=0, cls=None, **changes):
    """A transformers GPT-2 with every parameter random: layer norms and biases would hide faults at their start."""
    torch.manual_seed(seed)
    model = (cls or transformers.GPT2LMHeadModel)(transformers.GPT2Config(**{**BASE, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def peer_logits(model, ids, mask):
    """The oracle does not make positions from the mask in `forward` (only in its `generate`), so they are given."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(ids, attention_mask=mask, position_ids=positions).logits


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    model = GPT2.from_config(GPT2Config(**{**BASE, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(batch, length, vocab=61, seed=1):
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------- parity with transformers

@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_logits_equal_transformers(tmp_path, changes):
    """Float32 within 1e-5 and float64 within 1e-12 on real tokens, for every kind of padding."""
    peer(**changes).save_pretrained(tmp_path)
    ids = tokens(3, 8)
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
        ours = GPT2.from_pretrained(tmp_path, dtype=dtype)
        assert (ours(ids) - theirs(ids).logits).abs().max() <= bound
        for kind, mask in MASKS.items():
            mask = torch.tensor(mask)
            gap = (ours(ids, mask) - peer_logits(theirs, ids, mask)).abs()[mask.bool()]
            assert gap.max() <= bound, (kind, dtype, float(gap.max()))


@pytest.mark.parametrize("changes", [{}, dict(tie_word_embeddings=False, n_inner=40, activation_function="relu")])
def test_gradients_equal_transformers(tmp_path, changes):
    """The gradient of a masked next-token loss, for every parameter, in float64 under padding on both sides."""
    theirs = peer(**changes).double()
    theirs.save_pretrained(tmp_path)
    ours = GPT2.from_pretrained(tmp_path, dtype=torch.float64)
    ids, mask = tokens(3, 8), torch.tensor(BOTH)
    for logits in (ours(ids, mask), peer_logits(theirs, ids, mask)):
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")  # (B, T - 1)
        (losses * (mask[:, 1:] * mask[:, :-1])).sum().backward()
    expected = {name.removeprefix("transformer."): p.grad for name, p in theirs.named_parameters()}
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-10, atol=1e-12, msg=name)


def _unprefixed(model, folder):
    model.transformer.save_pretrained(folder)


def _pickle(model, folder, shards=1, prefix=True):
    """As a 2020 repository: a pickle with the tied head stored and the causal masks as tensors."""
    model.config.save_pretrained(folder)
    state = {name if prefix else name.removeprefix("transformer."): t for name, t in model.state_dict().items()}
    front = "transformer." if prefix else ""
    state[f"{front}h.0.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
    state[f"{front}h.0.attn.masked_bias"] = torch.tensor(-1e4)
    if shards == 1:
        return torch.save(state, folder / "pytorch_model.bin")
    weight_map = {name: f"pytorch_model-0000{1 + i % shards}.bin" for i, name in enumerate(state)}
    for shard in set(weight_map.values()):
        torch.save({name: t for name, t in state.items() if weight_map[name] == shard}, folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(hf.json.dumps({"weight_map": weight_map}))


FORMATS = {
    "single": lambda model, folder: model.save_pretrained(folder),
    "sharded": lambda model, folder: model.save_pretrained(folder, max_shard_size="30KB"),
    "unprefixed": _unprefixed,
    "pickle": _pickle,
    "pickle, unprefixed": lambda model, folder: _pickle(model, folder, prefix=False),
    "pickle, sharded": lambda model, folder: _pickle(model, folder, shards=3),
}


@pytest.mark.parametrize("save", FORMATS.values(), ids=FORMATS)
@torch.no_grad()
def test_every_file_format_loads(tmp_path, save, request):
    if not hf.pickles_are_safe() and "pickle" in request.node.name:
        pytest.skip("pickles are refused before torch 2.10")
    model = peer()
    save(model, tmp_path)
    if save is FORMATS["sharded"]:
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ours, ids = GPT2.from_pretrained(tmp_path), tokens(3, 8)
    assert ours.config.tie_word_embeddings
    assert (ours(ids) - model(ids).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("changes", [{}, dict(tie_word_embeddings=False), dict(n_inner=50, vocab_size=61)])
@torch.no_grad()
def test_saved_folder_loads_in_transformers(tmp_path, changes):
    ours, ids = tiny(**changes), tokens(3, 8)
    ours.save_pretrained(tmp_path)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert (ours(ids) - theirs.eval()(ids).logits).abs().max() <= 1e-5
    again = GPT2.from_pretrained(tmp_path)
    assert torch.equal(again(ids), ours(ids)) and again.config == ours.config
    ends = hf.read_json(tmp_path / "generation_config.json")
    assert ends == {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    with hf.safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert ("lm_head.weight" in file.keys()) == (not ours.config.tie_word_embeddings)
        assert all(name.startswith("transformer.") or name == "lm_head.weight" for name in file.keys())


def test_head_is_tied_or_not_as_the_tensors_say():
    state = tiny().to_state()
    wte = state["transformer.wte.weight"]
    config = GPT2Config(**BASE)

    same, _ = GPT2.from_state(config, {**state, "lm_head.weight": wte.clone()}, "x")
    assert same.config.tie_word_embeddings and same.output_weight is same.wte.weight

    differs, _ = GPT2.from_state(config, {**state, "lm_head.weight": wte + 1}, "x")
    assert not differs.config.tie_word_embeddings and config.tie_word_embeddings  # the caller's config is left alone
    assert torch.equal(differs.output_weight, wte + 1)

    untied = GPT2Config(**BASE, tie_word_embeddings=False)
    kept, _ = GPT2.from_state(untied, {**state, "lm_head.weight": wte.clone()}, "x")
    assert kept.output_weight is not kept.wte.weight
    with pytest.raises(InputError, match="lacks tensor lm_head.weight"):
        GPT2.from_state(untied, state, "x")


def test_vocabulary_comes_from_the_tensor(tmp_path):
    """CodeGPT-small-py has more embedding rows than its config says."""
    model = tiny(vocab_size=67)
    hf.write(tmp_path, model.to_state(), {**model.config.to_dict(), "vocab_size": 64})
    assert GPT2.from_pretrained(tmp_path).config.vocab_size == 67


def test_classifier_hands_back_its_head(tmp_path):
    model = peer(cls=transformers.GPT2ForSequenceClassification, num_labels=1, pad_token_id=0)
    model.save_pretrained(tmp_path)
    config = GPT2Config.from_dict(hf.read_config(tmp_path))
    backbone, rest = GPT2.from_state(config, hf.read_weights(tmp_path), tmp_path)
    assert list(rest) == ["score.weight"] and torch.equal(rest["score.weight"], model.score.weight)
    ids = tokens(2, 6)
    torch.testing.assert_close(backbone.hidden(ids), model.transformer(ids).last_hidden_state, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="score.weight"):
        GPT2.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_load_as_float32_unless_asked(tmp_path, dtype):
    tiny().to(dtype).save_pretrained(tmp_path)
    assert GPT2.from_pretrained(tmp_path).wte.weight.dtype == torch.float32
    model = GPT2.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype} and model(tokens(1, 3)).dtype == dtype


@pytest.mark.parametrize("name, count", [*zip(SIZES, (124_439_808, 354_823_168, 774_030_080, 1_557_611_200))])
def test_released_sizes(name, count):
    """Published parameter counts; on the meta device, where nothing is allocated."""
    with torch.device("meta"):
        assert GPT2(GPT2Config.preset(name)).num_parameters() == count
    assert GPT2Config.preset(name) == GPT2Config.from_dict(
        transformers.GPT2Config(**{f: getattr(GPT2Config.preset(name), f) for f in ("n_embd", "n_layer", "n_head")})
        .to_dict())


# ------------------------------------------------------------------------------------------------------------- by hand

@torch.no_grad()
def test_one_layer_by_hand():
    """C = 2, one head, query and key weights 0 (attention is a plain mean), value and output weights 1, no MLP.

    Token a = (1, -1), token b = (-1/4, 1/4); a layer norm turns them into (1, -1) and (-1, 1).
    Sequence a a b, position 2: mean of values = ((1, -1) + (1, -1) + (-1, 1)) / 3 = (1/3, -1/3);
        x = (-1/4 + 1/3, ...) = (1/12, -1/12) -> norm (1, -1) -> logits: a: 1 + 1 = 2, b: -1/4 - 1/4 = -1/2.
    With the first a masked: the mean is (0, 0), x = (-1/4, 1/4) -> norm (-1, 1) -> logits -2, 1/2.
    Position 0 sees itself alone: x = (2, -2) -> (1, -1) -> logits 2, -1/2.
    """
    model = GPT2.from_config(GPT2Config(vocab_size=2, n_positions=4, n_embd=2, n_layer=1, n_head=1,
                                        layer_norm_epsilon=1e-12))
    model.wte.weight.copy_(torch.tensor([[1.0, -1.0], [-0.25, 0.25]]))
    model.wpe.weight.zero_()
    model.h[0].attn.c_attn.weight.copy_(torch.cat([torch.zeros(2, 4), torch.eye(2)], 1))  # [in, out]: q | k | v
    model.h[0].attn.c_proj.weight.copy_(torch.eye(2))
    model.h[0].mlp.c_proj.weight.zero_()
    ids = torch.tensor([[0, 0, 1]])
    logits = model(ids)
    torch.testing.assert_close(logits[0, 2], torch.tensor([2.0, -0.5]))
    torch.testing.assert_close(logits[0, 0], torch.tensor([2.0, -0.5]))
    torch.testing.assert_close(model(ids, torch.tensor([[0, 1, 1]]))[0, 2], torch.tensor([-2.0, 0.5]))


def test_positions_by_hand():
    """Left pads share position 0 with the first real token; after the last real token the position stays."""
    ids = torch.zeros(2, 5, dtype=torch.long)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert position_ids(ids, mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]
    assert position_ids(ids[:, 3:], mask, past=3).tolist() == [[1, 2], [2, 2]]
    assert position_ids(ids[:, :2], None, past=3).tolist() == [[3, 4]]


def test_allowed_keys_by_hand():
    """Row 0 has one pad on the left, which sees itself alone; nobody else sees it."""
    ids = torch.zeros(1, 3, dtype=torch.long)
    mask = torch.tensor([[0, 1, 1]])
    assert attention_allowed(ids, mask)[0, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert attention_allowed(ids[:, 1:], mask, past=1)[0, 0].int().tolist() == [[0, 1, 0], [0, 1, 1]]
    assert attention_allowed(ids, None) is None and attention_allowed(ids[:, :1], None, past=7) is None
    assert attention_allowed(ids[:, :2], None, past=1)[0, 0].int().tolist() == [[1, 1, 0], [1, 1, 1]]


def test_initialisation():
    """Weights N(0, 0.02); the residual projections N(0, 0.02 / sqrt(2 * 8 layers)) = N(0, 0.005); biases 0, norms 1."""
    torch.manual_seed(0)
    model = GPT2.from_config(GPT2Config(vocab_size=512, n_embd=64, n_layer=8, n_head=4, n_positions=256))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert p.eq(0).all(), name
        elif "ln_" in name:
            assert p.eq(1).all(), name
        else:
            std = 0.005 if "c_proj" in name else 0.02
            assert abs(p.std().item() / std - 1) < 5 / (2 * p.numel()) ** 0.5, name  # 5 standard errors of a std
            assert abs(p.mean().item()) < 5 * std / p.numel() ** 0.5, name


# ------------------------------------------------------------------------------------------------- against itself

@pytest.mark.parametrize("kind", MASKS)
@torch.no_grad()
def test_padding_and_batching_change_nothing(kind):
    """Each row of a padded batch gives the logits that its real tokens give alone, whatever the pads hold."""
    model, ids, mask = tiny(), tokens(3, 8), torch.tensor(MASKS[kind])
    logits = model(ids, mask)
    other = torch.where(mask.bool(), ids, (ids + 7) % 61)
    assert torch.equal(model(other, mask)[mask.bool()], logits[mask.bool()])
    for row, real in enumerate(mask.bool()):
        alone = model(ids[row, real][None])[0]
        torch.testing.assert_close(logits[row, real], alone, rtol=0, atol=2e-6)


def test_masks_of_every_dtype_agree():
    model, ids, mask = tiny(), tokens(3, 8), torch.tensor(BOTH)
    expected = model(ids, mask)
    assert torch.equal(model(ids, mask.bool()), expected) and torch.equal(model(ids, mask.float()), expected)


def test_masked_rows_are_finite_and_leave_no_gradient():
    """A row of pads alone would be a softmax over nothing: NaN, which spreads to every weight through the gradient."""
    model, ids, mask = tiny(), tokens(3, 8), torch.tensor(LEFT)
    mask[1] = 0
    logits = model(ids, mask)
    assert logits.isfinite().all()
    (logits.logsumexp(-1) * mask).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    (model(ids[[0, 2]], mask[[0, 2]]).logsumexp(-1) * mask[[0, 2]]).sum().backward()
    for name, p in model.named_parameters():
        assert grads[name].isfinite().all()
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-5, msg=name)


@torch.no_grad()
def test_causality():
    model, ids = tiny(), tokens(2, 8)
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 61
    for mask in (None, torch.ones_like(ids)):
        before, after = model(ids, mask), model(changed, mask)
        assert torch.equal(before[:, :5], after[:, :5])
        assert (before[:, 5:] - after[:, 5:]).abs().amax((0, 2)).min() > 1e-4  # every later position does see it


@pytest.mark.parametrize("chunks", [(8,), (5, 1, 1, 1), (3, 2, 3), (1,) * 8], ids=str)
@pytest.mark.parametrize("kind", ["no mask", "none", "left", "both"])
@torch.no_grad()
def test_cached_equals_uncached(kind, chunks):
    """In one go, prompt then token by token, and in chunks; with ragged left-padded rows, and holes at the right."""
    model, ids = tiny(), tokens(3, 8)
    mask = None if kind == "no mask" else torch.tensor(MASKS[kind])
    full, cache, pieces = model(ids, mask), model.new_cache(3, max_length=8), []
    for piece in ids.split(chunks, dim=1):
        end = cache.length + piece.size(1)
        pieces.append(model(piece, None if mask is None else mask[:, :end], cache))
        assert cache.length == end
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[real], full[real], rtol=0, atol=2e-6)


@torch.no_grad()
def test_cache_is_written_in_place():
    """A step must not copy the past: the memory stays where it is."""
    model = tiny()
    cache = KVCache(model.config, batch_size=2, max_length=8)
    where = cache.keys.data_ptr(), cache.values.data_ptr()
    for piece in tokens(2, 8).split(1, dim=1):
        model(piece, cache=cache)
    assert (cache.keys.data_ptr(), cache.values.data_ptr()) == where and cache.keys.shape == (2, 2, 4, 8, 8)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.bfloat16, 0.1)])
@torch.no_grad()
def test_the_cache_is_of_the_models_precision(dtype, bound):
    """Attention wants queries, keys and values of one dtype: a float32 cache in a float64 or bfloat16 model is an error."""
    model, ids = tiny().to(dtype), tokens(2, 8)
    cache = model.new_cache(2, 8)
    pieces = [model(piece, cache=cache) for piece in ids.split((5, 3), dim=1)]
    assert cache.keys.dtype == cache.values.dtype == dtype
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids), rtol=0, atol=bound)


def test_dropout_only_in_training():
    model, ids = tiny(), tokens(2, 8)
    assert not model.training and torch.equal(model(ids), model(ids))
    expected = model(ids)
    model.train()
    assert not torch.equal(model(ids), expected)
    still = tiny(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
    assert torch.equal(still(ids), expected)
    for one in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):  # each of the three is really applied
        rest = {name: 0.0 for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop") if name != one}
        assert not torch.equal(tiny(**rest, **{one: 0.5}).train()(ids), expected), one


def test_dropout_is_where_transformers_has_it(tmp_path):
    """Three rates, and from equal generators the same numbers are dropped: of the embeddings, of the attention, and twice in a layer of
    what is written to the residual stream."""
    theirs = peer(embd_pdrop=0.2, attn_pdrop=0.1, resid_pdrop=0.3)
    theirs.save_pretrained(tmp_path)
    ours, ids, logits = GPT2.from_pretrained(tmp_path).train(), tokens(3, 8), []
    for model in (ours, theirs.train()):
        torch.manual_seed(5)
        logits.append(model(ids))
    torch.testing.assert_close(logits[0], logits[1].logits, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- value head

def test_value_head_starts_at_zero_and_learns():
    """V = 0 at the start; dV/dw is the hidden state, dV/db 1, and nothing reaches the transformer through w = 0."""
    model = PolicyWithValue(tiny())
    ids, mask = tokens(3, 8), torch.tensor(LEFT)
    logits, values = model(ids, mask)
    assert values.shape == (3, 8) and values.dtype == torch.float32 and values.eq(0).all()
    assert torch.equal(logits, model.policy(ids, mask))
    values.sum().backward()
    hidden = model.policy.hidden(ids, mask)
    torch.testing.assert_close(model.value_head.weight.grad[0], hidden.sum((0, 1)), rtol=1e-5, atol=1e-4)
    assert model.value_head.bias.grad.item() == 24


def test_values_by_hand():
    """w = (1, -2), b = 0.5: (3, 1) -> 3 - 2 + 0.5 = 1.5."""
    head = ValueHead(2)
    head.weight.data.copy_(torch.tensor([[1.0, -2.0]]))
    head.bias.data.fill_(0.5)
    assert head(torch.tensor([[[3.0, 1.0]]])).tolist() == [[1.5]]


def test_the_value_head_is_where_the_policy_is_and_in_its_mode():
    """On its device, here the one without memory; a policy in training is not taken out of it."""
    with torch.device("meta"):
        policy = GPT2(GPT2Config(**BASE))
    assert policy.training
    model = PolicyWithValue(policy)
    assert model.value_head.weight.device == policy.device == torch.device("meta") and model.training and policy.training
    assert not PolicyWithValue(policy.eval()).training


def test_values_are_float32_under_autocast_and_in_bfloat16():
    ids = tokens(2, 4)
    model = PolicyWithValue(tiny())
    torch.nn.init.normal_(model.value_head.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, values = model(ids)
        hidden = model.policy.hidden(ids)
    assert logits.dtype == torch.float32 and values.dtype == torch.float32
    exact = (hidden.double() @ model.value_head.weight[0].double())
    torch.testing.assert_close(values.double(), exact, rtol=1e-5, atol=1e-5)
    assert model.to(torch.bfloat16)(ids)[1].dtype == torch.float32


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_common_offset_of_the_logits_changes_no_probability_under_autocast(low_memory):
    """The first entry of each embedding is 1 and ln_f's bias there -64, so that all logits lie 64 lower, as GPT-2's do: rounded to bfloat16,
    in steps of 0.25, they would be other logits."""
    ids, found = tokens(2, 6), []
    ops = Ops("torch", low_memory, TORCH.token_logprobs, TORCH.linear_token_logprobs, TORCH.fused_ppo_loss, TORCH.gae)
    for offset in (0.0, -64.0):
        model = tiny()
        with torch.no_grad():
            model.wte.weight[:, 0], model.ln_f.weight[0], model.ln_f.bias[0] = 1.0, 0.0, offset
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found.append(torch.stack(ops.score(model, model.hidden(ids), ids, 1.0)))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-4)
    assert found[0].dtype == torch.float32 and found[0].std() > 0.1


def test_slice_of_positions():
    """start, stop give what the full forward gives there."""
    model = PolicyWithValue(tiny())
    torch.nn.init.normal_(model.value_head.weight)
    ids, mask = tokens(3, 8), torch.tensor(LEFT)
    logits, values = model(ids, mask)
    part_logits, part_values = model(ids, mask, start=4, stop=-1)
    torch.testing.assert_close(part_logits, logits[:, 4:-1], rtol=0, atol=2e-6)
    torch.testing.assert_close(part_values, values[:, 4:-1], rtol=0, atol=2e-6)


@torch.no_grad()
def test_policy_with_value_round_trip(tmp_path):
    model = PolicyWithValue(tiny())
    torch.nn.init.normal_(model.value_head.weight)
    model.save_pretrained(tmp_path)
    again, ids = PolicyWithValue.from_pretrained(tmp_path), tokens(2, 5)
    assert not again.training
    for ours, theirs in zip(again(ids), model(ids)):
        assert torch.equal(ours, theirs)
    assert torch.equal(GPT2.from_pretrained(tmp_path)(ids), model.policy(ids))  # the policy alone loads too
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs(ids).logits, model.policy(ids), rtol=0, atol=1e-5)
    double = PolicyWithValue.from_pretrained(tmp_path, dtype=torch.float64)
    assert double.policy.wte.weight.dtype == torch.float64 and torch.equal(double.value_head.weight, model.value_head.weight)
    (tmp_path / "value_head.safetensors").unlink()
    assert PolicyWithValue.from_pretrained(tmp_path)(ids)[1].eq(0).all()


# -------------------------------------------------------------------------------------------------------------- errors

def test_config_reads_transformers_dicts():
    theirs = transformers.GPT2Config(**BASE, n_inner=50, resid_pdrop=0.3, summary_type="mean").to_dict()
    config = GPT2Config.from_dict(theirs)
    assert (config.n_inner, config.resid_pdrop, config.n_embd) == (50, 0.3, 32)
    assert GPT2Config.from_dict(config.to_dict()) == config
    assert GPT2Config.from_dict({"hidden_size": 32, "num_attention_heads": 4}).n_embd == 32


BAD_CONFIGS = [
    (dict(activation_function="gelu_nwe"), "activation_function 'gelu_nwe'", "did you mean gelu_new"),
    (dict(n_embd=30), "n_embd 30", "n_head 4"),
    (dict(n_layer=0), "n_layer", "0"),
    (dict(vocab_size="64"), "vocab_size", "'64'"),
    (dict(n_inner=-1), "n_inner", "-1"),
    (dict(n_head=True), "n_head", "True"),
    (dict(layer_norm_epsilon=-1e-5), "layer_norm_epsilon", "-1e-05"),
    (dict(initializer_range="0.02"), "initializer_range", "'0.02'"),
    (dict(attn_pdrop=1.0), "attn_pdrop", "below 1"),
    (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx", "not implemented"),
    (dict(reorder_and_upcast_attn=True), "reorder_and_upcast_attn", "not implemented"),
    (dict(scale_attn_weights=False), "scale_attn_weights", "not implemented"),
    (dict(add_cross_attention=True), "add_cross_attention", "not implemented"),
    (dict(quantization_config={"bits": 4}), "quantization_config", "not implemented"),
]


@pytest.mark.parametrize("changes, what, more", BAD_CONFIGS, ids=[next(iter(c)) for c, *_ in BAD_CONFIGS])
def test_bad_config_is_one_line(changes, what, more):
    with pytest.raises(InputError) as caught:
        GPT2Config.from_dict({**BASE, **changes})
    message = str(caught.value)
    assert what in message and more in message and "\n" not in message


def test_unknown_preset():
    with pytest.raises(InputError, match="no GPT-2 preset 'gpt3'; there are gpt2, "):
        GPT2Config.preset("gpt3")


def test_bad_input_is_one_line():
    model, ids = tiny(), tokens(2, 25)
    full = model.new_cache(2, max_length=4)
    cases = [
        (lambda: model(ids), ("25 tokens", "24 positions")),
        (lambda: model(ids[:, :5], cache=full), ("5 tokens", "max_length 4")),
        (lambda: model(ids[0]), ("(B, T)", "(25,)")),
        (lambda: model(ids[:, :5], torch.ones(2, 4)), ("(2, 4)", "(2, 5)")),
        (lambda: model(torch.tensor([[3, 64]])), ("token id 64", "vocabulary of 64")),
        (lambda: model(torch.tensor([[3, -1]])), ("token id -1", "vocabulary of 64")),
    ]
    model(ids[:, :4], cache=model.new_cache(2, 4))
    for call, words in cases:
        with pytest.raises(InputError) as caught:
            call()
        message = str(caught.value)
        assert "\n" not in message and all(word in message for word in words), message
    half = model.new_cache(2, max_length=30)
    with torch.no_grad():
        model(ids[:, :20], cache=half)
        with pytest.raises(InputError, match="25 tokens is longer than the 24"):
            model(ids[:, :5], cache=half)
    assert half.length == 20  # a refused call leaves the cache as it was


def test_query_and_response_may_fill_the_positions():
    """24 tokens have 24 positions, 25 do not."""
    tiny().check_length(24)
    with pytest.raises(InputError, match="come to 25 tokens, more than the 24 positions"):
        tiny().check_length(25)


def test_token_ids_are_looked_at_where_that_is_free():
    """On a CPU alone: elsewhere a look at the ids would wait for the device. The meta device, which has no numbers to look at, stands for
    a GPU. No ids at all are no fault."""
    with torch.device("meta"):
        model, ids = GPT2(GPT2Config(**BASE)), torch.zeros(2, 8, dtype=torch.long)
        assert model.hidden(ids, torch.ones_like(ids)).shape == (2, 8, 32)
    assert tiny()(tokens(2, 0)).shape == (2, 0, 64)


def test_wrong_folder_is_one_line(tmp_path):
    roberta = transformers.RobertaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                                         intermediate_size=8, max_position_embeddings=10)
    transformers.RobertaModel(roberta).save_pretrained(tmp_path)
    with pytest.raises(InputError) as caught:
        GPT2.from_pretrained(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path} holds a model of type roberta; here it must be gpt2")
