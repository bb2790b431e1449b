"""A contender of bench.contest that ends badly; apart from the tests, as it needs few imports."""

from bench.contest import MissingPeer


def failing_contender(case, turns):
    """Ready, one good turn, then what the case says."""
    turns.ready({"fact": 1})
    for number, _ in enumerate(turns):
        if number == 1:
            raise {"memory": MemoryError, "peer": MissingPeer}[case["how"]]("as asked")
        turns.answer({"wall_s": 0.5})
