"""Class-balanced batches: C classes, K images of each, for losses that need positives in the batch."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence

from saga_fast.utils.errors import InputError


class ClassBalancedSampler:
    """Endless iterator of index lists, `images_per_class` consecutive indices a class.

    Classes, and the images of each class, are dealt from shuffled decks: none is repeated before all have been dealt,
    nor within a batch, except that a class with too few images repeats them. The state is the number of batches dealt;
    restoring deals them again, thousands a second. A reader that reads ahead saves the number of batches that it used.

    contents: what the labels are of, such as `checksum`; a state that was saved with others is refused.
    Raises InputError if there are fewer classes than `classes_per_batch` or a class has a single image.
    """

    def __init__(
        self,
        labels: Sequence[int],
        classes_per_batch: int = 16,
        images_per_class: int = 4,
        seed: int = 0,
        contents: str = "",
    ):
        images: dict[int, list[int]] = {}
        for index, label in enumerate(labels):
            images.setdefault(label, []).append(index)
        if len(images) < classes_per_batch:
            mend = f"pass --data.classes-per-batch {len(images)}" if len(images) > 1 else "add classes"
            raise InputError(
                f"data.classes-per-batch: {classes_per_batch}, where {len(images)} classes are left to train on; {mend}"
            )
        if lone := [label for label, members in images.items() if len(members) < 2]:
            raise InputError(f"training set: class number {lone[0]} has 1 image; add another, for a pair, or remove it")
        self.classes_per_batch, self.images_per_class = classes_per_batch, images_per_class
        self.batches_per_epoch = max(1, len(labels) // (classes_per_batch * images_per_class))
        self._images, self._seed = images, seed
        key = repr((list(labels), classes_per_batch, images_per_class, seed))
        self._fingerprint, self._earlier = (
            hashlib.sha256(text.encode()).hexdigest()[:16] for text in (key + contents, key)
        )
        self._restart()

    def _restart(self) -> None:
        rng = random.Random(self._seed)
        self._classes = _Deck(sorted(self._images), rng)
        self._members = {label: _Deck(members, rng) for label, members in self._images.items()}
        self.dealt = 0

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        self.dealt += 1
        hand = self._classes.deal(self.classes_per_batch)
        return [index for label in hand for index in self._members[label].deal(self.images_per_class)]

    def state_dict(self, dealt: int | None = None) -> dict[str, int | str]:
        """JSON-able position, after `dealt` batches (default: all dealt so far)."""
        return {"dealt": self.dealt if dealt is None else dealt, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Go to a saved position. Raises InputError if it was saved over other labels, batch shape or seed."""
        if state["fingerprint"] not in (self._fingerprint, self._earlier):  # of before contents were looked at
            raise InputError(
                "--data.root: the run was saved with another training set, or other test images, batches or seed; "
                "resume with the same ones"
            )
        self._restart()
        while self.dealt < int(state["dealt"]):
            next(self)


class _Deck:
    """Deals `cards` in shuffled order, and reshuffles when they run out; cards in the current hand then go last."""

    def __init__(self, cards: list[int], rng: random.Random):
        self.cards, self.rng = cards, rng
        self.left: list[int] = []

    def deal(self, n: int) -> list[int]:
        hand: list[int] = []
        while len(hand) < n:
            if not self.left:
                in_hand = set(hand)
                self.left = self.rng.sample(self.cards, len(self.cards))
                self.left.sort(key=in_hand.__contains__)
            missing = n - len(hand)
            hand += self.left[:missing]
            self.left = self.left[missing:]
        return hand
