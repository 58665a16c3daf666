"""Comparisons of speed: `pytest bench/`.

`baselines_*.py` hold what a user would run instead of each op, `clock.py` says what is timed, `conftest.py` prints the
table, `gpu.py` measures everything on a machine with a GPU.
"""
