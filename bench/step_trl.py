"""One optimizer step of TRL's GRPOTrainer on pairs of images: the rival of `bench.step`, run by TRL's own Python.

The strongest that a careful user would set up on a CPU: fp32, SDPA, language model frozen and vision tower trained, no
reference model, one generation a step for all rollouts, and then micro-batches of one group's rows.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer

from bench.record import SHAPES, EndingAt

PACKAGES = ("trl", "torch", "torchvision", "transformers", "accelerate")


class Watch(TrainerCallback):
    """Times the step alone, from the first look at its prompts to the updated weights, and may keep its gradients."""

    def __init__(self, keep: bool) -> None:
        self.keep, self.gradients, self.started, self.seconds = keep, {}, 0.0, 0.0

    def on_train_begin(self, args, state, control, **_) -> None:
        self.started = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, model, **_) -> None:
        if self.keep:
            visual = model.model.visual.named_parameters()
            self.gradients = {name: p.grad.clone() for name, p in visual if p.grad is not None}

    def on_step_end(self, args, state, control, **_) -> None:
        self.seconds = time.perf_counter() - self.started


def trainer(
    folder: str,
    shape_name: str,
    pairs: int,
    mean: int,
    question: str,
    checkpointing: bool = False,
    cache: str | None = None,
    keep: bool = False,
) -> tuple[GRPOTrainer, Watch, dict[str, float]]:
    """The trainer of one step, what watches it, and where the seconds of `generate` will be found.

    cache: how `generate` holds keys and values, transformers' own way unless given. keep: for the comparison the
    gradient is kept, unclipped.
    """
    shape = SHAPES[shape_name]
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.requires_grad_(False)
    model.model.visual.requires_grad_(True)
    lengths = shape.lengths(mean, pairs)
    times: dict[str, float] = {}
    _end_at(model, list(itertools.chain(*lengths)), times)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in shape.pixels(pairs)]
    data = {
        "prompt": [[{"role": "user", "content": question}]] * pairs,
        "images": [pictures[2 * i : 2 * i + 2] for i in range(pairs)],
    }
    total = pairs * shape.group
    config = GRPOConfig(
        output_dir=f"{folder}/trl", use_cpu=True, bf16=False, seed=0, report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True, max_steps=1, shuffle_dataset=False,
        per_device_train_batch_size=shape.group, gradient_accumulation_steps=pairs, generation_batch_size=total,
        gradient_checkpointing=checkpointing, cache_implementation=cache, num_generations=shape.group, num_iterations=1,
        max_completion_length=max(map(max, lengths)), temperature=0.7, top_p=0.95, top_k=0,
        beta=0.0, loss_type="dapo", scale_rewards="group",
        learning_rate=2e-5, weight_decay=0.01, max_grad_norm=0.0 if keep else 1.0,
    )  # fmt: skip
    watch = Watch(keep)
    processor = AutoProcessor.from_pretrained(folder, padding_side="left")
    built = GRPOTrainer(
        model, _every_other, config, Dataset.from_dict(data), processing_class=processor, callbacks=[watch]
    )
    return built, watch, times


def _every_other(completions: list, **_) -> list[float]:
    """Rewards that make every pair contribute: a group's rollouts are right and wrong in turn."""
    return [float(i % 2) for i in range(len(completions))]


def _end_at(model: Qwen3VLForConditionalGeneration, lengths: list[int], times: dict[str, float]) -> None:
    generate = model.generate

    def generate_to_the_length(**inputs: Any) -> Tensor:
        started = time.perf_counter()
        out = generate(**inputs, logits_processor=[EndingAt(lengths, model.generation_config.eos_token_id)])
        times["generate"] = time.perf_counter() - started
        return out

    model.generate = generate_to_the_length


def step(*arguments: Any) -> Callable[[], dict[str, Any]]:
    """The work of one step; its seconds are those from prompts to update, without the trainer's own start."""
    built, watch, times = trainer(*arguments, keep=False)

    def work() -> dict[str, Any]:
        built.train()
        spent = {"rollout": times["generate"], "replay": watch.seconds - times["generate"]}
        return {"seconds": watch.seconds, **spent, "versions": {name: version(name) for name in PACKAGES}}

    return work


def dump(file: str, *arguments: Any) -> Callable[[], None]:
    """Writes what one step saw and found to `file`: prompts, completions, advantages, log π, gradient in the tower."""
    built, watch, _ = trainer(*arguments, keep=True)
    seen: list[dict[str, Tensor]] = []
    log_probs: list[Tensor] = []
    compute_loss, score = built._compute_loss, built._get_per_token_logps_and_entropies

    def watched_loss(model, inputs):
        seen.append({name: inputs[name] for name in ("prompt_ids", "completion_ids", "completion_mask", "advantages")})
        return compute_loss(model, inputs)

    def watched_score(*arguments, **named):
        found = score(*arguments, **named)
        log_probs.append(found[0].detach())
        return found

    built._compute_loss, built._get_per_token_logps_and_entropies = watched_loss, watched_score
    grpo_trainer.shuffle_sequence_dict = lambda rollouts: rollouts  # rows stay pair by pair, to be told apart

    def work() -> None:
        built.train()
        rollouts = {name: torch.cat([batch[name] for batch in seen]) for name in seen[0]}
        torch.save({**rollouts, "log_probs": torch.cat(log_probs), "gradients": watch.gradients}, file)

    return work
