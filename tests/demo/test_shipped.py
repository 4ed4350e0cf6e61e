"""The models that ship: they load by the ordinary classes, are recognised, and do their job."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch

import fs_plugins
from fs_plugins import registry
from fs_plugins.demo import assets, text, world
from fs_plugins.pictures import to_unit
from fs_plugins.plugins import known_encoders
from tools.world import robust
from tools.world.llava import Dialogues, questions_and_answers


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
    assert sum(path.stat().st_size for path in files) - robust < 31e6
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


@pytest.mark.slow
def test_the_robust_psm_stands_an_attack_on_the_answer_that_the_usual_one_does_not(llava):
    """Twelve scenes and twenty steps; docs/explanation/results.md has the whole of it."""
    from fs_plugins.attacks import Answer, attack
    from fs_plugins.hf.speech import Speech

    model, processor = llava
    scenes = [scene for scene in world.scenes("heldout", 14) if scene.shape is not None][:12]
    images = torch.stack([to_unit(scene.draw()) for scene in scenes])
    asked = Speech(model, processor, world.CLASS_PROMPT)
    right: dict[str, int] = {}
    for psm in ("auto", "robust"):
        (smoother,) = fs_plugins.smoothers(model, psm=psm, seed=0)
        shown = attack(smoother, images, method=Answer(asked), eps=8 / 255, steps=20, draws=1, seed=0)
        with torch.no_grad():
            given = asked.given(smoother.look(shown), range(len(shown)))
        said = processor.batch_decode(given.words, skip_special_tokens=True)
        right[psm] = sum(reply.strip() == str(scene.label) for reply, scene in zip(said, scenes, strict=True))
    assert right["robust"] >= right["auto"] + 3, right
