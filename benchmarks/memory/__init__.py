"""Measure memory: of a step, of what autograd saves, of long runs and of saving."""
