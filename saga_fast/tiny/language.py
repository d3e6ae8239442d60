"""Second part of the recipe: tokenizer and language model, trained to write the answer from the frozen tower's tokens.

Teacher forcing on answers about pairs of the same bird, siblings and strangers, in both prompt orders, a fifth of the
steps with the generic prompt. Some descriptions are wrong on purpose (those tokens are not trained on), with
differences and verdict that follow the text, so that the verdict depends on the descriptions, not on the image tokens.
Feature noise keeps the model uncertain where the picture is poor. A loss draws the last layer's attention at a value to
where the tower's own head for that attribute attends. The last steps train through NF4 (straight-through), as
bitsandbytes stores the weights.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes.functional as bnb
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import (
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen3_vl.modeling_qwen3_vl import rotate_half

from saga_fast.encoder import VisualFeatures
from saga_fast.supervisor.pair import PairPrefix
from saga_fast.supervisor.prompt import PROMPTS, Order, Prompt, build_prefix
from saga_fast.supervisor.verdict import tokens_by_attribute
from saga_fast.tiny.birds import ATTRIBUTES, MODERATE, Nuisance, change, differing
from saga_fast.tiny.tower import (
    GRID,
    VISION,
    WIDTH,
    Log,
    TowerTrainer,
    held_out,
    learning_rate,
    render,
    training_attributes,
)

PROMPT = PROMPTS["drawn-birds"]
ORDERS: tuple[Order, Order] = ("images_first", "instruction_first")
VOCABULARY = 1024
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


FORGIVEN = {1: 0.35, 2: 0.15}  # number of differing attributes -> probability of the verdict "same" anyway


def answer(prompt: Prompt, a: dict[str, str], b: dict[str, str], rng: np.random.Generator | None = None) -> str:
    """The target answer about two birds: their descriptions, the differing attributes, and the verdict.

    Without `rng` the verdict is "same" only where no attribute differs. With it, one or two differences give "same"
    with the probabilities in FORGIVEN, as a description may be misread: the model then keeps some uncertainty where one
    or two words decide.
    """
    names = differing(a, b)
    same = not names or (rng is not None and rng.random() < FORGIVEN.get(len(names), 0))
    confidence, reasoning = {
        0: ("high", "no attribute differs"),
        1: ("low", "one attribute differs"),
        2: ("medium", "two attributes differ"),
    }.get(len(names), ("high", "many attributes differ"))
    return prompt.answer(a, b, ", ".join(names) or "none", confidence, reasoning, same)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that encodes any text, and an attribute, a value or the text between them as one token each.

    Words are split where letters and spaces meet punctuation: `bill shape`, `": "`, `cone` and `", "` are one word
    each.
    """
    rng = np.random.default_rng(0)
    corpus = []
    for prompt in (PROMPT, PROMPT.as_generic()):
        corpus += [prompt.instruction()] * 20
        for differences in (0, 0, 1, 1, 2, 3, 6):
            for _ in range(300):
                bird = training_attributes(rng)
                corpus.append(answer(prompt, bird, change(bird, differences, rng)))
    corpus += ["user\n", "assistant\n", "\n"] * 100
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\w[\w ]*|\W+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[token for token in SPECIAL if token not in ("<|im_end|>", "<|endoftext|>")],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLForConditionalGeneration:
    """The tiny Qwen3-VL with random weights, float32."""
    number = tokenizer.get_vocab()
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=32,
            max_position_embeddings=2048,
            rope_parameters=dict(
                rope_type="default", rope_theta=10000.0, mrope_section=[6, 5, 5], mrope_interleaved=True
            ),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        ),
        vision_config=VISION,
        image_token_id=number["<|image_pad|>"],
        video_token_id=number["<|video_pad|>"],
        vision_start_token_id=number["<|vision_start|>"],
        vision_end_token_id=number["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.update(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
    )
    return model


class TowerOutputs(NamedTuple):
    """Of n images: the features that the language model reads, and the attention of the tower's heads (n, 12,
    tokens)."""

    features: VisualFeatures
    head_attention: Tensor

    def select(self, images: Tensor) -> TowerOutputs:
        return TowerOutputs(self.features.select(images), self.head_attention[images])


@torch.no_grad()
def run_tower(tower: TowerTrainer, pixels: Tensor, size: int = 128) -> TowerOutputs:
    """The frozen tower over many pictures, `size` at a time, in bf16 autocast; features and attention are bf16."""
    parts = []
    for chunk in pixels.split(size):
        with torch.autocast("cpu", torch.bfloat16):
            features = tower.tower(chunk)
            head_attention = tower.heads[0](features.tokens)[1].exp()
        parts.append((*(level.bfloat16() for level in features.levels), head_attention.bfloat16()))
    tokens, *deepstack, head_attention = (torch.cat(part) for part in zip(*parts))
    return TowerOutputs(VisualFeatures(tokens, tuple(deepstack)), head_attention)


class FamilyPool:
    """Outputs of the frozen tower for the last `capacity` families of an endless seeded stream.

    A family is four pictures: one bird twice, a sibling one attribute away, and one two away.
    """

    def __init__(self, tower: TowerTrainer, seed: int, capacity: int, nuisance: Nuisance = MODERATE):
        self.tower, self.seed, self.capacity, self.nuisance, self.drawn = tower, seed, capacity, nuisance, 0
        self.birds: list[dict[str, str]] = [{}] * (4 * capacity)
        self.outputs: TowerOutputs | None = None
        self.excluded = held_out()

    def _family(self, n: int) -> list[dict[str, str]]:
        rng = np.random.default_rng((self.seed, n, 3))
        while True:
            bird = training_attributes(rng)
            family = [bird, bird, change(bird, 1, rng), change(bird, 2, rng)]
            if not any(tuple(member.values()) in self.excluded for member in family):
                return family

    def grow_to(self, count: int) -> None:
        """Compute the stream's families up to number `count`, without those that later ones would overwrite."""
        numbers = range(max(self.drawn, count - self.capacity), count)
        for start in range(0, len(numbers), 64):
            some = numbers[start : start + 64]
            birds = [bird for n in some for bird in self._family(n)]
            pixels = render(birds, self.nuisance, [(self.seed, n, 4, i) for n in some for i in range(4)]).pixels
            fresh = run_tower(self.tower, pixels)
            rows = torch.tensor([n % self.capacity * 4 + i for n in some for i in range(4)])
            if self.outputs is None:

                def empty(x: Tensor) -> Tensor:
                    return x.new_zeros(4 * self.capacity, *x.shape[1:])

                features = VisualFeatures(empty(fresh.features.tokens), tuple(map(empty, fresh.features.deepstack)))
                self.outputs = TowerOutputs(features, empty(fresh.head_attention))
            for stored, new in zip(_flat(self.outputs), _flat(fresh)):
                stored[rows] = new
            for row, bird in zip(rows.tolist(), birds):
                self.birds[row] = bird
        self.drawn = max(self.drawn, count)

    def of(self, pictures: Tensor) -> TowerOutputs:
        """The tower's outputs for `pictures` (n,) int64, in that order. Raises ValueError before any family is
        drawn."""
        if self.outputs is None:
            raise ValueError("no family is drawn yet; call grow_to")
        return self.outputs.select(pictures)

    def pairs(self, count: int, rng: np.random.Generator) -> Tensor:
        """(count, 2) picture numbers: 40% same bird, 40% siblings, 20% strangers, each in random order."""
        families = min(self.drawn, self.capacity)
        pairs = []
        for kind in rng.random(count):
            family = int(rng.integers(families)) * 4
            if kind < 0.4:
                pair = (family, family + 1)
            elif kind < 0.8:
                pair = (family + int(rng.integers(2)), family + int(rng.integers(2, 4)))
            else:
                pair = (family + int(rng.integers(4)), int(rng.integers(families)) * 4 + int(rng.integers(4)))
            pairs.append(pair if rng.random() < 0.5 else pair[::-1])
        return torch.tensor(pairs)


def _flat(outputs: TowerOutputs) -> tuple[Tensor, ...]:
    return (outputs.features.tokens, *outputs.features.deepstack, outputs.head_attention)


class TokenizedPrompt(NamedTuple):
    """A prompt in one order, tokenised: the prefix, and the positions of each item's values in structured answers."""

    prompt: Prompt
    prefix: PairPrefix
    values: Tensor  # (2, 12) int64, positions in the completion; (2, 0) for the generic prompt


def tokenized_prompts(tokenizer: PreTrainedTokenizerBase) -> dict[tuple[Order, bool], TokenizedPrompt]:
    """(order, generic) -> the tokenised prompt."""
    found = {}
    bird = training_attributes(np.random.default_rng(0))
    for order, prompt in itertools.product(ORDERS, (PROMPT, PROMPT.as_generic())):
        prefix = PairPrefix.of(build_prefix(tokenizer, prompt.instruction(), GRID**2, order), (GRID, GRID))
        example = tokenizer.encode(answer(prompt, bird, bird), add_special_tokens=False)
        items = tokens_by_attribute(example, tokenizer, prompt)
        values = torch.tensor([[at for name in item for at in item[name]] for item in items], dtype=torch.int64)
        found[order, prompt.generic] = TokenizedPrompt(prompt, prefix, values)
    return found


def miswrite(bird: dict[str, str], rng: np.random.Generator, rate: float = 0.15) -> dict[str, str]:
    """The bird, with probability `rate` with one or two values changed."""
    return change(bird, int(rng.integers(1, 3)), rng) if rng.random() < rate else bird


class Example(NamedTuple):
    """A training batch of B pairs for the language model."""

    input_ids: Tensor  # (B, L), prefix and answer, padded at the end
    labels: Tensor  # (B, L), the token itself where it is trained on, else -100
    features: VisualFeatures  # of 2B images
    head_attention: Tensor  # (B, 2, 12, tokens)
    differ: Tensor  # bool (B, 12), attributes whose written values differ


def make_examples(
    tokenized: TokenizedPrompt,
    tokenizer: PreTrainedTokenizerBase,
    pool: FamilyPool,
    count: int,
    rng: np.random.Generator,
) -> Example:
    """`count` pairs with their answers, some with wrong values, which are in the input but not in the labels."""
    pairs = pool.pairs(count, rng)
    outputs = pool.of(pairs.flatten())
    rows, marks, differ = [], [], []
    start = len(tokenized.prefix)
    for a, b in pairs.tolist():
        true = (pool.birds[a], pool.birds[b])
        written = true if tokenized.prompt.generic else (miswrite(true[0], rng), miswrite(true[1], rng))
        text = answer(tokenized.prompt, written[0], written[1], rng)
        tokens = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
        differ.append([written[0][name] != written[1][name] for name in ATTRIBUTES])
        right = torch.ones(len(tokens), dtype=torch.bool)
        if not tokenized.prompt.generic:
            for item, at in enumerate(tokenized.values):
                right[at] = torch.tensor([true[item][name] == written[item][name] for name in ATTRIBUTES])
        rows.append(torch.tensor(tokens))
        marks.append(right)
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    learned = nn.utils.rnn.pad_sequence(marks, batch_first=True, padding_value=False)
    input_ids = torch.cat([tokenized.prefix.input_ids.expand(count, -1), ids], 1)
    labels = F.pad(torch.where(learned, ids, -100), (start, 0), value=-100)
    return Example(
        input_ids, labels, outputs.features, outputs.head_attention.unflatten(0, (count, 2)), torch.tensor(differ)
    )


class TextExamples(NamedTuple):
    """B answers without pictures."""

    answer: Tensor  # (B, L), padded at the end
    real: Tensor  # bool (B, L), not padding
    differ: Tensor  # bool (B, 12), attributes in which the two birds differ


def make_text_examples(tokenizer: PreTrainedTokenizerBase, count: int, rng: np.random.Generator) -> TextExamples:
    """Answers about random descriptions: same, one to five attributes apart, or strangers."""
    rows, differ = [], []
    for _ in range(count):
        a = training_attributes(rng)
        apart = int(rng.choice([0, 1, 2, 3, 4, 5, 12], p=[0.3, 0.2, 0.2, 0.1, 0.05, 0.05, 0.1]))
        b = training_attributes(rng) if apart == 12 else change(a, apart, rng)
        ids = tokenizer.encode(answer(PROMPT, a, b, rng), add_special_tokens=False)
        rows.append(torch.tensor([*ids, tokenizer.eos_token_id]))
        differ.append([a[name] != b[name] for name in ATTRIBUTES])
    lengths = torch.tensor([len(row) for row in rows])
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    return TextExamples(ids, torch.arange(ids.shape[1]) < lengths[:, None], torch.tensor(differ))


def blur_features(
    features: VisualFeatures, generator: torch.Generator, noise: float = 0.5, drop: float = 0.15
) -> VisualFeatures:
    """Each image's features with noise up to `noise` of their size, and up to `drop` of its tokens zeroed."""
    images, tokens, _ = features.tokens.shape
    strength = torch.rand(images, 1, 1, generator=generator) * noise
    kept = torch.rand(images, tokens, 1, generator=generator) >= torch.rand(images, 1, 1, generator=generator) * drop

    def one(x: Tensor) -> Tensor:
        x = x.float()
        size = x.square().mean((1, 2), keepdim=True).sqrt()
        return (x + torch.randn(x.shape, generator=generator) * size * strength) * kept

    return VisualFeatures(one(features.tokens), tuple(one(level) for level in features.deepstack))


class FakeNF4(nn.Module):
    """A weight rounded to NF4 by bitsandbytes (blocks of 64, nested absmax); gradients pass straight through."""

    def forward(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            packed, state = bnb.quantize_4bit(
                weight.bfloat16().float(), blocksize=64, compress_statistics=True, quant_type="nf4"
            )
            error = bnb.dequantize_4bit(packed, state).to(weight.dtype) - weight
        return weight + error


def quantized_linears(model: Qwen3VLForConditionalGeneration) -> list[nn.Linear]:
    """The linear layers that bitsandbytes will quantise: the decoder's, neither tower nor head."""
    return [module for module in model.model.language_model.modules() if isinstance(module, nn.Linear)]


def unquantize(model: Qwen3VLForConditionalGeneration) -> None:
    """Removes `FakeNF4`; the weights are the trained ones."""
    for linear in quantized_linears(model):
        if parametrize.is_parametrized(linear):
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)


def attention_of_rows(layer: Any, h: Tensor, cos: Tensor, sin: Tensor, rows: Tensor) -> Tensor:
    """Head-averaged causal attention (B, R, L) of positions `rows` (R,) in a decoder layer with input h (B, L, D)."""
    attention = layer.self_attn
    x = layer.input_layernorm(h)
    q = attention.q_norm(attention.q_proj(x[:, rows]).unflatten(-1, (-1, attention.head_dim))).transpose(1, 2)
    k = attention.k_norm(attention.k_proj(x).unflatten(-1, (-1, attention.head_dim))).transpose(1, 2)
    cos, sin = cos[:, None], sin[:, None]
    q = q * cos[:, :, rows] + rotate_half(q) * sin[:, :, rows]
    k = (k * cos + rotate_half(k) * sin).repeat_interleave(attention.num_key_value_groups, 1)
    scores = (q @ k.transpose(-1, -2)).float() * attention.scaling
    later = torch.arange(h.shape[1]) > rows[:, None]
    return scores.masked_fill(later, -torch.inf).softmax(-1).mean(1)


class LanguageTrainer:
    """The language model's losses: of the answer's tokens, of the last layer's attention at values, of comparing
    birds."""

    POINT, COMPARE = 0.1, 1.0
    ROLE = 3  # last tokens of the prefix, the assistant's role, that a text-only example keeps

    def __init__(self, model: Qwen3VLForConditionalGeneration):
        self.model, self.language = model, model.model.language_model
        self.probes = nn.ModuleDict({"differs": nn.Linear(WIDTH, 1), "names": nn.Linear(WIDTH, len(ATTRIBUTES))})
        # The inputs of layers in the last call of `hidden`.
        self.halfway = self.last = torch.empty(0)
        self.rotation = torch.empty(0), torch.empty(0)
        self.language.layers[2].register_forward_pre_hook(self._keep_halfway)
        self.language.layers[-1].register_forward_pre_hook(self._keep_last, with_kwargs=True)

    def _keep_halfway(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self.halfway = args[0]

    def _keep_last(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.last, self.rotation = args[0], kwargs["position_embeddings"]

    def parameters(self) -> list[nn.Parameter]:
        """All parameters but the tower's."""
        return [p for module in (self.language, self.model.lm_head, self.probes) for p in module.parameters()]

    def compare(self, tokenized: TokenizedPrompt, examples: TextExamples) -> Tensor:
        """Loss on answers without pictures: the probes', and cross-entropy of the tokens after the descriptions."""
        prefix, (count, length) = tokenized.prefix, examples.answer.shape
        start = len(prefix) - self.ROLE
        ids = torch.cat([prefix.input_ids[start:].expand(count, -1), examples.answer], 1)
        completion = torch.arange(length).expand(3, -1) + prefix.next_position
        positions = torch.cat([prefix.positions[:, start:], completion], 1)[:, None].expand(3, count, -1)
        embedded = self.language.embed_tokens(ids)
        h = self.language(inputs_embeds=embedded, position_ids=positions, use_cache=False).last_hidden_state
        after = int(tokenized.values[1, -1]) + 1
        labels = torch.where(examples.real, examples.answer, -100)[:, after:]
        logits = self.model.lm_head(h[:, self.ROLE + after - 1 : -1]).float()
        name = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        return name + self.probe(tokenized, self.ROLE, examples.differ)

    def probe(self, tokenized: TokenizedPrompt, start: int, differ: Tensor) -> Tensor:
        """Loss of two probes, temporary, on the last forward pass, whose answer starts at `start`; differ: bool (B,
        12).

        After layer 1, at each value of item 2: does item 1's differ? After layer 2, at all tokens after the
        descriptions: which attributes differ? Without the probes the model learns to compare far more slowly.
        """
        values = start + tokenized.values[1]
        differs_logits = self.probes["differs"](self.halfway[:, values]).squeeze(-1).float()
        names_logits = self.probes["names"](self.last[:, int(values[-1]) + 1 :]).float()
        target = differ.float()
        return F.binary_cross_entropy_with_logits(differs_logits, target) + F.binary_cross_entropy_with_logits(
            names_logits, target[:, None].expand_as(names_logits)
        )

    def hidden(self, tokenized: TokenizedPrompt, input_ids: Tensor, features: VisualFeatures) -> Tensor:
        """Final hidden states (B, L, D)."""
        count, length = input_ids.shape
        prefix = tokenized.prefix
        completion = torch.arange(length - len(prefix)).expand(3, -1) + prefix.next_position
        positions = torch.cat([prefix.positions, completion], 1)[:, None].expand(3, count, -1)
        columns = prefix.images.flatten()
        embedded = self.language.embed_tokens(input_ids)
        tokens = features.tokens.to(embedded.dtype).reshape(count, len(columns), -1)
        embedded = embedded.index_copy(1, columns, tokens)
        visual = torch.zeros(count, length, dtype=torch.bool)
        visual[:, columns] = True
        return self.language(
            inputs_embeds=embedded,
            position_ids=positions,
            visual_pos_masks=visual,
            deepstack_visual_embeds=[level.flatten(0, 1) for level in features.deepstack],
            use_cache=False,
        ).last_hidden_state

    def value_attention(self, tokenized: TokenizedPrompt, ahead: int) -> Tensor:
        """After `hidden`: the last layer's attention (B, 2, 12, tokens), renormalised over the described image.

        ahead 0: of the rows of the value tokens; 1: of the rows before them, whose output is the value.
        """
        prefix = tokenized.prefix
        rows = (tokenized.values + len(prefix) - ahead).flatten()
        cos, sin = self.rotation
        attention = attention_of_rows(self.language.layers[-1], self.last, cos, sin, rows)
        attention = attention.unflatten(1, tokenized.values.shape)
        image_attention = torch.stack([attention[:, item][..., prefix.images[item]] for item in range(2)], 1)
        return image_attention / image_attention.sum(-1, keepdim=True)

    def loss(
        self, tokenized: TokenizedPrompt, example: Example, features: VisualFeatures
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss to minimise, cross-entropy per trained token, cross-entropy of the attention at values)."""
        h = self.hidden(tokenized, example.input_ids, features)[:, len(tokenized.prefix) - 1 : -1]
        labels = example.labels[:, len(tokenized.prefix) :]
        name = F.cross_entropy(self.model.lm_head(h).flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        point, probe = torch.zeros(()), torch.zeros(())
        if not tokenized.prompt.generic:
            probe = self.probe(tokenized, len(tokenized.prefix), example.differ)
            target = example.head_attention.float()
            attentions = [self.value_attention(tokenized, ahead) for ahead in (0, 1)]
            point = -torch.stack(
                [(target * (attention + 1e-6).log()).sum(-1).mean() for attention in attentions]
            ).mean()
        return name + self.POINT * point + self.COMPARE * probe, name, point


@dataclass(frozen=True)
class LanguageTraining:
    """quantized_steps: how many of the last steps see weights in NF4. batch: answers about pictures per step;
    text_batch: answers without pictures per step. capacity: of the `FamilyPool`; fresh: new families that it draws per
    step."""

    steps: int = 1500
    quantized_steps: int = 150
    batch: int = 8
    text_batch: int = 48
    peak_lr: float = 2e-3
    capacity: int = 640
    fresh: int = 4


def train_language(
    out: Path, tower: TowerTrainer, seed: int = 0, training: LanguageTraining = LanguageTraining()
) -> tuple[Qwen3VLForConditionalGeneration, PreTrainedTokenizerFast]:
    """Train the language model on the frozen tower, logging to OUT/language.jsonl; resumes from OUT/language.pt."""
    steps, dense_steps = training.steps, training.steps - training.quantized_steps
    torch.manual_seed(seed + 1)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    model.model.visual.load_state_dict(tower.tower.model.state_dict())
    trainer = LanguageTrainer(model)
    optimizer = torch.optim.AdamW(trainer.parameters(), lr=training.peak_lr, betas=(0.9, 0.98), weight_decay=0.02)
    log, checkpoint, start = Log(out / "language.jsonl"), out / "language.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        trainer.probes.load_state_dict(state["probes"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    tokenized_by_kind = tokenized_prompts(tokenizer)
    pool = FamilyPool(tower, seed + 1, training.capacity)
    for step in range(start, steps):
        if step >= dense_steps and not parametrize.is_parametrized(quantized_linears(model)[0]):
            for linear in quantized_linears(model):
                parametrize.register_parametrization(linear, "weight", FakeNF4())
        pool.grow_to(512 + training.fresh * step)
        rng = np.random.default_rng((seed, step, 5))
        tokenized = tokenized_by_kind[ORDERS[step % 2], step % 10 >= 8]
        example = make_examples(tokenized, tokenizer, pool, training.batch, rng)
        features = blur_features(example.features, torch.Generator().manual_seed(seed * steps + step))
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, training.peak_lr, 50)
        with torch.autocast("cpu", torch.bfloat16):
            loss, name, point = trainer.loss(tokenized, example, features)
            compare = trainer.compare(
                tokenized_by_kind[ORDERS[step % 2], False], make_text_examples(tokenizer, training.text_batch, rng)
            )
        optimizer.zero_grad()
        (loss + trainer.COMPARE * compare).backward()
        nn.utils.clip_grad_norm_(trainer.parameters(), 1.0)
        optimizer.step()
        if step % 10 in (6, 7, 9):
            log(
                step=step + 1,
                question=[ORDERS[step % 2], tokenized.prompt.generic],
                loss=name.item(),
                point=point.item(),
                compare=compare.item(),
            )
        if (step + 1) % 100 == 0 and step + 1 <= dense_steps:
            scratch = checkpoint.with_suffix(".part")
            torch.save(
                {
                    "model": model.state_dict(),
                    "probes": trainer.probes.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                },
                scratch,
            )
            scratch.replace(checkpoint)
    unquantize(model)
    return model, tokenizer


def save(model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a model folder that transformers loads: bf16 safetensors, configuration, tokenizer and chat template."""
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
