"""What fastdpo costs and gains, measured beside its peers: one question a file.

`python -m bench` lists the questions, `python -m bench --quick` asks them all at small sizes.
Nothing imports this package.
"""
