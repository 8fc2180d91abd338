"""The command line: `kolors-ref generate PROMPT` or just `kolors-ref PROMPT`, and the commands of the miniature."""

import argparse
import os
import re
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from .mini.recipe import Recipe
from .picture_file import check_png, check_writable, content_hash, read_parameters, save_picture
from .terminal import one_line, show_all_names

if TYPE_CHECKING:
    from .pipeline import KolorsPipeline

Number = TypeVar("Number", int, float)

COMMANDS = ("generate", "train", "evaluate")
DTYPES = ("float64", "float32", "bfloat16", "float16")
ABLATIONS = ("bag-of-words", "short-captions", "dense-captions", "sdxl-schedule", "no-tuning", "no-reward")
ABOUT = 'Kolors: pictures from prompts in Chinese or English. kolors-ref "PROMPT" is kolors-ref generate "PROMPT".'
MODEL_HELP = "a checkpoint's folder, or a hub id, with kolors-ref[hub] (default: the embedded miniature)"
SAMPLER_HELP = "euler, heun, ddim, dpmpp-2m-karras, ...; a wrong name lists all (default: the checkpoint's)"
GUIDANCE_HELP = "1 is no guidance (default: the checkpoint's, or 6.5)"
UNET_STEPS_HELP = f"of concept learning (default: {Recipe().unet.steps}); later stages of the UNet scale with it"
OFFLOAD_HELP = "model: one network on the device at a time; stream: block by block (default: none, if memory allows)"
OUTPUT_HELP = "folder for tables and pictures (default: %(default)s)"
LIMIT_HELP = "prompts per category, or choices per fact, in each language (default: %(default)s)"
DECODING_HELP = "tiled needs less memory above 1024 pixels, and is approximate (default: %(default)s)"
UNRECORDED = ("command", "output", "repeat", "help")
"""Arguments that do not change the picture, and are not read from one."""
REPEATABLE = ("ip_adapter", "ip_image", "lora")
"""Arguments that may be given several times."""
NEEDS = (("ip_image", "ip_adapter"), ("ip_adapter", "ip_image"), ("image_encoder", "ip_adapter"))
"""Arguments that do nothing without another."""
OUT_OF_MEMORY = re.compile("out of memory|allocate memory|not enough memory")
"""What torch says of it on a GPU and on a CPU."""
SMALLER = {
    "generate": "; try --offload stream, or a smaller picture",
    "evaluate": "; try a smaller --batch-size",
    "train": "",
}
"""What helps where memory is short."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Says what is wrong and exits with status 2."""
        self.exit(2, f"kolors-ref: error: {one_line(message)}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; gives the exit status: 0, 2 for a mistake of the user's, 130 for an interruption."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's switch for huge pages, read when it is loaded
    show_all_names()
    try:
        options = parse(list(sys.argv[1:] if arguments is None else arguments))
        if options.command == "generate":
            generate(options)
        else:
            from .mini import commands

            (commands.run_training if options.command == "train" else commands.run_evaluation)(options)
    except KeyboardInterrupt:
        print("kolors-ref: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ArithmeticError) as error:
        return fail(error)
    except MemoryError:
        return fail("out of memory" + SMALLER[options.command])
    except RuntimeError as error:
        if not OUT_OF_MEMORY.search(str(error)):
            raise
        return fail(f"out of memory ({str(error).splitlines()[0]})" + SMALLER[options.command])
    return 0


def fail(error: Exception | str) -> int:
    """Says in one line what is wrong."""
    print(f"kolors-ref: error: {one_line(error)}", file=sys.stderr)
    return 2


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the arguments; with --repeat, those that are not given are the recorded ones."""
    if arguments and arguments[0] not in COMMANDS and arguments[0] not in ("-h", "--help"):
        arguments = ["generate", *arguments]
    parser, generate_parser = build_parsers()
    options = parser.parse_args(arguments)
    if options.command != "generate":
        return options
    if options.repeat:
        recorded = read_parameters(options.repeat)
        inputs = recorded.get("inputs") if isinstance(recorded.get("inputs"), dict) else {}
        given = input_files(options)  # whoever types a file wants it as it is now
        inputs = {file: content for file, content in inputs.items() if Path(file) not in given}
        generate_parser.set_defaults(prompt=recorded.get("prompt"), index=recorded.get("index"), inputs=inputs)
        typed = {name for name in REPEATABLE if getattr(options, name)}  # they would be added to, not replaced
        recorded = {name: value for name, value in recorded.items() if name not in typed}
        options = parser.parse_args(["generate", *as_arguments(recorded, generate_parser), *arguments[1:]])
    if not options.prompt:
        parser.error("a prompt is missing; give it in quotes after the command, or a picture with --repeat")
    for given, lacking in NEEDS:
        if getattr(options, given) and not getattr(options, lacking):
            parser.error(f"--{given} does nothing without --{lacking}; give both or neither".replace("_", "-"))
    return options


def as_arguments(record: dict[str, Any], parser: Parser) -> list[str]:
    """Writes recorded options as they would be typed, so that the parser checks what may have been edited."""
    arguments = []
    for action in parser._actions:
        value = None if action.dest in UNRECORDED else record.get(action.dest)
        if action.option_strings and value is not None:
            values = value if isinstance(value, list) else [value]
            arguments += [f"{action.option_strings[-1]}={one}" for one in values]
    return arguments


def build_parsers() -> tuple[Parser, Parser]:
    """Builds the parser of the whole command line, and the one of `generate`."""
    parser = Parser(prog="kolors-ref", description=ABOUT)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    generate = commands.add_parser("generate", help="make pictures", description="Make pictures from prompts.")
    add = generate.add_argument
    add("prompt", nargs="*", metavar="PROMPT", help="what to draw; several prompts are drawn together")
    add("--model", default="mini", metavar="DIR", help=MODEL_HELP)
    add("--variant", help="files to take where a checkpoint has several, such as fp16")
    add("--unet", metavar="FILE", help="a UNet to put over the model's: a .safetensors file or a checkpoint")
    add("--negative-prompt", default="", metavar="TEXT", help="what to steer away from")
    add("--height", type=int, help="in pixels, a multiple of 8 (default: the model's native size)")
    add("--width", type=int, help="in pixels, a multiple of 8 (default: the model's native size)")
    add("--steps", type=int, default=25, help="denoising steps (default: %(default)s)")
    add("--guidance-scale", type=float, help=GUIDANCE_HELP)
    add("--guidance-interval", metavar="START,END", help="guide only this range of the steps, such as 0.2,0.8")
    add("--sampler", metavar="NAME", help=SAMPLER_HELP)
    add("--seed", type=seed_number, metavar="N", help="of the noise (default: random, and printed)")
    add("--num-images", type=int, default=1, help="pictures of each prompt (default: %(default)s)")
    add("--max-sequence-length", type=int, default=256, help="tokens per prompt, rest is cut (default: %(default)s)")
    add("--image", type=Path, metavar="FILE", help="a picture to start from")
    add("--strength", type=float, default=0.8, help="how much of --image is redone, 0 to 1 (default: %(default)s)")
    add("--ip-adapter", action="append", metavar="FILE", help="an IP-Adapter-Plus, for image prompts; repeatable")
    add("--image-encoder", metavar="DIR", help="the adapter's CLIP (default: image_encoder beside it)")
    add(
        "--ip-image",
        action="append",
        metavar="FILE",
        help="a reference picture; repeatable, one per adapter if there are several",
    )
    add("--ip-scale", type=float, default=1.0, help="weight of the reference pictures (default: %(default)s)")
    add("--lora", action="append", metavar="FILE[:SCALE]", help="a LoRA and its weight (default: 1); repeatable")
    add("--dtype", choices=DTYPES, help="to compute in (default: the checkpoint's, or one that is fast on the CPU)")
    add("--device", default="cpu", help="such as cpu or cuda (default: %(default)s)")
    add("--offload", choices=("none", "model", "stream"), help=OFFLOAD_HELP)
    add("--decoding", choices=("whole", "tiled"), default="whole", help=DECODING_HELP)
    add("-o", "--output", type=Path, metavar="FILE", help="a .png file (default: kolors-SEED.png)")
    add("--repeat", type=Path, metavar="FILE", help="make the picture of this file again; other options change it")
    generate.set_defaults(index=None, inputs={})
    add_train(commands)
    add_evaluate(commands)
    return parser, generate


def add_train(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Adds the command `train`."""
    about = "Train a miniature like the embedded one from scratch. Run it again to resume where it stopped."
    add = commands.add_parser("train", help="train a miniature", description=about).add_argument
    add("what", choices=("mini",), help="the model to train")
    add("--folder", type=Path, default=Path("mini-training"), help="for everything written (default: %(default)s)")
    add("--scale", type=positive, default=1.0, metavar="F", help="scales all steps and data (default: %(default)s)")
    add("--unet-steps", type=counting, metavar="N", help=UNET_STEPS_HELP)
    add("--seed", type=seed_number, default=0, metavar="N", help="of weights, data and noise (default: %(default)s)")
    add(
        "--ablate",
        action="append",
        choices=ABLATIONS,
        help="leave out or change a part to see its worth; repeatable",
    )
    add("--reuse", metavar="DIR", help="take unchanged stages from another run's folder, or from mini")
    add("--previous", action="store_true", help="go on from the last checkpoint but one")
    add("--device", help="cpu or cuda (default: cuda if there is one)")


def add_evaluate(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Adds the command `evaluate`."""
    about = (
        "Draw the prompts of MiniPrompts, judge the pictures, and print the scores. With --captions nothing is drawn: "
        "the UNet is offered pairs of captions of a picture, and its right choices are counted."
    )
    add = commands.add_parser("evaluate", help="score a model", description=about).add_argument
    add("--model", default="mini", metavar="DIR", help=MODEL_HELP)
    add("--captions", action="store_true", help="have it choose between captions; drawing options are ignored")
    add("--steps", type=int, default=25, help="denoising steps (default: %(default)s)")
    add("--guidance-scale", type=float, help=GUIDANCE_HELP)
    add("--sampler", metavar="NAME", help=SAMPLER_HELP)
    add("--seed", type=seed_number, default=0, metavar="N", help="of the noise of pictures (default: %(default)s)")
    add("--language", choices=("zh", "en"), help="of the prompts (default: both)")
    add("--limit", type=counting, default=24, metavar="N", help=LIMIT_HELP)
    add("--batch-size", type=counting, default=16, metavar="N", help="pictures drawn together (default: %(default)s)")
    add("--dtype", choices=DTYPES, help="to compute in (default: the checkpoint's, or one that is fast on the CPU)")
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    add("-o", "--output", type=Path, default=Path("evaluation"), metavar="DIR", help=OUTPUT_HELP)


def positive(text: str) -> float:
    """Reads a number above 0, and not beyond 1000."""
    value = number(float, text)
    if not 0 < value <= 1000:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1000")
    return value


def counting(text: str) -> int:
    """Reads a whole number from 1 to a million million."""
    value = number(int, text)
    if not 1 <= value <= 10**12:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1 and at most 10^12")
    return value


def seed_number(text: str) -> int:
    """Reads what a torch.Generator takes for a seed."""
    value = number(int, text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 2^63 - 1")
    return value


def number(kind: Callable[[str], Number], text: str) -> Number:
    """Reads an int or a float."""
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number") from None


def generate(options: argparse.Namespace) -> None:
    """Makes pictures and writes them, each with all that is needed to make it again."""
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    output = options.output or Path(f"kolors-{seed}.png")
    if options.repeat and options.output is None and output.exists() and output.samefile(options.repeat):
        raise ValueError(f"{output} would be overwritten, but is to be repeated; give another file with --output")
    check_png(output)

    import torch
    from tqdm import tqdm

    from .images import load_image
    from .pipeline import KolorsPipeline
    from .request import Request

    inputs = check_inputs(options)
    request = Request(
        prompt=options.prompt,
        negative_prompt=options.negative_prompt,
        height=options.height,
        width=options.width,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        guidance_interval=split_interval(options.guidance_interval),
        sampler=options.sampler,
        num_images_per_prompt=options.num_images,
        generator=torch.Generator().manual_seed(seed),
        image=None if options.image is None else load_image(options.image),
        strength=options.strength,
        ip_adapter_image=None if options.ip_image is None else [load_image(Path(file)) for file in options.ip_image],
        ip_adapter_scale=options.ip_scale,
        max_sequence_length=options.max_sequence_length,
    )
    paths = output_paths(options, output, request.num_images)
    if options.seed is None:
        print(f"seed {seed}", file=sys.stderr)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    where = (options.device, options.variant, options.unet, options.offload)
    pipe = KolorsPipeline.from_pretrained(options.model, dtype, *where)
    for adapter in options.ip_adapter or []:
        pipe.load_ip_adapter(adapter, options.image_encoder)
    for lora in options.lora or []:
        pipe.load_lora(*split_scale(lora))
    denoising = pipe.denoise(**vars(request))
    latents = denoising.latents
    with tqdm(denoising, unit="step", disable=None) as steps:
        for step in steps:
            steps.set_postfix(sigma=f"{step.sigma:.3f}")
            latents = step.latents
    images = pipe.decode(latents, tiled=options.decoding == "tiled")
    record = {**recorded(options, pipe, seed), "inputs": inputs}
    for index, path in paths.items():
        save_picture(images[index], path, {**record, "index": index})
        print(path)


def output_paths(options: argparse.Namespace, output: Path, count: int) -> dict[int, Path]:
    """Returns the file of each wanted picture among `count`; ValueError if none of these is wanted, OSError where a
    file cannot be written."""
    wanted = [index for index in range(count) if options.index in (None, index)]
    if not wanted:
        raise ValueError(f"{options.repeat} is picture {options.index} of its run, but {count} are asked for")
    paths = {index: output.with_stem(f"{output.stem}-{index}") if len(wanted) > 1 else output for index in wanted}
    for path in paths.values():
        check_writable(path)
    return paths


def split_interval(interval: str | None) -> tuple[float, ...] | None:
    """Splits START,END."""
    try:
        return None if interval is None else tuple(float(share) for share in interval.split(","))
    except ValueError:
        raise ValueError(f"--guidance-interval is {interval}; it must be two numbers, such as 0.2,0.8") from None


def split_scale(lora: str) -> tuple[str, float]:
    """Splits FILE:SCALE; the scale is 1 where there is none."""
    file, _, scale = lora.rpartition(":")
    try:
        return (file, float(scale)) if file else (lora, 1.0)
    except ValueError:
        if Path(lora).exists() or "/" in scale or "\\" in scale:
            return lora, 1.0
        raise ValueError(f"--lora {lora} has the scale {scale!r}; it must be a number") from None


def input_files(options: argparse.Namespace) -> list[Path]:
    """Returns the files other than the model that a picture is made from."""
    loras = [split_scale(lora)[0] for lora in options.lora or []]
    files = (options.unet, options.image, *(options.ip_image or []), *(options.ip_adapter or []), *loras)
    return [Path(file) for file in files if file is not None]


def check_inputs(options: argparse.Namespace) -> dict[str, str]:
    """Returns the content hash of every file in `input_files`.

    Raises FileNotFoundError if one is missing, and ValueError if one changed since the picture to repeat was made.
    """
    from .ip_adapter_file import encoder_folder

    inputs, files = {}, input_files(options)
    first = (options.ip_adapter or [])[:1]  # whose image encoder the others share
    for file in files + [Path(options.image_encoder or encoder_folder(adapter)) for adapter in first]:
        if not file.exists():
            raise FileNotFoundError(f"{file}, which the picture is to be made with, does not exist")
    for file in files:
        if file.is_file():
            inputs[str(file)] = content_hash(file)
            if inputs[str(file)] != options.inputs.get(str(file), inputs[str(file)]):
                raise ValueError(
                    f"{file} is no longer the file that {options.repeat} was made with; "
                    "type its option too, to take it as it is"
                )
    return inputs


def recorded(options: argparse.Namespace, pipe: "KolorsPipeline", seed: int) -> dict[str, Any]:
    """Returns the parameters that make a picture again, for `--repeat`."""
    record = {name: value for name, value in vars(options).items() if name not in UNRECORDED}
    record.update(seed=seed, dtype=str(pipe.dtype).removeprefix("torch."))
    return {name: str(value) if isinstance(value, Path) else value for name, value in record.items()}


if __name__ == "__main__":
    sys.exit(main())
