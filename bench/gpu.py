"""`python -m bench.gpu OUT`: everything that only a machine with a GPU can show, in one command that always leaves results.

    PYTHONPATH=.:kernels python -m bench.gpu OUT                       # nothing to install: torch, triton, numpy and pytest
    ... --wheels FOLDER                                                # of pydantic and what it needs, for the trainer
    ... --data FOLDER                                                  # images in the layout of the README, to train on
    ... --stage ops --stage step                                       # only these
    ... --dry-run                                                      # through all of it on a CPU, with tiny shapes

OUT/results.jsonl gets a line as soon as anything starts or ends (`bench.recorder`), OUT/log.txt what was printed. The stages
come in order of value, each in processes of its own. A test that fails, hangs or takes its process down is recorded, and the
rest goes on in a new process. `--budget` seconds end it all. What OUT holds already is not repeated, so that a second call
goes on; `--again` repeats what had failed. `python -m bench.report OUT/results.jsonl` makes tables of it, complete or not.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

from bench.recorder import last_of_each, read

ROOT = Path(__file__).resolve().parents[1]
OWN = "cmim_kernels or formulas"
NOT_OWN = "not cmim_kernels and not formulas and not CUDA"


class Stage(NamedTuple):
    name: str
    arguments: str
    """Of pytest."""
    dry: str
    """The same for a dry run."""
    seconds: int
    """At most, all processes of the stage together."""
    item_seconds: int = 100
    """After so long without a word the process is killed, and what it was at has failed."""


OPS, STEP, SOME = "bench/test_ops.py", "bench/test_step.py", "gather_class_tokens and 20x20 and not compiled"
STAGES = [
    Stage("device", "bench/test_device.py", "bench/test_device.py", 40),
    Stage("ops", f"{OPS} -k 'VOC and ({OWN})'", f"{OPS} -k '{SOME}'", 130),
    Stage("csrc", f"{OPS} -k 'VOC and CUDA'", "tests/csrc/test_build.py -k architectures", 80),
    Stage("tests", "tests/backends -m gpu -n 8 --dist loadgroup", "tests/backends/test_pack_classes.py -n 2 -k whole", 150),
    Stage("step", f"{STEP} -k 8-8", f"{STEP} -k 'cmim_kernels'", 170, 150),
    Stage("training", "bench/test_training.py", "bench/test_training.py", 240, 200),
    Stage("baselines", f"{OPS} -k 'VOC and {NOT_OWN}'", f"{OPS} -k '{SOME} and index'", 300),
    Stage("decoders", "bench/test_decoders.py", "bench/test_decoders.py -k conv-2-12", 200),
    Stage("graphs", "bench/test_graphs.py", "bench/test_graphs.py", 240, 120),
    Stage("shapes", f"{OPS} -k 'not VOC and ({OWN} or CUDA)'", f"{OPS} -k '12x12 and pack'", 300),
    Stage("batches", f"{STEP} -k 4-4", f"{STEP} -k losses", 200, 150),
    Stage("checkers", "bench/test_checkers.py", "bench/test_checkers.py", 300, 200),
    Stage("rest", f"{OPS} -k 'not VOC and {NOT_OWN}'", f"{OPS} -k has_a_name", 600),
]
"""In order of value. The first five fit into a call of ten minutes."""


class Run:
    """The stages of one call, and where their results go."""

    def __init__(self, out, options):
        self.results, self.log, self.build_log = (out / name for name in ("results.jsonl", "log.txt", "build.txt"))
        self.dry, self.again, self.deadline = options.dry_run, options.again, time.time() + options.budget
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *paths_of(options.wheels)])
        self.environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
        if options.data:
            self.environment["CMIM_BENCH_DATA"] = str(options.data.resolve())
        if self.dry:
            self.environment |= {"CMIM_BENCH_DRY_RUN": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.build = None

    def write(self, **line):
        with self.results.open("a") as file:
            file.write(json.dumps({"time": round(time.time(), 2)} | line) + "\n")

    def items(self, stage):
        """Item -> its last line, of a stage."""
        return {item: line for (name, item), line in last_of_each(read(self.results)).items() if name == stage.name}

    def ended(self, stage):
        """The items that need not run again."""
        final = ("passed", "skipped") if self.again else ("passed", "skipped", "failed")
        return {item for item, line in self.items(stage).items() if line["status"] in final}

    def run(self, stage):
        """All tests of a stage, in one process after the other, as long as each of them ends some test."""
        end = min(self.deadline, time.time() + stage.seconds)
        say(f"{stage.name}: at most {end - time.time():.0f} s")
        repeated = self.ended(stage)
        going = stage.name != "csrc" or self.dry or self.is_built(end)
        while going and time.time() < end:
            code = self.process(stage, repeated, end)
            if code == OUT_OF_TIME:
                break
            for item, line in self.items(stage).items():
                if line["status"] == "started":
                    self.write(stage=stage.name, item=item, status="failed", error=f"{code}: {self.end_of_log()}")
            new = set(self.items(stage)) - repeated
            if code not in (0, 1, 5) and not new:  # 0 and 1: all tests ran; 5: there was none
                self.write(stage=stage.name, item="the stage", status="failed", error=f"{code}: {self.end_of_log()}")
            going = code not in (0, 1, 5) and bool(new)
            repeated |= new
        statuses = [line["status"] for line in self.items(stage).values()]
        counts = {status: statuses.count(status) for status in ("passed", "failed", "skipped", "started")}
        say("  " + (", ".join(f"{number} {status}" for status, number in counts.items() if number) or "nothing ran"))

    def process(self, stage, leave_out, end):
        """The exit code of one process, or in words how it ended."""
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as done, self.log.open("a") as log:
            done.write("\n".join(leave_out))
            done.flush()
            command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.recorder", "-p", "no:cacheprovider"]
            command += ["--results", str(self.results), "--stage", stage.name, "--done", done.name]
            command += shlex.split(stage.dry if self.dry else stage.arguments)
            log.write(f"\n$ {shlex.join(command)}\n")
            log.flush()
            options = dict(cwd=ROOT, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            with subprocess.Popen(command, **options) as process:
                size, heard = 0, time.time()
                while process.poll() is None:
                    time.sleep(0.2)
                    now = self.results.stat().st_size if self.results.exists() else 0
                    size, heard = (now, time.time()) if now != size else (size, heard)
                    silent = time.time() - heard > stage.item_seconds
                    if time.time() > end or silent:
                        os.killpg(process.pid, signal.SIGKILL)
                        process.wait()
                        return f"killed after {stage.item_seconds} s without a result" if silent else OUT_OF_TIME
        return process.returncode if process.returncode >= 0 else f"ended by {signal.Signals(-process.returncode).name}"

    def start_build(self):
        """Compile csrc/ for this device, next to the package that loads it, while the first stages run."""
        command = [sys.executable, "csrc/build.py", "--architectures", "native"]
        with self.build_log.open("w") as output:
            self.build = subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=output, stderr=output)

    def is_built(self, end):
        try:
            code = self.build.wait(max(0.0, end - time.time()))
        except subprocess.TimeoutExpired:
            code = "still compiling"
        status = "passed" if code == 0 else "failed"
        self.write(stage="csrc", item="build", status=status, error=f"{code}: {self.build_log.read_text()[-1500:]}")
        return code == 0

    def end_of_log(self):
        return self.log.read_text()[-800:]


OUT_OF_TIME = "no time left"


def paths_of(wheels):
    """What to put on Python's path for a folder of wheels, or of their contents."""
    if wheels is None:
        return []
    packed = sorted(wheels.glob("*.whl"))
    if packed:
        folder = Path(tempfile.mkdtemp(prefix="wheels-"))
        for wheel in packed:
            with zipfile.ZipFile(wheel) as file:
                file.extractall(folder)
        return [str(folder)]
    return [str(wheels.resolve())]


def say(text):
    print(text, flush=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the results; what it holds is not repeated")
    parser.add_argument("--stage", action="append", choices=[s.name for s in STAGES], help="only these; may be repeated")
    parser.add_argument("--budget", type=float, default=570, metavar="SECONDS", help="of the whole call (570)")
    parser.add_argument("--again", action="store_true", help="repeat what has failed")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels that this Python lacks")
    parser.add_argument("--data", type=Path, help="a folder of images to train on")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny shapes")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    run = Run(options.out.resolve(), options)
    chosen = [s for s in STAGES if options.stage is None or s.name in options.stage]
    if not options.dry_run and any(s.name == "csrc" for s in chosen):
        run.start_build()
    for stage in chosen:
        if time.time() < run.deadline:
            run.run(stage)
        else:
            say(f"{stage.name}: {OUT_OF_TIME}")
    if run.build:
        run.build.kill()
    failed = [line for line in last_of_each(read(run.results)).values() if line["status"] == "failed"]
    for line in failed[:20]:
        say(f"failed: {line['item']}: {(line['error'].strip().splitlines() or [''])[-1][:200]}")
    say(f"{len(failed)} failed; results: {run.results}")


if __name__ == "__main__":
    main()
