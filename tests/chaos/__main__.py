"""`python -m tests.chaos`: one run by its seed; prints its report as JSON, and ends with 1 if any answer was wrong."""

import argparse
import asyncio
import sys

from tests.chaos.chaos import Chaos


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="what the plan follows from (default: 1)")
    parser.add_argument("--blows", type=int, default=20, help="how often a worker is killed or stopped (default: 20)")
    args = parser.parse_args()
    report = asyncio.run(Chaos(args.seed, args.blows).run())
    sys.stdout.write(report.as_json() + "\n")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
