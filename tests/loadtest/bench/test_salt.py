"""`evenhand bench salt`: what is asked, and how the table is made; the engine is the benchmark's own business."""

import argparse

from loadtest.bench.gateway.salt import SaltFigures, add_arguments, calls, table


def test_all_prompts_of_a_round_begin_alike_and_of_the_next_round_otherwise() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["--requests", "2", "--shared", "30", "--own", "5"])
    asked, later = calls(args, ["a", "b"], 1), calls(args, ["a", "b"], 2)
    assert [call.tenant for call in asked] == ["a", "b", "a", "b"]
    assert len({tuple(call.prompt[:30]) for call in asked}) == 1
    assert len({tuple(call.prompt) for call in asked}) == 4
    assert {call.prompt_tokens for call in asked} == {35}
    assert asked[0].prompt[:30] != later[0].prompt[:30]


def test_ratios_are_taken_within_a_round() -> None:
    rounds = [
        (SaltFigures(0.1, 0.8), SaltFigures(0.2, 0.6)),
        (SaltFigures(0.2, 0.8), SaltFigures(0.3, 0.6)),
        (SaltFigures(0.1, 0.9), SaltFigures(0.3, 0.5)),
    ]
    lines = table(rounds).splitlines()
    assert "| TTFT p50, ms | 100 (100–200) | 300 (200–300) | 2.00 (1.50–3.00) |" in lines
    assert "| prompt tokens found in the cache, % | 80 (80–90) | 60 (50–60) |  |" in lines
