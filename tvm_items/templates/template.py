"""What a template is: a hand-written kernel for a task, with parameters that the tuner chooses."""


class Template:
    """The kernels of a task that differ in their parameters; to the tuner, a design space beside MetaSchedule's.

    A kind of template has a `number`, which records keep: 100 or more, since MetaSchedule's design spaces count from 0,
    and no other's; `parameters`, the options of each; fits(decisions), whether these indices of options make a kernel
    that the device can run and that is no obvious waste; and make(*values), the IRModule of that kernel, whose "main"
    has the task's signature and is scheduled.
    """

    @property
    def choices(self):
        """The number of options of each parameter."""
        return [len(options) for options in self.parameters]

    def read(self, decisions):
        """Returns the values of the parameters."""
        return [options[decision] for options, decision in zip(self.parameters, decisions, strict=True)]

    def realize(self, decisions):
        """Returns the IRModule of a kernel, scheduled. Raises ValueError where the decisions fit no kernel."""
        values = self.read(decisions)
        if not self.fits(decisions):
            raise ValueError(f"no kernel of {values} fits the task and the device")
        return self.make(*values)


def unrolled(count):
    """Emits a loop for the CUDA compiler to unroll.

    build.unroll() has TVM do it, in front of most of its passes, which take three times as long on ResNet-50's kernels
    in TF32 then. The loops over steps come to as many instructions either way.
    """
    from tvm.tirx.script.builder import ir as build

    return build.serial(count, unroll=True)
