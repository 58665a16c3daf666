"""Training steps from CUDA graphs: `train.graph`.

A step launches hundreds of kernels. A CUDA graph launches all of them at once, on the same memory each time and with the
Python numbers of the step that was captured. What differs from step to step is therefore in tensors: the batch, the ramps,
and the learning rate, which the optimiser reads from its groups.
"""

from collections import Counter
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from cmim.distributed import world
from cmim.engine.optimizer import FUSED
from cmim.errors import UserError
from cmim.settings import Config

Tensors = dict[str, Tensor]

WARM_UP = 3
"""Steps of each kind that run eagerly first: they create what the optimiser and the libraries keep, and compile."""


class CudaGraph:
    """The CUDA graph of `compute(inputs)`, a function of tensors that returns tensors.

    Capturing computes nothing; `replay` does. Gradients lie in memory of the graph and must be None outside of it.
    """

    def __init__(self, compute: Callable[[Tensors], Tensors], inputs: Tensors):
        self.inputs = {name: value.clone() for name, value in inputs.items()}
        self.graph = torch.cuda.CUDAGraph()
        # Only calls of this thread are watched: that of the loader may allocate pinned memory meanwhile.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.outputs = compute(self.inputs)

    def replay(self, inputs: Tensors) -> Tensors:
        """The outputs for other inputs of the same shapes. They are overwritten by the next replay."""
        for name, value in inputs.items():
            self.inputs[name].copy_(value, non_blocking=True)
        self.graph.replay()
        return self.outputs


class StepGraphs:
    """Calls `compute`, and replays its graph after WARM_UP calls of the same kind.

    Args:
        compute: one training step; it changes weights, buffers and the state of the optimiser in place.
        capture: makes the graph, a `CudaGraph`; a test gives another one.
    """

    def __init__(self, compute: Callable[[Tensors], Tensors], capture: Callable[..., CudaGraph] = CudaGraph):
        self.compute, self.capture = compute, capture
        self.calls: Counter[Hashable] = Counter()
        self.graphs: dict[Hashable, CudaGraph] = {}

    def __call__(self, kind: Hashable, inputs: Tensors) -> Tensors:
        """One step. Steps of a kind may differ in nothing but the values of tensors."""
        self.calls[kind] += 1
        if self.calls[kind] <= WARM_UP:
            return self.warm_up(inputs)
        if kind not in self.graphs:
            self.graphs[kind] = self.capture(self.compute, inputs)
        return self.graphs[kind].replay(inputs)

    def warm_up(self, inputs: Tensors) -> Tensors:
        """A step on a stream of its own, which PyTorch asks for before a capture."""
        if not torch.cuda.is_available():
            return self.compute(inputs)
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            outputs = self.compute(inputs)
        current.wait_stream(stream)
        return outputs


def check_graph(config: Config, on_cuda: bool) -> None:
    """Raise a UserError if the steps of a run cannot be captured.

    Args:
        config: of the run.
        on_cuda: whether it will train on CUDA.
    """
    train = config.train
    if not train.graph:
        return
    problems = (
        (not on_cuda, "it needs CUDA, and this run is on the CPU"),
        (world().size > 1, f"it is for one process, and these are {world().size}"),
        (train.accumulate > 1, f"train.accumulate is {train.accumulate}: use larger batches instead"),
        (train.precision == "fp16", "with fp16 the host reads whether gradients are finite: use bf16"),
        (config.optimizer.name not in FUSED, f"optimizer.name is {config.optimizer.name}: use {' or '.join(FUSED)}"),
        (config.model.checkpointing, "model.checkpointing saves the state of random numbers on the host"),
        (config.attention == "xformers", "reconstruction.attention xformers waits for the device: use class_attention"),
    )
    for holds, problem in problems:
        if holds:
            raise UserError(f"train.graph cannot be used: {problem}; or leave train.graph out")
