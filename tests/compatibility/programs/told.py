"""What every program here is told on its command line, and how it tells what worked: one line each.

python PROGRAM URL MODEL FOLDER: the gateway's address with /v1, the model's name, and the folder with its tokenizer.
"""

import sys

URL, MODEL, FOLDER = sys.argv[1:4]
KEY = "any"  # the gateway is open
QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."


def works(what: str) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


def same(seen: object, expected: object) -> None:
    """AssertionError, with both, where they differ."""
    assert seen == expected, f"{seen!r} in place of {expected!r}"
