"""`python -m tests.backends.cross_compile`: compile every kernel for GPUs that need not be there.

The launchers run on meta tensors while a recorder stands in for the launch: what is compiled is what would have been
launched, specialised as it would have been. For each kernel, configuration and architecture the table gives registers
a thread, bytes of local memory (spills) and bytes of shared memory; the exit code is 1 where a kernel spills on sm_80
or sm_90, does not fit in shared memory, lacks the matrix instruction that it is meant to use, or lets a multiprocessor
hold fewer programs than its launcher counts on.

`compiled.json` holds, for the version of Triton in constraints.txt, what a common case of each op compiles to on sm_90: how
many warps a multiprocessor holds at a time, and the instructions of the hot loop (of the kernel, if it has none). A kernel
that gets worse is a fault, too; `--update` writes the file anew, where that was meant.

Runs without TRITON_INTERPRET, in a process of its own.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    sys.exit("error: unset TRITON_INTERPRET: interpreted kernels cannot be compiled")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from cmim_kernels.ops.library import KERNELS
from cmim_kernels.triton_kernels import class_centroids, rows, same_class_conv2d, upsample_cross_entropy
from tests.backends import declared, launches, machine_code

ARCHITECTURES = (80, 90, 100)
MAY_SPILL = (100,)
KNOWN_SPILLS = {("3.6.0", "class_attention_backward_keys_kernel", 90): 40}
"""Bytes for a version of Triton, a kernel and an architecture: operands of mixed dtypes in rows that are not contiguous."""
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes a program may have. For 80 the limit is that of the smaller chips of the same generation, 86 and 89."""
RESIDENT = {
    "class_centroids_one_hot_kernel": lambda launch: class_centroids.RESIDENT,
    "gather_backward_kernel": lambda launch: rows.RESIDENT[launch["CHANNELS"]],
    "scatter_backward_kernel": lambda launch: rows.RESIDENT[launch["CHANNELS"]],
    "same_class_conv2d_weight_kernel": lambda launch: (
        same_class_conv2d.RESIDENT[launch["CHANNELS"]] if launch["SIZE"] == 7 else 0
    ),
    "upsample_cross_entropy_backward_kernel": lambda launch: upsample_cross_entropy.RESIDENT_WARPS // launch["num_warps"],
}
"""Programs that the launcher of a kernel counts on a multiprocessor to hold at a time, from the launch configuration."""
TABLE = Path(__file__).with_name("compiled.json")
TABLE_ARCHITECTURE = 90


class Launch(NamedTuple):
    kernel: JITFunction
    args: tuple
    kwargs: dict

    def source(self, target):
        """What Triton would compile for this launch on `target`, and with which options."""
        backend = make_backend(target)
        binder = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, options = binder(*self.args, **self.kwargs)
        options, signature, constexprs, attrs = self.kernel._pack_args(backend, self.kwargs, bound, specialization, options)
        return ASTSource(self.kernel, signature, constexprs, attrs), options.__dict__

    @property
    def name(self):
        return self.kernel.__name__.strip("_")

    @property
    def configuration(self):
        """The launch configuration in words: dtypes of the tensors and the named arguments."""
        dtypes = ",".join(
            "-" if a is None else str(a.dtype).split(".")[1] for a in self.args if a is None or hasattr(a, "dtype")
        )
        return dtypes + " " + " ".join(f"{k}={v}" for k, v in self.kwargs.items())


def record(run):
    """The launches that run() makes on meta tensors; none takes place."""
    recorded = []
    original = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: recorded.append(Launch(self, args, kwargs))
    try:
        run()
    finally:
        JITFunction.run = original
    return recorded


class Compiled(NamedTuple):
    registers: int
    spilled: int
    shared: int
    ptx: str
    cubin: bytes
    warps: int
    """Of a program."""

    @property
    def resident_warps(self):
        return machine_code.resident_warps(self.registers, self.shared, self.warps)

    def measures(self):
        """What the table holds of it."""
        (function,) = machine_code.disassemble(self.cubin).values()
        return {
            "warps": self.resident_warps,
            "instructions": function.hot_loop()[1].total() or len(function.instructions),
        }


def compile_for(launch, architecture):
    target = GPUTarget("cuda", architecture, 32)
    source, options = launch.source(target)
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [machine_code.TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    number = lambda name: int(re.search(rf"{name}:(\d+)", usage)[1])  # noqa: E731
    # Stack and local memory both hold what did not fit in registers.
    return Compiled(
        number("REG"),
        number("STACK") + number("LOCAL"),
        compiled.metadata.shared,
        compiled.asm["ptx"],
        compiled.asm["cubin"],
        compiled.metadata.num_warps,
    )


def faults(launch, architecture, compiled):
    """What is wrong with a compiled kernel, in words."""
    known = KNOWN_SPILLS.get((triton.__version__, launch.name, architecture), 0)
    if compiled.spilled > known and architecture not in MAY_SPILL:
        yield f"spills {compiled.spilled} bytes"
    if compiled.shared > SHARED_MEMORY[architecture]:
        yield f"needs {compiled.shared} bytes of shared memory, {SHARED_MEMORY[architecture]} are there"
    if launch.kwargs.get("DOT") and not re.search(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", compiled.ptx):
        yield "has no matrix instruction"
    programs = compiled.resident_warps // compiled.warps
    wanted = RESIDENT[launch.name](launch.kwargs) if launch.name in RESIDENT else 0
    if architecture == TABLE_ARCHITECTURE and programs < wanted:
        yield f"lets a multiprocessor hold {programs} programs at a time, its launcher counts on {wanted}"


def worse(name, found, table):
    """In what a kernel is worse than the table says, in words."""
    if name not in table:
        yield f"is not in {TABLE.name}: run with --few --update"
        return
    before = table[name]
    if found["warps"] < before["warps"]:
        yield f"{found['warps']} warps at a time on a multiprocessor, {before['warps']} before"
    if found["instructions"] > before["instructions"]:
        yield f"{found['instructions']} instructions in the hot loop, {before['instructions']} before"


def distinct(cases):
    """One launch of each (kernel, signature, configuration) that the cases make."""
    found = {}
    target = GPUTarget("cuda", ARCHITECTURES[0], 32)
    for case in cases:
        for launch in record(case):
            source, options = launch.source(target)
            found.setdefault((source.hash(), str(sorted(options.items(), key=str))), launch)
    return list(found.values())


def missing_launchers(kernels):
    """The declared ops whose Triton launcher no case calls."""
    called = set()
    noting = lambda name, original: lambda *arguments: called.add(name) or original(*arguments)  # noqa: E731
    with contextlib.ExitStack() as patches:
        for module, name in declared.triton_launchers():
            patches.enter_context(mock.patch.object(module, name, noting(name, getattr(module, name))))
        for case in itertools.chain(*launches.cases().values()):
            record(case)
    return sorted({name for name, backends in kernels.items() if "triton" in backends} - called)


def missing_configurations():
    """The launch configurations that no case makes, in words."""
    missing = [
        f"{name}: no row in CONFIGURATIONS of tests/backends/launches.py"
        for name in launches.cases().keys() - launches.CONFIGURATIONS.keys()
    ]
    for op, configurations in launches.CONFIGURATIONS.items():
        made = [launch.kwargs for case in launches.cases()[op] for launch in record(case)]
        for configuration in configurations:
            if not any(configuration._asdict().items() <= kwargs.items() for kwargs in made):
                missing.append(f"{op}: {configuration}")
    return missing


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--op", help="only this op")
    parser.add_argument("--list-missing", action="store_true", help="only list ops and configurations without a case")
    parser.add_argument("--few", action="store_true", help="only one case of each op")
    parser.add_argument("--update", action="store_true", help=f"write {TABLE.name} anew; with --few")
    parser.add_argument("--cubins", type=Path, help="a folder for the compiled kernels, to be read with nvdisasm -c")
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    options = parser.parse_args()
    if options.list_missing:
        missing = [
            f"{name}: no case in CASES of tests/backends/launches.py" for name in missing_launchers(KERNELS)
        ] + missing_configurations()
        print("\n".join(missing))
        return 1 if missing else 0
    if options.update and (not options.few or options.op or TABLE_ARCHITECTURE not in options.architectures):
        parser.error(f"--update needs --few, every op and sm_{TABLE_ARCHITECTURE}")
    wrong, measured, kept = 0, {}, json.loads(TABLE.read_text()) if TABLE.exists() else {}
    # Another version of Triton compiles otherwise.
    compares = options.few and not options.update and kept.get("triton") == triton.__version__
    print(f"triton {triton.__version__}\n{'kernel':32} {'arch':7} {'regs':>4} {'spills':>6} {'shared':>7}  configuration")
    for op, cases in launches.cases(few=options.few).items():
        if options.op in (None, op):
            for launch in distinct(cases):
                for architecture in options.architectures:
                    compiled = compile_for(launch, architecture)
                    row = f"{compiled.registers:4} {compiled.spilled:6} {compiled.shared:7}  {launch.configuration}"
                    print(f"{launch.name:32} {f'sm_{architecture}':7} {row}", flush=True)
                    if options.cubins:
                        options.cubins.mkdir(parents=True, exist_ok=True)
                        number = len(list(options.cubins.iterdir()))
                        (options.cubins / f"{number:03}_{launch.name}_sm_{architecture}.cubin").write_bytes(compiled.cubin)
                    said = [*faults(launch, architecture, compiled)]
                    if options.few and architecture == TABLE_ARCHITECTURE:
                        name = f"{op}: {launch.name}: {launch.configuration}"
                        measured[name] = compiled.measures()
                        said += worse(name, measured[name], kept["kernels"]) if compares else []
                    for fault in said:
                        wrong += 1
                        print(f"  ^ {fault}")
    if options.update:
        TABLE.write_text(json.dumps({"triton": triton.__version__, "kernels": measured}, indent=1) + "\n")
    print(f"{wrong} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
