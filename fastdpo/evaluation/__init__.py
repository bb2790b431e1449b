"""Policy and reference over held-out pairs, for evaluate, score and merge."""
