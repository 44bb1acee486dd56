"""Progress on the console: lines where output goes to a file, bars on a terminal."""

import io
import re

import pytest
from rich.console import Console

from lct_core.progress import Stages


def lines(file):
    """What was printed, without the seconds."""
    return [re.sub(r", [0-9]+ s", "", line) for line in file.getvalue().splitlines()]


def test_a_file_gets_a_line_at_the_end_of_each_stage():
    file = io.StringIO()
    with Stages(Console(file=file, width=20)) as progress:
        with progress("read [b]some[/b] scenes", 3) as advance:
            for _ in range(3):
                advance()
                assert not re.search("[12] of 3", file.getvalue())
        with progress("generate"):
            pass
        bar = progress.open("train", 2)
        bar(1.5)
        bar(0.25)
    assert lines(file) == ["read [b]some[/b] scenes: 3 of 3", "generate: 1 of 1", "train: 2 of 2, loss 0.2500"]


def test_a_long_stage_gets_a_line_at_each_quarter():
    file = io.StringIO()
    with Stages(Console(file=file)) as progress:
        bar = progress.open("train", 1002)
        for step in range(1002):
            bar(float(step))
    assert lines(file) == [
        "train: 251 of 1002, loss 250.0000",
        "train: 501 of 1002, loss 500.0000",
        "train: 752 of 1002, loss 751.0000",
        "train: 1002 of 1002, loss 1001.0000",
    ]


def test_a_stage_that_goes_on_where_it_was():
    file = io.StringIO()
    with Stages(Console(file=file)) as progress:
        bar = progress.open("train", 4)
        bar(2.0, completed=3)
        assert not file.getvalue()
        bar(1.0, completed=4)
        bar(1.0, completed=4)
    assert lines(file) == ["train: 4 of 4, loss 1.0000"]


def test_a_stage_that_fails_says_nothing():
    file = io.StringIO()
    with pytest.raises(RuntimeError, match="no luck"), Stages(Console(file=file)) as progress, progress("read", 2):
        raise RuntimeError("no luck")
    assert not file.getvalue()


def test_a_terminal_gets_bars():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=160, _environ={})
    with Stages(console) as progress:
        with progress("read [b]some[/b]", 2) as advance:
            advance()
        bar = progress.open("train", 2000)
        for _ in range(2000):
            bar(0.5)
    for words in ("read [b]some[/b]", "train", "\N{BOX DRAWINGS HEAVY HORIZONTAL}" * 40, "loss 0.5000"):
        assert words in file.getvalue()
    assert " of " not in file.getvalue()
