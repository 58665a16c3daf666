"""The machine code of compiled kernels: instructions of their loops, and how many programs a multiprocessor holds."""

import collections
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LABEL = re.compile(r"^(\.L_\w+):")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@(?P<predicate>!?U?P\w+)\s+)?(?P<name>[A-Z][\w.]*)(?P<rest>.*);")
TARGET = re.compile(r"\(?`?\(?(\.L_\w+)\)?")


class Instruction(NamedTuple):
    name: str
    """With its modifiers, such as FFMA.FTZ."""
    operands: str
    conditional: bool


class Loop(NamedTuple):
    start: int
    end: int
    """Of the branch back, inclusive."""

    def holds(self, other: "Loop") -> bool:
        return self != other and self.start <= other.start and other.end <= self.end


class Function(NamedTuple):
    instructions: list[Instruction]
    loops: list[Loop]

    def count(self, loop: Loop) -> collections.Counter:
        """Instructions of a loop by their names without modifiers."""
        return collections.Counter(i.name.split(".")[0] for i in self.instructions[loop.start : loop.end + 1])

    def hot_loop(self, *names: str) -> tuple[Loop | None, collections.Counter]:
        """The loop without a loop inside that has most instructions of these names, or most of all; None without loops."""
        inner = [loop for loop in self.loops if not any(loop.holds(other) for other in self.loops)]
        counts = [(loop, self.count(loop)) for loop in inner]
        size = lambda item: sum(item[1][name] for name in names) if names else item[1].total()  # noqa: E731
        return max(counts, key=size, default=(None, collections.Counter()))


def resident_warps(registers: int, shared: int, warps: int) -> int:
    """How many warps a multiprocessor of sm_90 holds at a time, of programs of `warps` warps with `registers` a thread and
    `shared` bytes each (the occupancy of CUDA's programming guide, compute capability 9.0)."""
    of_warp = -(-registers * 32 // 256) * 256  # registers are given out by 256
    programs = min(64 // warps, 32, 65536 // of_warp // warps, 228 * 1024 // (-(-shared // 128) * 128 + 1024))
    return programs * warps


def cubin_of(file: Path, architecture: int) -> bytes:
    """The machine code for sm_`architecture` in an object or a library."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [TOOLS / "cuobjdump", "-xelf", f"sm_{architecture}", file.resolve()], cwd=folder, capture_output=True, check=True
        )
        (found,) = Path(folder).glob(f"*sm_{architecture}*.cubin")
        return found.read_bytes()


def disassemble(cubin: bytes) -> dict[str, Function]:
    """The functions of a cubin by name."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    return {name: parse(code) for name, code in re.findall(r"^\.text\.(\S+):\n(.*?)(?=^\t\.section|\Z)", text, re.M | re.S)}


def parse(code: str) -> Function:
    """A function from what nvdisasm prints of it."""
    instructions, places, branches = [], {}, []
    for line in code.splitlines():
        if label := LABEL.match(line):
            places[label[1]] = len(instructions)
        elif found := INSTRUCTION.match(line):
            if found["name"].startswith("BRA") and (target := TARGET.search(found["rest"])):
                branches.append((len(instructions), target[1]))
            instructions.append(Instruction(found["name"], found["rest"].strip(), found["predicate"] is not None))
    loops = {}
    for at, label in branches:
        start = places.get(label, at + 1)
        # A branch to itself is what follows the end of a function.
        if start < at:
            loops[start] = max(at, loops.get(start, 0))
    return Function(instructions, [Loop(start, end) for start, end in sorted(loops.items())])
