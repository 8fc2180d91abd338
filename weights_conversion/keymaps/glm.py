"""ChatGLM3 as the text encoder: `ChatGLMModel` <-> `kolors_ref.models.glm`."""

from weights_conversion.keymaps.fields import ConfigTable
from weights_conversion.keymaps.table import KeyTable, rows

TOP = """
    embedding.word_embeddings.weight    token_embed.weight
    encoder.final_layernorm.weight      final_norm.weight
    output_layer.weight                 lm_head.weight
    rotary_pos_emb.inv_freq             rope.inv_freq
"""

LAYER = """
    input_layernorm.weight              norm1.weight
    self_attention.query_key_value.*    attn.qkv.*
    self_attention.dense.weight         attn.out.weight
    post_attention_layernorm.weight     norm2.weight
    mlp.dense_h_to_4h.weight            ffn.up.weight
    mlp.dense_4h_to_h.weight            ffn.down.weight
"""

UNUSED = frozenset({"final_norm.weight", "lm_head.weight", "rope.inv_freq"})
"""Carried by conversion; the encoder stops before the final norm and computes its rotation frequencies itself."""

TABLE = KeyTable(
    rows=rows(TOP) + rows(LAYER, "encoder.layers.{i}", "layers.{i}"),
    indices=lambda config: {"layers.{i}": [(i,) for i in range(config["num_layers"])]},
    prefix="transformer.",  # in the files of the language model, which wraps the encoder
    unused=UNUSED,
)

COPIED = {
    "padded_vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_hidden_size",
    "num_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "kv_channels": "head_dim",
    "multi_query_group_num": "num_kv_groups",
    "layernorm_epsilon": "norm_eps",
    "seq_length": "max_positions",
}

OURS = dict.fromkeys(COPIED.values(), int) | {"norm_eps": float}

DEFAULTS = {
    "padded_vocab_size": 65024,
    "hidden_size": 4096,
    "ffn_hidden_size": 13696,
    "num_layers": 28,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "multi_query_group_num": 1,
    "layernorm_epsilon": 1e-5,
    "seq_length": 2048,
    "add_qkv_bias": False,
    "multi_query_attention": False,
}

REQUIRED = {
    "model_type": "chatglm",
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "add_qkv_bias": True,
    "add_bias_linear": False,
    "multi_query_attention": True,
    "original_rope": True,
    "fp32_residual_connection": False,
    "quantization_bit": 0,
    "pre_seq_len": None,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}

WITHOUT_EFFECT = """
    apply_query_key_layer_scaling attention_softmax_in_fp32 bias_dropout_fusion classifier_dropout prefix_projection
    architectures auto_map bos_token_id chunk_size_feed_forward decoder_start_token_id dtype eos_token_id
    finetuning_task id2label is_encoder_decoder label2id max_length name_or_path output_attentions
    output_hidden_states pad_token_id problem_type return_dict sep_token_id tie_word_embeddings tokenizer_class
    torch_dtype transformers_version unk_token_id use_cache vocab_size
"""
"""Scaling that cancels out, parts that are switched off, generation, and the bookkeeping of transformers."""


def _to_official(ours: dict) -> dict:
    return {"architectures": ["ChatGLMModel"]}


CONFIG = ConfigTable(
    "ChatGLMModel",
    OURS,
    DEFAULTS,
    COPIED,
    REQUIRED,
    frozenset(WITHOUT_EFFECT.split()),
    lambda config, where: {},
    _to_official,
)
