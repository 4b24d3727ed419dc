"""What every test item needs, whatever compiler it is of: cases, models, inputs, checks, processes and rows."""

import sys

# Where this package is installed, transformers downloads compiled kernels from the hub and runs them. It is looked for
# when transformers loads its first model class, which is after this.
sys.modules["kernels"] = None
