"""Steps from graphs, with a recording in place of a CUDA graph: it runs the same operations of PyTorch again, on the same
memory and with the same Python numbers. What CUDA forbids while it captures is the subject of test_host_reads.py."""

import os
import signal
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cmim.checkpoint import load
from cmim.engine import graph, trainer
from cmim.engine.graph import CudaGraph, StepGraph, check_graph
from cmim.errors import Stopped, UserError
from tests.plain_objective import make_config
from tests.tiny_runs import read_metrics, run_tiny


class Recording(TorchDispatchMode):
    """Records the operations of PyTorch; `run` runs them again."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def run(self):
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old is not new and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Recorded:
    """In place of a CudaGraph. Recording computes, which a capture does not: all that exists before gets its values back."""

    made = 0

    def __init__(self, compute, inputs, state):
        Recorded.made += 1
        self.inputs = {name: value.clone() for name, value in inputs.items()}
        kept = [(tensor, tensor.detach().clone()) for tensor in state()]
        with Recording() as self.recording:
            self.outputs = compute(self.inputs)
        with torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)

    def replay(self, inputs):
        for name, value in inputs.items():
            self.inputs[name].copy_(value)
        self.recording.run()
        return self.outputs


@pytest.fixture
def recorded(monkeypatch):
    """Runs with train.graph on the CPU."""
    Recorded.made = 0

    class OnCpu(StepGraph):
        def __init__(self, compute, device):
            trained = compute.__self__

            def state():
                moments = [v for s in trained.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
                return [*trained.objective.parameters(), *trained.objective.buffers(), *moments]

            super().__init__(compute, device, lambda *arguments: Recorded(*arguments, state))

    monkeypatch.setattr(trainer, "StepGraph", OnCpu)
    monkeypatch.setattr("cmim.engine.start.check_graph", lambda config, on_cuda: None)


RUNS = [
    ("fixmatch", {"optimizer__name": "adamw"}),
    (
        "cmim",
        {
            "optimizer__name": "sgd",
            "train__clip_grad": 1.0,
            "mim__start": 0.75,
            "method__start": 0.5,
            "reconstruction__checkpointing": True,
        },
    ),
    ("unimatch", {"optimizer__name": "adamw", "method__logit_adjustment": True, "method__dice": 1.0}),
]


@pytest.mark.parametrize(("preset", "options"), RUNS, ids=[preset for preset, _ in RUNS])
def test_replayed_steps_equal_eager_ones(recorded, monkeypatch, tmp_path, preset, options):
    """The learning rate and the ramps change with every step, every seventh step is logged and runs eagerly."""
    settings = options | {
        "method__preset": preset, "train__steps": 30, "train__log_every": 7, "train__checkpoint_every": 30,
        "optimizer__warmup": 0.5, "mim__ramp": 0.2, "method__ramp": 0.7, "teacher__kind": "ema", "teacher__decay": 0.9,
        "train__graph": True, "train__picture_every": 30,
    }  # fmt: skip
    replayed = run_tiny(tmp_path / "replayed", **settings)
    assert Recorded.made == {"cmim": 3}.get(preset, 1)  # supervised, with strong views, with masked ones
    monkeypatch.setattr(graph, "WARM_UP", 1000)
    Recorded.made = 0
    eager = run_tiny(tmp_path / "eager", **settings)
    assert Recorded.made == 0
    ours, theirs = load(replayed.last), load(eager.last)
    for name, value in theirs["objective"].items():
        assert torch.equal(ours["objective"][name], value), name
    figures = [
        [{k: v for k, v in line.items() if k.startswith("loss")} for line in read_metrics(r)] for r in (replayed, eager)
    ]
    assert figures[0] == figures[1] and "loss" in figures[0][0]


def test_a_replayed_run_goes_on_to_the_bit(recorded, tmp_path, monkeypatch):
    settings = {
        "method__preset": "fixmatch", "train__graph": True, "optimizer__name": "adamw", "train__checkpoint_every": 6,
        "optimizer__warmup": 0.3, "train__log_every": 100, "train__steps": 12, "teacher__decay": 0.5,
    }  # fmt: skip
    whole = run_tiny(tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        update = trainer.Trainer.train_step

        def stopping(self, *arguments):
            factor = update(self, *arguments)
            if self.step == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            return factor

        patch.setattr(trainer.Trainer, "train_step", stopping)
        with pytest.raises(Stopped):
            run_tiny(tmp_path / "stopped", **settings)
    stopped = run_tiny(tmp_path / "stopped", "--resume", **settings)
    assert Recorded.made == 3
    ours, theirs = load(stopped.last), load(whole.last)
    for name, value in theirs["objective"].items():
        assert torch.equal(ours["objective"][name], value), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train__accumulate": 2}, "train.accumulate is 2"),
        ({"train__precision": "fp16"}, "use bf16"),
        ({"optimizer__name": "lamb"}, "optimizer.name is lamb: use sgd or adamw"),
        ({"model__checkpointing": True}, "model.checkpointing"),
        (
            {
                "method__preset": "cmim",
                "reconstruction__decoder": "attention",
                "reconstruction__attention": "xformers",
                "reconstruction__width": 32,
                "reconstruction__num_heads": 4,
            },
            "use class_attention",
        ),
        ({"train__log_every": 1}, "train.log_every is 1"),
        ({"train__evaluate_every": 1}, "train.evaluate_every is 1"),
    ],
)
def test_runs_that_cannot_be_captured(options, message):
    with pytest.raises(UserError, match=message):
        check_graph(make_config("fixmatch", train__graph=True, **options), on_cuda=True)
    check_graph(make_config("fixmatch", **options), on_cuda=True)


def test_the_cpu_has_no_graphs(tmp_path):
    with pytest.raises(UserError, match="it needs CUDA, and this run is on the CPU"):
        run_tiny(tmp_path / "run", train__graph=True)


@pytest.fixture
def capturing(monkeypatch):
    """What CudaGraph calls, without CUDA. Like PyTorch's, the end of a capture that was broken is an error of its own."""

    @contextmanager
    def capture(graph, stream, capture_error_mode):
        try:
            yield
        except Exception:
            raise RuntimeError("the capture ended in an error")  # noqa: B904 - as PyTorch's __exit__ raises it

    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)


def test_a_step_that_cannot_be_captured_is_one_line(capturing):
    def compute(inputs):
        raise RuntimeError("the host waits")

    with pytest.raises(UserError, match="the host waits"):
        CudaGraph(compute, {})


def test_out_of_memory_in_a_capture_stays_what_it_is(capturing):
    def compute(inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        CudaGraph(compute, {})
