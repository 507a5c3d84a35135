"""A language model that is a hash of all that was said, so that any answer can be continued from anywhere.

Greedy decoding of a real model has the property that failover rests on: prompt plus the first k tokens of the
answer, as token ids or as text, continues with token k + 1. A CRC over the whole sequence has it too, at no cost.
Its tokenizer loses nothing: what it wrote, read back, gives the same ids.
"""

import re
import zlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

END_OF_TEXT, TURN_START, TURN_END = 0, 1, 2
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY_SIZE = 49_152  # as SmolLM2's, so that prompts given as its token ids are in range

WORDS = (
    "a about above after again air all along also always an and animal answer any apple are around as ask at "
    "autumn away back bank be bear before begin below beside best better between big bird black blue boat body "
    "book both bread bridge bright bring brother brown build but by call came can capital care carry cat change "
    "child city clean clear close cloud cold come could country course cross cup dark day deep did different do "
    "dog door down draw dream dry each early earth east easy eat edge eight end enough even ever every eye face "
    "fall family far farm fast father feel few field fill find fine fire first fish five flower fly follow food "
    "for forest form found four France free friend from front full game garden gave get girl give glass go gold "
    "good got grass great green ground group grow had half hand happy hard has have he head hear heart heavy help "
    "her here high hill him his hold home horse hot hour house how hundred idea if in into is island it its "
    "journey just keep kind king know lake land large last late laugh lead leaf learn leave left less let letter "
    "life light like line list listen little live long look lost love low made make man many map mark may mean "
    "meet might mile milk mind money month moon more morning most mother mountain move much music must my name "
    "near need never new next night nine no north not note nothing now number ocean of off often old on once one "
    "only open or orange order other our out over own page paper Paris part pass path people picture piece place "
    "plain plan plant play point pond power press pull put quick quiet rain ran reach read ready real red rest "
    "rich ride right ring rise river road rock room round run sail salt same sand saw say school sea season "
    "second see seed seem self send set seven shadow shape she ship shore short should show side sign silver "
    "simple sing sister sit six sky sleep slow small snow so soft some song soon sound south space spring stand "
    "star start stay step still stone stop story street strong such summer sun sure table take talk tall ten than "
    "that the their them then there these they thing think third this those thousand three through time to today "
    "together too top toward town train travel tree true try turn two under until up us use valley very village "
    "visit voice wait walk wall want warm was watch water wave way we weather well went were west what wheel when "
    "where which while white who whole why wide wild will wind window winter wish with wood word work world would "
    "write year yellow yes yet you young your"
).split()

_BYTES_AT = len(SPECIAL)
_WORDS_AT = _BYTES_AT + 256
_PIECES_AT = _WORDS_AT + 2 * len(WORDS)
_LETTERS = " abcdefghijklmnopqrstuvwxyz"
_PIECE = re.compile(r"<\|\w+\|>| ?[A-Za-z]+|.", re.DOTALL)
_SHORT = re.compile(r"[ a-z]{1,3}|.", re.DOTALL)
_NEWLINE = _BYTES_AT + 10
_FULL_STOP = _BYTES_AT + 46
_MASK = 0xFFFFFFFF


def _spellings() -> list[str]:
    """Text of every token of letters, by id: words after a space or at a beginning, then pieces of a word."""
    words = [spelling for word in WORDS for spelling in (" " + word, word[0].upper() + word[1:])]
    pieces = [a for a in _LETTERS] + [a + b for a in _LETTERS for b in _LETTERS]
    return words + pieces + [a + b + c for a in _LETTERS for b in _LETTERS for c in _LETTERS]


_TEXTS = _spellings()
_IDS = {text: _WORDS_AT + at for at, text in reversed(list(enumerate(_TEXTS)))} | {
    text: at for at, text in enumerate(SPECIAL)
}
_TEXT_BYTES = (
    [text.encode() for text in SPECIAL] + [bytes([byte]) for byte in range(256)] + [text.encode() for text in _TEXTS]
)


@lru_cache(maxsize=1 << 16)
def _spelled(piece: str) -> tuple[int, ...]:
    """Ids of a piece of text that is no word of ours: by three letters where it can, by bytes where not."""
    ids: list[int] = []
    for part in _SHORT.findall(piece):
        known = _IDS.get(part)
        ids.extend((known,) if known is not None else (_BYTES_AT + byte for byte in part.encode()))
    return tuple(ids)


def encode(text: str) -> list[int]:
    """Text → token ids."""
    ids: list[int] = []
    known = _IDS.get
    for piece in _PIECE.findall(text):
        token = known(piece)
        if token is None:
            ids.extend(_spelled(piece))
        else:
            ids.append(token)
    return ids


def decode(ids: Iterable[int]) -> str:
    """Token ids → text; an id outside the vocabulary has no text."""
    return b"".join(token_bytes(token) for token in ids).decode(errors="replace")


def token_bytes(token: int) -> bytes:
    """What one token adds to the text."""
    return _TEXT_BYTES[token] if 0 <= token < len(_TEXT_BYTES) else b""


def render_chat(messages: Sequence[tuple[str, str]], *, continue_final: bool = False) -> str:
    """(role, text) messages → the prompt in ChatML; `continue_final` leaves the last message open."""
    turns = [f"<|im_start|>{role}\n{text}" for role, text in messages]
    closed = "<|im_end|>\n".join(turns)
    return closed if continue_final else closed + "<|im_end|>\n<|im_start|>assistant\n"


# The start-up check of a worker asks this; a real model's greedy answer is the same sentence.
KNOWN_ANSWERS = {
    "What is the capital of France?": "The capital of France is Paris.",
    "List the first five prime numbers.": "The first five prime numbers are 2, 3, 5, 7, and 11.",
}
_AFTER_QUESTION = encode("<|im_end|>\n<|im_start|>assistant\n")


def _known_endings() -> list[tuple[list[int], list[int]]]:
    """(ids that end a prompt with a known question, ids of its answer)."""
    endings = []
    for question, answer in KNOWN_ANSWERS.items():
        endings.append((encode(f"user\n{question}") + _AFTER_QUESTION, [*encode(answer), TURN_END]))
        endings.append((encode(question), [*encode(answer), TURN_END]))
    return endings


_ENDINGS = _known_endings()


def _rest_of_known_answer(ids: Sequence[int]) -> list[int]:
    for ending, answer in _ENDINGS:
        for said in range(len(answer)):
            tail = ending + answer[:said]
            if len(ids) >= len(tail) and list(ids[-len(tail) :]) == tail:
                return answer[said:]
    return []


@dataclass(slots=True)
class ModelContinuation:
    """The one answer that follows a sequence of tokens, token by token.

    digest: CRC of the sequence so far. last: its last token. known: what is left of an answer known by heart.
    mean_tokens: mean length of an answer that may end by itself.
    """

    digest: int
    last: int
    known: list[int]
    mean_tokens: int

    def next(self, *, may_end: bool = True) -> int:
        """The next token; TURN_END when the answer is over (never if it may not end)."""
        token = self._choose(may_end)
        self.digest = zlib.crc32(token.to_bytes(4, "little"), self.digest)
        self.last = token
        return token

    def _choose(self, may_end: bool) -> int:
        if self.known:
            token = self.known.pop(0)
            if may_end or token != TURN_END:
                return token
        value = (self.digest * 0x9E3779B1) & _MASK
        if self.last == _NEWLINE or self.last in (END_OF_TEXT, TURN_END):
            return _WORDS_AT + 2 * ((value >> 8) % len(WORDS)) + 1
        if may_end and (value >> 4) % self.mean_tokens == 0:
            return TURN_END
        if self.last != _FULL_STOP and value & 0xF == 0:
            return _FULL_STOP
        return _WORDS_AT + 2 * ((value >> 8) % len(WORDS))


def continuation(ids: Sequence[int], *, mean_tokens: int = 64, salt: int = 0) -> ModelContinuation:
    """What the model says after `ids`. Another salt is another model: it gives wrong answers, with confidence."""
    digest = zlib.crc32(array("I", [token & _MASK for token in ids]).tobytes(), salt)
    known = [] if salt else _rest_of_known_answer(ids[-64:])
    return ModelContinuation(digest, ids[-1] if ids else END_OF_TEXT, known, mean_tokens)
