"""The CLIP ViT-L/14 text tower, as SDXL's base reads it: the hidden state before the last layer.

Attribute paths are the official checkpoint keys without `conditioner.embedders.0.transformer.`, which are those of
transformers' `CLIPTextModel`. Source: that class; `FrozenCLIPEmbedder` (layer "hidden", index 11) in
sgm/modules/encoders/modules.py; Radford et al. 2021 (arXiv:2103.00020).
Shapes: b batch, n = 77 tokens, d width.
"""

from torch import Tensor, nn

from sdxl_ref.config import TextEncoderConfig
from sdxl_ref.networks.layers import ACTIVATIONS, attention


class CLIPAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, causal=True)
        return self.out_proj(h)


class CLIPMLP(nn.Module):
    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class CLIPEncoderLayer(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.self_attn = CLIPAttention(config.width, config.heads)
        self.layer_norm1 = nn.LayerNorm(config.width)  # eps 1e-5
        self.mlp = CLIPMLP(config.width, config.activation)
        self.layer_norm2 = nn.LayerNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEmbeddings(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context_length, config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.token_embedding(tokens) + self.position_embedding.weight


class CLIPEncoder(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CLIPEncoderLayer(config) for _ in range(config.layers))

    def forward(self, x: Tensor) -> Tensor:
        """The input of the last layer, which therefore does not run: (b,n,d) -> (b,n,d)."""
        for layer in self.layers[:-1]:
            x = layer(x)
        return x


class CLIPTextTransformer(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.embeddings = CLIPEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.width)  # in the file; SDXL does not apply it

    def forward(self, tokens: Tensor) -> Tensor:
        return self.encoder(self.embeddings(tokens))


class CLIPTextEncoder(nn.Module):
    """tokens (b,77) int64, padded with end-of-text -> penultimate hidden (b,77,width), without the final norm."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = CLIPTextTransformer(config)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.text_model(tokens)
