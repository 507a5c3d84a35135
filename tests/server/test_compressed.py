"""Compressed bodies: what comes is expanded within bounds, what goes is compressed where it is asked for."""

import gzip
import json
import random
import zlib
from pathlib import Path
from typing import Any

import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from server.connection.coding import MOST_MEMBERS, STEP_BYTES, BadCoding, GzipDecoder, ZstdDecoder
from server.connection.intake import BodyBudget
from tests.server.conftest import MODEL, Running, Wire, chat, over_fake, over_script, plain, request, says, serving

PACKED = {"gzip": gzip.compress, "zstd": zstd.compress}
DECODERS = {"gzip": GzipDecoder, "zstd": ZstdDecoder}


async def ask(gateway: Running, coding: str, body: bytes, path: str = "/v1/chat/completions") -> Any:
    return await gateway.ask(path, body, headers={"content-encoding": coding})


@pytest.mark.parametrize("coding", PACKED)
async def test_a_compressed_request_is_answered_and_its_connection_serves_on(coding: str) -> None:
    async with over_fake() as (gateway, engine):
        wire = await gateway.connect()
        for round_ in range(3):
            body = json.dumps(chat(seed=round_)).encode()
            headers = {"content-encoding": coding}
            await wire.send(request("/v1/chat/completions", PACKED[coding](body), headers=headers))
            assert (await wire.answer()).status == 200
            assert engine.seen[-1].body["seed"] == round_
            assert "content-encoding" not in engine.seen[-1].headers
            await wire.send(request("/v1/chat/completions", chat()))
            assert (await wire.answer()).status == 200


@pytest.mark.parametrize("coding", PACKED)
async def test_it_may_come_byte_by_byte_in_chunks(coding: str) -> None:
    async with over_fake() as (gateway, _):
        wire = await gateway.connect()
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\ncontent-type: application/json\r\n"
        await wire.send(f"{head}content-encoding: {coding}\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        for byte in PACKED[coding](json.dumps(chat()).encode()):
            await wire.send(b"1\r\n%c\r\n" % byte)
        await wire.send(b"0\r\n\r\n")
        assert (await wire.answer()).status == 200


async def refused(gateway: Running, coding: str, body: bytes) -> Any:
    reply = await ask(gateway, coding, body)
    assert gateway.server.edge.bodies.held == 0
    return reply.status, reply.error["message"]


@pytest.mark.parametrize("coding", PACKED)
async def test_a_bomb_is_refused_before_it_is_expanded(coding: str) -> None:
    bound = 2 * 1024 * 1024
    bomb = PACKED[coding](b" " * (32 * bound))
    assert len(bomb) < bound // 10
    taken: list[int] = []

    class Watched(BodyBudget):
        def take(self, tenant: str, size: int) -> bool:
            taken.append(size)
            return super().take(tenant, size)

    async with over_fake(edge={"max_body_bytes": bound}) as (gateway, _):
        gateway.server.edge.bodies = Watched(4 * bound)
        status, message = await refused(gateway, coding, bomb)
        assert status == 413 and "when decompressed" in message
        assert bound - STEP_BYTES <= sum(taken) <= bound and max(taken) <= STEP_BYTES


@pytest.mark.parametrize("coding", PACKED)
async def test_the_budget_for_bodies_counts_what_is_expanded(coding: str) -> None:
    body = json.dumps(chat(user="x" * 1024 * 1024)).encode()
    edge = {"max_body_bytes": 4 * 1024 * 1024, "max_held_bytes": 5 * 1024 * 1024}
    async with over_fake(edge=edge) as (gateway, _):
        bodies = gateway.server.edge.bodies
        assert bodies.take("somebody", 4_100_000)
        reply = await ask(gateway, coding, PACKED[coding](body))
        assert reply.status == 429 and "no memory" in reply.error["message"]
        bodies.give_back("somebody", 4_100_000)
        assert (await ask(gateway, coding, PACKED[coding](body))).status == 200
        assert bodies.held == 0


@pytest.mark.parametrize("coding", PACKED)
async def test_what_is_not_as_it_says_is_refused_in_one_sentence(coding: str) -> None:
    whole = PACKED[coding](json.dumps(chat()).encode())
    async with over_fake() as (gateway, _):
        assert await refused(gateway, coding, whole[:-3]) == (400, "The compressed body is truncated.")
        assert await refused(gateway, coding, b"") == (400, "The compressed body is truncated.")
        assert (await refused(gateway, coding, b"{}" * 20))[0] == 400
        assert (await refused(gateway, coding, whole + b"more"))[0] == 400
        assert (await refused(gateway, coding, PACKED[coding](b"{")))[1].startswith(
            "The request body is not valid JSON"
        )
        assert (await ask(gateway, "identity", json.dumps(chat()).encode())).status == 200


async def test_other_codings_and_other_routes_are_refused() -> None:
    async with over_fake() as (gateway, _):
        for coding in ("br", "deflate", "gzip, gzip"):
            reply = await ask(gateway, coding, gzip.compress(b"{}"))
            assert reply.status == 415 and "gzip" in reply.error["message"]
        reply = await ask(gateway, "gzip", gzip.compress(b"{}"), "/v1/files")
        assert reply.status == 415


async def test_a_client_with_a_wrong_key_has_nothing_expanded(tmp_path: Path) -> None:
    file = tmp_path / "tenants.yaml"
    file.write_text("tenants: [{name: a, keys: [a-key-of-some-length]}]")
    async with serving(tenants=file) as gateway:
        reply = await ask(gateway, "gzip", gzip.compress(b" " * 10_000_000))
        assert reply.status == 401


def test_a_zstd_window_of_more_than_8_mib_is_refused() -> None:
    options = {zstd.CompressionParameter.window_log: 27, zstd.CompressionParameter.checksum_flag: 0}
    packer = zstd.ZstdCompressor(options=options)
    data = packer.compress(random.Random(0).randbytes(1024)) + packer.flush()
    with pytest.raises(BadCoding, match="at most 8 MiB"):
        list(ZstdDecoder().pieces(data))


@pytest.mark.parametrize("coding", PACKED)
def test_a_body_of_countless_empty_parts_is_refused(coding: str) -> None:
    decoder, empty = DECODERS[coding](), PACKED[coding](b"")
    assert list(decoder.pieces(empty * MOST_MEMBERS)) == []
    with pytest.raises(BadCoding, match="compressed parts"):
        list(decoder.pieces(empty))


@given(st.data(), st.sampled_from(sorted(PACKED)), st.lists(st.binary(max_size=300), min_size=1, max_size=4))
def test_any_cut_of_any_parts_expands_to_the_same(data: st.DataObject, coding: str, parts: list[bytes]) -> None:
    parts = [part * data.draw(st.integers(1, 1000)) for part in parts]
    packed, decoder, got, at = b"".join(map(PACKED[coding], parts)), DECODERS[coding](), [], 0
    while at < len(packed):
        end = at + data.draw(st.integers(1, len(packed) - at))
        got += list(decoder.pieces(packed[at:end]))
        at = end
    assert b"".join(got) == b"".join(parts) and decoder.whole
    assert all(0 < len(piece) <= STEP_BYTES for piece in got)


# answers

LONG = json.dumps({"id": "x", "choices": [{"text": "words " * 400}], "usage": {"completion_tokens": 3}}).encode()


async def got(wire: Wire, accept: str = "gzip", **fields: object) -> Any:
    await wire.send(
        request("/v1/completions", {"model": MODEL, "prompt": "x"} | fields, headers={"accept-encoding": accept})
    )
    return await wire.answer()


async def test_a_long_json_answer_is_compressed_where_that_is_asked_for() -> None:
    async with over_script(says(plain(LONG)), edge={"gzip_from_bytes": 1000}) as (gateway, _):
        wire = await gateway.connect()
        for _ in range(2):  # the second time by a head that was read before
            reply = await got(wire, "deflate, gzip;q=0.5")
            assert reply.headers["content-encoding"] == "gzip" and reply.headers["vary"] == "accept-encoding"
            assert int(reply.headers["content-length"]) == len(reply.body) < len(LONG) // 10
            assert zlib.decompress(reply.body, 31) == LONG
        for accept in ("identity", "br", "gzip;q=0", "gzip;q=0.0"):
            reply = await got(wire, accept)
            assert "content-encoding" not in reply.headers and reply.body == LONG
        metrics = await gateway.ask("/metrics", method="GET", headers={"accept-encoding": "gzip"})
        assert b"evenhand_requests_total" in zlib.decompress(metrics.body, 31)


async def test_short_answers_streams_and_gateways_that_were_not_told_compress_nothing() -> None:
    async with over_script(says(plain(LONG))) as (gateway, _):
        assert (await got(await gateway.connect())).body == LONG
    async with over_fake(edge={"gzip_from_bytes": 100_000}) as (gateway, _):
        wire = await gateway.connect()
        assert "content-encoding" not in (await got(wire)).headers
    async with over_fake(edge={"gzip_from_bytes": 64}) as (gateway, _):
        wire = await gateway.connect()
        reply = await got(wire, stream=True, max_tokens=50)
        assert reply.events[-1] == "[DONE]" and "content-encoding" not in reply.headers
        assert zlib.decompress((await got(wire)).body, 31)
        reply = await got(wire, no_such_field=1)
        assert reply.status == 400 and json.loads(zlib.decompress(reply.body, 31))["error"]


async def test_an_answer_that_is_longer_than_is_compressed_at_once_passes_as_it_is() -> None:
    body = json.dumps({"id": "x", "choices": [{"text": "a" * 3_000_000}]}).encode()
    async with over_script(says(plain(body)), edge={"gzip_from_bytes": 64}) as (gateway, _):
        reply = await got(await gateway.connect())
        assert "content-encoding" not in reply.headers and reply.body == body
