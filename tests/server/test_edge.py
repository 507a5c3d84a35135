"""The client's connection: framing, pipelining, limits, leaving, and what never becomes a request."""

import asyncio
import itertools
import random
import re
import socket
from pathlib import Path

import pytest

from tests.server.conftest import (
    LIMIT_S,
    SLOW,
    chat,
    completion,
    eventually,
    over_fake,
    over_script,
    plain,
    request,
    says,
    serving,
    streamed,
)
from tests.server.test_tenants import KEY

CHAT = "/v1/chat/completions"
HELLO = request(CHAT, chat())
HELLO_STREAM = request(CHAT, chat(stream=True))
CHUNKED = request(CHAT, headers={"transfer-encoding": "chunked"})
HEALTH = request("/health", method="GET")


async def test_a_connection_serves_one_request_after_another() -> None:
    async with over_fake() as (gateway, _):
        wire = await gateway.connect()
        for data in (HELLO, HELLO_STREAM, HEALTH, HELLO, request("/none", method="GET"), HELLO_STREAM):
            await wire.send(data)
            reply = await wire.answer()
            assert reply.status == (404 if b"/none" in data else 200)
            assert "connection" not in reply.headers


async def test_pipelined_requests_are_answered_in_their_order() -> None:
    kinds = {HELLO: "chat.completion", HELLO_STREAM: "[DONE]", HEALTH: '"ok"'}
    async with over_fake() as (gateway, _):
        for first, second in itertools.product(kinds, kinds):
            wire = await gateway.send(first + second + first)
            for data in (first, second, first):
                reply = await wire.answer()
                assert reply.status == 200 and kinds[data] in reply.body.decode()
            await wire.send(second)
            assert kinds[second] in (await wire.answer()).body.decode()


async def test_a_pipelined_request_may_arrive_in_pieces_while_another_is_answered() -> None:
    async with over_fake(SLOW) as (gateway, engine):
        for cut in (1, 30, len(HELLO) - 20, len(HELLO) - 1):
            wire = await gateway.send(HELLO_STREAM + HELLO[:cut])
            await eventually(lambda: engine.running == 1)
            await wire.send(HELLO[cut:])
            assert (await wire.answer()).events[-1] == "[DONE]"
            assert (await wire.answer()).json()["object"] == "chat.completion"


async def test_a_request_that_arrives_byte_by_byte_is_answered() -> None:
    async with over_fake() as (gateway, _):
        wire = await gateway.connect()
        for at in range(len(HELLO)):
            await wire.send(HELLO[at : at + 1])
            await asyncio.sleep(0)
        assert (await wire.answer()).status == 200


async def test_http_1_0_gets_an_unframed_stream_that_ends_with_the_connection() -> None:
    async with over_fake() as (gateway, _):
        wire = await gateway.send(request(CHAT, chat(stream=True), version="1.0"))
        reply = await wire.answer()
        assert reply.chunks is None and "content-length" not in reply.headers
        assert reply.headers["connection"] == "close"
        assert reply.events[-1] == "[DONE]"
        wire = await gateway.send(request(CHAT, chat(), version="1.0"))
        assert (await wire.answer()).json()["usage"]
        assert await wire.closed()


async def test_connection_close_is_kept() -> None:
    async with over_fake() as (gateway, _):
        for stream in (False, True):
            wire = await gateway.send(request(CHAT, chat(stream=stream), headers={"connection": "close"}))
            reply = await wire.answer()
            assert reply.status == 200 and reply.headers["connection"] == "close"
            assert await wire.closed()


async def test_a_client_that_expects_100_continue_is_told_to_go_on() -> None:
    whole = request(CHAT, chat(), headers={"expect": "100-continue"})
    head, _, body = whole.partition(b"\r\n\r\n")
    async with over_fake() as (gateway, _):
        wire = await gateway.send(head + b"\r\n\r\n")
        assert (await wire.head()).status == 100
        await wire.send(body)
        assert (await wire.head()).status == 200


async def test_100_continue_comes_in_its_turn_for_a_pipelined_request() -> None:
    head, _, body = request(CHAT, chat(), headers={"expect": "100-continue"}).partition(b"\r\n\r\n")
    async with over_fake(SLOW) as (gateway, _):
        wire = await gateway.send(HELLO_STREAM + head + b"\r\n\r\n")
        first = await wire.answer()
        assert first.status == 200 and first.events[-1] == "[DONE]"
        assert (await wire.head()).status == 100
        await wire.send(body)
        assert (await wire.head()).status == 200


async def test_another_method_on_a_relayed_route_is_405() -> None:
    async with over_fake() as (gateway, _):
        for method in ("GET", "PUT", "DELETE", "OPTIONS"):
            for path in (CHAT, "/tokenize"):
                reply = await gateway.ask(path, method=method)
                assert reply.status == 405 and reply.error["code"] == "method_not_allowed"
                assert reply.headers["allow"] == "POST"
        wire = await gateway.send(request(CHAT, method="HEAD") + HEALTH)
        assert (await wire.head()).status == 405
        assert (await wire.answer()).json() == {"status": "ok"}, "an answer to HEAD has no body"


async def test_an_unknown_route_is_404_in_openai_shape() -> None:
    async with over_fake() as (gateway, _):
        for path in ("/v1/chat/completions//", "/v2/chat/completions", "/", "/v1/chat/completions%00"):
            reply = await gateway.ask(path, chat())
            assert reply.status == 404 and reply.error["code"] == "unknown_url"


async def test_a_query_or_an_absolute_url_leads_to_the_same_route() -> None:
    async with over_fake() as (gateway, engine):
        for url in (
            CHAT + "/",
            CHAT + "/?x",
            CHAT + "?api-version=1",
            "http://gateway" + CHAT,
            "http://gateway" + CHAT + "?x",
        ):
            assert (await gateway.ask(url, chat())).status == 200
            assert engine.seen[-1].path == CHAT


async def test_an_offer_to_upgrade_is_passed_over() -> None:
    upgrade = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAEAAEAAAAIAAAABAAMAAABk"}
    async with over_fake() as (gateway, _):
        wire = await gateway.connect()
        for _ in range(2):
            await wire.send(request(CHAT, chat(stream=True), headers=upgrade))
            assert (await wire.answer()).events[-1] == "[DONE]"


NOT_HTTP = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 5\r\ncontent-length: 5\r\n\r\nhello",
    b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\ntransfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 5, 5\r\n\r\nhello",
    b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 99999999999999999999999\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nno colon here\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nbad\x00name: x\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/chat/completions HTTP/9.9\r\n\r\n",
]


async def test_bytes_that_are_not_http_get_400_and_the_connection_closes() -> None:
    async with over_fake() as (gateway, engine):
        for garbage in NOT_HTTP:
            wire = await gateway.send(garbage)
            reply = await wire.answer()
            assert reply.status == 400 and reply.error["type"] == "invalid_request_error", garbage
            assert reply.headers["connection"] == "close"
            assert await wire.closed()
        assert not engine.seen


async def test_connect_is_refused() -> None:
    async with over_fake() as (gateway, _):
        assert (await gateway.ask("gateway:80", method="CONNECT")).status == 405


async def test_garbage_behind_a_request_does_not_cost_it_its_answer() -> None:
    async with over_fake(SLOW) as (gateway, _):
        for first in (HELLO, HELLO_STREAM, HEALTH):
            wire = await gateway.send(first + b"\x00\x01garbage\r\n\r\n")
            assert (await wire.answer()).status == 200
            assert (await wire.answer()).status == 400
            assert await wire.closed()


async def test_a_head_too_large_is_431() -> None:
    async with over_fake(edge={"max_head_bytes": 4096}) as (gateway, engine):
        for headers in ({"x": "y" * 5000}, {f"x{number}": "y" * 50 for number in range(100)}):
            wire = await gateway.send(request(CHAT, chat(), headers=headers))
            reply = await wire.answer()
            assert reply.status == 431 and reply.error["code"] == "headers_too_large"
            assert await wire.closed()
        wire = await gateway.send(request("/" + "a" * 5000, chat()))
        assert (await wire.answer()).status == 431
        assert not engine.seen


async def test_a_header_without_end_is_cut_off() -> None:
    async with over_fake(edge={"max_head_bytes": 4096, "max_body_bytes": 65536}) as (gateway, _):
        wire = await gateway.send(b"POST /v1/chat/completions HTTP/1.1\r\nx: ")
        with pytest.raises(ConnectionError):
            for _ in range(1000):
                await wire.send(b"y" * 1024)
                await asyncio.sleep(0)


async def test_a_body_too_large_is_413_before_it_is_read_if_it_says_its_length() -> None:
    async with over_fake(edge={"max_body_bytes": 1024}) as (gateway, engine):
        for path in (CHAT, "/none"):
            wire = await gateway.send(request(path, headers={"content-length": "1025"}))
            reply = await wire.answer()
            assert reply.status == 413 and reply.error["code"] == "request_too_large"
            assert await wire.closed()
        assert not engine.seen


async def test_a_body_too_large_is_413_when_it_does_not_say_its_length() -> None:
    async with over_fake(edge={"max_body_bytes": 1024}) as (gateway, engine):
        wire = await gateway.send(CHUNKED)
        for _ in range(3):
            await wire.send(b"200\r\n" + b" " * 512 + b"\r\n")
        assert (await wire.answer()).status == 413
        assert not engine.seen


async def test_a_chunked_body_is_put_together() -> None:
    body = request(CHAT, chat()).partition(b"\r\n\r\n")[2]
    async with over_fake() as (gateway, _):
        chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
        wire = await gateway.send(CHUNKED + chunks)
        assert (await wire.answer()).status == 200


async def test_a_connection_that_sends_no_request_is_closed() -> None:
    async with over_fake(edge={"head_timeout_s": 0.2}) as (gateway, _):
        wires = [await gateway.send(sent) for sent in (b"", b"\r\n", b"\r\n\r\n")]
        for wire in wires:
            assert await wire.closed()


async def test_a_kept_connection_cannot_be_held_by_empty_lines() -> None:
    async with over_fake(edge={"head_timeout_s": 1.0, "keep_alive_s": 60}) as (gateway, _):
        wire = await gateway.send(HEALTH)
        await wire.answer()
        await wire.send(b"\r\n")
        assert await wire.closed()


async def test_a_dribbling_head_is_408() -> None:
    async with over_fake(edge={"head_timeout_s": 0.2}) as (gateway, _):
        for cut in (1, 10, 60):
            wire = await gateway.send(HELLO[:cut])
            assert (await wire.answer()).status == 408
            assert await wire.closed()


async def test_a_body_has_its_own_time_and_then_it_is_408() -> None:
    async with over_fake(edge={"head_timeout_s": 0.5, "body_timeout_s": 60.0}) as (gateway, _):
        wire = await gateway.send(HELLO[:-10])
        await asyncio.sleep(0.8)  # longer than a head may take
        await wire.send(HELLO[-10:])
        assert (await wire.answer()).status == 200
    async with over_fake(edge={"head_timeout_s": 60.0, "body_timeout_s": 0.2}) as (gateway, _):
        wire = await gateway.send(HELLO[:-10])
        assert (await wire.answer()).status == 408


async def test_a_late_body_behind_a_running_answer_is_not_the_clients_fault() -> None:
    async with over_fake(SLOW, edge={"body_timeout_s": 1.0}) as (gateway, _):
        wire = await gateway.send(request(CHAT, chat(stream=True, max_tokens=70, ignore_eos=True)) + HELLO[:-10])
        assert len((await wire.answer()).events) == 72  # which take longer than a body may
        await wire.send(HELLO[-10:])
        assert (await wire.answer()).status == 200


async def test_a_client_that_shuts_down_its_side_still_gets_its_answer() -> None:
    async with over_fake(SLOW) as (gateway, _):
        for data in (HELLO, HELLO_STREAM, HEALTH, HEALTH + HELLO, HELLO + HELLO_STREAM):
            wire = await gateway.send(data)
            wire.writer.write_eof()
            assert (await wire.answer()).status == 200
            if data.count(b"HTTP/1.1") == 2:
                assert (await wire.answer()).status == 200
            assert await wire.closed()


async def test_a_client_that_shuts_down_its_side_in_a_stream_gets_the_rest() -> None:
    async with over_fake(SLOW) as (gateway, engine):
        wire = await gateway.send(HELLO_STREAM)
        await eventually(lambda: engine.running)
        wire.writer.write_eof()
        assert (await wire.answer()).events[-1] == "[DONE]"


async def test_a_client_that_shuts_down_its_side_within_a_request_is_let_go() -> None:
    async with over_fake() as (gateway, engine):
        wire = await gateway.send(HELLO[:-5])
        wire.writer.write_eof()
        assert await wire.closed()
        assert not engine.seen


LONG = {"max_tokens": 2000, "ignore_eos": True}


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_while_the_engine_works_frees_the_engine(how: str, stream: bool) -> None:
    async with over_fake(SLOW) as (gateway, engine):
        wire = await gateway.send(request(CHAT, chat(stream=stream, **LONG)))
        await eventually(lambda: engine.running == 1)
        if stream:
            await wire.head()
            await wire.chunk()
        wire.reset() if how == "reset" else await wire.close()
        await eventually(lambda: not engine.running, "the engine's work is aborted")
        await eventually(gateway.at_rest)
        assert (await gateway.metrics())["evenhand_requests_total", (("outcome", "cancelled"), ("route", CHAT))] == 1


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_client_that_leaves_while_it_waits_leaves_the_line(how: str) -> None:
    async with over_fake(SLOW, slots=1, admission={"ahead": 0}) as (gateway, engine):
        first = await gateway.send(request(CHAT, chat(stream=True, **LONG)))
        await first.head()
        waiting = await gateway.send(HELLO)
        await eventually(lambda: gateway.waiting == 1)
        waiting.reset() if how == "reset" else await waiting.close()
        await eventually(lambda: gateway.waiting == 0)
        assert len(engine.seen) == 1


async def test_a_client_that_leaves_before_its_request_is_complete_leaves_nothing() -> None:
    async with over_fake() as (gateway, engine):
        for cut in (5, 50, len(HELLO) - 1):
            wire = await gateway.send(HELLO[:cut])
            await wire.close()
        await eventually(lambda: not gateway.server.uvicorn.server_state.connections)
        assert not engine.seen


async def test_a_client_that_leaves_with_requests_in_the_pipeline_leaves_nothing() -> None:
    async with over_fake(SLOW) as (gateway, engine):
        wire = await gateway.send(request(CHAT, chat(stream=True, **LONG)) + HELLO + HEALTH)
        await eventually(lambda: engine.running == 1)
        wire.reset()
        await eventually(gateway.at_rest)
        await eventually(lambda: not engine.running)
        assert len(engine.seen) == 1


def small_buffers(wire_socket: socket.socket) -> None:
    wire_socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)


async def slow_reader(port: int, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    sock = socket.socket()
    small_buffers(sock)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=1 << 16)
    writer.write(data)
    return reader, writer


async def test_a_slow_reader_pauses_its_engine_and_then_gets_every_byte() -> None:
    event = b"data: " + b"x" * 64_000 + b"\n\n"
    events = [event] * 300
    async with over_script(says(streamed(*events))) as (gateway, _):
        reader, writer = await slow_reader(gateway.port, HELLO_STREAM)
        await reader.readuntil(b"\r\n\r\n")
        edge = next(iter(gateway.server.uvicorn.server_state.connections))
        await eventually(lambda: edge.current.engine_side is not None and edge.current.engine_side.paused)
        assert edge.transport.get_write_buffer_size() < 1_000_000
        assert (await gateway.ask("/health", method="GET")).status == 200
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        body = bytearray()
        while not body.endswith(b"0\r\n\r\n"):
            body += await asyncio.wait_for(reader.read(1 << 20), LIMIT_S)
        assert body.count(event) == len(events)
        writer.close()
        await writer.wait_closed()


async def test_a_reader_that_stalls_loses_its_place() -> None:
    events = [b"data: " + b"x" * 32_000 + b"\n\n"] * 1000
    async with over_script(says(streamed(*events)), edge={"stall_timeout_s": 0.3}) as (gateway, engine):
        reader, writer = await slow_reader(gateway.port, HELLO_STREAM)
        await reader.readuntil(b"\r\n\r\n")
        assert len(engine.asked) == 1
        await eventually(gateway.at_rest, "the place is free")
        writer.transport.abort()


async def test_a_connection_that_was_paused_serves_others_afterwards() -> None:
    big = plain(b'{"x":"' + b"y" * 3_000_000 + b'"}')
    async with over_script(says(big)) as (gateway, engine):
        for _ in range(5):
            reader, writer = await slow_reader(gateway.port, HELLO)
            await asyncio.sleep(0.02)
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(re.search(rb"content-length: (\d+)", head).group(1))  # type: ignore[union-attr]
            await asyncio.wait_for(reader.readexactly(size), LIMIT_S)
            writer.close()
            await writer.wait_closed()
        assert engine.accepted <= 4  # the probe's own, and one that was used again and again


async def test_a_thousand_streams_at_once() -> None:
    async with over_fake(slots=2000) as (gateway, engine):
        wires = await asyncio.gather(*(gateway.send(HELLO_STREAM) for _ in range(1000)))
        replies = await asyncio.gather(*(wire.answer() for wire in wires))
        assert {reply.status for reply in replies} == {200}
        assert {reply.text for reply in replies} == {replies[0].text}
        assert len({reply.headers["x-request-id"] for reply in replies}) == 1000
        assert len(engine.seen) == 1000


async def test_a_harmless_request_id_comes_back_and_any_other_is_replaced() -> None:
    async with over_fake() as (gateway, _):
        for path, method in ((CHAT, "POST"), ("/health", "GET"), ("/none", "GET"), (CHAT, "GET")):
            body = chat() if method == "POST" else None
            for given in ("trace-1.2_3:4", "a" * 128):
                reply = await gateway.ask(path, body, method=method, headers={"x-request-id": given})
                assert reply.headers["x-request-id"] == given
            for given in ("a" * 129, "a b", "<script>", "ü", ""):
                reply = await gateway.ask(path, body, method=method, headers={"x-request-id": given})
                assert re.fullmatch("[0-9a-f]{32}", reply.headers["x-request-id"])


async def test_the_engine_is_told_the_request_id() -> None:
    async with over_fake() as (gateway, engine):
        reply = await gateway.ask(CHAT, chat(), headers={"x-request-id": "trace-7"})
        assert engine.seen[-1].headers["x-request-id"] == "trace-7"
        assert reply.json()["id"] == "chatcmpl-trace-7"


@pytest.mark.parametrize("stream", [False, True])
async def test_on_shutdown_running_answers_finish_and_idle_connections_close(stream: bool) -> None:
    async with over_fake(SLOW) as (gateway, engine):
        idle, fresh = await gateway.send(HEALTH), await gateway.connect()
        await idle.answer()
        busy = await gateway.send(request(CHAT, chat(stream=stream, max_tokens=30, ignore_eos=True)))
        await eventually(lambda: engine.running == 1)
        gateway.server.stop()
        assert await idle.closed() and await fresh.closed()
        reply = await busy.answer()
        assert reply.status == 200
        assert (len(reply.events) - 2 if stream else reply.json()["usage"]["completion_tokens"]) == 30
        assert await busy.closed()
        await asyncio.wait_for(asyncio.shield(gateway.serving), LIMIT_S)
        with pytest.raises(ConnectionRefusedError):
            await gateway.connect()


@pytest.mark.parametrize("begun", [False, True])
async def test_an_answer_that_outlasts_the_shutdown_is_ended_in_good_form(begun: bool) -> None:
    async with over_fake(SLOW, shutdown_s=1.0) as (gateway, engine):
        wire = await gateway.send(request(CHAT, chat(stream=begun, **LONG)))
        await eventually(lambda: engine.running == 1)
        if begun:
            reply = await wire.head()
            await wire.chunk()
        gateway.server.stop()
        if begun:
            pieces = []
            while piece := await wire.chunk():
                pieces.append(piece)
            assert b'"code":"stopping"' in pieces[-1] and pieces[-1].endswith(b"data: [DONE]\n\n")
        else:
            reply = await wire.answer()
            assert reply.status == 503 and reply.error["code"] == "stopping"
            assert int(reply.headers["retry-after"]) >= 1
        await eventually(lambda: not engine.running)


async def test_a_gateway_without_a_worker_can_be_stopped() -> None:
    async with serving() as gateway:
        assert (await gateway.ask("/health", method="GET")).status == 200


async def test_a_completion_is_relayed_too() -> None:
    async with over_fake() as (gateway, _):
        assert (await gateway.ask("/v1/completions", completion())).json()["object"] == "text_completion"


@pytest.mark.parametrize("seed", range(8))
async def test_however_requests_are_cut_each_gets_its_answer(seed: int) -> None:
    """Heads that came before are known by then, and what is known must not depend on how bytes arrive."""
    rng = random.Random(seed)
    long = request(CHAT, chat(messages=[{"role": "user", "content": "word " * 400}]))
    wanted = {HELLO: "chat.completion", HELLO_STREAM: "[DONE]", HEALTH: '"ok"', long: "chat.completion"}
    wanted[CHUNKED + b"0\r\n\r\n"] = "invalid_json"
    asked = [rng.choice(list(wanted)) for _ in range(24)]
    async with over_fake() as (gateway, _):
        wire = await gateway.connect()
        ids = set()
        for first, second in zip(asked[::2], asked[1::2], strict=True):
            both = first + second
            cut = rng.choice([0, len(first), rng.randrange(len(both)), len(both)])
            await wire.send(both[:cut])
            await asyncio.sleep(rng.choice([0, 0.002]))
            await wire.send(both[cut:])
            for data in (first, second):
                reply = await wire.answer()
                assert wanted[data] in reply.body.decode()
                ids.add(reply.headers["x-request-id"])
        assert len(ids) == len(asked)


async def test_a_connection_in_use_stays_and_an_idle_one_is_closed() -> None:
    async with over_fake(SLOW, edge={"keep_alive_s": 1}) as (gateway, _):
        wire = await gateway.connect()
        # Takes longer than an idle one may live.
        await wire.send(request(CHAT, chat(stream=True, max_tokens=60, ignore_eos=True)))
        assert (await wire.answer()).events[-1] == "[DONE]"
        await wire.send(HEALTH)
        assert (await wire.answer()).status == 200
        assert await wire.closed()


async def test_a_request_needs_exactly_one_host() -> None:
    hello = request(CHAT, chat())
    async with over_fake() as (gateway, engine):
        for wrong in (hello.replace(b"host: gateway\r\n", b""), hello.replace(b"host:", b"host: other\r\nhost:")):
            for data in (wrong, wrong.replace(CHAT.encode(), b"/v1/models")):
                reply = await (await gateway.send(data)).answer()
                assert reply.status == 400 and "Host" in reply.error["message"]
        old = request(CHAT, chat(), version="1.0").replace(b"host: gateway\r\n", b"")
        assert (await (await gateway.send(old)).answer()).status == 200, "HTTP/1.0 did not have it"
        assert len(engine.seen) == 1


async def test_http_1_0_cannot_be_chunked() -> None:
    body = HELLO.partition(b"\r\n\r\n")[2]
    head = request(CHAT, headers={"transfer-encoding": "chunked"}, version="1.0")
    data = head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    async with over_fake() as (gateway, engine):
        wire = await gateway.send(data + HELLO)
        assert (await wire.answer()).status == 400
        assert await wire.closed() and not engine.seen


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", None])
async def test_what_a_web_page_may_send_unasked_reaches_no_engine(kind: str | None) -> None:
    line = b"" if kind is None else f"content-type: {kind}\r\n".encode()
    async with over_fake(admin_key="an-admin-key-0123456789") as (gateway, engine):
        for path in (CHAT, "/v1/completions", "/tokenize"):
            data = request(path, chat()).replace(b"content-type: application/json\r\n", line)
            reply = await (await gateway.send(data)).answer()
            assert reply.status == 415 and reply.error["code"] == "unsupported_media_type"
        assert not engine.seen
        for kind_of_json in ("application/json; charset=utf-8", "Application/JSON"):
            data = HELLO.replace(b"application/json", kind_of_json.encode())
            assert (await (await gateway.send(data)).answer()).status == 200
        drain = request("/admin/workers/worker-0/drain", b"{}").replace(b"content-type: application/json\r\n", line)
        reply = await (await gateway.send(drain)).answer()
        assert reply.status == 401, "/admin needs a header that a page cannot send without asking first"


NAMES = ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000", "gateway", "evenhand.localhost", "10.0.0.7"]
SITES = ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example:80", "evil.example."]


@pytest.mark.parametrize("host", NAMES + SITES)
async def test_an_open_gateway_takes_no_request_in_a_web_site_s_name(host: str) -> None:
    """A page whose domain was made to resolve to this machine asks as if it were the gateway's own page."""
    async with over_fake() as (gateway, engine):
        for data in (HELLO, request("/v1/models", method="GET")):
            wire = await gateway.send(data.replace(b"host: gateway", b"host: " + host.encode()))
            reply = await wire.answer()
            assert reply.status == (403 if host in SITES else 200)
        assert bool(engine.seen) == (host in NAMES)


async def test_a_gateway_with_tenants_or_opened_on_purpose_goes_by_any_name(tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.yaml"
    tenants.write_text(f"tenants: [{{name: acme, keys: [{KEY}]}}]")
    for settings in ({"tenants": tenants}, {"allow_open": True}):
        async with over_fake(**settings) as (gateway, _):
            data = request(CHAT, chat(), headers={"authorization": f"Bearer {KEY}"})
            wire = await gateway.send(data.replace(b"host: gateway", b"host: ai.example.com"))
            assert (await wire.answer()).status == 200


async def test_a_head_of_many_small_headers_is_431() -> None:
    async with over_fake() as (gateway, engine):
        wire = await gateway.send(request(CHAT, chat(), headers={f"a{number}": "" for number in range(200)}))
        assert (await wire.answer()).status == 431
        assert not engine.seen


async def test_only_so_many_requests_wait_on_a_connection() -> None:
    async with over_fake(SLOW) as (gateway, _):
        wire = await gateway.send(request(CHAT, chat(stream=True, max_tokens=4)) + HEALTH * 40)
        assert (await wire.answer()).events[-1] == "[DONE]"
        statuses = [(await wire.answer()).status for _ in range(17)]
        assert statuses == [200] * 16 + [429]
        assert await wire.closed()


async def test_a_slow_reader_is_let_go_only_when_it_reads_nothing() -> None:
    """With a small window, and a large answer that comes in one piece."""
    answer = b'{"a":"' + b"x" * 6_000_000 + b'"}'
    async with over_script(says(plain(answer)), edge={"stall_timeout_s": 0.5}) as (gateway, _):
        for steady in (True, False):
            reader = socket.socket()
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
            reader.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(reader, ("127.0.0.1", gateway.port))
            await loop.sock_sendall(reader, HELLO)
            with reader:
                if steady:
                    assert await read_in_steps(reader, 25, 0.06) > len(answer), "which took longer than it may rest"
                else:
                    await eventually(lambda: not gateway.server.uvicorn.server_state.connections, "it is let go")


async def read_in_steps(reader: socket.socket, steps: int, pause_s: float) -> int:
    """So many small pieces, with pauses, then all the rest; returns how much was read."""
    loop, got = asyncio.get_running_loop(), 0
    for _ in range(steps):
        got += len(await loop.sock_recv(reader, 20_000))
        await asyncio.sleep(pause_s)
    async with asyncio.timeout(LIMIT_S):
        while got < 6_000_000:
            piece = await loop.sock_recv(reader, 1_000_000)
            assert piece, "the answer was cut off"
            got += len(piece)
    return got
