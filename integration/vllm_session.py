"""One engine of vLLM in a process of its own: asked about pictures, and about itself. Prints JSON.

    python integration/vllm_session.py FOLDER OPTIONS

FOLDER has the questions (``asked.json``) and pictures; OPTIONS is JSON: ``engine``, what ``vllm.LLM`` takes; ``bare``,
whether to ask without smoothing as well; ``ranks``, whether to ask every rank what its encoder says of one picture;
``forget``, whether the processes that this one starts are to know nothing of smoothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SMALL = {
    "enforce_eager": True,
    "max_model_len": 512,
    "dtype": "float32",
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 64 << 20,
    "limit_mm_per_prompt": {"image": 1},
    "disable_log_stats": True,
}
"""What a small machine can bear. With the cache's size given, nothing is profiled, so the first call is the first
request's."""


def main(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Start, ask, tell."""
    from vllm import LLM, SamplingParams

    from fs_plugins.demo import assets

    if options.get("forget"):
        _forget()
    llm = LLM(str(assets.LLAVA), **{**SMALL, **options.get("engine", {})})
    if options.get("ranks"):
        told = [llm.collective_rpc(features) for _ in range(2)]
        return {"ranks": [[one.tolist() for one in call] for call in told], "shares": llm.collective_rpc(share)}
    greedy = SamplingParams(temperature=0, max_tokens=8)

    def answers() -> list[str]:
        # One by one, so that the k-th call of the encoder is the k-th picture's.
        return [llm.chat(one, greedy, use_tqdm=False)[0].outputs[0].text for one in conversations(folder)]

    found: dict[str, Any] = {"answers": answers(), "status": llm.collective_rpc(status)}
    if options.get("bare"):
        llm.collective_rpc(unprotect)
        llm.reset_mm_cache()
        llm.reset_prefix_cache()
        llm.llm_engine.reset_encoder_cache()
        found["bare"] = answers()
    return found


def _forget() -> None:
    """Once this process has its guard, take the variable away."""
    import os

    from fs_plugins.vllm import VARIABLE, guard

    install = guard.install

    def installed(text: str) -> None:
        install(text)
        del os.environ[VARIABLE]

    guard.install = installed


def conversations(folder: Path) -> list[list[dict[str, Any]]]:
    """A question about a picture each."""
    from fs_plugins.pictures import address

    made = []
    for one in json.loads((folder / "asked.json").read_text("utf-8")):
        shown = address((folder / one["picture"]).read_bytes())
        parts = [
            {"type": "image_url", "image_url": {"url": shown}},
            {"type": "text", "text": one["prompt"]},
        ]
        made.append([{"role": "user", "content": parts}])
    return made


def status(worker: Any) -> str:
    import fs_plugins

    return str(fs_plugins.status(worker.get_model()))


def unprotect(worker: Any) -> None:
    import fs_plugins

    fs_plugins.disable(worker.get_model())


def features(worker: Any) -> Any:
    """What this rank's encoder says of one picture, smoothed as it is served."""
    import torch

    import fs_plugins

    call = fs_plugins.vision_call(worker.get_model())
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return call.served(picture).flatten()[:256]


def share(worker: Any) -> int:
    """How many numbers of the encoder this rank holds."""
    import fs_plugins

    return sum(one.numel() for one in fs_plugins.vision_call(worker.get_model()).module.parameters())


if __name__ == "__main__":
    print("TOLD " + json.dumps(main(Path(sys.argv[1]), json.loads(sys.argv[2]))))
