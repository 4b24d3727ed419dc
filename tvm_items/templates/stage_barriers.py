"""The mbarriers of a pipeline in shared memory: who copies and who multiplies tell one another of its stages by them.

An mbarrier's phase ends when as many threads have arrived as it was initialised for, and all bytes that were announced
have been copied; a thread waits for the end of a phase by its parity (PTX ISA, "Parallel synchronization: mbarrier").
"""

import dataclasses

MBARRIER_BYTES = 8


@dataclasses.dataclass
class StageBarriers:
    """Two mbarriers for each stage, on which it becomes full and empty. Steps, stages and parities are expressions."""

    shared: object  # a buffer in shared memory
    element_bytes: int  # of its elements
    start: int  # where in it they lie, in elements
    stages: int

    def emit_init(self, full_arrivals, empty_arrivals):
        """Emits what one thread does before all others: each phase of the barriers has so many arrivals."""
        from tvm.script import tirx as T
        from tvm.tirx.script.builder import ir as build

        for stage in range(self.stages):
            for barrier, arrivals in ((self.full(stage), full_arrivals), (self.empty(stage), empty_arrivals)):
                build.evaluate(T.ptx["mbarrier.init.shared.b64"](barrier, T.uint32(arrivals)))
        build.evaluate(T.ptx["fence.proxy.async"]())

    def full(self, stage):
        """Returns the address of the mbarrier on which a stage becomes full."""
        return self.address(stage)

    def empty(self, stage):
        """Returns the address of the mbarrier on which a stage becomes empty."""
        return self.address(self.stages + stage)

    def address(self, number):
        from tvm.script import tirx as T

        return T.address_of(self.shared[self.start + number * (MBARRIER_BYTES // self.element_bytes)])

    def emit_arrival(self, barrier):
        from tvm.script import tirx as T
        from tvm.tirx.script.builder import ir as build

        build.evaluate(T.ptx["mbarrier.arrive.shared.b64"](barrier))

    def wait_for_full(self, step):
        """Emits the wait for what is copied for a step."""
        self.wait(self.full(step % self.stages), step // self.stages % 2)

    def wait_for_empty(self, step):
        """Emits the wait for a step's stage; in the first round it is empty."""
        self.wait(self.empty(step % self.stages), (step // self.stages + 1) % 2)

    def wait(self, barrier, parity):
        from tvm.script import tirx as T
        from tvm.tirx.script.builder import ir as build

        build.evaluate(T.cuda.mbarrier_wait(barrier, parity))
