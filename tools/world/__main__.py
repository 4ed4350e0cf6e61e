"""Train the embedded world's models: ``python -m tools.world WHAT --assets FOLDER``.

In this order: clip, llava, purifier, purifier-wider, psm-llava, psm-clip, psm-llava-no-purifier, fare,
tecoa. Everything is seeded and runs on a CPU; the folders written are the ones that ship.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tools.world.clip import train_clip
from tools.world.llava import train_llava
from tools.world.psm import train_parts
from tools.world.robust import UPDATES, train_robust


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = ["purifier", "purifier-wider", "psm-llava", "psm-clip", "psm-llava-no-purifier"]
    parser.add_argument("what", choices=["clip", "llava", *parts, "fare", "tecoa"])
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("runs/world/train.npy"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    assets, cache, steps, seed = arguments.assets, arguments.cache, arguments.steps, arguments.seed
    if arguments.what == "clip":
        train_clip(assets / "clip", cache, steps or 2200, 128, seed)
    elif arguments.what == "llava":
        train_llava(assets / "clip", assets / "llava", cache, steps or 1000, 24, seed)
    elif arguments.what in ("fare", "tecoa"):
        what = arguments.what
        train_robust(what, assets / "clip", assets / what, cache, steps or UPDATES[what], 48, seed)
    else:
        train_parts(arguments.what, assets, steps, seed)


if __name__ == "__main__":
    main()
