"""A registry and a hub that tests fill."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from fs_plugins.hf import encoders
from fs_plugins.hf import weights as weights_of
from fs_plugins.registry import Registry

ENTRY = """
  {name}:
    kind: fare
    architecture:
      {{family: clip_vision, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 3, num_attention_heads: 4,
       patch_size: 4, image_size: {size}, hidden_act: {act}}}
    weights: {weights}
    preprocessing: {{mean: [{mean}, 0.4578275, 0.40821073], std: [0.26862954, 0.26130258, 0.27577711]}}
    fingerprint: {print}
    psms: [{{readout: "{readout}", state: not trained yet}}]
"""


@pytest.fixture
def known(tmp_path, monkeypatch):
    """Entries into the registry, which swap_encoder then looks into."""

    def write(**entries) -> None:
        text = "version: 1\nencoders:"
        for name, changes in entries.items():
            weights = "{source: hub, location: someone/robust, format: open_clip}"
            usual = {
                "size": 8,
                "act": "quick_gelu",
                "weights": weights,
                "mean": 0.48145466,
                "readout": "pooler_output",
                "print": "unverified",
            }
            text += ENTRY.format(**{"name": name.replace("_", "-"), **usual, **changes})
        (tmp_path / "registry.yaml").write_text(text, "utf-8")
        for module in (weights_of, encoders):
            monkeypatch.setattr(module, "known_encoders", lambda: Registry([tmp_path / "registry.yaml"]))

    return write


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that has what is put into it, by (repository, file name), and notes what it is asked."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    files: dict[tuple[str, str], Path] = {}
    asked: list[tuple[str, str, str | None]] = []

    def download(repository, name, *, revision=None, local_files_only=False):
        asked.append((repository, name, revision))
        if (repository, name) not in files:
            raise EntryNotFoundError(f"no {name}")
        return str(files[repository, name])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return SimpleNamespace(files=files, asked=asked)
