"""The build of the distribution `cmim`: the packages `cmim` (the trainer) and `cmim_kernels` (the ops), and csrc/.

pyproject.toml says everything else.

CMIM_BUILD_CUDA decides about the CUDA kernels of csrc/: `auto` (the default) builds them where it can and goes on without
them, `1` builds them or fails, `0` leaves them out. What was done is in the library's .txt, and
`python -m cmim_kernels.info` prints it: pip hides what a build says.
"""

import os
import runpy
import shutil
import sys
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_py import build_py

LIBRARY = Path("cmim_kernels/libcmim_kernels.so")


class BuildWithConfigs(build_py):
    """Put configs/ inside the installed package, where `python -m cmim.train` without a file looks for shapes.yaml."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "cmim" / "configs"
            target.mkdir(parents=True, exist_ok=True)
            for config in Path("configs").glob("*.yaml"):
                shutil.copy(config, target)


class BuildCuda(Command):
    """csrc/ as a shared library inside the package `cmim_kernels`."""

    description, user_options = "compile the CUDA kernels", []

    def initialize_options(self):
        self.build_lib, self.editable_mode = None, False

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    @property
    def library(self):
        return (Path("kernels") if self.editable_mode else Path(self.build_lib)) / LIBRARY

    def run(self):
        wanted = os.environ.get("CMIM_BUILD_CUDA", "auto")
        if wanted not in ("auto", "0", "1"):
            raise SystemExit(f"error: CMIM_BUILD_CUDA is {wanted!r}, expected auto, 0 or 1")
        self.library.unlink(missing_ok=True)  # of an earlier build
        outcome = "not built: CMIM_BUILD_CUDA is 0"
        if wanted != "0":
            csrc = runpy.run_path("csrc/build.py")
            try:
                outcome = csrc["build"](self.library, "build/cuda")
            except csrc["BuildError"] as error:
                if wanted == "1":
                    raise SystemExit(f"error: CMIM_BUILD_CUDA is 1, but {error}") from error
                outcome = f"not built: {error}"
        print(f"cmim: CUDA kernels {outcome}", file=sys.stderr)
        self.library.parent.mkdir(parents=True, exist_ok=True)
        self.library.with_suffix(".txt").write_text(outcome + "\n", encoding="utf-8")

    def get_outputs(self):
        return [str(f) for f in (self.library, self.library.with_suffix(".txt")) if f.exists()]

    def get_source_files(self):
        return [str(f) for f in sorted(Path("csrc").iterdir()) if f.is_file()]


build.sub_commands.append(("build_cuda", None))


class Wheel(bdist_wheel):
    """Tagged py3-none-PLATFORM with the library, which needs no particular Python, and py3-none-any without."""

    def run(self):
        self.run_command("build")
        if self.get_finalized_command("build_cuda").library.exists():
            self.distribution.has_ext_modules = lambda: True
            self.root_is_pure = False
        super().run()

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def packages(root, name):
    return [".".join([name, *p.parent.relative_to(root).parts]) for p in sorted(Path(root).rglob("__init__.py"))]


setup(
    packages=packages("cmim", "cmim") + packages("kernels/cmim_kernels", "cmim_kernels"),
    cmdclass={"build_py": BuildWithConfigs, "build_cuda": BuildCuda, "bdist_wheel": Wheel},
)
