"""The models that ship: they load by the ordinary classes, are recognised, and do their job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fs_plugins
from fs_plugins import registry
from fs_plugins.demo import assets, run, text, world
from fs_plugins.demo.train.llava import Dialogues, questions_and_answers
from fs_plugins.training.data import to_unit

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def llava():
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoModelForImageTextToText.from_pretrained(assets.LLAVA).eval(), AutoProcessor.from_pretrained(assets.LLAVA)


@pytest.fixture(scope="module")
def clip():
    from transformers import AutoProcessor, CLIPModel

    return CLIPModel.from_pretrained(assets.CLIP).eval(), AutoProcessor.from_pretrained(assets.CLIP)


def test_all_assets_together_are_below_25_mb():
    assert sum(path.stat().st_size for path in assets.ASSETS.rglob("*") if path.is_file()) < 25e6
    assert all(
        path.suffix in {".safetensors", ".json", ".jinja", ".md"} for path in assets.ASSETS.rglob("*") if path.is_file()
    )


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
    from fs_plugins.evaluation import ask

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
    assert set(summary["clean"]) == set(summary["attacked"]) == {"none", "fs_psm"}
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
    assert (summary["images"], summary["seed"]) == (11, 0)
    assert summary["seconds"] > 0
    picture.draw(result, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").stat().st_size > 20_000


def test_panels_show_the_scenes_that_were_attacked():
    result = run.run(run.Settings(images=11, steps=1, n0=1, draws=10), lambda what, total: lambda done: None)
    assert len(result.pictures) == 4
    for panel in result.pictures:
        assert 0 < (panel.attacked - panel.clean).abs().max() <= 1 / 255 + 1e-6
    first = world.scene("heldout", 0)
    assert torch.equal(result.pictures[0].clean, to_unit(first.draw()))


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
        assert len(table) == 4
        for (which, defence), quoted in table.items():
            row = summary[which][{"none": "none", "FS-PSM": "fs_psm"}[defence]]
            for name, value in zip(("acc", "asr", "fcs", "caption_acc", "vqa_acc"), quoted, strict=True):
                # Another processor rounds differently, which may turn a few of 200 answers.
                measured, slack = (row[name], 0.02) if name == "fcs" else (100 * row[name], 3)
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
    assert ablation["fs_pm"]["acc"] > ablation["fs"]["acc"]
    lines = (ROOT / "README.md").read_text().splitlines()
    for row in summary["certificates"]:
        [quoted] = [line.strip("| ").split(" | ")[1:] for line in lines if line.startswith(f"| {row['picture']} |")]
        measured = [row[name] for name in ("plugin", "mean", "certified")]
        assert measured == pytest.approx([float(value) for value in quoted], abs=0.01)
    assert all(row["certified"] > 1.1 * row["mean"] for row in summary["certificates"])
