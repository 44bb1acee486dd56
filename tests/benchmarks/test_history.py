"""What a history is worth is measured."""

from functools import partial

import pytest
import torch

from benchmarks import history
from lct_core import registry, retrofit
from lct_core.checkpoints.model_card import small_mmdit
from lct_core.codec import LinearCodec
from lct_core.demo.world import PROMPT_LENGTH, VOCABULARY


@pytest.fixture(scope="module")
def lab():
    """A model of no meaning, and two scenes."""
    torch.manual_seed(0)
    codec = LinearCodec.fit(
        [torch.rand(3, 4, 24, 24)], patch=6, channels=8, vocabulary=VOCABULARY, length=PROMPT_LENGTH
    )
    source = small_mmdit(codec, width=24, depth=2, heads=2)
    model = registry().build(source["backbone"], **source["options"]).requires_grad_(False)
    for weight in model.parameters():
        weight.normal_(std=0.1)
    return history.Lab(model=retrofit(model), codec=codec, size=(4, 24, 24), window=3, count=2, steps=2)


def test_what_a_history_is_worth_is_measured(lab, capsys):
    measures = [
        history.selection,
        history.storage,
        history.writing,
        partial(history.sparse, shots=4),
        partial(history.windows, shots=4),
    ]
    record = history.run(lab, measures)
    selection, storage, writing, sparse, windows = (table["rows"] for table in record["tables"])
    assert capsys.readouterr().out.count("\n\n") == len(measures)
    same, selected, _ = (row["Its first prediction differs by"] for row in selection)
    assert same == 0 < selected
    rounding = [row["Largest error of keys"] for row in storage]
    assert rounding[0] == rounding[3] == 0
    assert 0 < rounding[1] < 1 / 200 < rounding[2] < 1 / 15
    passes = [row["Passes"] for row in writing]
    assert (
        passes == [2 * (1 + 3 * 2 + 2), 2 * (1 + 3 * 2)] * 2
    )  # the global shot's, two steps of three, and two written
    pruned = {row["History"]: row["Pairs pruned"] for row in sparse}
    assert pruned["all of it"] == pruned["top 3 for all heads"] == pruned["top 3 for every head"] == "0%"
    assert all(0 < float(pruned[name][:-1]) < 100 for name in ("top 1 for all heads", "first frames"))
    assert sparse[0]["Appearance error"] == sparse[4]["Appearance error"]
    assert [row["Shot"] for row in windows] == [1, 3]
    assert windows[0]["Drift from the first"] == 0


def test_ratios_over_scenes_have_the_spread_of_scenes():
    assert history._ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == (2, 2, 2)
    ratio = history._ratio([1.0, 2.0, 6.0], [1.0, 1.0, 1.0])
    assert ratio.median == 3
    assert 1 <= ratio.low < 3 < ratio.high <= 6
