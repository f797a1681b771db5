"""The operator's options without a server: what is refused, and how load picks a tau. test_server_policy.py has one."""

import asyncio
import json
import re
import shutil
from types import SimpleNamespace

import pytest
from vllm.v1.metrics.stats import SchedulerStats

from prunepath_vllm.config import PrunePathConfig
from prunepath_vllm.entrypoints.server import batch, engine
from prunepath_vllm.entrypoints.server.knob import check_options, settled_knob
from prunepath_vllm.entrypoints.server.queue_length import QueueLength, waiting_requests
from prunepath_vllm.entrypoints.server.report import Report
from prunepath_vllm.entrypoints.server.routes import info
from prunepath_vllm.errors import ConfigError, TauError
from prunepath_vllm.model_executor import admission
from prunepath_vllm.model_executor.operator_policy import OperatorPolicy
from prunepath_vllm.model_executor.tau_resolution import TauResolver

RANGE = {"min": 0.5, "max": 1.0}


def resolver(**options) -> TauResolver:
    block = PrunePathConfig.model_construct(tau_curve=[(0.5, 0.5), (1.0, 0.0)])
    return TauResolver(block, OperatorPolicy(**{"default_tau": 0.8, "full_queue": 10, **options}))


@pytest.mark.parametrize(
    ("waiting", "tau"), [(0, 1.0), (1, 0.95), (4, 0.8), (5, 0.75), (9, 0.55), (10, 0.5), (1000, 0.5)], ids=str
)
def test_tau_falls_linearly_until_the_queue_is_full(waiting, tau):
    assert resolver().tau_of({"tau": RANGE}, waiting) == tau


def test_taus_are_few_so_that_they_share_prefix_blocks_and_ends_are_exact():
    taus = [resolver(full_queue=1000).tau_of({"tau": {"min": 0.52, "max": 0.97}}, waiting) for waiting in range(1001)]
    assert sorted(set(taus)) == [0.52, 0.57, 0.62, 0.67, 0.72, 0.77, 0.82, 0.87, 0.92, 0.97]
    assert taus == sorted(taus, reverse=True)


@pytest.mark.parametrize(
    ("options", "ends"),
    [
        ({}, (0.8, 1.0)),
        ({"default_tau": 1.0}, (1.0, 1.0)),
        ({"min_tau": 0.4}, (0.4, 1.0)),
        ({"min_tau": 0.4, "max_tau": 0.9}, (0.4, 0.9)),
    ],
    ids=str,
)
def test_auto_ranges_over_what_the_operator_has_named(options, ends):
    assert resolver(**options).policy.auto_range == ends
    assert tuple(resolver(**options).tau_of({"tau": "auto"}, waiting) for waiting in (10, 0)) == ends


def test_a_range_is_narrowed_to_the_bounds_and_refused_outside_them():
    bounded = resolver(min_tau=0.6, max_tau=0.9)
    assert [bounded.tau_of({"tau": RANGE}, waiting) for waiting in (0, 10)] == [0.9, 0.6]
    with pytest.raises(TauError, match=r"\[0.2, 0.5\] has nothing in common with \[0.6, 0.9\]"):
        bounded.tau_of({"tau": {"min": 0.2, "max": 0.5}})


@pytest.mark.parametrize("tau", ["auto", RANGE], ids=str)
def test_a_choice_left_to_the_server_and_a_sparsity_contradict(tau):
    with pytest.raises(TauError, match="both given"):
        resolver().tau_of({"tau": tau, "sparsity": 0.3})


def test_the_queue_is_what_the_schedulers_said_last():
    engine = SimpleNamespace(logger_manager=SimpleNamespace(stat_loggers=[]))
    assert waiting_requests(engine) == waiting_requests(engine) == 0
    (queue,) = engine.logger_manager.stat_loggers
    assert isinstance(queue, QueueLength)
    queue.record(SchedulerStats(num_waiting_reqs=5, num_skipped_waiting_reqs=1), None)
    queue.record(None, None)
    assert waiting_requests(engine) == 6
    queue.record(SchedulerStats(num_waiting_reqs=2), None, mm_cache_stats=None, engine_idx=1)
    assert waiting_requests(engine) == 4  # on each of two engines
    queue.record(SchedulerStats(), None, engine_idx=0)
    assert waiting_requests(engine) == 1


def test_without_statistics_nothing_is_known_to_wait():
    assert waiting_requests(SimpleNamespace(logger_manager=None)) == 0


def test_a_report_adds_up_what_each_data_parallel_engine_counted():
    """Two stages of two and one layers; of three engines the second ran none of the request's prompts."""
    engines = [
        [[([2, 4], 8), ([0, 0], 0)], [([8], 8), ([0], 0)]],  # by worker: of the prompt, and of the answer
        [None, None],
        [[([6, 0], 8), ([1, 2], 4)], [([8], 8), ([3], 4)]],
    ]

    async def call(method, *args):
        assert (method, args) == ("collective_rpc", ("prunepath_report", None, ("it",), None))
        return engines

    report = Report(name="it", content={"tau": 0.5})
    told = asyncio.run(report.complete(SimpleNamespace(engine_core=SimpleNamespace(call_utility_all_async=call))))
    assert told["prompt_ffn_sparsity_by_layer"] == [0.5, 0.75, 0.0]
    assert told["ffn_sparsity_by_layer"] == [0.75, 0.5, 0.25]
    assert told["ffn_sparsity"] == 0.5


@pytest.mark.parametrize("rest", [(), ("tracker",)], ids=["0.33", "0.32"])
def test_a_batch_line_has_its_knob_under_either_release(rest):
    seen = []

    async def run_request(endpoint, request, *args):
        seen.append((endpoint, request, args, admission._request_knob.get()))

    line = SimpleNamespace(prunepath_line={"body": {"tau": 0.5}})
    token = batch._serving.set((resolver(), None))
    try:
        asyncio.run(batch._with_knob(run_request)("endpoint", line, *rest))
    finally:
        batch._serving.reset(token)
    assert seen == [("endpoint", line, rest, {"tau": 0.5})]


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ({"tau": 0.5}, "tau beside the line's body is not read; expected 'tau' in it"),
        ({"prunepath_report": True}, "prunepath_report beside the line's body is not read"),
        ({"vllm_xargs": {"sparsity": 0.5}}, "vllm_xargs.sparsity is not read; expected 'sparsity' in the line's body"),
    ],
    ids=str,
)
def test_a_knob_beside_a_batch_lines_body_is_refused(beside, said):
    async def run_request(endpoint, request):
        await endpoint(request.body)

    line = json.dumps({"body": {}, "custom_id": "a", **beside})
    token = batch._serving.set((resolver(), SimpleNamespace(logger_manager=None)))
    try:
        request = batch._with_written_body(lambda text: SimpleNamespace(**json.loads(text)))(line)
        with pytest.raises(admission.TauRequestError, match=re.escape(said)):
            asyncio.run(batch._with_knob(run_request)("endpoint", request))
    finally:
        batch._serving.reset(token)


@pytest.mark.parametrize("named", [{}, {"model": None}, {"model": ""}, {"model": "fast"}], ids=str)
def test_a_body_without_a_name_gets_the_default_of_the_name_it_is_answered_under(named):
    model_config = SimpleNamespace(served_model_name="fast")  # vLLM keeps the first
    engine = SimpleNamespace(logger_manager=None, vllm_config=SimpleNamespace(model_config=model_config))
    named_taus = resolver(default_tau_by_model={"fast": 0.5, "best": 1.0})
    assert settled_knob(named, named_taus, engine) == {"tau": 0.5}
    assert settled_knob({**named, "tau": 0.8}, named_taus, engine) == {"tau": 0.8}
    assert settled_knob({"model": "best"}, named_taus, engine) == {"tau": 1.0}
    assert settled_knob({"model": "other"}, named_taus, engine) == {}


def server_args(*flags):
    """What vLLM makes of its server's flags."""
    from vllm.entrypoints.cli.serve import make_arg_parser  # releases have it in different modules
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", "m", *flags])


def test_a_default_for_a_name_that_is_not_served_stops_the_server():
    flags = ["--additional-config", json.dumps({"prunepath": {"default_tau_by_model": {"fats": 0.5}}})]
    with pytest.raises(ConfigError, match="default_tau_by_model: 'fats' is not served; expected one of fast, best"):
        check_options(server_args(*flags, "--served-model-name", "fast", "best"))
    check_options(server_args(*flags, "--lora-modules", "fats=somewhere"))


@pytest.mark.parametrize(
    ("family", "options", "named"),
    [
        ("llama", {"min_tau": 0.8, "max_tau": 0.5}, "min_tau: 0.8 is above max_tau 0.5"),
        ("llama", {"max_tau": 0.5}, "default_tau: 0.6 (the checkpoint's) is outside [0.0, 0.5]"),
        ("llama", {"min_tau": 0.5, "default_tau": 0.4}, "default_tau: 0.4 is outside [0.5, 1.05]"),
        ("llama", {"prefill_tau": "1"}, "prefill_tau must be a number in (0, 1.05], got '1'"),
        ("roberta", {"prefill_tau": 1.0}, "prefill_tau"),
        ("llama", {"min_tau": 0.5, "default_tau_by_model": {"a": 0.4}}, "default_tau_by_model.a: 0.4 is outside [0.5,"),
        ("llama", {"default_tau_by_model": 0.4}, "default_tau_by_model: expected an object of served names and taus"),
        ("llama", {"full_queue": 0}, "full_queue: expected a whole number of requests, at least 1, got 0"),
        ("llama", {"full_queue": True}, "full_queue: expected a whole number"),
        ("llama", {"mode": "atleast"}, "prunepath.mode: expected one of exact, at_least, got 'atleast'"),
        ("llama", {"quantise_activations": 1}, "quantise_activations: expected true or false, got 1"),
        ("llama", {"mode": ["exact"]}, "prunepath.mode: expected one of exact, at_least, got ['exact']"),
    ],
    ids=[
        "crossed",
        "checkpoint-default",
        "default",
        "not-a-number",
        "pooling",
        "named-default",
        "no-names",
        "no-queue",
        "bool-queue",
        "no-mode",
        "no-flag",
        "listed-mode",
    ],
)
def test_a_policy_that_makes_no_sense_stops_the_server(prunepath_checkpoint, family, options, named):
    from vllm.engine.arg_utils import EngineArgs

    checkpoint = prunepath_checkpoint(family, default_tau=0.6)
    with pytest.raises(ValueError, match=re.escape(named)):
        EngineArgs(model=str(checkpoint), additional_config={"prunepath": options}).create_engine_config()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"override_generation_config": {"tau": 0.4}}, "tau: 0.4 in generation_config.json or --override-generation-"),
        ({"generation_config": {"sparsity": 0.4}}, "sparsity: 0.4 in generation_config.json or"),
        ({"hf_overrides": {"default_tau": 0.4}}, "default_tau: 0.4 in config.json or --hf-overrides is not read"),
    ],
    ids=["override", "file", "hf-overrides"],
)
def test_a_default_where_nobody_reads_it_stops_the_server(prunepath_checkpoint, tmp_path, options, named):
    from vllm.engine.arg_utils import EngineArgs

    if "generation_config" in options:
        (tmp_path / "generation_config.json").write_text(json.dumps(options["generation_config"]))
        options = {"generation_config": str(tmp_path)}
    checkpoint = prunepath_checkpoint("llama", default_tau=0.6)
    with pytest.raises(ValueError, match=re.escape(named)):
        EngineArgs(model=str(checkpoint), **options).create_engine_config()


def test_a_generation_config_that_nobody_reads_stops_nothing(prunepath_checkpoint, tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    checkpoint, other = tmp_path / "checkpoint", tmp_path / "other"
    shutil.copytree(prunepath_checkpoint("llama", default_tau=0.6), checkpoint)
    (checkpoint / "generation_config.json").write_text('{"tau": 0.4}')
    other.mkdir()
    (other / "generation_config.json").write_text('{"temperature": 0.4}')
    with pytest.raises(ValueError, match=r"tau: 0.4 in generation_config.json"):
        EngineArgs(model=str(checkpoint)).create_engine_config()
    for source in ("vllm", str(other)):
        EngineArgs(model=str(checkpoint), generation_config=source).create_engine_config()
    override = {"tau": 0.5}
    with pytest.raises(ValueError, match=r"tau: 0.5 in generation_config.json or --override-generation-config"):
        EngineArgs(
            str(checkpoint), generation_config="vllm", override_generation_config=override
        ).create_engine_config()


@pytest.mark.parametrize(
    ("defaults", "named"),
    [
        ({"tau": 0.4}, "tau: 0.4 in --default-chat-template-kwargs is not read; expected additional_config.prunepath"),
        ({"a": 1, "sparsity": 0}, "sparsity: 0 in --default-chat-template-kwargs is not read"),
        ({"min_tau": 0.4}, "min_tau: 0.4 in --default-chat-template-kwargs is not read; expected additional_config.p"),
    ],
    ids=["tau", "sparsity", "operators"],
)
def test_a_tau_among_the_chat_templates_defaults_stops_servers_and_batches(defaults, named):
    args = server_args("--default-chat-template-kwargs", json.dumps(defaults))
    with pytest.raises(ConfigError, match=re.escape(named)):
        engine._with_middleware(None)(args, None)
    block = PrunePathConfig.model_construct(tau_curve=None)
    client = SimpleNamespace(vllm_config=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TauResolver, "of", lambda config: TauResolver(block, OperatorPolicy(0.8, 10)))
        with pytest.raises(ConfigError, match=re.escape(named)):
            asyncio.run(batch._with_resolver(None)(client, args))


@pytest.mark.parametrize("defaults", ["{}", "null", '{"enable_thinking": false, "tau": null}'])
def test_other_defaults_of_the_chat_template_are_the_servers_own(defaults):
    check_options(server_args("--default-chat-template-kwargs", defaults))


@pytest.mark.parametrize(("options", "mode"), [({}, "exact"), ({"mode": "at_least"}, "at_least")], ids=["unset", "set"])
def test_info_names_the_mode(prunepath_checkpoint, options, mode):
    from vllm.engine.arg_utils import EngineArgs

    checkpoint = prunepath_checkpoint("llama", default_tau=0.6)
    config = EngineArgs(model=str(checkpoint), additional_config={"prunepath": options}).create_engine_config()
    resolver = TauResolver.of(config)
    assert resolver is not None
    assert info(resolver, config, ["m"])["mode"] == resolver.policy.mode == mode
