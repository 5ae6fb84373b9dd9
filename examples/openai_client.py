"""Asks a running server through OpenAI's own client, which knows nothing of adapters: the server chooses them.

    pip install openai
    loraretriever serve --pool demo/pool
    OPENAI_BASE_URL=http://127.0.0.1:8000/v1 python examples/openai_client.py "Fix the grammar: He have three cat."

The address and the key come from OPENAI_BASE_URL and OPENAI_API_KEY, as for any program that uses this client.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from typing import Any

from openai import APIError, OpenAI

PROMPT = "Write a bash command that lists all files larger than 10 MB."


def main() -> int:
    """Answer one prompt at once, and then again as a stream."""
    parser = argparse.ArgumentParser(description="Ask a server; it chooses the adapters.")
    parser.add_argument("prompt", nargs="?", default=PROMPT)
    parser.add_argument("--model", default="auto", help="auto, base, an adapter, or mixture(sql=0.7,german=0.3)")
    parser.add_argument("--max-tokens", type=int, default=64)
    arguments = parser.parse_args()
    client = OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),  # without keys in the pool any will do
    )
    request: dict[str, Any] = {
        "model": arguments.model,
        "messages": [{"role": "user", "content": arguments.prompt}],
        "max_tokens": arguments.max_tokens,
        "temperature": 0,
    }
    try:
        ask(client, request)
        ask_streaming(client, request)
    except APIError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def ask(client: OpenAI, request: dict[str, Any]) -> None:
    """The whole answer at once. The client keeps fields that it does not know in `model_extra`."""
    completion = client.chat.completions.create(**request)
    sys.stdout.write(f"{completion.choices[0].message.content}\n")
    sys.stdout.write(f"{describe((completion.model_extra or {})['lora'])}\n\n")


def ask_streaming(client: OpenAI, request: dict[str, Any]) -> None:
    """The answer as it comes. The first chunk and the last say which adapters answer; the last knows the times."""
    lora: Mapping[str, Any] = {}
    for chunk in client.chat.completions.create(stream=True, **request):
        if chunk.choices:
            sys.stdout.write(chunk.choices[0].delta.content or "")
            sys.stdout.flush()
        lora = (chunk.model_extra or {}).get("lora") or lora
    sys.stdout.write(f"\n{describe(lora)}\n")


def describe(lora: Mapping[str, Any]) -> str:
    """One line on who answered, and why."""
    hits = ", ".join(f"{hit['adapter']} {hit['score']:.2f}" for hit in lora["hits"])
    why = f"found: {hits}" if hits else "named in the request"
    if lora["fallback"]:
        why = f"nothing fits well enough: {hits or 'there is no adapter'}"
    return f"[{lora['composition']}; {why}; {lora['milliseconds']['total']:.0f} ms]"


if __name__ == "__main__":
    sys.exit(main())
