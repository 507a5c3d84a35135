"""What of the client's connection depends on the event loop, on asyncio's own."""

from tests.server.test_edge import (  # noqa: F401 - collected here once more
    test_a_client_that_leaves_while_it_waits_leaves_the_line,
    test_a_client_that_leaves_while_the_engine_works_frees_the_engine,
    test_a_client_that_shuts_down_its_side_still_gets_its_answer,
    test_a_connection_serves_one_request_after_another,
    test_a_slow_reader_pauses_its_engine_and_then_gets_every_byte,
    test_garbage_behind_a_request_does_not_cost_it_its_answer,
    test_on_shutdown_running_answers_finish_and_idle_connections_close,
)
