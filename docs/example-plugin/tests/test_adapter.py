import torch
from tinyvlm import TinyVLM

from fs_plugins.testing import AdapterConformance


class TestTinyVLM(AdapterConformance):
    adapter = "tinyvlm"
    image_size = (32, 32)

    def make_model(self):
        torch.manual_seed(0)
        return TinyVLM().eval()

    def make_inputs(self, model, images):
        # The framework's own rule, spelled out: this is what finds a wrong mean or std in the adapter.
        mean = images.new_tensor([0.5, 0.4, 0.3]).view(3, 1, 1)
        std = images.new_tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
        return {"image": (images - mean) / std, "words": torch.tensor([[3, 4, 5]] * len(images))}

    def outcome(self, model, inputs):
        return model(**inputs)
