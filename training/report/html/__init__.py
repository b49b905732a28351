"""HTML pages of runs and studies, one file each, without scripts."""
