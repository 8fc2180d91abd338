"""CLIP's vision tower: `CLIPVisionModelWithProjection` <-> `kolors_ref.models.clip`.

A file may also hold all of CLIP: its text tower is then left aside by whoever reads the file.
"""

from weights_conversion.keymaps.fields import ConfigTable
from weights_conversion.keymaps.table import KeyTable, rows

TOP = """
    vision_model.embeddings.class_embedding             class_token
    vision_model.embeddings.patch_embedding.weight      patch_embed.weight
    vision_model.embeddings.position_embedding.weight   pos_embed
    vision_model.pre_layrnorm.*                         norm_pre.*
    vision_model.post_layernorm.*                       norm_post.*
    visual_projection.weight                            proj.weight
"""

BLOCK = """
    layer_norm1.*           norm1.*
    self_attn.q_proj.*      attn.q.*
    self_attn.k_proj.*      attn.k.*
    self_attn.v_proj.*      attn.v.*
    self_attn.out_proj.*    attn.out.*
    layer_norm2.*           norm2.*
    mlp.fc1.*               mlp.0.*
    mlp.fc2.*               mlp.2.*
"""

UNUSED = frozenset({"norm_post.weight", "norm_post.bias", "proj.weight"})
"""Carried by conversion; image prompts look at hidden states, not at CLIP's embedding of the whole picture."""

TABLE = KeyTable(
    rows(TOP) + rows(BLOCK, "vision_model.encoder.layers.{i}", "blocks.{i}"),
    indices=lambda config: {"blocks.{i}": [(i,) for i in range(config["layers"])]},
    unused=UNUSED,
)

COPIED = {
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "projection_dim": "projection_dim",
    "layer_norm_eps": "norm_eps",
}

OURS = dict.fromkeys(COPIED.values(), int) | {"norm_eps": float}

DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}

REQUIRED = {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", "num_channels": 3}

# Training, text generation and the bookkeeping of transformers: old files list all of it.
IGNORED = """
    architectures attention_dropout bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty dropout dtype encoder_no_repeat_ngram_size
    eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label
    initializer_factor initializer_range label2id length_penalty max_length min_length no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences pad_token_id prefix problem_type pruned_heads repetition_penalty
    return_dict sep_token_id suppress_tokens task_specific_params temperature tie_word_embeddings tokenizer_class
    top_k top_p torch_dtype transformers_version typical_p
"""


def _to_official(ours: dict) -> dict:
    return {"architectures": ["CLIPVisionModelWithProjection"]}


CONFIG = ConfigTable(
    "CLIPVisionModelWithProjection",
    OURS,
    DEFAULTS,
    COPIED,
    REQUIRED,
    frozenset(IGNORED.split()),
    lambda config, where: {},
    _to_official,
)
