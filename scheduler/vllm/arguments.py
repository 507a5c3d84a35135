"""vLLM's own reading of engine arguments: how many GPUs an engine takes, its part of their memory, how it is split.

A program: `python -m scheduler.vllm.arguments ARG…` prints one JSON object. Nothing but vLLM's parser knows every
spelling and abbreviation that vLLM takes; it starts no engine and asks no model hub.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

# Sizes whose product is the number of an engine's GPUs on all its nodes. dcp is no factor: it divides a tp group anew.
FACTORS = ("tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size")


def parsed(args: Sequence[str]) -> argparse.Namespace:
    """As `vllm serve` understands them; SystemExit, with a message on standard error, as there."""
    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:  # older vLLMs
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    try:
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError:  # older vLLMs
        from vllm.utils import FlexibleArgumentParser
    namespace: argparse.Namespace = make_arg_parser(FlexibleArgumentParser(prog="vllm")).parse_args(list(args))
    return namespace


def needs(args: argparse.Namespace) -> dict[str, Any]:
    """What the supervisor must know; gpus: on this machine, None where Ray finds them."""
    replicas = args.data_parallel_size
    ranks_here = 1 if args.data_parallel_rank is not None else args.data_parallel_size_local or replicas
    all_gpus = math.prod(getattr(args, name, 1) or 1 for name in FACTORS)
    nodes = getattr(args, "nnodes", 1) or 1
    spread = args.distributed_executor_backend == "ray"
    return {
        "gpus": None if spread else max(1, all_gpus * ranks_here // (nodes if replicas == 1 else 1)),
        "data_parallel": replicas,
        "nodes": nodes,
        "utilization": args.gpu_memory_utilization,
        "max_num_seqs": args.max_num_seqs,
    }


def main() -> int:
    args = sys.argv[1:]
    told = needs(parsed(args))
    default = parsed([]).gpu_memory_utilization
    given = told["utilization"]
    sys.stdout.write(json.dumps(told | {"utilization": None if given == default else given}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
