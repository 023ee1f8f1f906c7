"""One model over two pipeline stages, each a process of this host with half of the layers: no Ray.

python examples/pipeline.py [MODEL_DIR | FILE.gguf]
"""

import sys

from shoal.cluster.config import EMBEDDED_MODEL, locate_model
from shoal.engine import LLM, SamplingParams

model = sys.argv[1] if len(sys.argv) > 1 else locate_model(EMBEDDED_MODEL)

with LLM(model, pipeline_parallel=2, max_model_len=1024) as llm:
    for rank in llm.ranks:
        last = rank.first_layer + rank.num_layers - 1
        print(
            f"process {rank.pid}: layers {rank.first_layer} to {last}, {rank.weight_bytes / 2**20:.0f} MiB of weights"
        )
    question = {"role": "user", "content": "What is the capital of France?"}
    (answer,) = llm.chat([question], SamplingParams(temperature=0, max_tokens=24))
    print(answer.outputs[0].text)
