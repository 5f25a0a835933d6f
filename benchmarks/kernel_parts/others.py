"""Other people's attention on the same work, as far as the device and what is installed allow: see ``measure``."""

import functools
import importlib.util
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import machine
from kernel_parts.cases import Heads, Row, Setting, Skipped, make_batch, repeated, seconds_of, work_of


def contiguous(part: str, setting: Setting, heads: Heads, batch: int, context: int) -> Row:
    """jax.nn.dot_product_attention: every row's keys and values in one piece, as long as the longest."""
    key = jax.random.key(0)
    new = 1 if part == "decode" else context
    shape = batch, context, heads.kv_heads, heads.head_dim
    q = jax.random.normal(key, (batch, new, heads.kv_heads * heads.group, heads.head_dim), setting.dtype)
    k, v = (jax.random.normal(key, shape, setting.dtype) for _ in range(2))
    by = "cudnn" if setting.platform == "gpu" else "xla"
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=part == "prefill", implementation=by)
    times = min(4, setting.times(part, context))
    seconds = seconds_of(repeated(lambda q, k, v: attend(q, k, v), times), q, (k, v), times, setting.repeats)
    case = f"{heads.name} {batch} x {context:,}" if part == "decode" else f"{heads.name} {context:,}"
    return Row(part, case, f"jax.nn, {by}", seconds, **work_of(part, setting, heads, batch, context))


def jax_paged(part: str, setting: Setting, heads: Heads, batch: int, context: int) -> Row:
    """jax's own paged attention for the device; it decodes only, and has keys and values in arrays of their own."""
    if part != "decode":
        raise Skipped("jax's paged kernel decodes only")
    where = {"gpu": "jax.experimental.pallas.ops.gpu.paged_attention"}.get(setting.platform)
    where = "jax.experimental.pallas.ops.tpu.paged_attention" if setting.platform == "tpu" else where
    if where is None:
        raise Skipped(f"jax has no paged kernel for {setting.platform}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still what others use
        attend = importlib.import_module(where).paged_attention
    block = 64
    q, _, _, pages, ragged = make_batch(setting, heads, block, batch, context, 1)
    k, v = (pages[:, 1, half].transpose(1, 0, 2, 3) for half in (0, 1))  # K P C H
    if setting.platform == "gpu":
        step = lambda q, k, v, tables, lengths: attend(q, k, v, tables, lengths)  # noqa: E731
        rest = k, v, ragged.tables, ragged.context
    else:
        per_block = next(n for n in (8, 4, 2, 1) if ragged.tables.shape[1] % n == 0)
        step = lambda q, k, v, lengths, tables: attend(  # noqa: E731
            q, k, v, lengths, tables, pages_per_compute_block=per_block
        )
        rest = k, v, ragged.context, ragged.tables
    seconds = seconds_of(repeated(step, 10), q, rest, 10, setting.repeats)
    case = f"{heads.name} {batch} x {context:,} in {block}"
    return Row(part, case, "jax paged", seconds, **work_of(part, setting, heads, batch, context))


def cudnn_paged(part: str, setting: Setting, heads: Heads, batch: int, context: int) -> Row:
    """cuDNN's paged attention, as JAX has it: its pool has exactly as many pages as the tables have entries."""
    if setting.platform != "gpu":
        raise Skipped("cuDNN is for NVIDIA GPUs")
    block, new = 64, 1 if part == "decode" else context
    times = setting.times(part, context)
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    q, _, _, pages, ragged = make_batch(setting, heads, block, batch, context, new)
    q = q.reshape(batch, new, -1, heads.head_dim).transpose(0, 2, 1, 3)
    k, v = (pages[1:, 1, half] for half in (0, 1))  # P K C H
    tables = (ragged.tables - 1)[:, None, :, None]
    mask = cudnn.MaskType.PADDING if part == "decode" else cudnn.MaskType.PADDING_CAUSAL
    fixed = {"scale": heads.head_dim**-0.5, "mask_type": mask, "qkv_layout": "BNTH"}
    step = lambda q, k, v, news, lengths, tables: cudnn.paged_attention(  # noqa: E731
        q, k, v, news, lengths, tables, tables, **fixed
    )
    rest = k, v, jnp.full(batch, new, jnp.int32), ragged.context, tables
    seconds = seconds_of(repeated(step, times), q, rest, times, setting.repeats)
    case = f"{heads.name} {batch} x {context:,}" if part == "decode" else f"{heads.name} {context:,}"
    return Row(part, f"{case} in {block}", "cudnn paged", seconds, **work_of(part, setting, heads, batch, context))


def torch_sdpa(part: str, setting: Setting, heads: Heads, batch: int, context: int) -> Row:
    """PyTorch's scaled_dot_product_attention on contiguous keys and values."""
    torch = _torch(setting)
    attend = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, is_causal=part == "prefill", enable_gqa=True
    )
    return _of_torch("torch", attend, part, setting, heads, batch, context)


def torch_flex(part: str, setting: Setting, heads: Heads, batch: int, context: int) -> Row:
    """PyTorch's flex attention, compiled, on contiguous keys and values."""
    torch = _torch(setting)
    if setting.platform != "gpu":
        raise Skipped("flex attention is measured on GPUs alone")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    causal = None
    if part == "prefill":
        causal = create_block_mask(lambda b, h, q, k: q >= k, None, None, context, context)
    attend = functools.partial(torch.compile(flex_attention), block_mask=causal, enable_gqa=True)
    return _of_torch("torch flex", attend, part, setting, heads, batch, context)


def _torch(setting: Setting):
    if importlib.util.find_spec("torch") is None:
        raise Skipped("PyTorch is not installed")
    import torch

    if setting.platform == "gpu" and not torch.cuda.is_available():
        raise Skipped("the PyTorch that is installed has no CUDA")
    return torch


def _of_torch(by: str, attend: Callable, part: str, setting: Setting, heads: Heads, batch: int, context: int) -> Row:
    import torch

    cuda = setting.platform == "gpu"
    place = {"device": "cuda" if cuda else "cpu", "dtype": getattr(torch, setting.dtype)}
    new, heads_q = (1 if part == "decode" else context), heads.kv_heads * heads.group
    q = torch.randn(batch, heads_q, new, heads.head_dim, **place)
    k, v = (torch.randn(batch, heads.kv_heads, context, heads.head_dim, **place) for _ in range(2))

    def run() -> None:
        attend(q, k, v)
        if cuda:
            torch.cuda.synchronize()

    seconds = machine.median_seconds(lambda: run() or jnp.zeros(()), setting.repeats)
    case = f"{heads.name} {batch} x {context:,}" if part == "decode" else f"{heads.name} {context:,}"
    return Row(part, case, by, seconds, **work_of(part, setting, heads, batch, context))


ALL = {
    "jax.nn": contiguous,
    "jax's paged kernel": jax_paged,
    "cuDNN's paged attention": cudnn_paged,
    "PyTorch": torch_sdpa,
    "flex attention": torch_flex,
}


def measure(name: str, part: str, setting: Setting, heads: Heads, batch: int, context: int) -> Row:
    """One of them. Raises Skipped, whatever goes wrong: what they can do depends on releases and on others' tools."""
    try:
        return ALL[name](part, setting, heads, batch, context)
    except Skipped:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0][:120]
        raise Skipped(f"{name}: {type(error).__name__}: {first}") from None
