"""What an image prompt costs: guided steps of the full-size UNet with and without one, in turn.

    python tests/benchmarks/image_prompt_cost.py --folder CHECKPOINT [--dtype float32] [--size 512] [--rounds 3]

CHECKPOINT is a folder of full-size weights, such as full_size.py writes. The adapter has the official sizes and random
weights. CPU seconds add up all threads, which other work on the machine disturbs less than it does wall-clock seconds.
"""

import argparse
import statistics
import time

import torch

from kolors_ref.config import IPAdapterConfig
from kolors_ref.ip_adapter_file import cross_attention_channels
from kolors_ref.loading import load_network
from kolors_ref.models.ip_adapter import IPAdapter
from kolors_ref.models.unet import KeyValue
from weights_conversion import open_checkpoint


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    unet = load_network(open_checkpoint(options.folder).networks["unet"], dtype, "cpu")
    torch.manual_seed(0)
    adapter = IPAdapter(IPAdapterConfig(channels=cross_attention_channels(unet.config))).to(dtype)

    text, pooled = (torch.randn(2, *shape).to(dtype) for shape in ((28, 4096), (4096,)))
    latents = torch.randn(2, 4, options.size // 8, options.size // 8).to(dtype)
    sizes = torch.tensor([[options.size, options.size, 0, 0, options.size, options.size]] * 2)
    plain = unet.prepare(text, pooled, sizes, torch.zeros(2, 28))
    start = time.process_time()
    tokens = adapter.image_tokens(torch.randn(2, 577, 1024).to(dtype))
    pairs = adapter.keys_values(tokens, [attention.num_heads for attention in unet.cross_attentions()])
    prepared = time.process_time() - start
    prompted = plain.add([[KeyValue(*pair, weight=0.5)] for pair in pairs])

    seconds = {"text alone": [], "with an image prompt": []}
    for _ in range(options.rounds + 1):
        for name, context in zip(seconds, (plain, prompted), strict=True):
            wall, cpu = time.perf_counter(), time.process_time()
            unet(latents, 500, context)
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
            print(f"{name}: {seconds[name][-1][0]:.1f} s, {seconds[name][-1][1]:.1f} CPU s", flush=True)
    for i, clock in enumerate(("wall-clock", "CPU")):
        ratios = [with_it[i] / without[i] - 1 for without, with_it in list(zip(*seconds.values(), strict=True))[1:]]
        print(f"an image prompt adds {statistics.median(ratios):+.1%} to a guided step ({clock} seconds)")
    print(f"and {prepared:.1f} CPU s once a picture, for its tokens, keys and values")


if __name__ == "__main__":
    main()
