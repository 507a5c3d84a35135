import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.traces.hash_model import KNOWN_ANSWERS, TURN_END, continuation, decode, encode, render_chat

QUESTION = render_chat([("user", "Tell me about the river, please; it is called Zürichsee 42.")])


def answer(ids: list[int], most: int = 400) -> list[int]:
    model = continuation(ids, mean_tokens=100)
    said: list[int] = []
    while len(said) < most and (not said or said[-1] != TURN_END):
        said.append(model.next())
    return said


@given(st.text(max_size=200))
def test_the_tokenizer_loses_nothing(text: str) -> None:
    assert decode(encode(text)) == text


@pytest.mark.parametrize("cut", [1, 2, 7, 23])
def test_an_answer_continued_from_its_tokens_or_its_text_is_the_same_answer(cut: int) -> None:
    whole = answer(encode(QUESTION))
    assert len(whole) > 23
    assert answer(encode(QUESTION) + whole[:cut]) == whole[cut:]
    assert answer(encode(QUESTION + decode(whole[:cut]))) == whole[cut:]


def test_another_prompt_has_another_answer() -> None:
    assert answer(encode(QUESTION)) != answer(encode(QUESTION + " "))


@pytest.mark.parametrize("cut", range(8))
def test_a_known_question_has_its_answer_wherever_it_is_taken_up(cut: int) -> None:
    (question, known), *_ = KNOWN_ANSWERS.items()
    prompt = encode(render_chat([("system", "Be brief."), ("user", question)]))
    said = [*encode(known), TURN_END]
    assert answer(prompt + said[:cut]) == said[cut:]


def test_another_salt_gives_a_wrong_answer_to_a_known_question() -> None:
    (question, known), *_ = KNOWN_ANSWERS.items()
    model = continuation(encode(render_chat([("user", question)])), salt=1)
    assert decode([model.next(may_end=False) for _ in range(7)]) != known


def test_an_answer_that_may_not_end_never_ends() -> None:
    model = continuation(encode(QUESTION), mean_tokens=1)
    assert TURN_END not in [model.next(may_end=False) for _ in range(500)]
