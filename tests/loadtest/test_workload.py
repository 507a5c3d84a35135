from itertools import islice, pairwise
from pathlib import Path
from random import Random
from statistics import mean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.call import TraceCall
from loadtest.traces import arrivals
from loadtest.traces.arrivals import timed
from loadtest.traces.formats import TraceRow
from loadtest.traces.prompts import text_prompts, token_prompts
from loadtest.traces.workload import MIXES, Fit, Maker, Shape, conversations, mean_lengths, parse_shares, shapes


def drawn(name: str, number: int = 20_000, traces: Path | None = None) -> list[Shape]:
    return list(islice(shapes(name, Random(1), traces), number))


@pytest.mark.parametrize(
    ("name", "prompt_tokens", "output_tokens", "cv"),
    [("S", 276, 348, 0.68), ("C", 1690, 101, 1.5), ("R", 1670, 296, 3.3)],
)
def test_a_synthetic_workload_has_the_published_means_and_spread(
    name: str, prompt_tokens: int, output_tokens: int, cv: float
) -> None:
    seen = drawn(name)
    outputs = [shape.output_tokens for shape in seen]
    assert mean_lengths(seen) == (pytest.approx(prompt_tokens, rel=0.12), pytest.approx(output_tokens, rel=0.12))
    assert pstdev(outputs) / mean(outputs) == pytest.approx(cv, rel=0.2)


def test_a_mix_has_its_kinds_in_their_shares() -> None:
    seen = drawn("R")
    for kind, share in MIXES["R"].items():
        assert sum(shape.kind == kind for shape in seen) / len(seen) == pytest.approx(share, abs=0.01)


def test_the_same_seed_is_the_same_workload() -> None:
    assert drawn("C", 100) == drawn("C", 100)


def test_lengths_come_from_a_trace_where_there_is_one(tmp_path: Path) -> None:
    lengths = "conv_id,turn,role,num_chars,num_tokens\na,0,human,1,33\na,1,gpt,1,44\n"
    (tmp_path / "sharegpt_v3_lengths.first2000convs.csv").write_text(lengths)
    assert set(drawn("S", 10, tmp_path)) == {Shape(33, 44, "sharegpt")}


def test_an_unknown_workload_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="S, C, R"):
        drawn("X", 1)


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.floats(0.001, 10), st.integers(16, 10**5))
def test_whatever_is_scaled_fits_the_context(prompt: int, output: int, scale: float, context: int) -> None:
    shape = Fit(scale, context)(Shape(prompt, output))
    assert min(shape.prompt_tokens, shape.output_tokens) >= 1
    assert shape.prompt_tokens + shape.output_tokens <= context


def test_a_prompt_has_exactly_its_tokens_and_is_made_the_same_again() -> None:
    make = token_prompts(3)
    assert len(make(1, 500, (), 0)) == 500
    assert make(1, 500, (), 0) == make(1, 500, (), 0)
    assert make(1, 500, (), 0) != make(2, 500, (), 0)


def test_prompts_begin_alike_where_their_blocks_do() -> None:
    make = token_prompts(3)
    first, second = make(1, 100, (7, 8), 32), make(2, 100, (7, 9), 32)
    assert first[:32] == second[:32]
    assert first[32:64] != second[32:64]
    assert len(make(3, 40, (7, 8), 32)) == 40


def test_a_text_prompt_has_exactly_its_tokens_under_the_models_tokenizer(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="no tokenizers installed")
    vocabulary = {"[UNK]": 0, "river": 1, "stone": 2, "cloud": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = text_prompts(1, tmp_path)(5, 37, (), 0)
    assert isinstance(text, str)
    assert len(tokenizer.encode(text).ids) == 37
    one, two = (text_prompts(1, tmp_path)(call, 37, (7, 8, 9), 16) for call in (5, 6))
    assert isinstance(one, str) and isinstance(two, str)
    assert one.split()[:32] == two.split()[:32] != text.split()[:32]
    assert one.split()[32:] != two.split()[32:]
    assert len(tokenizer.encode(one).ids) == 37


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="no tokenizers installed")
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        text_prompts(1, tmp_path)


def test_tenants_ask_in_their_shares() -> None:
    maker = Maker(token_prompts(1), Fit(0.01), parse_shares("heavy=3,light"))
    calls = list(islice(maker.calls(shapes("S", Random(1)), (at / 10 for at in range(2000)), Random(2)), 2000))
    assert sum(call.tenant == "heavy" for call in calls) / 2000 == pytest.approx(0.75, abs=0.04)
    assert [call.at_s for call in calls[:3]] == [0.0, 0.1, 0.2]


def test_a_replayed_trace_keeps_its_tenants_its_lengths_and_its_times() -> None:
    rows = [TraceRow(0.0, 10, 5, tenant="a"), TraceRow(3.0, 20, 6)]
    maker = Maker(token_prompts(1), shares={"rest": 1.0})
    calls = list(maker.replay(rows, timed((row.at_s or 0.0 for row in rows), 2.0), Random(1)))
    assert [(call.tenant, call.at_s, call.prompt_tokens, call.output_tokens) for call in calls] == [
        ("a", 0.0, 10, 5),
        ("rest", 1.5, 20, 6),
    ]


@pytest.mark.parametrize("text", ["a=x", "=3", "a=0", "a=-1"])
def test_shares_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="NAME=SHARE"):
        parse_shares(text)


def test_turns_of_a_conversation_begin_alike_and_wait_for_each_other() -> None:
    rows = [TraceRow(0.0, 200, 5, session="s"), TraceRow(1.0, 300, 5, session="s"), TraceRow(2.0, 200, 5, session="o")]
    first, second, other = Maker(token_prompts(0)).replay(rows, (0.0, 1.0, 2.0), Random(1))
    assert [(call.session, call.waits) for call in (first, second, other)] == [("s", True), ("s", True), ("o", True)]
    assert first.prompt[:192] == second.prompt[:192]
    assert first.prompt[:64] != other.prompt[:64]
    assert not [call for call in Maker(token_prompts(0), wait=False).replay(rows, (0.0,) * 3, Random(1)) if call.waits]


def spoken(number: int, context_tokens: int = 8192) -> list[TraceCall]:
    maker = Maker(token_prompts(0), Fit(1.0, context_tokens), parse_shares("a=1,b=1"))
    calls = maker.conversations(conversations(Random(1)), arrivals.poisson(1.0, Random(2)), Random(3))
    return list(islice(calls, number))


def test_a_question_waits_for_the_answer_before_it_and_begins_with_what_was_said() -> None:
    calls = spoken(300)
    assert all(call.waits for call in calls)
    later = [(before, call) for before, call in pairwise(calls) if before.session == call.session]
    assert len(later) > 150
    for before, call in later:
        assert (call.session, call.tenant, call.at_s) == (before.session, before.tenant, before.at_s)
        assert call.prompt_tokens >= before.prompt_tokens + before.output_tokens
        shared = before.prompt_tokens // 64 * 64
        assert call.prompt[:shared] == before.prompt[:shared]
    assert {call.tenant for call in calls} == {"a", "b"}


def test_conversations_are_as_long_as_those_of_sharegpt() -> None:
    rows = list(islice(conversations(Random(1)), 20_000))
    assert sum(row.output_tokens for row in rows) / len(rows) == pytest.approx(314, rel=0.05)
    assert len(rows) / len({row.session for row in rows}) == pytest.approx(3.4, rel=0.05)


def test_a_conversation_ends_where_the_context_does() -> None:
    assert all(call.prompt_tokens + call.output_tokens <= 1024 for call in spoken(500, 1024))


def test_conversations_of_a_trace_keep_their_turns(tmp_path: Path) -> None:
    lines = ["conv_id,turn,role,num_chars,num_tokens"]
    for turn, (role, tokens) in enumerate([("human", 10), ("gpt", 20), ("human", 5), ("gpt", 7)]):
        lines.append(f"x,{turn},{role},1,{tokens}")
    (tmp_path / "sharegpt_v3_lengths.first2000convs.csv").write_text("\n".join(lines))
    first, second, third = islice(conversations(Random(0), tmp_path), 3)
    assert (first.prompt_tokens, first.output_tokens, second.prompt_tokens, second.output_tokens) == (10, 20, 35, 7)
    assert first.session == second.session != third.session
