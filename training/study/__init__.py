"""Many runs in vmapped groups, compared arm by arm."""
