"""Decisions: what the sampling instructions of a design space return, drawn at random or changed a little.

Those of one candidate are a list in the order of the instructions. The decision on a tile is a list of factors, whose
product is the extent of a loop; every other is an index into what can be chosen. What can be decided is, for each
instruction, a Tile, the number of options, or None where only TVM knows.
"""

import functools
import math
import typing


class Tile(typing.NamedTuple):
    """What a sampling instruction for a tile may return: `parts` factors of `extent`."""

    extent: int
    parts: int
    max_innermost: int  # the limit of the last factor
    is_whole: bool = False  # the first factor is all of the extent, and the others are 1


def sampling_instructions(trace):
    return [instruction for instruction in trace.insts if instruction.kind.name.startswith("Sample")]


def is_tile(instruction):
    return instruction.kind.name == "SamplePerfectTile"


def read_decision(trace, instruction):
    """Returns what the instruction returned in this trace: a list of factors for a tile, else an index."""
    decision = trace.decisions[instruction]
    return [int(factor) for factor in decision] if is_tile(instruction) else int(decision)


def find_choice(trace, instruction):
    """Returns what a sampling instruction can return: a Tile, a number of options, or None where only TVM knows."""
    if is_tile(instruction):
        parts, max_innermost = (int(str(attribute)) for attribute in instruction.attrs)
        return Tile(math.prod(read_decision(trace, instruction)), parts, max_innermost)
    return len(instruction.attrs[0]) if instruction.kind.name == "SampleCategorical" else None


def random_decisions(choices, rng):
    return [random_decision(choice, rng) for choice in choices]


def random_decision(choice, rng):
    """Returns a random decision, None where TVM is to draw it."""
    if isinstance(choice, Tile):
        if choice.is_whole:
            return [choice.extent] + [1] * (choice.parts - 1)
        return random_tile(choice.extent, choice.parts, choice.max_innermost, rng)
    return rng.randrange(choice) if choice else None


def random_tile(extent, parts, max_innermost, rng):
    """Returns `parts` factors whose product is `extent`, the last at most `max_innermost`."""
    while True:
        factors = [1] * parts
        for prime in prime_factors(extent):
            factors[rng.randrange(parts)] *= prime
        if factors[-1] <= max_innermost:
            return factors


@functools.cache
def prime_factors(number):
    """Returns the number's prime factors in ascending order, with repetition."""
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors


def mutate(choices, decisions, rng):
    """Returns the decisions with one or two of them changed: a tile's prime factor moves, a choice is drawn anew."""
    decisions = list(decisions)
    for _ in range(rng.randint(1, 2) if decisions else 0):
        i = rng.randrange(len(decisions))
        if not isinstance(choices[i], Tile):
            decisions[i] = random_decision(choices[i], rng)
        elif not choices[i].is_whole:
            decisions[i] = move_factor(decisions[i], choices[i].max_innermost, rng)
    return decisions


def move_factor(factors, max_innermost, rng):
    """Returns a tile's factors with one prime factor moved from one to another, unless the last one gets too large."""
    sources = [i for i, factor in enumerate(factors) if factor > 1]
    if not sources:
        return factors
    source = rng.choice(sources)
    destination = rng.choice([i for i in range(len(factors)) if i != source])
    prime = rng.choice(prime_factors(factors[source]))
    moved = list(factors)
    moved[source] //= prime
    moved[destination] *= prime
    return moved if moved[-1] <= max_innermost else factors


def adapt_decision(choice, decision, loosely=False):
    """Returns a decision of another task's as it fits this choice, None where it does not.

    The first factor of a tile, the number of blocks or of steps, takes what differs in the extent. loosely: of the
    other factors, from the innermost one on, only what divides the extent is kept.
    """
    if isinstance(choice, Tile) != isinstance(decision, list):
        return None
    if isinstance(choice, Tile):
        if len(decision) != choice.parts:
            return None
        rest, kept = choice.extent, []
        for factor in reversed(decision[1:]):
            kept.insert(0, math.gcd(rest, factor))
            rest //= kept[0]
        if (kept != decision[1:] and not loosely) or (choice.is_whole and rest != choice.extent):
            return None
        return [rest, *kept]
    if choice is not None and (decision is None or decision >= choice):
        return None
    return decision
