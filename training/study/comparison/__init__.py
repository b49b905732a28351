"""Comparison of arms: what is tuned, the statistics of differences, effective speed-up, and a table of the terminal."""
