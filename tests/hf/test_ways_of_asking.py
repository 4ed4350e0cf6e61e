"""However a smoothed model is asked (batches, streams, beams, pipelines, attacks, a Trainer), each call is smoothed."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from support import IMAGE_TOKEN, Classifier, llava_inputs, pixels_of
from torch import nn

import fs_plugins

SMOOTHING = {"psm": None, "sigma": 0.25, "n0": 2, "noise_scope": "image", "seed": 1}
GREEDY = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [IMAGE_TOKEN]}


def conversation(images: int, tokens: int = 16) -> list[int]:
    return [1, *[*[IMAGE_TOKEN] * tokens, 5] * images, 6, 7]


def test_a_batch_of_conversations_with_no_one_and_several_images_is_answered_as_each_alone(llava, images):
    counts = (1, 0, 2)
    rows = [conversation(count) for count in counts]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    with fs_plugins.enable(llava, **SMOOTHING) as handle, torch.no_grad():
        together = llava(input_ids=ids, attention_mask=mask, pixel_values=pixels_of(images)).logits[:, -1]
        assert handle.status().vision[0].images == 3
        for i, part in enumerate((images[:1], None, images[1:])):
            pixels = {} if part is None else {"pixel_values": pixels_of(part)}
            alone = llava(input_ids=torch.tensor([rows[i]]), **pixels).logits[0, -1]
            assert torch.allclose(together[i], alone, atol=1e-4)
    with torch.no_grad():
        plain = llava(input_ids=ids, attention_mask=mask, pixel_values=pixels_of(images)).logits[:, -1]
    assert [torch.allclose(plain[i], together[i], atol=1e-4) for i in range(3)] == [False, True, False]


def test_a_stream_brings_what_a_whole_answer_is_and_looks_once(llava, images):
    from transformers.generation.streamers import BaseStreamer

    class Kept(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    inputs, kept = llava_inputs(images[:1]), Kept()
    with fs_plugins.enable(llava, **SMOOTHING) as handle:
        whole = llava.generate(**inputs, **GREEDY)
        llava.generate(**inputs, **GREEDY, streamer=kept)
        assert handle.status().vision[0].calls == 2
    assert kept.tokens == whole[0].tolist()
    assert kept.ended


@pytest.mark.parametrize("beams", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}])
def test_beams_are_those_of_a_model_that_looks_at_the_served_features(llava, images, beams):
    call = fs_plugins.vision_call(llava)
    with fs_plugins.enable(llava, **SMOOTHING) as handle:
        served = []
        watching = call.module.register_forward_hook(lambda module, args, output: served.append(output))
        found = llava.generate(**llava_inputs(images), **GREEDY, **beams)
        watching.remove()
        assert handle.status().vision[0].calls == len(served) == 1
    given = call.module.register_forward_hook(lambda module, args, output: served[0])
    assert torch.equal(llava.generate(**llava_inputs(images), **GREEDY, **beams), found)
    given.remove()


def test_pipelines_ask_the_smoothed_model():
    from transformers import pipeline

    from fs_plugins.hf.load import load_model, load_processor

    clip, processor = load_model("demo-clip"), load_processor("demo-clip")
    ask = pipeline(
        "zero-shot-image-classification",
        model=clip,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
    )
    height, width = fs_plugins.vision_call(clip).image_size
    noise = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(noise.to(torch.uint8).numpy())

    def scores():
        labels = ["a red circle", "a blue square", "a green triangle"]
        return [one["score"] for one in ask([picture] * 2, candidate_labels=labels, batch_size=2)[0]]

    plain = scores()
    with fs_plugins.enable(clip, **SMOOTHING) as handle:
        smoothed = scores()
        assert smoothed == pytest.approx(scores(), abs=1e-5)
        seen = handle.status().vision[0]
        assert seen.calls >= 2
        assert seen.images == 4
    assert smoothed != pytest.approx(plain, abs=1e-4)
    assert scores() == pytest.approx(plain)


def pgd(model, images, labels, *, eps=8 / 255, alpha=2 / 255, steps=5, eot=1):
    """torchattacks' PGD and EOTPGD, and foolbox's LinfPGD but for their checks: same steps, same order."""
    loss, attacked = nn.CrossEntropyLoss(), images.clone().detach()
    for _ in range(steps):
        slope = torch.zeros_like(attacked)
        for _ in range(eot):
            attacked.requires_grad = True
            (grad,) = torch.autograd.grad(loss(model(attacked), labels), attacked)
            slope += grad
        attacked = attacked.detach() + alpha * slope.sign()
        attacked = (images + torch.clamp(attacked - images, min=-eps, max=eps)).clamp(0, 1).detach()
    return attacked


@pytest.mark.parametrize("eot", [1, 2])
def test_the_loops_of_attack_libraries_climb_through_smoothing(images, eot):
    model = Classifier().eval()
    labels = model(images).argmax(1)
    loss = nn.CrossEntropyLoss()
    with fs_plugins.enable(model.llava, **{**SMOOTHING, "n0": 4}) as handle:
        attacked = pgd(model, images, labels, eot=eot)
        assert handle.status().vision[0].calls == 5 * eot
        assert (attacked - images).abs().max() <= 8 / 255 + 1e-6
        with torch.no_grad():
            assert loss(model(attacked), labels) > loss(model(images), labels)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_trainer_tunes_lora_of_an_enabled_model_and_every_step_is_smoothed(llava, images, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import Trainer, TrainingArguments

    tuned = peft.get_peft_model(llava, peft.LoraConfig(target_modules=r".*language_model.*q_proj", r=2)).eval()
    row = {name: value[0] for name, value in llava_inputs(images[:1]).items()}
    rows = [{**row, "labels": row["input_ids"].masked_fill(row["input_ids"] == IMAGE_TOKEN, -100)}] * 8
    before = {name: value.clone() for name, value in tuned.state_dict().items()}
    with fs_plugins.enable(tuned, **SMOOTHING) as handle:
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=3, learning_rate=1e-2, report_to=[],
            save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        trainer = Trainer(model=tuned, args=arguments, train_dataset=rows)
        with pytest.warns(fs_plugins.FSPluginsWarning, match="training mode"):
            assert trainer.train().training_loss > 0
        seen = handle.status().vision[0]
        assert (seen.calls, seen.images) == (3, 6)
    changed = {name for name, value in tuned.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
