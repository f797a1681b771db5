"""The engine core: what a request's blocks are keyed by, whatever front end brought it, and what is refused."""

from types import SimpleNamespace

import pytest
import vllm.v1.engine.core  # noqa: F401  what is wrapped
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore

from prunepath_vllm.config import PrunePathConfig
from prunepath_vllm.errors import TauError, UnsupportedFeatureError
from prunepath_vllm.model_executor import engine_core
from prunepath_vllm.model_executor.operator_policy import OperatorPolicy
from prunepath_vllm.model_executor.tau_resolution import TauResolver

PROMPT = list(range(50))
BLOCK = 16


class Core:
    """As much of vLLM's engine core as takes a request in."""

    preprocess_add_request = EngineCore.preprocess_add_request

    def __init__(self, resolver: TauResolver | None) -> None:
        engine_core.install_in_engine_core()
        Core.preprocess_add_request = EngineCore.preprocess_add_request  # as it is wrapped now
        engine_core._resolvers[self] = resolver
        self.mm_receiver_cache = None
        self.structured_output_manager = SimpleNamespace()
        init_none_hash(sha256)
        self.request_block_hasher = get_request_block_hasher(BLOCK, sha256)

    def take(self, extra, answer=(), cache_salt=None, resumable=False):
        """The engine core's own request, after `answer` was generated."""
        request = EngineCoreRequest(
            request_id="r",
            prompt_token_ids=PROMPT,
            mm_features=None,
            sampling_params=SamplingParams(extra_args=extra),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=cache_salt,
            data_parallel_rank=None,
            resumable=resumable,
        )
        taken, _ = self.preprocess_add_request(request)
        taken.append_output_token_ids(list(answer))
        return taken


def core(**options) -> Core:
    block = PrunePathConfig.model_construct(tau_curve=[(0.5, 0.5), (1.0, 0.0)])
    return Core(TauResolver(block, OperatorPolicy(**{"default_tau": 0.8, "full_queue": 10, **options})))


def test_blocks_are_shared_by_requests_that_workers_run_at_one_tau():
    asked = [None, {"tau": 0.8}, {"tau": 0.75}, {"sparsity": 0.25}, {"tau": 1.0}, {"tau": 1}, {"tau": 1.05}]
    default, named, lower, looked_up, dense, whole, more = (core().take(extra) for extra in asked)
    assert default.block_hashes == named.block_hashes
    assert lower.block_hashes == looked_up.block_hashes
    assert dense.block_hashes == whole.block_hashes == more.block_hashes
    assert len(dense.block_hashes) == 3
    every = [*default.block_hashes, *lower.block_hashes, *dense.block_hashes]
    assert len(set(every)) == len(every)
    taus = [request.sampling_params.extra_args for request in (default, looked_up, more)]
    assert taus == [{"tau": 0.8}, {"tau": 0.75}, {"tau": 1.05}]


def test_a_users_salt_still_separates_and_cannot_pass_for_a_tau():
    salts = [None, "mine", engine_core.tau_cache_salt(None, 0.5)]
    hashes = [tuple(core().take({"tau": 0.8}, cache_salt=salt).block_hashes) for salt in salts]
    assert len(set(hashes)) == 3
    assert tuple(core().take({"tau": 0.5}).block_hashes) not in hashes


def test_a_prefill_tau_shares_prompts_and_separates_answers():
    one, other, same = (core(prefill_tau=1.0).take({"tau": tau}, range(40)) for tau in (0.5, 1.0, 1.05))
    assert one.block_hashes[:3] == other.block_hashes[:3]
    assert not set(one.block_hashes[3:]) & set(other.block_hashes)
    assert other.block_hashes == same.block_hashes
    assert one.sampling_params.extra_args == {"tau": 0.5, "prunepath_prefill_tau": 1.0}
    other_prefill = core(prefill_tau=0.9).take({"tau": 0.5})
    assert not set(other_prefill.block_hashes) & set(one.block_hashes)


@pytest.mark.parametrize(("start", "end", "marked"), [(16, 33, False), (32, 49, False), (32, 51, True), (48, 65, True)])
def test_a_hash_that_looks_tokens_ahead_is_marked_where_it_covers_an_answer(start, end, marked):
    """vLLM 0.33 may hash a block with the tokens after it; the prompt has 50 tokens."""
    request = core(prefill_tau=1.0).take({"tau": 0.5})
    assert engine_core.decode_block_key(request, start, end) == (("prunepath", "tau=0.5 from 50") if marked else None)


@pytest.mark.parametrize("forged", [0.5, "x", None], ids=str)
def test_nobody_else_writes_the_prefill_tau(forged):
    assert core().take({"prunepath_prefill_tau": forged}).sampling_params.extra_args == {"tau": 0.8}
    # Another model's users may send what they like.
    assert Core(None).take({"tau": "low", "prunepath_prefill_tau": forged}, range(40)).block_hashes


def test_another_models_requests_pass_untouched():
    plain, with_tau = (Core(None).take(extra) for extra in (None, {"tau": 7, "prunepath_report": 1}))
    assert plain.block_hashes == with_tau.block_hashes
    assert with_tau.sampling_params.extra_args == {"tau": 7, "prunepath_report": 1}
    assert with_tau.cache_salt is None


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"tau": 0.3}, r"tau must be in \[0.4, 0.9\]"),
        ({"tau": 3}, r"tau must be a number in \(0, 1.05\], got 3"),
        ({"tau": True}, "got True"),
        ({"tau": "0.5"}, "got '0.5'"),
        ({"sparsity": 0.0}, r"sparsity 0.0 means tau 1 .* must be in \[0.4, 0.9\]"),
        ({"tau": 0.5, "sparsity": 0.5}, "both given"),
    ],
    ids=str,
)
def test_no_tau_that_was_not_checked_gets_to_a_worker(extra, said):
    with pytest.raises(TauError, match=said):
        core(min_tau=0.4, max_tau=0.9).take(extra)


def test_prompts_that_go_on_later_are_refused():
    with pytest.raises(UnsupportedFeatureError, match="streaming input"):
        core().take({"tau": 0.5}, resumable=True)
    assert Core(None).take({}, resumable=True).resumable
