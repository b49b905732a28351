"""Ask scientific questions; nothing is timed here."""
