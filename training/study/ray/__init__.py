"""Groups of runs as Ray tasks."""
