"""Training steps from CUDA graphs: `train.graph`.

A step launches hundreds of kernels. A CUDA graph launches all of them at once, on the same memory each time and with the
Python numbers of the step that was captured. What differs from step to step is therefore in tensors: the batch, the ramps,
and the learning rate, which the optimiser reads from its groups.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cmim.distributed import world
from cmim.engine.optimizer import FUSED
from cmim.errors import UserError, is_out_of_memory
from cmim.settings import Config

Tensors = dict[str, Tensor]

WARM_UP = 3
"""Steps of each kind that run eagerly first: they create what the optimiser and the libraries keep, and compile."""
EAGER = ("log_every", "picture_every", "checkpoint_every", "evaluate_every")
"""Settings of `train` that say at which steps more is computed, without the graph."""


class CudaGraph:
    """The CUDA graph of `compute(inputs)`, a function of tensors that returns tensors.

    Capturing computes nothing; `replay` does. Gradients lie in memory of the graph and must be None outside of it.

    Raises:
        UserError: `compute` does something that no CUDA graph can hold.
    """

    def __init__(self, compute: Callable[[Tensors], Tensors], inputs: Tensors):
        self.inputs = {name: value.clone() for name, value in inputs.items()}
        self.graph = torch.cuda.CUDAGraph()
        # Only calls of this thread are watched: that of the loader may allocate pinned memory meanwhile.
        capture = torch.cuda.graph(self.graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local")
        try:
            with capture:
                self.outputs = compute(self.inputs)
        except RuntimeError as error:
            cause = error.__context__ or error  # the end of a broken capture is an error too
            if is_out_of_memory(cause):
                raise cause from None
            raise UserError(
                f"train.graph: a CUDA graph cannot hold this step ({type(cause).__name__}: {cause!s:.300}); leave it out"
            ) from cause

    def replay(self, inputs: Tensors) -> Tensors:
        """The outputs for other inputs of the same shapes. They are overwritten by the next replay."""
        for name, value in inputs.items():
            self.inputs[name].copy_(value, non_blocking=True)
        self.graph.replay()
        return self.outputs


class StepGraph:
    """Calls `compute`, and replays its graph after WARM_UP calls of the same kind.

    Args:
        compute: one training step; it changes weights, buffers and the state of the optimiser in place.
        device: of its tensors.
        capture: makes the graph, a `CudaGraph`; a test gives another one.
    """

    def __init__(
        self, compute: Callable[[Tensors], Tensors], device: torch.device, capture: Callable[..., CudaGraph] = CudaGraph
    ):
        self.compute, self.device, self.capture = compute, device, capture
        self.kind, self.calls, self.graph = None, 0, None

    def __call__(self, kind: Hashable, inputs: Tensors) -> Tensors:
        """One step. Steps of a kind may differ in nothing but the values of tensors."""
        if kind != self.kind:  # kinds follow one another and do not come back, so that the last graph is of no more use
            self.kind, self.calls, self.graph = kind, 0, None
        self.calls += 1
        if self.calls <= WARM_UP:
            return self.compute(inputs)
        if self.graph is None:
            self.graph = self.capture(self.compute, inputs)
        return self.graph.replay(inputs)

    @contextmanager
    def stream(self) -> Iterator[None]:
        """The `with` block for all steps of a training, eager ones too: PyTorch cannot capture the default stream, and keeps
        the free memory of each stream apart."""
        if self.device.type != "cuda":
            yield
            return
        before, own = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        own.wait_stream(before)
        with torch.cuda.stream(own):
            yield
        before.wait_stream(own)


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
        *((getattr(train, key) == 1, f"train.{key} is 1, and such steps run without it: use 20") for key in EAGER),
    )
    for holds, problem in problems:
        if holds:
            raise UserError(f"train.graph cannot be used: {problem}; change that, or leave train.graph out")
