"""Generate text: decode with a key-value cache, sample the next token."""
