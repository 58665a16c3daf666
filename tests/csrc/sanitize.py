"""`python -m tests.csrc.sanitize [--only NAME]`: the kernels for the CPU under sanitizers, by cpu_driver.cpp.

AddressSanitizer and UndefinedBehaviorSanitizer on every instruction set of this machine, ThreadSanitizer on the baseline.
"""

import argparse
import subprocess
import sys

from .emulation import ROOT, csrc
from .test_vector import SETS, runs_here

SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
    "thread": ["-fsanitize=thread"],
}


def run(sanitizer, instruction_set):
    """Compile and run; the exit code."""
    folder = ROOT / "build" / "sanitizers" / f"{sanitizer}-{instruction_set}"
    flags = [f for f in csrc.CPU_FLAGS if f != "-O3"] + ["-O1", "-g", f"-DCMIM_ISA={instruction_set}"]
    command = ["g++", *flags, *SETS[instruction_set], *SANITIZERS[sanitizer], "-pthread"]
    objects = csrc.compile_sources([*command, "-fno-exceptions"], csrc.cpu_sources(), folder)
    objects += csrc.compile_sources([*command, "-I", csrc.CSRC], [ROOT / "tests/csrc/cpu_driver.cpp"], folder)
    program = folder / "driver"
    csrc.run([*command, *objects, "-o", program], folder / "link.log")
    print(f"{sanitizer}: ", end="", flush=True)
    return subprocess.run([program]).returncode


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=SANITIZERS, help="one of the sanitizers")
    options = parser.parse_args()
    codes = []
    for sanitizer in [options.only] if options.only else SANITIZERS:
        here = [name for name in SETS if runs_here(name)]
        codes += [run(sanitizer, name) for name in (here if sanitizer == "address" else here[:1])]
    sys.exit(max(codes, default=0))


if __name__ == "__main__":
    main()
