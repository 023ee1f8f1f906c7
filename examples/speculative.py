"""Speculative decoding: several tokens from one pass over the weights where a text repeats itself. The answer is the
same as without it.

python examples/speculative.py [MODEL_DIR | FILE.gguf]
"""

import sys

from shoal.cluster.config import EMBEDDED_MODEL, locate_model
from shoal.engine import LLM, SamplingParams

model = sys.argv[1] if len(sys.argv) > 1 else locate_model(EMBEDDED_MODEL)

POEM = """The harbour wakes before the sun,
the gulls are loud, the nets are spun,
and every boat that left at night
comes home behind a yellow light."""

with LLM(model, speculative="suffix", max_model_len=1024) as llm:
    question = {"role": "user", "content": f"Repeat this poem, word for word:\n\n{POEM}"}
    (result,) = llm.chat([question], SamplingParams(temperature=0, max_tokens=96))
    (answer,) = result.outputs

    drafts = answer.drafts
    num_steps = len(answer.token_ids) - drafts.num_accepted  # each gives one token beside the drafts it accepts
    print(answer.text)
    print(f"{len(answer.token_ids)} tokens in {num_steps} steps: {len(answer.token_ids) / num_steps:.1f} tokens a step")
    print(f"{drafts.num_accepted} of {drafts.num_drafted} drafts were accepted")
