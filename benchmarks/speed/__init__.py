"""Time the step, its parts and generation, interleaved with what they are compared to."""
