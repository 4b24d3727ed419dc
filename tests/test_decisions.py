"""Random decisions on a tile."""

import math
import random

from tvm_items.decisions import move_factor, random_tile


def test_tiles_keep_their_extent():
    rng = random.Random(0)
    for extent, parts in ((1, 5), (7, 3), (360, 4), (2048, 5)):
        tile = random_tile(extent, parts, 64, rng)
        for _ in range(50):
            assert len(tile) == parts and math.prod(tile) == extent and tile[-1] <= 64
            tile = move_factor(tile, 64, rng)
