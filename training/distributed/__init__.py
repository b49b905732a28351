"""Many processes make the step of one: ranks, collectives, expert parallelism, sharded checkpoints."""
