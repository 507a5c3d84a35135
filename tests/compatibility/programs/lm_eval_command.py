"""lm-eval's local-chat-completions and local-completions on questions of our own, for its own come from a model hub."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from told import FOLDER, MODEL, URL, works

CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Germany": "Berlin"}
TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "What is the capital of {{{{country}}}}?"
doc_to_target: "{{{{city}}}}"
{more}
"""
GENERATED = """
generation_kwargs: {until: ["\\n"], max_gen_toks: 24, temperature: 0}
filter_list: [{name: city, filter: [{function: regex, regex_pattern: "is ([A-Z][a-z]+)"}, {function: take_first}]}]
metric_list: [{metric: exact_match}]
"""
CHOSEN = f"doc_to_choice: {json.dumps(list(CAPITALS.values()))}\nmetric_list: [{{metric: acc}}]"


def evaluate(kind: str, model: str, more: str, args: str, *words: str) -> dict[str, float]:
    """The task's results."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "capitals.jsonl")
        rows = [json.dumps({"country": country, "city": city}) + "\n" for country, city in CAPITALS.items()]
        file.write_text("".join(rows))
        Path(folder, "capitals.yaml").write_text(TASK.format(file=file, kind=kind, more=more))
        subprocess.run(
            [
                *(str(Path(sys.executable).with_name("lm_eval")), "--model", model, "--tasks", "capitals"),
                *("--model_args", f"model={MODEL},{args}", "--include_path", folder, "--output_path", f"{folder}/out"),
                *words,
            ],
            check=True,
            stdout=sys.stderr,
        )
        (report,) = Path(folder, "out").rglob("results_*.json")
        return dict(json.loads(report.read_text())["results"]["capitals"])


at = f"base_url={URL}/chat/completions,num_concurrent=4,max_retries=1"
seen = evaluate("generate_until", "local-chat-completions", GENERATED, at, "--apply_chat_template")
assert seen["exact_match,city"] >= 0.75, seen  # what a model of this size knows
works(f"local-chat-completions: {seen['exact_match,city']:.0%} of four capitals")

at = f"base_url={URL}/completions,num_concurrent=4,max_retries=1,tokenizer={FOLDER},max_length=1024"
seen = evaluate("multiple_choice", "local-completions", CHOSEN, at)
assert 0 <= seen["acc,none"] <= 1, seen
works("local-completions: log probabilities of the choices")
