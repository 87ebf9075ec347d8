"""Tiny random pipelines of the real diffusers classes, with character tokenizers."""

from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
PATCHES = {"sample_size": 4, "patch_size": 2, "in_channels": 4, "num_layers": 1}
TEXT = {"joint_attention_dim": 16, "caption_projection_dim": 16}


def vae(levels=1):
    """Every level except the first halves the sides."""
    sizes = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    return AutoencoderKL(**sizes, block_out_channels=(4,) * levels, norm_num_groups=1, shift_factor=0.1)


def clip(kind=CLIPTextModelWithProjection):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPTextConfig(**sizes, vocab_size=54, max_position_embeddings=9, projection_dim=8, eos_token_id=1)
    tokens = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    return kind(config), CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=9)


def t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in LETTERS)]
    return T5EncoderModel(T5Config(**sizes, vocab_size=30)), T5TokenizerFast(vocab=pieces, extra_ids=0)


def gemma():
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma2Config(**sizes, num_key_value_heads=1, head_dim=8, vocab_size=60, query_pre_attn_scalar=8)
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "▁"]
    vocabulary = {token: place for place, token in enumerate([*special, *LETTERS, *LETTERS.upper()])}
    return Gemma2Model(config), GemmaTokenizer(vocab=vocabulary, merges=[])


def sd3(levels=1, layers=1):
    extras = {"num_layers": layers, "out_channels": 4, "pos_embed_max_size": 6, "pooled_projection_dim": 16}
    parts = {"transformer": SD3Transformer2DModel(**HEADS, **PATCHES | TEXT | extras), "vae": vae(levels)}
    encoders = zip(("", "_2", "_3"), (clip(), clip(), t5()), strict=True)
    for number, (encoder, tokenizer) in encoders:
        parts |= {f"text_encoder{number}": encoder, f"tokenizer{number}": tokenizer}
    return StableDiffusion3Pipeline(scheduler=FlowMatchEulerDiscreteScheduler(), **parts)


def flux():
    sizes = {"num_layers": 1, "num_single_layers": 0, "in_channels": 16, "axes_dims_rope": (2, 2, 4)}
    transformer = FluxTransformer2DModel(**HEADS, **sizes, joint_attention_dim=16, pooled_projection_dim=8)
    (first, tokenizer), (second, tokenizer_2) = clip(CLIPTextModel), t5()
    parts = {"text_encoder": first, "text_encoder_2": second, "tokenizer": tokenizer, "tokenizer_2": tokenizer_2}
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae=vae(), transformer=transformer, **parts)


def sana():
    crossing = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
    transformer = SanaTransformer2DModel(**HEADS, **PATCHES, **crossing, out_channels=4, caption_channels=16)
    encoder, tokenizer = gemma()
    blocks = {
        "encoder_block_out_channels": (4,),
        "encoder_block_types": ("ResBlock",),
        "encoder_layers_per_block": (1,),
    }
    blocks |= {key.replace("encoder_", "decoder_"): value for key, value in blocks.items()}
    blocks |= {"encoder_qkv_multiscales": ((),), "decoder_qkv_multiscales": ((),), "decoder_norm_types": ("rms_norm",)}
    autoencoder = AutoencoderDC(**blocks, decoder_act_fns=("silu",), latent_channels=4, attention_head_dim=2)
    return SanaPipeline(tokenizer, encoder, autoencoder, transformer, FlowMatchEulerDiscreteScheduler())


def pixart():
    extras = {"out_channels": 8, "cross_attention_dim": 16, "caption_channels": 16}
    encoder, tokenizer = t5()
    return PixArtSigmaPipeline(
        tokenizer, encoder, vae(), PixArtTransformer2DModel(**HEADS, **PATCHES, **extras), DDIMScheduler()
    )
