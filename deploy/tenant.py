"""`evenhand tenant`: generates and hashes API keys, so that the tenant file needs no plain keys."""

import argparse
import sys
from getpass import getpass

from server.request.tenants import hashed, key_id, new_key


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=("new-key", "hash-key"),
        help="new-key: generate a key and print it with its hash; hash-key: hash the key on standard input",
    )


def run(args: argparse.Namespace) -> int:
    """Writes to standard output what the tenant file's `keys` take. 2 for a key that is too short."""
    # Never as an argument: those stand in the shell's history and in the list of processes.
    key = new_key() if args.action == "new-key" else _read()
    try:
        text = hashed(key)
    except ValueError as error:
        sys.stderr.write(f"evenhand tenant: {error}\n")
        return 2
    if args.action == "new-key":
        sys.stdout.write(f"key (give it to the tenant, it is shown this once): {key}\n")
        sys.stdout.write(f"for the tenant file: {text}\nid in /admin: {key_id(text)}\n")
    else:
        sys.stdout.write(f"{text}\n")
    return 0


def _read() -> str:
    return getpass("key: ") if sys.stdin.isatty() else sys.stdin.readline().strip()
