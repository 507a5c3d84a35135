"""What a stream has said is kept small and comes back whole."""

import json

from hypothesis import given
from hypothesis import strategies as st

from server.request.transcript import MAX_KEPT_BYTES, PACK_CHUNKS, Chunk, Transcript, progress_of

ROLE = {"id": "c", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}


def event(body: object) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def token(text: str, number: int, **more: object) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None, "token_ids": [number]}
    return event({"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice | more]})


def kept(*chunks: bytes) -> Transcript:
    received = Transcript()
    for chunk in chunks:
        received.chunks.append(chunk)
        if len(received.chunks) >= PACK_CHUNKS:
            received.pack()
    return received


@given(
    st.lists(st.text(max_size=8) | st.sampled_from(['"', "\\", "\n\n", "\0", "\1", '"text":"', "[1]}]}"]), max_size=200)
)
def test_all_that_was_said_comes_back_byte_for_byte(texts: list[str]) -> None:
    chunks = [event(ROLE)] + [token(text, number) for number, text in enumerate(texts)]
    received = kept(*chunks)
    assert received.events() == b"".join(chunks)
    progress = progress_of(received)
    assert progress.told == "".join(texts)
    assert progress.ids == list(range(len(texts)))
    assert progress.only_text and progress.finish is None


def test_a_long_stream_is_kept_in_a_tenth_of_its_bytes() -> None:
    received = kept(*(token(" word", 1000 + number) for number in range(PACK_CHUNKS * 12)))
    assert sum(map(len, received._packed)) < len(received.events()) / 10


def test_what_is_too_long_to_be_kept_is_let_go() -> None:
    size = MAX_KEPT_BYTES // PACK_CHUNKS
    received = kept(*(token("x" * size, number) for number in range(PACK_CHUNKS)))
    assert received.full and not received.events()


def test_raw_control_bytes_are_never_mistaken_for_packed_ones() -> None:
    received = kept(*([b'data: {"choices":[{"text":"\0"}]}\n\n'] * PACK_CHUNKS))
    assert received.full


def test_text_of_a_later_leg_that_repeats_what_the_client_has_is_not_told_twice() -> None:
    first = progress_of(kept(event(ROLE), token("ab", 1), token("cd", 2)))
    first.chunks = [Chunk([1], "ab")]
    received = Transcript()
    received.begin_leg(first)
    received.chunks.append(event({"choices": [{"index": 0, "text": "c", "token_ids": [3]}]}))
    assert progress_of(received).told == "abcd"
    received.chunks.append(event({"choices": [{"index": 0, "text": "de", "token_ids": [4]}]}))
    progress = progress_of(received)
    assert progress.told == "abcde" and progress.ids == [1, 3, 4]
    assert progress.head["id"] == "c", "the client goes on seeing the first leg's id"
