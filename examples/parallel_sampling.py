"""Several answers to one prompt. The prompt is computed once, and its KV blocks are shared until the answers differ.

python examples/parallel_sampling.py [MODEL_DIR | FILE.gguf]
"""

import sys

from shoal.cluster.config import EMBEDDED_MODEL, locate_model
from shoal.engine import LLM, SamplingParams

model = sys.argv[1] if len(sys.argv) > 1 else locate_model(EMBEDDED_MODEL)

with LLM(model, max_model_len=1024) as llm:
    # The same seed gives the same four answers again, whatever else runs at the time.
    params = SamplingParams(n=4, temperature=0.9, top_p=0.95, seed=7, max_tokens=24, logprobs=0)
    (result,) = llm.generate(["Once upon a time, a shoal of fish"], params)

    for sample in result.outputs:
        total = sum(token.logprob for token in sample.logprobs or ())
        print(f"[{sample.index}] log-probability {total:6.1f}: {sample.text!r}")

    print(f"{llm.stats().prompt_tokens_total} prompt tokens, {llm.stats().cached_tokens_total} of them shared")
