"""Which candidates of a task are measured next."""

import math
import os

import numpy as np

from conftest import H200, TURING
from products import make_batched_product, make_product
from tvm_items.measure import build
from tvm_items.search import MIN_TRIALS_OF_A_SPACE, Candidate, Trial, adapt, find_open_spaces, predict, search
from tvm_items.spaces import DesignSpaces
from tvm_items.templates.find import FIRST_TEMPLATE


def test_a_design_space_is_given_up_only_when_it_is_explored_and_slow():
    def trials(space, *seconds):
        return [Trial(space, [], s, None) for s in seconds]

    assert find_open_spaces([0, 1], []) == [0, 1]
    few = trials(0, *[1.0] * 20) + trials(1, *[9.0] * (MIN_TRIALS_OF_A_SPACE - 1))
    assert find_open_spaces([0, 1], few) == [0, 1]
    assert find_open_spaces([0, 1], few + trials(1, 9.0)) == [0]
    assert find_open_spaces([0, 1], few + trials(1, 2.5)) == [0, 1]
    assert find_open_spaces([0, 1], few + trials(1, 2.5, *[9.0] * 20)) == [0]
    assert find_open_spaces([0, 1], trials(0, *[None] * 20) + trials(1, 1.0)) == [1]


def test_a_search_begins_with_what_was_best_at_another_batch_size(tvm):
    arguments = tvm.ir.save_json(make_product(rows=32)), TURING
    spaces = DesignSpaces(*arguments)
    found = search(*arguments, [], [], 16, 1)
    space, decisions, _ = next(candidate for candidate in found if spaces[candidate.space].split == 0)

    module = tvm.ir.save_json(make_product(rows=96))
    found = [candidate[:2] for candidate in search(module, TURING, [], [(space, decisions)], 16, 1)]
    rows, *rest = decisions
    fitting = (space, [[3 * rows[0], *rows[1:]], *rest])
    assert len(found) == 16 and fitting in found
    spaces = DesignSpaces(module, TURING)
    assert spaces.adapt(space, [[1, 64, 1, 1, 1], *rest]) is None  # 64 do not divide 96
    assert spaces.adapt(space, rest) is None and spaces.adapt(len(spaces), decisions) is None

    kin = [(99, []), (space, rest), (space, [None] * len(decisions)), (space, decisions), (space, decisions)]
    assert [candidate[:2] for candidate in adapt(module, TURING, [], kin, 8)] == [fitting]
    assert adapt(module, TURING, [Trial(*fitting, 1e-6, None)], kin, 8) == []  # it was measured
    loose = (space, [[1, 2 * rows[1] * 5, *rows[2:]], *rest])
    (found,) = [candidate[:2] for candidate in adapt(module, TURING, [], [loose], 8)]
    assert found[1][1:] == rest and math.prod(found[1][0]) == 96 and spaces.adapt(*loose) is None
    assert [candidate[:2] for candidate in adapt(module, TURING, [], [loose, kin[-1]], 1)] == [fitting]


def test_templates_are_searched_beside_the_design_spaces_of_metaschedule(tvm, tmp_path):
    module, *_ = make_batched_product((1, 64, 64, 64), "float16")
    module_json = tvm.ir.save_json(module)
    spaces = DesignSpaces(module_json, H200)
    assert spaces.numbers == [*range(len(spaces)), *spaces.templates] and min(spaces.templates) >= FIRST_TEMPLATE
    found = search(module_json, H200, [], [], 16, 1)
    assert set(spaces.templates) == {candidate.space for candidate in found} and len(found) == 16  # they come first
    trials = [Trial(*candidate[:2], 1e-6, candidate.features) for candidate in found]
    again = search(module_json, H200, trials, [], 16, 1)
    assert set(spaces.numbers) == {candidate.space for candidate in again}
    space, decisions, _ = next(candidate for candidate in found if candidate.space in spaces.templates)
    assert spaces.adapt(space, decisions) == decisions
    for damaged in (decisions[1:], [-1, *decisions[1:]], [99, *decisions[1:]], [[1, 2], *decisions[1:]]):
        assert spaces.adapt(space, damaged) is None and spaces.realize(space, damaged) is None
    path = build(module_json, H200, (space, decisions), str(tmp_path / "kernel.so"))
    assert os.path.getsize(path) > 0


def test_each_kind_of_design_space_has_trees_of_its_own(tvm):
    def trials(space, width, slowest):
        return [Trial(space, [i], 1e-3 * (1 + i % slowest), np.full((1, width), i % slowest)) for i in range(20)]

    candidates = [
        Candidate(space, [], np.full((1, width), value, "float32"))
        for space, width in ((0, 164), (FIRST_TEMPLATE, 9), (FIRST_TEMPLATE + 1, 7))
        for value in (0, 3)
    ]
    scores = predict(trials(0, 164, 4) + trials(FIRST_TEMPLATE, 9, 4), candidates)
    assert scores[0] > scores[1] and scores[2] > scores[3] and scores[4:] == [0, 0]
