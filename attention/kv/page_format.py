"""What a page holds in bytes, and how many pages a memory budget gives."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attention.kv.layout import Keeping, LatentLayer, LayerLayout
from attention.kv.quantization import storage_dtype


@dataclass(frozen=True, slots=True)
class PageFormat:
    """Pages of `page_size` tokens of a model of that layout, which computes in `dtype` and stores in `kv_dtype`.

    Raises ValueError for a `page_size` below 1, an unknown `kv_dtype`, and one for latents, which are not quantised.

    >>> layout = LayerLayout.uniform(num_layers=2, num_kv_heads=8, head_dim=128)
    >>> PageFormat(layout, page_size=16, dtype=torch.bfloat16).bytes
    131072
    >>> PageFormat(layout, page_size=16, dtype=torch.bfloat16, kv_dtype="int8").bytes  # with float32 scales
    67584
    >>> from attention.kv.layout import KeyValueLayer, SharedLayer
    >>> mixed = LayerLayout((KeyValueLayer(8, 256, 256), KeyValueLayer(2, 512, 512), SharedLayer(owner=0)))
    >>> PageFormat(mixed, page_size=16, dtype=torch.bfloat16).bytes
    196608
    """

    layout: LayerLayout
    page_size: int
    dtype: torch.dtype = torch.float32
    kv_dtype: str | None = None

    def __post_init__(self):
        if self.page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {self.page_size}")
        storage_dtype(self.kv_dtype, self.dtype)
        if self.kv_dtype is not None:
            require_plain_pages([layer for _, layer in self.layout.keeping], self.kv_dtype)

    @property
    def bytes(self) -> int:
        """Bytes of one page: keys, values and scales of all layers that keep any."""
        stored = storage_dtype(self.kv_dtype, self.dtype).itemsize
        scales = 0 if self.kv_dtype is None else 2 * torch.float32.itemsize
        of_token = [layer.numbers * stored + layer.num_kv_heads * scales for _, layer in self.layout.keeping]
        return self.page_size * sum(of_token)


def require_plain_pages(layers: Sequence[Keeping], kv_dtype: str) -> None:
    """Raise ValueError where pages in 8 bits are wanted for a layer that keeps latents."""
    latents = [layer for layer in layers if isinstance(layer, LatentLayer)]
    if latents:
        raise ValueError(
            f"kv_dtype={kv_dtype!r} is not for layers that keep latents ({latents[0].numbers} numbers a token in place "
            "of every head's key and value): leave it None"
        )


def pages_within(budget: int, *formats: PageFormat) -> int:
    """How many pages of each of `formats` fit into `budget` bytes together, equally many of each.

    Raises ValueError where not one of each fits, and without a format.

    >>> target = PageFormat(LayerLayout.uniform(32, 8, 128), page_size=128, dtype=torch.bfloat16)
    >>> draft = PageFormat(LayerLayout.uniform(16, 8, 64), page_size=128, dtype=torch.bfloat16)
    >>> pages_within(8 * 2**30, target), pages_within(8 * 2**30, target, draft)
    (512, 409)
    """
    sizes = [form.bytes for form in formats]
    if not sizes or budget < sum(sizes):
        raise ValueError(f"a page of each of {len(sizes)} formats takes {sum(sizes)} bytes {sizes}, got {budget}")
    return budget // sum(sizes)


def latent_layer(num_kv_heads: int, head_dim: int, value_head_dim: int | None, kv_dtype: str | None) -> LatentLayer:
    """The layer of pages whose values are in their keys. Raises ValueError for sizes or a `kv_dtype` that misfit."""
    if num_kv_heads != 1 or value_head_dim is None:
        raise ValueError(
            f"values in keys are those of one kv head with a value_head_dim, got {num_kv_heads} and {value_head_dim}"
        )
    layer = LatentLayer(value_head_dim, head_dim - value_head_dim)
    if kv_dtype is not None:
        require_plain_pages([layer], kv_dtype)
    return layer
