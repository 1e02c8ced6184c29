"""Options that several scripts share; each script's Config adds its own below these. No torch here: `--help` is quick."""
from dataclasses import dataclass

from nanorlhf.config import option
from nanorlhf.data import FORMATS
from nanorlhf.errors import InputError


@dataclass
class RunOptions:
    """Where and on what a script runs."""
    out: str = option("runs/run", "run folder: config, log, checkpoints, results, plots", group="Run", metavar="FOLDER")
    overwrite: bool = option(False, "replace the run that --out holds")
    seed: int = option(0, "seed of everything random", at_least=0, at_most=2**32 - 1)
    gpu: int | None = option(None, "run on this GPU; without it CUDA is taken if there, else the CPU", at_least=0)
    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda"))
    precision: str = option("fp32", "bf16 runs matrix products in bfloat16; weights, logits and losses stay float32",
                         choices=("fp32", "bf16"))
    dry_run: bool = option(False, "try one step of every phase on a few rows (one epoch of them for a stage that is missing), say how "
                          "much memory it took, and keep nothing")
    debug: bool = option(False, "show the traceback of every error")


@dataclass
class TrainOptions(RunOptions):
    """What a training writes on its way."""
    resume: bool = option(False, "go on with the interrupted run in --out, from its newest good checkpoint, to the same end; with "
                          "--overwrite too: if its options are these, else replace it")
    allow_config_change: bool = option(False, "resume although options differ from the run's")
    generation_batch_size: int = option(256, "prompts answered at once; fewer need less memory, and draw other samples", at_least=1)
    save_steps: int = option(100, "write checkpoints/step-N every so many steps; 0: only where a signal ends the run", at_least=0)
    keep_checkpoints: int = option(2, "how many checkpoints/step-N to keep", at_least=1)


@dataclass
class KernelOptions:
    """Who computes log-probs and losses from logits."""
    kernels: str = option("auto", "triton | torch; auto: Triton on a CUDA device where it is installed", group="Kernels",
                          choices=("auto", "triton", "torch"))
    low_memory: bool = option(False, "compute the logits a few rows or tiles at a time, twice: memory no longer depends on the vocabulary")


@dataclass
class SandboxOptions:
    """Where generated code runs, to see whether it does what it should: rows with checks (nano has them) are judged so."""
    sandbox: str = option("auto", "auto: run code where system calls can be walled off; require: only behind every wall; weak: behind "
                          "what there is; off: run none", group="Sandbox", choices=("auto", "require", "weak", "off"))
    sandbox_workers: int = option(2, "codes that run at once", at_least=1, at_most=256)
    sandbox_timeout: float = option(1.0, "seconds a code may take", at_least=0.01)


SANDBOX = tuple(SandboxOptions.__dataclass_fields__)  # their names


@dataclass
class DataOptions:
    """What is trained on, and how a prompt becomes a query."""
    data: str = option("nano", "nano (embedded), conala, or a file or folder (see data/README.md)", group="Data", metavar="PATH")
    data_format: str = option("auto", "format of the file; auto recognises it by its columns", choices=FORMATS)
    validation: float = option(0.1, "share of rows split off for validation where the data has no such split", above=0, below=1)
    test: float = option(0.1, "share of rows split off for the test where the data has no such split", above=0, below=1)
    split_seed: int = option(0, "seed of these splits; every stage of a pipeline must use the same", at_least=0)
    min_probability: float | None = option(None, "add CoNaLa's mined rows of at least this probability to the training rows",
                                         at_least=0, at_most=1)
    max_rows: int = option(0, "use only the first so many rows of each split; 0: all", at_least=0)
    skip_bad_rows: bool = option(False, "leave faulty rows out, and say which, instead of stopping")
    allow_overlap: bool = option(False, "train although training and held-out rows overlap")
    template: str = option("{prompt}\n", "how a prompt becomes the query that the policy continues", group="Text")
    max_query: int = option(64, "longest query in tokens; a longer one loses its beginning, and is counted", at_least=1)
    max_response: int = option(32, "longest response in tokens, EOS included", at_least=1)

    def check(self):
        if "{prompt}" not in self.template:
            raise InputError(f"--template {self.template!r} has no {{prompt}}; write for example '{{prompt}}\\n'")


def flags(values):
    """{option: value} as command-line words; what is off or unset is left out."""
    words = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words += [flag] if value else []
        elif value is not None:
            words.append(f"{flag}={value}")
    return words


def data_flags(config):
    """The data options as command-line words, for a stage that must see the same rows and queries."""
    return flags({name: getattr(config, name) for name in DataOptions.__dataclass_fields__})
