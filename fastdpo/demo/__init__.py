"""The demo: a tiny model, the language it speaks, and its alignment in a minute on a CPU."""
