"""What can be known of the kernels without a GPU: what they compile to, and how exact they are.

    python bench/kernel_report.py --report docs/KERNELS.md            both tables, into the file, between their markers
    python bench/kernel_report.py --only compiled --report docs/KERNELS.md      with another Triton: its table beside

Compiled, ahead of time: the public functions of kernels/ run forward and backward on small CPU tensors, and each
launch is replaced by a compilation for the GPU asked for. So what is compiled, down to the alignments that Triton may
assume of the arguments, is what a GPU would get. The assembly says how it moves data; NVIDIA's cuobjdump, which comes
with Triton, what it needs. tests/test_kernel_budgets.py reads the same rows.

Exact: the cases of bench/kernels.py in Triton's interpreter, in float32, values and gradients against the definitions
in float64, beside the error of the same definitions in float32.
"""
import argparse
import collections
import contextlib
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import kernels
from bench.kernels import CASES as TIMED
from bench.kernels import checked, generator
from kernels import advantages, linear_logprobs, rows
from kernels.rows import INTERPRETED

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
VOCABULARIES = (50257, 50304, 151936)
PRECISIONS = ("bfloat16", "float32")
ARCHITECTURES = (80, 90)
ROWS = 16  # a multiple of 16, which is all that the compiler learns of a number of rows


# --- what is launched -------------------------------------------------------------------------------------------------


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device, requires_grad=dtype.is_floating_point)


def run_logprobs(dtype, V):
    logprobs, entropy = kernels.token_logprobs(zeros(ROWS, V, dtype=dtype), zeros(ROWS, dtype=torch.int64), 0.7)
    (logprobs + entropy).sum().backward()


def run_ppo(dtype, V):
    """Every option on; the 2 makes the backward scale the gradient."""
    tokens = zeros(4, ROWS).detach()
    loss, _ = kernels.fused_ppo_loss(zeros(ROWS, V, dtype=dtype), zeros(ROWS, dtype=torch.int64), *tokens[:3], 0.7,
                                     dual_clip=3.0, ref_logprobs=tokens[3], kl_coef=0.1, entropy_coef=0.01)
    (2 * loss).backward()


def run_kl(dtype, V):
    kernels.exact_kl(*zeros(2, ROWS, V, dtype=dtype), 0.7).sum().backward()


def run_dpo(dtype, V):
    sides, tokens = zeros(2, 2, ROWS, V, dtype=dtype), zeros(2, ROWS, dtype=torch.int64)
    kernels.fused_dpo_loss(*sides, tokens, tokens, tokens, tokens, zeros(2), zeros(2))[0].backward()


def run_gae(dtype, V):
    rewards, values = zeros(2, ROWS, advantages.BLOCK).detach()
    kernels.gae(rewards, values, torch.ones(rewards.shape, dtype=torch.bool), last_values=rewards[:, 0])


def run_linear(dtype, V):
    """Of real size, on a device without memory: how the vocabulary is split depends on the size."""
    hidden, weight = zeros(8192, 768, dtype=dtype, device="meta"), zeros(V, 768, dtype=dtype, device="meta")
    logprobs, entropy = kernels.linear_token_logprobs(hidden, weight, zeros(8192, dtype=torch.int64, device="meta"))
    (logprobs + entropy).sum().backward()


CASES = {"token_logprobs": run_logprobs, "fused_ppo_loss": run_ppo, "exact_kl": run_kl, "fused_dpo_loss": run_dpo,
         "gae": run_gae, "linear_token_logprobs": run_linear}


class Driver:
    """What Triton asks the driver before it compiles. The architecture's number stands for the device's."""

    def __init__(self, architecture):
        self.architecture = architecture

    def get_current_device(self):
        return self.architecture

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)


@contextlib.contextmanager
def compiling(architecture):
    """What is launched inside is compiled for sm_`architecture` instead: {id: (kernel's name, compiled kernel)}."""
    found = {}

    def launcher(function, grid):
        def compile_it(*args, **options):
            compiled = function.warmup(*args, grid=grid, **options)
            found[id(compiled)] = function.__name__, compiled
        return compile_it

    with contextlib.ExitStack() as stack:
        stack.callback(triton.runtime.driver.set_active, triton.runtime.driver._active)
        triton.runtime.driver.set_active(Driver(architecture))
        patches = [(JITFunction, "__getitem__", launcher),
                   (linear_logprobs, "gpu", lambda device: (architecture // 10, 132)),
                   (torch, "is_autocast_enabled", lambda device: False)]  # it refuses the device "meta"
        patches += [(room, "check_device", lambda tensor: None) for room in (rows, advantages, linear_logprobs)]
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        yield found


# --- what became of it ------------------------------------------------------------------------------------------------


def read(compiled):
    """Of a compiled kernel: registers a thread, bytes spilled, bytes of shared memory, instructions that matter.

    Spilled: the frame of a thread's own memory, where registers that do not fit are put. Wide loads and stores move 16
    bytes a thread; on the way to shared memory they are called cp.async. Tiles go by descriptor, at any width.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        usage = subprocess.check_output([TOOLS / "cuobjdump", "-res-usage", path], text=True)
    registers, frame = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    code = compiled.asm["ptx"]
    moves = collections.Counter()
    for kind, vector, bits in re.findall(r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b", code):
        moves[kind, int(vector or 1) * int(bits) == 128] += 1
    for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global [^;]*?\], 0x(\w+)", code):
        moves["ld", int(size, 16) == 16] += 1
    words = collections.Counter(re.findall(r"\b(wgmma\.mma_async|mma\.sync|fma\.rn\.f32)\b", code))
    return {"warps": compiled.metadata.num_warps, "registers": registers, "spilled": frame,
            "shared": compiled.metadata.shared, "wide_loads": moves["ld", True], "narrow_loads": moves["ld", False],
            "wide_stores": moves["st", True], "narrow_stores": moves["st", False],
            "tiles_loaded": len(re.findall(r"cp\.async\.bulk\.tensor\S*\.shared\S*\.global", code)),
            "tiles_stored": len(re.findall(r"cp\.async\.bulk\.tensor\S*\.global\.shared", code)),
            "words": dict(words)}


def report(case, architecture, precision, V):
    """A row for each kernel that one case launches."""
    with compiling(architecture) as found:
        CASES[case](getattr(torch, precision), V)
    about = {"case": case, "architecture": architecture, "precision": precision, "V": V}
    return [{**about, "kernel": name, **read(compiled)} for name, compiled in found.values()]


# --- the table --------------------------------------------------------------------------------------------------------


def shapeless(case):
    """Does it compile to the same whatever V is?"""
    return case in ("gae", "linear_token_logprobs")


def every():
    """All that there is to compile, each thing once."""
    for case in CASES:
        for precision in PRECISIONS[-1:] if case == "gae" else PRECISIONS:
            for V in VOCABULARIES[:1] if shapeless(case) else VOCABULARIES:
                for architecture in ARCHITECTURES:
                    yield case, architecture, precision, V


def cells(row):
    moves = []
    for kind, tiles in (("loads", row["tiles_loaded"]), ("stores", row["tiles_stored"])):
        moves.append((f"{tiles} tiles + " if tiles else "") + f"{row[f'wide_{kind}']} + {row[f'narrow_{kind}']}")
    return str(row["registers"]), str(row["spilled"]), f"{row['shared']:,}", *moves


def table(found):
    """Markdown: GPUs share a line, and so do vocabularies for which nothing differs."""
    columns = collections.defaultdict(dict)
    for row in found:
        columns[row["case"], row["kernel"], row["precision"], row["V"], row["warps"]][row["architecture"]] = cells(row)
    lines = collections.defaultdict(list)
    for (case, kernel, precision, V, warps), by_gpu in columns.items():
        pairs = [" / ".join(dict.fromkeys(pair)) for pair in zip(*(by_gpu[gpu] for gpu in ARCHITECTURES))]
        lines[case, f"`{kernel}`", precision, str(warps), *pairs].append("any" if shapeless(case) else str(V))
    head = ["called by", "kernel", "precision", "V", "warps", "registers", "spilled, B", "shared, B",
            "loads: 16 B + narrower", "stores: 16 B + narrower"]
    out = ["| " + " | ".join(head) + " |", "|---" * 4 + "|---:" * (len(head) - 4) + "|"]
    out += ["| " + " | ".join([*key[:3], ", ".join(widths), *key[3:]]) + " |" for key, widths in lines.items()]
    return "\n".join(out)


# --- accuracy ---------------------------------------------------------------------------------------------------------


DRAWS = {7: 32, 1000: 32, 50257: 4}  # of random inputs: a loss is one number a draw, which either side may hit by luck


def accuracy(N=16):
    """Markdown: our relative error against float64 and, in brackets, how many times torch's it is; mean squares."""
    head = [f"V = {V}" for V in DRAWS]
    lines = ["| case | result | " + " | ".join(head) + " |", "|---|---|" + "---:|" * len(head)]
    for case in TIMED:
        found = collections.defaultdict(list)
        for V, draws in DRAWS.items():
            squares = collections.defaultdict(lambda: [0, 0])
            for draw in range(draws):
                inputs = case.inputs(N, V, torch.float32, generator("cpu", seed=V + 1000 * draw))
                for side, function in enumerate((case.ours, case.definition)):
                    for name, error in checked(case, function, None, inputs, N).items():
                        squares[name][side] += error**2 / draws
            for name, (ours, its) in squares.items():
                found[name].append(f"{ours**.5:.1e} ({(ours / its)**.5:.1f})" if its else f"{ours**.5:.1e} (torch: 0)")
        lines += [f"| {case.name} | {name} | {' | '.join(errors)} |" for name, errors in found.items()]
    return "\n".join(lines)


def show(name, text, path):
    """Print text, and write it between the lines <!-- name --> and <!-- /name --> of the file, if one is given."""
    print(text)
    if path:
        if f"<!-- {name} -->" not in path.read_text("utf-8"):
            raise SystemExit(f"{path}: no lines <!-- {name} --> and <!-- /{name} --> to write this between; add them")
        before, rest = path.read_text("utf-8").split(f"<!-- {name} -->\n")
        after = rest.split(f"<!-- /{name} -->")[1]
        path.write_text(f"{before}<!-- {name} -->\n{text}\n<!-- /{name} -->{after}", "utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="Markdown file to write the tables into")
    parser.add_argument("--only", choices=("compiled", "accuracy"), help="one of the two tables")
    arguments = parser.parse_args()
    if arguments.only != "accuracy":
        found = [row for part in every() for row in report(*part)]
        versions = f"Triton {triton.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
        show(f"compiled by Triton {triton.__version__.rpartition('.')[0]}", f"{versions}.\n\n{table(found)}", arguments.report)
    if arguments.only != "compiled":
        if INTERPRETED:
            return show("accuracy", accuracy(), arguments.report)
        command = [sys.executable, __file__, "--only", "accuracy"]
        command += ["--report", arguments.report] if arguments.report else []
        subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)


if __name__ == "__main__":
    main()
