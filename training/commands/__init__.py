"""Verbs of the command line beside train, study and report."""
