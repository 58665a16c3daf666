"""`python -m bench.smoke BACKEND`: every op once, forward and backward, on small inputs. For checkers and profilers."""

import argparse

import torch

from bench.comparison import OURS
from bench.inputs import LARGE, SMALL
from bench.test_ops import OPS, WITHOUT_GRADIENT
from cmim_kernels import backends


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("backend", choices=backends.OPTIONS)
    parser.add_argument("--op", action="append", choices=OPS, help="only these; may be repeated")
    parser.add_argument("--large", action="store_true", help="the first of the large shapes")
    options = parser.parse_args()
    for op in options.op or OPS:
        comparison = OPS[op][0](LARGE[0] if options.large else SMALL[0])
        inputs = [x.requires_grad_() if x.is_floating_point() else x for x in comparison.inputs]
        with backends.use_backend(options.backend):
            outputs = comparison.baselines[OURS](*inputs, *comparison.constants)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            if op not in WITHOUT_GRADIENT:
                torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        print(op, flush=True)


if __name__ == "__main__":
    main()
