"""Comparisons of speed: `pytest bench/`.

`rivals_*.py` hold what a user would run instead of each op, `clock.py` says what is timed, `conftest.py` prints the table.
"""
