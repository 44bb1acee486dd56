"""What depends on what, against definitions that try every path."""

from itertools import pairwise

from hypothesis import given, strategies as st

from lct_core.lineage import ancestors, behind, beside, dependents, writing_order

SHOTS = range(7)
graphs = st.dictionaries(st.sampled_from(SHOTS), st.sets(st.sampled_from(SHOTS)), max_size=len(SHOTS))
some = st.sets(st.sampled_from(SHOTS))


@st.composite
def scenes(draw):
    """What every shot saw, in order, where none saw a later one in the order in which they were made."""
    made = draw(st.permutations(SHOTS))
    earlier = {shot: st.permutations(made[:n]).map(tuple) for n, shot in enumerate(made)}
    return {shot: draw(seen)[: draw(st.integers(0, n))] for n, (shot, seen) in enumerate(earlier.items())}


def reaches(saw, shot, others):
    """Whether a path leads from what a shot saw to one of some others."""
    paths = [(shot,)]
    for _ in SHOTS:
        paths = [(*path, i) for path in paths for i in saw.get(path[-1], ())]
        if any(path[-1] in others for path in paths):
            return True
        paths = [*{path[-1]: path for path in paths}.values()]
    return False


@given(saw=graphs, shots=some)
def test_dependents_are_those_from_which_a_path_leads_here(saw, shots):
    assert dependents(saw, shots) == {i for i in saw if i not in shots and reaches(saw, i, shots)}


@given(saw=graphs, shot=st.sampled_from(SHOTS))
def test_ancestors_are_those_to_which_a_path_leads(saw, shot):
    assert ancestors(saw, shot) == {shot} | {i for i in SHOTS if reaches(saw, shot, {i})}


@given(saw=graphs)
def test_to_depend_is_to_have_as_an_ancestor(saw):
    for i in SHOTS:
        assert dependents(saw, [i]) == {j for j in saw if j != i and i in ancestors(saw, j)}


@given(scene=scenes(), shots=st.lists(st.sampled_from(SHOTS)), first=st.lists(st.sampled_from(SHOTS)))
def test_all_that_is_needed_is_written_once_and_after_what_it_saw(scene, shots, first):
    written = {j for i in first for j in ancestors(scene, i)}
    order = [*writing_order(scene, shots, written)]
    assert len(set(order)) == len(order)
    assert {*order} == {j for i in shots for j in ancestors(scene, i)} - written
    for n, i in enumerate(order):
        assert {*scene[i]} <= written | {*order[:n]}


@given(scene=scenes(), shots=st.lists(st.sampled_from(SHOTS), unique=True), written=some)
def test_what_is_written_is_not_looked_behind(scene, shots, written):
    """Whatever it saw: its keys hold that already."""
    needed, left = set(), [i for i in shots if i not in written]
    while left:
        i = left.pop()
        needed.add(i)
        left += [j for j in scene[i] if j not in written | needed]
    assert {*writing_order(scene, shots, written)} == needed


def test_shots_are_written_in_the_order_in_which_they_are_seen():
    assert [*writing_order({3: (1, 0), 1: (), 0: ()}, [0, 3], ())] == [0, 1, 3]
    assert [*writing_order({}, [2, 1], {1})] == [2]


@given(history=st.lists(st.integers(10, 20), unique=True), made=st.lists(st.sampled_from(SHOTS), unique=True))
def test_of_shots_made_together_those_before_are_visible_when_keys_are_written(history, made):
    for shot in made:
        seen = behind(history, made, shot)
        assert seen[: len(history)] == (*history,)
        assert beside(made, shot, in_order=True) == {*seen[len(history) :]}
        assert beside(made, shot, in_order=False) == {*made} - {shot}
    for one, next_one in pairwise(made):
        assert behind(history, made, next_one) == (*behind(history, made, one), one)
