"""`python -m bench`: the questions; --quick asks them all at small sizes and writes a report."""

import argparse
import time
import traceback
from pathlib import Path

from bench.command import QUESTIONS, ask
from bench.harness import RESULTS


def main(arguments: list[str] | None = None) -> int:
    """List the questions, or ask them all and write the report; 1 if one of them failed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="ask all at small sizes")
    parser.add_argument("--full", action="store_true", help="ask all at full size")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of rows to append to")
    chosen = parser.parse_args(arguments)
    if not (chosen.quick or chosen.full):
        for question, text in QUESTIONS.items():
            print(f"python -m bench.{question:10} {text}")
        print(f"python -m bench.{'report':10} RESULTS.md and plots from the rows")
        print(f"python -m bench.{'static':10} the head's compiled code on every GPU, without one")
        print(f"python -m bench.{'compare':10} OLD NEW: what changed beyond noise")
        return 0
    failed = []
    for question in QUESTIONS:
        began = time.perf_counter()
        try:
            ask(question, chosen.results, quick=chosen.quick)
        except Exception:
            traceback.print_exc()
            failed.append(question)
        print(f"-- {question}: {time.perf_counter() - began:.0f} s", flush=True)
    from bench.report import write

    print("\n".join(str(path) for path in write(chosen.results)))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
