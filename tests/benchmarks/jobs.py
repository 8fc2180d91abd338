"""What is measured: one job is one process."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

PARTS = ("text", "image", "unet", "vae", "picture")
CONTESTANTS = ("ours", "diffusers", "best", "float32")
"""Ours; diffusers as its documentation runs it; diffusers at its best (channels-last); the reference for errors."""

COMPILED = ("ours", "best")
"""Those that are compiled if asked."""

PROMPT = "雪山脚下的湖边，一只戴围巾的狐狸坐在木船上，清晨，薄雾，油画"
"""25 tokens of the official tokenizer, the prefix included."""

STEPS = 25
"""Steps of a whole picture."""


@dataclass(frozen=True)
class Job:
    """A stage or a whole picture, for one contestant, once.

    Attributes:
        part: one of PARTS.
        contestant: one of CONTESTANTS.
        dtype, device: to compute in and on, by name.
        side: of the picture in pixels; 0 where it plays no role.
        ip_adapter: with one reference picture.
        compiled: with torch.compile: for diffusers at its best and for ours, whose pictures only without offload.
        steps: of a picture; 0 for the other parts.
        round: 0, 1, ...
        offload: where a picture's weights rest, "none", "model" or "stream": for ours, and for diffusers at its best.
    """

    part: str
    contestant: str
    dtype: str
    device: str
    side: int = 0
    ip_adapter: bool = False
    compiled: bool = False
    steps: int = 0
    round: int = 0
    offload: str = "none"

    @property
    def key(self) -> str:
        """Its name in the results."""
        return "-".join(str(value) for value in astuple(self))


def make_jobs(
    parts: Sequence[str],
    contestants: Sequence[str],
    sides: Sequence[int],
    rounds: int,
    dtype: str,
    device: str,
    ip_adapter: bool,
    compiled: bool,
    steps: int,
    offload: str = "none",
) -> list[Job]:
    """Lists the jobs in order: in every round each contestant once, so that a drift of the machine meets them all."""
    jobs = []
    for part in parts:
        if part == "image" and not ip_adapter:
            continue
        for side in [0] if part in ("text", "image") else sides:
            for number in range(rounds):
                for contestant in contestants:
                    if not takes_part(contestant, part, number):
                        continue
                    with_ip = ip_adapter and part in ("image", "unet", "picture")
                    own_steps = steps if part == "picture" else 0
                    own_dtype = "float32" if contestant == "float32" else dtype
                    changed = {
                        "compiled": compiled and contestant in COMPILED,
                        "offload": offload if part == "picture" and contestant != "diffusers" else "none",
                    }
                    jobs.append(
                        Job(
                            part, contestant, own_dtype, device, side, with_ip, steps=own_steps, round=number, **changed
                        )
                    )
    return jobs


def takes_part(contestant: str, part: str, number: int) -> bool:
    """Whether there is anything new: memory formats change no text or image encoder, and an error needs no rounds."""
    if contestant == "best":
        return part in ("unet", "vae", "picture")
    if contestant == "float32":
        return part in ("text", "unet", "vae") and number == 0
    return True
