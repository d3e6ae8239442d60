"""Replay of one group compared with its alternatives, on the same weights, completions, loss and gradients.

    python -m bench.replay [--shape record|small] [--repeats 3] [--json FILE] [--plot FILE.svg] [--log FILE]

Rivals: transformers rollout by rollout, (i) eager with `output_attentions`; (ii) SDPA, the anchor layer's rows alone
computed from a hook, logits of completion rows only, with and without gradient checkpointing (then of the logits, too);
and, if the package prefix-grouper is installed, (iii) its shared prefix in transformers, in the same two ways. Every
measurement is a process of its own. The results (loss, gradient at all visual inputs, anchor attention) must agree
before any time is reported. `ratios`: of the time of the fastest rival, and of the fastest that is plain transformers,
to ours, which is to take no more memory than the leanest rival does.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench import record, write_json, write_plot
from bench.bars import bars
from saga_fast.encoder import VisualFeatures

TEMPERATURE, CHUNK = 0.7, 256
# Ours, as (token budget, recompute, of the prefix): a budget of 1 sends completions through one at a time.
OURS = {
    "ours, whole": (1 << 16, "none", "none"),
    "ours, slices of 1,000": (1000, "none", "none"),
    "ours, slices of one": (1, "none", "none"),
    "ours, lean slices of one": (1, "mlp", "full"),
}
RIVALS = {
    "transformers, eager, all attentions": ("eager", False),
    "transformers, SDPA, hook": ("sdpa", False),
    "transformers, SDPA, hook, checkpointing": ("sdpa", True),
    "PrefixGrouper, SDPA, hook": ("prefix_grouper_attention", False),
    "PrefixGrouper, SDPA, hook, checkpointing": ("prefix_grouper_attention", True),
}
CASES = [(order, length) for order in ("images_first", "instruction_first") for length in ("short", "long")]
Found = dict[str, Any]


class Work:
    """One group's completions, advantages and rewarded rollouts, the same for every implementation."""

    def __init__(self, shape: record.Shape, length: str) -> None:
        generator = torch.Generator().manual_seed(0)
        (lengths,) = shape.lengths(getattr(shape, length), pairs=1)
        self.completions = [
            torch.randint(300, shape.vocabulary - 16, (n,), generator=generator).tolist() for n in lengths
        ]
        advantages = [1.0 if g % 2 else -1.0 for g in range(shape.group)]
        self.coefficients = [torch.full((n,), -a / sum(lengths)) for n, a in zip(lengths, advantages)]
        half = min(lengths) // 2
        spans = list(range(2, half, 3)), list(range(half, min(lengths) - 1, 3))
        self.attribute_token_positions = {g: spans for g in range(1, shape.group, 2)}

        def draw() -> Tensor:
            size = (2, shape.grid[0] * shape.grid[1], shape.width)
            return torch.randn(size, generator=generator).mul_(0.5).requires_grad_()

        self.features = VisualFeatures(draw(), tuple(draw() for _ in range(3)))


def ours(shape: str, folder: str, order: str, length: str, name: str, out: str) -> Callable[[], None]:
    from saga_fast.supervisor.replay import Group, Plan

    _, supervisor = record.supervisor(record.SHAPES[shape], Path(folder), 8, order)
    supervisor.plan = Plan(*OURS[name])
    work = Work(record.SHAPES[shape], length)
    group = Group(work.completions, work.coefficients, work.attribute_token_positions)

    def run() -> None:
        found = supervisor.replay(work.features, [group])
        _tell(out, work, found.loss, [entry.weights for entry in found.attention])

    return run


def rival(shape: str, folder: str, order: str, length: str, name: str, out: str) -> Callable[[], None]:
    from transformers import AttentionInterface, AutoTokenizer, Qwen3VLForConditionalGeneration

    from saga_fast.supervisor.pair import PairPrefix
    from saga_fast.supervisor.prompt import build_prefix

    sizes, (kind, checkpointing) = record.SHAPES[shape], RIVALS[name]
    grouped = kind == "prefix_grouper_attention"
    if grouped:
        from prefix_grouper.utils.register_transformers import register_attention

        register_attention()
        AttentionInterface.register("padded_sdpa", padded_sdpa)
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.set_attn_implementation({"text_config": kind})
    model.requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # there is no dropout; in eval mode nothing is checkpointed
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = record.question(sizes, tokenizer).instruction()
    prefix = PairPrefix.of(build_prefix(tokenizer, asked, sizes.grid[0] * sizes.grid[1], order), sizes.grid)
    work, decoder = Work(sizes, length), model.model.language_model
    anchor = round(26 / 36 * sizes.layers)
    hooked = Hooked(decoder.layers[anchor].self_attn)

    def log_probs(hidden: Tensor, targets: Tensor) -> Tensor:
        def chosen(h: Tensor, target: Tensor) -> Tensor:
            logits = model.lm_head(h) / TEMPERATURE
            return logits.log_softmax(-1).gather(1, target[:, None])[:, 0]

        parts = zip(hidden.split(CHUNK), targets.split(CHUNK))
        if checkpointing:
            return torch.cat([checkpoint(chosen, *part, use_reentrant=False) for part in parts])
        return torch.cat([chosen(*part) for part in parts])

    def read(ids: list[Tensor], positions: list[Tensor], **settings: Any) -> Any:
        """The decoder over one sequence, `ids` one after another."""
        visual = torch.zeros(sum(map(len, ids)), dtype=torch.bool)
        visual[prefix.images.flatten()] = True
        tokens, *levels = (x.flatten(0, 1) for x in (work.features.tokens, *work.features.deepstack))
        embedded = model.model.get_input_embeddings()(torch.cat(ids)).index_copy(0, prefix.images.flatten(), tokens)
        return decoder(
            inputs_embeds=embedded[None], position_ids=torch.cat(positions, 1)[:, None], use_cache=False,
            visual_pos_masks=visual[None], deepstack_visual_embeds=levels, **settings,
        )  # fmt: skip

    def rollout_by_rollout() -> None:
        loss, attention = 0.0, []
        for g, (completion, coefficients) in enumerate(zip(work.completions, work.coefficients)):
            ids, spans = torch.tensor(completion), work.attribute_token_positions.get(g, ())
            settings = {"output_attentions": True} if kind == "eager" else {}
            with hooked.recording(bool(spans) and kind != "eager"):
                found = read([prefix.input_ids, ids], [prefix.positions, _positions(prefix, len(ids))], **settings)
            for image, positions in enumerate(spans):
                rows = len(prefix) + torch.tensor(positions)
                eager = kind == "eager"
                mean = found.attentions[anchor][0].detach().mean(0)[rows] if eager else hooked.attention(rows)
                attention.append(mean[:, prefix.images[image]])
            part = log_probs(found.last_hidden_state[0, len(prefix) - 1 : -1], ids) @ coefficients
            part.backward()
            loss += part.item()
        _tell(out, work, loss, attention)

    def grouped_rollouts() -> None:
        from prefix_grouper import PrefixGrouper

        lengths = [len(c) for c in work.completions]
        grouper = PrefixGrouper([[len(prefix), *lengths]], device="cpu")
        ids = [prefix.input_ids, *map(torch.tensor, work.completions)]
        positions = [prefix.positions, *(_positions(prefix, n) for n in lengths)]
        with hooked.recording(True):
            found = read(ids, positions, prefix_grouper=grouper, prefix_grouper_attn_func="padded_sdpa")
        hidden, last, attention = found.last_hidden_state[0], len(prefix) - 1, []
        starts = [len(prefix) + sum(lengths[:g]) for g in range(len(lengths))]
        for g, spans in work.attribute_token_positions.items():
            own = torch.cat([torch.arange(len(prefix)), torch.arange(starts[g], starts[g] + lengths[g])])
            for image, positions in enumerate(spans):
                mean = hooked.attention(starts[g] + torch.tensor(positions), own)
                attention.append(mean[:, prefix.images[image]])
        rows = [row for start, n in zip(starts, lengths) for row in (last, *range(start, start + n - 1))]
        loss = log_probs(hidden[rows], torch.cat(ids[1:])) @ torch.cat(work.coefficients)
        loss.backward()
        _tell(out, work, loss.item(), attention)

    return grouped_rollouts if grouped else rollout_by_rollout


def padded_sdpa(module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *_, scaling: float, **__) -> tuple[Tensor, None]:
    """SDPA from PrefixGrouper's mask (rows, keys), true where not padding; the last query is at the last key."""
    allowed = mask[:, None, None] & torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scaling, enable_gqa=True)
    return o.transpose(1, 2), None


class Hooked:
    """Captures the input of one attention layer and computes the head-averaged attention of chosen rows."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self.layer, self.wanted, self.given = layer, False, None
        layer.register_forward_pre_hook(self._catch, with_kwargs=True)

    def recording(self, wanted: bool) -> Hooked:
        self.wanted = wanted
        return self

    def __enter__(self) -> None:
        self.given = None

    def __exit__(self, *_: object) -> None:
        self.wanted = False  # checkpointing comes by again

    def _catch(self, _, arguments: tuple, settings: dict[str, Any]) -> None:
        if self.wanted:
            hidden = settings["hidden_states"] if "hidden_states" in settings else arguments[0]
            self.given = hidden[0].detach(), tuple(x[0] for x in settings["position_embeddings"])

    @torch.no_grad()
    def attention(self, rows: Tensor, keys: Tensor | None = None) -> Tensor:
        """(rows, keys): `keys` are those of the rows' own rollout, in order; all by default."""
        (hidden, (cos, sin)), layer = self.given, self.layer
        keys = torch.arange(len(hidden)) if keys is None else keys

        def project(linear: torch.nn.Linear, norm: torch.nn.Module, at: Tensor) -> Tensor:
            x = norm(linear(hidden[at]).unflatten(-1, (-1, layer.head_dim)))
            first, second = x.chunk(2, -1)
            return x * cos[at, None] + torch.cat((-second, first), -1) * sin[at, None]

        q, k = project(layer.q_proj, layer.q_norm, rows), project(layer.k_proj, layer.k_norm, keys)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = torch.einsum("rhd,khd->hrk", q, k) * layer.scaling
        return scores.masked_fill(keys[None, :] > rows[:, None], -torch.inf).softmax(-1).mean(0)


def _positions(prefix, count: int) -> Tensor:
    return torch.arange(count).expand(3, -1) + prefix.next_position


def _tell(out: str, work: Work, loss: Tensor | float, attention: list[Tensor]) -> None:
    gradients = [leaf.grad for leaf in (work.features.tokens, *work.features.deepstack)]
    torch.save({"loss": torch.as_tensor(loss), "gradients": gradients, "attention": attention}, out)


def difference(found: Found, right: Found) -> float:
    """The largest relative error, over the loss, each gradient and the attention."""
    pairs = [(found["loss"], right["loss"]), *zip(found["gradients"], right["gradients"], strict=True)]
    pairs.append((torch.cat(found["attention"]), torch.cat(right["attention"])))
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=record.SHAPES, default="record")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="*", default=[" ".join(case) for case in CASES], help="'ORDER LENGTH' each")
    parser.add_argument("--model", type=Path, help="folder for the random model; by default a temporary one")
    parser.add_argument("--log", type=Path, help="file of measurements, to go on from after an interruption")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw seconds and memory here, as SVG")
    arguments = parser.parse_args()
    rivals = [name for name in RIVALS if "Grouper" not in name or importlib.util.find_spec("prefix_grouper")]
    log, figures, ratios = record.Log(arguments.log), {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = record.model(record.SHAPES[arguments.shape], arguments.model or Path(temporary) / "model")
        for case in arguments.cases:
            out, right = Path(temporary) / "found.pt", Path(temporary) / f"{case}.pt"
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in (*rivals, *OURS)}
            for repeat in range(arguments.repeats):
                for name in found:
                    if "eager" in name and repeat:
                        continue  # never the fastest nor the leanest, and once says so
                    given = arguments.shape, str(folder), *case.split(), name, str(out)
                    key = {"bench": "replay", "shape": arguments.shape, "case": case, "name": name, "repeat": repeat}
                    found[name].append(log.once(key, partial(_measure, given, out, right)))
            figures[case] = _table(case, found)
            ratios |= _ratios(case, figures[case])
    write_json(arguments.json, {"environment": log.environment, "figures": figures, "ratios": ratios})
    panels = {}
    for case, rows in figures.items():
        panels[f"{case}, seconds"] = {name: row["seconds"] for name, row in rows.items()}
        panels[f"{case}, MB beyond the weights"] = {name: row["growth_bytes"] / 1e6 for name, row in rows.items()}
    write_plot(arguments.plot, bars("Replay of one group", panels))


def _measure(given: tuple[str, ...], out: Path, right: Path) -> dict[str, Any]:
    """One process, held against the first that was measured of its case."""
    result = record.child(f"bench.replay:{'ours' if given[4] in OURS else 'rival'}", *given)
    if not right.exists():
        out.rename(right)
        return {**result, "difference": 0.0}
    return {**result, "difference": difference(torch.load(out), torch.load(right))}


def _table(case: str, found: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    print(f"\n{case}: one group\n{'':44}{'seconds':>9}{'growth, MB':>12}{'peak, MB':>10}{'difference':>12}")
    rows = {}
    for name, runs in found.items():
        row = {key: statistics.median(run[key] for run in runs) for key in ("seconds", "growth_bytes", "peak_bytes")}
        row["difference"] = max(run["difference"] for run in runs)
        assert row["difference"] < 1e-4, f"{name}: not the same gradient, off by {row['difference']:.1e}"
        megabytes = f"{row['growth_bytes'] / 1e6:12.0f}{row['peak_bytes'] / 1e6:10.0f}"
        print(f"{name:44}{row['seconds']:9.2f}{megabytes}{row['difference']:12.1e}")
        rows[name] = row
    return rows


def _ratios(case: str, rows: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The fastest of ours that takes no more memory than the rival with the least; all of ours if none does."""
    rivals = {name: row for name, row in rows.items() if name in RIVALS}
    fastest = min(row["seconds"] for row in rivals.values())
    plain = min(row["seconds"] for name, row in rivals.items() if "transformers" in name)
    leanest = min(row["growth_bytes"] for row in rivals.values())
    mine = {name: row for name, row in rows.items() if name in OURS}
    lean = {name: row for name, row in mine.items() if row["growth_bytes"] <= leanest} or mine
    best = min(lean, key=lambda name: lean[name]["seconds"])
    seconds, memory = rows[best]["seconds"], rows[best]["growth_bytes"] / leanest
    ratios = {f"replay {case}": fastest / seconds, f"replay {case}, transformers": plain / seconds}
    print(
        f"{best}: {fastest / seconds:.2f} times as fast as the fastest rival, {plain / seconds:.2f} as transformers, "
        f"{memory:.2f} of the leanest one's memory"
    )
    return {**ratios, f"replay {case}, memory": memory}


if __name__ == "__main__":
    main()
