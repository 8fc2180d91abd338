"""IP-Adapter-Plus: the official file of one adapter <-> `kolors_ref.models.ip_adapter`.

The official file holds two parts, `image_proj` and `ip_adapter`, nested in a pickle or with a dot in safetensors.
Its projections are numbered 1, 3, 5 ... in another order than ours, see `file_order`.
"""

from weights_conversion.keymaps.table import KeyTable, rows

TOP = """
    image_proj.latents                  resampler.queries
    image_proj.proj_in.*                resampler.proj_in.*
    image_proj.proj_out.*               resampler.proj_out.*
    image_proj.norm_out.*               resampler.norm_out.*
    ip_adapter.{i}.to_k_ip.weight       to_k.{i}.weight
    ip_adapter.{i}.to_v_ip.weight       to_v.{i}.weight
"""

LAYER = """
    0.norm1.*           attn.norm_image.*
    0.norm2.*           attn.norm_queries.*
    0.to_q.weight       attn.q.weight
    0.to_kv.weight      attn.kv.weight
    0.to_out.weight     attn.out.weight
    1.0.*               ff.0.*
    1.1.weight          ff.1.weight
    1.3.weight          ff.3.weight
"""

TABLE = KeyTable(
    rows(TOP) + rows(LAYER, "image_proj.layers.{i}", "resampler.layers.{i}"),
    indices=lambda config: {
        "resampler.layers.{i}": [(i,) for i in range(config["depth"])],
        "to_k.{i}": [(i,) for i in range(len(config["channels"]))],
        "to_v.{i}": [(i,) for i in range(len(config["channels"]))],
    },
)
"""Here `{i}` of a projection is already its place in order of execution."""


def file_order(down: int, mid: int, up: int) -> list[int]:
    """The place in order of execution (down, middle, up) of each projection of a file, in the file's order.

    `down`, `mid` and `up` are the numbers of cross-attentions in each part of the UNet. The file goes through the UNet
    as its parts are registered: down, up, and the middle last. Its n-th entry, n = 0, 1, 2 ..., has the number 2 n + 1,
    because self-attentions are counted too and hold nothing.
    """
    parts = range(down), range(down + mid, down + mid + up), range(down, down + mid)
    return [place for part in parts for place in part]
