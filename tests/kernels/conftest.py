import pytest
import torch
from torch._dynamo import trace_rules

trace_rules.get_torch_obj_rule_map()  # cached; built while torch.empty is replaced, it would not know the real one


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """Uninitialised memory holds NaN (or a large negative integer), so that reading it cannot pass by luck."""

    def poison(make):
        def wrapper(*args, **kwargs):
            out = make(*args, **kwargs)
            if torch.compiler.is_compiling() or out.is_meta or type(out) is not torch.Tensor:
                return out
            if out.is_floating_point():
                return out.fill_(float("nan"))
            return out if out.dtype == torch.bool else out.fill_(-99 if out.dtype.is_signed else 251)

        return wrapper

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
