"""What certifying an answer costs: speed beside a bare loop, a second question, servings that early stopping needs.

    python benchmarks/answers.py                # all three: some minutes
    python benchmarks/answers.py --only needed --scenes 3

All on the embedded demo: its LLaVA, its PSM, its held-out scenes that show a shape, asked for its number; one thread.

- Speed: servings per second. A bare loop is what one would write with ``fs_plugins.enable`` alone: the processor once,
  then the model's ``generate`` about one image for each serving. Beside it the library's blocks of servings, which read
  the number that is said (``Words``), or find the likeliest of all (``Compared``). They are timed in turns in one
  process, each on as many servings; what is printed are medians and their ratios.
- A second question about the same image: the time of two questions over that of one, in turns.
- Servings needed to prove a radius of .25 sigma at alpha = .001 with ``target``, beside a fixed n. The pilot, which
  chooses n0 and class and which the fixed n needs as well, is shown apart.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor

import fs_plugins
from fs_plugins.certificates.asking import AnswerPlan, Question, Replies, certify_replies
from fs_plugins.demo import assets, world
from fs_plugins.hf.certified import replies_of
from fs_plugins.hf.dialogue import dialogue
from fs_plugins.hf.load import load_model, load_processor
from fs_plugins.pictures import to_unit
from fs_plugins.psm import PSM
from fs_plugins.readings import Compared, Words

ALPHA, PILOT, TOKENS = 1e-3, 32, 8
NUMBERS = [str(number) for number, _ in enumerate(world.CLASSES)]
KEY = b"benchmark"
Way = Callable[[int], tuple[float, str]]
"""The number of a turn -> its seconds, and what was heard."""


def scenes(many: int) -> list[world.Scene]:
    """The first held-out ones that show a shape."""
    every: Iterator[world.Scene] = (world.scene("heldout", index) for index in count())
    return list(islice((scene for scene in every if scene.shape is not None), many))


class Demo:
    """The demo's model, its processor and its PSM."""

    def __init__(self) -> None:
        self.model = load_model("demo").requires_grad_(False)
        self.processor: Any = load_processor("demo")
        self.psm = PSM.from_pretrained(assets.PSM_LLAVA)

    def replies(self, *questions: Question, **plan: Any) -> Replies:
        effort = AnswerPlan(alpha=ALPHA, pilot=PILOT, **plan)
        return replies_of(self.model, self.processor, questions, effort, max_new_tokens=TOKENS, psm=self.psm)

    def bare(self, scene: world.Scene, n0: int, servings: int) -> tuple[float, str]:
        """Seconds of a loop over servings, and what it heard."""
        prompt = dialogue(self.processor, world.CLASS_PROMPT)
        with fs_plugins.enable(self.model, psm=self.psm, n0=n0, noise="iid"):
            inputs = self.processor(text=prompt, images=scene.draw(), return_tensors="pt")
            begins = inputs["input_ids"].shape[1]
            said = []
            began = time.perf_counter()
            for _ in range(servings):
                tokens = self.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
                said.append(self.processor.decode(tokens[0, begins:], skip_special_tokens=True).strip())
            took = time.perf_counter() - began
        return took, heard(*Counter(said).most_common(1)[0], servings)


def certified(replies: Replies, image: Tensor, turn: int) -> tuple[float, str]:
    """Seconds of the servings, the pilot's among them, and what was heard after the pilot."""
    began = time.perf_counter()
    one = certify_replies(replies, image, key=KEY + str(turn).encode())[0]
    return time.perf_counter() - began, heard(*one.said[0], one.n)


def heard(answer: str, times: int, servings: int) -> str:
    return f"{100 * times / servings:.0f} % say {answer}"


def in_turns(ways: Mapping[str, Way], turns: int) -> tuple[dict[str, float], dict[str, str]]:
    """The median seconds of each, and what it heard last; the first turn warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    said: dict[str, str] = {}
    for turn in range(turns + 1):
        for name, way in ways.items():
            took, said[name] = way(turn)
            seconds[name] += [took] if turn else []
    return {name: statistics.median(took) for name, took in seconds.items()}, said


def speed(demo: Demo, turns: int, servings: int) -> None:
    scene = scenes(1)[0]
    image = to_unit(scene.draw())
    for n0 in (1, 4):
        ways: dict[str, Way] = {"bare loop": partial(_loop, demo, scene, n0, servings)}
        for reading in (Words(NUMBERS), Compared(NUMBERS)):
            replies = demo.replies(Question(world.CLASS_PROMPT, reading), n0=n0, n=servings - PILOT)
            ways[type(reading).__name__] = partial(certified, replies, image)
        median, said = in_turns(ways, turns)
        print(f"speed, n0 = {n0}, {servings} servings of one image, median of {turns} turns:")
        for name, took in median.items():
            ratio = median["bare loop"] / took
            print(f"  {name}: {servings / took:.1f} servings/s, {ratio:.2f} x the bare loop; {said[name]}")


def _loop(demo: Demo, scene: world.Scene, n0: int, servings: int, turn: int) -> tuple[float, str]:
    return demo.bare(scene, n0, servings)


def second(demo: Demo, turns: int, servings: int) -> None:
    scene = scenes(1)[0]
    image = to_unit(scene.draw())
    first = Question(world.CLASS_PROMPT, Words(NUMBERS))
    other = Question(scene.question("colour").prompt, Words((*world.COLOURS, world.NONE)))
    for n0 in (1, 4):
        asked = {"one": [first], "two": [first, other]}
        ways = {
            name: partial(certified, demo.replies(*questions, n0=n0, n=servings - PILOT), image)
            for name, questions in asked.items()
        }
        median, _ = in_turns(ways, turns)
        one, two = median["one"], median["two"]
        print(f"a second question, n0 = {n0}, {servings} servings, median of {turns} turns:")
        print(f"  one question: {one:.2f} s, two: {two:.2f} s, {two / one:.2f} x")


def needed(demo: Demo, many: int, fixed: int) -> None:
    sigma = demo.psm.config.sigma
    target = 0.25 * sigma
    question = Question(world.CLASS_PROMPT, Words(NUMBERS))
    for n0 in (None, 1):
        replies = demo.replies(question, n0=n0, n=fixed, target=target)
        pilot = PILOT * len(replies.plan.choices)
        found = [certify_replies(replies, to_unit(scene.draw()), key=KEY)[0] for scene in scenes(many)]
        counts = [one.n for one in found]
        reached = sum((one.radius or 0.0) >= target for one in found)
        alone = statistics.median(fixed / made for made in counts)
        whole = statistics.median((fixed + pilot) / (made + pilot) for made in counts)
        chosen = ", ".join(f"{times} x {value}" for value, times in sorted(Counter(one.n0 for one in found).items()))
        print(
            f"needed for R = {target:g} (.25 sigma) at alpha = {ALPHA:g}, "
            f"{'n0 chosen by the pilot' if n0 is None else f'n0 = {n0}'}, {many} scenes, {reached} of them get there:"
        )
        print(f"  servings: median {statistics.median(counts):g}, {min(counts)} to {max(counts)}; fixed: {fixed:,}")
        print(f"  pilot: {pilot} servings; n0 by scene: {chosen}")
        print(f"  fixed / needed, median over scenes: {alone:.1f} x; with the pilot on both sides: {whole:.1f} x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", choices=["speed", "second", "needed"])
    parser.add_argument("--turns", type=int, default=9, help="speed, second: of which medians are taken")
    parser.add_argument(
        "--servings", type=int, default=128, help=f"speed, second: of a turn, {PILOT} of them the pilot's"
    )
    parser.add_argument("--scenes", type=int, default=50, help="needed: held-out scenes")
    parser.add_argument("--n", type=int, default=1000, help="needed: the fixed number of servings, and the most")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    demo = Demo()
    sections: dict[str, Callable[[], None]] = {
        "speed": lambda: speed(demo, asked.turns, asked.servings),
        "second": lambda: second(demo, asked.turns, asked.servings),
        "needed": lambda: needed(demo, asked.scenes, asked.n),
    }
    for name in [asked.only] if asked.only else sections:
        sections[name]()


if __name__ == "__main__":
    main()
