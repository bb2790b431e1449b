"""Models: loading, adapters, the head, attention over packed pairs."""
