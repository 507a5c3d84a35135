import gzip
import json
import os
from pathlib import Path

import pytest
import zstandard

from loadtest.traces.columns import parse_columns
from loadtest.traces.formats import READERS, Skipped, TraceRow, read, recognise

REAL = Path(os.environ.get("EVENHAND_TRACES", Path(__file__).parents[3] / "shared" / "traces"))

SAMPLES = {
    "azure": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        "2023-11-16 18:15:46.6805900,374,44\r\n"
        "2023-11-16 18:15:50.9951690,396,109\r\n"
        "2023-11-16 18:15:51.2224670,many,55\r\n"
        "2023-11-16 18:15:51.3910170,91,16"
    ),
    "vtc-arena": (
        "req_id,adapter_dir,prompt_len,output_len,req_time\n"
        "0,adapter-8,13,199,0.5\n1,adapter-2,36,137,0.7\n2,adapter-2,0,1,0.8\n"
    ),
    "mooncake": (
        '{"timestamp": 3000, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, 2]}\n'
        '{"timestamp": 6000, "input_length": 7322, "output_length": 490, "hash_ids": [0, 14]}\n'
        '{"timestamp": 6000, "input_length": 10}\nnot json\n'
    ),
    "burstgpt": (
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "45,,3.2,ChatGPT,472,18,490,API log\n"
        "53.5,7,9.1,GPT-4,100,200,300,Conversation log\n"
        "54,,0,ChatGPT,1087,0,1087,API log\n"
        "60,7,4.4,GPT-4,420,90,510,Conversation log\n"
    ),
    "qwen-bailian": (
        '{"chat_id": 5, "parent_chat_id": -1, "timestamp": 61.1, "input_length": 40, "output_length": 9, '
        '"type": "text", "turn": 1, "hash_ids": [1, 2]}\n'
        '{"chat_id": 6, "parent_chat_id": -1, "timestamp": 61.2, "input_length": 7, "output_length": 9, '
        '"type": "search", "turn": 1, "hash_ids": []}\n'
        '{"chat_id": 9, "parent_chat_id": 5, "timestamp": 70.1, "input_length": 80, "output_length": 3, '
        '"type": "text", "turn": 2, "hash_ids": [1, 2, 8, 9]}\n'
        '{"chat_id": 10, "parent_chat_id": 9, "timestamp": 71, "input_length": 80, "turn": 3, "hash_ids": [1]}\n'
    ),
    "sharegpt-lengths": (
        "conv_id,turn,role,num_chars,num_tokens\n"
        "a,0,human,190,33\na,1,gpt,1298,256\na,2,human,188,35\na,3,gpt,1659,329\n"
        "a,0,gpt,10,5\na,1,human,10,7\na,2,gpt,10,9\n"
    ),
    "sharegpt": (
        '[{"id": "x", "conversations": [{"from": "human", "value": "How are you today, my friend?"},'
        ' {"from": "gpt", "value": "Well."}]},\n'
        ' {"id": "x", "conversations": []}, {"id": "y"},\n'
        ' {"id": "z", "conversations": [{"from": "gpt", "value": "Hello"}, {"from": "system", "value": "Be kind."},'
        ' {"from": "user", "value": "Why?"}, {"from": "bing", "value": "Because."}]}]'
    ),
    "csv": "num_prefill_tokens,num_decode_tokens,arrived_at\n100,20,0.5\n30.0,5.0,1.5\n",
    "jsonl": (
        '{"at_s": 2.0, "tenant": "a", "prompt_tokens": 5, "output_tokens": 6}\n'
        '{"prompt": "Tell me a story.", "output_tokens": 7, "session": "s", "turn": 1}\n'
        '{"prompt_tokens": 5}\n'
    ),
}


def rows_of(form: str, tmp_path: Path, content: str = "") -> tuple[list[TraceRow], Skipped]:
    path = tmp_path / "trace"
    path.write_bytes((content or SAMPLES[form]).encode())
    skipped = Skipped()
    return list(read(path, skipped=skipped)), skipped


@pytest.mark.parametrize("form", SAMPLES)
def test_every_form_is_recognised_by_its_content(form: str, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(SAMPLES[form].encode())
    assert recognise(path) == form


def test_there_is_a_sample_of_every_form() -> None:
    assert set(SAMPLES) == set(READERS)


def test_azure_times_count_from_the_first_row_and_a_bad_row_is_named(tmp_path: Path) -> None:
    rows, skipped = rows_of("azure", tmp_path)
    assert [row.prompt_tokens for row in rows] == [374, 396, 91]
    assert rows[0].at_s == 0.0
    assert rows[1].at_s == pytest.approx(4.314579, abs=1e-5)
    assert str(skipped) == "1 row skipped (line 4: ContextTokens is 'many', not a number)"


def test_each_adapter_of_the_arena_is_a_tenant(tmp_path: Path) -> None:
    rows, skipped = rows_of("vtc-arena", tmp_path)
    assert [(row.tenant, row.at_s) for row in rows] == [("adapter-8", 0.0), ("adapter-2", pytest.approx(0.2))]
    assert skipped.count == 1


def test_mooncake_counts_milliseconds_and_keeps_its_prefixes(tmp_path: Path) -> None:
    rows, skipped = rows_of("mooncake", tmp_path)
    assert [row.at_s for row in rows] == [0.0, 3.0]
    assert rows[0].prefix_hashes == (0, 1, 2)
    assert skipped.examples == ["3: output_length is missing", "4: not JSON"]


def test_each_answer_of_a_conversation_is_a_row_with_all_that_was_said_before(tmp_path: Path) -> None:
    rows, _ = rows_of("sharegpt-lengths", tmp_path)
    assert [(row.prompt_tokens, row.output_tokens, row.turn) for row in rows] == [
        (33, 256, 0),
        (324, 329, 1),
        (12, 9, 0),
    ]
    assert len({row.session for row in rows}) == 2  # the id repeats, the conversation does not


def test_sharegpt_takes_roles_of_all_products_and_skips_the_empty(tmp_path: Path) -> None:
    rows, skipped = rows_of("sharegpt", tmp_path)
    assert [row.messages[-1]["content"] for row in rows] == ["How are you today, my friend?", "Why?"]
    assert [one["role"] for one in rows[1].messages] == ["assistant", "system", "user"]
    assert rows[1].prompt_tokens > rows[1].output_tokens
    assert skipped.count == 2


def test_a_truncated_sharegpt_file_gives_what_it_has_and_says_so(tmp_path: Path) -> None:
    rows, skipped = rows_of("sharegpt", tmp_path, SAMPLES["sharegpt"][:150])
    assert len(rows) == 1
    assert "breaks here" in skipped.examples[0]


def test_our_own_form_needs_no_times(tmp_path: Path) -> None:
    rows, skipped = rows_of("jsonl", tmp_path)
    assert [(row.at_s, row.prompt_tokens) for row in rows] == [(0.0, 5), (None, 4)]
    assert skipped.examples == ["3: output_tokens is missing"]


def test_a_file_that_is_no_trace_is_refused_with_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a, b: say which column is which with --columns"):
        rows_of("azure", tmp_path, "a,b\n1,2\n")
    with pytest.raises(ValueError, match="Unknown trace form 'nope'"):
        read(tmp_path / "trace", form="nope")


@pytest.mark.skipif(not REAL.is_dir(), reason="no folder of real traces (EVENHAND_TRACES)")
@pytest.mark.parametrize(
    ("name", "rows", "skipped_rows", "mean_prompt", "mean_output"),
    [
        ("AzureLLMInferenceTrace_conv.csv", 19_366, 0, 1155, 211),
        ("AzureLLMInferenceTrace_code.csv", 8_819, 0, 2048, 28),
        ("mooncake_conversation_trace.first2000.jsonl", 2_000, 0, None, None),
        ("vtc_arena_real_trace.csv", 1_500, 0, 136, 256),
        ("sharegpt_lmbenchmark_55conv.json", None, 0, None, None),
        ("sharegpt_v3_lengths.first2000convs.csv", None, 0, None, None),
    ],
)
def test_real_traces_are_read_whole(
    name: str, rows: int | None, skipped_rows: int, mean_prompt: int | None, mean_output: int | None
) -> None:
    skipped = Skipped()
    seen = list(read(REAL / name, skipped=skipped))
    assert skipped.count == skipped_rows, str(skipped)
    assert len(seen) == rows or (rows is None and len(seen) > 50)
    if mean_prompt is not None and mean_output is not None:
        assert sum(row.prompt_tokens for row in seen) / len(seen) == pytest.approx(mean_prompt, abs=1)
        assert sum(row.output_tokens for row in seen) / len(seen) == pytest.approx(mean_output, abs=1)


def test_azures_2024_times_have_a_zone_and_sometimes_no_fraction(tmp_path: Path) -> None:
    rows, skipped = rows_of(
        "azure", tmp_path,
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,2162,5\n"
        "2024-05-10 00:00:01+00:00,2399,6\n10 May 2024,1,1\n",
    )  # fmt: skip
    assert [row.at_s for row in rows] == [0.0, pytest.approx(0.99007, abs=1e-6)]
    assert "line 4: TIMESTAMP" in str(skipped)


def test_burstgpt_is_read_by_column_and_its_failed_requests_are_left_out(tmp_path: Path) -> None:
    rows, skipped = rows_of("burstgpt", tmp_path)
    assert [(row.at_s, row.output_tokens, row.session, row.turn, row.kind) for row in rows] == [
        (0.0, 18, "", 0, "api"),
        (8.5, 200, "7", 0, "conversation"),
        (15.0, 90, "7", 1, "conversation"),
    ]
    assert str(skipped) == "1 row skipped (line 4: Response tokens is 0, less than 1)"
    first, _ = rows_of(
        "burstgpt", tmp_path,
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,GPT-4,10,20,30,Conversation log\n",
    )  # fmt: skip
    assert (first[0].prompt_tokens, first[0].output_tokens, first[0].session) == (10, 20, "")


def test_bailians_turns_belong_to_the_conversation_of_their_root(tmp_path: Path) -> None:
    rows, skipped = rows_of("qwen-bailian", tmp_path)
    assert [(row.session, row.turn, row.kind, row.prefix_hashes) for row in rows] == [
        ("5", 0, "text", (1, 2)),
        ("6", 0, "search", ()),
        ("5", 1, "text", (1, 2, 8, 9)),
    ]
    assert {row.block_tokens for row in rows} == {16}
    assert skipped.count == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("num_prefill_tokens,num_decode_tokens\n100,20\n", (100, 20, None)),
        ("num_prefill_tokens;num_decode_tokens;arrived_at\n100.0;20.0;3\n", (100, 20, 0.0)),
        ("input_len\toutput_len\n100\t20\n", (100, 20, None)),
        ('{"timestamp": 500, "requests": [{"Prompt Length": 100, "Output Length": 20}]}\n', (100, 20, 0.0)),
        ('{"timestamp": 5, "requests": [{"prompt": "Hello there", "prompt_length": 100, "output_length": 20}]}\n',
         (100, 20, 0.0)),
        ('{"prompt_tokens": 100.0, "output_tokens": "20"}\n', (100, 20, None)),
        ('[{"input_tokens": 100, "output_tokens": 20, "arrival_time": 7.5}]', (100, 20, 0.0)),
        ('{"messages": [{"role": "user", "content": "' + "x" * 420 + '"}], "max_tokens": 20}\n', (100, 20, None)),
        ('{"prompt": "' + "x" * 420 + '", "max_tokens": 20, "timestamp": 1.7e12}\n', (100, 20, 0.0)),
    ],
)  # fmt: skip
def test_lengths_are_found_by_the_names_in_use(
    content: str, expected: tuple[int, int, float | None], tmp_path: Path
) -> None:
    rows, skipped = rows_of("", tmp_path, content)
    assert skipped.count == 0, str(skipped)
    assert [(row.prompt_tokens, row.output_tokens, row.at_s) for row in rows] == [expected]


QUESTION, ANSWER = "How are you today?", "Well, thank you."
SAID = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([{"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]}]),
        json.dumps([{"conversations": SAID}]),
        json.dumps({"conversation": SAID}),
        json.dumps({"messages": SAID}),
        json.dumps({"id": 1, "items": [{"from": "human", "value": QUESTION}, {"from": "chatgpt", "value": ANSWER}]}),
    ],
)
def test_a_conversation_is_one_however_it_was_saved(content: str, tmp_path: Path) -> None:
    (row,), _ = rows_of("", tmp_path, content + "\n")
    assert row.messages == ({"role": "user", "content": QUESTION},)
    assert (row.output_tokens, row.estimated, row.last) == (4, True, True)


def test_mt_benchs_questions_are_turns_whose_answers_are_the_models(tmp_path: Path) -> None:
    content = json.dumps({"question_id": 81, "category": "writing", "turns": ["Write a story.", "Make it shorter."]})
    rows, _ = rows_of("", tmp_path, content + "\n")
    assert [(row.turn, row.output_tokens, row.answers, row.kind) for row in rows] == [
        (0, 0, (), "writing"),
        (1, 0, (1,), "writing"),
    ]
    assert [one["role"] for one in rows[1].messages] == ["user", "assistant", "user"]
    assert len({row.session for row in rows}) == 1


@pytest.mark.parametrize("form", SAMPLES)
@pytest.mark.parametrize("compressed", ["gzip", "zstd"])
def test_a_compressed_trace_is_the_trace(form: str, compressed: str, tmp_path: Path) -> None:
    plain = SAMPLES[form].encode()
    path = tmp_path / "trace"
    path.write_bytes(plain)
    expected = list(read(path))
    path.write_bytes(gzip.compress(plain) if compressed == "gzip" else zstandard.compress(plain))
    assert recognise(path) == form
    assert list(read(path)) == expected


def test_columns_may_be_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("when,who,in,out,chat\n10,a,100,20,x\n12,b,30,5,x\n")
    columns = parse_columns("at=when,tenant=who,prompt=in,output=out,session=chat")
    rows = list(read(path, columns=columns))
    assert [(row.at_s, row.tenant, row.prompt_tokens, row.output_tokens, row.session) for row in rows] == [
        (0.0, "a", 100, 20, "x"),
        (2.0, "b", 30, 5, "x"),
    ]
    with pytest.raises(ValueError, match="has no column 'nope': its columns are when, who, in, out, chat"):
        read(path, columns={"prompt": "nope", "output": "out"})


def test_one_broken_line_at_the_top_is_skipped_and_a_file_of_them_is_refused(tmp_path: Path) -> None:
    rows, skipped = rows_of("", tmp_path, "nonsense\n" + SAMPLES["mooncake"])
    assert len(rows) == 2
    assert "1: not JSON" in skipped.examples
    with pytest.raises(ValueError, match="None of the first 2 lines .* is a JSON object; the first begins '{nonsense'"):
        rows_of("", tmp_path, "{nonsense\n{more\n")
    with pytest.raises(ValueError, match="is empty"):
        rows_of("", tmp_path, " \n\n")
