"""kernels/linear_logprobs.py against the definition, token_logprobs(hidden @ weight.T, targets, temperature).

Most tests run where the kernels do: on a GPU, or on CPU tensors in Triton's interpreter. The interpreter has to be
chosen before the kernels are imported, so `test_interpreter` runs this file once more in a process of its own. What the
compiler makes of the kernels is in test_kernel_budgets.py.
"""
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from nanorlhf.logprobs import token_logprobs

triton = pytest.importorskip("triton")

from kernels import linear_logprobs as kernel  # noqa: E402
from kernels.linear_logprobs import linear_token_logprobs  # noqa: E402
from kernels.rows import INTERPRETED  # noqa: E402

GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
ROOT = Path(__file__).resolve().parent.parent

runs_kernels = pytest.mark.skipif(not (GPU or INTERPRETED), reason="no GPU; test_interpreter runs this one")
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
per_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda x: str(x)[6:])


def definition(hidden, weight, targets, temperature=1.0):
    return token_logprobs(hidden @ weight.T, targets, temperature)


def problem(N, V, C, dtype=torch.float32, seed=0, size=2.0):
    """hidden (N, C), weight (V, C) whose logits have standard deviation `size`, and targets (N,)."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, C, generator=generator) * size
    weight = torch.randn(V, C, generator=generator) / C ** 0.5
    targets = torch.randint(V, (N,), generator=generator)
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), targets.to(DEVICE)


def upstream(shape, seed=1):
    """Random gradients of the log-probs and the entropy; every third row is masked, which makes both 0."""
    generator = torch.Generator().manual_seed(seed)
    grads = torch.randn(2, *shape, generator=generator).to(DEVICE)
    if shape[-1] > 2:
        grads[..., ::3] = 0
    return grads


def evaluate(function, hidden, weight, targets, temperature=1.0, grads=None):
    """[logprobs, entropy, dhidden, dweight] in float64."""
    hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
    results = function(hidden, weight, targets, temperature)
    grads = upstream(targets.shape) if grads is None else grads
    gradients = torch.autograd.grad(results, (hidden, weight), tuple(g.to(r.dtype) for g, r in zip(grads, results)))
    return [x.detach().double() for x in (*results, *gradients)]


def exact(hidden, weight, targets, temperature=1.0, grads=None):
    return evaluate(definition, hidden.double(), weight.double(), targets, temperature, grads)


def rms(x):
    return x.pow(2).mean().sqrt().item()


def assert_as_good_as_torch(hidden, weight, targets, temperature=1.0):
    """The error against float64 is at most twice that of the definition computed in the inputs' own precision.

    One float32 rounding of the largest logit (or gradient) is free: on few numbers torch may be right by luck.
    """
    reference = exact(hidden, weight, targets, temperature)
    ours = evaluate(linear_token_logprobs, hidden, weight, targets, temperature)
    torchs = evaluate(definition, hidden, weight, targets, temperature)
    largest_logit = (hidden.double() @ weight.double().T).abs().max().item() / temperature
    for name, our, its, right in zip(("logprobs", "entropy", "dhidden", "dweight"), ours, torchs, reference):
        scale = largest_logit if name in ("logprobs", "entropy") else right.abs().max().item()
        assert our.shape == right.shape and our.isfinite().all(), name
        assert rms(our - right) <= 2 * rms(its - right) + 2 ** -24 * scale, name


# --- values and gradients ---------------------------------------------------------------------------------------------


SHAPES = [(1, 7, 5), (33, 257, 64), (70, 1000, 40), (37, 129, 100), (96, 512, 128), (3, 1, 16)]


@runs_kernels
@per_dtype
@pytest.mark.parametrize("N, V, C", SHAPES, ids=str)
def test_values_and_gradients(N, V, C, dtype):
    """Rows, tokens, columns fewer than a block, more, and no multiple; C = 5, 100: rows of no multiple of 16 bytes."""
    assert_as_good_as_torch(*problem(N, V, C, dtype), temperature=0.7)


@runs_kernels
@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_temperature(temperature):
    assert_as_good_as_torch(*problem(40, 300, 32), temperature=temperature)


@runs_kernels
@pytest.mark.parametrize("V", [50257, 151936])
def test_large_vocabularies(V, monkeypatch):
    """In the interpreter, which takes as long for a small tile as for a large one, by larger tiles."""
    if INTERPRETED:
        monkeypatch.setattr(kernel, "tiling", lambda *of, usual=kernel.tiling: usual(*of) | {"BLOCK_V": 4096})
    assert_as_good_as_torch(*problem(2, V, 8, torch.bfloat16))


@runs_kernels
def test_by_hand():
    """hidden (1, 2), weight rows (0, 0), (ln 2, 0), (0, ln 5): logits 0, ln 2, ln 5, so p = 1/8, 2/8, 5/8.

    Target 1: log p = -ln 4. d log p / d logits = (-1/8, 6/8, -5/8), times weight: (6/8 ln 2, -5/8 ln 5).
    dweight = that column times hidden: every row (x, x).
    """
    ln2, ln5 = 0.6931471805599453, 1.6094379124341003
    hidden = torch.tensor([[1.0, 1.0]], device=DEVICE)
    weight = torch.tensor([[0, 0], [ln2, 0], [0, ln5]], device=DEVICE)
    grads = torch.tensor([[1.0], [0.0]], device=DEVICE)
    targets = torch.tensor([1], device=DEVICE)
    logprobs, entropy, dhidden, dweight = evaluate(linear_token_logprobs, hidden, weight, targets, 1.0, grads)
    close = dict(rtol=1e-6, atol=1e-7, check_dtype=False, check_device=False)
    torch.testing.assert_close(logprobs, torch.tensor([-2 * ln2]), **close)
    torch.testing.assert_close(entropy, torch.tensor([(1 * 3 + 2 * 2 + 5 * 3) / 8 * ln2 - 5 / 8 * ln5]), **close)
    torch.testing.assert_close(dhidden, torch.tensor([[6 / 8 * ln2, -5 / 8 * ln5]]), **close)
    torch.testing.assert_close(dweight, torch.tensor([[-1 / 8] * 2, [6 / 8] * 2, [-5 / 8] * 2]), **close)


@runs_kernels
@pytest.mark.parametrize("level", [-115.0, -1e4, 1e4])
def test_logits_far_from_zero(level):
    """Logits level + k / 512, exact in float32, so that nothing but the softmax can lose digits: it must not.

    A running maximum that begins at 0 makes the log-probs of -115 infinite; rounding level * log2(e), to 2^-11 at 1e4,
    shows in the fourth digit.
    """
    steps = torch.randint(4096, (300,), generator=torch.Generator().manual_seed(0)) / 512
    hidden, weight = torch.zeros(20, 8, device=DEVICE), torch.zeros(300, 8, device=DEVICE)
    hidden[:, 0], weight[:, 0] = 1, level + steps
    targets = torch.arange(20, device=DEVICE)
    ours, reference = evaluate(linear_token_logprobs, hidden, weight, targets), exact(hidden, weight, targets)
    for our, right, tolerance in zip(ours, reference, (4e-6, 4e-6, 2 ** -20 * abs(level), 4e-6)):
        torch.testing.assert_close(our, right, rtol=0, atol=tolerance)  # dhidden sums dlogits * level, which cancel


@runs_kernels
def test_logits_spread_wide():
    """Logits from -1e4 to 1e4: every probability is 0 or 1, every result finite, and what is 0 stays 0."""
    hidden, weight, targets = problem(20, 300, 16, size=3000)
    logprobs, entropy, dhidden, dweight = ours = evaluate(linear_token_logprobs, hidden, weight, targets)
    reference = exact(hidden, weight, targets)
    assert logprobs.min() < -1e4
    for our, right in zip(ours, reference):
        assert our.isfinite().all()
        torch.testing.assert_close(our, right, rtol=1e-5, atol=1e-5)


@runs_kernels
@per_dtype
@pytest.mark.parametrize("gap", [6.0, 10.0, 14.0, 60.0])
def test_a_probability_near_one_keeps_its_gradient(gap, dtype):
    """Target logit `gap`, the 299 others 0: 1 - p is about 299 e^-gap, at gap 14 2.5e-4: in bfloat16, p would be 1.

    With hidden = 1 and C = 1 (padded to 8 columns by zeros) dweight is dlogits: g (1 - p) at the target, -g e^-gap
    elsewhere. float32 rounds mass = 1 + 299 e^-gap by at most 1.2e-7, and that is all the error there is; at gap 60
    the others still have their e^-60.
    """
    hidden, weight = (torch.zeros(rows, 8, device=DEVICE, dtype=dtype) for rows in (1, 300))
    hidden[0, 0], weight[170, 0] = 1, gap
    targets, grads = torch.tensor([170], device=DEVICE), torch.tensor([[2.0], [0.0]], device=DEVICE)
    ours = evaluate(linear_token_logprobs, hidden, weight, targets, 1.0, grads)
    right = exact(hidden, weight, targets, 1.0, grads)
    for i in (0, 1):
        torch.testing.assert_close(ours[i], right[i], rtol=1e-5, atol=2e-7)
    rounding = max(torch.finfo(dtype).eps, 1e-5)
    smallest = 0 if dtype != torch.float16 else 2 ** -24
    torch.testing.assert_close(ours[3][170], right[3][170], rtol=rounding, atol=max(3e-7, smallest))
    torch.testing.assert_close(ours[3][:170], right[3][:170], rtol=rounding, atol=smallest)


@runs_kernels
@pytest.mark.parametrize("which", [0, 1], ids=["logprobs", "entropy"])
def test_one_result_alone(which):
    """The other one's upstream gradient is then None, and this one's an expanded scalar."""
    hidden, weight, targets = problem(40, 300, 32)
    gradients = []
    for function, kind in ((linear_token_logprobs, torch.float32), (definition, torch.float64)):
        inputs = [x.to(kind).requires_grad_() for x in (hidden, weight)]
        gradients.append(torch.autograd.grad(function(*inputs, targets)[which].sum(), inputs))
    for our, right in zip(*gradients):
        torch.testing.assert_close(our.double(), right, rtol=1e-5, atol=1e-5)


@runs_kernels
@per_dtype
def test_masked_rows_are_exactly_zero(dtype):
    """Upstream gradients of 0: no gradient in that row's hidden state, and none of it in weight."""
    hidden, weight, targets = problem(40, 300, 32, dtype)
    grads = upstream((40,))
    dhidden, dweight = evaluate(linear_token_logprobs, hidden, weight, targets, 1.0, grads)[2:]
    assert (dhidden[::3] == 0).all() and (dhidden[1::3] != 0).any(1).all()
    hidden[::3] = 7
    assert torch.equal(evaluate(linear_token_logprobs, hidden, weight, targets, 1.0, grads)[3], dweight)
    for gradient in evaluate(linear_token_logprobs, hidden, weight, targets, 1.0, torch.zeros_like(grads))[2:]:
        assert (gradient == 0).all()


@runs_kernels
def test_strides_and_batch_dimensions():
    """Sliced hidden states (B, T, C) and targets and a transposed weight give what copies give; nothing is changed."""
    hidden, weight, targets = problem(4 * 11, 300, 32)
    hidden, targets = hidden.view(4, 11, 32)[:, :-1], targets.view(4, 11)[:, 1:]
    weight = weight.T.contiguous().T
    assert not (hidden.is_contiguous() or weight.is_contiguous() or targets.is_contiguous())
    before = [x.clone() for x in (hidden, weight, targets)]
    grads = upstream((4, 10)).transpose(1, 2).contiguous().transpose(1, 2)
    ours = evaluate(linear_token_logprobs, hidden, weight, targets, 1.0, grads)
    inputs = (x.contiguous() for x in (hidden, weight, targets))
    copies = evaluate(linear_token_logprobs, *inputs, 1.0, grads.contiguous())
    for our, copy, right in zip(ours, copies, exact(hidden, weight, targets, 1.0, grads)):
        assert our.shape == right.shape and torch.equal(our, copy)
        torch.testing.assert_close(our, right, rtol=1e-5, atol=1e-5)
    assert all(map(torch.equal, before, (hidden, weight, targets)))


@runs_kernels
@pytest.mark.parametrize("stride", [lambda x: torch.stack([x, x + 1], 1)[:, 0], lambda x: x[:1].expand(6)], ids=["slice", "expanded"])
def test_targets_of_any_stride(stride):
    """Every second target of a list, or one for all rows: the kernel used to read the numbers that lie between or behind."""
    hidden, weight, targets = problem(6, 300, 32)
    strided = stride(targets)
    assert not strided.is_contiguous()
    for ours, copy in zip(*(evaluate(linear_token_logprobs, hidden, weight, x) for x in (strided, strided.clone()))):
        assert torch.equal(ours, copy)


@runs_kernels
def test_no_rows():
    hidden, weight, targets = problem(0, 300, 32)
    hidden, targets = hidden.view(2, 0, 32), targets.view(2, 0)
    logprobs, entropy, dhidden, dweight = evaluate(linear_token_logprobs, hidden, weight, targets)
    assert logprobs.shape == entropy.shape == (2, 0) and dhidden.shape == hidden.shape
    assert dweight.shape == weight.shape and (dweight == 0).all()


@runs_kernels
def test_reruns_are_identical_to_the_bit():
    inputs = problem(70, 1000, 40, torch.bfloat16)
    first, second = (evaluate(linear_token_logprobs, *inputs) for _ in range(2))
    assert all(map(torch.equal, first, second))


@runs_kernels
def test_autocast():
    """float32 parameters under bfloat16 autocast: the factors are rounded, as those of hidden @ weight.T are."""
    hidden, weight, targets = problem(40, 300, 32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        ours = evaluate(linear_token_logprobs, hidden, weight, targets)
    rounded = evaluate(linear_token_logprobs, hidden.bfloat16(), weight.bfloat16(), targets)
    assert all(map(torch.equal, ours, rounded))


# --- memory -----------------------------------------------------------------------------------------------------------


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest number of elements of any float tensor that an operation returns (the interpreter copies bytes)."""
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.numel = max(self.numel, x.numel())
        return result


@runs_kernels
@pytest.mark.parametrize("N, V", [(200, 515), (64, 1001)])
def test_no_tensor_of_rows_times_vocabulary(N, V):
    """Neither pass makes a tensor of even half of N x V elements, though all would fit BUFFER; the definition does."""
    inputs = problem(N, V, 8)
    sizes = {}
    for function in (linear_token_logprobs, definition):
        with Largest() as largest:
            evaluate(function, *inputs)
        sizes[function] = largest.numel
    assert sizes[linear_token_logprobs] < N * V / 2 and sizes[definition] >= N * V


def test_the_buffer_is_bounded_whatever_the_problem():
    """At most BUFFER entries and the rest of a block, whole blocks wide, and at GPT-2's V never a third of (N, V)."""
    for N in (1, 100, 512, 4095, 4096, 8192, 10 ** 6):
        for V in (7, 257, 50257, 151936, 10 ** 6):
            rows, columns = kernel.buffer_shape(N, V, 256)
            assert 0 < rows <= N and columns % 256 == 0
            assert rows * columns <= kernel.BUFFER + 256 * rows
            assert V < 50257 or rows * columns < N * V / 3


@runs_kernels
@per_dtype
def test_waves_and_chunks(monkeypatch, dtype):
    """A buffer of 32 x 256 for 100 x 1000 logits, four waves by four chunks, gives the gradients of one wave's."""
    inputs = problem(100, 1000, 40, dtype)
    whole = evaluate(linear_token_logprobs, *inputs)
    monkeypatch.setattr(kernel, "WAVE", 32)
    monkeypatch.setattr(kernel, "BUFFER", 32 * 256)
    shapes = []
    monkeypatch.setattr(kernel, "write_dlogits", lambda dlogits, *rest, write=kernel.write_dlogits: (
        shapes.append(tuple(dlogits.shape)), write(dlogits, *rest)))
    parts = evaluate(linear_token_logprobs, *inputs)
    assert len(shapes) == 16 and shapes[0] == (32, 256) and shapes[-1] == (4, 232)
    tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps  # the last rounding may go the other way
    for part, one in zip(parts, whole):
        torch.testing.assert_close(part, one, rtol=tolerance, atol=1e-5)


@runs_kernels
def test_many_small_terms_add_up(monkeypatch):
    """1024 equal rows in 32 waves: a bfloat16 running sum stops growing at 2^8 of its terms, a float32 one does not."""
    monkeypatch.setattr(kernel, "WAVE", 32)
    hidden = torch.ones(1024, 8, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.zeros(16, 8, device=DEVICE, dtype=torch.bfloat16)
    targets = torch.zeros(1024, dtype=torch.int64, device=DEVICE)
    grads = torch.stack([torch.ones(1024), torch.zeros(1024)]).to(DEVICE)
    dweight = evaluate(linear_token_logprobs, hidden, weight, targets, 1.0, grads)[3]
    assert (dweight[0] == 1024 * 15 / 16).all() and (dweight[1:] == -1024 / 16).all()


# --- bad input --------------------------------------------------------------------------------------------------------


@runs_kernels
def test_a_target_outside_the_vocabulary_gives_nan():
    hidden, weight, _ = problem(4, 300, 32)
    targets = torch.tensor([-100, 0, 300, 2 ** 32], device=DEVICE)
    logprobs, entropy = linear_token_logprobs(hidden, weight, targets)
    assert logprobs.isnan().tolist() == [True, False, True, True] and entropy.isfinite().all()


@pytest.mark.parametrize("change, message", [
    (dict(targets=torch.zeros(3, dtype=torch.int64)), r"hidden \(4, 8\), weight \(9, 8\) and targets \(3,\) do not"),
    (dict(weight=torch.zeros(9, 7)), "do not fit"),
    (dict(weight=torch.zeros(9, 8, 1)), "do not fit"),
    (dict(weight=torch.zeros(0, 8)), "empty"),
    (dict(weight=torch.zeros(9, 8).half()), "hidden is torch.float32, weight torch.float16"),
    (dict(hidden=torch.zeros(4, 8).double(), weight=torch.zeros(9, 8).double()), "want both float32, bfloat16 or"),
    (dict(targets=torch.zeros(4, dtype=torch.int32)), "targets are torch.int32: want int64"),
    (dict(weight=torch.zeros(9, 8, device="meta")), "move them together"),
    (dict(temperature=0.0), "temperature must be above 0"),
])
def test_bad_input(change, message):
    good = dict(hidden=torch.zeros(4, 8), weight=torch.zeros(9, 8), targets=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=message):
        linear_token_logprobs(**(good | change))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_cpu_tensors_are_refused():
    with pytest.raises(ValueError, match="the kernels take CUDA tensors, not cpu ones"):
        linear_token_logprobs(torch.zeros(4, 8), torch.zeros(9, 8), torch.zeros(4, dtype=torch.int64))


# --- how the work is cut ----------------------------------------------------------------------------------------------


def test_rows_are_made_whole_groups():
    """Of 16 entries at aligned addresses: as they are if they are so, else a copy with zeros after each row."""
    x = torch.randn(3, 32)
    assert kernel.in_groups(x) is x
    for odd in (torch.randn(3, 5), torch.randn(3 * 32 + 1)[1:].view(3, 32)):
        whole = kernel.in_groups(odd)
        assert whole.shape[1] % 16 == 0 and whole.data_ptr() % 16 == 0 and whole.is_contiguous()
        torch.testing.assert_close(whole[:, :odd.shape[1]], odd, rtol=0, atol=0)
        assert not whole[:, odd.shape[1]:].any()


def test_splits_fill_the_processors():
    """64 row blocks x 197 tiles on 132 processors: 2 splits of 99 tiles leave 4 idle and take 99 tiles' time; 33 splits
    of 6 tiles are 16 full rounds of programs, 96 tiles' time, where 64 * 197 / 132 = 95.5 is the least."""
    assert kernel.split_length(64, 197, 132) == 6
    for row_blocks, tiles in ((1, 1), (1, 197), (4, 197), (500, 197), (64, 1), (64, 22)):
        length = kernel.split_length(row_blocks, tiles, 132)
        splits = -(-tiles // length)
        assert 1 <= length <= tiles and splits <= kernel.MAX_SPLITS
        assert -(-row_blocks * splits // 132) * length <= tiles * max(1, row_blocks / 132) * 2


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@needs_gpu
@per_dtype
@pytest.mark.parametrize("N, V, C", [(1000, 50257, 768), (300, 151936, 1024), (513, 50304, 100)], ids=str)
def test_sizes_of_real_models(N, V, C, dtype):
    assert_as_good_as_torch(*problem(N, V, C, dtype, size=4.0))


@needs_gpu
def test_more_than_2_to_the_31_logits():
    """60000 x 50257 logits: the last rows and columns are found where a 32-bit offset would have wrapped."""
    hidden, weight, targets = problem(60_000, 50257, 64, torch.bfloat16)
    targets[-8:] = 50256
    grads = torch.zeros(2, 60_000, device=DEVICE)
    grads[:, -8:] = 1
    ours = evaluate(linear_token_logprobs, hidden, weight, targets, 1.0, grads)
    right = exact(hidden[-8:], weight, targets[-8:], 1.0, grads[:, -8:])
    for our, its, tolerance in zip((*(x[-8:] for x in ours[:3]), ours[3]), right, (1e-4, 1e-4, 2e-2, 2e-2)):
        torch.testing.assert_close(our, its, rtol=tolerance, atol=tolerance)


@needs_gpu
def test_peak_memory():
    """At the peak of both passes there are, beside the results, the buffer, float32 dhidden, a chunk of dweight and
    little else: a fifth of the logits in bfloat16, of which the definition needs several copies in float32."""
    N, V, C = 8192, 50257, 768
    hidden, weight, targets = problem(N, V, C, torch.bfloat16)
    grads = upstream((N,))
    hidden.requires_grad_()
    weight.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = linear_token_logprobs(hidden, weight, targets)
    gradients = torch.autograd.grad(results, (hidden, weight), tuple(grads))
    extra = torch.cuda.max_memory_allocated() - before - sum(x.numel() * x.element_size() for x in gradients)
    rows, columns = kernel.buffer_shape(N, V, 256)
    expected = rows * columns * 2 + N * C * 4 + columns * C * 4
    assert extra < 1.1 * expected + 2 ** 24 and extra < 0.2 * N * V * 2


# --- without a GPU ----------------------------------------------------------------------------------------------------


OLD_INTERPRETER = triton.__version__ < "3.7" and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
@pytest.mark.skipif(OLD_INTERPRETER, reason="Triton 3.6's interpreter reads loop bounds in a way NumPy 2.4 forbids")
def test_interpreter():
    """Every test above that does not need a GPU, in Triton's interpreter on the CPU."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore", str(Path(__file__))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 50, done.stdout[-3000:]
