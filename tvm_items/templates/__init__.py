"""Kernels with parameters, written by hand, that the tuner searches beside the design spaces of MetaSchedule."""
