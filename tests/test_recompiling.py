"""torch.compile on models that leave something behind after an inference, so that the next one is compiled anew."""

import pytest
import torch

import benchmark
from harness.recompiling import MOST_RECOMPILES, recompiling_fails


class Keeping(torch.nn.Module):
    """Counts its first inferences, and runs other code once it has."""

    def __init__(self, inferences):
        super().__init__()
        self.inferences, self.count = inferences, 0

    def forward(self, x):
        if self.count < self.inferences:
            self.count += 1
        return (x * self.count,)


def compile_and_count(module, before=lambda: None):
    """Returns (what runs before() and a module, its first outputs, seconds, how often it was compiled)."""
    torch._dynamo.reset()
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph

    model = torch.compile(module, backend=backend)

    def run_after():
        before()
        return model(torch.ones(2))

    run, outputs, seconds = benchmark.compile_and_run(lambda: run_after, "cpu")
    return run, outputs, seconds, len(compiled)


def test_the_second_compilation_is_a_part_of_the_first():
    run, (first,), seconds, compiled = compile_and_count(Keeping(1))
    assert compiled == 2 and seconds > 0 and (first == 1).all()
    with recompiling_fails():
        assert (run()[0] == 1).all()


def test_a_compilation_may_come_with_the_third_inference():
    """As LeViT's with Python 3.12."""
    module, inferences = Keeping(0), []

    def before():
        inferences.append(1)
        module.count = int(len(inferences) > 2)

    run, _, seconds, compiled = compile_and_count(module, before)
    assert compiled == 2 and seconds > 0
    with recompiling_fails():
        assert (run()[0] == 1).all()


def test_a_model_that_does_not_settle_fails_in_the_timed_runs():
    run, *_, compiled = compile_and_count(Keeping(MOST_RECOMPILES + 2))
    assert compiled == MOST_RECOMPILES + 1
    reasons = r"compiles anew; 0/6: self.count == 3; 0/4: self.count == 2; .*; 0/0: self.count == 0$"
    with pytest.raises(torch._dynamo.exc.RecompileError, match=reasons), recompiling_fails():
        run()
