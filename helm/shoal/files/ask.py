"""`helm test`: the release is healthy, names its models, and answers a chat with each."""

import json
import os
import sys
import time
import urllib.error
import urllib.request

URL = os.environ["SHOAL_URL"]
KEY = os.environ.get("SHOAL_API_KEY", "")
TIMEOUT_S = float(os.environ["SHOAL_TIMEOUT_S"])


def ask(path: str, body: object = None) -> tuple[int, bytes]:
    """Status and body of the answer; waits while nobody answers, or with 503, until the time is up."""
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {KEY}"} if KEY else {})
    data = None if body is None else json.dumps(body).encode()
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            request = urllib.request.Request(URL + path, data, headers)
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            if error.code != 503 or time.monotonic() > deadline:
                return error.code, error.read()
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(1)


def main() -> None:
    status, _ = ask("/health")
    assert status == 200, f"/health answers {status}"
    status, body = ask("/v1/models")
    if os.environ["SHOAL_NEEDS_KEY"] and not KEY:
        assert status == 401, f"/v1/models answers {status} without a key"
        print("healthy, and asks for a key; with tests.apiKeySecret models are asked too")
        return
    assert status == 200, f"/v1/models answers {status}: {body!r}"
    served = {model["id"] for model in json.loads(body)["data"]}
    for name in json.loads(os.environ["SHOAL_MODELS"]):
        assert name in served, f"{name} is not among {sorted(served)}"
        question = {"model": name, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8}
        status, body = ask("/v1/chat/completions", question)
        assert status == 200, f"{name} answers {status}: {body!r}"
        print(f"{name}: {json.loads(body)['choices'][0]['message']['content']!r}")


if __name__ == "__main__":
    try:
        main()
    except AssertionError as error:
        sys.exit(str(error))
