"""A task's design spaces for CUDA: what they are, and which decisions fit."""

from conftest import H200
from products import make_product
from tvm_items.search import MIN_TRIALS_OF_A_SPACE, Trial, search
from tvm_items.spaces import DesignSpaces


def test_every_rewriting_has_design_spaces_for_cuda(tvm):
    arguments = tvm.ir.save_json(make_product(rows=32)), H200
    spaces = DesignSpaces(*arguments)
    assert sorted({space.split for space in spaces}) == [0, 1, 2]
    assert all(space.operands for space in spaces)
    tried = [Trial(number, [], None, None) for number in spaces.templates for _ in range(MIN_TRIALS_OF_A_SPACE)]
    found = [each for each in search(*arguments, tried, [], 16, 1) if each.space not in spaces.templates]
    assert {spaces[number].split for number, _, _ in found} == {0, 1, 2}
    for number, decisions, _ in found:
        split = spaces[number].split
        module, made = spaces.realize(number, decisions)
        assert made == decisions and spaces.adapt(number, decisions) == decisions
        assert split < 2 or decisions[0] == [2, 1, 1, 1, 1]
        kernels = module.script().count('thread="blockIdx.x"')
        assert kernels == {0: 2, 1: 1, 2: 2}[split]
    # 24 KiB of shared memory, and three or four times as much where loading is pipelined.
    assert {space.stages for space in spaces} == {1, 3, 4}
    for number, space in ((i, space) for i, space in enumerate(spaces) if space.split == 0):
        tiles = [[1, 1, 32, 1, 1], [1, 1, 32, 1, 2], [2, 64, 1]]
        decisions = tiles + [0] * (len(space.choices) - len(tiles))
        assert space.fits(decisions) == (space.stages == 1)
        assert (spaces.realize(number, decisions) is None) == (space.stages > 1)
