"""Files that survive kills and power cuts: checkpoints, records, results, locks."""
