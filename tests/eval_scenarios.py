"""Scores requests through the evaluation's engine and prints them as JSON; started as engine_scenarios.py is.

python eval_scenarios.py score CHECKPOINT RUNNER REQUESTS
"""

import json

from engine_scenarios import CHECKPOINT, OPTIONS, SCENARIO

from prunepath_vllm.evaluation.backends import VllmBackend, open_checkpoint
from prunepath_vllm.evaluation.tasks import Request


def score():
    """[reads given tokens alone, {tau: [[log-probability, tokens read], ...]}]."""
    engine = dict(block_size=32, max_num_batched_tokens=64, max_num_seqs=6)
    backend = VllmBackend(open_checkpoint(CHECKPOINT), None, engine)
    requests = [Request(*request) for request in OPTIONS["requests"]]
    answers = {tau: backend.loglikelihood(requests, tau) for tau in OPTIONS["taus"]}
    return [backend.scores_ids, {tau: [[one.logprob, one.read] for one in each] for tau, each in answers.items()}]


if __name__ == "__main__":
    result = globals()[SCENARIO]()
    print("\nRESULT " + json.dumps(result))
