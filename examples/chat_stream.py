"""Stream an answer through the official OpenAI client. Start the server first: `make serve`.

python examples/chat_stream.py [URL]
"""

import sys

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"

with OpenAI(base_url=url, api_key="not-needed") as client:
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for event in stream:
        for choice in event.choices:
            print(choice.delta.content or "", end="", flush=True)
        if event.usage:
            print(f"\n({event.usage.prompt_tokens} prompt tokens, {event.usage.completion_tokens} generated)")
