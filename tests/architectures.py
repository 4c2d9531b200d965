"""Architectures of transformers, timm and torchvision, small and random: what units are found in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

IDS = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))
ZEROS = torch.zeros(2, dtype=torch.int64)
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Architecture:
    """A small random model with a batch for it.

    Attributes:
        make: the model.
        batch: inputs and targets.
        predict: the model's output -> logits, where `find_units` needs it.
    """

    make: Callable[[], nn.Module]
    batch: Any
    predict: Callable[[Any], Tensor] | None = None

    def build(self) -> nn.Module:
        """The model in evaluation mode, every parameter random: a new model's zeros would hide a bias or a gate."""
        torch.manual_seed(0)
        model = self.make().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.2)
                if parameter.dim() == 1:  # biases and norms' gains
                    parameter.add_(0.5)
        return model


def pictures(size: int, count: int = 2) -> Any:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, size, size, generator=generator), torch.zeros(count, dtype=torch.int64)


def of_transformers(kind: str, **settings: Any) -> Callable[[], nn.Module]:
    config = getattr(
        transformers, f"{kind.partition('For')[0].removesuffix('LMHeadModel').removesuffix('Model')}Config"
    )
    return lambda: getattr(transformers, kind)(config(**settings))


def text(kind: str, **settings: Any) -> Architecture:
    return Architecture(of_transformers(kind, **settings), ({"input_ids": IDS}, IDS if "LM" in kind else ZEROS))


def classes(name: str, size: int, **settings: Any) -> Architecture:
    """A model of timm, of pictures of a size."""
    return Architecture(lambda: timm.create_model(name, num_classes=3, **settings), pictures(size))


def seen(name: str, size: int, **settings: Any) -> Architecture:
    """A model of torchvision, of pictures of a size."""
    return Architecture(lambda: getattr(torchvision.models, name)(num_classes=3, **settings), pictures(size))


def embeddings(output: Any) -> Tensor:
    return torch.cat([output.image_embeds, output.text_embeds], 1)


def first_logits(output: Any) -> Tensor:
    logits: Tensor = output.logits
    return logits


VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CLIP = {
    "text_config": {**SMALL, "max_position_embeddings": 16},
    "vision_config": {**VISION, "image_size": 16, "patch_size": 8},
    "projection_dim": 16,
}
SIGNAL = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_conv_pos_embeddings": 4}
SIGNAL |= {"num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer", "num_feat_extract_layers": 2}


class Recurrent(nn.Module):
    """A recurrent layer between an embedding and a head."""

    def __init__(self, cell: type[nn.Module], **settings: Any) -> None:
        super().__init__()
        self.embed, self.cell = nn.Linear(4, 6), cell(6, 8, batch_first=True, **settings)
        self.head = nn.Linear((settings.get("proj_size") or 8) * (2 if settings.get("bidirectional") else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.cell(self.embed(x))[0][:, -1])
        return logits


def recurrent(cell: type[nn.Module], **settings: Any) -> Architecture:
    steps = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    return Architecture(lambda: Recurrent(cell, **settings), (steps, ZEROS))


NAMED: dict[str, Architecture] = {
    # named in the documentation's table
    "timm ViT": classes("vit_tiny_patch16_224", 32, img_size=32, depth=2, embed_dim=48),
    "timm DeiT": classes("deit_tiny_distilled_patch16_224", 32, img_size=32, depth=2, embed_dim=48),
    "timm Swin": classes("swin_tiny_patch4_window7_224", 32, img_size=32, depths=(1, 1, 1, 1), window_size=4),
    "timm EVA02": classes("eva02_tiny_patch14_224", 28, img_size=28, depth=2),
    "timm EVA02 base": classes("eva02_base_patch14_448", 28, img_size=28, depth=2, embed_dim=48, num_heads=4),
    "ViT": Architecture(
        of_transformers("ViTForImageClassification", **VISION, image_size=16, patch_size=8), pictures(16)
    ),
    "BERT": text("BertForSequenceClassification", **SMALL),
    "GPT-NeoX": text("GPTNeoXForCausalLM", **SMALL),
    "Llama": text("LlamaForCausalLM", **GROUPED),
    "Mistral": text("MistralForCausalLM", **GROUPED),
    "Qwen2": text("Qwen2ForCausalLM", **GROUPED),
    "Qwen3": text("Qwen3ForCausalLM", **GROUPED, head_dim=8),
    "Gemma2": text("Gemma2ForCausalLM", **GROUPED, head_dim=8),
    "Phi-3": text("Phi3ForCausalLM", **GROUPED),
    "T5": Architecture(
        of_transformers(
            "T5ForConditionalGeneration",
            vocab_size=64,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        ),
        ({"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}, IDS[:, :5]),
        first_logits,
    ),
    "Whisper": Architecture(
        of_transformers(
            "WhisperForConditionalGeneration",
            vocab_size=64,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_mel_bins=8,
            max_source_positions=10,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        (
            {
                "input_features": torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(0)),
                "decoder_input_ids": IDS[:, :5],
            },
            IDS[:, :5],
        ),
        first_logits,
    ),
    "CLIP": Architecture(
        of_transformers("CLIPModel", **CLIP),
        ({"input_ids": IDS, "pixel_values": pictures(16)[0]}, ZEROS),
        embeddings,
    ),
    "Falcon": text("FalconForCausalLM", **{k: v for k, v in SMALL.items() if k != "intermediate_size"}),
    "Bloom": text("BloomForCausalLM", vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    "OPT": text("OPTForCausalLM", **SMALL, ffn_dim=48, max_position_embeddings=16, word_embed_proj_dim=32),
    "ALBERT": text("AlbertForSequenceClassification", **SMALL, embedding_size=16),
    "DeepSeek-V3": text(
        "DeepseekV3ForCausalLM",
        **SMALL,
        num_key_value_heads=4,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=6,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=20,
        first_k_dense_replace=1,
    ),
    "Mixtral": text("MixtralForCausalLM", **GROUPED, num_local_experts=4),
    "Qwen3-MoE": text(
        "Qwen3MoeForCausalLM", **GROUPED, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20
    ),
    "OLMoE": text("OlmoeForCausalLM", **GROUPED, num_experts=4, num_experts_per_tok=2),
    "GPT-OSS": text("GptOssForCausalLM", **GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "torch encoder": Architecture(
        lambda: nn.Sequential(
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), 2, enable_nested_tensor=False
            ),
            nn.Flatten(),
            nn.Linear(64, 3),
        ),
        (torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(1)), ZEROS),
    ),
    "GPT-2": text(
        "GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=64, bos_token_id=1, eos_token_id=2
    ),
    "ResNet-18": seen("resnet18", 32),
    "MobileNetV2": seen("mobilenet_v2", 32),
    "LSTM, projected": recurrent(nn.LSTM, proj_size=5),
    "LSTM, projected, deep": recurrent(nn.LSTM, proj_size=5, num_layers=2, bidirectional=True),
    "LSTM": recurrent(nn.LSTM),
    "GRU": recurrent(nn.GRU),
    "RNN": recurrent(nn.RNN),
}
OTHERS: dict[str, Architecture] = {
    "ConvNeXt": seen("convnext_tiny", 32),
    "RegNet": seen("regnet_y_400mf", 32),
    "DenseNet": seen("densenet121", 32),
    "EfficientNet": seen("efficientnet_b0", 32),
    "MobileNetV3": seen("mobilenet_v3_small", 32),
    "Inception": seen("googlenet", 64, aux_logits=False, init_weights=False),
    "torchvision ViT": Architecture(
        lambda: torchvision.models.VisionTransformer(16, 8, 2, 4, 32, 48, num_classes=3), pictures(16)
    ),
    "torchvision Swin v2": Architecture(
        lambda: torchvision.models.SwinTransformer(
            [4, 4],
            16,
            [2, 2],
            [2, 4],
            [2, 2],
            num_classes=3,
            block=torchvision.models.swin_transformer.SwinTransformerBlockV2,
            downsample_layer=torchvision.models.swin_transformer.PatchMergingV2,
        ),
        pictures(32),
    ),
    "Mixer": Architecture(
        lambda: timm.models.MlpMixer(num_classes=3, img_size=16, patch_size=4, num_blocks=2, embed_dim=32), pictures(16)
    ),
    "CaiT": classes("cait_xxs24_224", 32, img_size=32, depth=2, embed_dim=32, num_heads=4),
    "XCiT": classes("xcit_nano_12_p16_224", 32, img_size=32, depth=2, embed_dim=32, num_heads=4),
    "DistilBERT": text(
        "DistilBertForSequenceClassification", vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=48
    ),
    "RoBERTa": text("RobertaForSequenceClassification", **SMALL),
    "DeBERTa-v2": text(
        "DebertaV2ForSequenceClassification",
        **SMALL,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        max_position_embeddings=16,
    ),
    "ELECTRA": text("ElectraForSequenceClassification", **SMALL, embedding_size=16),
    "GPT-J": text(
        "GPTJForCausalLM",
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=32,
        rotary_dim=4,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "StableLM": text("StableLmForCausalLM", **GROUPED),
    "Granite": text("GraniteForCausalLM", **GROUPED),
    "Mamba": text("MambaForCausalLM", vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4),
    "XLNet": text("XLNetForSequenceClassification", vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48),
    "Wav2Vec2": Architecture(
        of_transformers("Wav2Vec2ForSequenceClassification", **SMALL, **SIGNAL, classifier_proj_size=16),
        ({"input_values": torch.randn(2, 120, generator=torch.Generator().manual_seed(0))}, ZEROS),
    ),
    "BART": text(
        "BartForCausalLM",
        vocab_size=64,
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=48,
        max_position_embeddings=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
ALL = {**NAMED, **OTHERS}
