"""The lengths of prompt and answer in tokens, computed before anything is sampled."""

from __future__ import annotations

from typing import NamedTuple

from saga_fast.supervisor.supervisor import Supervisor

VALUE = "short red"  # a brief description: two words that every vocabulary has, the tiny supervisor's too


class Lengths(NamedTuple):
    """Tokens. prefix: the prompt with both images; `images` and `instruction` are parts of it, the rest is the
    template's. answer: one line of JSON whose values have two words, and its end token; minimum: the same with empty
    values. thinks: whether the chat template makes the model reason first, at any length."""

    prefix: int
    images: int
    instruction: int
    answer: int
    minimum: int
    thinks: bool = False

    def line(self, max_new_tokens: int) -> str:
        return (
            f"prompt: {self.prefix} tokens, of them {self.images} of images and {self.instruction} of instruction; "
            f"an answer of two words a value takes {self.answer} of rollout.max-new-tokens {max_new_tokens}"
        )

    def shortage(self, max_new_tokens: int) -> str | None:
        """The warning where answers do not fit, so that they are cut off before the verdict and earn no reward."""
        if self.answer <= max_new_tokens:
            return self.thinking_shortage(max_new_tokens) if self.thinks else None
        even = "even of empty values" if self.minimum > max_new_tokens else "of two words a value"
        needed = self.minimum if self.minimum > max_new_tokens else self.answer
        wants = "some thousands, as its chat template has it think first" if self.thinks else f"{self.answer} or more"
        return (
            f"rollout.max-new-tokens: {max_new_tokens}; an answer {even} takes {needed} tokens and would be cut off "
            f"before its verdict: give {wants}, or ask for fewer attributes"
        )

    def thinking_shortage(self, max_new_tokens: int) -> str:
        return (
            f"supervisor.model: its chat template has it think first, and of rollout.max-new-tokens {max_new_tokens} "
            f"its thoughts may take {max_new_tokens - self.answer} before the answer is cut off and earns nothing: "
            "take the release that answers at once (Instruct), or give some thousands"
        )


def measure(supervisor: Supervisor) -> Lengths:
    """The lengths of `supervisor`'s prompt, by its model's tokenizer."""
    prompt = supervisor.prompt

    def count(text: str) -> int:
        return len(supervisor.tokenizer.encode(text, add_special_tokens=False))

    def answer(value: str) -> int:
        values = dict.fromkeys(prompt.attributes, value)
        return count(prompt.answer(values, values, value, "medium", value, same=False)) + 1

    prefix = supervisor.prefix
    return Lengths(
        len(prefix), prefix.images.numel(), count(prompt.instruction()), answer(VALUE), answer(""), supervisor.thinks
    )
