"""Strangers from transformers and peft: language models."""

from typing import Any

import torch
from torch import Tensor, nn

from strangers.entry import IN_FLOAT32, Stranger, stranger

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def token_poses() -> list[dict[str, Tensor]]:
    return [{"input_ids": torch.randint(3, 40, (1, n))} for n in (5, 7, 6, 4)]


def mean_hidden(model: nn.Module, pose: dict[str, Tensor]) -> Tensor:
    return model(**pose).last_hidden_state.mean((1, 2))


def last_logit(model: nn.Module, pose: dict[str, Tensor]) -> Tensor:
    return model(**pose, use_cache=False).logits[:, -1, 0]


def first_logit(model: nn.Module, pose: dict[str, Tensor]) -> Tensor:
    return model(**pose).logits[:, 0]


def _transformers() -> Any:
    import transformers  # noqa: PLC0415 - optional

    return transformers


@stranger("transformers", quick=True)
def bert_with_dropout() -> Stranger:
    library = _transformers()
    config = library.BertConfig(**SIZES, num_labels=1, max_position_embeddings=16)
    return Stranger(library.BertForSequenceClassification(config).train(), token_poses(), first_logit)


@stranger("transformers")
def bert_with_checkpoints() -> Stranger:
    made = bert_with_dropout()
    made.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    return made


@stranger("transformers")
def distilbert() -> Stranger:
    library = _transformers()
    config = library.DistilBertConfig(vocab_size=40, dim=16, hidden_dim=24, n_layers=2, n_heads=2, num_labels=1)
    return Stranger(library.DistilBertForSequenceClassification(config).train(), token_poses(), first_logit)


@stranger("transformers")
def gpt2() -> Stranger:
    library = _transformers()
    config = library.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    return Stranger(library.GPT2LMHeadModel(config).train(), token_poses(), last_logit)  # its head is tied


@stranger("transformers", quick=True, tolerance=IN_FLOAT32)
def llama() -> Stranger:
    library = _transformers()
    config = library.LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=True)
    return Stranger(library.LlamaForCausalLM(config).train(), token_poses(), last_logit)


@stranger("transformers", quick=True, tolerance=IN_FLOAT32)
def mixtral_with_its_balance_loss() -> Stranger:
    """A mixture of experts: an expert that no token chooses gets no gradient."""
    library = _transformers()
    config = library.MixtralConfig(
        **SIZES,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
        experts_implementation="eager",
    )

    def with_balance_loss(model: nn.Module, pose: dict[str, Tensor]) -> Tensor:
        output = model(**pose, use_cache=False)
        return output.logits[:, -1, 0] + output.aux_loss

    return Stranger(library.MixtralForCausalLM(config).train(), token_poses(), with_balance_loss)


@stranger("transformers", tolerance=IN_FLOAT32)
def deepseek() -> Stranger:
    library = _transformers()
    config = library.DeepseekV3Config(
        **SIZES,
        moe_intermediate_size=8,
        num_key_value_heads=2,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        head_dim=4,
        experts_implementation="eager",
    )
    return Stranger(library.DeepseekV3ForCausalLM(config).train(), token_poses(), last_logit)


@stranger("transformers", tolerance=IN_FLOAT32)
def t5_encoder() -> Stranger:
    library = _transformers()
    config = library.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return Stranger(library.T5EncoderModel(config).train(), token_poses(), mean_hidden)


@stranger("transformers", tolerance=IN_FLOAT32)
def mamba() -> Stranger:
    library = _transformers()
    config = library.MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=2)
    return Stranger(library.MambaForCausalLM(config).train(), token_poses(), last_logit)


@stranger("transformers")
def wav2vec2() -> Stranger:
    """Masks its input by numpy's random numbers, and skips layers at random."""
    library = _transformers()
    config = library.Wav2Vec2Config(
        **SIZES,
        conv_dim=(8, 8),
        conv_stride=(4, 4),
        conv_kernel=(8, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.3,
        mask_time_length=2,
        layerdrop=0.3,
        apply_spec_augment=True,
    )
    poses = [{"input_values": torch.randn(1, n)} for n in (300, 340, 320, 360)]
    return Stranger(library.Wav2Vec2Model(config).train(), poses, mean_hidden)


@stranger("peft", quick=True, tolerance=IN_FLOAT32)
def lora() -> Stranger:
    import peft  # noqa: PLC0415 - optional

    made = llama()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, init_lora_weights=False)
    return Stranger(peft.get_peft_model(made.model, config).train(), made.poses, made.call)


@stranger("peft")
def adapters_of_peft() -> Stranger:
    """IA3 beside trained weights of the head (`modules_to_save`)."""
    import peft  # noqa: PLC0415

    made = bert_with_dropout()
    config = peft.IA3Config(
        target_modules=["query", "output.dense"], feedforward_modules=["output.dense"], modules_to_save=["classifier"]
    )
    return Stranger(peft.get_peft_model(made.model, config).train(), made.poses, made.call)


@stranger("transformers", tolerance=IN_FLOAT32, refusal="classifier.weight, which gradhooks cannot intercept")
def switch_transformers() -> Stranger:
    """Its router converts its own parameters to float32 in the forward."""
    library = _transformers()
    config = library.SwitchTransformersConfig(
        vocab_size=40,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_sparse_encoder_layers=1,
        num_heads=2,
        num_experts=4,
    )
    return Stranger(library.SwitchTransformersEncoderModel(config).train(), token_poses(), mean_hidden)


@stranger("transformers", quick=True, refusal="recurrent_states holds a tensor with a graph")
def recurrent_gemma() -> Stranger:
    """It keeps its last states, with their graph, in attributes."""
    library = _transformers()
    config = library.RecurrentGemmaConfig(**SIZES, lru_width=16, attention_window_size=8, head_dim=8)
    return Stranger(library.RecurrentGemmaForCausalLM(config).train(), token_poses(), last_logit)
