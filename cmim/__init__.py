"""Semi-supervised semantic segmentation with class-wise masked image modelling."""


def __getattr__(name: str) -> str:
    if name == "__version__":  # the version is defined in cmim_kernels, whose import takes seconds
        from cmim_kernels import __version__

        return __version__
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
