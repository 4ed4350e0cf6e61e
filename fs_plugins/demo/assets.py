"""Where the embedded world's trained models lie."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
CLIP = ASSETS / "clip"
LLAVA = ASSETS / "llava"
FARE = ASSETS / "fare"
TECOA = ASSETS / "tecoa"
PSM_LLAVA = ASSETS / "psm-llava"
PSM_CLIP = ASSETS / "psm-clip"
PSM_NO_PURIFIER = ASSETS / "psm-llava-no-purifier"
