"""The likeliest ways on from a prompt, searched side by side; blocks are shared as far as the ways are the same.

python examples/beam_search.py [MODEL_DIR | FILE.gguf]
"""

import sys

from shoal.cluster.config import EMBEDDED_MODEL, locate_model
from shoal.engine import LLM, SamplingParams

model = sys.argv[1] if len(sys.argv) > 1 else locate_model(EMBEDDED_MODEL)

with LLM(model, max_model_len=1024) as llm:
    # Four beams, of which the best two are answered. length_penalty above 1 prefers longer ones.
    params = SamplingParams(n=2, best_of=4, use_beam_search=True, length_penalty=1.0, max_tokens=16, logprobs=0)
    (result,) = llm.generate(["The capital of France is"], params)

    for beam in result.outputs:
        total = sum(token.logprob for token in beam.logprobs or ())
        print(f"[{beam.index}] log-probability {total:6.1f}: {beam.text!r}")
