"""The ranking agrees with a sorted list, whatever is posted, posted again and dropped."""

import random

from scheduler.ranking import Ranking


def test_first_is_the_smallest_key_that_is_still_posted() -> None:
    rng = random.Random(4)
    ranking: Ranking[str] = Ranking()
    truth: dict[str, tuple[float, int]] = {}
    for tie in range(5000):
        item = f"item{rng.randrange(40)}"
        if item in truth and rng.random() < 0.4:
            ranking.drop(item)
            del truth[item]
        else:
            truth[item] = (float(rng.randrange(10)), tie)
            ranking.post(item, *truth[item])
        first = ranking.first()
        assert (first.item if first else None) == min(truth, key=truth.__getitem__, default=None)


def test_outdated_entries_do_not_pile_up() -> None:
    ranking: Ranking[str] = Ranking()
    ranking.post("first", 0.0, 0)
    for tie in range(10_000):
        ranking.post("other", 1.0, tie)
    assert len(ranking._heap) < 200
