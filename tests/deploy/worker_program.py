"""`evenhand worker` as a program whose engine and machine a test chooses: see `serve_program`."""

import argparse
import sys

from deploy import cli
from tests.deploy.serve_program import surroundings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from deploy.serve import join

    join.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from deploy.serve import join

    return join.run(args, surroundings())


def main(argv: list[str]) -> int:
    return cli.main(["worker", *argv], {"worker": cli.Command(__name__, "a worker with a test's engine")})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
