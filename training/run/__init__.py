"""One run, from its settings to summary.json."""
