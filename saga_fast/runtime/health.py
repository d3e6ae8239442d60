"""Warnings about a run that does not learn as it should: each once, with the figures and a remedy."""

from __future__ import annotations

import math
import warnings

from torch import Tensor

# Nats, mean |Δ log π| between sampling and replay: a ratio of 1.2 where GRPO assumes 1.
DRIFT_LIMIT = 0.2
COLLAPSE_LIMIT = 0.99  # mean cosine between a batch's embeddings: above it the encoder no longer distinguishes images


def embedding_spread(embeddings: Tensor) -> dict[str, float]:
    """Of a batch's unit vectors (B, D_e): mean standard deviation of a coordinate, mean cosine of a pair."""
    count = len(embeddings)
    together = embeddings.sum(0).square().sum().item()  # Σ over all ordered pairs, including each vector with itself
    return {
        "embedding_std": embeddings.std(0).mean().item(),
        "pairwise_cosine": (together - count) / (count * (count - 1)),
    }


class Health:
    """Checks the log of every step. pass_batches: micro-batches of one pass over the training images."""

    def __init__(self, pass_batches: int) -> None:
        self.pass_batches = pass_batches
        self.warned: set[str] = set()
        self.steps_without_contribution: list[dict[str, float]] = []  # logs of the steps since a pair contributed

    def check(self, step: int, log: dict[str, float]) -> None:
        """Warns of faults in a step's `log`, which is its line of metrics.jsonl."""
        if log.get("skipped_now"):
            broken = [f"{name} {value}" for name, value in log.items() if not math.isfinite(value)]
            self._warn_once("skipped", step, f"not applied: {', '.join(broken)}; {log['skipped_now']:.0f} in a row")
        if log.get("pairs_broken"):
            self._warn_once(
                "broken",
                step,
                f"{log['pairs_broken']:.0f} of {log['pairs_drawn']:.0f} pairs dropped, as a rollout met logits "
                "that are not finite; if that goes on, try --optim.precision fp32 or a lower --optim.encoder-lr",
            )
        if log.get("pairwise_cosine", 0) > COLLAPSE_LIMIT:
            self._warn_once(
                "collapsed",
                step,
                f"the encoder collapses: mean cosine between embeddings {log['pairwise_cosine']:.4f}, standard "
                f"deviation of a coordinate {log['embedding_std']:.2g}; lower the learning rates, or take another "
                "--dml.loss",
            )
        if log.get("log_prob_drift", 0) > DRIFT_LIMIT:
            self._warn_once(
                "drifted",
                step,
                f"log π of replayed tokens is {log['log_prob_drift']:.2f} nats from what it was when they were "
                "sampled, on average; GRPO assumes the same policy: try --optim.precision fp32, or "
                "--supervisor.no-quantize",
            )
        if log.get("voice", 1) < 1:
            self._warn_once(
                "voice",
                step,
                f"the supervisor's verdicts depend little on the truth (informedness {log['informedness']:.2f}; 0 is "
                f"chance): its weights λ_lm and λ_kl are multiplied by {log['voice']:.2f}, and by what it earns from "
                "now on; look at --supervisor.model and --supervisor.prompt",
            )
        if log.get("pairs_drawn"):
            self.steps_without_contribution = (
                [] if log["pairs_contributing"] else [*self.steps_without_contribution, log]
            )
            if sum(entry["micro_batches"] for entry in self.steps_without_contribution) >= self.pass_batches:
                self._warn_no_contribution(step)
                self.steps_without_contribution = []

    def _warn_no_contribution(self, step: int) -> None:
        pairs = sum(entry["pairs_drawn"] for entry in self.steps_without_contribution)

        def mean(name: str) -> float:  # a step may draw pairs of one kind only
            known = [entry[name] for entry in self.steps_without_contribution if name in entry]
            return sum(known) / max(1, len(known))

        same, different, well_formed = map(mean, ("reward_same", "reward_different", "well_formed"))
        if min(same, different) > 0.5:
            why = "it is right every time: raise --rollout.temperature, or leave it out"
        elif max(same, different) < 0.5:
            why = f"{well_formed:.0%} of its answers have the requested form: look at --supervisor.model and -.prompt"
        else:
            why = "it always gives the same verdict: raise --rollout.temperature, or take another --supervisor.model"
        self._warn_once(
            "no_contribution",
            step,
            f"none of the {pairs:.0f} pairs drawn in a pass over the training images contributed; mean reward "
            f"{same:.2f} on same-class pairs, {different:.2f} on others. The metric loss continues alone. "
            f"The supervisor: {why} (--lambda.lm 0 --lambda.kl 0)",
        )

    def _warn_once(self, kind: str, step: int, message: str) -> None:
        if kind not in self.warned:
            self.warned.add(kind)
            warnings.warn(f"step {step}: {message}", stacklevel=4)
