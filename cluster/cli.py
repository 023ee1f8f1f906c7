"""The `shoal` command: argument parsing, and one place where errors become one line and an exit code."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence

from shoal.cluster.config import EMBEDDED_MODEL, ClusterConfig, load_config, override
from shoal.engine.config import ConfigError

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2

_QUANTIZATION = "none, or gguf to keep 4 and 8 bits of a GGUF file (default: none)"

_SERVE_EXAMPLES = f"""examples:
  shoal serve                                  the embedded model, {EMBEDDED_MODEL}, on port 8000
  shoal serve ~/models/Qwen3-0.6B --port 9000  a Hugging Face directory
  shoal serve hf://Qwen/Qwen3-0.6B             a model of Hugging Face; HF_TOKEN, HF_HOME, HF_ENDPOINT as ever
  shoal serve model.Q4_1.gguf --dtype float32  a GGUF file
  shoal serve ~/models/Qwen3-32B --tensor-parallel 2 --pipeline-parallel 2     over four ranks
  shoal serve model.gguf --speculative suffix  the same answers, sooner where text repeats itself
  shoal serve ~/models/Qwen3-32B --speculative method=draft_model,model=$HOME/models/Qwen3-0.6B
  shoal serve cluster.yaml                     several models, replicas, everything

a configuration file:
  models:
    - name: smollm2
      model: {EMBEDDED_MODEL}      # or a directory, or a .gguf file, relative to this file
      replicas: 2
      routing: prefix_aware                   # which replica gets a request; the default
      tensor_parallel: 1                      # ranks that share every layer, on one node
      pipeline_parallel: 2                    # stages, each with a share of the layers
      nodes: {{stages: strict_spread}}          # each stage on a node of its own; labels: {{...}} chooses nodes
      speculative: suffix                     # or ngram, or {{method: draft_model, model: draft.gguf}}
      engine: {{dtype: bfloat16, max_model_len: 4096, kv_memory: 2GiB, num_threads: 4, step_timeout: 60}}
  http: {{host: 0.0.0.0, port: 8000}}
  admin: {{host: 127.0.0.1, port: 8001}}        # status page, metrics, explanations
  gateways: 1
  ray: {{address: auto}}                        # join a running Ray; leave out to start one

A replica whose node is gone is replaced when Ray notices, by default within a minute. To make that 9 seconds, start
Ray's head with these in its environment:
  RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=2000 RAY_health_check_failure_threshold=3

Ctrl-C lets open requests finish for a few seconds and stops everything; SIGTERM lets them finish for drain_timeout.
New ones are refused meanwhile. A second signal does not wait.
"""

_DEPLOY_EXAMPLES = """examples:
  shoal deploy cluster.yaml                    on the Ray that runs on this machine, or at RAY_ADDRESS
  shoal deploy cluster.yaml --ray-address 10.0.0.1:6379
  ray job submit --address http://10.0.0.1:8265 --working-dir . -- python -m shoal.cluster.cli deploy cluster.yaml

It returns when all models answer. Deploy a changed file again and it is updated: what has changed is replaced, and no
request is lost. deploy/ray/README.md tells about clusters without Shoal on their nodes, and what to start Ray with.
"""

_DELETE_EXAMPLES = """examples:
  shoal delete                                 of the Ray that runs on this machine, or at RAY_ADDRESS
  shoal delete --timeout 30 --shutdown-serve

New requests are answered with 503 and Retry-After, open ones finish, then replicas and gateways end.
"""

_DRAIN_EXAMPLES = """examples:
  shoal drain --timeout 240                    as a Kubernetes preStop hook, in the pod that is about to go

Replicas and gateways move to other nodes if there is room, and finish what they have. Exit code 0: nothing is left.
"""

_CONFIG_EXAMPLES = """examples:
  shoal config check cluster.yaml              tell whether it can work, and what it says
  shoal config render cluster.yaml > serve.yaml && serve deploy serve.yaml
"""

_RAY_ENV_EXAMPLES = """examples:
  eval "$(shoal ray-env)" && ray start --head  and on the other nodes: ray start --address=HEAD:6379

The same on every node. Without it Shoal serves through Ray's Python proxy, which is several times slower.
"""

_CHAT_EXAMPLES = """examples:
  shoal chat                                   talk to http://127.0.0.1:8000
  shoal chat -m "Why is the sky blue?"         one answer, then exit
  shoal chat --url http://gpu-1:8000 --temperature 0 --system "Answer in French."

while chatting:  /reset forgets the conversation,  /exit (or Ctrl-D) leaves,  Ctrl-C stops an answer
"""

_PLAN_EXAMPLES = """examples:
  shoal plan ~/models/Qwen3-32B --gpus 8xH100  which shapes fit, and the KV tokens that each gives
  shoal plan model.gguf --gpus 2x4xL4          two nodes of four GPUs
  shoal plan cluster.yaml --gpus 4x24GiB       every model of a configuration, GPUs by their memory
  shoal plan --json                            the embedded model on this machine, for programs

Only headers are read and nothing is started. Memory is what data sheets state, in 10**9 bytes.
"""

_STATUS_EXAMPLES = """examples:
  shoal status                                 the server whose admin port is http://127.0.0.1:8001
  shoal status --ray-address auto              every replica of the running Ray cluster
  shoal status --json | jq .models
"""

_WHY_EXAMPLES = """examples:
  shoal why chatcmpl-1f0c...                   where the time of that answer went; or its x-request-id
  shoal why                                    the slowest requests of late
  shoal why my-request-7 --url http://head:8001 --json

A gateway remembers its last 1,000 requests, and the 100 slowest of the last hour.
"""

_SIMULATE_EXAMPLES = """examples:
  shoal simulate --trace mooncake.jsonl --replicas 16 --hardware h100-8b       Shoal's policies
  shoal simulate --trace azure.csv --replicas 8 --hardware profile.yaml --policy all --ttft-ms 500 --plot out.svg
  shoal simulate --trace azure.csv --replicas 2 --hardware h100-8b --ttft-ms 500 --autoscaling latency --plot out.svg
  shoal simulate --trace mooncake.jsonl --speed 2 --replicas 16 --hardware h100-8b --policy prefix_aware,lmetric --json

a trace is Mooncake's (lines of JSON: timestamp, input_length, output_length, hash_ids of 512-token blocks) or Azure's
(CSV: TIMESTAMP,ContextTokens,GeneratedTokens).

policies: prefix_aware, round_robin, least_loaded, power_of_two, consistent_hash, a class of your own as
package.module:Class, and as others route, with their published defaults: random, ray_prefix, sglang_cache_aware,
production_stack, dynamo, lmetric.

a hardware profile is h100-8b, h200-8b, 4xh100-70b, 4xh200-70b, or a YAML file:
  kv_tokens: 449000
  step_s: {base: 0.0079, per_prefill_token: 36.9e-6, per_decode_token: 3.0e-6, per_context_token: 39.1e-9}
  block_tokens: 16            # the trace's, if left out
  max_step_tokens: 2048       # if left out, the most that a step of 0.05 s holds
  max_running_requests: 256
  usd_per_hour: 3.0           # of a replica
  start_s: 60                 # until a new replica takes requests
  request_s: 0.002            # of a request outside the engine
  concurrent_replicas: 2      # that compute at full speed at once, where they share a machine
"""

_BENCH_EXAMPLES = """examples:
  shoal bench                                  tokens a second of the embedded model in this process
  shoal bench ~/models/Qwen3-0.6B --num-threads 4
  shoal bench cluster.yaml --calibrate --out profile.yaml     what a step costs, for shoal simulate --hardware

A configuration's first model is measured, as one of its replicas runs here, without HTTP.
"""


_KEYS_EXAMPLES = """examples:
  shoal keys new --tenant acme                 a key, and the entry with its hash for the keys file
  shoal keys new --tenant acme --models smollm2 --rpm 600 --tpm 100000 --concurrent 32 --append keys.yaml
  shoal keys check keys.yaml

A configuration names the file: auth: {keys_file: keys.yaml}. The key itself is printed once and kept nowhere.
Clients send it as `Authorization: Bearer KEY`; shoal's own commands take it from SHOAL_API_KEY.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; answers the exit code (0 done, 1 failed, 2 bad input)."""
    args = build_parser().parse_args(argv)
    try:
        code: int = args.run(args)
        return code
    except ConfigError as error:
        for line in str(error).splitlines():
            print(f"shoal: error: {line}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shoal",
        description="Serve large language models on Ray behind an OpenAI-compatible API.",
        epilog="`shoal COMMAND --help` shows each command's options and examples.",
    )
    parser.add_argument("--version", action="version", version=f"shoal {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_serve(commands)
    _add_deploy(commands)
    _add_plan(commands)
    _add_chat(commands)
    _add_status(commands)
    _add_why(commands)
    _add_bench(commands)
    _add_simulate(commands)
    _add_keys(commands)
    return parser


def _add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    serve = _add_command(commands, "serve", "start a server and keep it running", _SERVE_EXAMPLES)
    serve.set_defaults(run=_serve)
    serve.add_argument(
        "target",
        nargs="?",
        metavar="CONFIG.yaml|MODEL_DIR|FILE.gguf",
        help="what to serve (default: the embedded model)",
    )
    http = serve.add_argument_group("where clients connect")
    http.add_argument("--host", help="address to listen on; 0.0.0.0 for all (default: 127.0.0.1)")
    http.add_argument("--port", type=int, help="default: 8000")
    http.add_argument("--admin-host", metavar="HOST", help="of the status page and metrics (default: 127.0.0.1)")
    http.add_argument("--admin-port", type=int, metavar="PORT", help="default: the one after --port")
    model = serve.add_argument_group("the model (the first one, where a configuration names several)")
    model.add_argument("--model-name", metavar="NAME", help="the name that clients ask for")
    model.add_argument("--replicas", type=int, metavar="N", help="copies of the model (default: 1)")
    model.add_argument("--routing", metavar="POLICY", help="which replica gets a request (default: prefix_aware)")
    model.add_argument("--tensor-parallel", type=int, metavar="N", help="ranks that share every layer (default: 1)")
    model.add_argument("--pipeline-parallel", type=int, metavar="N", help="stages of layers (default: 1)")
    model.add_argument("--stages", metavar="HOW", help="over nodes: pack, spread or strict_spread (default: pack)")
    model.add_argument(
        "--node-labels",
        type=_pairs,
        metavar="KEY=VALUE,...",
        help="Ray labels of the nodes that it may take",
    )
    model.add_argument(
        "--speculative",
        type=_method,
        metavar="METHOD|KEY=VALUE,...",
        help="off, ngram or suffix, or settings such as method=draft_model,model=PATH (default: off)",
    )
    model.add_argument("--dtype", help="auto, bfloat16, float16 or float32 (default: auto)")
    model.add_argument("--quantization", help=_QUANTIZATION)
    model.add_argument("--device", help="auto, cpu or cuda (default: auto)")
    model.add_argument("--max-model-len", type=int, metavar="N", help="prompt and answer together, in tokens")
    model.add_argument("--kv-memory", metavar="SIZE", help="memory of the KV pool of a replica, such as 2GiB")
    model.add_argument("--max-running-requests", type=int, metavar="N", help="requests that run at once")
    model.add_argument("--num-threads", type=int, metavar="N", help="CPU threads of a rank (default: its share)")
    serve.add_argument("--ray-address", metavar="ADDRESS", help='"auto" or host:port of a running Ray to join')
    serve.add_argument("--verbose", action="store_true", help="show the logs of Ray and of the replicas")


def _add_deploy(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    deploy = _add_command(
        commands, "deploy", "serve on a running Ray cluster, or update what it serves", _DEPLOY_EXAMPLES
    )
    deploy.set_defaults(run=_deploy)
    deploy.add_argument("file", metavar="CONFIG.yaml")
    _add_ray_address(deploy)
    deploy.add_argument("--no-wait", action="store_true", help="return at once; the update goes on")
    deploy.add_argument("--timeout", type=float, metavar="SECONDS", help="fail if it does not run by then")
    deploy.add_argument("--verbose", action="store_true", help="show the logs of Ray and of the replicas")
    delete = _add_command(commands, "delete", "finish open requests and take down what was deployed", _DELETE_EXAMPLES)
    delete.set_defaults(run=_delete)
    _add_ray_address(delete)
    delete.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="for open requests (default: the deployed drain_timeout)"
    )
    delete.add_argument("--shutdown-serve", action="store_true", help="stop Ray Serve too, unless others use it")
    delete.add_argument("--verbose", action="store_true", help="show the logs of Ray")
    drain = _add_command(commands, "drain", "finish what this node serves, before its Ray stops", _DRAIN_EXAMPLES)
    drain.set_defaults(run=_drain)
    drain.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS", help="at most (default: 300)")
    _add_ray_address(drain)
    config = _add_command(commands, "config", "check a configuration, or write it for Ray Serve", _CONFIG_EXAMPLES)
    config.set_defaults(run=_config)
    config.add_argument("action", choices=("check", "render"))
    config.add_argument("file", metavar="CONFIG.yaml")
    ray_env = _add_command(commands, "ray-env", "print the environment to start Ray in", _RAY_ENV_EXAMPLES)
    ray_env.set_defaults(run=_ray_env)


def _add_ray_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ray-address", metavar="ADDRESS", help="host:port of a Ray (default: RAY_ADDRESS, or the one on this machine)"
    )


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plan = _add_command(commands, "plan", "show which shapes of a model fit which devices", _PLAN_EXAMPLES)
    plan.set_defaults(run=_plan)
    plan.add_argument(
        "target",
        nargs="?",
        metavar="CONFIG.yaml|MODEL_DIR|FILE.gguf",
        help="what to plan for (default: the embedded model)",
    )
    plan.add_argument("--gpus", metavar="[NODESx]NxGPU", help="such as 8xH100 or 4x24GiB (default: this machine)")
    plan.add_argument("--dtype", help="auto, bfloat16, float16 or float32 (default: auto)")
    plan.add_argument("--quantization", help=_QUANTIZATION)
    plan.add_argument("--max-model-len", type=int, metavar="N", help="prompt and answer together, in tokens")
    plan.add_argument("--max-running-requests", type=int, metavar="N", help="requests that run at once")
    plan.add_argument("--json", action="store_true", help="for programs, with every shape")


def _pairs(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(key and equals and value for key, equals, value in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} holds no such pairs: write KEY=VALUE, or KEY=VALUE,KEY=VALUE")
    return {key: value for key, _, value in pairs}


def _method(text: str) -> str | dict[str, str]:
    """A method's name, or settings."""
    return _pairs(text) if "=" in text else text


def _add_chat(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    chat = _add_command(commands, "chat", "talk to a running server", _CHAT_EXAMPLES)
    chat.set_defaults(run=_chat)
    chat.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    chat.add_argument("-m", "--message", help="ask this, print the answer and exit")
    chat.add_argument("--model", help="which model (default: the server's first)")
    chat.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    chat.add_argument("--temperature", type=float, help="0 is greedy (default: the server's)")
    chat.add_argument("--max-tokens", type=int, metavar="N", help="length of an answer at most")


def _add_status(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    status = _add_command(commands, "status", "show what a server is doing", _STATUS_EXAMPLES)
    status.set_defaults(run=_status)
    status.add_argument("--url", default="http://127.0.0.1:8001", help="its admin port (default: %(default)s)")
    status.add_argument("--ray-address", metavar="ADDRESS", help="ask Ray about the deployments instead")
    status.add_argument("--json", action="store_true", help="for programs")


def _add_why(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    why = _add_command(commands, "why", "show why a request took as long as it did", _WHY_EXAMPLES)
    why.set_defaults(run=_why)
    why.add_argument("request_id", nargs="?", metavar="REQUEST_ID", help="default: a list of the slowest")
    why.add_argument("--url", default="http://127.0.0.1:8001", help="the server's admin port (default: %(default)s)")
    why.add_argument("--json", action="store_true", help="for programs")


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = _add_command(commands, "bench", "measure one replica on this machine", _BENCH_EXAMPLES)
    bench.set_defaults(run=_bench)
    bench.add_argument(
        "target",
        nargs="?",
        metavar="CONFIG.yaml|MODEL_DIR|FILE.gguf",
        help="what to measure (default: the embedded model)",
    )
    bench.add_argument("--num-threads", type=int, metavar="N", help="CPU threads of a rank (default: its share)")
    bench.add_argument("--calibrate", action="store_true", help="time steps and write a hardware profile")
    bench.add_argument("--out", metavar="FILE.yaml", help="where the profile goes (default: printed)")


def _add_simulate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    simulate = _add_command(
        commands, "simulate", "play a trace under several routing policies, without a device", _SIMULATE_EXAMPLES
    )
    simulate.set_defaults(run=_simulate)
    simulate.add_argument("--trace", required=True, metavar="FILE")
    simulate.add_argument("--format", choices=("mooncake", "azure"), help="of the trace (default: what it looks like)")
    simulate.add_argument("--speed", type=float, default=1.0, metavar="X", help="times as fast (default: 1)")
    simulate.add_argument("--replicas", type=int, required=True, metavar="N")
    simulate.add_argument("--policy", metavar="A,B,...", help="which to compare, or all (default: Shoal's own)")
    simulate.add_argument("--hardware", required=True, metavar="PROFILE", help="a name or a YAML file")
    simulate.add_argument("--ttft-ms", type=float, metavar="X", help="objective: time to the first token")
    simulate.add_argument(
        "--tpot-ms", type=float, metavar="X", help="objective: time of each token after it, on average"
    )
    simulate.add_argument("--admission", action="store_true", help="refuse what is predicted to miss --ttft-ms")
    scaling = simulate.add_argument_group("the number of replicas, --replicas to begin with (default: it stays)")
    scaling.add_argument("--autoscaling", choices=("latency", "ongoing_requests"), help="how it follows the load")
    scaling.add_argument("--min-replicas", type=int, metavar="N", help="default: 1")
    scaling.add_argument("--max-replicas", type=int, metavar="N", help="default: 1000")
    simulate.add_argument("--seed", type=int, default=0, metavar="N", help="of policies that draw lots (default: 0)")
    simulate.add_argument("--plot", metavar="FILE.svg|png", help="draw the comparison")
    simulate.add_argument("--json", action="store_true", help="for programs")


def _add_keys(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    keys = _add_command(commands, "keys", "make API keys, and check the file of their hashes", _KEYS_EXAMPLES)
    actions = keys.add_subparsers(title="actions", metavar="ACTION", required=True)
    new = _add_command(actions, "new", "make a key and print it, once", _KEYS_EXAMPLES)
    new.set_defaults(run=_keys_new)
    new.add_argument("--tenant", required=True, metavar="NAME", help="whom its requests count for")
    new.add_argument("--id", metavar="NAME", help="what the file and the logs call it (default: made of the tenant)")
    new.add_argument("--models", metavar="A,B,...", help="the models that it may ask (default: all)")
    new.add_argument("--rpm", type=int, metavar="N", help="requests a minute (default: no limit, as all of these)")
    new.add_argument("--tpm", type=int, metavar="N", help="tokens a minute, of prompts and answers")
    new.add_argument("--concurrent", type=int, metavar="N", help="requests at once")
    new.add_argument("--max-tokens", type=int, metavar="N", help="tokens of one request, of prompt and answer")
    new.add_argument("--expires", metavar="WHEN", help="a day or time such as 2027-06-30")
    new.add_argument("--shared-cache", action="store_true", help="share cached prefixes with other such keys")
    new.add_argument("--append", metavar="FILE.yaml", help="add its entry to this file")
    check = _add_command(actions, "check", "say what a keys file holds, or what is wrong with it", _KEYS_EXAMPLES)
    check.set_defaults(run=_keys_check)
    check.add_argument("file", metavar="FILE.yaml")


def _add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, summary: str, examples: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def serve_config(args: argparse.Namespace) -> ClusterConfig:
    """The configuration that the arguments of `shoal serve` stand for. Raises ConfigError."""
    return override(
        load_config(args.target),
        {
            "http.host": args.host,
            "http.port": args.port,
            "admin.host": args.admin_host,
            "admin.port": args.admin_port,
            "ray.address": args.ray_address,
            "models.0.name": args.model_name,
            "models.0.replicas": args.replicas,
            "models.0.routing": args.routing,
            "models.0.tensor_parallel": args.tensor_parallel,
            "models.0.pipeline_parallel": args.pipeline_parallel,
            "models.0.nodes.stages": args.stages,
            "models.0.nodes.labels": args.node_labels,
            "models.0.speculative": args.speculative,
            "models.0.engine.dtype": args.dtype,
            "models.0.engine.quantization": args.quantization,
            "models.0.engine.device": args.device,
            "models.0.engine.max_model_len": args.max_model_len,
            "models.0.engine.kv_memory": args.kv_memory,
            "models.0.engine.max_running_requests": args.max_running_requests,
            "models.0.engine.num_threads": args.num_threads,
        },
    )


def plan_config(args: argparse.Namespace) -> ClusterConfig:
    """The configuration that the arguments of `shoal plan` stand for, the same for all models. Raises ConfigError."""
    config = load_config(args.target)
    given = {
        "dtype": args.dtype,
        "quantization": args.quantization,
        "max_model_len": args.max_model_len,
        "max_running_requests": args.max_running_requests,
    }
    keys = {f"models.{i}.engine.{name}": value for i in range(len(config.models)) for name, value in given.items()}
    return override(config, keys)


def _version() -> str:
    try:
        return importlib.metadata.version("shoal")
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed, as in a Ray job
        return "from a checkout"


# Each command is imported when it runs: Ray alone takes a second.


def _serve(args: argparse.Namespace) -> int:
    from shoal.cluster.commands.serve import serve

    return serve(serve_config(args), is_verbose=args.verbose)


def _deploy(args: argparse.Namespace) -> int:
    from shoal.cluster.commands.deploy import deploy

    return deploy(
        load_config(args.file),
        ray_address=args.ray_address,
        is_waiting=not args.no_wait,
        timeout_s=args.timeout,
        is_verbose=args.verbose,
    )


def _delete(args: argparse.Namespace) -> int:
    from shoal.cluster.commands.deploy import delete

    return delete(args.ray_address, timeout_s=args.timeout, has_shutdown=args.shutdown_serve, is_verbose=args.verbose)


def _drain(args: argparse.Namespace) -> int:
    from shoal.cluster.commands.drain import drain_node

    return drain_node(args.timeout, args.ray_address)


def _config(args: argparse.Namespace) -> int:
    from shoal.cluster.commands.configuration import check, render

    return check(args.file) if args.action == "check" else render(args.file)


def _ray_env(args: argparse.Namespace) -> int:
    from shoal.cluster.commands.ray_env import ray_env

    return ray_env()


def _plan(args: argparse.Namespace) -> int:
    from shoal.cluster.commands.plan import plan

    return plan(plan_config(args), gpus=args.gpus, is_json=args.json)


def _chat(args: argparse.Namespace) -> int:
    from shoal.cluster.commands.chat import chat

    return chat(
        args.url,
        model=args.model,
        message=args.message,
        system=args.system,
        temperature=args.temperature,
        max_tokens=args.max_tokens,
    )


def _status(args: argparse.Namespace) -> int:
    from shoal.cluster.commands.status import status

    return status(args.url, ray_address=args.ray_address, is_json=args.json)


def _why(args: argparse.Namespace) -> int:
    from shoal.cluster.commands.why import why

    return why(args.url, args.request_id, is_json=args.json)


def _bench(args: argparse.Namespace) -> int:
    from shoal.cluster.commands.bench import bench

    config = override(load_config(args.target), {"models.0.engine.num_threads": args.num_threads})
    return bench(config, is_calibrating=args.calibrate, out=args.out)


def _simulate(args: argparse.Namespace) -> int:
    from shoal.cluster.commands.simulate import autoscaling, objectives, simulate

    return simulate(
        args.trace,
        num_replicas=args.replicas,
        hardware=args.hardware,
        policies=args.policy,
        format=args.format,
        speed=args.speed,
        objectives=objectives(ttft_ms=args.ttft_ms, tpot_ms=args.tpot_ms),
        has_admission=args.admission,
        autoscaling=autoscaling(
            policy=args.autoscaling, min_replicas=args.min_replicas, max_replicas=args.max_replicas
        ),
        seed=args.seed,
        plot=args.plot,
        is_json=args.json,
    )


def _keys_new(args: argparse.Namespace) -> int:
    from shoal.cluster.commands.keys import show_new_key
    from shoal.cluster.keys import new_key

    limits = {
        "requests_per_minute": args.rpm,
        "tokens_per_minute": args.tpm,
        "max_concurrent_requests": args.concurrent,
        "max_tokens_per_request": args.max_tokens,
    }
    made = new_key(
        args.tenant,
        id=args.id,
        models=args.models.split(",") if args.models is not None else None,
        limits=limits,
        expires=args.expires,
        shared_cache=args.shared_cache,
    )
    return show_new_key(made, append=args.append)


def _keys_check(args: argparse.Namespace) -> int:
    from shoal.cluster.commands.keys import check_keys

    return check_keys(args.file)


if __name__ == "__main__":
    sys.exit(main())
