"""The distribution `cmim`: the packages `cmim` (the trainer) and `cmim_kernels` (the ops)."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Put configs/ inside the installed package, where `python -m cmim.train` without a file looks for shapes.yaml."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "cmim" / "configs"
            target.mkdir(parents=True, exist_ok=True)
            for config in Path("configs").glob("*.yaml"):
                shutil.copy(config, target)


def packages(root, name):
    return [".".join([name, *p.parent.relative_to(root).parts]) for p in sorted(Path(root).rglob("__init__.py"))]


setup(
    name="cmim",
    version="0.1.0",
    description="Semi-supervised segmentation with class-wise masked image modelling, and its kernels",
    long_description=Path("README.md").read_text() if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=packages("cmim", "cmim") + packages("kernels/cmim_kernels", "cmim_kernels"),
    package_dir={"cmim": "cmim", "cmim_kernels": "kernels/cmim_kernels"},
    install_requires=[
        "torch>=2.11,<2.16",
        "numpy",
        "torchvision",
        "timm>=1.0.20",
        "segmentation-models-pytorch>=0.6",
        "safetensors",
        "Pillow",
        "PyYAML",
        "pydantic>=2",
        "rich",
        "tensorboard",
        "matplotlib",
    ],
    extras_require={"test": ["pytest", "pytest-benchmark", "hypothesis", "ruff", "transformers"]},
    cmdclass={"build_py": BuildWithConfigs},
)
