"""What the compiler makes of the kernels, on any machine: bench/kernel_report.py compiles their launches for GPUs that
need not be there. No spills, rows read and written 16 bytes a thread, registers and shared memory within budgets.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

triton = pytest.importorskip("triton")

OLD_INTERPRETER = triton.__version__ < "3.7" and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4)
ROOT = Path(__file__).resolve().parent.parent
V = 50257  # odd: the width for which a compiler left alone moves 2 bytes at a time
PARTS = [(case, *where, V) for where, cases in {
    (90, "bfloat16"): ("token_logprobs", "fused_ppo_loss", "exact_kl", "fused_dpo_loss", "linear_token_logprobs"),
    (80, "bfloat16"): ("token_logprobs", "fused_ppo_loss", "exact_kl", "linear_token_logprobs"),
    (90, "float32"): ("token_logprobs", "fused_ppo_loss", "exact_kl", "gae", "linear_token_logprobs"),
    (80, "float32"): ("linear_token_logprobs",)}.items() for case in cases]

# Registers a thread. A multiprocessor has 65536: programs of 8 warps run three at a time with 80, two with 128, one
# with 255.
REGISTERS = {
    "bfloat16": {"forward_kernel": 80, "backward_kernel": 80, "scale_kernel": 80, "kl_forward_kernel": 80,
                 "kl_backward_kernel": 80, "pair_kernel": 80, "merge_kernel": 80, "ppo_kernel": 255,
                 "statistics_kernel": 255, "dlogits_kernel": 255},
    "float32": {"forward_kernel": 128, "backward_kernel": 128, "scale_kernel": 80, "kl_forward_kernel": 128,
                "kl_backward_kernel": 80, "gae_kernel": 128, "merge_kernel": 80, "ppo_kernel": 128,
                "statistics_kernel": 255, "dlogits_kernel": 255}}
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one program may have
MULTIPLIES = {("bfloat16", 90): "wgmma.mma_async", ("bfloat16", 80): "mma.sync"}

# (wide loads, wide stores) at least: a thread's share of a tile of a row, in bfloat16; in float32 twice as many.
WIDE = {"forward_kernel": (4, 0), "backward_kernel": (4, 4), "scale_kernel": (4, 4), "kl_forward_kernel": (4, 0),
        "kl_backward_kernel": (4, 4), "ppo_kernel": (25, 25)}
LOOPED = {"ppo_kernel": (16, 8)}  # a float32 row does not fit the registers: two loops read it, one writes


@pytest.fixture(scope="module")
def compiled():
    done = subprocess.run([sys.executable, __file__], cwd=ROOT, capture_output=True, text=True, timeout=600,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)
    assert {row["kernel"] for row in rows} == set(REGISTERS["bfloat16"]) | set(REGISTERS["float32"])
    return rows


def named(row):
    return f"{row['kernel']} of {row['case']}, {row['precision']}, sm_{row['architecture']}: {row}"


def test_no_spills(compiled):
    """A spilled register is two trips through memory in the innermost loop."""
    for row in compiled:
        assert row["spilled"] == 0, named(row)


def test_registers_and_shared_memory_within_budget(compiled):
    """Several programs side by side fill the memory's pipeline; only matrix kernels share more than partial sums."""
    for row in compiled:
        assert row["registers"] <= REGISTERS[row["precision"]][row["kernel"]], named(row)
        alone = row["kernel"] in ("statistics_kernel", "dlogits_kernel")
        assert row["shared"] <= (SHARED[row["architecture"]] if alone else 8192), named(row)


def test_rows_move_16_bytes_at_a_time(compiled):
    """Beside a tile's wide loads and stores there are few narrow ones, for the edges and the row's own numbers. Two
    bytes at a time, each wide one would be eight."""
    seen = set()
    for row in compiled:
        if row["kernel"] in WIDE:
            loads, stores = WIDE[row["kernel"]]
            if row["precision"] == "float32":
                loads, stores = LOOPED.get(row["kernel"], (2 * loads, 2 * stores))
            assert row["wide_loads"] >= loads and row["wide_stores"] >= stores, named(row)
            assert row["narrow_loads"] <= 8 and row["narrow_stores"] <= 9, named(row)
            seen.add(row["kernel"])
    assert seen == set(WIDE)


def test_products_run_on_the_tensor_cores(compiled):
    """In 16 bits wgmma on Hopper, fed by descriptors, and mma before it; in float32 multiply-adds: no TF32."""
    for row in compiled:
        if row["kernel"] in ("statistics_kernel", "dlogits_kernel"):
            here = row["precision"], row["architecture"]
            tensor_cores = {MULTIPLIES[here]} if here in MULTIPLIES else set()
            assert row["words"].keys() - {"fma.rn.f32"} == tensor_cores, named(row)
            assert (row["tiles_loaded"] > 0) == (here == ("bfloat16", 90)), named(row)


@pytest.mark.skipif(OLD_INTERPRETER, reason="Triton 3.6's interpreter reads loop bounds in a way NumPy 2.4 forbids")
def test_the_benchmark_checks_its_cases_anywhere():
    """`bench/kernels.py --smoke`: every case, ours and the definition, right against float64; other libraries, where
    they are installed and run here, are only reported."""
    done = subprocess.run([sys.executable, "bench/kernels.py", "--smoke"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count(", ours: ") == done.stdout.count(", torch, eager: ") == 3 * 11


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_says_that_it_needs_a_gpu():
    done = subprocess.run([sys.executable, "bench/kernels.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout.count("\n") == 1 and "no CUDA device" in done.stdout


if __name__ == "__main__":
    from bench.kernel_report import report
    print(json.dumps([row for part in PARTS for row in report(*part)]))
