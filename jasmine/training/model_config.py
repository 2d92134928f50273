"""The options of a transformer that every baseline has, and the checks that need no more than them."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from jasmine.errors import UserError
from jasmine.models.quantized import Quantize
from jasmine.models.transformer import TransformerConfig
from jasmine.training.config import TrainConfig, check_chance, check_least


@dataclasses.dataclass(frozen=True)
class ModelConfig(TrainConfig):
    """Options of the model's transformers. From `norm` on they are Dreamer 4's parts (arXiv 2509.24527); the defaults are the
    published Jasmine's."""

    model_dim: int = 512
    """Width of the transformers."""
    ffn_dim: int = 2048
    """Width of their feed-forward layers."""
    num_blocks: int = 4
    """Blocks of each transformer."""
    num_heads: int = 8
    """Attention heads."""
    dropout: float = 0.0
    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm, or RMSNorm."""
    positions: Literal["sinusoidal", "rope"] = "sinusoidal"
    """Added tables of place and time, or rotary embeddings."""
    ffn: Literal["gelu", "swiglu"] = "gelu"
    """Feed-forward layer; SwiGLU has half as many weights again at the same ffn_dim."""
    qk_norm: bool = False
    """RMSNorm over each head's queries and keys."""
    logit_soft_cap: float = 0.0
    """Bound of attention logits (50 is usual); 0: none. Turns fused attention off."""
    num_kv_heads: int | None = None
    """Heads of keys and values, fewer than num_heads for grouped-query attention. Default: as many."""
    time_every: int = 1
    """Only every n-th block attends over time."""
    num_registers: int = 0
    """Learned tokens that join each frame's."""
    quantize: Quantize = "none"
    """`int8`: the matrix products of the blocks and the gradients of their inputs run in 8 bits, with dynamic scales."""

    def transformer(self, **changes: Any) -> TransformerConfig:
        """The transformer that these options describe, but for `changes`."""
        config = TransformerConfig(
            model_dim=self.model_dim,
            ffn_dim=self.ffn_dim,
            num_blocks=self.num_blocks,
            num_heads=self.num_heads,
            dropout=self.dropout,
            dtype=jnp.dtype(self.dtype),
            flash_attention=self.use_flash_attention,
            remat=self.remat,
            norm=self.norm,
            positions=self.positions,
            ffn=self.ffn,
            qk_norm=self.qk_norm,
            logit_soft_cap=self.logit_soft_cap,
            num_kv_heads=self.num_kv_heads,
            time_every=self.time_every,
            num_registers=self.num_registers,
            quantize=self.quantize,
        )
        return dataclasses.replace(config, **changes)

    def check(self) -> None:
        super().check()
        check_least(self, 1, "model_dim", "ffn_dim", "num_blocks", "num_heads", "time_every")
        check_heads("model_dim", self.model_dim, "num_heads", self.num_heads)
        if self.num_kv_heads is not None and (self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads):
            raise UserError(f"--num_kv_heads={self.num_kv_heads} does not divide --num_heads={self.num_heads}")
        if self.num_blocks % self.time_every:
            raise UserError(f"--num_blocks={self.num_blocks} is not a multiple of --time_every={self.time_every}")
        if self.positions == "rope":
            check_even_heads("model_dim", self.model_dim, "num_heads", self.num_heads)
        check_least(self, 0, "num_registers", "logit_soft_cap")
        check_chance(self, "dropout")


def check_heads(dim_option: str, dim: int, heads_option: str, heads: int) -> None:
    """Raises UserError unless the heads divide the width."""
    if heads < 1 or dim % heads:
        raise UserError(f"--{dim_option}={dim} is not a multiple of --{heads_option}={heads}")


def check_even_heads(dim_option: str, dim: int, heads_option: str, heads: int) -> None:
    """Raises UserError unless heads have an even size, as rotary embeddings need them."""
    if dim // heads % 2:
        raise UserError(
            f"rotary positions need heads of an even size, and --{dim_option}={dim} over --{heads_option}={heads} makes "
            f"{dim // heads}"
        )


def check_patch(option: str, patch_size: int, frame_shape: tuple[int, int, int]) -> None:
    """Raises UserError, naming sizes that fit, unless patches of this size tile the frames."""
    height, width, _ = frame_shape
    if patch_size < 1 or height % patch_size or width % patch_size:
        fits = [p for p in range(2, min(height, width) + 1) if height % p == 0 and width % p == 0]
        raise UserError(
            f"--{option}={patch_size} does not divide the {height}×{width} frames; "
            f"these do: {', '.join(map(str, fits)) or 'none but 1'}"
        )


def check_pixels(data: Any, job: str) -> None:
    """Raises UserError for pre-tokenized data."""
    if data.tokens is not None:
        raise UserError(f"--data_dir holds tokens, and {job} trains on frames; name the dataset they were made from")
