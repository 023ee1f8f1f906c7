"""Ray Serve LLM over vLLM on a CPU, serving until it is told to end. Runs in vLLM's environment.

    ENVIRONMENT/bin/python bench/peers_ray_llm.py PORT MODEL NAME '{"max_model_len": 2048, ...}'

The last argument are vLLM's engine options. Settings of Ray, vLLM and what is loaded first come from the environment.
"""

from __future__ import annotations

import json
import os
import signal
import sys

import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app

OBJECT_STORE_BYTES = 128 * 2**20  # nothing large goes through Ray
OF_THE_ENGINE = ("VLLM", "HF_", "OMP_")


def main() -> None:
    port, model, name, options = sys.argv[1:]
    preloaded = os.environ.pop("PRELOAD_IN_ENGINE")  # Ray's own processes do without
    engine = {key: value for key, value in os.environ.items() if key.startswith(OF_THE_ENGINE)}
    config = LLMConfig(
        model_loading_config={"model_id": name, "model_source": model},
        deployment_config={"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}},
        accelerator_type=None,
        placement_group_config={"bundles": [{"CPU": 1}]},
        engine_kwargs=json.loads(options),
        runtime_env={"env_vars": {**engine, "LD_PRELOAD": preloaded}},
    )
    ray.init(address="local", num_cpus=8, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES)
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    try:
        serve.run(build_openai_app({"llm_configs": [config]}), route_prefix="/")
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
