"""The build of the distribution `cmim`: the packages `cmim` (the trainer) and `cmim_kernels` (the ops), and csrc/.

pyproject.toml says everything else.

CMIM_BUILD_CUDA controls the build of the CUDA kernels of csrc/, CMIM_BUILD_CPU that of the CPU kernels of csrc/cpu/: `auto`
(the default) builds them if possible and else continues without them, `1` builds them or fails, `0` does not build them. The
result is in a .txt file beside each library, and `python -m cmim_kernels.info` prints it, because pip hides the output of a
build."""

import os
import runpy
import shutil
import sys
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_py import build_py

LIBRARIES = {"CUDA": "libcmim_kernels.so", "CPU": "libcmim_cpu.so"}


class BuildWithConfigs(build_py):
    """Put configs/ inside the installed package, where `python -m cmim.train` without a file looks for shapes.yaml."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "cmim" / "configs"
            target.mkdir(parents=True, exist_ok=True)
            for config in Path("configs").glob("*.yaml"):
                shutil.copy(config, target)


class BuildKernels(Command):
    """csrc/ and csrc/cpu/ as shared libraries inside the package `cmim_kernels`."""

    description, user_options = "compile the kernels", []

    def initialize_options(self):
        self.build_lib, self.editable_mode = None, False

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    @property
    def libraries(self):
        """Name -> path."""
        package = (Path("kernels") if self.editable_mode else Path(self.build_lib)) / "cmim_kernels"
        return {name: package / file for name, file in LIBRARIES.items()}

    def run(self):
        csrc = runpy.run_path("csrc/build.py")
        for name, library in self.libraries.items():
            library.unlink(missing_ok=True)  # of an earlier build
            outcome = self.build_library(name, library, csrc)
            print(f"cmim: {name} kernels {outcome}", file=sys.stderr)
            library.parent.mkdir(parents=True, exist_ok=True)
            library.with_suffix(".txt").write_text(outcome + "\n", encoding="utf-8")

    def build_library(self, name, library, csrc):
        """What was done, in words."""
        wanted = os.environ.get(f"CMIM_BUILD_{name}", "auto")
        if wanted not in ("auto", "0", "1"):
            raise SystemExit(f"error: CMIM_BUILD_{name} is {wanted!r}, expected auto, 0 or 1")
        if wanted == "0":
            return f"not built: CMIM_BUILD_{name} is 0"
        try:
            return csrc["build" if name == "CUDA" else "build_cpu"](library, f"build/{name.lower()}")
        except csrc["BuildError"] as error:
            if wanted == "1":
                raise SystemExit(f"error: CMIM_BUILD_{name} is 1, but {error}") from error
            return f"not built: {error}"

    def get_outputs(self):
        files = [f for library in self.libraries.values() for f in (library, library.with_suffix(".txt"))]
        return [str(f) for f in files if f.exists()]

    def get_source_files(self):
        return [str(f) for folder in ("csrc", "csrc/cpu") for f in sorted(Path(folder).iterdir()) if f.is_file()]


build.sub_commands.append(("build_kernels", None))


class Wheel(bdist_wheel):
    """Tagged py3-none-PLATFORM with a library, which needs no particular Python, and py3-none-any without."""

    def run(self):
        self.run_command("build")
        if any(library.exists() for library in self.get_finalized_command("build_kernels").libraries.values()):
            self.distribution.has_ext_modules = lambda: True
            self.root_is_pure = False
        super().run()

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def packages(root, name):
    return [".".join([name, *p.parent.relative_to(root).parts]) for p in sorted(Path(root).rglob("__init__.py"))]


setup(
    packages=packages("cmim", "cmim") + packages("kernels/cmim_kernels", "cmim_kernels"),
    cmdclass={"build_py": BuildWithConfigs, "build_kernels": BuildKernels, "bdist_wheel": Wheel},
)
