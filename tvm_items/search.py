"""The search: which candidates of a task to measure next, by evolution and a cost model.

The cost model is MetaSchedule's (Shao et al., arXiv:2205.13603): boosted trees on the features of a schedule.
"""

import collections
import itertools
import json
import math
import random
import typing

import numpy as np

from tvm_items.decisions import mutate, random_decisions
from tvm_items.spaces import cached_design_spaces

ROUND_SIZE = 16  # candidates of a task that are measured between two searches
POPULATION_SIZE = 48  # valid candidates that the cost model ranks for them
PARENTS_PER_SPACE = 8  # best candidates of a design space so far, that new ones are mutated from
MIN_TRIALS_OF_A_SPACE = 4  # before a design space may be given up, and
SLOWDOWN_AFTER_ONE_TRIAL = 8  # how much slower than the best it may be, relatively: find_open_spaces()
RANDOM_SHARE = 0.25  # of the population: not mutated from anything
FAVOURITES_SHARE = 0.9  # of a round: the cost model's favourites; the rest is drawn from the population at random
MAX_DRAWS = 10_000  # of random decisions, until some fit


class Candidate(typing.NamedTuple):
    """A way to schedule a task that can be built."""

    space: int  # the number of one of the task's design spaces
    decisions: list  # on its sampling instructions: see decisions.py
    features: np.ndarray  # what the cost model sees: fp32 (stores, features)


class Trial(typing.NamedTuple):
    """A candidate that was measured."""

    space: int
    decisions: list
    seconds: float | None  # None where it failed
    features: np.ndarray | None  # None where an earlier run measured it


def search(module_json, target_json, trials, relatives, count, seed):
    """Returns up to `count` new Candidates of a task, the most promising first.

    module_json: the task's. trials: its Trials so far. relatives: the best (space, decisions) of its kin and of the
    model's other tasks, the likeliest first. Where they fit as they are, they are tried: a network has convolutions
    that differ in a stride or in what is fused with them, and in nothing else. Adapted to other extents they only take
    part; until there is a cost model, in front. The evolution keeps no state but that, so that any process can go on
    with any task.
    """
    spaces, rng = cached_design_spaces(module_json, target_json), random.Random(seed)
    population = Population(spaces, rng, trials)
    borrowed = population.borrow(relatives, count)
    numbers = templates_to_try_first(spaces, trials)
    open_spaces = find_open_spaces(numbers or spaces.numbers, trials)
    population.grow(open_spaces)
    if numbers and len(population.candidates) < count:  # they have no more
        open_spaces = find_open_spaces(spaces.numbers, trials)
        population.grow(open_spaces)
    scores = predict([trial for trial in trials if trial.features is not None], population.candidates)
    return choose_round(population.candidates, scores, borrowed, open_spaces, count, rng)


def adapt(module_json, target_json, trials, kin, count):
    """Returns up to `count` new Candidates of a task: what is best for its kin, adapted to its extents.

    kin: (space, decisions), the likeliest first; the rest is as in search(), of which this takes a small part of the
    time: nothing is drawn at random, and there is no cost model. What fits loosely comes after all that fits.
    """
    population = Population(cached_design_spaces(module_json, target_json), random.Random(0), trials)
    for loosely in (False, True):
        population.borrow(kin, count, count, loosely)
    return population.candidates


class Population:
    """Valid candidates of a task, none of which was measured before."""

    def __init__(self, spaces, rng, trials):
        self.spaces, self.rng = spaces, rng
        self.candidates = []
        self.known = {candidate_key(trial.space, trial.decisions) for trial in trials}
        self.parents = find_parents(trials)

    def borrow(self, relatives, count, limit=POPULATION_SIZE // 2, loosely=False):
        """Adds what fits of `relatives`, up to `limit` candidates; returns the indices of `count` that fit as they are.

        loosely: as in adapt_decision().
        """
        borrowed = []
        for space, decisions in relatives:
            adapted = self.spaces.adapt(space, decisions, loosely)
            is_full = len(self.candidates) >= limit
            if adapted is None or candidate_key(space, adapted) in self.known or is_full:
                continue
            is_added = self.add(space, adapted)
            if is_added and adapted == decisions and len(borrowed) < count:
                borrowed.append(len(self.candidates) - 1)
        return borrowed

    def grow(self, open_spaces):
        """Adds new candidates of the open design spaces in turns, until the population has its size or none is new."""
        to_draw_from = collections.deque(open_spaces)
        for _ in range(4 * POPULATION_SIZE):
            if len(self.candidates) >= POPULATION_SIZE or not to_draw_from:
                break
            space = to_draw_from.popleft()
            decisions = self.draw(space)
            if decisions is not None:
                self.add(space, decisions)
                to_draw_from.append(space)

    def draw(self, space):
        """Returns decisions that fit and are not known, mutated or at random; None where none were found."""
        choices, parents, rng = self.spaces[space].choices, self.parents[space], self.rng
        for _ in range(MAX_DRAWS):
            if parents and rng.random() > RANDOM_SHARE:
                rank = int(rng.expovariate(0.5))  # the best one is the likeliest
                decisions = mutate(choices, parents[min(rank, len(parents) - 1)], rng)
            else:
                decisions = random_decisions(choices, rng)
            if self.spaces[space].fits(decisions) and candidate_key(space, decisions) not in self.known:
                return decisions
        return None

    def add(self, space, decisions):
        """Adds a candidate, where the target allows it and what TVM draws for it is new; returns whether it did."""
        self.known.add(candidate_key(space, decisions))
        sampled = self.spaces.sample(space, decisions, self.rng.randrange(1, 2**31))
        if sampled is None:
            return False
        made, features = sampled
        if made != decisions and candidate_key(space, made) in self.known:
            return False
        self.known.add(candidate_key(space, made))
        self.candidates.append(Candidate(space, made, features))
        return True


def candidate_key(space, decisions):
    return json.dumps([space, decisions])


def find_parents(trials):
    """Returns {number: decisions of its best trials, fastest first} of design spaces; others have an empty list."""
    parents = collections.defaultdict(list)
    for trial in sorted((trial for trial in trials if trial.seconds), key=lambda trial: trial.seconds):
        if len(parents[trial.space]) < PARENTS_PER_SPACE:
            parents[trial.space].append(trial.decisions)
    return parents


def templates_to_try_first(spaces, trials):
    """Returns the numbers of a task's templates while one of them is hardly explored, an empty list from then on.

    MetaSchedule's design spaces wait for them. Of 139 tasks that both were measured for, its were the best in 7
    (docs/tuning.md), and a candidate of theirs takes ten times as long to draw.
    """
    tried = collections.Counter(trial.space for trial in trials)
    is_explored = all(tried[number] >= MIN_TRIALS_OF_A_SPACE for number in spaces.templates)
    return [] if is_explored else list(spaces.templates)


def find_open_spaces(numbers, trials):
    """Returns the numbers of the design spaces, of `numbers`, that are worth more trials.

    Those are hardly explored, or nearly as good as the best. Each of them gets an equal share of a round: the cost
    model alone settles on the first space that looks good, and the other one may be three times faster once its tiles
    are right. The more candidates a space has had, the closer must its best one be.
    """
    measured = {i: [trial.seconds or math.inf for trial in trials if trial.space == i] for i in numbers}
    best = min(itertools.chain(*measured.values()), default=math.inf)

    def is_open(times):
        if len(times) < MIN_TRIALS_OF_A_SPACE:
            return True
        return min(times) <= best * (1 + SLOWDOWN_AFTER_ONE_TRIAL / len(times))

    return [i for i in numbers if is_open(measured[i])]


def predict(trials, candidates):
    """Returns a score for each of `candidates`, higher for faster, by TVM's boosted trees.

    trials: those with features, which the trees are trained on. Features of different widths are of different kinds of
    design spaces, and have trees of their own. Scores are 0 where there is less than a round of a kind.
    """
    scores = [0.0] * len(candidates)
    best_s = min((trial.seconds for trial in trials if trial.seconds), default=None)
    widths = [candidate.features.shape[1] for candidate in candidates]
    for width in set(widths) if best_s else ():
        known = [trial for trial in trials if trial.features.shape[1] == width]
        chosen = [i for i, other in enumerate(widths) if other == width]
        if len(known) >= ROUND_SIZE:
            for i, score in zip(chosen, predict_kind(best_s, known, [candidates[i] for i in chosen])):
                scores[i] = float(score)
    return scores


def predict_kind(best_s, trials, candidates):
    """Returns scores for candidates by trees that are trained on trials, all of them of one kind of design space."""
    from tvm.s_tir.meta_schedule.cost_model.xgb_model import XGBConfig, XGBModel

    model = XGBModel(config=XGBConfig(nthread=1), num_warmup_samples=0)
    labels = np.array([best_s / trial.seconds if trial.seconds else 0.0 for trial in trials], dtype="float32")
    # Below its public methods, which would extract the features of everything measured anew at each search.
    model._train([trial.features for trial in trials], labels)
    return model._predict([candidate.features for candidate in candidates])


def choose_round(candidates, scores, borrowed, open_spaces, count, rng):
    """Returns up to `count` of the candidates: those borrowed, then favourites by their scores, then some at random.

    borrowed: indices. The favourites are taken from the open design spaces in turns.
    """
    ranking = sorted((i for i in range(len(candidates)) if i not in borrowed), key=lambda i: -scores[i])
    by_space = [[i for i in ranking if candidates[i].space == space] for space in open_spaces]
    in_turns = [i for turn in itertools.zip_longest(*by_space) for i in turn if i is not None]
    chosen = borrowed + in_turns[: max(0, round(FAVOURITES_SHARE * count) - len(borrowed))]
    rest = [i for i in in_turns if i not in chosen]
    chosen += rng.sample(rest, min(len(rest), count - len(chosen)))
    return [candidates[i] for i in chosen]
