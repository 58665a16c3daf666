"""What a run says: figures over an interval and over processes, progress on a terminal and elsewhere."""

import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cmim import distributed
from cmim.engine import logging
from cmim.engine.evaluation import Evaluation
from cmim.engine.metrics import scores
from cmim.engine.run import Run
from cmim.errors import UserError
from tests.tiny_runs import read_metrics


def log_of(folder, monkeypatch, device="cpu", micro=1):
    """A RunLog at step 0 of 8, 6 images a call, and its clock."""
    now = [0.0]
    monkeypatch.setattr(logging, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return logging.RunLog(Run(folder), 0, 8, 6, torch.device(device), micro), now


def a_score():
    """Of two classes, of which the second occurs in the truth alone; one of two images has no class."""
    return scores(torch.tensor([[3, 0], [1, 0]]), torch.tensor([0.375, torch.nan]))


@pytest.mark.parametrize(
    "columns, lines",
    [
        (["iou"], ["class IoU %", "a 75.00", "b 0.00", "mIoU 37.50", "mean accuracy 50.00", "pixel accuracy 75.00"]),
        (
            ["precision", "iou", "image_miou"],
            ["class precision % IoU %", "a 75.00 75.00", "b - 0.00", "mean 75.00 37.50", "mIoU per image 37.50",
             "mean accuracy 50.00", "pixel accuracy 75.00"],
        ),
        (
            ["dice", "recall"],
            ["class Dice % recall %", "a 85.71 100.00", "b 0.00 0.00", "mean 42.86 50.00", "pixel accuracy 75.00"],
        ),
    ],
)  # fmt: skip
def test_the_table_has_the_columns_asked_for(columns, lines, capsys):
    logging.print_table(a_score(), ["a", "b"], "title", columns)
    said = [" ".join(re.findall(r"[\w.%-]+", line)) for line in capsys.readouterr().out.splitlines()]
    assert [line for line in said if line] == ["title", *lines]


def test_names_are_no_markup(capsys):
    logging.console.print("runs/exp[b] [/x]")
    logging.print_table(a_score(), ["[void]", "c[red]x"], "runs/[/x]")
    said = capsys.readouterr().out
    assert "runs/exp[b] [/x]" in said and "[void]" in said and "c[red]x" in said and "runs/[/x]" in said


def test_a_logged_figure_is_its_mean_over_the_interval(tmp_path, monkeypatch, capsys):
    """Also where the last step has figures that the others lack; speed counts every call."""
    log, now = log_of(tmp_path, monkeypatch)
    for loss in (1.0, 2.0):
        log.add({"loss": torch.tensor(loss), "loss_sup": torch.tensor(loss)})
    log.add({"loss": torch.tensor(6.0), "loss_sup": torch.tensor(6.0), "separation": torch.tensor(4.0)})
    now[0], log.data_wait = 2.0, 0.5
    log.write(3, 0.1)
    log.add({"loss": torch.tensor(9.0), "loss_sup": torch.tensor(9.0)})
    now[0] = 3.0
    log.write(4, 0.1)
    log.close()
    first, second = read_metrics(Run(tmp_path))
    memory = first.pop("memory_gib")
    assert first == {
        "step": 3, "lr": 0.1, "loss": 3.0, "loss_sup": 3.0, "separation": 4.0,
        "images_per_second": 9.0, "data_wait": 0.25, "seconds": 2.0,
    }  # fmt: skip
    assert second["loss"] == 9.0 and second["images_per_second"] == 6.0 and second["data_wait"] == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"step 3/8  loss 3.000  sup 3.000  9.0 images/s  data wait 25%  {memory:.1f} GiB  0:00:03 left"
    assert second.startswith("step 4/8  loss 9.000  sup 9.000  6.0 images/s  data wait 0%")


@pytest.mark.parametrize("width", [40, 60, 80, 100, 300])
def test_a_line_fits_the_terminal(width, tmp_path, monkeypatch):
    said = io.StringIO()
    console = logging.Console(file=said, force_terminal=True, width=width, highlight=False, soft_wrap=True, markup=False)
    monkeypatch.setattr(logging, "console", console)
    log, now = log_of(tmp_path, monkeypatch)
    log.add({"loss": torch.tensor(1.0)} | {f"loss_term_{k}": torch.tensor(1.0) for k in range(8)})
    now[0] = 1.0
    log.write(1, 0.1)
    log.close()
    (line,) = (line for line in said.getvalue().splitlines() if line.startswith("step 1/8  loss 1.000"))
    assert len(line) <= width and line.endswith("0:00:07 left")
    assert ("term_7" in line) == (width == 300) and ("images/s" in line) == (width > 40)


def test_what_is_done_between_steps_does_not_slow_training(tmp_path, monkeypatch):
    log, now = log_of(tmp_path, monkeypatch)
    log.add({"loss": torch.tensor(1.0)})
    now[0] = 2.0
    with log.paused():
        now[0] = 50.0
    log.write(1, 0.1)
    log.close()
    (line,) = read_metrics(Run(tmp_path))
    assert line["images_per_second"] == 3.0 and line["seconds"] == 50.0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system has no /proc to compare with")
def test_memory_is_the_peak_of_the_process():
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    expected = int(peak[1]) / 2**20
    # Where a process is started by a larger one, the system counts that one's memory too.
    assert expected * 0.99 <= logging.peak_memory(torch.device("cpu")) <= expected * 100


def test_memory_is_left_out_where_the_system_does_not_say(tmp_path, monkeypatch):
    monkeypatch.setattr(logging, "resource", None)  # as on Windows
    log, now = log_of(tmp_path, monkeypatch)
    log.add({"loss": torch.tensor(1.0)})
    now[0] = 1.0
    log.write(1, 0.1)
    log.close()
    assert "memory_gib" not in read_metrics(Run(tmp_path))[0]


def test_the_first_process_logs_the_means_of_all(tmp_path, monkeypatch, capsys):
    vectors = []
    monkeypatch.setattr(distributed, "size", lambda: 2)

    def log_as(rank, losses, wait, summed):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "sum_over_ranks", summed)
        log, now = log_of(tmp_path / str(rank), monkeypatch)
        for loss in losses:
            log.add({"loss": torch.tensor(loss)})
        now[0], log.data_wait = 4.0, wait
        log.write(2, 0.1)
        log.evaluation(2, evaluation, "val", ["sky"])
        log.close()

    (tmp_path / "0").mkdir()
    evaluation = Evaluation(scores(torch.ones(1, 1), torch.ones(1)), {}, {}, [[1]])
    log_as(1, [5.0, 9.0], 1.5, lambda vector: vectors.append(vector.clone()) or vector)
    assert not (tmp_path / "1").exists() and capsys.readouterr().out == ""
    log_as(0, [1.0, 3.0], 0.5, lambda vector: vector.add_(vectors[0]))
    line, evaluated = read_metrics(Run(tmp_path / "0"))
    assert line["loss"] == (1 + 3 + 5 + 9) / 4
    assert (line["data_wait"], line["images_per_second"]) == ((0.5 + 1.5) / 2 / 4, 2 * 6 / 4)
    assert evaluated["split"] == "val"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_loss_that_is_not_finite_is_stored_as_json_before_every_process_stops(rank, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    log, now = log_of(tmp_path, monkeypatch)
    log.add({"loss": torch.tensor(torch.nan), "loss_sup": torch.tensor(1.0), "loss_pix": torch.tensor(-torch.inf)})
    now[0] = 1.0
    with pytest.raises(UserError, match="the loss term pix is not finite at or before step 1"), log:
        log.write(1, 0.1)
    if rank == 0:
        (line,) = read_metrics(Run(tmp_path))
        assert line["loss"] is line["loss_pix"] is None and line["loss_sup"] == 1


class Terminal(io.StringIO):
    def isatty(self):
        return True


def on_a_terminal(monkeypatch):
    """A stand-in for stdout; called by the test itself, since pytest sets stdout between a fixture and its test."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(logging.console, "is_interactive", True)
    monkeypatch.setenv("TERM", "xterm")
    return screen


def visible(screen):
    """What stands on a terminal: \r, a new line, one line up and erasing the line are obeyed, colours are not there."""
    lines, row, column = [""], 0, 0
    for piece in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|[^\x1b]", screen.getvalue()):
        if piece == "\n":
            row, column = row + 1, 0
            lines += [""] * (row == len(lines))
        elif piece == "\r":
            column = 0
        elif piece == "\x1b[1A":
            row -= 1
        elif piece == "\x1b[2K":
            lines[row] = ""
        elif not piece.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + piece + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines if line.strip()]


def test_a_terminal_has_a_bar_between_the_lines_and_none_at_the_end(tmp_path, monkeypatch):
    terminal = on_a_terminal(monkeypatch)
    log, now = log_of(tmp_path, monkeypatch, micro=2)
    for _ in range(6):
        now[0] += 1.0
        log.add({"loss": torch.tensor(1.0)})
        assert visible(terminal)[-1].startswith("train") and len(visible(terminal)) == 1
    assert "3/8 steps  0.5 steps/s  0:00:10 left" in visible(terminal)[-1]
    log.write(3, 0.1)
    said, bar = visible(terminal)
    assert said.startswith("step 3/8  loss 1.000") and bar.startswith("train")
    with logging.Progress("val", 4, "images") as progress:
        now[0] += 1.0
        progress.advance(3)
        said, outer, inner = visible(terminal)
        assert (
            outer.startswith("train")
            and inner.startswith("val")
            and inner.endswith("3/4 images  3.0 images/s  0:00:00 left")
        )
    assert len(visible(terminal)) == 2 and visible(terminal)[-1].startswith("train")
    log.close()
    assert visible(terminal) == [said] and terminal.getvalue().count("\x1b[?25h") == terminal.getvalue().count("\x1b[?25l")
    with logging.Progress("test", 4, "images"):
        assert visible(terminal)[-1].startswith("test")
    assert visible(terminal) == [said]


def test_only_the_first_process_has_a_bar(monkeypatch):
    terminal = on_a_terminal(monkeypatch)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    with logging.Progress("val", 4, "images") as progress:
        monkeypatch.setattr(logging, "time", SimpleNamespace(perf_counter=lambda: progress.started + 100))
        progress.advance()
    assert terminal.getvalue() == ""
