"""python -m weights_conversion inspect SRC | convert SRC DST --to LAYOUT | verify A B | lora SRC DST --to NAMING"""

import argparse
import io
import signal
import sys
from collections import Counter
from typing import NoReturn

import torch

from weights_conversion.checkpoint import Checkpoint, open_checkpoint
from weights_conversion.compare import differences
from weights_conversion.convert import convert
from weights_conversion.keymaps.lora import NAMINGS
from weights_conversion.lora import read_lora, save_lora

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
ABOUT = "Look at, convert and compare Kolors checkpoints."
SHOWN = 10  # differences that verify spells out


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line on stderr and exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with the message."""
        self.exit(2, f"weights_conversion: {one_line(message)}\n")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done or the same, 1 different, 2 a mistake, 130 interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # characters that the terminal's encoding lacks are no error
        sys.stdout.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    progress = sys.stderr.isatty()
    try:
        if options.command == "inspect":
            print(describe(open_checkpoint(options.source, options.variant)))
            return 0
        if options.command == "verify":
            first = open_checkpoint(options.first, options.variant)
            return _verify(first, open_checkpoint(options.second), progress)
        if options.command == "lora":
            save_lora(options.destination, read_lora(options.source), options.to, options.force)
            return 0
        dtype = DTYPES.get(options.dtype)
        convert(options.source, options.destination, options.to, dtype, options.force, options.variant, progress)
        return 0
    except KeyboardInterrupt:
        print("weights_conversion: interrupted", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(f"weights_conversion: {one_line(error)}", file=sys.stderr)
        return 2


def one_line(message: object) -> str:
    """A message as one line; control characters, which a terminal would obey, are written out."""
    line = " ".join(str(message).split())
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)


def describe(checkpoint: Checkpoint) -> str:
    """What a checkpoint is, in a few lines: layout, and for each network tensors, parameters, formats and sizes."""
    lines = [f"{checkpoint.path}: layout {checkpoint.layout}"]
    for name, network in checkpoint.networks.items():
        counts: Counter[torch.dtype] = Counter()
        for tensor in network.tensors.values():
            counts[tensor.dtype] += tensor.numel()
        formats = ", ".join(str(dtype).removeprefix("torch.") for dtype, _ in counts.most_common())
        size = sum(dtype.itemsize * count for dtype, count in counts.items())
        total = f"{counts.total():,} parameters in {len(network.tensors)} tensors"
        lines.append(f"{name}: {total}, {formats}, {size / 1e9:.2f} GB")
        lines += [f"    {field}: {value}" for field, value in (network.config or {}).items()]
    if checkpoint.scheduler is not None:
        lines.append(f"scheduler: {one_line(checkpoint.scheduler.get('_class_name', 'of no class'))}")
    if checkpoint.tokenizer is not None:
        lines.append(f"tokenizer: {checkpoint.tokenizer.relative_to(checkpoint.path)}")
    return "\n".join(lines)


def _verify(first: Checkpoint, second: Checkpoint, progress: bool) -> int:
    count = 0
    for sentence in differences(first, second, progress):
        count += 1
        if count <= SHOWN:
            print(sentence)
    print(f"{count} differences" if count else "the same tensors")
    return 1 if count else 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m weights_conversion", description=ABOUT)
    commands = parser.add_subparsers(dest="command", required=True, metavar="inspect | convert | verify | lora")
    command = commands.add_parser("inspect", help="describe a checkpoint")
    command.add_argument("source", help="a checkpoint folder or a UNet file")
    command.add_argument("--variant", help="the files to take where there are several, such as fp16")
    command = commands.add_parser("convert", help="write a checkpoint in another layout")
    command.add_argument("source", help="a checkpoint folder: diffusers', the Kolors team's or ours")
    command.add_argument("destination", help="the folder to write; with --force it may exist")
    command.add_argument("--to", required=True, choices=["kolors-ref", "diffusers"], help="the layout to write")
    command.add_argument("--dtype", choices=list(DTYPES), help="cast floating-point tensors")
    command.add_argument("--force", action="store_true", help="replace the checkpoint at the destination")
    command.add_argument("--variant", help="the files to take where there are several, such as fp16")
    command = commands.add_parser("verify", help="compare the networks of two checkpoints: exit status 0 same, 1 not")
    command.add_argument("first", help="a checkpoint folder or a UNet file")
    command.add_argument("second", help="another, in any layout")
    command.add_argument("--variant", help="the files of the first to take where there are several, such as fp16")
    command = commands.add_parser("lora", help="write a LoRA with other names")
    command.add_argument("source", help="a LoRA file, or the folder of one")
    command.add_argument("destination", help="the .safetensors file to write")
    command.add_argument("--to", required=True, choices=NAMINGS, help="whose names to write")
    command.add_argument("--force", action="store_true", help="replace the file at the destination")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # nothing half-written is left behind
    sys.exit(main())
