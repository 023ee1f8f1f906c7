"""Complete prompts and answer a chat in this process: no server, no Ray.

python examples/offline.py [MODEL_DIR | FILE.gguf]
"""

import sys

from shoal.cluster.config import EMBEDDED_MODEL, locate_model
from shoal.engine import LLM, SamplingParams

model = sys.argv[1] if len(sys.argv) > 1 else locate_model(EMBEDDED_MODEL)

with LLM(model, max_model_len=1024) as llm:
    greedy = SamplingParams(temperature=0, max_tokens=24)

    for result in llm.generate(["The sea is", "Two plus two is"], greedy):
        print(f"{result.prompt}{result.outputs[0].text}\n")

    question = {"role": "user", "content": "What is the capital of France?"}
    (answer,) = llm.chat([question], greedy)
    print(answer.outputs[0].text)
