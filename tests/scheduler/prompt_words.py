"""What a prompt's words tell of its answer's length: `python -m tests.scheduler.prompt_words FILE`, in ShareGPT's form.

Ridge regression of the log length on hashed words and pairs of words, five folds by conversation. Prints the standard
deviation of what it leaves unexplained, beside that of knowing the mean alone, and of the prompt's length.
"""

import json
import math
import random
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_FEATURES = 2048
_FOLDS = 5
_RIDGE = 1.0


def pairs(file: Path) -> Iterator[tuple[int, str, str]]:
    """Number of the conversation, question, answer."""
    for number, conversation in enumerate(json.loads(file.read_text())):
        turns = conversation["conversations"]
        for asked, said in zip(turns, turns[1:], strict=False):
            if asked["from"] == "human" and said["from"] == "gpt" and asked["value"] and said["value"]:
                yield number, asked["value"], said["value"]


def words(text: str) -> list[float]:
    """Which words and pairs of words there are, hashed, as a vector of length 1."""
    seen = re.findall(r"[a-z']+|\d+|[^\sa-z\d]", text.lower())
    vector = np.zeros(_FEATURES)
    for word in [*seen, *map(" ".join, zip(seen, seen[1:], strict=False))]:
        vector[zlib.crc32(word.encode()) % _FEATURES] = 1.0
    return (vector / math.sqrt(max(1.0, vector.sum()))).tolist()  # type: ignore[no-any-return]


def unexplained(features: Any, lengths: Any, groups: Any) -> float:  # noqa: ANN401
    """Standard deviation of the error on conversations that were not learned from."""
    numbers = sorted(set(groups.tolist()))
    random.Random(1).shuffle(numbers)
    errors = np.zeros(len(lengths))
    for fold in range(_FOLDS):
        held = np.isin(groups, numbers[fold::_FOLDS])
        known, mean = features[~held], lengths[~held].mean()
        kernel = known @ known.T + _RIDGE * np.eye(len(known))
        weights = known.T @ np.linalg.solve(kernel, lengths[~held] - mean)
        errors[held] = lengths[held] - mean - features[held] @ weights
    return float(errors.std())


def main() -> None:
    """Prints it."""
    groups, asked, said = zip(*pairs(Path(sys.argv[1])), strict=True)
    lengths = np.log([len(text) for text in said])
    prompt = np.log([[len(text)] for text in asked])
    known = {
        "the mean": np.zeros_like(prompt),
        "the prompt's length": (prompt - prompt.mean()) / prompt.std(),
        "its words": np.array([words(text) for text in asked]),
    }
    sys.stdout.write(f"{len(said)} answers of {len(set(groups))} conversations; error of log length, knowing\n")
    for name, features in known.items():
        sys.stdout.write(f"  {name}: {unexplained(features, lengths, np.array(groups)):.2f}\n")


if __name__ == "__main__":
    main()
