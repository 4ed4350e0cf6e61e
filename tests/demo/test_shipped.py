"""The models that ship: they load by the ordinary classes, are recognised, and do their job."""

from __future__ import annotations

import copy
import json
import math
import warnings
from pathlib import Path

import pytest
import torch

import fs_plugins
from fs_plugins import registry
from fs_plugins.demo import assets, run, text, world
from fs_plugins.pictures import to_unit
from fs_plugins.plugins import known_encoders
from tools.world import robust
from tools.world.llava import Dialogues, questions_and_answers

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def llava():
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoModelForImageTextToText.from_pretrained(assets.LLAVA).eval(), AutoProcessor.from_pretrained(assets.LLAVA)


@pytest.fixture(scope="module")
def clip():
    from transformers import AutoProcessor, CLIPModel

    return CLIPModel.from_pretrained(assets.CLIP).eval(), AutoProcessor.from_pretrained(assets.CLIP)


def test_assets_are_small():
    files = [path for path in assets.ASSETS.rglob("*") if path.is_file()]
    robust = sum(path.stat().st_size for path in files if path.parent in (assets.FARE, assets.TECOA))
    assert sum(path.stat().st_size for path in files) - robust < 25e6
    assert robust < 4e6
    assert all(path.suffix in {".safetensors", ".json", ".jinja", ".md"} for path in files)


def test_the_registrys_checksums_and_fingerprints_are_those_of_the_files(clip, llava):
    shipped = registry.shipped()
    for psm in shipped.entries["demo-clip"].psms:
        folder = assets.ASSETS / psm.path.rsplit("/", 1)[1]
        assert registry.checksum(folder) == psm.sha256
        assert fs_plugins.PSM.from_pretrained(folder).config.sigma_range == psm.sigma_range
    own = fs_plugins.identity.fingerprint(fs_plugins.vision_call(clip[0]).module)
    assert own == shipped.entries["demo-clip"].fingerprint
    assert own == fs_plugins.identity.fingerprint(fs_plugins.vision_call(llava[0]).module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_psm_auto_finds_the_shipped_psm_for_either_readout(dtype):
    from transformers import AutoModelForImageTextToText, CLIPModel

    for kind, folder, name in (
        (CLIPModel, assets.CLIP, "demo-psm-clip"),
        (AutoModelForImageTextToText, assets.LLAVA, "demo-psm-llava"),
    ):
        model = kind.from_pretrained(folder, dtype=dtype).eval()
        with fs_plugins.enable(model) as handle:
            told = handle.status().vision[0]
            assert (told.psm, told.sigma, told.n0) == (name, 0.25, 4)
            assert all(readout.mapped for readout in told.readouts)
            assert "image processor of" in told.pixels


def test_the_small_llava_answers_and_the_plugin_keeps_it_answering(llava):
    from fs_plugins.hf.chat import ask

    model, processor = llava
    scenes = [s for s in world.scenes("heldout", 22) if s.shape]
    pictures, questions = [s.draw() for s in scenes], [world.CLASS_PROMPT] * len(scenes)
    wanted = [str(s.label) for s in scenes]

    def right() -> int:
        return sum(a == b for a, b in zip(ask(model, processor, pictures, questions), wanted, strict=True))

    assert right() >= 18
    with fs_plugins.enable(model, seed=0):
        assert right() >= 16


def test_clip_zero_shot_through_the_processor(clip):
    model, processor = clip
    scenes = [s for s in world.scenes("heldout", 44) if s.shape]
    prompts = [f"a {s.size} {s.colour} {shape} on the left" for shape in world.CLASSES for s in scenes[:1]]
    inputs = processor(text=prompts, images=[s.draw() for s in scenes], return_tensors="pt", padding=True)
    with fs_plugins.enable(model, seed=0), torch.no_grad():
        smoothed = model(**inputs).logits_per_image.argmax(-1)
    assert (smoothed == torch.tensor([s.label for s in scenes])).float().mean() > 0.5


def test_packed_dialogues_train_what_is_served(llava):
    """A training row's logits are those of the same dialogue standing alone after the image."""
    model, processor = llava
    scenes = world.scenes("train", 2)
    tokenizer = text.build_tokenizer(append_eos=False)
    talk = Dialogues.of(tokenizer, scenes)
    pixels = processor.image_processor([s.draw() for s in scenes], return_tensors="pt")["pixel_values"]
    core = model.model
    with torch.no_grad():
        seen = core.multi_modal_projector(core.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:])
        embedded = core.get_input_embeddings()(talk.ids)
        embedded = embedded.masked_scatter((talk.ids == 4).unsqueeze(-1).expand_as(embedded), seen)
        packed = model.lm_head(
            core.language_model(
                inputs_embeds=embedded, attention_mask=talk.mask, position_ids=talk.positions
            ).last_hidden_state
        )
        for row, scene in enumerate(scenes):
            ends = (talk.ids[row] == text.SPECIAL.index(text.EOS)).nonzero().flatten().tolist()
            for end, (question, answer) in zip(ends, questions_and_answers(scene), strict=True):
                prompt = text.prompt(question).replace(text.IMAGE, text.IMAGE * 64)
                inputs = tokenizer.encode(f"{prompt} {answer}").ids
                alone = model(input_ids=torch.tensor([inputs]), pixel_values=pixels[row : row + 1]).logits[0, -1]
                assert torch.allclose(packed[row, end - 1], alone, atol=1e-3)


def test_a_short_demo_has_the_promised_summary_and_picture(tmp_path):
    from fs_plugins.demo import picture

    result = run.run(run.Settings(images=11, steps=2, n0=2, draws=100), lambda what, total: lambda done: None)
    summary = json.loads(run.write_summary(result, tmp_path).read_text())
    assert list(summary["clean"]) == list(summary["attacked"]) == list(DEFENCES.values())
    for rows in (summary["clean"], summary["attacked"]):
        for row in rows.values():
            assert set(row) == {"acc", "asr", "fcs", "caption_acc", "vqa_acc"}
            assert all(0 <= value <= 1 for name, value in row.items() if name != "fcs")
    assert list(summary["ablation"]) == ["none", "fs", "fs_m", "fs_p", "fs_pm"]
    assert all(set(row) == {"acc", "asr", "fcs"} for row in summary["ablation"].values())
    assert len(summary["certificates"]) == 4
    for row, panel in zip(summary["certificates"], result.pictures, strict=True):
        assert row["picture"] == panel.truth
        assert row["certified"] == pytest.approx(panel.certificate.radius(), abs=1e-4)
        assert row["plugin"] > row["certified"] > row["mean"] > 0
    assert (summary["images"], summary["robust_images"], summary["seed"]) == (11, 11, 0)
    assert summary["seconds"] > 0
    picture.draw(result, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").stat().st_size > 20_000


def test_panels_show_the_scenes_that_were_attacked():
    result = run.run(run.Settings(images=11, steps=1, n0=1, draws=10), lambda what, total: lambda done: None)
    assert len(result.pictures) == 4
    for panel in result.pictures:
        assert (panel.attacked - panel.clean).abs().max().item() == pytest.approx(result.settings.eps, abs=1e-6)
    first = world.scene("heldout", 0)
    assert torch.equal(result.pictures[0].clean, to_unit(first.draw()))


DEFENCES = {
    "none": "none",
    "FS-PSM": "fs_psm",
    "FARE": "fare",
    "FARE + FS-PSM": "fare_fs_psm",
    "TeCoA": "tecoa",
    "TeCoA + FS-PSM": "tecoa_fs_psm",
}


def documented(page: str) -> dict[tuple[str, str], list[float]]:
    """The rows of a page's table of results: (pictures, defence) -> ACC, ASR, FCS, caption, question."""
    rows = {}
    for line in (ROOT / page).read_text().splitlines():
        cells = [cell.strip().replace(" %", "") for cell in line.strip("|").split("|")]
        if cells[0] in ("clean", "attacked") and len(cells) == 7:
            rows[cells[0], cells[1]] = [float(cell) for cell in cells[2:]]
    return rows


@pytest.mark.slow
def test_the_demo_holds_what_the_project_promises_and_documents():
    """The thresholds the project set itself, on the command's own defaults, and the tables that quote it."""
    summary = run.run(run.Settings(), lambda what, total: lambda done: None).summary()
    for page in ("README.md", "fs_plugins/demo/assets/README.md"):
        table = documented(page)
        assert {which for which, _ in table} == {"clean", "attacked"}
        assert {defence for _, defence in table} == set(DEFENCES)
        for (which, defence), quoted in table.items():
            row = summary[which][DEFENCES[defence]]
            for name, value in zip(("acc", "asr", "fcs", "caption_acc", "vqa_acc"), quoted, strict=True):
                # Another processor rounds differently, which may turn a few of 200 answers, or of 50 for robust towers.
                points = 3 if DEFENCES[defence] in ("none", "fs_psm") else 8
                measured, slack = (row[name], 0.02) if name == "fcs" else (100 * row[name], points)
                assert abs(measured - value) <= slack, (page, which, defence, name, measured, value)
    clean, attacked, ablation = summary["clean"], summary["attacked"], summary["ablation"]
    assert clean["none"]["acc"] >= 0.95
    assert clean["none"]["caption_acc"] >= 0.90
    assert attacked["none"]["acc"] <= 0.15
    assert attacked["none"]["asr"] >= 0.85
    assert attacked["fs_psm"]["acc"] >= 0.80
    assert attacked["fs_psm"]["asr"] <= 0.05
    assert clean["fs_psm"]["acc"] >= 0.85
    assert attacked["fs_psm"]["fcs"] > attacked["none"]["fcs"]
    for tower in ("fare", "tecoa"):
        assert attacked[tower]["acc"] < attacked["fs_psm"]["acc"], "16/255 is beyond what they were trained against"
        assert attacked[tower]["asr"] < attacked["none"]["asr"]
    assert ablation["fs_pm"]["acc"] > ablation["fs"]["acc"]
    lines = (ROOT / "README.md").read_text().splitlines()
    for row in summary["certificates"]:
        [quoted] = [line.strip("| ").split(" | ")[1:] for line in lines if line.startswith(f"| {row['picture']} |")]
        measured = [row[name] for name in ("plugin", "mean", "certified")]
        assert measured == pytest.approx([float(value) for value in quoted], abs=0.01)
    assert all(row["certified"] > 1.1 * row["mean"] for row in summary["certificates"])


@pytest.mark.slow
def test_fare_and_tecoa_withstand_what_they_were_trained_against(llava):
    """At 4/255, on 100 scenes with a shape: 2 % for the vanilla tower, 37 % for FARE and 22 % for TeCoA where they were trained.

    Another processor rounds differently, which may turn a few answers.
    """
    settings = run.Settings(images=110, eps=4 / 255)
    facts = world.scenes("heldout", settings.images)
    clean, targets = (torch.stack([to_unit(s.draw()) for s in some]) for some in (facts, world.scenes("target", 110)))
    accuracy = {}
    for tower, source in run.TOWERS.items():
        model, processor = copy.deepcopy(llava[0]), llava[1]
        if source is not None:
            fs_plugins.swap_encoder(model, source)
        call = fs_plugins.vision_call(model)
        attacked = run._attack(call, clean, targets, settings, lambda what, total: lambda done: None, tower)
        row = run.Row()
        run._classify(model, processor, call, facts, attacked, row)
        accuracy[tower] = sum(row.acc) / len(row.acc)
    assert accuracy["fare"] >= accuracy["none"] + 0.2, accuracy
    assert accuracy["tecoa"] >= accuracy["none"] + 0.15, accuracy


@pytest.mark.parametrize("name", ["demo-fare", "demo-tecoa"])
def test_robust_towers_are_recognised_and_served_with_the_vanilla_towers_psm(llava, name):
    model = copy.deepcopy(llava[0])
    swapped = fs_plugins.swap_encoder(model, name)
    assert (swapped.size, swapped.tokens) == (64, 64)
    call = fs_plugins.vision_call(model)
    match = known_encoders().find(call)
    assert (match.name, match.psm_name, match.verified) == (name, "demo-clip", True)
    assert "PSM of demo-clip, used unchanged" in str(match)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fs_plugins.enable(model) as handle:
            assert handle.status().vision[0].psm == "demo-psm-llava"


def test_the_losses_of_fare_and_tecoa_are_theirs():
    reference = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    directions = torch.tensor([[2.0, 0.0], [0.0, 2.0]])  # unit text embeddings times the logit scale
    found = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    fare = robust.losses("fare", reference, directions, torch.tensor([0, 1]))
    assert fare(found).tolist() == [4.0, 25.0], "squared l2 to the frozen encoder's embedding of the clean picture"
    tecoa = robust.losses("tecoa", reference, directions, torch.tensor([0, 1]))
    expected = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(1.2 - 1.6))]
    assert tecoa(found).tolist() == pytest.approx(expected), "cross-entropy of scaled cosines"


@pytest.mark.parametrize("what", ["fare", "tecoa"])
def test_a_robust_tower_is_trained_from_the_shipped_clip_alone(what, tmp_path, monkeypatch):
    from transformers import CLIPVisionModelWithProjection

    monkeypatch.setattr(robust, "TRAIN_SCENES", 12)
    for name in ("one", "two"):
        robust.train_robust(what, assets.CLIP, tmp_path / name, tmp_path / "cache.npy", 2, 4, seed=0)
    one, two = (CLIPVisionModelWithProjection.from_pretrained(tmp_path / name) for name in ("one", "two"))
    before = CLIPVisionModelWithProjection.from_pretrained(assets.CLIP).half().state_dict()
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), "the seed decides"
    assert torch.equal(one.visual_projection.weight.half(), before["visual_projection.weight"])
    assert not torch.equal(one.state_dict()[next(iter(before))].half(), next(iter(before.values())))
