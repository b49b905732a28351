"""The hyper step, pure: (state, batch) -> (state, metrics); no file and no process is touched here."""
